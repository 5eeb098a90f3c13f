"""--generate: images by trained weights into a .npz, a grid or a folder, of the classes chosen."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, flags, load
from PIL import Image
from shared_parts import TOP

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port

pytestmark = pytest.mark.usefixtures("without_curves")


def using(models, path, count):
    """A command line that makes `count` images by `models` into `path`."""
    return ["--generate", str(count), "--checkpoint", str(models), "--save", str(path), "--device", "cpu"]


def generate(script, trained, path, count, *more):
    """The images, and the labels if there are any, of a .npz that is made at `path`."""
    script.main([*using(trained / "models.pth", path, count), *map(str, more)])
    with np.load(path) as arrays:
        return arrays["images"], arrays.get("labels")


@pytest.fixture(scope="session")
def contrasty(trained):
    """The run folder with a generator of larger weights: so early, it makes grey of any noise."""
    for name in "models.pth", "checkpoint.pt":
        saved = load(trained / name)
        for value in saved["Generator"].values():
            value.mul_(30 if value.ndim > 1 else 1)
        (trained.parent / "contrasty").mkdir(exist_ok=True)
        torch.save(saved, trained.parent / "contrasty" / name)
    return trained.parent / "contrasty"


@pytest.fixture(scope="session")
def conditional(root, tmp_path_factory):
    """A run folder of fashion_keras_port.py whose networks are given the class."""
    out = tmp_path_factory.mktemp("conditional") / "run"
    more = "--steps 2 --conditional --arch style".split()
    fashion_keras_port.main(flags(fashion_keras_port, root, out, *more))
    return out


def test_grey_images_have_no_third_dimension(root, tmp_path):
    dcgan.main(flags(dcgan, root, tmp_path / "run", "--steps", 1, "--channels", 1))
    images, _ = generate(dcgan, tmp_path / "run", tmp_path / "g.npz", 3)
    assert images.shape == (3, 32, 32)


@pytest.mark.parametrize("count", [1, 64, 130])
def test_npz_has_what_the_averaged_generator_makes(script, count, contrasty, tmp_path, capsys):
    """Bytes, as many as asked for, the same as by the two lines that README shows."""
    images, labels = generate(script, contrasty, tmp_path / "g.npz", count)
    colour = script in (dcgan, cspup128)
    size = {dcgan: 32, cspup128: 128}.get(script, 28)
    assert images.shape == (count, size, size, *[3] * colour) and images.dtype == np.uint8
    assert f"{count} images: {tmp_path / 'g.npz'}" in capsys.readouterr().out
    config = load(contrasty / "models.pth")["config"]
    G = script.make_networks(script.argparse.Namespace(**config))[0]
    G.load_state_dict(load(contrasty / "models.pth")["Generator"])
    z = torch.randn(count, script.Z_DIM, generator=torch.Generator().manual_seed(0))
    if script is cgan_residual:
        assert labels.dtype == np.int64 and np.array_equal(labels, np.arange(count) * 4 // count)
        z = torch.cat([torch.eye(4)[labels], z], 1)
    else:
        assert labels is None
    with torch.no_grad():
        expected = (G.eval()(z).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    differs = np.abs(expected - images.reshape(expected.shape)) > 1
    assert differs.mean() < 0.01  # rounding in batches of another size, which such weights make more of


def test_images_follow_from_the_seed_and_the_checkpoint_gives_the_same(script, contrasty, tmp_path):
    def images(*more):
        return generate(script, contrasty, tmp_path / "images.npz", 9, *more)[0]

    first = images()
    assert first.std() > 20
    assert np.array_equal(first, images("--checkpoint", contrasty / "checkpoint.pt"))
    assert np.array_equal(first, images(*TINY[script]))  # flags that agree
    assert not np.array_equal(first, images("--seed", 1))


def test_without_a_checkpoint_named_it_is_the_run_folders(script, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / script.SCRIPT)
    script.main(["--generate", "3"])
    with np.load("generated.npz") as arrays:
        assert len(arrays["images"]) == 3
    names = [{path.name for path in run.rglob("*")} for run in (trained, tmp_path / "runs" / script.SCRIPT)]
    assert names[0] == names[1]


@pytest.mark.parametrize("path", sorted((TOP / "weights").glob("*.pth")), ids=lambda path: path.stem)
def test_published_weights_make_images(path, tmp_path):
    """Trained with earlier versions of the scripts, whose flags had other names."""
    script = importlib.import_module(path.stem)
    script.main(using(path, tmp_path / "images.npz", 4))
    with np.load(tmp_path / "images.npz") as arrays:
        assert len(arrays["images"]) == 4 and arrays["images"].std() > 20


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (4, 2, 2), (10, 4, 3)])
def test_png_is_a_grid_and_a_folder_has_each_image_of_the_same(
    script, count, columns, rows, contrasty, tmp_path
):
    images, labels = generate(script, contrasty, tmp_path / "g.npz", count)
    for name in "g.png", "g":
        script.main(using(contrasty / "models.pth", tmp_path / name, count))
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    side = images.shape[1]
    assert grid.shape[:2] == (rows * (side + 2) + 2, columns * (side + 2) + 2) or count == 1
    files = sorted((tmp_path / "g").rglob("*.png"), key=lambda path: path.name)
    assert [path.stem for path in files] == [f"{i:06d}" for i in range(count)]
    for i, (path, image) in enumerate(zip(files, images)):
        assert np.array_equal(np.asarray(Image.open(path)), image)
        assert path.parent == (tmp_path / "g" if labels is None else tmp_path / "g" / "abcd"[labels[i]])
        top, left = (0, 0) if count == 1 else (2 + place * (side + 2) for place in divmod(i, columns))
        part = grid[top : top + side, left : left + side]
        assert np.array_equal(part if image.ndim == 3 else part[..., 0], image)


def test_a_folder_of_generated_classes_is_data(conditional, tmp_path):
    """As a training set: its classes are the model's."""
    fashion_keras_port.main(using(conditional / "models.pth", tmp_path / "set", 20))
    cgan_residual.main(flags(cgan_residual, tmp_path, tmp_path / "run", "--steps", 1))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_names"] == list("abcd")


