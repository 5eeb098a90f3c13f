"""The run folder: what is in it, and that nothing is lost when a run is stopped, killed or resumed."""

import contextlib
import csv
import importlib.machinery
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from conftest import KINDS, SCRIPTS, TINY, error_line, flags, load
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.auto import tqdm

import dcgan

FORKS = multiprocessing.get_context("forkserver")  # whose processes begin with these imported
FORKS.set_forkserver_preload(["torch", "torchvision", "tqdm.auto", "matplotlib.figure"])
HEAD = ["step", "epoch", "seconds", "images", "loss_d", "loss_g", "d_real", "d_fake"]
CURVES = {"losses.png", "scores.png"}


def rows_of(out):
    """metrics.csv as dictionaries of numbers."""
    with (out / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def images_of(out):
    """{name: content} of all that is drawn in a run folder: sample grids, curves, the animation."""
    files = [*out.rglob("*.png"), *out.rglob("*.gif")]
    return {path.relative_to(out): path.read_bytes() for path in files}


def same_run(a, b):
    """Assert that two folders have the same weights, metrics (without seconds) and images, bit for bit."""
    first, second = load(a / "checkpoint.pt"), load(b / "checkpoint.pt")
    assert first["step"] == second["step"]
    for name in ("G", "D", "ema"):
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    for name in ("opt_g", "opt_d"):
        for number, state in first[name]["state"].items():
            assert all(torch.equal(value, second[name]["state"][number][key]) for key, value in state.items())
    rows = [[{**row, "seconds": 0} for row in rows_of(out)] for out in (a, b)]
    assert rows[0] == rows[1] != []
    assert images_of(a) == images_of(b) != {}
    assert not list(b.rglob(".part-*"))


def stand_in(monkeypatch, script, loss=float, act=lambda step: None):
    """A train_step that learns nothing, with losses loss(step) and -loss(step), after it calls act(step)."""
    steps = []

    def train_step(nets, args, real, z, *labels):
        steps.append(len(steps) + 1)
        act(steps[-1])
        value = torch.tensor(loss(steps[-1]))
        return {"loss_d": value, "loss_g": -value, "d_real": torch.tensor(0.75), "d_fake": torch.tensor(0.25)}

    monkeypatch.setattr(script, "train_step", train_step)
    return steps


def resume(script, out, steps, *argv):
    """Go on with the run in `out` to step `steps`."""
    script.main(["--resume", "--out", str(out), "--steps", str(steps), *argv])


# What is in the folder


def test_a_run_leaves_the_whole_folder(script, root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(script, "SAMPLE_EVERY", 5)  # an epoch
    script.main(flags(script, root, out, "--epochs", 3))
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    samples = {f"samples/epoch_{i:04d}.png" for i in (1, 2, 3)}
    data = {"config.json", "metrics.csv", "checkpoint.pt", "models.pth"}
    assert names == data | samples | CURVES | {"evolution.gif"}
    for name in samples | CURVES:
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5
    config = json.loads((out / "config.json").read_text())
    used = config["used"]
    assert config["width"] == script.parse(TINY[script])[0].width
    assert config["seed"] == 0 and (script is not dcgan or config["augment"] is True)
    assert (used["images"], used["device"], used["precision"]) == (40, "cpu", "fp32")
    assert used["torch"] == torch.__version__ and "serve" in used["gan_ops"]
    said = capsys.readouterr().out
    assert all(f"{name} {used[name]}" in said for name in ("images", "device", "precision", "gan_ops"))
    assert (out / "metrics.csv").read_text().split("\n")[0].split(",") == HEAD
    rows = rows_of(out)
    assert [(row["step"], row["epoch"], row["images"]) for row in rows] == [(10, 2, 80), (15, 3, 120)]
    assert all(0 < row[name] < 1 for row in rows for name in ("d_real", "d_fake"))
    assert rows[0]["seconds"] <= rows[1]["seconds"]
    models, saved = load(out / "models.pth"), load(out / "checkpoint.pt")
    assert set(models) == {"Generator", "Discriminator", "config"} and saved["step"] == 15
    assert all(torch.equal(value, saved["ema"][name]) for name, value in models["Generator"].items())
    G, D = script.make_networks(script.argparse.Namespace(**models["config"]))
    G.load_state_dict(models["Generator"])
    D.load_state_dict(models["Discriminator"])


@pytest.mark.parametrize(
    "every, epochs",
    [(1, {1, 2, 3, 4, 5}), (5, {1, 2, 3, 4, 5}), (6, {2, 4, 5}), (15, {3, 5}), (100, {5})],
)
def test_samples_are_of_whole_epochs_so_many_steps_apart_and_of_the_end(
    every, epochs, root, tmp_path, monkeypatch
):
    stand_in(monkeypatch, dcgan)
    monkeypatch.setattr(dcgan, "SAMPLE_EVERY", every)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 23))  # 5 an epoch
    assert {int(path.stem[-4:]) for path in (tmp_path / "samples").glob("*.png")} == epochs


@pytest.mark.parametrize("most, epochs", [(100, [1, 2, 3, 4, 5]), (3, [1, 3, 5]), (2, [2, 5]), (1, [5])])
def test_the_animation_has_the_sample_grids_in_order_and_the_last_always(
    most, epochs, root, tmp_path, monkeypatch
):
    monkeypatch.setattr(dcgan, "GIF_FRAMES", most)
    for epoch in range(1, 6):
        path = tmp_path / "samples" / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 200), (50 * epoch, 0, 0)).save(path)
    dcgan.draw_animation(tmp_path)
    animation = Image.open(tmp_path / "evolution.gif")
    reds = []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        reds.append(animation.convert("RGB").getpixel((9, 9))[0])
    assert [round(red / 50) for red in reds] == epochs


