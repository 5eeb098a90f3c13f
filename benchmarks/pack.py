"""python benchmarks/pack.py: how fast pictures are packed, and how soon a run begins once they are.

Makes --count JPEG files like those that --script is for, or takes --data. In turn, each round: the script's
load_pack into a fresh --root, and a DataLoader over them as in train.py, once through, with as many workers
as cores, their start included. The files are in the page cache, so this measures decoding rather than the
disk. Then a training of one step as a process of its own, which finds the pack made.
"""
import contextlib, importlib, io, resource, subprocess, sys, tempfile, time

from train import CORES, compare, machine, make_pictures, save, show, start_parser, usual_data

def peak_memory():
    """The most host memory this process has held so far, in MB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

def pack(script, data):
    """Pack the pictures into a fresh folder: {pictures, a_second, cpu_seconds, memory_mb that it took}."""
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
        args, _ = script.parse(["--data", data, "--root", root])
        memory, wall, cpu = peak_memory(), time.perf_counter(), time.process_time()
        count = len(script.load_pack(args)[0])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return dict(pictures=count, a_second=count / wall, cpu_seconds=cpu, memory_mb=peak_memory() - memory)

def read(script, data, count):
    """Pictures a second of a DataLoader that reads `count` of them."""
    args, began = script.parse(["--data", data])[0], time.perf_counter()
    loader = iter(usual_data(args, CORES))
    for _ in range(max(1, count // args.batch_size)): next(loader)
    return max(1, count // args.batch_size) * args.batch_size / (time.perf_counter() - began)

def start(script, data, folder):
    """Seconds of a whole process that trains for one step, saves, samples and draws its curves."""
    flags = ["--steps", "1", "--width", "4", "--batch-size", "8", "--data", data, "--root", folder]
    with contextlib.redirect_stderr(io.StringIO()): script.load_pack(script.parse(flags)[0])
    began = time.perf_counter()
    command = [sys.executable, script.__file__, *flags, "--out", f"{folder}/run"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began

def main():
    parser = start_parser(__doc__, "cspup128")
    parser.add_argument("--data", help="a folder of folders of pictures (default: drawn for this)")
    parser.add_argument("--count", type=int, default=2000, help="how many are drawn (2000)")
    options = parser.parse_args()
    script = importlib.import_module(options.script)
    show(about := machine())
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or f"{folder}/pictures"
        if not options.data: make_pictures(script, data, options.count)
        packed, loaded = [], []
        for number in range(options.rounds):
            packed.append(pack(script, data))
            loaded.append(read(script, data, packed[-1]["pictures"]))
            show(dict(round=number + 1, **packed[-1], dataloader_a_second=loaded[-1]))
        ratio = compare([found["a_second"] for found in packed], loaded)
        print("packing to the DataLoader: {:.2f} times ({:.2f} to {:.2f})".format(*ratio))
        seconds = start(script, data, folder)
        print(f"from the start of a process to its end after one step: {seconds:.2f} s")
    figures = dict(packed=packed, loaded=loaded, ratio=ratio, start=seconds)
    save(options.json, dict(about, script=options.script, **figures))

if __name__ == "__main__":
    main()
