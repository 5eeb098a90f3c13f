"""setup.py: what it builds, what it leaves out and says, without compiling anything."""
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
    done = subprocess.run([sys.executable, "setup.py", *arguments], cwd=TOP, capture_output=True, text=True,
                          env={**os.environ, **environment})
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
    assert status == 1 and stderr.strip().splitlines()[-1].startswith("error: GAN_OPS_CUDA=1, but no nvcc was found")


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA needs no nvcc")
@pytest.mark.parametrize("says, expected", [
    ("release 99.1, V99.1", "nvcc is of CUDA 99.1, torch"), ("nonsense", "nvcc is of CUDA an unknown version")])
def test_an_nvcc_of_another_cuda_is_named(tmp_path, says, expected):
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
    nvcc.chmod(0o755)
    status, _, stderr = setup("--version", CUDA_HOME=str(tmp_path))
    (line,) = lines(stderr)
    assert status == 0 and expected in line and torch.__version__ in line


def test_an_nvcc_that_compiles_nothing_is_named(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'release {torch.version.cuda}, V' && exit 0\n"
                    "echo 'unsupported GNU version' >&2; exit 1\n")
    nvcc.chmod(0o755)
    status, _, stderr = setup("--version", CUDA_HOME=str(tmp_path))
    (line,) = lines(stderr)
    assert status == 0 and line == "gan_ops: built without CUDA: nvcc fails: unsupported GNU version"


def test_without_a_compiler_nothing_is_built_and_one_line_says_so(tmp_path):
    status, _, stderr = setup("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"),
                              GAN_OPS_CUDA="0", CXX="/nowhere/c++", CC="/nowhere/cc")
    said = [line for line in lines(stderr) if "not built" in line]
    assert status == 0 and len(said) == 1 and "PyTorch's own operations will serve" in said[0]
    assert not list(tmp_path.rglob("*.so"))