def test_metrics_are_of_every_tenth_step_and_of_the_last(root, tmp_path, monkeypatch):
    stand_in(monkeypatch, dcgan)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 23))
    rows = rows_of(tmp_path)
    assert [(r["step"], r["epoch"], r["images"]) for r in rows] == [(10, 2, 80), (20, 4, 160), (23, 5, 184)]
    assert [r["loss_d"] for r in rows] == [-r["loss_g"] for r in rows] == [10, 20, 23]
    assert {(r["d_real"], r["d_fake"]) for r in rows} == {(0.75, 0.25)}


def test_each_point_of_a_curve_is_the_mean_of_ten_rows(root, tmp_path, monkeypatch):
    """Of as many as there are till then, where there are fewer; of a resumed run, of all."""
    drawn = {}

    def plot(axes, x, y, label):
        drawn[axes.get_title(), label] = list(x), list(y)

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes: None)
    stand_in(monkeypatch, dcgan)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 30))
    assert drawn["dcgan: losses", "loss_d"] == ([10, 20, 30], pytest.approx([10, 15, 20]))
    resume(dcgan, tmp_path, 120)
    steps, means = drawn["dcgan: losses", "loss_g"]
    assert steps == [*range(10, 130, 10)]
    assert means[:2] + means[-3:] == pytest.approx([-10, -15, -55, -65, -75])
    assert set(drawn) == {
        ("dcgan: losses", "loss_d"),
        ("dcgan: losses", "loss_g"),
        ("dcgan: scores", "d_real"),
        ("dcgan: scores", "d_fake"),
    }


def test_without_matplotlib_a_run_has_no_curves(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 2))
    assert load(tmp_path / "checkpoint.pt")["step"] == 2
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "evolution.gif").exists()


def test_a_further_metric_is_a_column_a_curve_and_a_logged_value(script, root, tmp_path, monkeypatch):
    """Also in a run that began without it, whose rows till then have none, or that ends without it."""
    plain_step = script.train_step

    def train_step(nets, args, *given):
        return {**plain_step(nets, args, *given), "loss_more": torch.tensor(0.5), "weight": torch.tensor(3.0)}

    script.main(flags(script, root, tmp_path, "--steps", 10))
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", train_step)
        resume(script, tmp_path, 20, "--logger", "tensorboard")
    resume(script, tmp_path, 21)
    before, between, after = rows_of(tmp_path)
    assert list(between) == [*HEAD, "loss_more", "weight"]
    assert (between["loss_more"], between["weight"]) == (0.5, 3)
    assert math.isnan(before["weight"]) and math.isnan(after["weight"])
    assert {path.name for path in tmp_path.glob("*.png")} == CURVES | {"weight.png"}
    assert logged(tmp_path)["weight"] == {20: 3.0}


@pytest.mark.parametrize(
    "more, steps", [("--steps 4 --epochs 9", 4), ("--steps 9 --epochs 1", 5), ("--epochs 2", 10)]
)
def test_whichever_of_steps_and_epochs_comes_first_ends_the_run(more, steps, root, tmp_path, monkeypatch):
    taken = stand_in(monkeypatch, dcgan)
    dcgan.main(flags(dcgan, root, tmp_path, *more.split()))
    assert len(taken) == load(tmp_path / "checkpoint.pt")["step"] == steps


@pytest.mark.parametrize("more, steps", [("--minutes 2", 5), ("--minutes 2 --steps 3", 3), ("--steps 7", 7)])
def test_minutes_end_a_run_saved(more, steps, root, tmp_path, monkeypatch, capsys):
    """Status 0 and a line how to go on; the run that goes on has as many minutes again, or a new end."""
    seconds = [1000.0]

    def pass_half_a_minute(step):
        seconds[0] += 30

    stand_in(monkeypatch, dcgan, act=pass_half_a_minute)
    monkeypatch.setattr(dcgan, "time", types.SimpleNamespace(monotonic=lambda: seconds[0]))
    dcgan.main(flags(dcgan, root, tmp_path, *more.split()))
    assert load(tmp_path / "checkpoint.pt")["step"] == steps
    assert (tmp_path / "evolution.gif").exists() and CURVES <= {path.name for path in tmp_path.glob("*.png")}
    said = capsys.readouterr().out
    line = f"stopped at step {steps} and saved; to go on: python dcgan.py --resume --out {tmp_path}"
    assert (line in said) == (steps == 5)
    if steps == 5:
        dcgan.main(["--resume", "--out", str(tmp_path)])
        assert load(tmp_path / "checkpoint.pt")["step"] == 10
        assert rows_of(tmp_path)[-1]["seconds"] == 10 * 30
        resume(dcgan, tmp_path, 18)
        assert load(tmp_path / "checkpoint.pt")["step"] == 18


def test_kept_models_are_those_of_a_run_that_ends_there(script, root, tmp_path):
    """The averaged generator, with its batch norm statistics; images can be made by them."""
    script.main(flags(script, root, tmp_path / "run", "--epochs", 4, "--keep-every", 2))
    kept = sorted(path.name for path in (tmp_path / "run").glob("models_*"))
    assert kept == ["models_0002.pth", "models_0004.pth"]
    script.main(flags(script, root, tmp_path / "short", "--epochs", 2))
    ours, theirs = load(tmp_path / "run" / kept[0]), load(tmp_path / "short" / "models.pth")
    assert set(ours) == set(theirs)
    for name in "Generator", "Discriminator":
        assert all(torch.equal(value, ours[name][key]) for key, value in theirs[name].items())
    images = tmp_path / "images.npz"
    script.main(["--generate", "2", "--checkpoint", str(tmp_path / "run" / kept[0]), "--save", str(images)])
    assert images.exists()


