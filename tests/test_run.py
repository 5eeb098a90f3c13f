"""The run folder: what is in it, and that nothing is lost when a run is stopped, killed or started twice."""
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cspup128

SCRIPT = Path(cspup128.__file__)
TINY = ["--width", "2", "--batch-size", "8", "--precision", "fp32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A --root in which 40 pictures stand as a folder."""
    root = tmp_path_factory.mktemp("root")
    (root / "faces").mkdir()
    for i in range(40):
        cspup128.draw_picture(i).resize((160, 160)).save(root / "faces" / f"{i}.png")
    return root


def flags(root, out, *more):
    return [*TINY, "--data", str(root / "faces"), "--root", str(root), "--out", str(out), *more]


def same_run(a, b):
    """Assert that two run folders hold the same weights, bit for bit, and the same metrics but for the seconds."""
    first, second = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    assert first["step"] == second["step"]
    for name in cspup128.STATE[:3]:
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    for name in ("opt_g", "opt_d"):
        for number, state in first[name]["state"].items():
            assert all(torch.equal(value, second[name]["state"][number][key]) for key, value in state.items())
    rows = [[row[:2] + row[3:] for row in csv.reader((out / "metrics.csv").open())] for out in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) > 1
    for file in sorted((a / "samples").iterdir()):
        assert file.read_bytes() == (b / "samples" / file.name).read_bytes()


def test_a_run_leaves_the_whole_folder(root, tmp_path, capsys):
    cspup128.main(flags(root, tmp_path / "run", "--epochs", "3"))
    out = tmp_path / "run"
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    samples = {f"samples/epoch_{i:04d}.png" for i in (1, 2, 3)}
    pictures = {"losses.png", "scores.png", "comparison.png", "evolution.gif"}
    assert names == {"config.json", "metrics.csv", "checkpoint.pt", "models.pth"} | samples | pictures
    for picture in samples | pictures:
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5
    assert Image.open(out / "evolution.gif").n_frames == 3
    config = json.loads((out / "config.json").read_text())
    assert config["width"] == 2 and config["augment"] == "on" and config["used"]["pictures"] == 40
    assert config["used"]["device"] in ("cpu", "cuda:0", "mps") and "gan_ops" in config["used"]
    head, *rows = csv.reader((out / "metrics.csv").open())
    assert head == "step,epoch,seconds,images,loss_d,loss_g,d_real,d_fake".split(",")
    assert [row[:2] + row[3:4] for row in rows] == [["10", "2", "80"], ["15", "3", "120"]]
    assert all(0 < float(row[6]) < 1 and 0 < float(row[7]) < 1 for row in rows)


def test_steps_or_epochs_end_the_run_whichever_comes_first(root, tmp_path):
    for name, more, step in (("a", ["--steps", "4", "--epochs", "9"], 4), ("b", ["--steps", "9", "--epochs", "1"], 5)):
        cspup128.main(flags(root, tmp_path / name, *more))
        assert torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"] == step


def test_the_same_seed_gives_the_same_files_and_another_seed_others(root, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        cspup128.main(flags(root, tmp_path / name, "--steps", "3", "--seed", seed))
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "c")


def test_a_longer_run_goes_on_from_a_shorter_one_bit_for_bit(root, tmp_path):
    cspup128.main(flags(root, tmp_path / "whole", "--steps", "23", "--d-every", "2"))
    cspup128.main(flags(root, tmp_path / "parts", "--steps", "7", "--d-every", "2"))
    for steps in ("8", "16", "23"):
        cspup128.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", steps])
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_where_there_is_nothing_yet_starts(root, tmp_path, capsys):
    cspup128.main(flags(root, tmp_path / "run", "--steps", "2", "--resume"))
    assert "starting from the beginning" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_second_run_moves_the_first_aside(root, tmp_path, capsys):
    for steps in ("1", "2", "3"):
        cspup128.main(flags(root, tmp_path / "run", "--steps", steps))
    steps = {p.name: torch.load(p / "checkpoint.pt", weights_only=True)["step"] for p in tmp_path.iterdir()}
    assert steps == {"run.1": 1, "run.2": 2, "run": 3}
    assert "run.2" in capsys.readouterr().out


def start(arguments):
    """The script in a process of its own, on one thread: the bits of a sum depend on how many threads share it."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_save(process, checkpoint):
    """Until the process has written its first checkpoint of this life, or has ended."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(root, tmp_path, number):
    out = tmp_path / "run"
    process = start(flags(root, out, "--steps", "100000", "--save-every", "60"))
    wait_for_save(process, out / "checkpoint.pt")  # the one of step 0
    time.sleep(2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"--resume --out {out}" in text and "Traceback" not in text
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step > 0 and (out / "models.pth").exists()
    for arguments in (["--resume", "--out", str(out)], flags(root, tmp_path / "whole")):
        process = start([*arguments, "--steps", str(step + 2)])
        assert process.communicate() and process.returncode == 0
    same_run(out, tmp_path / "whole")


def test_twenty_kills_change_nothing(root, tmp_path):
    """SIGKILL at ten moments of a life from its start on, and at ten soon after it has saved; then the end."""
    rng, steps = random.Random(0), "400"
    process = start(flags(root, tmp_path / "whole", "--steps", steps, "--save-every", "60"))
    out, lives = tmp_path / "killed", []
    for kill in range(20):
        life = start(flags(root, out, "--steps", steps, "--save-every", "0", "--resume"))
        if kill % 2:
            wait_for_save(life, out / "checkpoint.pt")
        time.sleep(rng.uniform(0, 0.5) if kill % 2 else rng.uniform(0, 6))
        life.kill()
        life.communicate()
        saved = (out / "checkpoint.pt").exists()
        lives.append(torch.load(out / "checkpoint.pt", weights_only=True)["step"] if saved else -1)
    assert lives == sorted(lives) and len(set(lives)) > 5, lives
    (out / "samples" / ".part-1-epoch_0001.png").write_bytes(b"cut short")  # as a kill may leave it; seen once
    life = start(flags(root, out, "--steps", steps, "--resume"))
    for run in (life, process):
        text, _ = run.communicate()
        assert run.returncode == 0, text[-500:]
    same_run(tmp_path / "whole", out)
    assert not [p for p in out.rglob(".part-*")]
