"""What a checkpoint is good for: pictures, models.pth elsewhere, ONNX, loggers and metrics."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_fidelity import feature_extractor_inceptionv3 as inception

import cspup128

SCRIPT = Path(__file__).parents[1] / "cspup128.py"
TINY = "--width", "4", "--batch-size", "8", "--precision", "fp32", "--device", "cpu"
FILES = "checkpoint.pt", "models.pth"
FIELDS = "loss_d", "loss_g", "d_real", "d_fake"


def run(*argv):
    """Run the command line in this process."""
    cspup128.main(list(map(str, argv)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder after three steps on twelve pictures, from weights so large that generated pictures differ."""
    folder, normal = tmp_path_factory.mktemp("uses"), torch.nn.init.normal_
    (folder / "set").mkdir()
    for i in range(12):
        cspup128.draw_picture(i).save(folder / "set" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", lambda weight, mean, std: normal(weight, mean, 10 * std))
        run("--data", folder / "set", "--root", folder / "root", "--out", folder / "run", "--steps", 3, *TINY)
    return folder / "run"


def generated(checkpoint, path, count, *flags):
    """The pictures of --generate in a .npz, uint8 N,H,W,C."""
    run("--generate", count, "--checkpoint", checkpoint, "--save", path, "--device", "cpu", *flags)
    with np.load(path) as archive:
        assert archive.files == ["images"]
        return archive["images"]


def averaged(trained):
    """The averaged generator of models.pth, made without the script's own loading."""
    saved = torch.load(trained / "models.pth", weights_only=True)
    generator = cspup128.Generator(saved["config"]["width"])
    generator.load_state_dict(saved["Generator"], strict=True)
    return generator.eval().requires_grad_(False)


# --generate

@pytest.mark.parametrize("count", [1, 10, 64, 70, 130])
def test_npz_has_exactly_as_many_pictures(count, trained, tmp_path, capsys):
    images = generated(trained / "models.pth", tmp_path / "g.npz", count)
    assert images.shape == (count, 128, 128, 3) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(count, -1), axis=0)) == count
    assert f"{count} pictures: {tmp_path / 'g.npz'}" in capsys.readouterr().out


def test_pictures_are_the_averaged_generators(trained, tmp_path):
    images = generated(trained / "models.pth", tmp_path / "g.npz", 6).astype(float)
    z = torch.randn(64, cspup128.Z, generator=torch.Generator().manual_seed(0))[:6]
    expected = (averaged(trained)(z).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(images - expected).max() <= 1.01
    assert expected.std() > 0.1


def test_checkpoint_and_models_give_identical_pictures(trained, tmp_path):
    first, second = (generated(trained / name, tmp_path / f"{name}.npz", 9) for name in FILES)
    assert np.array_equal(first, second)


def test_pictures_follow_from_the_seed(trained, tmp_path):
    images = {}
    for name, seed in ("a", 5), ("b", 5), ("c", 6):
        images[name] = generated(trained / "models.pth", tmp_path / f"{name}.npz", 9, "--seed", seed)
    assert np.array_equal(images["a"], images["b"])
    assert not np.array_equal(images["a"], images["c"])


def test_flags_that_agree_with_the_checkpoint_may_be_given(trained, tmp_path):
    flags = "--width", 4, "--scheme", "stable", "--batch-size", 8
    images = [generated(trained / "models.pth", tmp_path / "g.npz", 3, *more) for more in ((), flags)]
    assert np.array_equal(*images)


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (4, 2, 2), (10, 4, 3), (70, 9, 8)])
def test_png_is_a_grid_of_the_same_pictures(count, columns, rows, trained, tmp_path):
    images = generated(trained / "models.pth", tmp_path / "g.npz", count)
    run("--generate", count, "--checkpoint", trained / "models.pth", "--save", tmp_path / "new" / "g.png")
    grid = np.asarray(Image.open(tmp_path / "new" / "g.png"))
    gap = 2 if count > 1 else 0
    assert grid.shape == (rows * (128 + gap) + gap, columns * (128 + gap) + gap, 3)
    for i in 0, count - 1:
        top, left = (gap + k * (128 + gap) for k in divmod(i, columns))
        assert np.array_equal(grid[top : top + 128, left : left + 128], images[i])