def test_the_same_seed_gives_the_same_files_and_another_seed_others(script, root, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 20240101123456)):
        script.main(flags(script, root, tmp_path / name, "--steps", 3, "--seed", seed))
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "c")


# Loggers


def logged(out):
    """{metric: {step: value}} that TensorBoard shows of a run; no step stands there twice."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        found[name] = {event.step: event.value for event in scalars}
        assert len(found[name]) == len(scalars)
    return found


def test_tensorboard_has_each_row_once_also_of_a_run_that_was_killed(root, tmp_path):
    """The second life, to step 20, is not in the checkpoint that the third one goes on from."""
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 10, "--logger", "tensorboard"))
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    resume(dcgan, tmp_path, 25)  # the logger is kept as other flags are
    (tmp_path / "checkpoint.pt").write_bytes(kept)
    resume(dcgan, tmp_path, 30, "--lr", "0.1")
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30]
    shown = logged(tmp_path)
    assert list(shown) == HEAD[4:]
    for name, values in shown.items():
        assert values == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-5)


def test_wandb_gets_each_row_and_goes_on_in_the_same_run(root, tmp_path, monkeypatch):
    """By a module in wandb's place: init, with an id from the second life on, gives a context manager."""
    calls = []

    class Run:
        id = "abc123"

        def __enter__(self):
            return self

        def __exit__(self, kind, *error):
            calls.append(("end", kind))

        def log(self, metrics, step):
            calls.append((step, metrics))

    def init(**options):
        calls.append(("init", options))
        return Run()

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 10, "--logger", "wandb"))
    resume(dcgan, tmp_path, 15)
    kinds = [what for what, _ in calls]
    assert kinds == ["init", 10, "end", "init", 15, "end"]
    first, second = (options for what, options in calls if what == "init")
    assert (first["id"], second["id"]) == (None, "abc123")
    for options in first, second:
        assert (options["project"], options["resume"], options["dir"]) == ("dcgan", "allow", str(tmp_path))
        assert options["config"]["width"] == 2 and options["config"]["used"]["images"] == 40
    for row, (step, metrics) in zip(rows_of(tmp_path), (calls[1], calls[4])):
        assert row["step"] == step and list(metrics) == HEAD[4:]
        assert metrics == pytest.approx({name: row[name] for name in HEAD[4:]})
    assert calls[2] == calls[5] == ("end", None)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_one_line(name, script, root, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    line = fails(script, *flags(script, root, tmp_path / "run", "--logger", name))
    assert f"pip install {name}" in line and not (tmp_path / "run").exists()


# Going on


def test_a_run_in_parts_is_the_whole_run_bit_for_bit(kind, root, tmp_path, monkeypatch):
    """Resumed between two rows of the metrics and between two epochs; every file is replaced whole."""
    script, argv = kind
    monkeypatch.setattr(script, "SAMPLE_EVERY", 5)  # an epoch
    monkeypatch.setattr(script, "GRID", 3)
    monkeypatch.setattr(script, "EMA_IMAGES", 32)
    script.main(flags(script, root, tmp_path / "whole", *argv.split(), "--steps", 23))
    script.main(flags(script, root, tmp_path / "parts", *argv.split(), "--steps", 7))
    for steps in 8, 16, 23:
        kept = []
        for path in (tmp_path / "parts").glob("*.pt*"):
            kept.append((path, os.open(path, os.O_RDONLY), path.read_bytes()))
        resume(script, tmp_path / "parts", steps)
        for path, descriptor, content in kept:
            assert os.pread(descriptor, len(content) + 1, 0) == content and path.read_bytes() != content
            os.close(descriptor)
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["dcgan-classic-grey", "cspup128-exact", "cgan_residual", "fashion-style"])
def test_a_checkpoint_of_an_earlier_version_goes_on(name, root, tmp_path):
    """Which has rows as lists and other names for some flags; from it to the same bits as from today's."""
    script, argv = KINDS[name]
    argv = [*argv.split(), "--steps", 12, "--lr-decay-from", 4]
    script.main(flags(script, root, tmp_path / "now", *argv))
    shutil.copytree(tmp_path / "now", tmp_path / "then")
    saved = load(tmp_path / "then" / "checkpoint.pt")
    saved["rows"] = [[row[name] for name in HEAD] for row in saved["rows"]]
    earlier = {"lr_decay_from": "fall", "class_names": "names", "scheme": "recipe", "arch": "recipe"}
    saved["config"] = {earlier.get(flag, flag): value for flag, value in saved["config"].items()}
    saved["config"]["used"]["pictures"] = saved["config"]["used"].pop("images")
    for flag in "logger", "wandb_id", "minutes", "keep_every":
        del saved["config"][flag]
    torch.save(saved, tmp_path / "then" / "checkpoint.pt")
    for folder in "now", "then":
        resume(script, tmp_path / folder, 13)
    same_run(tmp_path / "now", tmp_path / "then")
    assert json.loads((tmp_path / "then" / "config.json").read_text())["lr_decay_from"] == 4


def test_a_second_run_does_not_take_the_place_of_the_first(script, trained, root, fails):
    before = (trained / "checkpoint.pt").read_bytes()
    line = fails(script, *flags(script, root, trained, "--steps", 9))
    assert "--resume" in line and "--out" in line and (trained / "checkpoint.pt").read_bytes() == before


RUN_FILES = [
    "config.json",
    "metrics.csv",
    "losses.png",
    "scores.png",
    "samples/epoch_0001.png",
    "evolution.gif",
    "checkpoint.pt",
    "models.pth",
    "models_0010.pth",
]