LABELS = [
    ("2", 5, [2] * 5),
    ("c,a", 5, [2, 2, 2, 0, 0]),
    ("3, 1", 4, [3, 3, 1, 1]),
    ("D", 2, [3, 3]),
    ("0,1,2,3", 2, [0, 2]),
]
NAMES = [  # the model's classes, --labels, the classes made or None
    (["1", "2", "3"], "1", [0]),
    (["1", "2", "3"], "3,1", [2, 0]),
    (["1", "2", "3"], "0", None),
    (["0", "2", "1"], "1,2", [2, 1]),
    (["7", "cat"], "1", None),
    (["7", "cat"], "cat,7", [1, 0]),
    (["red, blue", "cat"], "red, blue", [0]),
    (["red, blue", "cat"], '"red, blue",cat', [0, 1]),
    (["red, blue", "cat"], "cat", [1]),
    (["red, blue", "cat"], "0,1", [0, 1]),
    (["a", "b", "a,b"], "a,b", [2]),
    (["a", "b", "a,b"], "b,a", [1, 0]),
    ([" cat", "dog "], " cat,dog ", [0, 1]),
    ([" cat", "dog "], "dog,cat", [1, 0]),
    (["A", "a"], "a,A", [1, 0]),
    (["Cat", "Dog"], "dog", [1]),
    (["Blue", "blue"], "BLUE", None),
    (["1.0", "2.0"], "1", None),
    (["-1", "+1"], "1", None),
    (["-1", "+1"], "+1,-1", [1, 0]),
    (["blue", "red, round"], 'blue, "red, round"', [0, 1]),
    (["class 2", "n01"], "1,0", [1, 0]),
    (["Bu\u0308cher", "x"], "B\u00fccher", [0]),
    (["B\u00fccher", "x"], "bu\u0308cher", [0]),
    (["猫", "犬"], "犬,猫", [1, 0]),
    (["T-shirt or top", "Bag"], "t-shirt or top,1", [0, 1]),
]


