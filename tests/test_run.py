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
import fashion_keras_port

TINY = {cspup128: ["--width", "2", "--batch-size", "8", "--precision", "fp32"]}
TINY[dcgan] = [*TINY[cspup128], "--size", "32"]
TINY[cgan_residual] = [*TINY[cspup128], "--augment", "auto", "--no-report"]
TINY[fashion_keras_port] = TINY[cgan_residual]
SETS = {cspup128: "faces", dcgan: "faces", cgan_residual: "digits", fashion_keras_port: "clothes"}
MORE = {cgan_residual: {"one_noise.png"}}  # in its run folder, besides what all have
HELD_OUT = {dcgan: 2}  # of 40 pictures
LIFE = {cspup128: 2}  # seconds after which a run is stopped, or within which it is killed; 1 where not said
STEPS = {fashion_keras_port: 1000}  # of the run that is killed twenty times; 400 where not said
CONVOLUTIONS = ["--arch", "dcgan", "--conditional", "--loss", "wgan-gp"]
FORKS = multiprocessing.get_context("forkserver")  # whose processes begin with these imported
FORKS.set_forkserver_preload(["torch", "torchvision", "tqdm.auto", "pytest"])


@pytest.fixture(scope="module", params=TINY, ids=lambda script: script.SCRIPT)
def script(request):
    """Each script in turn."""
    return request.param


@pytest.fixture(scope="module", params=[*((script, []) for script in TINY), (fashion_keras_port, CONVOLUTIONS)],
                ids=lambda kind: kind[0].SCRIPT + "-dcgan" * bool(kind[1]))
def kind(request):
    """Each script in turn with the flags that choose its networks: fashion_keras_port.py has two kinds of them."""
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A --root with folders of 40 pictures, of 40 digits in four classes, and of 40 clothes in four classes."""
    root = tmp_path_factory.mktemp("root")
    (root / "faces").mkdir()
    for i in range(40):
        cspup128.draw_picture(i).resize((160, 160)).save(root / "faces" / f"{i}.png")
        number = 10 * (i // 4) + i % 4
        drawn = dict(digits=cgan_residual.draw_picture(number), clothes=fashion_keras_port.draw_picture(i))
        for name, image in drawn.items():
            (root / name / f"{i % 4}").mkdir(parents=True, exist_ok=True)
            image.save(root / name / f"{i % 4}" / f"{i}.png")
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
    pictures |= MORE.get(script, set())
    assert names == {"config.json", "metrics.csv", "checkpoint.pt", "models.pth"} | samples | pictures
    for picture in samples | pictures:
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5
    assert Image.open(out / "evolution.gif").n_frames == 3
    config = json.loads((out / "config.json").read_text())
    assert config["width"] == 2 and config["augment"] == "on" and config["used"]["pictures"] == 40
    assert config["used"]["held_out"] == HELD_OUT.get(script, 0) and config["flip"] in (True, False)
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


def test_a_longer_run_goes_on_from_a_shorter_one_bit_for_bit(kind, root, tmp_path):
    script, networks = kind
    for name, steps in ("whole", "23"), ("parts", "7"):
        script.main(flags(script, root, tmp_path / name, "--steps", steps, "--d-every", "2", *networks))
    for steps in ("8", "16"):
        script.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", steps])
    before = linked(tmp_path / "parts", tmp_path / "links")
    script.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", "23"])
    same_run(tmp_path / "whole", tmp_path / "parts")
    for name, (link, content) in before.items():  # each file is whole before it takes the place of the earlier one
        assert link.read_bytes() == content, name
        assert name.parts[0] == "samples" or not link.samefile(tmp_path / "parts" / name), name


def test_without_an_average_the_generator_itself_is_kept(script, root, tmp_path, monkeypatch):
    """With --ema 0, resumed too, the two have their tensors in common; any other --ema gives the average its own."""
    built, build = [], script.build
    monkeypatch.setattr(script, "build", lambda *given: built.append(build(*given)) or built[-1])
    script.main(flags(script, root, tmp_path / "run", "--steps", "2", "--ema", "0"))
    script.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "4"])
    script.main(flags(script, root, tmp_path / "averaged", "--steps", "2", "--ema", "0.9"))
    for nets, shared in zip(built, (True, True, False), strict=True):
        places = [{name: t.data_ptr() for name, t in net.state_dict().items()} for net in (nets.G, nets.ema)]
        assert (places[0] == places[1]) == shared and places[0].keys() == places[1].keys()
        assert not any(p.requires_grad for p in nets.ema.parameters()) and not nets.ema.training
    models, saved = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("models.pth", "checkpoint.pt"))
    assert saved["step"] == 4
    for name, value in built[1].G.state_dict().items():
        assert torch.equal(models["Generator"][name], value) and torch.equal(saved["G"][name], value)
    assert any(not torch.equal(value, built[0].G.state_dict()[name]) for name, value in models["Generator"].items())


def test_a_run_that_is_stopped_in_its_first_epoch_is_saved(script, root, tmp_path, monkeypatch, capsys):
    draws = script.draws

    def stopped(args, step, *more):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return draws(args, step, *more)
    monkeypatch.setattr(script, "draws", stopped)
    with pytest.raises(SystemExit) as end:
        script.main(flags(script, root, tmp_path / "run", "--epochs", "2"))
    assert end.value.code == 128 + signal.SIGTERM and "--resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "run" / "losses.png").exists() and not (tmp_path / "run" / "evolution.gif").exists()


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
    time.sleep(LIFE.get(script, 1))
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


def test_twenty_kills_change_nothing(kind, root, tmp_path):
    """SIGKILL at ten moments of a life from its start on, and at ten soon after it has saved; then the end."""
    script, networks = kind
    rng, more = random.Random(0), ["--steps", str(400 if networks else STEPS.get(script, 400)), *networks]
    process = start(script, flags(script, root, tmp_path / "whole", *more, "--save-every", "60"))
    out, printed, lives = tmp_path / "killed", tmp_path / "printed.txt", []
    arguments = flags(script, root, out, *more, "--save-every", "0", "--resume")
    for kill in range(20):
        life = fork(script, arguments, printed)
        if kill % 2:
            wait_for_save(life.is_alive, out / "checkpoint.pt")
        time.sleep(rng.uniform(0, 0.5) if kill % 2 else rng.uniform(0, LIFE.get(script, 1)))
        life.kill()
        life.join()
        saved = (out / "checkpoint.pt").exists()
        lives.append(torch.load(out / "checkpoint.pt", weights_only=True)["step"] if saved else -1)
    assert lives == sorted(lives) and len(set(lives)) > 5, lives
    (out / "samples" / ".part-1-epoch_0001.png").write_bytes(b"cut short")  # as a kill may leave it; seen once
    life = fork(script, [*arguments, "--save-every", "60"], printed)
    life.join()
    assert life.exitcode == 0, printed.read_text()[-500:]
    text, _ = process.communicate()
    assert process.returncode == 0, text[-500:]
    same_run(tmp_path / "whole", out)
    assert not [p for p in out.rglob(".part-*")]
