"""Each script in a notebook with no other file of this repository there, in a real kernel."""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import TINY
from nbclient import NotebookClient


@pytest.fixture(scope="session")
def argv(script, tmp_path_factory):
    """Three steps on drawn images, which are decoded once for all notebooks of a script."""
    packs = str(tmp_path_factory.mktemp("packs"))
    return [*TINY[script], "--data", "synthetic", "--steps", "3", "--out", "run", "--root", packs]


def run_notebook(folder, cells):
    """Run cells in a fresh kernel with `folder` as its working directory; returns what they printed."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=place).execute()
    return "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)


def test_by_writefile(script, argv, tmp_path, monkeypatch):
    """`!python` is a shell's, so the environment that the tests run in is put first on its PATH."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    name = f"{script.SCRIPT}.py"
    written = f"%%writefile {name}\n{Path(script.__file__).read_text()}"
    text = run_notebook(tmp_path, [written, f"!python {name} {' '.join(argv)}"])
    assert (tmp_path / "run" / "models.pth").exists(), text


def test_pasted_into_a_cell(script, argv, tmp_path):
    """The last line is what a user edits; main() takes the defaults there, not the kernel's own sys.argv."""
    text = Path(script.__file__).read_text()
    assert text.endswith('if __name__ == "__main__":\n    main()\n# --- end shared ---\n')
    pasted = text.replace("    main()\n", f"    main({argv})\n")
    defaults = "train = lambda args, saved: print('HAS', args.width, args.data, args.out)\nmain(), main([])"
    shown = run_notebook(tmp_path, [pasted, defaults])
    assert (tmp_path / "run" / "models.pth").exists(), shown
    args = script.parse([])[0]
    assert shown.count(f"HAS {args.width} {args.data} {args.out}") == 2


def test_sections_are_cells_of_a_notebook(script, argv, tmp_path):
    """In the percent format: jupytext opens the script, and it runs from top to bottom, cell by cell."""
    book = jupytext.reads(Path(script.__file__).read_text(), "py:percent")
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    marks = sum(cell.cell_type == "markdown" for cell in book.cells)
    assert len(cells) >= 7 and (marks >= 4 or script.SCRIPT != "fashion_keras_port")
    cells[-1] = cells[-1].replace("    main()", f"    main({argv})")
    shown = run_notebook(tmp_path, cells)
    assert (tmp_path / "run" / "models.pth").exists(), shown
