"""The run folder: what is in it, and that nothing is lost when a run is stopped, killed or started twice."""
import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import cgan_residual
import cspup128
import dcgan

TINY = {cspup128: ["--width", "2", "--batch-size", "8", "--precision", "fp32"]}
TINY[dcgan] = [*TINY[cspup128], "--size", "32"]
TINY[cgan_residual] = [*TINY[cspup128], "--augment", "auto", "--no-report"]
SETS = {cspup128: "faces", dcgan: "faces", cgan_residual: "digits"}
MORE = {cspup128: set(), dcgan: set(), cgan_residual: {"one_noise.png"}}  # in its run folder, besides what all have
HELD_OUT = {cspup128: 0, dcgan: 2, cgan_residual: 0}  # of 40 pictures
LIFE = {cspup128: 2, dcgan: 1, cgan_residual: 1}  # seconds after which a run is stopped, or within which it is killed
FORKS = multiprocessing.get_context("forkserver")  # whose processes begin with these imported
FORKS.set_forkserver_preload(["torch", "torchvision", "tqdm.auto", "pytest"])


@pytest.fixture(scope="module", params=[cspup128, dcgan, cgan_residual], ids=lambda script: script.SCRIPT)
def script(request):
    """Each script in turn."""
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A --root in which 40 pictures stand as a folder, and 40 digits as a folder of four classes."""
    root = tmp_path_factory.mktemp("root")
    (root / "faces").mkdir()
    for i in range(40):
        cspup128.draw_picture(i).resize((160, 160)).save(root / "faces" / f"{i}.png")
        number = 10 * (i // 4) + i % 4
        (root / "digits" / f"{i % 4}").mkdir(parents=True, exist_ok=True)
        cgan_residual.draw_picture(number).save(root / "digits" / f"{i % 4}" / f"{number}.png")
    return root


def flags(script, root, out, *more):
    return [*TINY[script], "--data", str(root / SETS[script]), "--root", str(root), "--out", str(out), *more]


def same_run(a, b):
    """Assert that two run folders hold the same weights, bit for bit, and the same metrics but for the seconds."""
    first, second = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    assert first["step"] == second["step"]
    for name in ("G", "D", "ema"):
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    for name in ("opt_g", "opt_d"):
        for number, state in first[name]["state"].items():
            assert all(torch.equal(value, second[name]["state"][number][key]) for key, value in state.items())
    rows = [[row[:2] + row[3:] for row in csv.reader((out / "metrics.csv").open())] for out in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) > 1
    made = [sorted(str(path.relative_to(out)) for path in out.rglob("*.[pg][ni][gf]")) for out in (a, b)]
    assert made[0] == made[1] != []
    for name in made[0]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def linked(out, links):
    """A second name below `links` for every file of a run folder: {name: (that one, what is in it)}."""
    found = {}
    for path in (path for path in out.rglob("*") if path.is_file()):
        link = links / path.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(path)
        found[path.relative_to(out)] = link, path.read_bytes()
    return found


def test_a_run_leaves_the_whole_folder(script, root, tmp_path):
    script.main(flags(script, root, tmp_path / "run", "--epochs", "3"))
    out = tmp_path / "run"
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    samples = {f"samples/epoch_{i:04d}.png" for i in (1, 2, 3)}
    pictures = {*(f"{curve}.png" for curve in script.CURVES), "comparison.png", "evolution.gif"}
    pictures |= MORE[script]
    assert names == {"config.json", "metrics.csv", "checkpoint.pt", "models.pth"} | samples | pictures
    for picture in samples | pictures:
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5
    assert Image.open(out / "evolution.gif").n_frames == 3
    config = json.loads((out / "config.json").read_text())
    assert config["width"] == 2 and config["augment"] == "on" and config["used"]["pictures"] == 40
    assert config["used"]["held_out"] == HELD_OUT[script] and config["flip"] in (True, False)
    assert config["used"]["device"] in ("cpu", "cuda:0", "mps") and "gan_ops" in config["used"]
    head, *rows = csv.reader((out / "metrics.csv").open())
    epoch, last = ("3", 12) if script is dcgan else ("2", 15)  # of 38 pictures and of 40
    more = ["d_fake_after", "d_seen", "d_held_out"] if script is dcgan else []
    assert head == "step,epoch,seconds,images,loss_d,loss_g,d_real,d_fake".split(",") + more
    assert [row[:2] + row[3:4] for row in rows] == [["10", epoch, "80"], [str(last), "3", str(8 * last)]]
    assert all(0 < float(value) < 1 for row in rows for value in row[6:])


def test_steps_or_epochs_end_the_run_whichever_comes_first(root, tmp_path):
    for name, more, step in (("a", ["--steps", "4", "--epochs", "9"], 4), ("b", ["--steps", "9", "--epochs", "1"], 5)):
        cspup128.main(flags(cspup128, root, tmp_path / name, *more))
        assert torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"] == step


def test_the_same_seed_gives_the_same_files_and_another_seed_others(script, root, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        script.main(flags(script, root, tmp_path / name, "--steps", "3", "--seed", seed))
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "c")


def test_a_longer_run_goes_on_from_a_shorter_one_bit_for_bit(script, root, tmp_path):
    script.main(flags(script, root, tmp_path / "whole", "--steps", "23", "--d-every", "2"))
    script.main(flags(script, root, tmp_path / "parts", "--steps", "7", "--d-every", "2"))
    for steps in ("8", "16"):
        script.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", steps])
    before = linked(tmp_path / "parts", tmp_path / "links")
    script.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", "23"])
    same_run(tmp_path / "whole", tmp_path / "parts")
    for name, (link, content) in before.items():  # each file is whole before it takes the place of the earlier one
        assert link.read_bytes() == content, name
        assert name.parts[0] == "samples" or not link.samefile(tmp_path / "parts" / name), name


def test_resuming_where_there_is_nothing_yet_starts(root, tmp_path, capsys):
    cspup128.main(flags(cspup128, root, tmp_path / "run", "--steps", "2", "--resume"))
    assert "starting from the beginning" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_second_run_moves_the_first_aside(root, tmp_path, capsys):
    for steps in ("1", "2", "3"):
        cspup128.main(flags(cspup128, root, tmp_path / "run", "--steps", steps))
    steps = {p.name: torch.load(p / "checkpoint.pt", weights_only=True)["step"] for p in tmp_path.iterdir()}
    assert steps == {"run.1": 1, "run.2": 2, "run": 3}
    assert "run.2" in capsys.readouterr().out


def start(script, arguments):
    """The script in a process of its own, on one thread: the bits of a sum depend on how many threads share it."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, script.__file__, *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def live(name, arguments, printed):
    """What a forked process does: the script's main on one thread, what it prints into a file."""
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stdout.fileno())
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    sys.modules[name].main(arguments)


