"""The tools as their users speak to them, on runs of all four scripts."""

import argparse
import functools
import importlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from urllib.error import URLError

os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="cpu")  # which Keras reads as it is imported

import keras
import numpy as np
import onnxruntime
import pytest
import torch
from keras import layers as L
from PIL import Image
from safetensors import safe_open
from torch import nn

import classifier
import common
import cspup128
import evaluate
import explore
import export

TOP = Path(__file__).parents[1]
TINY = "--data synthetic --steps 2 --width 2 --batch-size 8 --precision fp32 --device cpu".split()
KINDS = {
    "dcgan": ["dcgan", "--size", "32"],
    "cspup128": ["cspup128"],
    "cgan_residual": ["cgan_residual"],
    "dense": ["fashion_keras_port"],
    "style": ["fashion_keras_port", "--arch", "style", "--conditional"],
}
COUNTS = {"dcgan": 60, "cspup128": 24, "cgan_residual": 200, "dense": 80, "style": 80}  # 20 a class
TOOLS = {
    "evaluate": (evaluate, []),
    "export": (export, ["--save", "x.onnx"]),
    "walk": (explore, []),
    "classes": (explore, []),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of two steps, {kind: path}, with weights so large that generated images differ."""
    folder, found = tmp_path_factory.mktemp("tools"), {}
    for kind, (name, *flags) in KINDS.items():
        script, out = importlib.import_module(name), folder / kind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "SYNTHETIC", script.SYNTHETIC[: COUNTS[kind]])
            script.main([*TINY, *flags, "--root", str(folder / "root"), "--out", str(out)])
        saved = torch.load(out / "models.pth", weights_only=True)
        args = argparse.Namespace(**saved["config"])
        generator = script.make_networks(args)[0].eval()
        generator.load_state_dict(saved["Generator"])
        for parameter in generator.parameters():
            parameter.data.mul_(5 if parameter.ndim > 1 else 1)
        generator.train()
        with torch.no_grad():
            for _ in range(40):
                generator(script.draw_z(args, 64))  # statistics that fit these weights
        torch.save(dict(saved, Generator=generator.state_dict()), out / "models.pth")
        found[kind] = out
    return found


@pytest.fixture
def few(monkeypatch):
    """As few drawn images as the runs had."""
    for kind, (name, *_) in KINDS.items():
        script = importlib.import_module(name)
        monkeypatch.setattr(script, "SYNTHETIC", script.SYNTHETIC[: COUNTS[kind]])


@pytest.fixture
def untrained(monkeypatch):
    """Classifiers that nobody trains."""

    def fresh(images, labels, classes, device):
        return classifier.make_classifier(images.shape[1], classes).eval()

    monkeypatch.setattr(classifier, "train_classifier", fresh)


def error(capsys, tool, *argv):
    """The one line with which a tool ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tool.main(list(map(str, argv)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def drawn(name, count, size):
    """Images of --data synthetic, uint8 N,C,size,size."""
    script = importlib.import_module(name)
    channels = 1 if size == 28 else 3
    images = [script.square(script.draw_image(i), size, channels) for i in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


# Images that are others by now


@pytest.fixture
def on_a_folder(tmp_path):
    """A folder of images and a run on it, {"data": path, "run": path}."""
    places = {name: tmp_path / name for name in ("data", "run", "root")}
    places["data"].mkdir()
    for i, image in enumerate(drawn("dcgan", 16, 32)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(places["data"] / f"{i}.bmp")
    flags = [
        flag for name, path in places.items() for flag in (f"--{'out' if name == 'run' else name}", path)
    ]
    importlib.import_module("dcgan").main([*TINY, "--size", "32", *map(str, flags)])
    return places


@pytest.mark.parametrize("change", ["none", "replaced", "gone", "new", "other data"])
def test_a_folder_that_has_changed_since_earns_a_warning(change, on_a_folder, tmp_path, capsys):
    """From evaluate.py, and from explore.py's run and table."""
    data, run = on_a_folder["data"], str(on_a_folder["run"])
    more = []
    if change == "replaced":
        stat = (data / "1.bmp").stat()
        shutil.copyfile(data / "2.bmp", data / "1.bmp")
        os.utime(data / "1.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "gone":
        (data / "1.bmp").unlink()
    elif change == "new":
        shutil.copy(data / "1.bmp", data / "99.bmp")
    elif change == "other data":
        more = ["--data", str(shutil.copytree(data, tmp_path / "other"))]
        (tmp_path / "other" / "1.bmp").unlink()
    calls = [lambda: evaluate.main([run, "--count", "5", *more])]
    if change != "other data":
        calls.append(lambda: explore.main(["run", run]))
        calls.append(lambda: explore.main(["table", run, "--save", str(tmp_path / "table.png")]))
    for call in calls:
        capsys.readouterr()
        call()
        expected = change in ("replaced", "gone", "new")
        assert (f"warning: {run} was trained on other images" in capsys.readouterr().out) == expected


def test_output_that_has_no_such_letters_ends_no_tool(on_a_folder, tmp_path):
    """As a log file on Windows, where a run is of a class called 猫."""
    run = on_a_folder["run"].rename(tmp_path / "猫")
    for tool, *argv in ("evaluate.py", run, "--count", "5"), ("explore.py", "run", run):
        command = [sys.executable, TOP / "tools" / tool, *argv]
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert b"\\u732b" in done.stdout


# evaluate.py


def test_one_table_of_runs_of_all_scripts(runs, few, untrained, tmp_path, capsys):
    file = tmp_path / "figures.json"
    evaluate.main([*map(str, runs.values()), "--count", "12", "--read", "40", "--json", str(file)])
    found, lines = json.loads(file.read_text()), capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == list(map(str, runs.values())))
    both = {"swd", "frechet", "vendi", "nearest_distance", "pair_distance", "copies", "coverage"}
    levels = dict(dcgan={"swd 32", "swd 16"}, cspup128={f"swd {side}" for side in (128, 64, 32, 16)})
    for kind, run in runs.items():
        figures = found[str(run)]
        read = {name for name in figures if name.startswith("share of ")}
        read |= {"classifier", "precision", "recall", "conditional_accuracy", "lowest_class_accuracy"}
        assert set(figures) - read == both | levels.get(kind, {"swd 28", "swd 14"})
        assert len(set(figures) & read) == dict(cgan_residual=15, dense=8, style=8).get(kind, 0)
        assert all(np.isfinite(value) for pair in figures.values() for value in pair if value is not None)
        shares = [pair for name, pair in figures.items() if name.startswith("share of ")]
        assert not shares or np.sum(shares, axis=0).tolist() == pytest.approx([1, 1])
        assert (figures.get("conditional_accuracy", [1])[0] is None) == (
            kind == "dense"
        )  # which has no classes
        (row,) = [line for line in lines[head:] if line.startswith("vendi ")]
        assert "{:.4g} ({:.4g})".format(*figures["vendi"]) in row
    of_file, of_folder = (
        evaluate.figures(
            path,
            types.SimpleNamespace(
                script=[],
                data=None,
                root=None,
                against=None,
                count=12,
                read=40,
                inception=False,
                seed=0,
                device="cpu",
            ),
        )
        for path in (runs["dcgan"] / "models.pth", runs["dcgan"])
    )
    assert of_file == of_folder


@pytest.mark.parametrize("name, size, count", [("cgan_residual", 28, 120), ("dcgan", 32, 120)])
def test_sliced_wasserstein_is_hundreds_for_noise_and_a_few_for_real_images(name, size, count):
    real, other = drawn(name, 2 * count, size).split(count)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    for of_noise, of_other in evaluate.sliced_wasserstein([noise, other], real).values():
        assert of_other < 50 and of_noise > 4 * of_other
    assert evaluate.sliced_wasserstein([noise], real)["swd"][0] > 100


def test_vendi_counts_the_kinds_of_images():
    alike = torch.full((500, 3, 64, 64), 77, dtype=torch.uint8)
    found = evaluate.variety(alike)
    assert (
        found["vendi"] == pytest.approx(1) and max(found["nearest_distance"], found["pair_distance"]) < 1e-6
    )
    corners = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    for i, corner in enumerate(corners):
        corner[:, 32 * (i // 2) :, 32 * (i % 2) :] = 255
    assert evaluate.variety(corners.repeat(125, 1, 1, 1))["vendi"] == pytest.approx(4, abs=0.01)


def test_distances_of_two_images_are_root_mean_squares():
    for size in 28, 64:
        pair = torch.tensor([0, 51], dtype=torch.uint8)[:, None, None, None].expand(2, 1, size, size)
        found = evaluate.variety(pair)
        assert [found["nearest_distance"], found["pair_distance"]] == pytest.approx([0.2, 0.2], rel=1e-4)
        assert evaluate.small(pair).shape[2] == (14 if size == 28 else 16)


@pytest.mark.parametrize("flip", [False, True])
def test_copies_are_found_and_mirrored_ones_where_the_run_mirrored(flip):
    torch.manual_seed(0)
    real, new = torch.rand(2, 60, 3, 16, 16, dtype=torch.float64)
    for fake, share in (real[:40], 1), (real[:40].flip(3), flip), (new[:40], 0):
        found = evaluate.copies(fake + 1e-3, real, flip)
        assert found["copies"] == [share, 0]
        if share:
            assert found["coverage"][0] == 1
    assert evaluate.copies(real[:1].expand(40, 3, 16, 16), real, flip)["coverage"][0] == 1 / 40


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("again", ["twice", "three times", "saved again", "mirrored"])
def test_copies_are_found_where_each_real_image_is_there_again(again, flip):
    real = torch.rand(60, 3, 16, 16, dtype=torch.float64)
    others = {
        "twice": [real],
        "three times": [real, real],
        "saved again": [(real + 0.003 * torch.randn_like(real))],
        "mirrored": [real.flip(3)],
    }
    everything = torch.cat([real, *others[again]])
    everything = everything[torch.randperm(len(everything))]
    for fake, share in (real[:40] + 1e-3, 1), (torch.rand_like(real[:40]), 0):
        assert evaluate.copies(fake, everything, flip)["copies"] == [share, 0]


def test_images_that_are_all_the_same_are_at_no_distance():
    assert evaluate.variety(torch.full((20, 3, 32, 32), 9, dtype=torch.uint8))["nearest_distance"] == 0


def test_frechet_distance_of_known_gaussians():
    unit = torch.cat([torch.eye(3), -torch.eye(3)]).double() * (5 / 2) ** 0.5  # mean 0, covariance 1
    one, two = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 0.0, 3.5]).double()
    assert evaluate.frechet(unit, unit) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(unit, unit + one) == pytest.approx(14)
    assert evaluate.frechet(unit * one, unit * two) == pytest.approx(3**2 + 2**2 + 0.5**2)
    torch.manual_seed(0)
    a, b = (torch.randn(n, 4).double() @ torch.randn(4, 4).double() + torch.randn(4) for n in (30, 50))
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    assert evaluate.frechet(a, b) == pytest.approx(expected.item())


CLASSES = ["black", "grey", "white"]


def brightness():
    """A classifier that knows black, grey and white."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[-1].weight.copy_(torch.tensor([-0.5, 0, 0.5])[:, None].expand(3, 4))
        net[-1].bias.copy_(torch.tensor([-1.0, 0, -1.0]))
    return net


def shades(labels):
    """A image of each label's shade, and the labels."""
    labels = torch.tensor(labels)
    return (torch.tensor([0, 128, 255])[labels][:, None, None, None] * torch.ones(1, 8, 8)).byte(), labels


def test_figures_by_class_are_counted_by_hand():
    test = shades([0] * 50 + [1] * 30 + [2] * 20)
    made = shades([0] * 60 + [1] * 39 + [2])[0]
    asked = torch.tensor([0] * 50 + [1] * 40 + [2] * 10)
    found = classifier.figures_by_class(brightness(), made, asked, test, test, CLASSES)
    assert found["conditional_accuracy"] == pytest.approx([(50 + 30 + 1) / 100, 1])
    assert found["lowest_class_accuracy"] == pytest.approx([1 / 10, 1])
    assert [found[f"share of {name}"] for name in CLASSES] == [
        pytest.approx(pair) for pair in ([0.6, 0.5], [0.39, 0.3], [0.01, 0.2])
    ]
    assert found["classifier"][1] == pytest.approx(0, abs=1e-6) and found["classifier"][0] > 1e-3
    assert classifier.vanished(found) == ["white"]
    made = shades([0] * 60 + [1] * 38 + [2] * 2)[0]
    found = classifier.figures_by_class(brightness(), made, None, test, test, CLASSES)
    assert (
        found["conditional_accuracy"][0] is found["lowest_class_accuracy"][0] is None
        and classifier.vanished(found) == []
    )


def test_precision_and_recall_are_counted_by_hand():
    """Balls reach to the third nearest other: 0, 1, 2, 3 have radii 3, 2, 2, 3; 0, 1, 2, 3, 100 nearly 97."""
    line = torch.arange(4.0, dtype=torch.float64)[:, None]
    places = torch.tensor([-3.1, -2.9, 5.9, 6.1, 50.0], dtype=torch.float64)[:, None]
    assert classifier.covered(places, line) == 2 / 5
    assert classifier.covered(line, line + 50) == 0 and classifier.covered(line, line) == 1
    assert classifier.covered(line, places) == 1  # that at 50 reaches down to -2.9
    few = torch.zeros(2, 1, dtype=torch.float64)
    assert classifier.covered(few, few) == 1 and classifier.covered(few + 1, few) == 0


def test_a_generator_of_one_class_is_precise_and_recalls_little():
    generator = torch.Generator().manual_seed(0)
    real = (
        torch.randn(300, 8, generator=generator, dtype=torch.float64) + 9 * torch.eye(8).repeat(38, 1)[:300]
    )
    fake = real[::8] + 0.05 * torch.randn(38, 8, generator=generator, dtype=torch.float64)
    assert classifier.covered(fake, real) > 0.95
    assert classifier.covered(real, fake) < 0.2


def read_echo(monkeypatch, tmp_path, shift=0, test=None):
    """Figures of a generator that makes the class asked for, or one `shift` after it; what it was asked."""
    known, asked = shades([0] * 60 + [1] * 30 + [2] * 30), []

    def generator(z):
        asked.extend(z[:, :3].argmax(1).tolist())
        return shades([(label + shift) % 3 for label in asked[-len(z) :]])[0] / 127.5 - 1

    script = importlib.import_module("cgan_residual")
    monkeypatch.setattr(script, "sample", lambda generator, z: generator(z).add(1).mul(127.5).round().byte())
    generator.parameters, seen = lambda: iter([torch.zeros(1)]), []
    monkeypatch.setattr(
        classifier, "load_classifier", lambda path, images, *more: seen.append(images) or brightness()
    )
    args = types.SimpleNamespace(seed=0, class_names=CLASSES, labels=None)
    pack = types.SimpleNamespace(filename=str(tmp_path / "pack.npy"))
    found = classifier.class_figures(script, args, generator, pack, known, test, CLASSES, 200)
    return found, np.bincount(asked, minlength=3), seen[0]


def test_a_conditional_model_is_given_the_classes_of_the_test_images(monkeypatch, tmp_path):
    found, asked, seen = read_echo(monkeypatch, tmp_path, test=shades([0] * 10 + [2] * 30))
    assert asked.tolist() == [50, 0, 150] and len(seen) == 120
    assert found["conditional_accuracy"] == [1, 1] and found["share of white"] == [0.75, 0.75]


def test_classes_of_too_few_images_earn_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(classifier, "LEAST_IMAGES", 31)
    args = types.SimpleNamespace(seed=0, class_names=CLASSES, labels=None)
    known = shades([0] * 60 + [1] * 30 + [2] * 31)
    assert classifier.class_figures(None, args, None, None, known, None, CLASSES, 9) == {}
    said = capsys.readouterr().out
    assert f"fewer than 31 images of {CLASSES[1]}" in said and CLASSES[2] not in said
    assert classifier.class_figures(None, args, None, None, known, None, [""], 9) == {}
    assert capsys.readouterr().out == ""


def test_without_unseen_images_a_tenth_is_held_out(monkeypatch, tmp_path):
    found, asked, seen = read_echo(monkeypatch, tmp_path, shift=1)
    assert asked.sum() == 200 and len(seen) == 108
    assert found["conditional_accuracy"] == [0, 1]


def test_the_classifier_learns_once_and_is_kept(tmp_path, monkeypatch):
    images, labels = shades([0, 1, 2] * 8)
    monkeypatch.setattr(classifier, "LEAST_STEPS", 60)
    net = classifier.load_classifier(tmp_path / "c.pth", images, labels, 3, "cpu")
    assert (classifier.read(net, images)[1] == labels).all()
    features, classes = classifier.read(net, images.repeat(30, 1, 1, 1))
    assert features.shape == (720, 128) and features.dtype == torch.float64
    whole = (tmp_path / "c.pth").read_bytes()
    trained = []
    monkeypatch.setattr(classifier, "train_classifier", lambda *args: trained.append(args) or net)
    again = classifier.load_classifier(tmp_path / "c.pth", images, labels, 3, "cpu")
    assert not trained and torch.equal(again[-1].weight, net[-1].weight)
    (tmp_path / "c.pth").write_bytes(whole[:1000])
    classifier.load_classifier(tmp_path / "c.pth", images, labels, 3, "cpu")
    assert len(trained) == 1


def write_idx(folder, part, images, labels):
    """Images and labels as MNIST's files have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array, dimensions in ("images-idx3", images, 3), ("labels-idx1", labels, 1):
        head = bytes([0, 0, 8, dimensions]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"{part}-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A --root with Fashion-MNIST in small: 60 images of the shade of their label, and 30 to test on."""
    folder = tmp_path_factory.mktemp("clothes")
    for part, count in ("train", 60), ("t10k", 30):
        labels = np.arange(count) % 10
        images = np.full((count, 28, 28), 1) * labels[:, None, None] * 20
        write_idx(folder / "FashionMNIST" / "raw", part, images, labels)
    return folder


def test_the_sets_own_test_images(clothes):
    script = importlib.import_module("fashion_keras_port")
    args = script.parse(["--root", str(clothes), "--data", "fashion"])[0]
    known = sorted({name.split("/")[0] for name in script.load_pack(args)[1]})
    images, names = evaluate.unseen_images(script, args, None)
    folders = classifier.classes_of(names, known)
    assert images.shape == (30, 1, 28, 28) and set(folders) == set(known)
    shade = {name: int(image[0, 0, 0]) for name, image in zip(folders, images)}
    assert shade["Bag"] == 160 and shade["Trouser"] == 20
    args.classes = ["Bag", "Trouser"]
    assert sorted(set(evaluate.unseen_images(script, args, None)[1])) == ["Bag/", "Trouser/"]


def test_a_discriminator_that_memorises_is_seen(monkeypatch):
    """By the mean probability of images trained on and others, batch norm as in training, no dropout."""
    D = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 1))
    nn.init.constant_(D[2].weight, 1 / 64), nn.init.zeros_(D[2].bias)
    script = types.SimpleNamespace(
        make_networks=lambda args: (None, D), pick_device=lambda args: ("cpu", "fp32")
    )
    args, saved = types.SimpleNamespace(seed=0, batch_size=8), dict(Discriminator=D.state_dict())
    white, black = shades([2] * 40)[0], shades([0] * 20)[0]
    found = evaluate.seen_and_unseen(script, args, saved, (white, None), (black, None))
    assert found == pytest.approx([torch.tensor(value).sigmoid().item() for value in (1.0, -1.0)])
    mixed = shades([0, 2] * 30)[0]
    D.insert(3, nn.BatchNorm1d(1, affine=False))
    saved = dict(Discriminator=D.state_dict())
    norm = evaluate.seen_and_unseen(script, args, saved, (white, None), (mixed, None))
    assert norm[0] == pytest.approx(0.5) and norm[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("kind, data", [("style", "fashion"), ("dense", "fashion"), ("dcgan", "synthetic")])
def test_memorising_in_the_table(kind, data, runs, clothes, few, untrained, tmp_path, capsys):
    """Against the test images of a set, labels given, or against a folder; only there is d_seen."""
    folder, more = tmp_path / "others", []
    if data == "synthetic":
        folder.mkdir()
        for i in range(100, 110):
            importlib.import_module("dcgan").draw_image(i).save(folder / f"{i}.png")
        more = ["--against", folder, "--root", tmp_path]
    elif kind == "dense":
        more = ["--data", data, "--root", clothes]
    else:
        line = error(capsys, evaluate, runs[kind], "--data", data, "--root", clothes, "--count", 10)
        assert "Sneaker" in line and "Dress" in line  # it knows four drawn classes
        return
    figures = tmp_path / "f.json"
    evaluate.main(list(map(str, [runs[kind], "--count", 10, "--read", 20, "--json", figures, *more])))
    (found,) = json.loads(figures.read_text()).values()
    assert all(0 < value < 1 for value in found["d_seen"])


def test_inception_without_its_package_or_weights(runs, capsys, monkeypatch):
    class Metric:
        def __init__(self, **options):
            raise URLError("no name resolution")

    names = "FrechetInceptionDistance", "InceptionScore", "KernelInceptionDistance"
    package = types.SimpleNamespace(**dict.fromkeys(names, Metric))
    monkeypatch.setitem(sys.modules, "torchmetrics.image", package)
    assert "name resolution" in error(capsys, evaluate, runs["dcgan"], "--inception")
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    assert "pip install torchmetrics[image]" in error(capsys, evaluate, runs["dcgan"], "--inception")


def test_inceptions_metrics_are_given_all_images_in_colour(monkeypatch):
    given = []

    class Metric:
        def __init__(self, **options):
            pass

        def to(self, device):
            return self

        def update(self, images, real=None):
            given.append((type(self).__name__, images, real))

        def compute(self):
            return torch.tensor(2.0), torch.tensor(0.5)

    plain = type("FID", (Metric,), dict(compute=lambda self: torch.tensor(3.0)))
    monkeypatch.setitem(
        sys.modules,
        "torchmetrics.image",
        types.SimpleNamespace(
            FrechetInceptionDistance=plain,
            KernelInceptionDistance=Metric,
            InceptionScore=type("IS", (Metric,), {}),
        ),
    )
    fake, real = shades([0] * 70)[0], shades([2] * 70)[0]
    assert evaluate.inception(fake, real, "cpu") == dict(fid=[3, None], kid=[2, None], inception=[2, None])
    expected = ("FID", True, 255), ("FID", False, 0), ("Metric", False, 0), ("IS", None, 0)
    for name, real_ones, shade in expected:
        images = torch.cat([x for kind, x, is_real in given if kind == name and is_real is real_ones])
        assert images.shape == (70, 3, 8, 8) and (images == shade).all()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--count", "1"], "too few"),
        (["--data", "nowhere"], "nowhere"),
        (["--seed", "x"], "--seed"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments(flags, words, runs, few, capsys):
    assert words in error(capsys, evaluate, runs["dcgan"], *flags)


# Checkpoints that are none, for all tools


class Evil:
    """A pickle that makes a file as it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rewritten(change):
    def spoil(path, whole):
        saved = torch.load(whole, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return spoil


BAD = {
    "missing": lambda path, whole: None,
    "empty": lambda path, whole: path.write_bytes(b""),
    "cut": lambda path, whole: path.write_bytes(whole.read_bytes()[:5000]),
    "text": lambda path, whole: path.write_text("hello\n" * 99),
    "evil": lambda path, whole: torch.save(
        dict(config=dict(script="dcgan"), x=Evil(path.parent / "ran")), path
    ),
    "evil pickle": lambda path, whole: path.write_bytes(pickle.dumps(Evil(path.parent / "ran"))),
    "foreign": lambda path, whole: torch.save(dict(weights=torch.zeros(3)), path),
    "list": lambda path, whole: torch.save([1, 2], path),
    "of another script": rewritten(lambda saved: saved["config"].update(script="this")),
    "of another file here": rewritten(lambda saved: saved["config"].update(script="setup")),
    "of no script": rewritten(lambda saved: saved["config"].update(script="../dcgan")),
    "other width": rewritten(lambda saved: saved["config"].update(width=3)),
    "huge width": rewritten(lambda saved: saved["config"].update(width=1 << 40)),
    "without generator": rewritten(lambda saved: saved.pop("Generator")),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_checkpoint_that_is_none(tool, spoil, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "m.pth", runs["dcgan"] / "models.pth")
    monkeypatch.delitem(sys.modules, "this", raising=False)
    module, flags = TOOLS[tool]
    assert "m.pth" in error(capsys, module, *([tool] if module is explore else []), "m.pth", *flags)
    assert not (tmp_path / "ran").exists() and not {"this", "setup"} & sys.modules.keys()
    assert {path.name for path in tmp_path.iterdir()} <= {"m.pth"}


def test_tools_copied_beside_a_copied_script_work_there(runs, tmp_path):
    for file in [*(TOP / "tools").glob("*.py"), TOP / "dcgan.py"]:
        shutil.copy(file, tmp_path)
    command = [sys.executable, "explore.py", "walk", runs["dcgan"], "--steps", "2", "--save", "w.png"]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""}, timeout=300)
    assert (tmp_path / "w.png").exists()


def test_a_script_that_is_not_there(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "tools" / "common.py"))
    line = error(capsys, explore, "walk", runs["cspup128"])
    assert "made by cspup128.py" in line and "--script" in line


# --script: changed and renamed copies


def changed(name, path, *changes):
    """A copy of a script in `path`, in which (old text, new text) are changed."""
    text = (TOP / f"{name}.py").read_text()
    for old, new in (("range(4096)", "range(60)"), *changes):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def renamed_run(run, out, **config):
    """A copy of a run folder, with other values in its config."""
    shutil.copytree(run, out)
    saved = torch.load(out / "models.pth", weights_only=True)
    saved["config"].update(config)
    torch.save(saved, out / "models.pth")
    (out / "config.json").write_text(json.dumps(saved["config"]))
    return out


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """{name: (file, run folder)} of copies of dcgan.py whose generators end with one more convolution.

    mygan was trained as its users do; what another/dcgan.py made has the same weights.
    """
    folder = tmp_path_factory.mktemp("copies")
    end = "super().__init__(*layers, nn.Tanh())"
    deeper = end, f"layers.append(nn.Conv2d(channels, channels, 3, padding=1))\n        {end}"
    file = changed("dcgan", folder / "mygan.py", deeper)
    subprocess.run([sys.executable, file, *TINY, "--size", "32"], cwd=folder, check=True, timeout=300)
    run, root = folder / "runs" / "mygan", {"root": str(folder / "data")}
    other = changed("dcgan", folder / "another" / "dcgan.py", deeper)
    return {
        "mygan": (file, renamed_run(run, folder / "mine", **root)),
        "dcgan": (other, renamed_run(run, folder / "other", script="dcgan", **root)),
    }


OPENERS = {
    "evaluate": (evaluate, [], ["--count", "8"]),
    "run": (explore, ["run"], []),
    "walk": (explore, ["walk"], ["--count", "4", "--steps", "2"]),
    "table": (explore, ["table"], []),
    "export": (export, [], ["--save", "x.safetensors"]),
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["mygan", "dcgan"])
def test_a_copy_is_opened_by_script(name, opener, copies, tmp_path, monkeypatch):
    """And by what it is now: not by the original, though it may have its name."""
    monkeypatch.chdir(tmp_path)
    file, run = copies[name]
    opened, import_file = [], common.import_file
    monkeypatch.setattr(common, "import_file", lambda path: opened.append(path) or import_file(path))
    monkeypatch.setattr(common, "import_own", lambda name: pytest.fail("by the original"))
    tool, command, flags = OPENERS[opener]
    tool.main([*command, str(run), *flags, "--script", str(file)])
    assert opened == [file]


@pytest.mark.parametrize("opener", OPENERS)
def test_a_copy_that_is_not_named(opener, copies, tmp_path, monkeypatch, capsys):
    """Or others are: a name out of a file alone imports nothing but the four scripts."""
    monkeypatch.chdir(tmp_path)
    file, run = copies["mygan"]
    monkeypatch.syspath_prepend(file.parent)
    tool, command, flags = OPENERS[opener]
    for more in [], ["--script", copies["dcgan"][0], TOP / "dcgan.py"]:
        line = error(capsys, tool, *command, run, *flags, *more)
        assert str(run) in line and "was made by mygan.py" in line and "--script" in line
    assert "mygan" not in sys.modules and not list(tmp_path.iterdir())


@pytest.mark.parametrize("opener", ["evaluate", "walk", "export"])
def test_a_copy_that_the_original_does_not_fit(opener, copies, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tool, command, flags = OPENERS[opener]
    _, run = copies["dcgan"]
    line = error(capsys, tool, *command, run, *flags)
    assert str(run) in line and "does not fit" in line and "--script" in line and "Generator" in line
    assert "no checkpoint" not in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mygan", "dcgan"])
def test_a_copy_compared_with_the_original(name, copies, runs, few, tmp_path, capsys):
    """The original is opened by its own script, also where the copy has its name, and it is said then."""
    file, run = copies[name]
    argv = list(
        map(str, [runs["dcgan"], run, "--script", file, "--count", 12, "--json", tmp_path / "f.json"])
    )
    evaluate.main(argv)
    assert ("opened by" in capsys.readouterr().out) == (name == "dcgan")
    found = json.loads((tmp_path / "f.json").read_text())
    evaluate.main([str(runs["dcgan"]), *argv[4:]])
    (alone,) = json.loads((tmp_path / "f.json").read_text()).values()
    assert found[str(runs["dcgan"])] == alone and found[str(run)]["swd"] != alone["swd"]


def test_a_copys_discriminator_counts_too(runs, tmp_path, capsys):
    """A run of the original is opened by the original, if a copy of its name differs there alone."""
    wider = (
        "widths(size, width)\n        layers = [nn.Conv2d",
        "widths(size, 2 * width)\n        layers = [nn.Conv2d",
    )
    file = changed("dcgan", tmp_path / "dcgan.py", wider)
    script, *_ = common.load(runs["dcgan"], [file], device="cpu")
    assert script.__file__ == str(TOP / "dcgan.py") and "opened by" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere.py", "mygan.txt", "."])
def test_script_takes_python_files(name, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mygan.txt").write_text("")
    assert "--script" in error(capsys, evaluate, runs["dcgan"], "--script", name)


MISTAKES = {
    "as it is imported": (("Z_DIM = 100", "Z_DIM = hundred"), NameError),
    "in a network": (("if self.minibatch_std:", "if self.minibatch:"), AttributeError),
    "in a function": (("return torch.randn(count, Z_DIM,", "return torch.randn(count, 99,"), RuntimeError),
    "of a key": (('minibatch_std=args.recipe == "robust"', 'minibatch_std=vars(args)["std"]'), KeyError),
}


@pytest.mark.parametrize("change, kind", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_copy_shows_where_it_is(change, kind, runs, tmp_path):
    """As Python's traceback."""
    file = changed("dcgan", tmp_path / "mygan.py", change)
    run = renamed_run(runs["dcgan"], tmp_path / "run", script="mygan", root=str(tmp_path))
    flags = ["--count", "8", "--against", "synthetic"]
    with pytest.raises(kind) as caught:
        evaluate.main([str(run), *flags, "--script", str(file)])
    assert str(file) in [str(entry.path) for entry in caught.traceback]


def test_a_mistake_in_a_tool_shows_where_it_is(runs, monkeypatch):
    monkeypatch.setattr(explore, "to_grid", lambda images: None)  # which gets two arguments
    with pytest.raises(TypeError):
        explore.main(["classes", str(runs["style"])])


@pytest.mark.parametrize("exception", [KeyboardInterrupt, FileNotFoundError, torch.cuda.OutOfMemoryError])
def test_what_the_user_can_mend_is_one_line(exception, runs, capsys, monkeypatch):
    def interrupted(images, columns):
        raise exception("the cause")

    monkeypatch.setattr(explore, "to_grid", interrupted)
    assert "the cause" in error(capsys, explore, "classes", runs["style"])


def test_a_copy_finds_what_lies_beside_it_and_has_a_source(runs, tmp_path):
    (tmp_path / "beside_mygan.py").write_text("LENGTH = 100")
    file = changed(
        "dcgan", tmp_path / "mygan.py", ("Z_DIM = 100", "from beside_mygan import LENGTH as Z_DIM")
    )
    run = renamed_run(runs["dcgan"], tmp_path / "run", script="mygan")
    script, args, *_ = common.load(run, [file], device="cpu")
    assert script.draw_z(args, 1).shape == (1, 100)
    assert "class Generator" in inspect.getsource(script.Generator)
    assert "def draw_image" in script.source_of(script.draw_image)[0]


def test_a_flag_that_a_run_did_not_have_yet_has_its_default(runs, tmp_path):
    file = changed(
        "dcgan",
        tmp_path / "mygan.py",
        (
            '    add("--size", type=int',
            '    add("--depth", type=int, default=64)\n    add("--size", type=int',
        ),
        (
            "G = Generator(args.size, args.channels, args.width)",
            "G = Generator(args.size, args.channels, args.width * args.depth // 64)",
        ),
    )
    run = renamed_run(runs["dcgan"], tmp_path / "run", script="mygan")
    assert common.load(run, [file], device="cpu")[1].depth == 64


OLD_NAMES = {
    "dcgan": {"lr_decay_from": "fall"},
    "cspup128": {"lr_decay_from": "fall", "scheme": "recipe"},
    "cgan_residual": {"lr_decay_from": "fall", "class_names": "names"},
    "style": {"lr_decay_from": "fall", "class_names": "names", "arch": "recipe"},
}


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_runs_of_earlier_versions(kind, runs, few, tmp_path):
    """Whose files have other names of flags, and not all of today's."""
    run = shutil.copytree(runs[kind], tmp_path / "run")
    saved = torch.load(run / "models.pth", weights_only=True)
    config = {OLD_NAMES[kind].get(name, name): value for name, value in saved["config"].items()}
    for name in "minutes", "keep_every", "logger", "wandb_id":
        del config[name]
    torch.save({**saved, "config": config}, run / "models.pth")
    (run / "config.json").write_text(json.dumps(config))
    old, new = [vars(explore.open_run(folder, [])[1]) for folder in (run, runs[kind])]
    assert old == new
    found = []
    for folder in runs[kind], run:
        explore.main(["walk", str(folder), "--count", "4", "--steps", "2", "--save", str(tmp_path / "w.png")])
        explore.main(["run", str(folder)])
        found.append([(tmp_path / "w.png").read_bytes(), (folder / "comparison.png").read_bytes()])
    assert found[0] == found[1]
    if kind in ("cgan_residual", "style"):
        explore.main(["classes", str(run), "--save", str(tmp_path / "c.png")])


# export.py


def averaged(run):
    """The averaged generator of a run folder, its script and arguments."""
    script, args, _, generator = common.load(run, device="cpu")
    return script, args, generator


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_agrees_for_any_batch(kind, runs, tmp_path, capsys):
    script, args, generator = averaged(runs[kind])
    export.main([str(runs[kind] / "models.pth"), "--save", str(tmp_path / "g.onnx")])
    assert float(capsys.readouterr().out.split("torch by ")[1].split()[0]) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx")
    assert [node.name for node in (*session.get_inputs(), *session.get_outputs())] == ["z", "images"]
    for count in 1, 5:
        z = script.draw_z(args, count)
        (images,) = session.run(None, {"z": z.numpy()})
        expected = generator(z).numpy()
        assert images.shape == (count, args.channels, args.size, args.size)
        assert np.abs(images - expected).max() < 1e-4 < expected.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_load_into_the_generator(kind, runs, tmp_path):
    _, args, generator = averaged(runs[kind])
    export.main([str(runs[kind]), "--save", str(tmp_path / "g.safetensors")])
    with safe_open(tmp_path / "g.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["width"] == args.width
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert tensors.keys() == generator.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in generator.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_makes_the_same_images(kind, runs, tmp_path):
    """The file has the generator alone, in half precision, and --generate takes it."""
    export.main([str(runs[kind]), "--save", str(tmp_path / "g.pth")])
    made = []
    for checkpoint in runs[kind] / "models.pth", tmp_path / "g.pth":
        importlib.import_module(KINDS[kind][0]).main(
            ["--generate", "8", "--checkpoint", str(checkpoint), "--save", str(tmp_path / "made.npz")]
        )
        made.append(np.load(tmp_path / "made.npz")["images"].astype(int))
    assert abs(made[0] - made[1]).mean() < 1 < made[0].std()
    saved = torch.load(tmp_path / "g.pth", weights_only=True)
    assert saved.keys() == {"Generator", "config"} and str(tmp_path.parent) not in str(saved["config"])
    assert {v.dtype for v in saved["Generator"].values()} <= {torch.half, torch.long}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packages_that_are_missing(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export.main([str(runs["dense"]), "--save", str(tmp_path / "g.onnx")])
    assert "not compared" in capsys.readouterr().out and (tmp_path / "g.onnx").stat().st_size > 1000
    for package, file in ("safetensors.torch", "g.safetensors"), ("keras", "g.keras"):
        monkeypatch.setitem(sys.modules, package, None)
        assert "pip install" in error(capsys, export, runs["dense"], "--save", tmp_path / file)
        assert not (tmp_path / file).exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "RUN"),
        (["RUN"], "--save"),
        (["RUN", "--save", "g.h5"], ".onnx"),
        (["RUN", "--save", "g"], ".onnx"),
        (["RUN", "--save", *("a.keras b.keras c.keras".split())], "two at most"),
        (["RUN", "--save", "a.onnx", "--from", "a.keras"], "RUN --save"),
        (["--from", *"abc"], "generator and, after"),
    ],
)
def test_exports_that_cannot_be(argv, words, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error(capsys, export, *(runs["dense"] if word == "RUN" else word for word in argv))
    assert words in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["style", "dcgan"])
def test_other_networks_have_no_keras_file(kind, runs, tmp_path, capsys):
    assert "--arch dense" in error(capsys, export, runs[kind], "--save", tmp_path / "g.keras")


@pytest.mark.parametrize("last", ["nn.Tanh()", "nn.Tanh(), nn.Hardtanh(-0.1, 0.1)"])
def test_a_copy_of_the_keras_gan_has_a_keras_file_if_its_layers_are_the_same(last, runs, tmp_path, capsys):
    file = changed("fashion_keras_port", tmp_path / "mygan.py", ("nn.Tanh(), nn.Unf", f"{last}, nn.Unf"))
    run = renamed_run(runs["dense"], tmp_path / "run", script="mygan")
    argv = [str(run), "--save", str(tmp_path / "g.keras"), "--script", str(file)]
    if last == "nn.Tanh()":
        export.main(argv)
    else:
        assert "other layers" in error(capsys, export, *argv)
    assert (tmp_path / "g.keras").exists() == (last == "nn.Tanh()")


# .keras files, in and out

LEAKY = functools.partial(L.LeakyReLU, negative_slope=0.2)
NORM = functools.partial(L.BatchNormalization, momentum=0.8)


def generator_layers(width=4, dense=L.Dense, norm=NORM, last="tanh"):
    """The layers of the original's generator."""
    found = []
    for units in (width, 2 * width, 4 * width):
        found += dense(units), LEAKY(), norm()
    return [*found, dense(784, activation=last), L.Reshape((28, 28, 1))]


def discriminator_layers(width=4):
    hidden = [L.Dense(2 * width), LEAKY(), L.Dense(width), LEAKY()]
    return [L.Flatten(), *hidden, L.Dense(1, activation="sigmoid")]


def sequential(shape, layers):
    return keras.Sequential([keras.Input(shape), *layers])


def nested(shape, layers):
    x = keras.Input(shape)
    return keras.Model(x, sequential(shape, layers)(x))


def shake(model):
    """Other biases and statistics than those that it begins with, so that they count."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if hasattr(layer, "layers"):
            shake(layer)
            continue
        weights = layer.get_weights()
        layer.set_weights([rng.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in weights])
    return model


G_SHAPE, D_SHAPE = (100,), (28, 28, 1)


def probe(model):
    x = np.random.default_rng(0).normal(0, 0.5, (16, *model.input_shape[1:])).astype(np.float32)
    return keras.ops.convert_to_numpy(model(x, training=False)).reshape(16, -1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """g.keras and d.keras, of width 4, in a folder."""
    folder = tmp_path_factory.mktemp("keras")
    for name, shape, layers in ("g", G_SHAPE, generator_layers()), ("d", D_SHAPE, discriminator_layers()):
        shake(nested(shape, layers)).save(folder / f"{name}.keras")
    return folder


def refused(capsys, tmp_path, *argv):
    """The error line of --from, which has to leave nothing behind."""
    line = error(capsys, export, "--from", *argv, "--to", tmp_path / "run" / "models.pth")
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize("make", [sequential, nested])
def test_from_keras_and_back(make, tmp_path, capsys):
    models = [shake(make(G_SHAPE, generator_layers(8))), shake(make(D_SHAPE, discriminator_layers(8)))]
    paths = [tmp_path / f"{name}.keras" for name in ("g", "d", "back-g", "back-d")]
    for model, path in zip(models, paths):
        model.save(path)
    export.main(["--from", *map(str, paths[:2]), "--to", str(tmp_path / "run" / "models.pth")])
    lines = [line for line in capsys.readouterr().out.splitlines() if " by " in line]
    found = [float(line.split(" by ")[1].split()[0]) for line in lines]
    assert len(found) == 2 and max(found) < 1e-5
    export.main([str(tmp_path / "run"), "--save", *map(str, paths[2:])])
    for model, path in zip(models, paths[2:]):
        back = keras.saving.load_model(path)
        assert back.input_shape == model.input_shape and back.output_shape == model.output_shape
        np.testing.assert_allclose(probe(back), probe(model), atol=1e-6)
        assert probe(back).std() > 1e-3
    script = importlib.import_module("fashion_keras_port")
    save = str(tmp_path / "g.npz")
    script.main(["--generate", "3", "--checkpoint", str(tmp_path / "run" / "models.pth"), "--save", save])
    z = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    images = keras.ops.convert_to_numpy(models[0](z.numpy(), training=False))
    expected = (images.reshape(3, -1) + 1) * 127.5
    assert np.abs(np.load(save)["images"].reshape(3, -1) - expected).max() <= 1.01


def test_trained_here_it_comes_back_the_same(runs, tmp_path):
    names = [str(tmp_path / "g.keras"), str(tmp_path / "d.keras")]
    export.main([str(runs["dense"]), "--save", *names])
    export.main(["--from", *names, "--to", str(tmp_path / "models.pth")])
    ours, back = (
        torch.load(folder / "models.pth", weights_only=True) for folder in (runs["dense"], tmp_path)
    )
    for net in "Generator", "Discriminator":
        assert ours[net].keys() == back[net].keys()
        assert all(
            torch.equal(value, back[net][name])
            for name, value in ours[net].items()
            if not name.endswith("num_batches_tracked")
        )


def test_models_that_are_there_already_stay(files, tmp_path, capsys):
    (tmp_path / "models.pth").write_text("mine")
    assert "already" in error(capsys, export, "--from", files / "g.keras", "--to", tmp_path / "models.pth")
    assert (tmp_path / "models.pth").read_text() == "mine"


OTHERS = {
    "other layer": (lambda: [*generator_layers(), L.Dropout(0.5)], "Dropout"),
    "layer left out": (lambda: generator_layers()[3:], "layer "),
    "no bias": (lambda: generator_layers(4, functools.partial(L.Dense, use_bias=False)), "layer 1 "),
    "slope": (lambda: [generator_layers()[0], LEAKY(negative_slope=0.3), *generator_layers()[2:]], "0.3"),
    "epsilon": (lambda: generator_layers(norm=functools.partial(NORM, epsilon=1e-5)), "1e-05"),
    "last activation": (lambda: generator_layers(last="sigmoid"), "sigmoid"),
    "nothing": (lambda: [L.Flatten()], "nothing"),
}


@pytest.mark.parametrize("layers, words", OTHERS.values(), ids=OTHERS)
def test_another_network_is_no_generator_of_this_gan(layers, words, tmp_path, capsys):
    sequential(G_SHAPE, layers()).save(tmp_path / "g.keras")
    line = refused(capsys, tmp_path, tmp_path / "g.keras")
    assert str(tmp_path / "g.keras") in line and words in line


def test_the_layers_connected_otherwise_are_no_generator(tmp_path, capsys):
    first, leaky, *rest = generator_layers()
    x = keras.Input(G_SHAPE)
    y = leaky(leaky(first(x)))
    for layer in rest:
        y = layer(y)
    shake(keras.Model(x, y)).save(tmp_path / "g.keras")
    assert "no Generator" in refused(capsys, tmp_path, tmp_path / "g.keras")
    nested(D_SHAPE, discriminator_layers(5)).save(tmp_path / "d.keras")
    sequential(G_SHAPE, generator_layers()).save(tmp_path / "g.keras")
    assert "different widths, [4, 5]" in refused(capsys, tmp_path, tmp_path / "g.keras", tmp_path / "d.keras")


def edited(source, path, change):
    """A copy of a .keras file whose parts are what change(name, bytes) gives; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return path


@pytest.mark.parametrize("length", [0, 1, 30, 2000, -2000, -22, -1])
def test_a_file_that_is_cut_short(length, files, tmp_path, capsys):
    (tmp_path / "g.keras").write_bytes((files / "g.keras").read_bytes()[:length])
    assert "g.keras" in refused(capsys, tmp_path, tmp_path / "g.keras")


@pytest.mark.parametrize(
    "part, text",
    [
        ("config.json", None),
        ("model.weights.h5", None),
        ("config.json", "[]"),
        ("config.json", "[" * 99999 + "]" * 99999),
    ],
    ids=["no config", "no weights", "list", "deep"],
)
def test_a_file_that_cannot_be_read(part, text, files, tmp_path, capsys):
    path = edited(files / "g.keras", tmp_path / "g.keras", lambda n, data: text if n == part else data)
    assert "g.keras" in refused(capsys, tmp_path, path)
    assert "nowhere.keras" in refused(capsys, tmp_path, tmp_path / "nowhere.keras")


@pytest.mark.parametrize("version", ["2.15.0", "2.4.0-tf", "1.2.2", "3.0.0"])
def test_a_file_of_keras_2_says_what_works(version, files, tmp_path, capsys):
    """With Keras 2's layers, which name the slope alpha; the same layers of Keras 3 are read."""

    def older(name, data):
        if name == "metadata.json":
            return json.dumps(dict(json.loads(data), keras_version=version))
        return (
            data.replace(b"negative_slope", b"alpha") if version[0] < "3" and name == "config.json" else data
        )

    path = edited(files / "g.keras", tmp_path / "g.keras", older)
    if version[0] == "3":
        export.main(["--from", str(path), "--to", str(tmp_path / "models.pth")])
        return
    line = refused(capsys, tmp_path, path)
    assert f"Keras {version}" in line and ".h5" in line and "Keras 3" in line


def test_a_lambda_is_not_run(tmp_path, capsys, monkeypatch):
    """It would have been: Keras, told to trust the file, runs it."""
    monkeypatch.chdir(tmp_path)
    trap, ran = L.Lambda(lambda x: [open("ran", "w").close(), x][1]), tmp_path / "ran"
    sequential(G_SHAPE, [trap, *generator_layers()]).save(tmp_path / "g.keras")
    ran.unlink()
    assert "keras.layers.Lambda" in refused(capsys, tmp_path, tmp_path / "g.keras")
    assert not ran.exists()
    keras.saving.load_model(tmp_path / "g.keras", safe_mode=False)
    assert ran.exists()


@pytest.fixture
def unread(monkeypatch):
    """Keras may not see the file at all."""

    def load_model(*args, **options):
        pytest.fail("Keras has got the file")

    monkeypatch.setattr(keras.saving, "load_model", load_model)


@pytest.mark.parametrize("end", [".h5", ".hdf5", ".zip", "", ".KERAS"])
def test_a_good_file_hidden_in_another_does_not_get_it_read(end, files, tmp_path, capsys, unread):
    """Keras goes by the name: an HDF5 file with a zip behind it is two models."""
    shutil.copy(files / "g.keras", tmp_path / f"g{end}")
    assert ".keras" in refused(capsys, tmp_path, tmp_path / f"g{end}")


def places(value, path=()):
    """Where in a config.json something is named that Keras makes."""
    if isinstance(value, dict) and "class_name" in value:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def evil(module, name, registered=None):
    return dict(module=module, class_name=name, config=dict(command="true"), registered_name=registered)


EVIL = [
    evil("os", "system"),
    evil("subprocess", "Popen"),
    evil("builtins", "eval", "eval"),
    evil("os", "Dense"),
    evil("keras.layers", "Lambda"),
    evil("keras.layers", "TorchModuleWrapper"),
    evil("keras.layers", "TFSMLayer"),
    evil("keras.src.layers", "Lambda"),
    evil("kerasx", "Dense"),
    evil("keras_hub.layers", "Dense"),
    evil("", "system"),
    evil(None, "Lambda"),
    evil("keras.layers", "Dense", "mine>Registered"),
    evil(None, "Dense", "Registered"),
    evil("keras.initializers", "Zeros", "mine>Registered"),
    evil("keras.initializers", "__lambda__"),
    evil("keras.initializers", "deserialize"),
    evil("keras.initializers.os", "System"),
    evil("keras.initializersx", "Zeros"),
    evil("builtins", "__lambda__"),
    evil("keras.optimizers", "Adam"),
    evil("keras.saving", "load_model"),
    evil("keras.layers", ["Dense"]),
    evil(["keras"], "Dense"),
    evil("keras.layers", {"a": 1}),
    evil("keras.layers", None),
    evil("os", 5),
    dict(class_name="Lambda"),
    dict(class_name="system", module="os"),
]


@pytest.mark.parametrize("named", EVIL, ids=str)
def test_whatever_else_a_file_names_keras_does_not_get_to_see_it(named, files, tmp_path, capsys, unread):
    """In the place of parts of a good file, and in what they are made with."""
    with zipfile.ZipFile(files / "g.keras") as archive:
        good = json.loads(archive.read("config.json"))
    where = list(places(good))
    assert len(where) > 40
    for path in where[:4] + where[4::9]:
        for way in None, "config":
            whole = dict(config=json.loads(json.dumps(good)))
            parent = whole
            for key in ("config", *path)[:-1]:
                parent = parent[key]
            last = ("config", *path)[-1]
            if way is None:
                parent[last] = named
            else:
                parent[last]["config"]["x"] = [named]
            text = json.dumps(whole["config"])
            file = edited(
                files / "g.keras", tmp_path / "g.keras", lambda n, data: text if n == "config.json" else data
            )
            assert "no part of this GAN and is not run" in refused(capsys, tmp_path, file)


def test_keras_too_is_told_to_run_nothing(files, monkeypatch):
    """And is given a path, since it fetches what a text may name from the network."""
    given, load_model = [], keras.saving.load_model

    def noting(path, **options):
        given.append((path, options))
        return load_model(path, **options)

    monkeypatch.setattr(keras.saving, "load_model", noting)
    export.load_keras(str(files / "g.keras"))
    assert given == [(files / "g.keras", dict(compile=False, safe_mode=True))]
    assert isinstance(given[0][0], Path)


# explore.py


def cells(path, size, columns):
    """The images of a grid in order, N,C,size,size."""
    grid = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    tiles = grid[:, 2:, 2:].unfold(1, size, size + 2).unfold(2, size, size + 2)  # 3,rows,columns,size,size
    assert tiles.shape[2] == columns
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_goes_round_a_circle_and_keeps_its_class(kind, runs, tmp_path):
    explore.main(["walk", str(runs[kind]), "--count", "3", "--steps", "4", "--save", str(tmp_path / "w.png")])
    script, args, generator = averaged(runs[kind])
    a, args.seed = script.draw_z(args, 3), 1
    b = script.draw_z(args, 3)
    classes = a.shape[1] - script.Z_DIM
    back = torch.cat([a[:, :classes], -a[:, classes:]], 1)
    shown = cells(tmp_path / "w.png", args.size, 4)
    assert len(shown) == 12
    for step, z in enumerate((a, b, back)):
        expected = script.sample(generator, z).expand(-1, 3, -1, -1).int()
        assert (shown[step::4].int() - expected).abs().max() <= 1 and expected.float().std() > 1


def test_a_walk_as_a_gif_has_a_frame_for_each_step(runs, tmp_path, capsys):
    explore.main(["walk", str(runs["style"]), "--steps", "5", "--save", str(tmp_path / "w.gif")])
    with Image.open(tmp_path / "w.gif") as film:
        assert film.n_frames == 5 and film.size == (512, 512)
    for flags, words in (["--save", "w.jpg"], ".gif or .png"), (["--steps", "1"], "two --steps"):
        assert words in error(capsys, explore, "walk", runs["style"], *flags)


@pytest.mark.parametrize("kind, classes", [("cgan_residual", 10), ("style", 3)])
def test_classes_have_the_same_noise_in_each_row(kind, classes, runs, tmp_path):
    explore.main(["classes", str(runs[kind]), "--count", "2", "--save", str(tmp_path / "c.png")])
    script, args, generator = averaged(runs[kind])
    noise = script.draw_z(args, 2)[:, classes:]
    z = torch.cat([torch.eye(classes).repeat(2, 1), noise.repeat_interleave(classes, 0)], 1)
    shown = cells(tmp_path / "c.png", 28, classes)
    assert (shown.int() - script.sample(generator, z).int()).abs().max() <= 1
    assert len(shown.flatten(1).unique(dim=0)) == 2 * classes


def test_classes_of_a_model_without(runs, capsys):
    assert "without classes" in error(capsys, explore, "classes", runs["dense"])


@pytest.fixture(scope="module")
def drawn_run(runs, tmp_path_factory):
    """A run folder of several epochs with its images; those of the last epoch are white."""
    out = shutil.copytree(runs["dcgan"], tmp_path_factory.mktemp("explore") / "run")
    size = Image.open(out / "samples" / "epoch_0001.png").size
    for epoch, colour in (2, "red"), (9999, "blue"), (10000, "white"):
        Image.new("RGB", size, colour).save(out / "samples" / f"epoch_{epoch:04d}.png")
    return out


def test_the_last_samples_of_a_run_beside_real_images(drawn_run, few):
    explore.main(["run", str(drawn_run)])
    both = np.asarray(Image.open(drawn_run / "comparison.png"))
    script, args, _ = explore.open_run(drawn_run, [])
    real = np.asarray(explore.to_grid(explore.real_images(script, args), script.GRID))
    assert (both[:, : real.shape[1]] == real).all() and (both[:, real.shape[1] :] == 255).all()
    assert real.std() > 5


def rows(count, d_real=0.55, d_fake=0.45):
    """Rows of metrics.csv, ten steps apart, as far as warnings() reads them."""
    return [{"d_real": d_real, "d_fake": d_fake} for _ in range(count)]


def faces(different, count=64):
    """uint8 count,3,32,32 of so many different drawn faces, each with a little noise of its own."""
    drawn = [torch.from_numpy(np.array(cspup128.draw_image(i).resize((32, 32)))) for i in range(different)]
    images = torch.stack(drawn).permute(0, 3, 1, 2)[torch.arange(count) % different].float()
    return (images + 4 * torch.randn(images.shape)).clamp(0, 255).byte()


@pytest.mark.parametrize(
    "made, real, count, warned",
    [
        (64, 64, 50, 0),
        (52, 64, 50, 0),
        (40, 64, 50, 1),
        (6, 64, 50, 1),
        (1, 64, 50, 1),
        (6, 64, 49, 0),
        (6, 6, 50, 0),
    ],
)
def test_samples_that_repeat_themselves_earn_a_line(made, real, count, warned):
    """Each sample's nearest other one, against the same among real images, which may repeat too."""
    found = explore.warnings(rows(count), faces(made), faces(real))
    assert len(found) == warned and all("repeat themselves" in line for line in found)


@pytest.mark.parametrize(
    "ahead, count, said",
    [
        (0.97, 20, "has won"),
        (0.97, 19, None),
        (0.9, 20, None),
        (0.0, 50, "guesses"),
        (-0.1, 60, "guesses"),
        (0.0, 49, None),
        (0.005, 50, None),
    ],
)
def test_a_discriminator_that_has_won_or_only_guesses_earns_a_line(ahead, count, said):
    found = explore.warnings(rows(count, 0.5 + ahead / 2, 0.5 - ahead / 2), faces(64), faces(64))
    assert [said in line for line in found] == [True] * bool(said)


@pytest.mark.parametrize(
    "low, high, warned", [(0, 8, 1), (250, 255, 1), (100, 110, 1), (0, 255, 0), (0, 80, 0)]
)
def test_real_images_that_are_all_one_colour_or_nearly_black_earn_a_line(low, high, warned):
    real = torch.randint(low, high + 1, (64, 1, 28, 28), dtype=torch.uint8)
    assert ["one colour" in line for line in explore.warnings(rows(1), faces(64), real)] == [True] * warned


def write_metrics(out, columns, values):
    """metrics.csv of a run folder, as the scripts write it."""
    np.savetxt(out / "metrics.csv", values, "%.10g", ",", comments="", header=",".join(columns))


@pytest.mark.parametrize(
    "ahead, repeated, said",
    [(0.1, False, []), (0.1, True, ["the samples repeat"]), (0.99, False, ["the discriminator has won"])],
)
def test_a_run_is_looked_at_by_its_last_rows_and_its_last_samples(
    ahead, repeated, said, runs, few, tmp_path, capsys
):
    """The last samples are the real images here, or some of these again and again."""
    out = shutil.copytree(runs["dcgan"], tmp_path / "run")
    columns = "step,epoch,seconds,images,loss_d,loss_g,d_real,d_fake".split(",")
    values = [[10 * i, 1, i, 80 * i, 1, 1, 0.5 + ahead / 2 * (i > 9), 0.5 - ahead / 2] for i in range(60)]
    write_metrics(out, columns, values)
    script, args, _ = explore.open_run(out, [])
    real = explore.real_images(script, args)
    shown = real[torch.arange(64) % 4] if repeated else real
    explore.to_grid(shown, script.GRID).save(out / "samples" / "epoch_0002.png")
    explore.main(["run", str(out)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert len(lines) == len(said) and all(word in line for word, line in zip(said, lines))


def test_a_folder_without_samples_or_metrics_is_no_run(runs, tmp_path, capsys):
    assert "no run folder" in error(capsys, explore, "run", tmp_path)
    (shutil.copytree(runs["dcgan"], tmp_path / "run") / "metrics.csv").unlink()
    assert "metrics.csv" in error(capsys, explore, "run", tmp_path / "run")


def test_a_run_whose_metrics_are_others(runs, few, tmp_path, capsys):
    """Columns of one's own, with names that CSV readers may take amiss; or without the scores of D."""
    out = shutil.copytree(runs["dcgan"], tmp_path / "run")
    more = ["grad norm", "#fid", "d_real/hard"]
    columns = ["step", "epoch", "seconds", "images", "loss_d", *more, "loss_g", "d_real", "d_fake"]
    values = [[10 * i, 1, i, 80 * i, 1, np.nan, -1, 0, 1, 0.99, 0.01] for i in range(20)]
    write_metrics(out, columns, values)
    explore.main(["run", str(out)])
    assert "the discriminator has won" in capsys.readouterr().out
    write_metrics(out, columns[:-2], [row[:-2] for row in values])
    explore.main(["run", str(out)])
    assert "discriminator" not in capsys.readouterr().out and (out / "comparison.png").exists()


@pytest.mark.parametrize(
    "config", [None, "", "[]", "{}", "[1", '{"script": "this"}', '{"script": ["dcgan"]}', '{"script": null}']
)
def test_a_config_json_that_is_none(config, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    file = shutil.copytree(runs["dcgan"], tmp_path / "run") / "config.json"
    file.unlink()
    if config is not None:
        file.write_text(config)
    for command in "run", "table":
        assert str(tmp_path / "run") in error(capsys, explore, command, tmp_path / "run")
    assert "this" not in sys.modules


@pytest.mark.parametrize("command, name", [("walk", "w.jpg"), ("classes", "c"), ("table", "t.xyz")])
def test_images_of_unknown_kinds(command, name, runs, tmp_path, capsys):
    line = error(capsys, explore, command, runs["style"], "--save", tmp_path / name)
    assert name in line and ".png" in line and not list(tmp_path.iterdir())


def test_a_table_shows_real_early_and_late_images_of_each_run(runs, few, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.imshow", lambda axes, image: shown.append((axes.get_title(), image))
    )
    run = shutil.copytree(runs["dcgan"], tmp_path / "crests")
    size = Image.open(run / "samples" / "epoch_0001.png").size
    Image.new("RGB", size, "red").save(run / "samples" / "epoch_0002.png")
    explore.main(["table", str(run), str(runs["style"]), "--save", str(tmp_path / "new" / "t.png")])
    assert (tmp_path / "new" / "t.png").stat().st_size > 1000
    assert [title for title, _ in shown] == [
        "crests, real",
        "crests, epoch 1",
        "crests, epoch 2",
        "style, real",
        "style, epoch 1",
        "style, epoch 1",
    ]
    assert shown[2][1].getpixel((50, 50)) == (255, 0, 0) and shown[0][1].size == (4 * 34 + 2,) * 2
    assert shown[3][1].size == (5 * 30 + 2,) * 2
    assert "no run folder" in error(capsys, explore, "table", tmp_path)


@pytest.mark.parametrize("name", ["łąka", "кошки", "猫", "ไทย", "🐱"])
def test_a_table_names_runs_in_letters_that_a_font_has_or_by_number(
    name, runs, few, tmp_path, monkeypatch, recwarn
):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, image: shown.append(axes.get_title()))
    run = shutil.copytree(runs["dcgan"], tmp_path / name)
    explore.main(["table", str(runs["style"]), str(run), "--save", str(tmp_path / "t.png")])
    titles = {title.split(",")[0] for title in shown}
    assert titles == {"style", name if explore.font_for(name) else "run 2"}
    assert explore.font_for("łąka") and not [w for w in recwarn if "lyph" in str(w.message)]
    assert "LastResort" not in str(explore.font_for(name))  # matplotlib's font of boxes
