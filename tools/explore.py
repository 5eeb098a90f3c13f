"""Images that show how a run went, and what trained generators have learnt.

    python tools/explore.py run runs/dcgan                     # samples beside real images; warnings
    python tools/explore.py walk runs/dcgan --save walk.gif    # through z, in a circle; or .png, in rows
    python tools/explore.py classes runs/cgan_residual         # the same noise in a row, through all classes
    python tools/explore.py table runs/forest runs/mountain    # of each run real, early, late images
    python tools/explore.py walk runs/mygan --script mygan.py  # of a changed or renamed copy

`walk` and `classes` take a run folder, a models.pth or a checkpoint.pt. `run` and `table` take run folders,
also of a run that is still going on, as far as it has saved, and open its --data for real images.
"""

import argparse
import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from common import (
    add_script_flag,
    arguments,
    count,
    fail,
    load,
    load_images,
    mendable_errors,
    scripts_named,
    seed,
    to_grid,
)

AHEAD = 0.95  # by which D(x) is above D(G(z)) when the discriminator has won, in each of the last 20 rows
LEVEL = 0.002  # by which it is above, in the mean of the last 50 rows, when the discriminator guesses
REPEATED = 0.4  # samples are nearer to each other than this share of what real images are
ONE_COLOUR = 8  # least standard deviation of the pixels of real images, of 255
GIF_SIDE = 512  # most pixels
EARLY = 20  # a table's early samples are those after one of so many parts of the run


# Run folders
def open_run(run, files):
    """(script, its arguments, files of the sample grids in order) of a run folder; files: of --script."""
    grids = sorted(Path(run, "samples").glob("epoch_*[0-9].png"), key=epoch_of)
    if not grids:
        fail(f"{run} is no run folder with samples in it")
    try:
        config = json.loads(Path(run, "config.json").read_text())
        name = config["script"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} has no config.json of a run: {error}")
    script = next(scripts_named(name, run, files))
    return script, arguments(script, config), grids


def epoch_of(file):
    """The number in the name of a sample grid."""
    return int(file.stem.removeprefix("epoch_"))


def real_images(script, args):
    """As many images of --data as a sample grid has, uint8 N,C,H,W."""
    pack, _ = load_images(script, args)
    rows = np.linspace(0, len(pack) - 1, script.GRID**2).astype(int)
    return torch.from_numpy(pack[rows]).permute(0, 3, 1, 2)


def images_of_grid(grid, size, channels):
    """The images of a sample grid, which has 2 pixels around each, as uint8 N,C,size,size."""
    pixels = torch.from_numpy(np.array(grid)).permute(2, 0, 1)[:channels, 2:, 2:]  # C,rows*(size+2),...
    tiles = pixels.unfold(1, size, size + 2).unfold(2, size, size + 2)  # C,rows,columns,size,size
    return tiles.flatten(1, 2).transpose(0, 1)


# What went wrong
def nearest_distance(images):
    """Median distance of an image to the nearest other one, of uint8 N,C,H,W averaged to 16x16."""
    rows = F.adaptive_avg_pool2d(images.float(), 16).flatten(1)
    return torch.cdist(rows, rows).fill_diagonal_(math.inf).amin(1).median()


def warnings(rows, fake, real):
    """Lines on what has gone wrong, by the rows of metrics.csv, {metric: value}, and images, uint8 N,C,H,W.

    A script whose metrics have no d_real and d_fake gets none on its discriminator.
    """
    gaps = np.array([row["d_real"] - row["d_fake"] for row in rows if {"d_real", "d_fake"} <= row.keys()])
    lines = []
    if len(gaps) >= 20 and gaps[-20:].min() > AHEAD:
        lines.append("the discriminator has won: a lower --d-lr may help")
    if len(gaps) >= 50 and gaps[-50:].mean() < LEVEL:
        lines.append("the discriminator guesses: a higher --d-lr may help")
    if real.float().std() < ONE_COLOUR:
        lines.append("the images of --data are nearly all of one colour, or black")
    if len(rows) >= 50 and nearest_distance(fake) < REPEATED * nearest_distance(real):
        lines.append("the samples repeat themselves")
    return lines


def run(options):
    """Into a run folder: comparison.png, real images on the left, the last samples on the right.

    A discriminator that has won or guesses, or samples that repeat themselves, give a warning.
    """
    folder = Path(options.run)
    script, args, grids = open_run(folder, options.script)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    last = Image.open(grids[-1])
    real = real_images(script, args)
    comparison = Image.new("RGB", (2 * last.width, last.height))
    comparison.paste(to_grid(real, script.GRID), (0, 0))
    comparison.paste(last, (last.width, 0))
    with script.replacing(folder / "comparison.png") as part:
        comparison.save(part)
    for line in warnings(rows, images_of_grid(last, args.size, args.channels), real):
        print(f"warning: {line}")
    print(f"comparison.png: {folder}")


# Trained generators
def output_path(options, default, suffixes):
    """The file of --save, or the default one."""
    path = options.save or Path(default)
    if path.suffix.lower() not in suffixes:
        fail(f"--save {path}: its name has to end in {' or '.join(suffixes)}")
    return path


