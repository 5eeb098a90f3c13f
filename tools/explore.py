"""Pictures that show how a run went, and what trained generators have learnt.

    python tools/explore.py run runs/dcgan                          # curves, animation, warnings of collapse
    python tools/explore.py run runs/dcgan --logger tensorboard     # and its metrics there; or wandb
    python tools/explore.py walk runs/dcgan --save walk.gif         # through z, in a circle; or .png, in rows
    python tools/explore.py classes runs/cgan_residual              # one noise in a row, through all classes
    python tools/explore.py table runs/forest runs/mountain         # of each run real, early, late pictures

`walk` and `classes` take a run folder, a models.pth or a checkpoint.pt; `run` and `table` run folders, also of a
run that is still going on, as far as it has saved. These two open the run's pictures, --data, for real ones.
"""
import argparse, functools, json, math, zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from common import fail, guarded, load, script_named, to_grid

def samples_of(run):
    """(configuration, the pictures of generated ones in order) of a run folder."""
    files = sorted(Path(run, "samples").glob("epoch_*.png"))
    if not files: fail(f"{run} is no run folder with samples in it")
    return json.loads(Path(run, "config.json").read_text()), files

def real_pictures(config):
    """As many pictures of a run's --data as its samples are, uint8 N,C,H,W, and how many are in a row."""
    script = script_named(config["script"])
    pack, _ = script.load_pack(argparse.Namespace(**config))
    rows = np.linspace(0, len(pack) - 1, script.PER_ROW**2).astype(int)
    return torch.from_numpy(pack[rows]).permute(0, 3, 1, 2), script.PER_ROW

def worries(rows, fake, real):
    """Lines on what has gone wrong, by the rows of metrics.csv and pictures (uint8 N,C,H,W) made and real."""
    ahead = rows["d_real"] - rows["d_fake"]
    if len(rows) >= 20 and ahead[-20:].min() > 0.95: yield "the discriminator has won: a lower --d-lr may help"
    if len(rows) >= 50 and ahead[-50:].mean() < 0.002:
        yield "the discriminator guesses: a higher --d-lr may help"
    if real.float().std() < 8: yield "the pictures of --data are nearly all of one colour, or black"
    flat = (F.adaptive_avg_pool2d(images.float(), 16).flatten(1) for images in (fake, real))
    made, true = (torch.cdist(x, x).fill_diagonal_(math.inf).amin(1).median() for x in flat)
    if len(rows) >= 50 and made < 0.4 * true: yield "the samples repeat themselves"

