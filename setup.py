"""Builds gan_ops, the C++/CUDA extension in csrc, against the torch of the environment that it is installed into.

GAN_OPS_CUDA=0 leaves CUDA out, 1 insists on it; TORCH_CUDA_ARCH_LIST names the GPUs to compile for. Where something is
missing, less is built (no CUDA, or no extension at all, which the scripts do without), and one line says why.
"""
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

# pip builds in an environment of its own; the torch to compile against is the one that will run the scripts
sys.path += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
try:
    import torch
except ImportError:
    torch = None

VERSION, SOURCES = "0.1.0", ["ops.cpp", "allocate.cpp", "cpu.cpp", "cpu_default.cpp"]
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # torch's headers, and the compiler's own
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
GPUS = "5.0 6.0 7.0 7.5 8.0 8.6 8.9 9.0 10.0 12.0".split()  # of those, what the nvcc found can compile for


def say(line):
    print(f"gan_ops: {line}", file=sys.stderr, flush=True)


def output_of(*command):
    """What a command prints, or nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def find_toolkit():
    """The CUDA toolkit's folder: of CUDA_HOME, or where the nvcc in PATH, which may be a wrapper, says it lies."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "empty.cu").touch()
        said = output_of(shutil.which("nvcc") or "nvcc", "--dryrun", f"{folder}/empty.cu")
    places += [os.path.realpath(top) for top in re.findall(r"TOP=(\S+)", said)]
    return next((Path(p) for p in places if p and Path(p, "include", "cuda_runtime.h").exists()), None)


def nvcc_fails(nvcc):
    """The first line of complaint of nvcc about a kernel that does nothing, as with a compiler too new for it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text("__global__ void kernel() {}\n")
        done = subprocess.run([nvcc, "-c", source, "-o", f"{folder}/kernel.o"], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no reason given"])[0] if done.returncode else ""


def without_cuda():
    """Why CUDA is left out, or "" where it can be built; makes CUDA_HOME and the GPUs to compile for known to torch."""
    if os.environ.get("GAN_OPS_CUDA") == "0":
        return "GAN_OPS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = find_toolkit()
    nvcc = home and home / "bin" / "nvcc"
    if not home or not nvcc.exists():
        return "no nvcc was found: install the CUDA toolkit, or set CUDA_HOME to it"
    version = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if not version or version[1] != torch.version.cuda.split(".")[0]:
        found = ".".join(version.groups()) if version else "an unknown version"
        return f"nvcc is of CUDA {found}, torch {torch.__version__} of {torch.version.cuda}"
    if reason := nvcc_fails(nvcc):
        return f"nvcc fails: {reason}"
    os.environ["CUDA_HOME"] = str(home)
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        can = output_of(nvcc, "--list-gpu-arch").split()
        gpus = [gpu for gpu in GPUS if f"compute_{gpu.replace('.', '')}" in can]
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{';'.join(gpus)}+PTX"
    return ""


def make_extension():
    """(the extension, the command that builds it)."""
    reason = without_cuda()
    if reason and os.environ.get("GAN_OPS_CUDA") == "1":
        raise SystemExit(f"error: GAN_OPS_CUDA=1, but {reason}")
    if reason:
        say(f"built without CUDA: {reason}")
    from torch.utils import cpp_extension  # now, since it looks for CUDA_HOME when it is imported

    windows = os.name == "nt"
    flags = ["/O2", "/std:c++20", "/openmp"] if windows else FLAGS + ["-fopenmp"] * (sys.platform == "linux")
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") and not windows else {}
    text = re.sub(r'["\\]', "'", reason)
    macros = [("GAN_OPS_TORCH", f'"{torch.__version__}"'), ("GAN_OPS_WITHOUT_CUDA", f'"{text}"')]
    macros += [("GAN_OPS_INSTRUCTION_SETS", None)] * bool(sets) + [("GAN_OPS_CUDA", None)] * (not reason)
    kind = cpp_extension.CppExtension if reason else cpp_extension.CUDAExtension
    sources = [f"csrc/{name}" for name in SOURCES + ([] if reason else ["cuda.cu"])]
    extension = kind(
        "gan_ops", sources, define_macros=macros, py_limited_api=True, depends=[str(p) for p in Path("csrc").iterdir()],
        extra_compile_args=dict(cxx=flags, nvcc=["-O3", "-std=c++17"]),
        extra_link_args=["-fopenmp"] * (sys.platform == "linux"))

    class Build(cpp_extension.BuildExtension):
        """Compiles the kernels for each instruction set with its own flags; what fails is left out with one line."""
        def build_extensions(self):
            try:
                for name, own in sets.items():
                    extension.extra_objects += self.compiler.compile(
                        [f"csrc/cpu_{name}.cpp"], self.build_temp, include_dirs=extension.include_dirs,
                        extra_postargs=flags + own)
                super().build_extensions()
            except Exception as error:  # no compiler, headers missing: the scripts do without
                text = str(error).strip() or type(error).__name__
                say(f"not built, PyTorch's own operations will serve: {text.splitlines()[0]}")
                self.extensions = []

    return extension, Build.with_options(no_python_abi_suffix=False)


if torch is None:  # in an empty environment: this makes pip fetch one to build with, and run this file again
    setup(version=VERSION, setup_requires=["torch", "ninja"])
else:
    extension, build = make_extension()
    label = re.sub(r"[^a-zA-Z0-9]+", ".", torch.__version__)
    setup(version=f"{VERSION}+torch.{label}", ext_modules=[extension], cmdclass=dict(build_ext=build),
          options=dict(bdist_wheel=dict(py_limited_api="cp310")), setup_requires=["ninja"])