def save_animation(images, path, script):
    """PIL images, made smaller where they are large, as a .gif."""
    first, *rest = [ImageOps.contain(image, (GIF_SIDE, GIF_SIDE)) for image in images]
    with script.replacing(path) as part:
        first.save(part, save_all=True, append_images=rest, duration=80, loop=0)


def walk(options):
    """--count images on a circle of --steps through z, keeping their classes: a .gif or, in rows, .png."""
    path = output_path(options, "walk.gif", (".gif", ".png"))
    if min(options.steps, options.count) < 2:
        fail("a walk takes two --steps and two images at least")
    script, args, _, generator = load(options.run, options.script, seed=options.seed, device=options.device)
    a = script.draw_z(args, options.count)
    args.seed += 1
    b = script.draw_z(args, options.count)
    fixed = a == b  # the one-hot class
    steps = []
    for step in range(options.steps):
        turn = 2 * math.pi * step / options.steps
        z = math.cos(turn) * a + math.sin(turn) * b  # as long as a and b all the way
        steps.append(script.sample(generator, torch.where(fixed, a, z)))
    if path.suffix.lower() == ".png":
        rows = torch.stack(steps, 1).flatten(0, 1)
        with script.replacing(path) as part:
            to_grid(rows, options.steps).save(part)
    else:
        columns = math.ceil(options.count**0.5)
        save_animation([to_grid(images, columns) for images in steps], path, script)
    print(f"a walk of {options.steps} steps: {path}")


def classes(options):
    """--count rows, each with the same noise through all classes of a conditional model."""
    path = output_path(options, "classes.png", (".png", ".jpg"))
    script, args, _, generator = load(options.run, options.script, seed=options.seed, device=options.device)
    names = getattr(args, "class_names", None)
    if not names:
        fail(f"{options.run} is of a model that was trained without classes")
    z = script.draw_z(args, options.count).repeat_interleave(len(names), 0)  # count * classes,K+Z
    z[:, : len(names)] = torch.eye(len(names)).repeat(options.count, 1)
    with script.replacing(path) as part:
        to_grid(script.sample(generator, z), len(names)).save(part)
    print(f"{options.count} noises through {', '.join(names)}: {path}")


# Tables of runs
def font_for(text):
    """The file of an installed font that has all characters of `text`, or None; matplotlib's own has few."""
    from matplotlib import font_manager, ft2font

    files = [font_manager.findfont("DejaVu Sans")]
    files += [font.fname for font in font_manager.fontManager.ttflist]
    for file in files:
        if "LastResort" in file:  # which has a box for each character
            continue
        font = ft2font.FT2Font(file)
        if all(font.get_char_index(ord(character)) for character in text):
            return Path(file)
    return None


def table_row(script, args, grids):
    """[(title, PIL image)] of a run: real images, early and late samples; of each grid a quarter."""
    shown = [("real", to_grid(real_images(script, args), script.GRID))]
    for file in grids[len(grids) // EARLY], grids[-1]:
        shown.append((f"epoch {epoch_of(file)}", Image.open(file)))
    side = (shown[0][1].width - 2) // 2 + 2  # 2 pixels around each image
    return [(title, grid.crop((0, 0, side, side))) for title, grid in shown]


def table(options):
    """A row for each run folder: real images, and generated ones early and late, of the same noise."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fail(f"{error}: pip install matplotlib")
    path = output_path(options, "table.png", (".png", ".jpg", ".pdf", ".svg"))
    figure = Figure(figsize=(9.6, 3.4 * len(options.runs)), layout="constrained")
    axes = figure.subplots(len(options.runs), 3, squeeze=False)
    for number, folder in enumerate(options.runs):
        name = Path(folder).resolve().name
        font = font_for(name)
        if not font:
            name = f"run {number + 1}"
        for cell, (title, grid) in zip(axes[number], table_row(*open_run(folder, options.script))):
            cell.set_title(f"{name}, {title}", font=font)
            cell.set(xticks=[], yticks=[])
            cell.imshow(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"{len(options.runs)} runs: {path}")


# The command line
def add_command(commands, work):
    """A command of the command line, called as the function that does it, and its parser."""
    summary = work.__doc__.split("\n")[0]
    parser = commands.add_parser(work.__name__, help=summary, description=work.__doc__)
    parser.error = fail
    parser.set_defaults(work=work)
    add_script_flag(parser)
    return parser


def add_generator_flags(parser, images):
    """The flags of `walk` and `classes`, with the default of --count."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--count", type=count, default=images, help=f"images, or rows of them ({images})")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (0)")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")


@mendable_errors()
def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail
    commands = parser.add_subparsers(required=True, metavar="run, walk, classes or table")
    add_command(commands, run).add_argument("run", metavar="RUN")
    of_walk = add_command(commands, walk)
    add_generator_flags(of_walk, 16)
    of_walk.add_argument("--steps", type=count, default=60, help="of the circle (60)")
    of_walk.add_argument("--save", type=Path, help="the images, .gif or .png (walk.gif)")
    of_classes = add_command(commands, classes)
    add_generator_flags(of_classes, 8)
    of_classes.add_argument("--save", type=Path, help="the image (classes.png)")
    of_table = add_command(commands, table)
    of_table.add_argument("runs", nargs="+", metavar="RUN")
    of_table.add_argument("--save", type=Path, help="the image (table.png)")
    options = parser.parse_args(argv)
    options.work(options)


if __name__ == "__main__":
    main()
