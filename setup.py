"""Builds gan_ops, the C++/CUDA extension in csrc, against the torch that it is installed beside.

GAN_OPS_CUDA=0 leaves CUDA out, 1 insists on it; TORCH_CUDA_ARCH_LIST names the GPUs to compile for. Where
something is missing, less is built (no CUDA, or no extension at all, which the scripts do without), and one
line says why.
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

VERSION, WINDOWS = "0.1.0", os.name == "nt"
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # torch's headers, the compiler
WINDOWS_FLAGS = ["/O2", "/std:c++20", "/openmp"]
AVX2 = ["/arch:AVX2"] if WINDOWS else ["-mavx2", "-mfma", "-mf16c"]
AVX2 += ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]  # which ATen's vectors look at
GPUS = "5.0 6.0 7.0 7.5 8.0 8.6 8.9 9.0 10.0 12.0".split()  # of those, what the nvcc found can compile for


def say(line):
    print(f"gan_ops: {line}", file=sys.stderr, flush=True)


def say_or_stop(reason):
    """Why CUDA is left out; an error where it is insisted on."""
    if os.environ.get("GAN_OPS_CUDA") == "1":
        raise SystemExit(f"error: GAN_OPS_CUDA=1, but {reason}")
    say(f"built without CUDA: {reason}")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def output_of(*command):
    """What a command prints, or nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def find_toolkit():
    """The CUDA toolkit's folder: CUDA_HOME, or where the nvcc in PATH, which may be a wrapper, says it is."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "empty.cu").touch()
        said = output_of(shutil.which("nvcc") or "nvcc", "--dryrun", f"{folder}/empty.cu")
    places += [os.path.realpath(top) for top in re.findall(r"TOP=(\S+)", said)]
    return next((Path(p) for p in places if p and Path(p, "include", "cuda_runtime.h").exists()), None)


def nvcc_fails(nvcc):
    """What nvcc complains of in a kernel that does nothing, as where the compiler is too new for it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text("__global__ void kernel() {}\n")
        command = [nvcc, "-c", source, "-o", f"{folder}/kernel.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no reason given"])[0] if done.returncode else ""


def without_cuda():
    """Why CUDA is left out, or "" if it can be built; tells torch CUDA_HOME and the GPUs to compile for."""
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


def make_extension(reason):
    """The extension, without CUDA where there is a reason to leave it out."""
    from torch.utils import cpp_extension  # now, since it looks for CUDA_HOME when it is imported

    openmp = ["-fopenmp"] * (sys.platform == "linux")
    text = re.sub(r'["\\]', "'", reason)
    macros = [("GAN_OPS_TORCH", f'"{torch.__version__}"'), ("GAN_OPS_WITHOUT_CUDA", f'"{text}"')]
    kind = cpp_extension.CppExtension if reason else cpp_extension.CUDAExtension
    return kind(
        "gan_ops",
        ["csrc/ops.cpp"] + ["csrc/cuda.cu"] * (not reason),
        py_limited_api=True,
        define_macros=macros + [("GAN_OPS_CUDA", None)] * (not reason),
        depends=[str(p) for p in Path("csrc").iterdir()],
        extra_compile_args=dict(cxx=WINDOWS_FLAGS if WINDOWS else FLAGS + openmp, nvcc=["-O3", "-std=c++17"]),
        extra_link_args=openmp,
    )


def make_command():
    """The command that builds; what fails is left out, with one line, but for CUDA if it is insisted on."""
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """Compiles the CPU kernels with flags of their own, then the rest, if need be again without CUDA."""

        def compile_cpu_kernels(self, extension):
            avx2 = AVX2 if platform.machine() in ("x86_64", "AMD64") else []
            flags = extension.extra_compile_args["cxx"] + avx2
            extension.extra_objects += self.compiler.compile(
                ["csrc/cpu.cpp"], self.build_temp, include_dirs=extension.include_dirs, extra_postargs=flags
            )

        def build_extensions(self):
            (extension,) = self.extensions
            cuda = ("GAN_OPS_CUDA", None) in extension.define_macros
            try:
                self.compile_cpu_kernels(extension)
                try:
                    super().build_extensions()
                except Exception as error:
                    if not cuda:
                        raise
                    reason = f"it does not compile: {first_line(error)}"
                    say_or_stop(reason)
                    self.extensions = [make_extension(reason)]
                    self.extensions[0].extra_objects = extension.extra_objects
                    super().build_extensions()
            except Exception as error:  # no compiler, headers missing: the scripts do without
                if os.environ.get("GAN_OPS_CUDA") == "1":
                    reason = f"nothing could be built: {first_line(error)}"
                    raise SystemExit(f"error: GAN_OPS_CUDA=1, but {reason}") from error
                say(f"not built, PyTorch's own operations will serve: {first_line(error)}")
                self.extensions = []

    return Build.with_options(no_python_abi_suffix=False)


if torch is None:  # in an empty environment: this makes pip fetch one to build with, and run this file again
    setup(version=VERSION, setup_requires=["torch", "ninja"])
else:
    reason = without_cuda()
    if reason:
        say_or_stop(reason)
    label = re.sub(r"[^a-zA-Z0-9]+", ".", torch.__version__)
    setup(
        version=f"{VERSION}+torch.{label}",
        ext_modules=[make_extension(reason)],
        cmdclass=dict(build_ext=make_command()),
        options=dict(bdist_wheel=dict(py_limited_api="cp310")),
        setup_requires=["ninja"],
    )
