"""The run folder: what is in it, and that nothing is lost when a run is stopped, killed or resumed."""
import csv
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import KINDS, SCRIPTS, TINY, error_line, flags, load
from PIL import Image

import dcgan

FORKS = multiprocessing.get_context("forkserver")  # whose processes begin with these imported
FORKS.set_forkserver_preload(["torch", "torchvision", "tqdm.auto"])
HEAD = "step,epoch,seconds,images,loss_d,loss_g,d_real,d_fake".split(",")


def rows_of(out):
    """metrics.csv as dictionaries of numbers."""
    return [{name: float(value) for name, value in row.items()}
            for row in csv.DictReader((out / "metrics.csv").open())]


def same_run(a, b):
    """Assert that two folders have the same weights, metrics (without seconds) and pictures, bit for bit."""
    first, second = (load(out / "checkpoint.pt") for out in (a, b))
    assert first["step"] == second["step"]
    for name in ("G", "D", "ema"):
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    for name in ("opt_g", "opt_d"):
        for number, state in first[name]["state"].items():
            assert all(torch.equal(value, second[name]["state"][number][key]) for key, value in state.items())
    rows = [[dict(row, seconds=0) for row in rows_of(out)] for out in (a, b)]
    assert rows[0] == rows[1] != []
    made = [{path.relative_to(out): path.read_bytes() for path in out.rglob("*.png")} for out in (a, b)]
    assert made[0] == made[1] != {}
    assert not list(b.rglob(".part-*"))


def stand_in(monkeypatch, script, loss=lambda step: float(step), act=lambda step: None):
    """A train_step that learns nothing: its losses are loss(step) and -loss(step), its logits 1 and -1."""
    def step(nets, args, real, z, *labels):
        steps.append(len(steps) + 1)
        act(steps[-1])
        value = torch.tensor(loss(steps[-1]))
        return value, -value, torch.ones(len(real)), -torch.ones(len(real))
    steps = []
    monkeypatch.setattr(script, "train_step", step)
    return steps


# What is in the folder

def test_a_run_leaves_the_whole_folder(script, root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(script, "SAMPLE_EVERY", 5)  # an epoch
    script.main(flags(script, root, out, "--epochs", 3))
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    pictures = {f"samples/epoch_{i:04d}.png" for i in (1, 2, 3)}
    assert names == {"config.json", "metrics.csv", "checkpoint.pt", "models.pth"} | pictures
    for picture in pictures:
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5
    config = json.loads((out / "config.json").read_text())
    used = config["used"]
    assert config["width"] == script.parse(TINY[script])[0].width
    assert config["seed"] == 0 and (script is not dcgan or config["augment"] is True)
    assert (used["pictures"], used["device"], used["precision"]) == (40, "cpu", "fp32")
    assert used["torch"] == torch.__version__ and used["gan_ops"] == script.GAN_OPS
    said = capsys.readouterr().out
    assert all(f"{name} {used[name]}" in said for name in ("pictures", "device", "precision", "gan_ops"))
    assert next(csv.reader((out / "metrics.csv").open())) == HEAD
    rows = rows_of(out)
    assert [(row["step"], row["epoch"], row["images"]) for row in rows] == [(10, 2, 80), (15, 3, 120)]
    assert all(0 < row[name] < 1 for row in rows for name in ("d_real", "d_fake"))
    assert rows[0]["seconds"] <= rows[1]["seconds"]
    models, saved = load(out / "models.pth"), load(out / "checkpoint.pt")
    assert set(models) == {"Generator", "Discriminator", "config"} and saved["step"] == 15
    assert all(torch.equal(value, saved["ema"][name]) for name, value in models["Generator"].items())
    for network, name in zip(script.make_networks(script.argparse.Namespace(**models["config"])),
                             ("Generator", "Discriminator")):
        network.load_state_dict(models[name])


@pytest.mark.parametrize("every, epochs", [(1, {1, 2, 3, 4, 5}), (5, {1, 2, 3, 4, 5}), (6, {2, 4, 5}),
                                           (15, {3, 5}), (100, {5})])
def test_samples_are_of_whole_epochs_so_many_steps_apart_and_of_the_end(every, epochs, root, tmp_path,
                                                                        monkeypatch):
    stand_in(monkeypatch, dcgan)
    monkeypatch.setattr(dcgan, "SAMPLE_EVERY", every)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 23))  # 5 an epoch
    assert {int(path.stem[-4:]) for path in (tmp_path / "samples").glob("*.png")} == epochs


