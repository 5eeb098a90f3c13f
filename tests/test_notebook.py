"""Each script in a notebook with no other file of this repository there, in a real kernel."""
import os
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import TINY
from nbclient import NotebookClient

DATA = ["--data", "synthetic", "--steps", "3", "--out", "run"]


@pytest.fixture(scope="session", autouse=True)
def one_pack(tmp_path_factory):
    """A --root that the notebooks share, so that each drawing is decoded once."""
    DATA[4:] = ["--out", "run", "--root", str(tmp_path_factory.mktemp("packs"))]


def run_notebook(folder, cells):
    """Run cells in a fresh kernel with `folder` as its working directory; returns what they printed."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)


def test_by_writefile(script, tmp_path, monkeypatch):
    """`!python` is a shell's, so the environment that the tests run in is put first on its PATH."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    name, argv = f"{script.SCRIPT}.py", " ".join([*TINY[script], *DATA])
    text = run_notebook(tmp_path, [f"%%writefile {name}\n{Path(script.__file__).read_text()}",
                                   f"!python {name} {argv}"])
    assert (tmp_path / "run" / "comparison.png").exists(), text


def test_pasted_into_a_cell(script, tmp_path):
    """The last line is what a user edits; main() takes the defaults there, not the kernel's own sys.argv."""
    text = Path(script.__file__).read_text()
    assert text.endswith('if __name__ == "__main__":\n    main()\n# --- end shared ---\n')
    pasted = text.replace("    main()\n", f"    main({[*TINY[script], *DATA]})\n")
    defaults = "train = lambda args, saved: print('HAS', args.width, args.data, args.out)\nmain(), main([])"
    shown = run_notebook(tmp_path, [pasted, defaults])
    assert (tmp_path / "run" / "comparison.png").exists(), shown
    args = script.parse([])[0]
    assert shown.count(f"HAS {args.width} {args.data} {args.out}") == 2


def test_sections_are_cells_of_a_notebook(script, tmp_path):
    """In the percent format: jupytext opens the script, and it runs from top to bottom, cell by cell."""
    book = jupytext.reads(Path(script.__file__).read_text(), "py:percent")
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    marks = sum(cell.cell_type == "markdown" for cell in book.cells)
    assert len(cells) >= 7 and (marks >= 5 if script.SCRIPT == "fashion_keras_port" else marks >= 0)
    cells[-1] = cells[-1].replace("    main()", f"    main({[*TINY[script], *DATA]})")
    shown = run_notebook(tmp_path, cells)
    assert (tmp_path / "run" / "comparison.png").exists(), shown