@pytest.mark.parametrize("names, labels, expected", NAMES)
def test_what_can_be_asked_for_is_what_is_named(names, labels, expected, capsys):
    """Exactly, or but for case, spaces and the way letters are written; by number where no name is one."""
    args = fashion_keras_port.parse(["--labels", labels])[0]
    args.class_names = names
    if expected is None:
        with pytest.raises(SystemExit, match=re.escape(", ".join(names))):
            fashion_keras_port.chosen_labels(args, len(names))
    else:
        found = fashion_keras_port.chosen_labels(args, len(expected))
        assert found.argmax(1).tolist() == expected and found.shape[1] == len(names)


FORMATS = [
    ("g.NPZ", "npz"),
    ("g.npz", "npz"),
    ("g.PNG", "png"),
    ("g.jpeg", "jpeg"),
    ("g.webp", "webp"),
    ("v1.5/", "folder"),
    ("x.npy/", "folder"),
    ("g", "folder"),
    ("g.npy", None),
    ("g.zip", None),
    ("g.pt", None),
    ("g.pth", None),
    ("g.psd", None),
    ("g.mp4", None),
    ("g.npz.gz", None),
    ("v1.5", None),
]


@pytest.mark.parametrize("name, kind", FORMATS)
def test_the_name_says_the_format_or_is_refused(name, kind, trained, script, tmp_path, fails):
    argv = using(trained / "models.pth", f"{tmp_path}/{name}", 3)
    path = tmp_path / name
    if kind is None:
        line = fails(script, *argv)
        assert str(path) in line and ".npz" in line and not list(tmp_path.iterdir())
        return
    script.main(argv)
    if kind == "npz":
        with np.load(path) as arrays:
            assert len(arrays["images"]) == 3
    elif kind == "folder":
        assert len(list(path.rglob("*.png"))) == 3
    else:
        assert Image.open(path).format.lower() == kind
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("inside", ["000000.png", "a/000000.png", "notes.txt", ".hidden"])
def test_a_folder_with_something_in_it_is_not_added_to(inside, trained, script, tmp_path, fails):
    (tmp_path / "g" / inside).parent.mkdir(parents=True)
    (tmp_path / "g" / inside).write_text("of another model")
    line = fails(script, *using(trained / "models.pth", tmp_path / "g", 3))
    assert str(tmp_path / "g") in line and len([p for p in (tmp_path / "g").rglob("*") if p.is_file()]) == 1


def test_an_empty_folder_is_filled(trained, script, tmp_path):
    script.main(using(trained / "models.pth", tmp_path, 2))
    assert len(list(tmp_path.rglob("*.png"))) == 2


@pytest.mark.parametrize("labels, count, expected", LABELS)
def test_classes_are_chosen_by_number_or_name(labels, count, expected, conditional, tmp_path):
    images, found = generate(fashion_keras_port, conditional, tmp_path / "g.npz", count, "--labels", labels)
    assert found.tolist() == expected and found.dtype == np.int64
    of_all_classes, _ = generate(fashion_keras_port, conditional, tmp_path / "all.npz", count)
    assert not np.array_equal(images, of_all_classes) or expected == [0, 2]


@pytest.mark.parametrize("labels", ["4", "-1", "x", "3,,1", "3;1", "1,", "1.5", "²"])
def test_classes_that_the_model_has_not(labels, conditional, tmp_path, fails):
    argv = using(conditional / "models.pth", tmp_path / "g.npz", 4)
    line = fails(fashion_keras_port, *argv, f"--labels={labels}")
    assert "--labels" in line and "a, b, c, d" in line and not (tmp_path / "g.npz").exists()


def test_classes_of_a_model_that_has_none(root, tmp_path, fails):
    fashion_keras_port.main(flags(fashion_keras_port, root, tmp_path, "--steps", 1))
    argv = using(tmp_path / "models.pth", tmp_path / "g.npz", 4)
    line = fails(fashion_keras_port, *argv, "--labels", "1")
    assert "--labels" in line and "--conditional" in line


def test_each_class_has_as_many_samples_in_order(conditional):
    """Ten a row: of the four classes each has a quarter of the hundred."""
    saved = load(conditional / "models.pth")
    args = fashion_keras_port.argparse.Namespace(**saved["config"])
    z = fashion_keras_port.draw_z(args, 100)
    assert z[:, :4].argmax(1).tolist() == [i // 25 for i in range(100)] and (z[:, :4].sum(1) == 1).all()
