"""Scripts are made to be changed: changes of a renamed copy, alone in a folder, with only what is required."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, load
from shared_parts import TOP

OPTIONAL = "gan_ops", "matplotlib", "matplotlib.figure", "wandb", "tensorboard", "torch.utils.tensorboard"
STEP_ENDS = "    d_fake = fake_logit.sigmoid().mean()\n"


@pytest.fixture
def copy(tmp_path):
    """Function that makes mygan.py of a script, with replacements [(old, new)]."""

    def make(script, *changes):
        text = Path(script.__file__).read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "mygan.py").write_text(text)
        return tmp_path

    return make


def run(folder, *argv):
    """Run mygan.py in its folder, where no optional package can be imported; (status, stdout, stderr)."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(blocked)
    command = [sys.executable, "mygan.py", *map(str, argv)]
    environment = {"PATH": "", "PYTHONPATH": "site", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def train(folder, script, *argv):
    """Train mygan.py on few drawn images, into its own run folder; what it printed."""
    flags = [*TINY[script], "--data", "synthetic", "--steps", 3]
    status, out, err = run(folder, *flags, *argv)
    assert status == 0, err
    return out


def rows(folder, run="mygan"):
    """metrics.csv of a run of mygan.py as dictionaries of numbers."""
    with (folder / "runs" / run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


FEW = "range(4096)", "range(24)"


def test_a_renamed_copy_has_runs_of_its_own(script, copy):
    folder = copy(script, FEW)
    assert "runs/mygan" in train(folder, script)
    out = folder / "runs" / "mygan"
    assert {path.name for path in out.iterdir()} == {  # no curves without matplotlib
        "config.json",
        "metrics.csv",
        "checkpoint.pt",
        "models.pth",
        "samples",
        "evolution.gif",
    }
    status, _, err = run(folder, "--resume", "--steps", 5)
    assert status == 0 and load(out / "checkpoint.pt")["step"] == 5, err
    status, _, err = run(folder, "--generate", 2, "--save", "made.npz", "--device", "cpu")
    assert status == 0 and len(np.load(folder / "made.npz")["images"]) == 2, err
    assert load(out / "models.pth")["config"]["script"] == "mygan"
    assert {path.name for path in folder.iterdir()} == {"mygan.py", "site", "runs", "data", "made.npz"}


@pytest.mark.parametrize("place", ["step", "network", "image", "data"])
def test_a_mistake_ends_in_its_traceback(place, copy):
    script = SCRIPTS[0]
    old, new = {
        "step": (STEP_ENDS, STEP_ENDS + "    d_real = d_rael\n"),
        "network": ("        x = self.layers(x)", "        x = self.layer(x)"),
        "image": ("    rng = random.Random(index)", "    rng = random.Random(indx)"),
        "data": ("    image = image.convert(", "    image = imag.convert("),
    }[place]
    status, _, err = run(copy(script, FEW, (old, new)), *TINY[script], "--steps", 3)
    assert status == 1 and "Traceback" in err and "error: " not in err
    assert new.strip().split("\n")[-1] in err and 'mygan.py", line' in err


def test_a_metric_is_one_more_entry(script, copy):
    """A column of metrics.csv, also in a run that began without it."""
    folder = copy(script, FEW)
    train(folder, script)
    text = (folder / "mygan.py").read_text()
    assert text.count('"d_fake": d_fake}') == 1
    more = '"d_fake": d_fake, "gap": d_real - d_fake, "one": 1}'
    (folder / "mygan.py").write_text(text.replace('"d_fake": d_fake}', more))
    status, _, err = run(folder, "--resume", "--steps", 10)
    assert status == 0, err
    (row,) = rows(folder)
    assert row["gap"] == pytest.approx(row["d_real"] - row["d_fake"], abs=1e-6) and row["one"] == 1


def test_the_course_of_the_learning_rate_is_one_function(copy):
    shown = '"d_fake": d_fake}', '"d_fake": d_fake, "factor": nets.lr_factor}'
    begins = "    if not args.lr_decay_from:\n"
    cosine = begins, "    return torch.cos(step / 6)\n" + begins
    script = SCRIPTS[0]
    folder = copy(script, FEW, shown)
    train(folder, script, "--lr-decay-from", 1)
    assert rows(folder)[-1]["factor"] == pytest.approx(3**-0.5)
    train(copy(script, FEW, shown, cosine), script, "--out", "runs/cosine")
    assert rows(folder, "cosine")[-1]["factor"] == pytest.approx(np.cos(3 / 6))


@pytest.mark.parametrize(
    "old, new",
    [
        ('"white")\n    for radius', '"navy")\n    for radius'),
        ("Image.BILINEAR)).reshape", "Image.NEAREST)).reshape"),
    ],
)
def test_images_that_are_drawn_or_read_otherwise_are_decoded_anew(old, new, copy):
    script = SCRIPTS[0]
    train(copy(script, FEW), script)
    folder = copy(script, FEW, (old, new))
    train(folder, script, "--out", "runs/changed")
    packs = [np.load(path) for path in (folder / "data" / ".packed").glob("*.npy")]
    assert len(packs) == 2 and not np.array_equal(*packs)
    train(folder, script, "--out", "runs/again")
    assert len(list((folder / "data" / ".packed").glob("*.npy"))) == 2


def test_a_deeper_network_with_another_loss_takes_no_other_change(copy):
    """The tools open it by --script."""
    deeper = (
        "            c_in, stride, padding = c_out, 2, 1\n",
        "            c_in, stride, padding = c_out, 2, 1\n"
        "            layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.ReLU()]\n",
    )
    hinge = "    loss_g = F.softplus(-fake_logit).mean()", "    loss_g = -fake_logit.mean()"
    script = SCRIPTS[0]
    folder = copy(script, FEW, deeper, hinge)
    train(folder, script)
    status, _, err = run(folder, "--resume", "--steps", 5)
    assert status == 0 and load(folder / "runs" / "mygan" / "checkpoint.pt")["step"] == 5, err
    command = [sys.executable, TOP / "tools" / "evaluate.py", "runs/mygan", "--script", "mygan.py"]
    more = ["--count", "8", "--device", "cpu"]
    done = subprocess.run([*command, *more], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "swd" in done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS[::2], ids=lambda script: script.SCRIPT)
def test_a_scheduler_of_torchs_has_its_effect(script, copy):
    """Also beside a script's own decay, cgan_residual.py's; the optimiser's learning rate is as it left it."""
    made = (
        "    half = torch.float16 if",
        (
            "    global schedule\n"
            "    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt_g, 3)\n"
            "    half = torch.float16 if"
        ),
    )
    stepped = "        nets.whole = True\n", "        nets.whole = True\n        schedule.step()\n"
    ends = []
    for changes in (), (made, stepped):
        folder = copy(script, FEW, *changes)
        train(folder, script, "--out", f"runs/{len(changes)}")
        ends.append(load(folder / "runs" / str(len(changes)) / "checkpoint.pt"))
    rates = [float(end["opt_g"]["param_groups"][0]["lr"]) for end in ends]
    assert rates[0] > 0 and rates[1] == pytest.approx(0, abs=1e-9)
    weights = [torch.cat([value.flatten().double() for value in end["G"].values()]) for end in ends]
    assert not torch.equal(*weights)
