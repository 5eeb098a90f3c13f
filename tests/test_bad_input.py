"""What the user can mend ends with status 2 and one line that begins with "error: ", and breaks nothing."""

import pickle
import shutil
import tarfile
import zipfile

import pytest
import torch
from conftest import TINY, flags, load

import cspup128
import dcgan
import fashion_keras_port

pytestmark = pytest.mark.usefixtures("without_curves")

# Flags


@pytest.mark.parametrize(
    "flag",
    [
        "--steps 0",
        "--steps -1",
        "--steps many",
        "--epochs 0",
        "--batch-size 0",
        "--batch-size -4",
        "--width 0",
        "--lr nan",
        "--lr -1",
        "--lr fast",
        "--d-lr inf",
        "--lr-decay-from -1",
        "--betas 0.5",
        "--betas 0.5 1",
        "--ema 1",
        "--minutes -1",
        "--save-every soon",
        "--keep-every 0",
        "--logger tensorbored",
        "--seed x",
        "--device tpu",
        "--precision fp8",
        "--generate 0",
        "--no-such-flag",
        "stray",
        "--classes",
        "--data",
    ],
)
def test_a_flag_that_cannot_be(script, flag, root, tmp_path, fails):
    line = fails(script, *flags(script, root, tmp_path / "run"), *flag.split())
    assert flag.split()[0] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "script, argv",
    [
        (cspup128, "--gamma -1"),
        (cspup128, "--scheme exact --gamma -1"),
        (cspup128, "--scheme exact --gamma 3"),
        (cspup128, "--scheme exact --loss hinge"),
        (cspup128, "--scheme exact --up nearest"),
        (fashion_keras_port, "--loss wgan-gp --gamma 0"),
    ],
    ids=lambda value: getattr(value, "SCRIPT", value),
)
def test_flags_that_do_not_go_together(script, argv, root, tmp_path, fails):
    line = fails(script, *flags(script, root, tmp_path / "run"), *argv.split())
    assert argv.split()[-2] in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [-1, 20240101123456, 2**63, 10**30])
def test_a_seed_of_any_size_trains(seed, root, tmp_path):
    dcgan.main(flags(dcgan, root, tmp_path, "--steps", 1, "--seed", seed))
    assert load(tmp_path / "checkpoint.pt")["step"] == 1


@pytest.mark.parametrize("count", [39, 41, 64])
def test_a_batch_larger_than_the_set(script, count, root, tmp_path, fails):
    argv = flags(script, root, tmp_path / "run", "--steps", 1, "--batch-size", count)
    if count > 40:
        line = fails(script, *argv)
        assert "40 images" in line and str(count) in line and "--batch-size" in line
        assert not (tmp_path / "run").exists()
    else:
        script.main(argv)


# Data


def table(path, root):
    path.write_text("a,b\n1,2\n")


def empty_folder(path, root):
    path.mkdir()


def broken_folder(path, root):
    path.mkdir()
    for name in "a.jpg", "b.png", "c.txt":
        (path / name).write_text("no image\n")


def empty_zip(path, root):
    zipfile.ZipFile(path, "w").close()


def broken_zip(path, root):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.png", "no image\n")


def cut_zip(path, root):
    shutil.make_archive(str(path.with_suffix("")), "zip", root / "set")
    path.write_bytes(path.read_bytes()[:-4000])


def tar(path, root):
    tarfile.open(path, "w:gz").close()


def one_image(path, root):
    shutil.copy(root / "set" / "a" / "0.png", path)


def not_to_be_read(path, root):
    path.symlink_to("/proc/1/mem")


DATA = {
    "nothing": (lambda path, root: None, "x", "x"),
    "no zip": (table, "x.zip", "zip"),
    "table": (table, "x.csv", "a folder, a .zip"),
    "empty folder": (empty_folder, "x", "no images"),
    "broken folder": (broken_folder, "x", "0 images in 3 files"),
    "empty zip": (empty_zip, "x.zip", "no images"),
    "broken zip": (broken_zip, "x.zip", "0 images in 1 files"),
    "cut zip": (cut_zip, "x.zip", "zip"),
    "tar": (tar, "x.tar.gz", "a folder, a .zip"),
    "one image": (one_image, "x.png", "a folder, a .zip"),
    "not to be read": (not_to_be_read, "x.zip", "x.zip"),
}


