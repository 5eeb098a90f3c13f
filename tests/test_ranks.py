"""Several processes, as torchrun starts them on several GPUs: here two on a CPU, by gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, flags, load
from test_run import rows_of

import cspup128
import dcgan

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WITHOUT_BATCH_NORM = """
import importlib, sys
from torch.nn import functional as F
script = importlib.import_module(sys.argv[1])
script.BatchNormLeakyReLU.forward = lambda self, x: F.leaky_relu(x, self.slope)
script.main(sys.argv[2:])
"""
NOT_FINITE_IN_ONE = """
import importlib, sys
script = importlib.import_module(sys.argv[1])
plain_step = script.train_step
def train_step(nets, args, *given):
    metrics = plain_step(nets, args, *given)
    if script.RANK == 1 and nets.step >= 13:
        metrics["loss_d"] = metrics["loss_d"] * float("nan")
    return metrics
script.train_step = train_step
script.main(sys.argv[2:])
"""


def start(*command):
    """A process that torchrun, or python, starts."""
    environment = {**os.environ, "PYTHONPATH": str(Path(dcgan.__file__).parent)}
    return subprocess.Popen(
        [*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def run(*command):
    """(status, standard output, standard error) of such a process that has to end within two minutes."""
    process = start(*command)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def process_of_rank(rank, parent):
    """The process of a rank below torchrun's; None before it is there."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if int(status[1]) == parent and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    return None


def run_until_saved(out, *argv):
    """torchrun with a script that trains on and on, once its checkpoint is there."""
    process = start(*TORCHRUN, dcgan.__file__, *argv, "--out", out, "--steps", 100_000, "--save-every", 0)
    ends_at = time.monotonic() + 60
    while process.poll() is None and not (out / "checkpoint.pt").exists():
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    "script, argv",
    [
        (cspup128, "--width 2"),  # with R1 and R2
        (cspup128, "--width 2 --scheme exact --d-every 2"),
        (dcgan, "--size 32 --width 2 --recipe classic --augment --flip"),
    ],
    ids=["cspup128", "cspup128-exact", "dcgan"],
)
def test_two_processes_of_four_images_are_one_of_eight(script, argv, root, tmp_path):
    """But for batch norm, which sees four."""
    (tmp_path / "plain.py").write_text(WITHOUT_BATCH_NORM)
    found = []
    for starter in [sys.executable], TORCHRUN:
        out = tmp_path / str(len(found))
        more = [*argv.split(), "--steps", 3, "--no-fused"]
        status, _, err = run(*starter, tmp_path / "plain.py", script.SCRIPT, *flags(script, root, out, *more))
        assert status == 0, err
        found.append(load(out / "checkpoint.pt"))
    assert not [path for path in tmp_path.rglob(".part-*")]
    for name in "G", "D", "ema":
        first, second = (torch.cat([value.flatten() for value in part[name].values()]) for part in found)
        # Adam's first steps have the size of the learning rate, also where a gradient is nearly 0
        assert ((first - second).abs() > 2e-5).double().mean() < 0.003, name
    assert found[0]["rows"][0]["loss_d"] == pytest.approx(found[1]["rows"][0]["loss_d"], abs=0.3)


def test_stopped_in_one_process_and_resumed_with_one_and_two(root, tmp_path):
    """A signal to the second one alone ends both at the same step, saved; images are counted right."""
    out = tmp_path / "run"
    process = run_until_saved(out, *flags(dcgan, root, out))
    os.kill(process_of_rank(1, process.pid), signal.SIGTERM)
    printed, err = process.communicate(timeout=60)
    step = load(out / "checkpoint.pt")["step"]
    assert f"stopped at step {step} and saved" in printed and step % dcgan.LOG_EVERY == 0, err
    assert printed.count("images 40") == 1
    for processes, more in ((1, 3), (2, 6), (1, 9)):
        starter = TORCHRUN if processes == 2 else [sys.executable]
        argv = "--resume", "--out", out, "--steps", step + more
        status, _, err = run(*starter, dcgan.__file__, *argv)
        assert status == 0, err
        assert load(out / "checkpoint.pt")["step"] == step + more
        row = rows_of(out)[-1]
        assert (row["step"], row["images"]) == (step + more, 8 * (step + more))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others(rank, root, tmp_path):
    out = tmp_path / "run"
    process = run_until_saved(out, *flags(dcgan, root, out))
    os.kill(process_of_rank(rank, process.pid), signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    step = load(out / "checkpoint.pt")["step"]
    dcgan.main(["--resume", "--out", str(out), "--steps", str(step + 1)])
    assert load(out / "checkpoint.pt")["step"] == step + 1


def test_a_loss_that_is_not_finite_in_one_process_ends_all(root, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "broken.py").write_text(NOT_FINITE_IN_ONE)
    status, _, err = run(*TORCHRUN, tmp_path / "broken.py", "dcgan", *flags(dcgan, root, out, "--steps", 60))
    assert status != 0 and err.count("error: no finite loss at step 20") == 1
    assert load(out / "checkpoint.pt")["step"] == 10
    assert np.isnan(rows_of(out)[-1]["loss_d"])


@pytest.mark.parametrize("more", [{}, {"WORLD_SIZE": "1"}])
def test_a_rank_that_something_else_has_set_is_none(more, root, tmp_path):
    """As some schedulers of clusters do for one process."""
    argv = flags(dcgan, root, tmp_path / "run", "--steps", 1)
    environment = {**os.environ, "RANK": "3", **more}
    done = subprocess.run([sys.executable, dcgan.__file__, *argv], env=environment, capture_output=True)
    assert done.returncode == 0 and load(tmp_path / "run" / "checkpoint.pt")["step"] == 1


def test_a_batch_that_cannot_be_shared(root, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(dcgan, "RANKS", 3)
    for name in "init_process_group", "barrier", "destroy_process_group":
        monkeypatch.setattr(torch.distributed, name, lambda: None)
    line = fails(dcgan, *flags(dcgan, root, tmp_path / "run"))
    assert "--batch-size 8" in line and "3 processes" in line and not (tmp_path / "run").exists()


def test_errors_of_two_processes_are_the_same_line(tmp_path):
    status, _, err = run(*TORCHRUN, dcgan.__file__, *TINY[dcgan], "--data", tmp_path / "nothing")
    assert status != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines and error_line(lines[0]) and len(set(lines)) == 1 and "is none of" in lines[0]
