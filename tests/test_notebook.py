"""Copied into a notebook, by %%writefile or pasted into a cell, the script trains in a real kernel."""
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import cspup128

TEXT = Path(cspup128.__file__).read_text()
TINY = "--width 2 --batch-size 8 --steps 3 --precision fp32"


def run_notebook(folder, *cells):
    """Run cells in a fresh kernel with `folder` as its working directory; returns what they printed."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)


def test_by_writefile(tmp_path, monkeypatch):
    """`!python` is a shell's, so the environment that the tests run in is put first on its PATH."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    text = run_notebook(tmp_path, f"%%writefile cspup128.py\n{TEXT}", f"!python cspup128.py {TINY} --out run")
    assert (tmp_path / "run" / "comparison.png").exists(), text


def test_pasted_into_a_cell(tmp_path):
    """The last line is what a user would edit: main() takes the defaults, main([...]) flags."""
    pasted = TEXT.replace("    main()\n", f"    main({(TINY + ' --out run').split()})\n")
    assert pasted != TEXT
    text = run_notebook(tmp_path, pasted, "print(sorted(p.name for p in Path('run').glob('*.png')))")
    assert "['comparison.png', 'losses.png', 'scores.png']" in text


@pytest.mark.parametrize("argv", [None, []])
def test_in_a_kernel_main_takes_the_defaults(tmp_path, argv):
    """The kernel's own sys.argv, -f connection.json, is not taken for flags."""
    definitions = TEXT[: TEXT.index('if __name__ == "__main__":')]
    cell = f"train = lambda args, saved: print('WIDTH', args.width, args.data)\nmain({'' if argv is None else argv})"
    assert "WIDTH 64 synthetic" in run_notebook(tmp_path, definitions, cell)
