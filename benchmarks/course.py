"""python benchmarks/course.py --data celeba --width 16 --batch-size 32 --out runs/course

Trains a script step by step and measures what it makes on the way: after each of --at steps the run is resumed up to
there and benchmarks/diversity.py asked about its averaged generator. Flags not listed below go to the script.
course.json in the run folder keeps the figures; `--draw a.json b.json --save course.png` draws those of several runs
over their steps, sliced Wasserstein distance and Vendi score, with the real pictures' own as a line.
"""
import argparse, json, subprocess, sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SHOWN = dict(swd="sliced Wasserstein distance × 1000", vendi="Vendi score of 500 pictures")


def follow(options, flags):
    """Train up to each of --at steps, with the script's own flags, and return [{step, name: [generated, real], ...}]."""
    out, rows = Path(options.out), []
    for steps in options.at:
        run = [sys.executable, HERE.parent / f"{options.script}.py", *flags, "--root", options.root, "--out", out]
        subprocess.run([*map(str, run), "--steps", str(steps), *["--resume"] * bool(rows)], check=True)
        measure = [sys.executable, HERE / "diversity.py", "--checkpoint", out / "models.pth", "--root", options.root]
        subprocess.run([*map(str, measure), "--count", str(options.count), "--json", str(out / "figures.json")], check=True)
        rows.append(dict(step=steps, **json.loads((out / "figures.json").read_text())))
        (out / "course.json").write_text(json.dumps(dict(flags=flags, rows=rows), indent=1) + "\n")
    return rows


def draw(paths, save):
    """The figures of several course.json over their steps; the folder that each lies in names its line."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), SHOWN.items()):
        for path in map(Path, paths):
            rows = json.loads(path.read_text())["rows"]
            axes.plot([row["step"] for row in rows], [row[name][0] for row in rows], "o-", label=path.parent.name)
        axes.axhline(rows[-1][name][1], color="grey", linestyle=":", label="real pictures")
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.legend()
    figure.savefig(save)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="cspup128")
    parser.add_argument("--at", type=int, nargs="+", default=[600, 1200, 2400, 3600, 6000], help="steps")
    parser.add_argument("--root", default="data")
    parser.add_argument("--out", default="runs/course", help="run folder (runs/course)")
    parser.add_argument("--count", type=int, default=2000, help="pictures that are measured (2000)")
    parser.add_argument("--draw", nargs="+", metavar="JSON", help="draw these instead of training")
    parser.add_argument("--save", default="course.png", help="picture of --draw (course.png)")
    options, flags = parser.parse_known_args()
    draw(options.draw, options.save) if options.draw else follow(options, flags)


if __name__ == "__main__":
    main()