@pytest.mark.parametrize("make, name, words", DATA.values(), ids=DATA)
def test_data_that_cannot_be_used(make, name, words, root, tmp_path, fails):
    make(tmp_path / name, root)
    argv = flags(dcgan, root, tmp_path / "run", "--data", tmp_path / name, "--root", tmp_path / "root")
    line = fails(dcgan, *argv)
    assert words in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "data, name", [("celeba", "CelebA"), ("mnist", "MNIST"), ("fashion", "FashionMNIST")]
)
def test_a_download_that_fails(script, data, name, tmp_path, monkeypatch, fails):
    def no_download(*given, **options):
        raise RuntimeError("the quota of the day is used up\nmore")

    monkeypatch.setattr(f"torchvision.datasets.{name}", no_download)
    places = "--root", tmp_path / "root", "--out", tmp_path / "run"
    line = fails(script, *TINY[script], "--data", data, *places)
    assert "quota" in line and "img_align_celeba.zip" in line and str(tmp_path / "root") in line


def test_classes_that_are_not_there(script, root, tmp_path, fails):
    line = fails(script, *flags(script, root, tmp_path, "--classes", "a", "cows"))
    assert "cows" in line and "'a', 'b', 'c', 'd'" in line


# Checkpoints


class Code:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def changed(trained, path, drop=(), **config):
    """A copy of models.pth with another config, or without some of its parts or of its config's."""
    saved = load(trained / "models.pth")
    saved["config"].update(config)
    for name in drop:
        saved.pop(name, None)
        if "config" in saved:
            saved["config"].pop(name, None)
    torch.save(saved, path)


CHECKPOINTS = {
    "missing": lambda trained, path: None,
    "empty": lambda trained, path: path.write_bytes(b""),
    "cut short": lambda trained, path: path.write_bytes((trained / "checkpoint.pt").read_bytes()[:5000]),
    "cut at the end": lambda trained, path: path.write_bytes((trained / "checkpoint.pt").read_bytes()[:-100]),
    "text": lambda trained, path: path.write_text("not a checkpoint\n"),
    "a folder": lambda trained, path: path.mkdir(),
    "of another script": lambda trained, path: changed(trained, path, script="stylegan"),
    "only a tensor": lambda trained, path: torch.save(torch.ones(3), path),
    "of something else": lambda trained, path: torch.save({"model": {}}, path),
    "no config": lambda trained, path: changed(trained, path, drop=["config"]),
    "no settings": lambda trained, path: changed(trained, path, drop=["width"]),
    "other weights": lambda trained, path: changed(trained, path, width=5),
    "no weights": lambda trained, path: changed(trained, path, drop=["Generator", "G"]),
    "code": lambda trained, path: torch.save({"config": Code(path.with_name("ran"))}, path),
    "code, pickled": lambda trained, path: path.write_bytes(pickle.dumps(Code(path.with_name("ran")))),
}


@pytest.mark.parametrize("use", ["generate", "resume"])
@pytest.mark.parametrize("make", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(script, make, use, trained, tmp_path, fails):
    """Nothing of it is run, nothing is written beside it, and the file stays as it was."""
    path = tmp_path / "checkpoint.pt"
    make(trained, path)
    (tmp_path / "ran").unlink(missing_ok=True)
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    if use == "generate":
        fails(script, "--generate", 4, "--checkpoint", path, "--save", tmp_path / "g.npz")
    elif path.exists():
        fails(script, "--resume", "--out", tmp_path, "--steps", 9)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_code_in_a_checkpoint_would_run_if_it_were_loaded_carelessly(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("more", ["--width 3", "--batch-size 4", "--generate -1"])
def test_flags_other_than_the_checkpoints(script, more, trained, tmp_path, fails):
    places = "--checkpoint", trained / "models.pth", "--save", tmp_path / "g.npz"
    line = fails(script, "--generate", 4, *places, *more.split())
    assert more.split()[0] in line and not (tmp_path / "g.npz").exists()


# Places that cannot be written


@pytest.mark.parametrize("flag", ["--out", "--root"])
@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made(script, flag, place, root, tmp_path, fails):
    """A file in its place, or a place where nothing can be made, as a read-only disk is."""
    (tmp_path / "file").write_text("a file\n")
    line = fails(script, *flags(script, root, tmp_path / "run", "--steps", 1), flag, tmp_path / place)
    assert str(tmp_path / place).split("/")[1] in line and flag in line


@pytest.mark.parametrize("name", ["file/g.npz", "file/g.png", "file/g"])
def test_generated_images_that_cannot_be_saved(script, name, trained, tmp_path, fails):
    (tmp_path / "file").write_text("a file\n")
    line = fails(script, "--generate", 2, "--checkpoint", trained / "models.pth", "--save", tmp_path / name)
    assert str(tmp_path / "file") in line and "--save" in line


def test_a_gpu_whose_memory_is_too_small(script, root, tmp_path, monkeypatch, fails):
    def too_much(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr(script, "train_step", too_much)
    assert "CUDA out of memory" in fails(script, *flags(script, root, tmp_path, "--steps", 1))
