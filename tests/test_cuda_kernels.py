"""The CUDA kernels, without a GPU: run on the CPU by tests/cuda_kernels.cpp under sanitizers; built by nvcc.

`python tests/test_cuda_kernels.py` compiles them and prints, for each, registers, blocks that a processor
holds, and instructions an element in the loop, beside what an H200's bandwidth leaves room for.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
FLAGS = "-std=c++20 -O1 -g -pthread -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
NVCC_FLAGS = "-std=c++17 -O3 -Xptxas -v -Werror all-warnings".split()
SOME = "23"  # every 23rd case is enough to meet a kernel that is wrong for all
KERNELS = 72  # reduce and apply, forward and backward, in both orders, for each of 3 types in 3 layouts
ISSUED = 132 * 4 * 32 * 1.755e9  # instructions of an H200's processors in a second, for each of 32 lanes
MOVED = 4.8e12  # bytes that its memory moves


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def find_cuobjdump():
    """In PATH, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    found = shutil.which("cuobjdump")
    if found or not triton:
        return found
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return path if path.exists() else None


def build_and_run(folder, sanitizer, *arguments, kernels=None):
    """Compile and run the test program, with `kernels` in place of cuda_kernels.h; (status, all output)."""
    if kernels:
        (folder / "cuda_kernels.h").write_text(kernels)
    program = folder / "cuda_kernels"
    folders = [f"-I{path}" for path in (folder, ROOT / "csrc", ROOT / "tests")]
    source = ROOT / "tests" / "cuda_kernels.cpp"
    subprocess.run([COMPILER, *FLAGS, *sanitizer, *folders, source, "-o", program], check=True)

    def run(*before):
        command = [*before, program, *arguments]
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        return done.returncode, done.stdout + done.stderr

    status, output = run()
    if "unexpected memory mapping" in output:  # ThreadSanitizer, where addresses are too random for it
        status, output = run("setarch", "-R")
    return status, output


def changed(old, new, occurrence=0):
    text = (ROOT / "csrc" / "cuda_kernels.h").read_text()
    parts = text.split(old)
    assert len(parts) > occurrence + 1, f"{old!r} is not in cuda_kernels.h"
    return old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])


def test_values_and_memory(tmp_path):
    status, output = build_and_run(tmp_path, ADDRESS)
    assert status == 0, output
    assert f"; {KERNELS} kernels ran" in output


def test_races(tmp_path):
    status, output = build_and_run(tmp_path, THREAD, "8")
    assert status == 0, output


@pytest.mark.parametrize("number", range(4))
def test_every_barrier_is_needed(tmp_path, number):
    """So the stand-in would find one that is missing."""
    assert (ROOT / "csrc" / "cuda_kernels.h").read_text().count("__syncthreads();") == 4
    status, output = build_and_run(tmp_path, THREAD, SOME, kernels=changed("__syncthreads();", "", number))
    assert status != 0 and "data race" in output, output


def test_a_read_beyond_the_end_is_found(tmp_path):
    old = "if (at < p.rows) held[u]"
    status, output = build_and_run(
        tmp_path, ["-fsanitize=address"], SOME, kernels=changed(old, old.replace("<", "<="))
    )
    assert status != 0 and "heap-buffer-overflow" in output, output


def test_a_partial_result_left_out_is_found(tmp_path):
    kernels = changed("part += p.sharers", "part += 2 * p.sharers")
    status, output = build_and_run(tmp_path, [], SOME, kernels=kernels)
    assert status == 1 and "(tolerance" in output, output


def compiled(folder, gpu):
    """{kernel: (registers, bytes of spills)} of csrc/cuda.cu in folder/cuda.o; a warning is an error."""
    files = ["-c", ROOT / "csrc" / "cuda.cu", "-o", folder / "cuda.o"]
    command = [find_nvcc(), *NVCC_FLAGS, f"-arch={gpu}", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}


def parts_of(name):
    """(name, type, elements of a vector, channels of it, LeakyReLU first) of a kernel's mangled name."""
    types = r"f|\d+__nv_bfloat16|\d+__half"
    found = re.search(rf"\d(reduce|apply)I({types})Li(\d)ELi(\d)ELb(\d)ENS_\d+(Forward|Backward)E", name)
    if not found:
        return None
    kernel, kind, vector, lanes, first, way = found.groups()
    kind = {"f": "fp32", "6__half": "fp16"}.get(kind, "bf16")
    return f"{way.lower()}_{kernel}", kind, int(vector), int(lanes), int(first)


def instructions(file):
    """{kernel: instructions an element of its loop over vectors of 16 bytes}: the smallest with 4 loads."""
    command = [find_cuobjdump(), "-sass", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        code = [
            (int(place, 16), what) for place, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)
        ]
        jumps = [
            (place, int(found[1], 16))
            for place, what in code
            if (found := re.search(r"BRA\b.*?(0x[0-9a-f]+)", what))
        ]
        loops = [[what for place, what in code if to <= place <= at] for at, to in jumps if to < at]
        full = [loop for loop in loops if sum(".128" in what and "LDG" in what for what in loop) >= 4]
        parts = parts_of(name := function.split()[0])
        if full and parts and parts[2] > 1:
            counts[name] = min(map(len, full)) / (4 * parts[2])
    return counts


def room(parts):
    """Instructions an element for which a kernel's reads and writes leave time."""
    kernel, kind, *_ = parts
    tensors = dict(forward_reduce=1, forward_apply=2, backward_reduce=2, backward_apply=3)[kernel]
    return ISSUED / MOVED * tensors * (4 if kind == "fp32" else 2)


needs_nvcc = pytest.mark.skipif(
    find_nvcc() is None and not os.environ.get("CI"), reason="no nvcc in CUDA_HOME or PATH; CI has one"
)


@needs_nvcc
@pytest.mark.parametrize("gpu", ["sm_75", "sm_80", "sm_90"])
def test_nvcc_neither_warns_nor_spills_and_two_blocks_fit(tmp_path, gpu):
    found = compiled(tmp_path, gpu)
    assert len(found) == KERNELS and not any(spills for _, spills in found.values())
    assert max(registers for registers, _ in found.values()) <= 128  # of 65,536 for two blocks of 256 threads
    if gpu == "sm_90":
        counts = instructions(tmp_path / "cuda.o")
        assert len(counts) == 48  # the kernels of 16-byte vectors
        assert all(count < 0.9 * room(parts_of(name)) for name, count in counts.items()), counts


def main():
    with tempfile.TemporaryDirectory() as folder:
        found, counts = compiled(Path(folder), "sm_90"), instructions(Path(folder) / "cuda.o")
    print("kernel           type  vector channels first  registers blocks  instructions  room")
    for name, count in sorted(counts.items(), key=lambda item: parts_of(item[0])):
        kernel, kind, vector, lanes, first = parts_of(name)
        registers = found[name][0]
        print(
            f"{kernel:16} {kind:5} {vector:6} {lanes:8} {first:5} {registers:9} "
            f"{65536 // (256 * -(-registers // 8) * 8):6} {count:13.1f} {room(parts_of(name)):5.1f}"
        )


if __name__ == "__main__":
    main()
