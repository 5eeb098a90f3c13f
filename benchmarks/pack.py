"""python benchmarks/pack.py: how fast pictures are packed, and how soon a run begins once they are.

Makes 2000 JPEG files like those that --script is for, or takes those of --data FOLDER, and packs them with its
load_pack into a fresh temporary --root, in the threads that load_pack itself chooses. The files are in the page cache
where they were just made, so this measures decoding rather than the disk. Then it starts a training of one step as a
process of its own, which finds the pack made. What the other benchmarks share is here, too.
"""
import argparse, importlib, os, platform, random, resource, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
FLAGS = {  # by script: what is measured, where flags given do not say otherwise
    "cspup128": ["--batch-size", "32", "--loss", "logits", "--gamma", "0"],
    "dcgan": ["--recipe", "classic", "--batch-size", "64"],
    "cgan_residual": ["--batch-size", "64"],
}


def read_flags(parser, script="cspup128", more=True, classes=False):
    """Add --script; returns (its module, the options, the flags for the script: FLAGS and, if `more`, the rest).

    classes: whether it can be a script whose steps take labels, too.
    """
    choices = [name for name in FLAGS if classes or name != "cgan_residual"]
    parser.add_argument("--script", choices=choices, default=script, help=f"what is measured ({script})")
    options, others = parser.parse_known_args() if more else (parser.parse_args(), [])
    return importlib.import_module(options.script), options, [*FLAGS[options.script], *others]


def make_pictures(script, folder, count):
    """Write `count` pictures that the script draws into the folder as JPEG; returns their mean size in bytes.

    Faces have the size of aligned CelebA's. What is drawn is flat; blurred noise gives their files the size, and so the
    time to decode, of photographs. Crests are flat, and have the 64 to 150 pixels a side of those found online.
    """
    folder.mkdir(parents=True)
    for index in range(count):
        faces, side = script.SCRIPT == "cspup128", random.Random(index).randint(64, 150)
        image = ImageOps.fit(script.draw_picture(index), (178, 218) if faces else (side, side))
        if faces:
            noise = np.random.default_rng(index).normal(0, 3, (218 // 2, 178 // 2)).astype(np.float32)
            noise = np.asarray(Image.fromarray(noise).resize(image.size, Image.BICUBIC))[..., None]
            image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index:06d}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir()) / count


def picture_folder(script, data, folder):
    """`data`, a folder of pictures; for synthetic, a new one inside `folder`, of 512 that the script draws."""
    if data == "synthetic":
        data = str(Path(folder, "pictures"))
        make_pictures(script, Path(data), 512)
    return data


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


def pack(script, data, root):
    """Pack the pictures and print how fast that went."""
    args, _ = script.parse(["--data", str(data), "--root", str(root)])
    memory, wall, cpu = peak_memory(), time.perf_counter(), time.process_time()
    count = len(script.load_pack(args))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"packed {count} pictures in {wall:.2f} s: {count / wall:.0f} a second, "
          f"{count / wall / cores():.0f} a second per core")
    print(f"CPU time {cpu:.2f} s, {cpu / wall:.2f} cores busy: {count / cpu:.0f} pictures per CPU-second")
    print(f"peak host memory grew by {peak_memory() - memory:.0f} MB over the {memory:.0f} MB before")


def start(script, data, root, out):
    """Time a whole process that trains for one step on the pack made."""
    flags = ["--steps", "1", "--width", "4", "--batch-size", "8", "--data", data, "--root", root, "--out", out]
    command = [sys.executable, script.__file__, *map(str, flags)]
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
    parser.add_argument("--data", type=Path, help="a folder or .zip of pictures (default: drawn for this)")
    parser.add_argument("--count", type=int, default=2000, help="how many are drawn (2000)")
    script, options, _ = read_flags(parser, more=False)
    print(*(f"{name} {value}" for name, value in machine().items()), sep="; ")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data.resolve() if options.data else Path(folder, "pictures")
        if not options.data:
            size = make_pictures(script, data, options.count)
            print(f"made {options.count} JPEG files of {size / 1000:.1f} KB on average")
        try:
            pack(script, data, Path(folder, "root"))
        except script.UserError as error:
            parser.error(str(error))
        start(script, data, Path(folder, "root"), Path(folder, "run"))


if __name__ == "__main__":
    main()