def contents(folder):
    """{path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_folder_with_any_file_of_a_run_is_refused(name, trained, script, root, tmp_path, fails):
    """Whatever else was deleted or renamed: to a new run, and to one that goes on from another folder."""
    out = tmp_path / "run"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"of another run")
    before = contents(out)
    fork_of_a_run = ["--resume", "--checkpoint", trained / "checkpoint.pt", "--out", out, "--steps", 9]
    for argv in flags(script, root, out, "--steps", 9), fork_of_a_run:
        line = fails(script, *argv)
        assert str(out) in line and name.split("/")[0] in line and "--out" in line
    assert contents(out) == before


@pytest.mark.parametrize(
    "name", ["notes.txt", "data/cat.png", "runs/checkpoint.pt", "old.pth", "samples.zip"]
)
def test_a_folder_with_other_files_is_free(name, root, tmp_path, monkeypatch):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"of the user")
    stand_in(monkeypatch, dcgan)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 2))
    assert (tmp_path / name).read_bytes() == b"of the user"


@pytest.mark.parametrize("state", ["no folder", "empty", "renamed", "moved", "deleted", "a file"])
def test_resuming_without_a_checkpoint_says_what_the_folder_has(state, trained, script, tmp_path, fails):
    out = tmp_path / "run"
    names = ["config.json", "metrics.csv", "samples", "models.pth"]
    if state == "empty":
        out.mkdir()
    elif state == "a file":
        out.write_text("a file")
    elif state != "no folder":
        shutil.copytree(trained, out)
        places = {"renamed": out / "checkpoint.bak", "moved": out / "kept" / "checkpoint.pt"}
        if state in places:
            places[state].parent.mkdir(exist_ok=True)
            (out / "checkpoint.pt").rename(places[state])
        else:
            (out / "checkpoint.pt").unlink()
    before = contents(tmp_path)
    line = fails(script, "--resume", "--out", out, "--steps", 9)
    assert str(out / "checkpoint.pt") in line
    assert all((name in line) == (state in ("renamed", "moved", "deleted")) for name in names)
    assert contents(tmp_path) == before and out.exists() == (state != "no folder")


def test_a_checkpoint_of_another_name_in_the_folder_goes_on_there(trained, script, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "checkpoint.pt").rename(out / "before.pt")
    script.main(["--resume", "--checkpoint", str(out / "before.pt"), "--steps", "4"])
    assert load(out / "checkpoint.pt")["step"] == 4 and load(out / "before.pt")["step"] == 3
    resume(script, out, 5)
    assert load(out / "checkpoint.pt")["step"] == 5


@pytest.mark.parametrize("name", ["models.pth", "models_0001.pth"])
def test_what_has_only_models_cannot_be_resumed(name, trained, script, tmp_path, fails):
    shutil.copy(trained / "models.pth", tmp_path / name)
    line = fails(script, "--resume", "--checkpoint", tmp_path / name, "--out", tmp_path / "run")
    assert "only a checkpoint.pt can be resumed" in line and not (tmp_path / "run").exists()


def test_what_can_be_resumed_is_there_before_samples_are(root, tmp_path, monkeypatch):
    """From the tenth step on, so that a process killed later than that has lost no folder."""
    found = {}

    def look(step):
        found[step] = {path.name for path in tmp_path.glob("*")}

    stand_in(monkeypatch, dcgan, act=look)
    monkeypatch.setattr(dcgan, "SAMPLE_EVERY", 15)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 17))
    before = [found[step] for step in range(1, 11)]
    assert before == [{".lock"}] * 10
    assert {"checkpoint.pt", "models.pth", "config.json", "metrics.csv"} < found[11] == found[15]
    assert "samples" not in found[15] and "samples" in found[16]
    assert not (tmp_path / ".lock").exists()


def test_a_mistake_in_the_first_step_leaves_the_folder_free(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stand_in(patch, dcgan, act=raising(NameError("a mistake")))
        with pytest.raises(NameError):
            dcgan.main(flags(dcgan, root, tmp_path, "--steps", 2))
    assert contents(tmp_path) == {}
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 2))


@pytest.mark.parametrize("first", ["new", "resumed"])
def test_two_processes_in_one_folder(first, root, tmp_path, fails):
    """The second one is refused, before and after the first one has saved; a kill leaves the folder free."""
    out, printed = tmp_path / "run", tmp_path / "printed.txt"
    arguments = flags(dcgan, root, out, "--steps", 100_000)
    if first == "resumed":
        dcgan.main(flags(dcgan, root, out, "--steps", 3))
        arguments.append("--resume")
    life = fork(dcgan, arguments, printed)
    began = time.monotonic()
    while life.is_alive() and not (out / ".lock").exists() and time.monotonic() < began + 20:
        time.sleep(0.01)
    if first == "resumed":
        assert "another process" in fails(dcgan, "--resume", "--out", out, "--steps", 4)
    else:
        assert "another process" in fails(dcgan, *flags(dcgan, root, out, "--steps", 3))
        wait_for_save(life.is_alive, out / "checkpoint.pt")
        assert "another process" in fails(dcgan, *flags(dcgan, root, out, "--steps", 3))
        assert "another process" in fails(dcgan, "--resume", "--out", out, "--steps", 4)
    assert life.is_alive()
    life.kill()
    life.join()
    if not (out / "checkpoint.pt").exists():
        return
    step = load(out / "checkpoint.pt")["step"]
    resume(dcgan, out, step + 2)
    assert load(out / "checkpoint.pt")["step"] == step + 2


def during(monkeypatch, name, act):
    """Have act() happen once, before the script does what `name` says."""
    done = []
    plain = getattr(dcgan, name)

    def function(*given):
        if not done:
            done.append(None)
            act()
        return plain(*given)

    monkeypatch.setattr(dcgan, name, function)


def test_a_folder_is_held_while_images_are_packed(root, tmp_path, monkeypatch, fails):
    """A second run that packs nothing cannot begin, end, and be written over."""
    out = tmp_path / "run"
    argv = flags(dcgan, root, out, "--steps", 2)
    lines = []
    during(monkeypatch, "load_pack", lambda: lines.append(fails(dcgan, *argv)))
    dcgan.main(argv)
    assert "another process" in lines[0] and load(out / "checkpoint.pt")["step"] == 2


def test_a_checkpoint_that_another_process_went_on_with_is_not_gone_back_to(
    root, tmp_path, monkeypatch, fails
):
    """It was read before the folder was free."""
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 2))
    with monkeypatch.context() as patch:
        during(patch, "run_files", lambda: resume(dcgan, tmp_path, 5))
        patch.setattr("filelock.FileLock.acquire", lambda *given, **options: None)
        assert "went on with" in fails(dcgan, "--resume", "--out", tmp_path, "--steps", 9)
    assert load(tmp_path / "checkpoint.pt")["step"] == 5
    resume(dcgan, tmp_path, 6)


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_no_folder_that_was_not_there(there, root, tmp_path, fails):
    out = tmp_path / "run"
    if there:
        out.mkdir()
    fails(dcgan, *flags(dcgan, root, out, "--data", tmp_path / "nothing"))
    assert out.exists() == there and (not there or contents(out) == {})


def test_kept_models_are_not_there_before_a_checkpoint(root, tmp_path, monkeypatch):
    """Epochs of five steps, each kept: what a kill leaves can be resumed."""
    found = []
    stand_in(monkeypatch, dcgan, act=lambda step: found.append({path.name for path in tmp_path.glob("*.p*")}))
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 7, "--keep-every", 1))
    assert found[4] == set() and {"models_0001.pth", "checkpoint.pt"} <= found[5]


def test_a_checkpoint_named_for_nothing_is_an_error(trained, script, root, tmp_path, fails):
    argv = flags(script, root, tmp_path / "run", "--checkpoint", trained / "checkpoint.pt")
    assert "--generate and --resume" in fails(script, *argv) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind_of_end", ["end", "error", "signal"])
def test_the_folder_is_free_again_in_the_same_process(kind_of_end, root, tmp_path, monkeypatch):
    """As in a notebook."""

    def act(step):
        if step == 12 and kind_of_end == "error":
            raise ValueError("a mistake")
        if step == 12 and kind_of_end == "signal":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        stand_in(patch, dcgan, act=act)
        with contextlib.suppress(ValueError, SystemExit):
            dcgan.main(flags(dcgan, root, tmp_path, "--steps", 13))
    resume(dcgan, tmp_path, 14)
    assert load(tmp_path / "checkpoint.pt")["step"] == 14


def test_samples_of_a_life_that_was_killed_are_removed(trained, script, tmp_path):
    """They are later than what the run goes on from; the animation has none of them."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for epoch in 2, 9, 12345:
        shutil.copy(out / "samples" / "epoch_0001.png", out / "samples" / f"epoch_{epoch:04d}.png")
    copy = "epoch_0002 (1).png"  # as synchronising programs name them
    shutil.copy(out / "samples" / "epoch_0001.png", out / "samples" / copy)
    resume(script, out, 4)  # five an epoch
    assert {path.name for path in (out / "samples").iterdir()} == {"epoch_0001.png", copy}
    assert getattr(Image.open(out / "evolution.gif"), "n_frames", 1) == 1


