"""--generate: pictures by trained weights into a .npz, a grid or a folder, of the classes asked for."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, flags, load
from PIL import Image

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port


def generate(script, trained, path, count, *more):
    """The images, and the labels if there are any, of a .npz that is made at `path`."""
    argv = ["--generate", count, "--checkpoint", trained / "models.pth", "--save", path, "--device", "cpu",
            *more]
    script.main(list(map(str, argv)))
    with np.load(path) as made: return made["images"], made.get("labels")


@pytest.fixture(scope="session")
def contrasty(trained):
    """The run folder, whose generator has larger weights: so early, it makes grey of any noise."""
    for name in "models.pth", "checkpoint.pt":
        saved = load(trained / name)
        for value in saved["Generator"].values(): value.mul_(30 if value.ndim > 1 else 1)
        (trained.parent / "contrasty").mkdir(exist_ok=True)
        torch.save(saved, trained.parent / "contrasty" / name)
    return trained.parent / "contrasty"


@pytest.fixture(scope="session")
def bags(root, tmp_path_factory):
    """A run folder of fashion_keras_port.py that is told the class."""
    out = tmp_path_factory.mktemp("bags") / "run"
    fashion_keras_port.main(flags(fashion_keras_port, root, out, "--steps", 2, "--conditional", "--arch",
                                  "style"))
    return out


def test_grey_pictures_have_no_third_dimension(root, tmp_path):
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
    assert f"{count} pictures: {tmp_path / 'g.npz'}" in capsys.readouterr().out
    config = load(contrasty / "models.pth")["config"]
    G = script.make_networks(script.argparse.Namespace(**config))[0]
    G.load_state_dict(load(contrasty / "models.pth")["Generator"])
    z = torch.randn(count, script.Z, generator=torch.Generator().manual_seed(0))
    if script is cgan_residual:
        assert labels.dtype == np.int64 and np.array_equal(labels, np.arange(count) * 4 // count)
        z = torch.cat([torch.eye(4)[labels], z], 1)
    else:
        assert labels is None
    with torch.no_grad(): made = G.eval()(z).permute(0, 2, 3, 1).numpy()
    apart = np.abs((made + 1) * 127.5 - images.reshape(made.shape))
    assert (apart > 1).mean() < 0.01  # rounding in batches of another size, which such weights make more of


def test_pictures_follow_from_the_seed_and_the_checkpoint_gives_the_same(script, contrasty, tmp_path):
    first = generate(script, contrasty, tmp_path / "a.npz", 9)[0]
    assert np.array_equal(first, generate(script, contrasty, tmp_path / "b.npz", 9, "--checkpoint",
                                          contrasty / "checkpoint.pt")[0])
    assert np.array_equal(first, generate(script, contrasty, tmp_path / "c.npz", 9,
                                          *TINY[script])[0])  # flags that agree
    assert not np.array_equal(first, generate(script, contrasty, tmp_path / "d.npz", 9, "--seed", 1)[0])
    assert first.std() > 20


def test_without_a_checkpoint_named_it_is_the_run_folders(script, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / script.SCRIPT)
    script.main(["--generate", "3"])
    with np.load("generated.npz") as made: assert len(made["images"]) == 3
    made = [{path.name for path in run.rglob("*")} for run in (trained, tmp_path / "runs" / script.SCRIPT)]
    assert made[0] == made[1]


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (4, 2, 2), (10, 4, 3)])
def test_png_is_a_grid_and_a_folder_has_each_picture_of_the_same(script, count, columns, rows, contrasty,
                                                                 tmp_path):
    images, labels = generate(script, contrasty, tmp_path / "g.npz", count)
    use = ["--generate", str(count), "--checkpoint", str(contrasty / "models.pth"), "--save"]
    script.main([*use, str(tmp_path / "g.png")])
    script.main([*use, str(tmp_path / "g")])
    grid, side = np.asarray(Image.open(tmp_path / "g.png")), images.shape[1]
    assert grid.shape[:2] == (rows * (side + 2) + 2, columns * (side + 2) + 2) or count == 1
    files = sorted((tmp_path / "g").rglob("*.png"), key=lambda path: path.name)
    assert [path.stem for path in files] == [f"{i:06d}" for i in range(count)]
    for i, (path, image) in enumerate(zip(files, images)):
        assert np.array_equal(np.asarray(Image.open(path)), image)
        assert path.parent == (tmp_path / "g" if labels is None else tmp_path / "g" / "abcd"[labels[i]])
        top, left = (0 if count == 1 else 2 + place * (side + 2) for place in divmod(i, columns))
        part = grid[top : top + side, left : left + side]
        assert np.array_equal(part if image.ndim == 3 else part[..., 0], image)


def test_a_folder_of_generated_classes_is_data(bags, tmp_path):
    """As a training set: its classes are those that were asked for."""
    fashion_keras_port.main(["--generate", "20", "--checkpoint", str(bags / "models.pth"), "--save",
                             str(tmp_path / "set")])
    cgan_residual.main(flags(cgan_residual, tmp_path, tmp_path / "run", "--steps", 1))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["names"] == list("abcd")


LABELS = [("2", 5, [2] * 5), ("c,a", 5, [2, 2, 2, 0, 0]), ("3, 1", 4, [3, 3, 1, 1]), ("D", 2, [3, 3]),
          ("0,1,2,3", 2, [0, 2])]


@pytest.mark.parametrize("labels, count, expected", LABELS)
def test_classes_are_asked_for_by_number_or_name(labels, count, expected, root, bags, tmp_path):
    images, made = generate(fashion_keras_port, bags, tmp_path / "g.npz", count, "--labels", labels)
    assert made.tolist() == expected and made.dtype == np.int64
    everything, _ = generate(fashion_keras_port, bags, tmp_path / "all.npz", count)
    assert not np.array_equal(images, everything) or expected == [0, 2]


@pytest.mark.parametrize("labels", ["4", "-1", "x", "3,,1", "3;1", "1,", "1.5", "²"])
def test_classes_that_the_model_has_not(labels, bags, tmp_path, fails):
    line = fails(fashion_keras_port, "--generate", 4, "--checkpoint", bags / "models.pth", "--save",
                 tmp_path / "g.npz",
                 f"--labels={labels}")
    assert "--labels" in line and "a, b, c, d" in line and not (tmp_path / "g.npz").exists()


def test_a_model_that_is_told_no_class(root, tmp_path, fails):
    fashion_keras_port.main(flags(fashion_keras_port, root, tmp_path, "--steps", 1))
    line = fails(fashion_keras_port, "--generate", 4, "--checkpoint", tmp_path / "models.pth", "--labels",
                 "1")
    assert "--labels" in line and "--conditional" in line


def test_samples_have_a_class_in_each_row_and_dropout_and_noise_are_off(root, bags):
    """Ten a row: of the four classes each has a quarter of the hundred, in order."""
    saved = load(bags / "models.pth")
    args = fashion_keras_port.argparse.Namespace(**saved["config"])
    z = fashion_keras_port.draw_z(args, 100)
    assert z[:, :4].argmax(1).tolist() == [i // 25 for i in range(100)] and (z[:, :4].sum(1) == 1).all()
