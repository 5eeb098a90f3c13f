"""python benchmarks/scaling.py --out docs/dcgan_scaling.png: images/second by batch size and by number of processes.

Left: one process, with all threads, at each of --batch-sizes. Right: --processes, each with --batch-size pictures a
step and, on a CPU, its share of the threads; where they are several, torch.distributed.run starts them, with gloo, or
with nccl on GPUs, of which each takes one. The sizes take turns, round by round, and a line joins the medians of the
rounds. Flags not listed below go to the script: --data, --width (64), --recipe (here classic), --device, ...
"""
import argparse, json, os, statistics, subprocess, sys, tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from pack import machine, read_flags
from train import lengths, make_ours, measure


def rate(side, batch, device, steps=None):
    """Images/second of a training by train.make_ours; small batches are given more steps, 256 pictures at least."""
    start, step, _ = side
    warm, timed = lengths(device, steps)
    timed = steps or max(timed, 256 // batch)
    return timed * batch / measure(start(), step, warm, timed, device)[0]


def by_batch(script, args, device, precision, options):
    """{batch size: images/second of each round} in this process."""
    sides = {size: make_ours(script, argparse.Namespace(**{**vars(args), "batch_size": size}), device, precision)
             for size in options.batch_sizes}
    rates = {size: [] for size in sides}
    for number in range(options.rounds):
        for size, side in sides.items():
            rates[size].append(rate(side, size, device, options.steps))
            print(f"round {number + 1}: batch {size:4} {rates[size][-1]:9.2f} images/s", flush=True)
    return rates


def by_processes(args, flags, counts, threads, options):
    """{number of processes: images/second of each round, all of them together}."""
    rates = {count: [] for count in counts}
    for number in range(options.rounds):
        for count in counts:
            rates[count].append(start(flags, count, max(1, threads // count)))
            print(f"round {number + 1}: processes {count:4} {rates[count][-1]:9.2f} images/s", flush=True)
    return rates


def start(flags, count, threads):
    """Start `count` processes of this file with --worker and wait for the rate that they write."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rate")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        done = subprocess.run([sys.executable, *launch, __file__, "--worker", str(result), *flags], text=True,
                              env=dict(os.environ, OMP_NUM_THREADS=str(threads)), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{count} processes failed:\n{done.stdout}")
        return float(result.read_text())


def work(script, args, options):
    """One process of those: the first writes the rate of all into the file --worker."""
    device, precision, _ = script.pick_device(args)
    script.use_gan_ops(device, not args.no_fused)
    rank, world = script.start_processes(device)
    side = make_ours(script, args, device, precision, rank, world)
    each = rate(side, args.batch_size, device, options.steps)
    if rank == 0:
        options.worker.write_text(str(world * each))
    if dist.is_initialized():
        dist.destroy_process_group()


def medians(rates):
    """The median of each list."""
    return {size: statistics.median(values) for size, values in rates.items()}


def draw(path, about, batches, processes):
    """Two panels: rates by batch size and by processes; a point for each round."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    place = f"{about['cpu']}, {about['threads']} threads" if about["device"] == "cpu" else about.get("gpu")
    figure.suptitle(f"{about['script']}.py, width {about['width']}, {about['precision']}: training on {place}")
    left, right = figure.subplots(1, 2)
    for axes, rates in ((left, batches), (right, processes)):
        axes.plot(list(rates), list(medians(rates).values()), "o-", color="tab:blue", label="median")
        for size, values in rates.items():
            axes.plot([size] * len(values), values, ".", color="tab:blue", alpha=0.4)
        axes.set(ylabel="images/second", ylim=(0, 1.15 * max(map(max, rates.values()), default=1)))
        axes.grid(alpha=0.3)
    left.set(title="one process, by batch size", xlabel="batch size", xscale="log")
    left.set_xticks(list(batches), list(map(str, batches)), minor=False)
    left.set_xticks([], minor=True)
    right.set(title=f"by processes, {'which share the threads' if about['device'] == 'cpu' else 'each with a GPU'}",
              xlabel=f"processes, each with a batch of {about['batch']}", xticks=list(processes))
    if about["device"] != "cpu" and 1 in processes:
        one = medians(processes)[1]
        right.plot(list(processes), [one * count for count in processes], "--", color="grey", label="in proportion")
        right.set(ylim=(0, 1.15 * one * max(processes)))
        right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def run(script, args, flags, options):
    """Measure, print and draw; returns all figures as a dict."""
    device, precision, _ = script.pick_device(args)
    fused, threads, counts = script.use_gan_ops(device, not args.no_fused), torch.get_num_threads(), options.processes
    if device.type == "cuda":
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    if left_out := sorted(set(options.processes) - set(counts)):
        print(f"left out: {left_out} processes, which are more than the GPUs")
    about = dict(machine(), script=script.SCRIPT, threads=threads, device=device.type, precision=precision,
                 gan_ops=fused, width=args.width, size=args.size, batch=args.batch_size)
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
    pictures, most = len(script.load_pack(args)), max(*options.batch_sizes, args.batch_size * max(counts, default=1))
    if most > pictures:
        raise script.UserError(f"a batch of {most} is more than the {pictures} pictures")
    processes = by_processes(args, flags, counts, threads, options)  # first, while this process holds no memory
    batches = by_batch(script, args, device, precision, options)
    middle = {name: medians(rates) for name, rates in dict(batch=batches, processes=processes).items()}
    for name, values in middle.items():
        for size, value in values.items():
            print(f"median: {name} {size:4} {value:9.2f} images/s")
    draw(options.out, about, batches, processes)
    print(f"the picture: {options.out}")
    return dict(about, steps=options.steps, by_batch=batches, by_processes=processes, median=middle)


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    add("--processes", type=int, nargs="+", default=[1, 2])
    add("--steps", type=int, help="timed steps in a round (4, on CUDA 50, or those that 256 pictures are)")
    add("--rounds", type=int, default=3)
    add("--out", type=Path, default=Path("scaling.png"), help="the picture (scaling.png)")
    add("--json", type=Path, help="write the results there")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    script, options, others = read_flags(parser, "dcgan")
    with tempfile.TemporaryDirectory() as folder:
        try:
            args, _ = script.parse(["--root", folder, *others])
            if options.worker:
                return work(script, args, options)
            flags = ["--script", script.SCRIPT, *(["--steps", str(options.steps)] if options.steps else [])]
            result = run(script, args, [*flags, "--root", folder, *others], options)
        except script.UserError as error:
            parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
