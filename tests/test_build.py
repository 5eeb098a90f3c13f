"""setup.py: what it builds, what it leaves out and says; compilers are stand-ins that make empty objects."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gan_ops

TOP = Path(__file__).resolve().parent.parent


def setup(*arguments, **environment):
    """Runs setup.py; returns its status and what it prints and says."""
    command = [sys.executable, "setup.py", *arguments]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def lines(stderr):
    return [line for line in stderr.splitlines() if line.startswith("gan_ops: ")]


def test_the_version_names_the_torch_that_is_compiled_against(tmp_path):
    status, stdout, _ = setup("--version", GAN_OPS_CUDA="0")
    label = re.sub("[^a-z0-9]+", ".", torch.__version__)
    assert status == 0 and stdout.split()[-1].endswith(f"+torch.{label}")
    assert gan_ops.torch_version == torch.__version__


def test_cuda_is_left_out_when_asked(tmp_path):
    status, _, stderr = setup("--version", GAN_OPS_CUDA="0")
    assert status == 0 and lines(stderr) == ["gan_ops: built without CUDA: GAN_OPS_CUDA=0"]


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA needs no nvcc")
def test_no_nvcc_is_one_line_and_an_error_only_where_cuda_was_insisted_on(tmp_path):
    nothing = dict(PATH=str(tmp_path), CUDA_HOME="", CUDA_PATH="")
    status, _, stderr = setup("--version", **nothing)
    (line,) = lines(stderr)
    assert status == 0 and "no nvcc was found" in line
    status, _, stderr = setup("--version", GAN_OPS_CUDA="1", **nothing)
    last = stderr.strip().splitlines()[-1]
    assert status == 1 and last.startswith("error: GAN_OPS_CUDA=1, but no nvcc was found")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def toolkit(folder, nvcc):
    """A CUDA toolkit whose nvcc is a shell script."""
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    script(folder / "bin" / "nvcc", nvcc)
    return str(folder)


VERSION = f"[ $1 = --version ] && echo 'release {torch.version.cuda}, V' && exit 0"
needs_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA needs no nvcc")


@needs_cuda
@pytest.mark.parametrize(
    "nvcc, expected",
    [
        ("echo 'release 99.1, V99.1'", "nvcc is of CUDA 99.1, torch"),
        ("echo nonsense", "nvcc is of CUDA an unknown version"),
        (f"{VERSION}; echo 'unsupported GNU version' >&2; exit 1", "nvcc fails: unsupported GNU version"),
    ],
)
def test_an_nvcc_that_does_not_fit_is_named(tmp_path, nvcc, expected):
    status, _, stderr = setup("--version", CUDA_HOME=toolkit(tmp_path, nvcc))
    (line,) = lines(stderr)
    assert status == 0 and line.startswith("gan_ops: built without CUDA: ") and expected in line


def build(folder, **environment):
    """Builds into the folder; (status, lines said, the last line of all, whether there is an extension)."""
    places = "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")
    status, _, stderr = setup("build_ext", *places, **environment)
    return status, lines(stderr), stderr.strip().splitlines()[-1], bool(list(folder.rglob("*.so")))


@needs_cuda
@pytest.mark.parametrize("insisted", [False, True])
def test_where_cuda_alone_does_not_compile_the_rest_is_built_unless_it_is_insisted_on(tmp_path, insisted):
    empty = """case $1 in --version|-dump*|-v) exec gcc "$@"; esac
               while [ $# -gt 0 ]; do [ $1 = -o ] && out=$2; [ $1 = -MF ] && touch $2; shift; done
               exec gcc -x c -c /dev/null -o $out"""
    compiler = script(tmp_path / "c++", empty)
    fails = "case \"$*\" in *cuda.cu*) echo 'no such intrinsic' >&2; exit 1;; esac"
    home = toolkit(tmp_path / "cuda", f"{VERSION}\n{fails}")
    environment = {"CUDA_HOME": home, "CXX": compiler, "CC": compiler, "TORCH_CUDA_ARCH_LIST": "9.0"}
    status, said, last, built = build(tmp_path, **environment, GAN_OPS_CUDA="1" if insisted else "")
    if insisted:
        assert (status, built) == (1, False)
        assert last.startswith("error: GAN_OPS_CUDA=1, but ")
    else:
        assert (status, built) == (0, True)
        assert "without CUDA: it does not compile" in said[0]


def test_without_a_compiler_nothing_is_built_and_one_line_says_so(tmp_path):
    nothing = dict(CXX="/nowhere/c++", CC="/nowhere/cc")
    status, said, _, built = build(tmp_path, GAN_OPS_CUDA="0", **nothing)
    assert status == 0 and not built and "PyTorch's own operations will serve" in said[-1]
