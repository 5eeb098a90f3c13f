"""python benchmarks/scaling.py --out docs/dcgan_scaling.png: images a second by batch size and by processes.

Left: one process, with all threads, at each of --batch-sizes. Right: --processes, each with --batch-size
pictures a step and, on a CPU, its share of the threads; torch.distributed.run starts several, and on GPUs
each takes one. All take turns, round by round, as ours does in train.py; a line joins the medians of the
rounds. Printed are the rounds' ratios to the first batch size, or number of processes. Flags not listed below
go to the script: --width (64), --recipe (here classic), --device, ...
"""
import itertools, statistics, tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from train import CORES, FLAGS, compare, machine, measure, save, show, start_parser

def draw(path, title, rates):
    """The rates of both kinds, {kind: {size: images a second of each round}}, beside one another."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    for axes, (kind, by_size) in zip(figure.subplots(1, 2), rates.items()):
        axes.plot(list(by_size), list(map(statistics.median, by_size.values())), "o-")
        for size, values in by_size.items():
            axes.plot([size] * len(values), values, ".", color="tab:blue", alpha=0.4)
        axes.set(title=f"by {kind}", xlabel=kind, ylabel="images/second, by medians", xscale="log", ylim=0)
        axes.set_xticks(list(by_size), list(map(str, by_size)), minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

def main():
    parser = start_parser(__doc__, "dcgan")
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    add("--processes", type=int, nargs="+", default=[1, 2])
    add("--steps", type=int, help="timed steps in a round (4, on CUDA 50, or those that 256 pictures are)")
    add("--out", type=Path, default=Path("scaling.png"), help="the picture (scaling.png)")
    options, flags = parser.parse_known_args()
    gpus = torch.cuda.device_count()
    if gpus: options.processes = [count for count in options.processes if count <= gpus]
    rates = {"batch size": {size: [] for size in options.batch_sizes},
             "processes": {count: [] for count in options.processes}}
    with tempfile.TemporaryDirectory() as root:
        flags = [*FLAGS[options.script], *flags, "--data", "synthetic", "--root", root]
        show(about := machine())
        for number, (kind, size) in itertools.product(
                range(options.rounds), [(kind, size) for kind, sizes in rates.items() for size in sizes]):
            more, count = (["--batch-size", str(size)], 1) if kind == "batch size" else ([], size)
            steps = options.steps or (0 if gpus else max(4, 256 // size if more else 4))
            threads = {} if gpus else dict(OMP_NUM_THREADS=str(max(1, CORES // count)))
            found = measure(options.script, "ours", flags + more, steps, count, **threads)
            rates[kind][size].append(found["images_per_second"])
            print(f"round {number + 1}: {kind} {size:4} {rates[kind][size][-1]:9.2f} images/s", flush=True)
    ratios = {kind: {size: compare(values, next(iter(by_size.values()))) for size, values in by_size.items()}
              for kind, by_size in rates.items()}
    for kind, by_size in ratios.items():
        for size, (middle, low, high) in by_size.items():
            print(f"{kind} {size}: {middle:.2f} times {next(iter(by_size))} ({low:.2f} to {high:.2f})")
    draw(options.out, f"{options.script}.py: training on {about.get('gpu', about['cpu'])}", rates)
    print(f"the picture: {options.out}")
    save(options.json, dict(about, script=options.script, last=found["about"], rates=rates, ratios=ratios))

if __name__ == "__main__":
    main()