def test_metrics_are_of_every_tenth_step_and_of_the_last(root, tmp_path, monkeypatch):
    stand_in(monkeypatch, dcgan)
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 23))
    rows = rows_of(tmp_path)
    assert [(r["step"], r["epoch"], r["images"]) for r in rows] == [(10, 2, 80), (20, 4, 160), (23, 5, 184)]
    assert [r["loss_d"] for r in rows] == [-r["loss_g"] for r in rows] == [10, 20, 23]
    one = 1 / (1 + math.exp(-1))
    assert all((r["d_real"], r["d_fake"]) == pytest.approx((one, 1 - one), rel=1e-6) for r in rows)


@pytest.mark.parametrize("more, steps", [("--steps 4 --epochs 9", 4), ("--steps 9 --epochs 1", 5),
                                         ("--epochs 2", 10)])
def test_whichever_of_steps_and_epochs_comes_first_ends_the_run(more, steps, root, tmp_path, monkeypatch):
    taken = stand_in(monkeypatch, dcgan)
    dcgan.main(flags(dcgan, root, tmp_path, *more.split()))
    assert len(taken) == load(tmp_path / "checkpoint.pt")["step"] == steps


def test_the_same_seed_gives_the_same_files_and_another_seed_others(script, root, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 20240101123456)):
        script.main(flags(script, root, tmp_path / name, "--steps", 3, "--seed", seed))
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "c")


# Going on

def test_a_run_in_parts_is_the_whole_run_bit_for_bit(kind, root, tmp_path, monkeypatch):
    """Resumed between two rows of the metrics and between two epochs; every file is replaced whole."""
    script, argv = kind
    monkeypatch.setattr(script, "SAMPLE_EVERY", 5)  # an epoch
    script.main(flags(script, root, tmp_path / "whole", *argv.split(), "--steps", 23))
    script.main(flags(script, root, tmp_path / "parts", *argv.split(), "--steps", 7))
    for steps in 8, 16, 23:
        kept = [(path, os.open(path, os.O_RDONLY), path.read_bytes())
                for path in (tmp_path / "parts").glob("*.pt*")]
        script.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", str(steps)])
        for path, descriptor, content in kept:
            assert os.pread(descriptor, len(content) + 1, 0) == content and path.read_bytes() != content
            os.close(descriptor)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_where_there_is_nothing_yet_starts(root, tmp_path):
    for steps in 1, 2:
        dcgan.main(flags(dcgan, root, tmp_path / "run", "--steps", steps, "--resume"))
        assert load(tmp_path / "run" / "checkpoint.pt")["step"] == steps


def test_a_second_run_does_not_take_the_place_of_the_first(script, trained, root, fails):
    before = (trained / "checkpoint.pt").read_bytes()
    line = fails(script, *flags(script, root, trained, "--steps", 9))
    assert "--resume" in line and "--out" in line and (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("argv, folder", [("", "runs/{}"), ("--checkpoint {}/checkpoint.pt", "{}"), (
    "--checkpoint {}/checkpoint.pt --out new", "new")])
def test_a_resumed_run_goes_on_where_its_checkpoint_is_or_where_it_is_told(argv, folder, trained, script, tmp_path,
                                                                          monkeypatch):
    """Also where a folder was copied to: what its configuration says of it is of the past."""
    monkeypatch.chdir(tmp_path)
    copies = [tmp_path / "runs" / script.SCRIPT, tmp_path / "elsewhere"]
    for copy in copies: shutil.copytree(trained, copy)
    kept, before = trained / "checkpoint.pt", (trained / "checkpoint.pt").read_bytes()
    script.main(["--resume", "--steps", "4", *argv.format("elsewhere").split()])
    assert kept.read_bytes() == before
    steps = {path.parent: load(path)["step"] for path in tmp_path.rglob("checkpoint.pt")}
    moved = tmp_path / folder.format("elsewhere" if argv else script.SCRIPT)
    assert steps == {**dict.fromkeys(copies, 3), moved: 4}


def test_a_finished_run_says_so(script, trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*.p*")}
    script.main(["--resume", "--out", str(trained)])
    assert "has had its 3 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_that_is_stopped_says_at_which_step(trained, script, monkeypatch, capsys):
    """A signal between the handlers and a loop that has nothing left to do."""
    monkeypatch.setattr(script, "tqdm", lambda *given, **options: signal.raise_signal(signal.SIGINT) or [])
    with pytest.raises(SystemExit) as end:
        script.main(["--resume", "--out", str(trained)])
    assert end.value.code == 130 and "stopped at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    ("--batch-size 4", "batch"), ("--classes a b", "other pictures"), ("--width 3", "--width"),
    ("data", "other pictures"), ("renamed", "other pictures")])
