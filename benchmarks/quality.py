"""python benchmarks/quality.py --out quality.png: does our way learn what the usual way learns?

Trains the same networks twice on the same pictures, from the same weights and for as many steps: our way and the usual
way, both as benchmarks/train.py describes them, in turn. The order of the pictures and the noise differ. The picture
has the course of the losses, faint as they are and smoothed, and what both generators make of the same noise after a
third of the steps and at the end. Flags not listed below go to the script: --width (64), --batch-size, --recipe (here
classic), --device, --precision, ...
"""
import argparse, tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from pack import machine, picture_folder, read_flags
from train import make_ours, make_usual, measure

LOSSES, COLOURS = ("Loss_D", "Loss_G"), ("tab:blue", "tab:orange")


@torch.no_grad()
def samples(script, generator, z):
    """What a generator makes of z in evaluation mode, as a PIL picture."""
    training = generator.training
    images = script.sample(generator.eval(), z.to(next(generator.parameters()).device))
    generator.train(training)
    return script.to_grid(images)


def recording(step, losses):
    """The step as one that appends its losses, without waiting for the device."""
    return lambda real: losses.append(torch.as_tensor(step(real)).clone())


def train(script, args, options):
    """({side: its losses, steps,2}, {side: images/second}, {step: {side: its samples}}); the sides take turns."""
    device, precision, _ = script.pick_device(args)
    fused = script.use_gan_ops(device, not args.no_fused)
    about = dict(machine(), script=script.SCRIPT, threads=torch.get_num_threads(), device=str(device),
                 precision=precision, gan_ops=fused, width=args.width, batch=args.batch_size, seed=args.seed)
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
    sides = {f"ours ({precision})": make_ours(script, args, device, precision),
             "the usual way (fp32)": make_usual(script, args, device, options.workers)}
    z = torch.randn(32, script.Z, generator=torch.Generator().manual_seed(args.seed))
    losses, seconds, made, done = {name: [] for name in sides}, dict.fromkeys(sides, 0.0), {}, 0
    for mark in sorted({max(1, options.steps // 3), options.steps}):
        for name, (start, step, generator) in sides.items():
            script.use_gan_ops(device, name.startswith("ours") and not args.no_fused)
            seconds[name] += measure(start(), recording(step, losses[name]), 0, mark - done, device)[0]
            made.setdefault(mark, {})[name] = samples(script, generator, z)
            print(f"{name}: {mark} steps in {seconds[name]:.0f} s", flush=True)
        done = mark
    rates = {name: options.steps * args.batch_size / value for name, value in seconds.items()}
    return {name: torch.stack(values).cpu().numpy() for name, values in losses.items()}, rates, made


def draw(path, title, losses, made):
    """The losses' course in the first row, below it the samples, a row for each of the steps they are from."""
    figure = Figure(figsize=(12, 4.5 + 3.4 * len(made)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(1 + len(made), 2, height_ratios=[4, *[3.4] * len(made)])
    for column, (axes, loss) in enumerate(zip(rows[0], LOSSES)):
        axes.set(title=loss, xlabel="step", ylabel="loss")
        for (name, values), colour in zip(losses.items(), COLOURS):
            window = max(1, len(values) // 50)
            smooth = np.convolve(values[:, column], np.ones(window) / window, "valid")
            axes.plot(range(1, len(values) + 1), values[:, column], color=colour, alpha=0.25)
            axes.plot(range(window, len(values) + 1), smooth, color=colour, label=name)
        axes.legend()
    for row, (step, pictures) in zip(rows[1:], made.items()):
        for axes, (name, picture) in zip(row, pictures.items()):
            axes.set(title=f"{name}, step {step}", xticks=[], yticks=[])
            axes.imshow(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    add = parser.add_argument
    add("--data", default="synthetic", help="a folder of pictures, or synthetic: 512 drawn ones (synthetic)")
    add("--steps", type=int, default=600, help="of each side (600)")
    add("--workers", type=int, default=2, help="of the usual way's DataLoader (2)")
    add("--out", type=Path, default=Path("quality.png"), help="the picture (quality.png)")
    script, options, others = read_flags(parser, "dcgan")
    with tempfile.TemporaryDirectory() as folder:
        data = picture_folder(script, options.data, folder)
        try:
            args, _ = script.parse([*others, "--data", data, "--root", folder])
            losses, rates, made = train(script, args, options)
        except script.UserError as error:
            parser.error(str(error))
    late = max(1, options.steps // 10)
    for name, values in losses.items():
        loss_d, loss_g = values[-late:].mean(0)
        print(f"{name}: mean of the last {late} steps: Loss_D {loss_d:.3f}, Loss_G {loss_g:.3f}; "
              f"{rates[name]:.1f} images/s")
    title = f"{script.SCRIPT}.py, width {args.width}, {args.size}x{args.size}, batch {args.batch_size}"
    draw(options.out, title, losses, made)
    print(f"the picture: {options.out}")


if __name__ == "__main__":
    main()
