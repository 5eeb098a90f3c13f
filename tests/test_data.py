"""Pictures in: what is packed, what is left out and said so, and how batches and augmentation use it."""
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cspup128

SIZE = cspup128.SIZE
RED, GREEN, BLUE, WHITE, TAN = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (200, 140, 60)


def arguments(*argv):
    """The arguments that a command line gives."""
    return cspup128.parse(list(map(str, argv)))[0]


def pack(data, root, *argv):
    """The pack of --data, kept below root."""
    return cspup128.load_pack(arguments("--data", data, "--root", root, *argv))


def pack_one(image, path, **options):
    """A picture saved and packed alone: uint8 SIZE,SIZE,3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    (picture,) = pack(path.parent, path.parents[1] / "root")
    return picture


def solid(path, colour, size=(20, 20)):
    """A file with a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def halves(left, right, mode="RGB", size=(64, 64)):
    """A picture with one value in its left half and one in its right half."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def zipped(folder):
    """The folder as a .zip file beside it."""
    return Path(shutil.make_archive(str(folder), "zip", folder))


def only_pack(root):
    """The one pack that is kept below root."""
    (path,) = Path(root, ".packed").glob("*.npy")
    return path


def assert_near(picture, *expected, tolerance=0):
    """The middle of the left and of the right half have these colours (or both this one)."""
    for colour, x in zip((expected * 2)[:2], (SIZE // 4, 3 * SIZE // 4)):
        assert np.abs(picture[SIZE // 2, x].astype(int) - colour).max() <= tolerance, (picture[SIZE // 2, x], colour)


def palette(transparent=None):
    """A palette picture, left half entry 0 and right half entry 1; one entry may be transparent."""
    image = halves(0, 1, "P")
    image.putpalette([*TAN, *BLUE])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


# One picture of each kind

KINDS = {
    "jpeg": (halves(TAN, BLUE), "a.jpg", {"quality": 95}, (TAN, BLUE), 6),
    "upper case name": (halves(TAN, BLUE), "A.JPEG", {"quality": 95}, (TAN, BLUE), 6),
    "bmp": (halves(TAN, BLUE), "a.bmp", {}, (TAN, BLUE), 0),
    "webp": (halves(TAN, BLUE), "a.webp", {"lossless": True}, (TAN, BLUE), 0),
    "grey": (halves(10, 77, "L"), "a.png", {}, ((10,) * 3, (77,) * 3), 0),
    "grey jpeg": (halves(10, 77, "L"), "a.jpg", {"quality": 95}, ((10,) * 3, (77,) * 3), 4),
    "one bit": (halves(0, 1, "1"), "a.png", {}, ((0,) * 3, WHITE), 0),
    "16-bit grey": (halves(257 * 100, 65535, "I;16"), "a.png", {}, ((100,) * 3, WHITE), 0),
    "16-bit grey, dark": (halves(0, 257 * 3, "I;16"), "a.tif", {}, ((0,) * 3, (3,) * 3), 0),
    "palette": (palette(), "a.png", {}, (TAN, BLUE), 0),
    "palette with transparency": (palette(0), "a.png", {"transparency": 0}, (WHITE, BLUE), 0),
    "rgba": (halves((0, 0, 255, 0), (255, 0, 0, 128), "RGBA"), "a.png", {}, (WHITE, (255, 127, 127)), 1),
    "grey with alpha": (halves((0, 0), (40, 255), "LA"), "a.png", {}, (WHITE, (40,) * 3), 0),
    "colour key": (halves(TAN, BLUE), "a.png", {"transparency": BLUE}, (TAN, WHITE), 0),
    "cmyk jpeg": (halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "a.jpg", {"quality": 95}, (RED, BLUE), 6),
    "one pixel": (Image.new("RGB", (1, 1), TAN), "a.png", {}, (TAN,), 0),
    "one pixel high": (Image.new("RGB", (500, 1), TAN), "a.png", {}, (TAN,), 0),
}


@pytest.mark.parametrize("image, name, options, expected, tolerance", KINDS.values(), ids=KINDS)
def test_kind_of_picture(image, name, options, expected, tolerance, tmp_path):
    picture = pack_one(image, tmp_path / "set" / name, **options)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert_near(picture, *expected, tolerance=tolerance)


TURNED = [(1, (RED, BLUE)), (2, (BLUE, RED)), (3, (BLUE, RED)), (6, (RED, BLUE)), (8, (BLUE, RED))]


@pytest.mark.parametrize("orientation, turned", TURNED)
def test_exif_orientation_is_applied(orientation, turned, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = pack_one(halves(RED, BLUE), tmp_path / "set" / "a.jpg", quality=95, exif=exif)
    across = picture.swapaxes(0, 1) if orientation >= 5 else picture  # 6 and 8 turn left and right to top and bottom
    assert_near(across, *turned, tolerance=8)


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (30, 30), colour) for colour in (RED, GREEN, BLUE)]
    picture = pack_one(frames[0], tmp_path / "set" / "a.gif", save_all=True, append_images=frames[1:])
    assert_near(picture, RED)


# Geometry

@pytest.mark.parametrize("size", [(200, SIZE), (SIZE, 200), (SIZE, SIZE), (255, SIZE + 1)])
def test_centre_square_is_cut_out(size, tmp_path):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([x, y, 0 * x], 2).astype(np.uint8)
    picture = pack_one(Image.fromarray(pixels), tmp_path / "set" / "a.png").astype(int)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    across = (np.arange(SIZE) + 0.5) * side / SIZE - 0.5
    assert np.abs(picture[..., 0] - (left + across)[None]).max() <= 0.5 + 1e-6
    assert np.abs(picture[..., 1] - (top + across)[:, None]).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("upright", [False, True])
def test_middle_third_of_three(upright, tmp_path):
    pixels = np.repeat(np.array([RED, GREEN, BLUE], np.uint8), 100, 0)[None].repeat(100, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1) if upright else pixels))
    picture = pack_one(image, tmp_path / "set" / "a.png")
    assert (picture[4:-4, 4:-4] == GREEN).all()


def test_fast_decoding_of_a_large_jpeg_keeps_the_content(tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    large = Image.fromarray(small).resize((1024, 768), Image.BICUBIC)
    fast = pack_one(large, tmp_path / "jpeg" / "set" / "a.jpg", quality=95)
    with Image.open(tmp_path / "jpeg" / "set" / "a.jpg") as image:
        image.load()
        full = pack_one(image, tmp_path / "png" / "set" / "a.png")
    assert np.abs(fast.astype(int) - full).mean() < 3
    assert full.std() > 30


def test_large_picture_is_reduced_without_aliasing(tmp_path):
    stripes = np.zeros((1280, 1280, 3), np.uint8)
    stripes[:, ::2] = 255
    picture = pack_one(Image.fromarray(stripes), tmp_path / "set" / "a.png")
    assert np.abs(picture[4:-4, 4:-4].astype(int) - 127.5).max() < 8


# What is left out

def png_of(side):
    """A whole black 1-bit PNG of this many pixels a side, some kilobytes on disk."""
    rows = zlib.compressobj(1)
    data = b"".join(rows.compress(bytes(1 + side // 8)) for _ in range(side)) + rows.flush()
    parts = (b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def cut_jpeg(folder):
    """The first half of a JPEG's bytes."""
    path = folder / "whole"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path, "JPEG")
    data = path.read_bytes()
    path.unlink()
    return data[: len(data) // 2]


@pytest.fixture
def mixed(tmp_path):
    """A folder with two good pictures, four broken ones, and what has to be passed over."""
    folder = tmp_path / "mixed"
    for name, colour in ("good.png", TAN), ("deep/down/good.jpg", BLUE):
        solid(folder / name, colour)
    (folder / "cut.jpg").write_bytes(cut_jpeg(tmp_path))
    (folder / "deep" / "enormous.png").write_bytes(png_of(20_000))
    (folder / "text.jpg").write_text("no picture\n")
    (folder / "deep" / "nothing.png").write_bytes(b"")
    for name in "__MACOSX/good.png", "__MACOSX/deep/._good.png", ".hidden.png", ".cache/good.png", "deep/.x.jpg":
        solid(folder / name, RED)
    (folder / "notes.txt").write_text("no picture either\n")
    return folder


BROKEN = "cut.jpg", "deep/enormous.png", "deep/nothing.png", "text.jpg"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_broken_pictures_are_left_out_and_reported(kind, mixed, tmp_path, capsys):
    found = pack(zipped(mixed) if kind == "zip" else mixed, tmp_path / "root")
    assert len(found) == 2
    assert_near(found[0], BLUE, tolerance=3)  # deep/down/good.jpg, then good.png
    assert_near(found[1], TAN)
    (report,) = (tmp_path / "root" / ".packed").glob("*.txt")
    lines = dict(map(json.loads, report.read_text().splitlines()))
    assert sorted(lines) == sorted(BROKEN) and all(lines.values())
    assert "exceeds limit" in lines["deep/enormous.png"]
    out = capsys.readouterr().out
    assert "4 of 6 pictures cannot be read and are left out" in out and str(report) in out


def test_left_out_is_said_again_when_the_pack_is_reused(mixed, tmp_path, capsys):
    pack(mixed, tmp_path / "root")
    first = capsys.readouterr().out
    pack(mixed, tmp_path / "root")
    assert capsys.readouterr().out == first != ""


def test_nothing_is_said_when_all_can_be_read(tmp_path, capsys):
    solid(tmp_path / "set" / "a.png", TAN)
    pack(tmp_path / "set", tmp_path / "root")
    assert capsys.readouterr().out == ""
    assert [path.suffix for path in (tmp_path / "root" / ".packed").iterdir()] == [".npy"]


def test_broken_picture_whose_name_is_not_text_is_left_out(tmp_path):
    solid(tmp_path / "set" / "good.png", TAN)
    Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/\xff.jpg")).write_text("no picture\n")
    assert len(pack(tmp_path / "set", tmp_path / "root")) == 1


def test_no_pack_is_left_when_every_picture_is_broken(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "text.jpg").write_text("no picture\n")
    with pytest.raises(cspup128.UserError, match="text.jpg"):
        pack(tmp_path / "set", tmp_path / "root")
    assert list((tmp_path / "root" / ".packed").iterdir()) == []


# Folder, zip, classes, reuse

def noise(path, seed):
    """A file with a picture of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(path)


@pytest.fixture
def classes(tmp_path):
    """A folder of five different pictures in nested folders."""
    for seed, name in enumerate(("top", "a/1", "a/2", "b/1", "c/d/1")):
        noise(tmp_path / "classes" / f"{name}.png", seed)
    return tmp_path / "classes"


def test_zip_gives_what_the_folder_gives(classes, tmp_path):
    from_folder, from_zip = pack(classes, tmp_path / "root"), pack(zipped(classes), tmp_path / "root")
    assert len(from_folder) == 5 and np.array_equal(from_folder, from_zip)
    assert len(np.unique(from_folder.reshape(5, -1), axis=0)) == 5


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("wanted, places", [("a", (0, 1)), ("b", (2,)), ("c", (3,)), ("d", (3,)), ("b a", (0, 1, 2))])
def test_classes_are_subfolders(wanted, places, kind, classes, tmp_path):
    everything = pack(classes, tmp_path / "root")  # a/1 a/2 b/1 c/d/1 top
    path = zipped(classes) if kind == "zip" else classes
    assert np.array_equal(pack(path, tmp_path / "root", "--classes", *wanted.split()), everything[list(places)])


def test_pack_is_kept_and_reused(classes, tmp_path):
    first, path = pack(classes, tmp_path / "root").copy(), only_pack(tmp_path / "root")
    before = path.stat()
    assert np.array_equal(pack(classes, tmp_path / "root"), first)
    after = only_pack(tmp_path / "root").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_writing_to_a_pack_does_not_change_the_file(classes, tmp_path):
    first = pack(classes, tmp_path / "root")
    kept = first.copy()
    first[:] = 0
    assert np.array_equal(pack(classes, tmp_path / "root"), kept)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pack_is_built_anew_when_a_picture_changes(kind, classes, tmp_path):
    before = pack(zipped(classes) if kind == "zip" else classes, tmp_path / "root").copy()
    noise(classes / "b" / "1.png", 99)
    after = pack(zipped(classes) if kind == "zip" else classes, tmp_path / "root")
    changed = (before != after).any((1, 2, 3))
    assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("change, count", [(lambda path: (path / "top.png").unlink(), 4),
                                           (lambda path: noise(path / "b" / "2.png", 7), 6)], ids=["gone", "new"])
def test_pack_is_built_anew_when_a_picture_goes_or_comes(change, count, classes, tmp_path):
    assert len(pack(classes, tmp_path / "root")) == 5
    change(classes)
    assert len(pack(classes, tmp_path / "root")) == count


# CelebA and synthetic

def celeba_pictures(place):
    """Three pictures as CelebA has them, in the folder or .zip `place`."""
    folder = place.parent / place.stem
    for i in range(3):
        solid(folder / f"{i:06d}.jpg", TAN, (178, 218))
    if place.suffix == ".zip":
        shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        shutil.rmtree(folder)


def no_download(*args, **options):
    """In place of torchvision's CelebA, where there is no network."""
    raise RuntimeError("quota of the day is used up")


@pytest.mark.parametrize("place", ["celeba/img_align_celeba", "celeba/img_align_celeba.zip",
                                   "img_align_celeba", "img_align_celeba.zip"])
def test_celeba_is_found_below_root(place, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CelebA", no_download)
    celeba_pictures(tmp_path / place)
    assert cspup128.find_celeba(tmp_path) == tmp_path / place
    assert pack("celeba", tmp_path).shape == (3, SIZE, SIZE, 3)


@pytest.mark.parametrize("place", ["celeba-dataset/img_align_celeba/img_align_celeba", "some/deep/img_align_celeba",
                                   "datasets/someone/celeba-dataset/img_align_celeba/img_align_celeba"])
def test_celeba_is_found_in_kaggles_input(place, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CelebA", no_download)
    moved = lambda *parts: tmp_path / "input" if parts == ("/kaggle/input",) else Path(*parts)
    monkeypatch.setattr(cspup128, "Path", moved)
    celeba_pictures(tmp_path / "input" / place)
    assert len(pack("celeba", tmp_path / "root")) == 3


def test_celeba_is_downloaded_when_it_is_nowhere(tmp_path, monkeypatch):
    download = lambda root, download=False: download and celeba_pictures(Path(root, "celeba", "img_align_celeba"))
    monkeypatch.setattr(torchvision.datasets, "CelebA", download)
    assert len(pack("celeba", tmp_path / "root")) == 3


def test_celeba_that_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CelebA", no_download)
    with pytest.raises(cspup128.UserError) as error:
        pack("celeba", tmp_path)
    for place in "celeba/img_align_celeba", "celeba/img_align_celeba.zip", "img_align_celeba.zip":
        assert str(tmp_path / place) in str(error.value)
    for words in "/kaggle/input", "quota of the day", f"put img_align_celeba.zip into {tmp_path / 'celeba'}":
        assert words in str(error.value)


def test_synthetic_pictures_are_reproducible_and_all_different():
    first, again = ([np.asarray(cspup128.draw_picture(i)) for i in range(40)] for _ in range(2))
    assert all(map(np.array_equal, first, again))
    assert len({picture.tobytes() for picture in first}) == 40
    assert min(picture.std() for picture in first) > 10


def test_synthetic_pack_holds_the_drawn_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(cspup128, "SYNTHETIC", 12)
    found = pack("synthetic", tmp_path)
    assert found.shape == (12, SIZE, SIZE, 3)
    for i in 0, 11:
        expected = np.asarray(cspup128.draw_picture(i).resize((SIZE, SIZE), Image.BOX)).astype(int)
        assert np.abs(found[i] - expected).mean() < 4


# Batches

def orders(count, size, steps, seed=0, rank=0, world=1, start=0):
    """The numbers of the pictures in `steps` batches after `start`, steps,size, of a set of `count`."""
    pictures = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3)).copy()
    args = arguments("--batch-size", size, "--seed", seed)
    source = cspup128.batches(pictures, torch.arange(count), args, torch.device("cpu"), rank, world, start)
    batches = torch.stack([batch for (batch,) in itertools.islice(source, steps)])
    assert batches.dtype == torch.uint8 and batches.shape[2:] == (2, 2, 3)
    return batches[:, :, 0, 0, 0].numpy()


def test_every_picture_comes_once_an_epoch_in_a_new_order():
    epochs = orders(20, 4, 15).reshape(3, 20)
    assert (np.sort(epochs) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert tuple(epochs[0]) != tuple(range(20))


def test_rest_of_an_epoch_is_dropped_and_no_picture_comes_twice():
    epochs = orders(23, 4, 60).reshape(12, 20)
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert set(epochs.flat) == set(range(23))  # what one epoch drops, another has


def test_order_follows_from_the_seed():
    assert np.array_equal(orders(20, 4, 10, seed=1), orders(20, 4, 10, seed=1))
    assert not np.array_equal(orders(20, 4, 10, seed=1), orders(20, 4, 10, seed=2))


THREADS = """
import os, argparse, itertools, numpy as np, torch, cspup128
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
torch.rand(1 << 20).add_(1)  # the team of the training itself
before, args = count(), argparse.Namespace(batch_size=20_000, seed=0)
pack, labels = np.zeros((60_000, 2, 2, 1), np.uint8), torch.rand(60_000, 10)
source = cspup128.batches(pack, torch.arange(60_000), args, torch.device("cpu"), 0, 1, 0, (labels,))
list(itertools.islice(source, 4))
print(torch.get_num_threads(), before, count() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_reading_ahead_has_one_thread_and_no_team_of_openmps():
    """Of more OpenMP threads than cores none waits awake any longer: a training took up to half as long again."""
    environment = dict(os.environ, PYTHONPATH=str(Path(cspup128.__file__).parent))
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    threads, before, more = map(int, done.stdout.split()[-3:])
    assert threads == 4 and before >= 4 and more == 1


@pytest.mark.parametrize("start", [1, 4, 5, 7])
def test_batches_go_on_from_any_step(start):
    assert np.array_equal(orders(22, 4, 6, start=start), orders(22, 4, 6 + start)[start:])


def test_labels_come_with_their_pictures():
    pictures = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None, None], (30, 2, 2, 3)).copy()
    labels, more = torch.arange(30) % 7, torch.arange(30.0).view(30, 1) / 2
    args, kept = arguments("--batch-size", 4), torch.arange(3, 30)
    source = cspup128.batches(pictures, kept, args, torch.device("cpu"), 0, 1, 0, (labels, more))
    for batch in itertools.islice(source, 14):  # two epochs and more
        assert isinstance(batch, list) and [len(part) for part in batch] == [4, 4, 4]
        which = batch[0][:, 0, 0, 0].long()
        assert torch.equal(batch[1], which % 7) and torch.equal(batch[2], which[:, None] / 2)


@pytest.mark.parametrize("count", [24, 27])
def test_two_ranks_see_what_one_with_twice_the_batch_sees(count):
    both = [orders(count, 4, 7, rank=rank, world=2) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(both, 1), orders(count, 8, 7))


# What is left open until the pictures are known

@pytest.mark.parametrize("data, count, augment", [
    ("set", 1999, "on"), ("set", 2000, "none"), ("celeba", 500, "on"), ("synthetic", 4096, "none")])
def test_augmentation_is_for_small_sets(data, count, augment):
    args, given = arguments("--data", data), arguments("--data", data, "--augment", "on", "--steps", 7)
    for each in (args, given):
        assert cspup128.settle(each, np.broadcast_to(np.uint8(0), (count, 2, 2, 3)), count // 64) == ()
    assert (args.augment, args.epochs, args.steps, args.flip) == (augment, 20, None, True)
    assert (given.augment, given.epochs, given.steps) == ("on", None, 7)


# To floats, and augmentation

def test_to_float_has_the_range_and_the_layout():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    batch[1, ..., 2] = 255
    x = cspup128.to_float(batch, torch.zeros(2, 8), False)
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.float32
    assert x[0].min() == -1 and x[0].max() == 1 and (x[1, 2] == 1).all()
    assert torch.allclose(x[0, 0], torch.linspace(-1, 1, 256).view(16, 16), atol=1e-6)


def test_to_float_mirrors_those_pictures_whose_number_says_so():
    batch = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8)
    uniform = torch.ones(4, 8) * torch.tensor([0.1, 0.9, 0.49, 0.51])[:, None]
    plain, flipped = (cspup128.to_float(batch, uniform, flip) for flip in (False, True))
    for i, mirrored in enumerate((True, False, True, False)):
        assert torch.equal(flipped[i], plain[i].flip(2) if mirrored else plain[i])
    assert not torch.equal(plain, plain.flip(3))


@pytest.fixture
def uniform():
    """Random numbers for the augmentation of six pictures."""
    return torch.rand(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pictures():
    """Six random pictures in [-1, 1]."""
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_augmentation_keeps_the_shape_and_lets_gradients_through(pictures, uniform):
    pictures.requires_grad_(True)
    out = cspup128.augment(pictures, uniform)
    assert out.shape == pictures.shape and out.isfinite().all()
    out.square().sum().backward()
    assert pictures.grad.isfinite().all()
    assert (pictures.grad.abs().sum((1, 2, 3)) > 0).all()


def test_augmentation_treats_each_picture_on_its_own(pictures, uniform):
    out = cspup128.augment(pictures, uniform)
    for i in range(6):
        alone = cspup128.augment(pictures[i : i + 1], uniform[i : i + 1])
        assert torch.allclose(out[i], alone[0], atol=1e-6)
    same = cspup128.augment(pictures[:1].repeat(6, 1, 1, 1), uniform)
    assert min((same[i] - same[j]).abs().mean() for i, j in itertools.combinations(range(6), 2)) > 0.01


@pytest.mark.parametrize("column", range(1, 8))
def test_each_number_changes_the_picture(column, pictures, uniform):
    other = uniform.clone()
    other[:, column] = (other[:, column] + 0.5) % 1
    changed = (cspup128.augment(pictures, uniform) - cspup128.augment(pictures, other)).abs().mean((1, 2, 3))
    assert (changed > 0.001).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1 - 2**-24])
def test_augmentation_stays_finite_at_the_ends(value, pictures):
    out = cspup128.augment(pictures, torch.full((6, 8), value))
    assert out.shape == pictures.shape and out.isfinite().all() and out.abs().max() < 8


def test_augmentation_moves_and_cuts_by_what_the_numbers_say():
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 16, 16] = 1.0
    middle = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 2.0, 2.0]])  # no colour, no shift; the hole is outside
    assert torch.allclose(cspup128.augment(x, middle), x, atol=1e-6)
    down, hole = middle.clone(), middle.clone()
    down[:, 4], hole[:, 6:] = 0.0, 0.5
    moved = cspup128.augment(x, down)[0, 0].argmax().item()
    assert divmod(moved, 32) == (20, 16)
    assert cspup128.augment(x, hole).abs().max() < 1e-6
