"""The CUDA kernels, without a GPU: run on the CPU by tests/cuda_kernels.cpp under sanitizers, and compiled by nvcc."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
SOME = "23"  # every 23rd case is enough to meet a kernel that is wrong for all
KERNELS = 84  # forward and backward, 3 steps each, 2 layouts, 7 combinations of type and vector


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def build_and_run(folder, sanitizer, *arguments, kernels=None):
    """Compile and run the test program, with `kernels` in place of cuda_kernels.h; returns status and all output."""
    if kernels:
        (folder / "cuda_kernels.h").write_text(kernels)
    program = folder / "cuda_kernels"
    subprocess.run([COMPILER, "-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror",
                    "-Wno-unknown-pragmas", *sanitizer, f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}",
                    ROOT / "tests" / "cuda_kernels.cpp", "-o", program], check=True)

    def run(*before):
        done = subprocess.run([*before, program, *arguments], capture_output=True, text=True, timeout=600,
                              env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
        return done.returncode, done.stdout + done.stderr

    status, output = run()
    if "unexpected memory mapping" in output:  # ThreadSanitizer, where addresses are too random for it
        status, output = run("setarch", "-R")
    return status, output


def changed(old, new, occurrence=0):
    text = (ROOT / "csrc" / "cuda_kernels.h").read_text()
    parts = text.split(old)
    assert len(parts) > occurrence + 1, f"{old!r} is not in cuda_kernels.h"
    return old.join(parts[:occurrence + 1]) + new + old.join(parts[occurrence + 1:])


def test_values_and_memory(tmp_path):
    status, output = build_and_run(tmp_path, ADDRESS)
    assert status == 0, output
    assert f"; {KERNELS} kernels ran" in output


def test_races(tmp_path):
    status, output = build_and_run(tmp_path, THREAD, "8")
    assert status == 0, output


def test_every_barrier_is_needed(tmp_path):
    """So the stand-in would find one that is missing."""
    count = (ROOT / "csrc" / "cuda_kernels.h").read_text().count("__syncthreads();")
    assert count > 0
    for i in range(count):
        folder = tmp_path / str(i)
        folder.mkdir()
        status, output = build_and_run(folder, THREAD, SOME, kernels=changed("__syncthreads();", "", i))
        assert status != 0 and "data race" in output, f"barrier {i}: {output}"


def test_a_read_beyond_the_end_is_found(tmp_path):
    old = "if (next.position < positions) held[u]"
    status, output = build_and_run(tmp_path, ["-fsanitize=address"], SOME, kernels=changed(old, old.replace("<", "<=")))
    assert status != 0 and "heap-buffer-overflow" in output, output


def test_a_partial_result_left_out_is_found(tmp_path):
    old = "other = rank + keep;"
    status, output = build_and_run(tmp_path, [], SOME, kernels=changed(old, "other = rank + 2 * keep;"))
    assert status == 1 and "(tolerance" in output, output


@pytest.mark.skipif(find_nvcc() is None and not os.environ.get("CI"), reason="no nvcc in CUDA_HOME or PATH; CI has one")
def test_nvcc_neither_warns_nor_spills(tmp_path):
    done = subprocess.run([find_nvcc(), "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-Werror", "all-warnings",
                           "-c", ROOT / "csrc" / "cuda.cu", "-o", tmp_path / "cuda.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == KERNELS
    assert set(spills) == {("0", "0")}