def test_going_on_as_something_else_is_refused(script, argv, words, trained, root, fails):
    """Epochs and counts would be wrong, or the network another."""
    before = (trained / "checkpoint.pt").read_bytes()
    if argv == "data": Image.new("L", (30, 30), 99).save(root / "set" / "a" / "new.png")
    if argv == "renamed": (root / "set" / "a" / "0.png").rename(root / "set" / "a" / "new.png")
    try:
        more = argv.split() if argv.startswith("-") else []
        assert words in fails(script, "--resume", "--out", trained, "--steps", 9, *more)
    finally:
        if argv == "renamed": (root / "set" / "a" / "new.png").rename(root / "set" / "a" / "0.png")
        (root / "set" / "a" / "new.png").unlink(missing_ok=True)
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_a_resumed_run_keeps_what_it_was_told(root, tmp_path):
    """Precision, device and all else that is not given again; what is given again counts."""
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 1, "--seed", 5, "--no-augment", "--save-every", 3,
                     "--no-fused"))
    dcgan.main(["--resume", "--out", str(tmp_path), "--steps", "2", "--d-lr", "0.5"])
    config = json.loads((tmp_path / "config.json").read_text())
    kept = [config[name] for name in ("seed", "augment", "save_every", "no_fused", "batch_size", "device",
                                      "precision", "d_lr")]
    assert kept == [5, False, 3, True, 8, "cpu", "fp32", 0.5] and config["used"]["precision"] == "fp32"


# Stopped