def fork(script, arguments, printed):
    """The same as `start` does, in a process that need not import torch first."""
    process = FORKS.Process(target=live, args=(script.__name__, arguments, printed))
    process.start()
    return process


def wait_for_save(running, checkpoint):
    """Until a process has written its first checkpoint of this life, or is not running any more."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while running() and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(script, root, tmp_path, number):
    out = tmp_path / "run"
    process = start(script, flags(script, root, out, "--steps", "100000", "--save-every", "60"))
    wait_for_save(lambda: process.poll() is None, out / "checkpoint.pt")  # the one of step 0
    time.sleep(LIFE[script])
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"python {script.SCRIPT}.py --resume --out {out}" in text and "Traceback" not in text
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step > 0 and (out / "models.pth").exists()
    for arguments in (["--resume", "--out", str(out)], flags(script, root, tmp_path / "whole")):
        process = fork(script, [*arguments, "--steps", str(step + 2)], tmp_path / "printed.txt")
        process.join()
        assert process.exitcode == 0, (tmp_path / "printed.txt").read_text()[-500:]
    same_run(out, tmp_path / "whole")


def test_twenty_kills_change_nothing(script, root, tmp_path):
    """SIGKILL at ten moments of a life from its start on, and at ten soon after it has saved; then the end."""
    rng, steps = random.Random(0), "400"
    process = start(script, flags(script, root, tmp_path / "whole", "--steps", steps, "--save-every", "60"))
    out, printed, lives = tmp_path / "killed", tmp_path / "printed.txt", []
    arguments = flags(script, root, out, "--steps", steps, "--save-every", "0", "--resume")
    for kill in range(20):
        life = fork(script, arguments, printed)
        if kill % 2:
            wait_for_save(life.is_alive, out / "checkpoint.pt")
        time.sleep(rng.uniform(0, 0.5) if kill % 2 else rng.uniform(0, LIFE[script]))
        life.kill()
        life.join()
        saved = (out / "checkpoint.pt").exists()
        lives.append(torch.load(out / "checkpoint.pt", weights_only=True)["step"] if saved else -1)
    assert lives == sorted(lives) and len(set(lives)) > 5, lives
    (out / "samples" / ".part-1-epoch_0001.png").write_bytes(b"cut short")  # as a kill may leave it; seen once
    life = fork(script, arguments, printed)
    life.join()
    assert life.exitcode == 0, printed.read_text()[-500:]
    text, _ = process.communicate()
    assert process.returncode == 0, text[-500:]
    same_run(tmp_path / "whole", out)
    assert not [p for p in out.rglob(".part-*")]
