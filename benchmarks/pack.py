"""python benchmarks/pack.py: how fast pictures are packed, and how soon a run begins once they are.

Makes 2000 JPEG files like those of aligned CelebA (178x218, about 8 KB), or takes those of --data FOLDER, and packs
them with cspup128.load_pack into a fresh temporary --root, in the threads that load_pack itself chooses. The files
are in the page cache where they were just made, so this measures decoding rather than the disk. Then it starts a
training of one step as a process of its own, which finds the pack made.
"""
import argparse, os, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cspup128


def make_faces(folder, count):
    """Write `count` drawn faces, of aligned CelebA's size, into the folder as JPEG; returns their mean size in bytes.

    What is drawn is flat; blurred noise gives the files the size, and so the time to decode, of photographs.
    """
    folder.mkdir(parents=True)
    for index in range(count):
        face = ImageOps.fit(cspup128.draw_picture(index), (178, 218))
        noise = np.random.default_rng(index).normal(0, 3, (218 // 2, 178 // 2)).astype(np.float32)
        noise = np.asarray(Image.fromarray(noise).resize(face.size, Image.BICUBIC))[..., None]
        pixels = (np.asarray(face) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir()) / count


def cores():
    """How many CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine():
    """The processor, the GPU if there is one, and the versions, as a dict."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    about = dict(cpu=names[0] if names else platform.processor() or platform.machine(), cores=cores())
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return dict(about, python=platform.python_version(), torch=torch.__version__)


def peak_memory():
    """The most host memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def pack(data, root):
    """Pack the pictures and print how fast that went."""
    args, _ = cspup128.parse(["--data", str(data), "--root", str(root)])
    memory, wall, cpu = peak_memory(), time.perf_counter(), time.process_time()
    count = len(cspup128.load_pack(args))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"packed {count} pictures in {wall:.2f} s: {count / wall:.0f} a second, "
          f"{count / wall / cores():.0f} a second per core")
    print(f"CPU time {cpu:.2f} s, {cpu / wall:.2f} cores busy: {count / cpu:.0f} pictures per CPU-second")
    print(f"peak host memory grew by {peak_memory() - memory:.0f} MB over the {memory:.0f} MB before")


def start(data, root, out):
    """Time a whole process that trains for one step on the pack made."""
    flags = ["--steps", "1", "--width", "4", "--batch-size", "8", "--data", data, "--root", root, "--out", out]
    command = [sys.executable, cspup128.__file__, *map(str, flags)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stdout}")
    if "packing" in done.stdout:
        raise SystemExit(f"the run packed the pictures anew:\n{done.stdout}")
    print(f"from the start of a process to the end of its first step: {seconds:.2f} s at most "
          "(the whole process, which also saves, samples and draws its curves)")


def main():
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--data", type=Path, help="a folder or .zip of pictures (default: faces made for this)")
    parser.add_argument("--count", type=int, default=2000, help="how many faces are made (2000)")
    options = parser.parse_args()
    print(*(f"{name} {value}" for name, value in machine().items()), sep="; ")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data.resolve() if options.data else Path(folder, "faces")
        if not options.data:
            print(f"made {options.count} JPEG files of {make_faces(data, options.count) / 1000:.1f} KB on average")
        try:
            pack(data, Path(folder, "root"))
        except cspup128.UserError as error:
            parser.error(str(error))
        start(data, Path(folder, "root"), Path(folder, "run"))


if __name__ == "__main__":
    main()
