"""python benchmarks/pack.py: how fast images are packed, and how soon a run begins once they are.

Makes --count JPEG files like those that --script is for, or takes --data. In turn, each round: the script's
load_pack into a fresh --root, and a DataLoader over them as in train.py, once through, with as many workers
as cores, their start included. The files are in the page cache, so this measures decoding rather than the
disk. Then a training of one step as a process of its own, which finds the pack made.
"""

import contextlib
import importlib
import io
import resource
import subprocess
import sys
import tempfile
import time

from train import CORES, compare, machine, make_images, save, show, show_ratio, start_parser, usual_data


def peak_memory():
    """The most host memory this process has held so far, in MB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def pack(script, data):
    """Pack the images into a fresh folder: {images, a_second, cpu_seconds, memory_mb that it took}."""
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
        args, _ = script.parse(["--data", data, "--root", root])
        memory_before = peak_memory()
        wall_before = time.perf_counter()
        cpu_before = time.process_time()
        images, _ = script.load_pack(args)
        wall = time.perf_counter() - wall_before
        cpu = time.process_time() - cpu_before
    return {
        "images": len(images),
        "a_second": len(images) / wall,
        "cpu_seconds": cpu,
        "memory_mb": peak_memory() - memory_before,
    }


def read(script, data, count):
    """Images a second of a DataLoader that reads `count` of them."""
    args, _ = script.parse(["--data", data])
    batches = max(1, count // args.batch_size)
    began = time.perf_counter()
    loader = iter(usual_data(args, CORES))
    for _ in range(batches):
        next(loader)
    return batches * args.batch_size / (time.perf_counter() - began)


def start(script, data, folder):
    """Seconds of a whole process that trains for one step, saves, samples and draws its curves."""
    flags = ["--steps", "1", "--width", "4", "--batch-size", "8", "--data", data, "--root", folder]
    args, _ = script.parse(flags)
    with contextlib.redirect_stderr(io.StringIO()):
        script.load_pack(args)
    command = [sys.executable, script.__file__, *flags, "--out", f"{folder}/run"]
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began


def main():
    parser = start_parser(__doc__, "cspup128")
    parser.add_argument("--data", help="a folder of folders of images (default: drawn for this)")
    parser.add_argument("--count", type=int, default=2000, help="how many are drawn (2000)")
    options = parser.parse_args()
    script = importlib.import_module(options.script)
    about = machine()
    show(about)
    packed = []
    loaded = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if not data:
            data = f"{folder}/images"
            make_images(script, data, options.count)
        for number in range(options.rounds):
            found = pack(script, data)
            rate = read(script, data, found["images"])
            show({"round": number + 1, **found, "dataloader_a_second": rate})
            packed.append(found)
            loaded.append(rate)
        ratio = compare([found["a_second"] for found in packed], loaded)
        show_ratio("packing to the DataLoader", ratio)
        seconds = start(script, data, folder)
        print(f"from the start of a process to its end after one step: {seconds:.2f} s")
    figures = {"packed": packed, "loaded": loaded, "ratio": ratio, "start": seconds}
    save(options.json, {**about, "script": options.script, **figures})


if __name__ == "__main__":
    main()