@pytest.mark.parametrize("data", ["{}", "{}/.", "{}/../set"])
def test_a_run_into_the_folder_of_the_images_is_refused(data, root, fails):
    argv = flags(dcgan, root, root / "set", "--data", data.format(root / "set"))
    before = contents(root / "set")
    assert "folder of the images" in fails(dcgan, *argv) and contents(root / "set") == before


@pytest.mark.parametrize("more", [[], ["--keep-every", "1"]])
def test_nothing_is_drawn_or_kept_once_a_loss_is_not_finite(more, root, tmp_path, monkeypatch, fails):
    """Also between two rows of the metrics."""
    stand_in(monkeypatch, dcgan, lambda step: math.nan if step >= 13 else 1.0)
    monkeypatch.setattr(dcgan, "SAMPLE_EVERY", 5)
    line = fails(dcgan, *flags(dcgan, root, tmp_path, "--steps", 40, *more))
    assert "no finite loss at step 15" in line
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert len(list(tmp_path.glob("models_*"))) == 2 * bool(more)


@pytest.mark.parametrize(
    "argv, folder",
    [
        ("", "runs/{}"),
        ("--checkpoint {}/checkpoint.pt", "{}"),
        ("--checkpoint {}/checkpoint.pt --out new", "new"),
    ],
)
def test_a_resumed_run_goes_on_where_its_checkpoint_is_or_where_it_is_told(
    argv, folder, trained, script, tmp_path, monkeypatch
):
    """Also where a folder was copied to: what its configuration says of it is of the past."""
    monkeypatch.chdir(tmp_path)
    copies = [tmp_path / "runs" / script.SCRIPT, tmp_path / "elsewhere"]
    for copy in copies:
        shutil.copytree(trained, copy)
    before = (trained / "checkpoint.pt").read_bytes()
    script.main(["--resume", "--steps", "4", *argv.format("elsewhere").split()])
    assert (trained / "checkpoint.pt").read_bytes() == before
    steps = {path.parent: load(path)["step"] for path in tmp_path.rglob("checkpoint.pt")}
    moved = tmp_path / folder.format("elsewhere" if argv else script.SCRIPT)
    assert steps == {**dict.fromkeys(copies, 3), moved: 4}