def start(script, arguments):
    """The script in a process of its own."""
    return subprocess.Popen([sys.executable, script.__file__, *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def live(name, arguments, printed):
    """What a forked process does: the script's main on one thread, what it prints into a file."""
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stdout.fileno())
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    __import__(name).main(arguments)


def fork(script, arguments, printed):
    """The same as `start` does, in a process that need not import torch first."""
    process = FORKS.Process(target=live, args=(script.__name__, arguments, str(printed)))
    process.start()
    return process


def wait_for_save(running, checkpoint):
    """Until a process has written its first checkpoint of this life, or is not running any more."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while running() and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
        time.sleep(0.01)


@pytest.mark.parametrize("script, number", [*zip(SCRIPTS, 2 * [signal.SIGINT, signal.SIGTERM])],
                         ids=lambda value: getattr(value, "SCRIPT", None))
def test_a_signal_saves_and_says_how_to_go_on(script, number, root, tmp_path):
    out = tmp_path / "run"
    process = start(script, flags(script, root, out, "--steps", 100000, "--save-every", 0))
    wait_for_save(lambda: process.poll() is None, out / "checkpoint.pt")
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"python {script.SCRIPT}.py --resume --out {out}" in text and "Traceback" not in text
    step = load(out / "checkpoint.pt")["step"]
    assert step >= 10 and rows_of(out)[-1]["step"] == step
    script.main(["--resume", "--out", str(out), "--steps", str(step + 7)])  # in a later epoch
    script.main(flags(script, root, tmp_path / "whole", "--steps", step + 7))
    (out / "samples" / f"epoch_{math.ceil(step / 5):04d}.png").unlink()  # of the moment it was stopped
    for path in (tmp_path / "whole" / "samples").glob("*"):
        (out / "samples" / path.name).exists() or path.unlink()
    same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_in_its_first_steps_is_saved_and_goes_on(script, number, root, tmp_path, monkeypatch,
                                                               capsys):
    kept = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stand_in(patch, script, act=lambda step: step == 2 and signal.raise_signal(number))
        with pytest.raises(SystemExit) as end:
            script.main(flags(script, root, tmp_path, "--epochs", 2))
    assert end.value.code == 128 + number and "--resume" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pt")["step"] == 2
    assert signal.getsignal(number) == kept  # a notebook goes on
    script.main(["--resume", "--out", str(tmp_path), "--steps", "4"])
    assert load(tmp_path / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("name, steps", [("dcgan", 150), ("cspup128", 60), ("cgan_residual", 150),
                                         ("fashion-style", 150)])
def test_twelve_kills_change_nothing(name, steps, root, tmp_path):
    """SIGKILL at six moments of a life from its start on, at six soon after it has saved; then the end."""
    script, argv = KINDS[name]
    rng, more = random.Random(0), [*argv.split(), "--steps", steps]
    out, printed, lives = tmp_path / "killed", tmp_path / "printed.txt", []
    arguments = flags(script, root, out, *more, "--save-every", 0, "--resume")
    for kill in range(12):
        life = fork(script, arguments, printed)
        if kill % 2: wait_for_save(life.is_alive, out / "checkpoint.pt")
        time.sleep(rng.uniform(0, 0.1 if kill % 2 else 0.4))
        life.kill()
        life.join()
        lives.append(load(out / "checkpoint.pt")["step"] if (out / "checkpoint.pt").exists() else -1)
    assert lives == sorted(lives) and len(set(lives)) > 3, lives
    life = fork(script, arguments, printed)
    life.join()
    assert life.exitcode == 0, printed.read_text()[-500:]
    script.main(flags(script, root, tmp_path / "whole", *more))
    for path in out.rglob(".part-*"): path.unlink()  # what the kills cut short
    same_run(tmp_path / "whole", out)


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
def test_a_loss_that_is_not_finite_stops_the_run_after_what_is_finite_was_saved(value, root, tmp_path,
                                                                                monkeypatch, fails):
    with monkeypatch.context() as patch:
        stand_in(patch, dcgan, lambda step: value if step >= 15 else 1.0)
        line = fails(dcgan, *flags(dcgan, root, tmp_path, "--steps", 40, "--save-every", 0))
    assert "no finite loss at step 20" in line and "--lr" in line and "--precision fp32" in line
    assert load(tmp_path / "checkpoint.pt")["step"] == 10
    dcgan.main(["--resume", "--out", str(tmp_path), "--steps", "20", "--lr", "1e-5"])
    assert load(tmp_path / "checkpoint.pt")["step"] == 20


# Devices

def test_the_best_device_and_precision_are_taken_and_a_gpu_that_cannot_is_named(script, monkeypatch, fails):
    args = script.parse([])[0]
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        device, precision = script.pick_device(args)
        assert device.type == "cpu" and precision in ("fp32", "bf16")
        assert script.pick_device(script.parse(["--precision", "fp16"])[0])[1] == "fp16"
    ones = torch.ones

    def no_kernel(*size, device, **options):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, result in (("Stream", None), ("set_stream", None), ("get_device_capability", (6, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *given, result=result: result)
    monkeypatch.setattr(torch, "ones", no_kernel)
    for flag in [], ["--device", "cuda"]:
        line = fails(script, *flag, "--steps", "1")
        assert "no kernel image" in line and "--device cpu" in line
    assert ones is not torch.ones


# What goes wrong outside

def test_what_a_library_raises_is_one_line_and_its_traceback_is_there_for_the_asking(root, tmp_path,
                                                                                     monkeypatch, fails):
    def broken(step):
        raise ValueError("first line\nsecond line")
    stand_in(monkeypatch, dcgan, act=broken)
    line = fails(dcgan, *flags(dcgan, root, tmp_path))
    assert "ValueError: first line" in line and "GAN_DEBUG=1" in line
    monkeypatch.setenv("GAN_DEBUG", "1")
    with pytest.raises(ValueError, match="second line"):
        dcgan.main(flags(dcgan, root, tmp_path))


@pytest.mark.parametrize("limit, what", [(3000, "packing"), (30_000, "saving")])
def test_a_full_disk_ends_in_one_line_and_what_was_saved_stays(limit, what, root, tmp_path):
    out = tmp_path / "run"
    argv = flags(dcgan, root, out, "--steps", 20, "--save-every", 0)
    if what == "packing": argv += ["--root", str(tmp_path / "root")]
    if what == "saving": dcgan.main(flags(dcgan, root, out, "--steps", 10))
    before = (out / "checkpoint.pt").read_bytes() if what == "saving" else b""
    limited = subprocess.run([sys.executable, dcgan.__file__, *argv, "--resume"], capture_output=True,
                             text=True, check=False,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert limited.returncode == 2 and "File too large" in error_line(limited.stderr)
    if what == "saving":
        assert (out / "checkpoint.pt").read_bytes() == before
    dcgan.main([*argv, "--resume"])
    assert load(out / "checkpoint.pt")["step"] == 20
