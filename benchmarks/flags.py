"""python benchmarks/flags.py: what the flags of fashion_keras_port.py do to its figures, in the same time of training.

Each row is a list of flags; without --row the rows are the Keras original (no flags), each flag alone, and some
together. All rows train in turn, a slice of one after a slice of the other; only the time of steps and of waiting for
data counts. After each slice the averaged generator makes 10,000 pictures, which the classifier of the script's report
reads: their Frechet distance in its features, the smallest share that a class has of them, and, where the model is told
the class, how many are read as asked. Flags not listed below go to every row: --root, --data, --seed, --precision, ...
"""
import argparse, json, shlex
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pack import machine  # first, as it makes the scripts known
from cgan import train_for
from train import make_ours
import fashion_keras_port as script

ROWS = ["", "--conditional", "--arch dcgan", "--loss hinge", "--loss lsgan", "--loss wgan-gp",
        "--arch dcgan --conditional", "--arch dcgan --conditional --loss hinge",
        "--arch dcgan --conditional --loss wgan-gp"]


def judge(evaluator, args, generator):
    """(figures by name, pictures uint8 N,1,28,28) of as many pictures as the test set has, with its labels."""
    classifier, _, features, labels, _ = evaluator
    asked = argparse.Namespace(**{**vars(args), "labels": labels.tolist() if args.conditional else None})
    made = torch.cat(list(script.sampled(asked, dict(Generator=generator.state_dict()), len(labels))))
    of_made, classes = script.read(classifier, made)
    shares = torch.bincount(classes, minlength=len(labels.unique())) / len(classes)
    as_asked = (classes == labels).double().mean().item() if args.conditional else None
    figures = dict(frechet=script.frechet(of_made, features), least_share=shares.min().item(), read_as_asked=as_asked)
    return figures, made


def open_rows(rows, others, device):
    """By row: (arguments, batches, a step, the averaged generator)."""
    found = {}
    for row in rows:
        args, _ = script.parse([*shlex.split(row), *others])
        open_source, step, generator = make_ours(script, args, device, script.pick_device(args)[1])
        found[row] = args, open_source(), step, generator
    return found


def compare(rows, others, options):
    """Train all rows in turn, print the figures after each slice; returns (figures as a dict, pictures by row)."""
    args, _ = script.parse(others)
    device, precision, _ = script.pick_device(args)
    fused = script.use_gan_ops(device, not args.no_fused)
    evaluator = script.load_evaluator(args, device)
    about = dict(machine(), threads=torch.get_num_threads(), device=str(device), precision=precision, gan_ops=fused,
                 data=args.data[0], seed=args.seed, classifier_accuracy=evaluator[1], frechet_floor=evaluator[4])
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
    trained, spent, steps = open_rows(rows, others, device), dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0)
    figures, made = [], {}
    while spent[rows[-1]] < options.seconds - 1e-3:
        for row, (args, source, step, generator) in trained.items():
            done, seconds = train_for(source, step, min(options.slice, options.seconds - spent[row]), device)
            spent[row], steps[row] = spent[row] + seconds, steps[row] + done
            values, made[row] = judge(evaluator, args, generator)
            figures.append(dict(row=row, seconds=round(spent[row], 1), steps=steps[row], **values))
            asked = f", {values['read_as_asked']:.2%} read as asked" if args.conditional else ""
            print(f"{spent[row]:6.0f} s {steps[row]:7} steps: Frechet distance {values['frechet']:.4f}, least share of "
                  f"a class {values['least_share']:.2%}{asked}; {row or 'the default'}", flush=True)
    return dict(about, rows=figures), {row: pictures_to_show(evaluator[3], made[row], trained[row][0]) for row in rows}


def pictures_to_show(labels, made, args):
    """100 pictures: ten of each class asked for, in rows, or else the first."""
    return made[labels.argsort(stable=True)[torch.arange(100) * len(labels) // 100]] if args.conditional else made[:100]


def draw(path, made, seconds):
    """The pictures of all rows beside each other."""
    figure = Figure(figsize=(6 * len(made), 6.4), layout="constrained")
    for axes, (row, pictures) in zip(figure.subplots(1, len(made), squeeze=False)[0], made.items()):
        axes.set(title=f"{row or 'the default'}, after {seconds:.0f} s", xticks=[], yticks=[])
        axes.imshow(script.to_grid(pictures))
    figure.savefig(path)


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    add = parser.add_argument
    add("--row", action="append", help="flags of a row, as --row='--arch dcgan'; may be given several times")
    add("--seconds", type=float, default=600.0, help="of training for each row (600)")
    add("--slice", type=float, default=150.0, help="seconds of training before the next row's turn (150)")
    add("--picture", type=Path, help="write pictures of all rows there")
    add("--json", type=Path, help="write the results there")
    options, others = parser.parse_known_args()
    try:
        result, made = compare(options.row or ROWS, others, options)
    except script.UserError as error:
        parser.error(str(error))
    if options.picture:
        draw(options.picture, made, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
