"""Copied into a notebook, by %%writefile or pasted into a cell, the script trains in a real kernel."""
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port

TINY = {cspup128: "--width 2 --batch-size 8 --steps 3 --precision fp32"}
TINY[dcgan] = f"{TINY[cspup128]} --size 32"
TINY[cgan_residual] = f"{TINY[cspup128]} --data synthetic --no-report"
TINY[fashion_keras_port] = TINY[cgan_residual]
MORE = {cgan_residual: ["one_noise"]}  # pictures of a run besides those that all scripts have
DEFAULTS = {cspup128: "64 ['synthetic'] runs/cspup128", dcgan: "64 ['synthetic'] runs/dcgan",
            cgan_residual: f"{cgan_residual.WIDTH} ['mnist'] runs/cgan_residual",
            fashion_keras_port: "256 ['fashion'] runs/fashion_keras_port"}
each = pytest.mark.parametrize("script", TINY, ids=lambda script: script.SCRIPT)


def text_of(script):
    """The script as it is copied into a notebook."""
    return Path(script.__file__).read_text()


def run_notebook(folder, *cells):
    """Run cells in a fresh kernel with `folder` as its working directory; returns what they printed."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)


@each
def test_by_writefile(script, tmp_path, monkeypatch):
    """`!python` is a shell's, so the environment that the tests run in is put first on its PATH."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    name = f"{script.SCRIPT}.py"
    text = run_notebook(tmp_path, f"%%writefile {name}\n{text_of(script)}", f"!python {name} {TINY[script]} --out run")
    assert (tmp_path / "run" / "comparison.png").exists(), text


@each
def test_pasted_into_a_cell(script, tmp_path):
    """The last line is what a user would edit: main() takes the defaults, main([...]) flags."""
    text = text_of(script)
    pasted = text.replace("    main()\n", f"    main({(TINY[script] + ' --out run').split()})\n")
    assert pasted != text
    shown = run_notebook(tmp_path, pasted, "print(sorted(p.stem for p in Path('run').glob('*.png')))")
    assert str(sorted({"comparison", *script.CURVES, *MORE.get(script, [])})) in shown


@each
def test_in_a_kernel_main_takes_the_defaults(script, tmp_path):
    """With and without an empty list; the kernel's own sys.argv, -f connection.json, is not taken for flags."""
    text = text_of(script)
    definitions = text[: text.index('if __name__ == "__main__":')]
    stand_in = "USES['train'] = lambda args, saved: print('HAS', args.width, args.data, args.out)"
    shown = run_notebook(tmp_path, definitions, stand_in, "main()", "main([])")
    assert [line for line in shown.splitlines() if "HAS " in line] == [f"HAS {DEFAULTS[script]}"] * 2