def test_a_finished_run_says_so(script, trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*.[pg]*")}
    script.main(["--resume", "--out", str(trained)])
    assert "has had its 3 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_that_is_stopped_says_at_which_step(trained, script, monkeypatch, capsys):
    """A signal between the handlers and a loop that has nothing left to do."""

    class Bar(tqdm):
        def __iter__(self):
            signal.raise_signal(signal.SIGINT)
            return iter([])

    monkeypatch.setattr(script, "tqdm", Bar)
    with pytest.raises(SystemExit) as end:
        script.main(["--resume", "--out", str(trained)])
    assert end.value.code == 130 and "stopped at step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, kept", [("--width 3", "--width {width}"), ("--batch-size 4 --seed 1", "--batch-size 8")]
)
def test_a_flag_that_cannot_be_changed_is_named_with_its_value_and_no_other(
    script, argv, kept, trained, fails
):
    """Epochs and counts would be wrong, or the network another."""
    before = (trained / "checkpoint.pt").read_bytes()
    line = fails(script, "--resume", "--out", trained, "--steps", 9, *argv.split())
    kept = kept.format(**load(trained / "models.pth")["config"])
    assert f" {kept}," in line and re.findall(r"--[a-z-]+", line) == [kept.split()[0]]
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("change", ["classes", "new", "renamed", "replaced"])
def test_going_on_with_other_images_is_refused(script, change, trained, root, fails):
    before = (trained / "checkpoint.pt").read_bytes()
    first, new = root / "set" / "a" / "0.png", root / "set" / "a" / "new.png"
    if change == "new":
        Image.new("L", (30, 30), 99).save(new)
    elif change == "renamed":
        first.rename(new)
    elif change == "replaced":
        content, stat = first.read_bytes(), first.stat()
        first.write_bytes((root / "set" / "a" / "4.png").read_bytes())
        os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        more = ["--classes", "a", "b"] if change == "classes" else []
        assert "other images" in fails(script, "--resume", "--out", trained, "--steps", 9, *more)
    finally:
        if change == "renamed":
            new.rename(first)
        elif change == "replaced":
            first.write_bytes(content)
        new.unlink(missing_ok=True)
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_has_no_such_letters_ends_no_run(encoding, root, tmp_path, monkeypatch):
    """As a log file on Windows."""
    for name in "猫", "犬":
        shutil.copytree(root / "set" / "a", tmp_path / "set" / name)
    script = SCRIPTS[2]
    argv = flags(script, root, tmp_path / "猫", "--data", tmp_path / "set", "--steps", 1)
    file = (tmp_path / "printed.txt").open("w", encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        script.main(argv)
    file.close()
    assert "classes: {'\\u72ac': 10, '\\u732b': 10}" in (tmp_path / "printed.txt").read_text(encoding)
    assert load(tmp_path / "猫" / "checkpoint.pt")["config"]["class_names"] == ["犬", "猫"]


@pytest.mark.parametrize("place", ["moved", "zipped", "touched"])
def test_the_same_images_elsewhere_go_on(place, script, root, trained, tmp_path):
    """It is what they show that counts, not where and when they were written."""
    out, data = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained, out)
    shutil.copytree(root / "set", data)
    if place == "touched":
        for file in data.rglob("*.png"):
            os.utime(file, (1, 1))
    if place == "zipped":
        data = shutil.make_archive(str(data), "zip", data)
    resume(script, out, 4, "--data", str(data), "--root", str(tmp_path / "root"))
    assert load(out / "checkpoint.pt")["step"] == 4


def test_a_checkpoint_from_before_images_were_identified_goes_on(trained, script, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    saved = load(trained / "checkpoint.pt")
    del saved["config"]["image_set"]
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    resume(script, tmp_path / "run", 4)
    assert "image_set" in load(tmp_path / "run" / "checkpoint.pt")["config"]


def test_a_resumed_run_keeps_what_it_was_told(root, tmp_path):
    """Precision, device and all else that is not given again; what is given again counts."""
    argv = "--seed 5 --no-augment --save-every 3 --no-fused --keep-every 4".split()
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 1, *argv))
    resume(dcgan, tmp_path, 2, "--d-lr", "0.5")
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "seed": 5,
        "augment": False,
        "save_every": 3,
        "no_fused": True,
        "keep_every": 4,
        "batch_size": 8,
        "device": "cpu",
        "precision": "fp32",
        "d_lr": 0.5,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["used"]["precision"] == "fp32"


# Stopped


def start(script, arguments):
    """The script in a process of its own, where a closed terminal is not ignored."""
    return subprocess.Popen(
        [sys.executable, script.__file__, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def live(name, arguments, printed, limit):
    """What a forked process does: the script's main on one thread, what it prints into a file.

    Files larger than `limit` bytes cannot be written, if it is given.
    """
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stdout.fileno())
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    __import__(name).main(arguments)


def fork(script, arguments, printed, limit=None):
    """The same as `start` does, in a process that need not import torch first."""
    given = script.__name__, arguments, str(printed), limit
    process = FORKS.Process(target=live, args=given, daemon=True)  # it ends with the tests, if they fail
    process.start()
    return process


def wait_for_save(running, checkpoint):
    """Until a process has written its first checkpoint of this life, or is not running any more."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while running() and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
        time.sleep(0.01)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def number(request):
    """A signal that ends a run; a closed terminal's is not ignored, as it is where nohup runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    yield request.param
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "script, kind_of_end",
    [*zip(SCRIPTS, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM))],
    ids=[script.SCRIPT for script in SCRIPTS],
)
def test_a_signal_saves_and_says_how_to_go_on(script, kind_of_end, root, tmp_path):
    out = tmp_path / "run"
    process = start(script, flags(script, root, out, "--steps", 100000, "--save-every", 0))
    wait_for_save(lambda: process.poll() is None, out / "checkpoint.pt")
    process.send_signal(kind_of_end)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + kind_of_end
    assert f"python {script.SCRIPT}.py --resume --out {out}" in text and "Traceback" not in text
    step = load(out / "checkpoint.pt")["step"]
    assert step >= 10 and rows_of(out)[-1]["step"] == step
    resume(script, out, step + 7)  # in a later epoch
    script.main(flags(script, root, tmp_path / "whole", "--steps", step + 7))
    (out / "samples" / f"epoch_{math.ceil(step / 5):04d}.png").unlink()  # of the moment it was stopped
    same_run_but_for_samples(tmp_path / "whole", out)