def test_folder_holds_each_picture(trained, tmp_path):
    images = generated(trained / "models.pth", tmp_path / "g.npz", 66)
    run("--generate", 66, "--checkpoint", trained / "models.pth", "--save", tmp_path / "some" / "pictures")
    files = sorted((tmp_path / "some" / "pictures").iterdir())
    assert len(files) == 66 and all(file.suffix == ".png" for file in files)
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(files, images))


def test_generating_leaves_the_run_folder_alone(trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    generated(trained / "checkpoint.pt", tmp_path / "g.npz", 2)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["g.npz"]


# models.pth

def test_models_holds_what_others_need_and_no_more(trained):
    saved = torch.load(trained / "models.pth", weights_only=True)
    assert set(saved) == {"Generator", "Discriminator", "config"}
    assert saved["config"]["script"] == "cspup128" and saved["config"]["width"] == 4
    names = [name for net in ("Generator", "Discriminator") for name in saved[net]]
    assert names and not [name for name in names if name.startswith(("module.", "_orig_mod."))]
    assert all(value.device.type == "cpu" for net in ("Generator", "Discriminator") for value in saved[net].values())


def test_models_loads_strictly_into_the_networks(trained):
    saved = torch.load(trained / "models.pth", weights_only=True)
    discriminator = cspup128.Discriminator(4)
    discriminator.load_state_dict(saved["Discriminator"], strict=True)
    images = averaged(trained)(torch.randn(2, cspup128.Z))
    assert images.shape == (2, 3, 128, 128) and images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


def test_models_are_those_of_the_checkpoint(trained):
    state, models = (torch.load(trained / name, weights_only=True) for name in FILES)
    for kept, exported in ("ema", "Generator"), ("D", "Discriminator"):
        assert state[kept].keys() == models[exported].keys()
        assert all(torch.equal(state[kept][name], models[exported][name]) for name in models[exported])
    assert any(not torch.equal(state["G"][name], models["Generator"][name]) for name in models["Generator"])


# --export

@pytest.fixture(scope="module")
def exported(trained):
    """The .onnx file of --export."""
    path = trained.parent / "generator.onnx"
    run("--export", path, "--checkpoint", trained / "models.pth")
    return path


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_agrees_with_torch_for_any_batch(count, exported, trained):
    z = torch.randn(count, cspup128.Z, generator=torch.Generator().manual_seed(count))
    session = onnxruntime.InferenceSession(exported)
    assert [node.name for node in (*session.get_inputs(), *session.get_outputs())] == ["z", "images"]
    (images,) = session.run(None, {"z": z.numpy()})
    expected = averaged(trained)(z).numpy()
    assert images.shape == (count, 3, 128, 128)
    assert np.abs(images - expected).max() < 1e-4 < expected.std()


def test_export_says_how_far_it_differs(trained, tmp_path, capsys):
    run("--export", tmp_path / "g.onnx", "--checkpoint", trained / "checkpoint.pt")
    found = re.search(r"differs from torch by (\S+) at most", capsys.readouterr().out)
    assert 0 <= float(found[1]) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_export_without_onnxruntime_says_so(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run("--export", tmp_path / "g.onnx", "--checkpoint", trained / "models.pth")
    out = capsys.readouterr().out
    assert "onnxruntime" in out and "differs" not in out
    assert (tmp_path / "g.onnx").stat().st_size > 10_000


# --logger

def log_with(logger, trained, tmp_path):
    """Train 12 steps with this logger in a process of its own; returns its folder inside the run folder."""
    out, home = tmp_path / "run", str(tmp_path / "home")
    flags = "--data", trained.parent / "set", "--root", trained.parent / "root", "--out", out, "--steps", 12, *TINY
    homes = dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), home)
    command = [sys.executable, SCRIPT, *flags, "--logger", logger]
    env = {**os.environ, "WANDB_MODE": "offline", **homes}
    subprocess.run(list(map(str, command)), check=True, env=env, cwd=tmp_path, capture_output=True, timeout=300)
    assert (out / "metrics.csv").exists() and (out / "models.pth").exists()
    return out / logger