def run(options):
    """Into a run folder: losses.png, scores.png, comparison.png (real pictures on the left), evolution.gif.

    A discriminator that has won or guesses, or samples that repeat themselves, earn a line.
    """
    from matplotlib.figure import Figure  # here, as it takes half a second
    folder, (config, files) = Path(options.run), samples_of(options.run)
    rows = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, ndmin=1)
    some = min(10, len(rows))
    curves = dict(losses=("loss", "loss_d", "loss_g"), scores=("probability of being real", "d_real", "d_fake"))
    for name, (unit, *columns) in curves.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots(subplot_kw=dict(title=f"{config['script']}: {name}", xlabel="step", ylabel=unit))
        for column, colour in zip(columns, ("tab:blue", "tab:orange")):  # pale: as they are; else means of ten
            means = np.convolve(rows[column], np.full(some, 1 / some), "valid")
            axes.plot(rows["step"], rows[column], color=colour, alpha=0.3, linewidth=1)
            axes.plot(rows["step"][some - 1 :], means, color=colour, label=column)
        axes.legend()
        figure.savefig(folder / f"{name}.png")
    shown = files[:: -(len(files) // 100) - 1][::-1]  # about 100, and the last one always
    first, *rest = (ImageOps.contain(Image.open(file), (512, 512)) for file in shown)
    first.save(folder / "evolution.gif", save_all=True, append_images=rest, duration=250, loop=0)
    if options.logger: send(options.logger, folder, config, rows)
    last, (real, columns) = Image.open(files[-1]), real_pictures(config)
    both = Image.new("RGB", (2 * last.width, last.height))
    both.paste(to_grid(real, columns), (0, 0))
    both.paste(last, (last.width, 0))
    both.save(folder / "comparison.png")
    tiles = torch.from_numpy(np.array(last)).permute(2, 0, 1)[: real.shape[1], 2:, 2:]  # C,H,W
    for side in 1, 2: tiles = tiles.unfold(side, config["size"], config["size"] + 2)  # C,rows,columns,h,w
    for worry in worries(rows, tiles.flatten(1, 2).transpose(0, 1), real): print(f"warning: {worry}")
    print(f"losses.png, scores.png, comparison.png, evolution.gif: {folder}")

def send(logger, folder, config, rows):
    """The rows of metrics.csv to TensorBoard's files in the folder, or to W&B, where a second call adds what is new."""
    names = rows.dtype.names[4:]
    if logger == "wandb":
        import wandb
        known = f"{zlib.crc32(str(folder.resolve()).encode()):08x}"
        log = wandb.init(project=config["script"], id=known, name=folder.name, resume="allow", config=config)
        for row in rows: log.log({name: row[name] for name in names}, step=int(row["step"]))
        return log.finish()
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(folder / "tensorboard", purge_step=0) as writer:  # instead of what an earlier call wrote
        for row in rows:
            for name in names: writer.add_scalar(name, row[name], int(row["step"]))

def walk(options):
    """--count pictures on a circle of --steps through z, keeping their classes: a .gif or, in rows, .png."""
    path = options.save or Path("walk.gif")
    if path.suffix not in (".gif", ".png"): fail(f"--save {path}: a walk is a .gif or a .png")
    if min(options.steps, options.count) < 2: fail("a walk takes two --steps and two pictures at least")
    script, args, _, generator = load(options.run, seed=options.seed, device=options.device)
    a = script.draw_z(args, options.count)
    args.seed += 1
    b = script.draw_z(args, options.count)
    held = a == b  # the one-hot class
    turns = [2 * math.pi * step / options.steps for step in range(options.steps)]
    circle = (math.cos(turn) * a + math.sin(turn) * b for turn in turns)  # as long as a and b all the way
    pictures = [script.sample(generator, torch.where(held, a, z)) for z in circle]
    if path.suffix == ".png":
        image = to_grid(torch.stack(pictures, 1).flatten(0, 1), options.steps)
        script.write(path, image.save)
    else:
        columns = math.ceil(options.count**0.5)
        first, *rest = (ImageOps.contain(to_grid(x, columns), (512, 512)) for x in pictures)
        save = functools.partial(first.save, save_all=True, append_images=rest, duration=80, loop=0)
        script.write(path, save)
    print(f"a walk of {options.steps} steps: {path}")

def classes(options):
    """--count rows, each with the same noise through all classes of a conditional model."""
    path = options.save or Path("classes.png")
    script, args, _, generator = load(options.run, seed=options.seed, device=options.device)
    names = getattr(args, "names", None)
    if not names: fail(f"{options.run} is of a model that was trained without classes")
    z = script.draw_z(args, options.count).repeat_interleave(len(names), 0)  # count * classes,K+Z
    z[:, : len(names)] = torch.eye(len(names)).repeat(options.count, 1)
    script.write(path, to_grid(script.sample(generator, z), len(names)).save)
    print(f"{options.count} noises through {', '.join(names)}: {path}")

def font_for(text):
    """The file of an installed font that has all characters of `text`, as matplotlib's own has few; or None."""
    from matplotlib import font_manager, ft2font
    fonts = [font_manager.findfont("DejaVu Sans"), *(font.fname for font in font_manager.fontManager.ttflist)]
    fonts = [file for file in fonts if "LastResort" not in file]  # which has a box for each character
    has = (Path(file) for file in fonts if all(map(ft2font.FT2Font(file).get_char_index, map(ord, text))))
    return next(has, None)

def table(options):
    """A row for each run folder: real pictures, and generated ones early and late, of the same noise."""
    from matplotlib.figure import Figure  # here, as it takes half a second
    path = options.save or Path("table.png")
    figure = Figure(figsize=(9.6, 3.4 * len(options.runs)), layout="constrained")
    rows = figure.subplots(len(options.runs), 3, squeeze=False)
    for number, (run, row) in enumerate(zip(options.runs, rows), 1):
        config, files = samples_of(run)
        early_late = [(f"epoch {int(f.stem[6:])}", Image.open(f)) for f in (files[len(files) // 20], files[-1])]
        shown = [("real", to_grid(*real_pictures(config))), *early_late]
        side = (shown[0][1].width - 2) // 2 + 2  # a quarter of each grid
        for axes, (title, picture) in zip(row, shown):
            name = Path(run).resolve().name
            font = font_for(name)
            axes.set_title(f"{name if font else f'run {number}'}, {title}", font=font)
            axes.set(xticks=[], yticks=[])
            axes.imshow(picture.crop((0, 0, side, side)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"{len(options.runs)} runs: {path}")

def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail
    kinds = parser.add_subparsers(required=True, metavar="run, walk, classes or table")
    for work, count in (run, None), (walk, 16), (classes, 8), (table, None):
        kind = kinds.add_parser(work.__name__, help=work.__doc__.split("\n")[0], description=work.__doc__)
        kind.error = fail
        kind.set_defaults(work=work)
        add = kind.add_argument
        if work is run:
            add("run", metavar="RUN")
            add("--logger", choices=("tensorboard", "wandb"), help="where the metrics go besides")
            continue
        add("--save", type=Path, help=f"the picture ({work.__name__}.{'gif' if work is walk else 'png'})")
        if work is table:
            add("runs", nargs="+", metavar="RUN")
            continue
        add("run", metavar="RUN")
        add("--count", type=int, default=count, help=f"pictures, or rows of them ({count})")
        add("--seed", type=int, default=0, help="of the noise (0)")
        add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
        if work is walk: add("--steps", type=int, default=60, help="of the circle (60)")
    options = parser.parse_args(argv)
    guarded(options.work, options)

if __name__ == "__main__":
    main()