def same_run_but_for_samples(whole, out):
    """same_run, where `out` does not have all sample grids of `whole`, and the animation is another."""
    for path in (whole / "samples").glob("*"):
        if not (out / "samples" / path.name).exists():
            path.unlink()
    for folder in whole, out:
        (folder / "evolution.gif").unlink()
    same_run(whole, out)


def test_a_run_stopped_in_its_first_steps_is_saved_and_goes_on(
    script, number, root, tmp_path, monkeypatch, capsys
):
    kept = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stand_in(patch, script, act=lambda step: step == 2 and signal.raise_signal(number))
        with pytest.raises(SystemExit) as end:
            script.main(flags(script, root, tmp_path, "--epochs", 2))
    assert end.value.code == 128 + number and "--resume" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pt")["step"] == 2
    assert signal.getsignal(number) == kept  # a notebook goes on
    resume(script, tmp_path, 4)
    assert load(tmp_path / "checkpoint.pt")["step"] == 4


def test_a_closed_terminal_that_nohup_ignores_stays_ignored(root, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stand_in(monkeypatch, dcgan, act=lambda step: signal.raise_signal(signal.SIGHUP))
        dcgan.main(flags(dcgan, root, tmp_path, "--steps", 3))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load(tmp_path / "checkpoint.pt")["step"] == 3


@pytest.mark.parametrize(
    "name, steps", [("dcgan", 120), ("cspup128", 50), ("cgan_residual", 120), ("fashion-style", 120)]
)
def test_twelve_kills_change_nothing(name, steps, root, tmp_path):
    """SIGKILL at six moments of a life from its start on, at six soon after it has saved; then the end."""
    script, argv = KINDS[name]
    rng = random.Random(0)
    more = [*argv.split(), "--steps", steps]
    out, printed = tmp_path / "killed", tmp_path / "printed.txt"
    arguments = flags(script, root, out, *more, "--save-every", 0)
    lives = []
    for kill in range(12):
        again = ["--resume"] if (out / "checkpoint.pt").exists() else []
        life = fork(script, [*arguments, *again], printed)
        if kill % 2:
            wait_for_save(life.is_alive, out / "checkpoint.pt")
        time.sleep(rng.uniform(0, 0.3 if kill % 2 else 0.4))
        life.kill()
        life.join()
        lives.append(load(out / "checkpoint.pt")["step"] if (out / "checkpoint.pt").exists() else -1)
    assert lives == sorted(lives) and len(set(lives)) > 3, lives
    life = fork(script, [*arguments, "--resume"], printed)
    life.join()
    assert life.exitcode == 0, printed.read_text()[-500:]
    script.main(flags(script, root, tmp_path / "whole", *more))
    for path in out.rglob(".part-*"):  # what the kills cut short
        path.unlink()
    same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("first, then", [("bf16", "fp16"), ("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_goes_on_in_another_precision(first, then, root, tmp_path):
    """As from an A100 to a T4: only fp16 scales its losses."""
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 2, "--precision", first))
    resume(dcgan, tmp_path, 4, "--precision", then)
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 4 and bool(saved["scaler"]) == (then == "fp16")


def test_a_run_begun_on_a_gpu_goes_on_and_generates_without_one(
    trained, script, tmp_path, monkeypatch, fails
):
    """Its flag is of another machine's; one that is given is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain_ones = torch.ones

    def ones(*size, **options):
        if torch.device(options.get("device") or "cpu").type == "cuda":
            raise RuntimeError("no GPU is there")
        return plain_ones(*size, **options)

    monkeypatch.setattr(torch, "ones", ones)
    shutil.copytree(trained, tmp_path / "run")
    for name in "checkpoint.pt", "models.pth":
        saved = load(trained / name)
        saved["config"]["device"] = "cuda"
        torch.save(saved, tmp_path / "run" / name)
    assert "no GPU is there" in fails(script, "--resume", "--out", tmp_path / "run", "--device", "cuda")
    resume(script, tmp_path / "run", 4)
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    places = "--checkpoint", tmp_path / "run" / "models.pth", "--save", tmp_path / "g.npz"
    script.main(list(map(str, ["--generate", 2, *places])))


@pytest.mark.parametrize("what, step", [("draw_curves", 10), ("batches", 12)])
def test_an_error_in_curves_or_in_reading_loses_no_step(what, step, root, tmp_path, monkeypatch):
    batches = dcgan.batches

    def broken(*given):
        if what == "batches":
            yield from itertools.islice(batches(*given), step)
        raise ZeroDivisionError

    if what == "draw_curves":
        monkeypatch.setattr(dcgan, what, lambda *given: next(broken()))
    else:
        monkeypatch.setattr(dcgan, what, broken)
    with pytest.raises(ZeroDivisionError):
        dcgan.main(flags(dcgan, root, tmp_path, "--steps", 20, "--save-every", 0))
    assert load(tmp_path / "checkpoint.pt")["step"] == step


def test_main_in_a_thread_trains(root, tmp_path):
    """As a web interface calls it: signals are the main thread's, so this one has none."""
    thread = threading.Thread(target=dcgan.main, args=(flags(dcgan, root, tmp_path, "--steps", 2),))
    thread.start()
    thread.join()
    assert load(tmp_path / "checkpoint.pt")["step"] == 2


def test_interrupted_before_the_first_step_ends_in_one_line(root, tmp_path, monkeypatch, fails):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcgan, "make_networks", interrupted)
    assert "KeyboardInterrupt" in fails(dcgan, *flags(dcgan, root, tmp_path))


# What goes wrong in training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_its_metrics_are_kept(
    value, root, tmp_path, monkeypatch, fails
):
    """The checkpoint is of before, the metrics show how it came to it."""
    with monkeypatch.context() as patch:
        stand_in(patch, dcgan, lambda step: value if step >= 15 else 1.0)
        line = fails(dcgan, *flags(dcgan, root, tmp_path, "--steps", 40, "--save-every", 0))
    assert "no finite loss at step 20" in line and "--lr" in line and "--precision fp32" in line
    assert load(tmp_path / "checkpoint.pt")["step"] == 10
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [10, 20] and not math.isfinite(rows[1]["loss_d"])
    resume(dcgan, tmp_path, 20, "--lr", "1e-5")
    assert load(tmp_path / "checkpoint.pt")["step"] == 20
    assert [math.isfinite(row["loss_d"]) for row in rows_of(tmp_path)] == [True, True]