def test_tensorboard_holds_what_metrics_csv_holds(trained, tmp_path):
    events = EventAccumulator(str(log_with("tensorboard", trained, tmp_path)))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(FIELDS) and events.Tags()["images"] == ["samples"]
    header, *rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    for name in FIELDS:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [int(row[0]) for row in rows] == [10, 12]
        assert [scalar.value for scalar in scalars] == pytest.approx(
            [float(row[header.index(name)]) for row in rows], rel=1e-4)


def test_wandb_writes_the_metrics(trained, tmp_path):
    (file,) = log_with("wandb", trained, tmp_path).glob("offline-run-*/*.wandb")
    assert all(name.encode() in file.read_bytes() for name in FIELDS)


@pytest.mark.parametrize("logger, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_logger_that_is_not_installed(logger, module, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        run("--data", trained.parent / "set", "--root", trained.parent / "root", "--out", tmp_path / "run",
            "--logger", logger, "--steps", 1, *TINY)
    assert stop.value.code == 2
    assert re.search(rf"^error: .*pip install {logger}$", capsys.readouterr().err, re.MULTILINE)


# --metrics

def measured(trained, capsys, *flags):
    """The numbers that --metrics prints, by name; the errors, where it prints some, are called "+-"."""
    capsys.readouterr()
    run("--metrics", "--checkpoint", trained / "models.pth", "--device", "cpu", *flags)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FID" in line]
    pairs = re.findall(r"(FID|KID|Inception score|\+-) ([^\s,]+)", line)
    return int(line.split()[0]), {name: float(value) for name, value in pairs}


def metrics_error(trained, capsys, *flags):
    """The one error line with which --metrics ends."""
    with pytest.raises(SystemExit) as stop:
        run("--metrics", "--checkpoint", trained / "models.pth", "--device", "cpu", *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [line for line in re.split(r"[\r\n]+", err) if "error: " in line]
    assert line.startswith("error: ") and err.strip().endswith(line)
    return line


def test_metrics_without_network(trained, tmp_path, capsys, monkeypatch):
    def no_network(*args, **options):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    line = metrics_error(trained, capsys)
    assert "name resolution" in line and "weights" in line


def test_metrics_without_torchmetrics(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    assert "pip install torchmetrics[image]" in metrics_error(trained, capsys)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A folder for TORCH_HOME with random weights where those of Inception are looked for."""
    home = tmp_path_factory.mktemp("home")
    weights = home / "hub" / "checkpoints" / inception.URL_INCEPTION_V3.rsplit("/", 1)[1]
    weights.parent.mkdir(parents=True)
    unloaded = type("Random", (inception.FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, state: 0})
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **options: {})
        network = unloaded("inception", ["2048"])
    for convolution in (module for module in network.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # features do not fade to nothing
    torch.save(network.state_dict(), weights)
    return home


@pytest.fixture
def with_inception(random_inception, monkeypatch):
    """Inception's weights in place, and no way to fetch others."""
    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)


def test_metrics_are_finite(with_inception, trained, capsys):
    count, values = measured(trained, capsys)
    assert count == 12 and {"FID", "KID", "Inception score"} <= set(values)
    assert all(map(math.isfinite, values.values())), values
    assert values["FID"] > 0 and 1 <= values["Inception score"] <= 1008


def test_metrics_of_a_single_picture_say_why_not(with_inception, trained, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    cspup128.draw_picture(0).save(tmp_path / "set" / "a.png")
    metrics_error(trained, capsys, "--data", tmp_path / "set", "--root", tmp_path / "root")