def test_a_mistake_in_a_step_is_a_traceback_and_what_was_saved_stays(script, root, tmp_path, monkeypatch):
    """The networks are between two steps then; signals are as before, so a notebook goes on."""
    script.main(flags(script, root, tmp_path, "--steps", 3, "--save-every", 0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*p*") if path.name != "config.json"}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def mistake(step):
        if step == 4:
            raise ValueError("first line\nsecond line")

    stand_in(monkeypatch, script, act=mistake)
    with pytest.raises(ValueError, match="second line"):
        resume(script, tmp_path, 20)
    assert {path: path.read_bytes() for path in before} == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert not list(tmp_path.rglob(".part-*"))


def break_sampling(patch, script, error):
    patch.setattr(script, "sample", raising(error))


def break_saving_of_samples(patch, script, error):
    patch.setattr(script, "save_image", raising(error))


def break_progress_bar(patch, script, error):
    """As a closed terminal does; the bar is told of every tenth step."""
    bar = type("Bar", (tqdm,), {"set_postfix": raising(error)})
    patch.setattr(script, "tqdm", bar)


def raising(error):
    """A function that raises the error whatever it is given."""

    def function(*given, **options):
        raise error

    return function


@pytest.mark.parametrize(
    "name, break_it, error, step",
    [
        ("dcgan", break_sampling, NameError("a mistake"), 5),  # before the metrics have a row
        ("fashion-style", break_sampling, NameError("a mistake"), 15),
        ("fashion", break_saving_of_samples, ValueError("no image"), 15),
        ("dcgan", break_progress_bar, BrokenPipeError("the pipe is broken"), 10),
        ("cgan_residual", break_progress_bar, OSError("Input/output error"), 10),
    ],
)
def test_an_error_between_two_steps_saves_first(name, break_it, error, step, root, tmp_path, monkeypatch):
    """The run goes on from the step that it had reached, and ends bit for bit as one never stopped."""
    script, argv = KINDS[name]
    argv = [*argv.split(), "--steps", 23]
    out = tmp_path / "run"
    monkeypatch.setattr(script, "SAMPLE_EVERY", step)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        break_it(patch, script, error)
        with pytest.raises(type(error), match=str(error)):
            script.main(flags(script, root, out, *argv))
    assert load(out / "checkpoint.pt")["step"] == step
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    resume(script, out, 23)
    script.main(flags(script, root, tmp_path / "whole", *argv))
    same_run_but_for_samples(tmp_path / "whole", out)


# Devices


def test_the_best_device_and_precision_are_taken_and_a_gpu_that_cannot_is_named(
    script, tmp_path, monkeypatch, fails
):
    args = script.parse([])[0]
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        device, precision = script.pick_device(args)
        assert device.type == "cpu" and precision in ("fp32", "bf16")
        assert script.pick_device(script.parse(["--precision", "fp16"])[0])[1] == "fp16"

    def no_kernel(*size, device, **options):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, result in (("Stream", None), ("set_stream", None), ("get_device_capability", (6, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *given, result=result: result)
    monkeypatch.setattr(torch, "ones", no_kernel)
    for flag in [], ["--device", "cuda"]:
        line = fails(script, *flag, "--steps", "1", "--out", tmp_path)
        assert "no kernel image" in line and "--device cpu" in line


# What goes wrong outside


@pytest.mark.parametrize(
    "what, limit, words",
    [
        ("packing", 3000, "File too large"),
        ("samples", 30_000, "File too large"),
        ("checkpoint.pt", 800_000, "is there room?"),
        ("checkpoint.pt, the first one", 800_000, "is there room?"),
    ],
)
def test_a_full_disk_ends_in_one_line_and_what_was_saved_stays(what, limit, words, root, tmp_path):
    out, printed = tmp_path / "run", tmp_path / "printed.txt"
    argv = flags(dcgan, root, out, "--width", 16, "--save-every", 0, "--steps")
    if what == "packing":
        root = tmp_path / "root"
        argv[argv.index("--root") + 1] = str(root)
    elif "first" not in what:
        dcgan.main([*argv, "10"])
    before = {path: path.read_bytes() for path in out.glob("checkpoint.pt")}
    again = ["--resume"] if before else []
    life = fork(dcgan, [*argv, "20", *again], printed, limit)
    life.join()
    line = error_line(printed.read_text())
    assert life.exitcode == 2 and words in line and what.split(",")[0].removeprefix("packing") in line
    assert not list(tmp_path.rglob(".part-*")) and not list(root.rglob(".part-*"))
    assert {path: path.read_bytes() for path in before} == before
    dcgan.main([*argv, "20", *again])
    assert load(out / "checkpoint.pt")["step"] == 20
