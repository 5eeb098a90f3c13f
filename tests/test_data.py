"""Pictures in: what is packed, what is left out and said so, classes, and what named sets are.

It stands in parts that are the same text in every script, so it is asked of one: dcgan.py for pictures,
cgan_residual.py for classes.
"""
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image, features

import cgan_residual
import dcgan

RED, GREEN, BLUE, WHITE, TAN = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (200, 140, 60)
SIZE = 32


def load(data, root, *argv, script=dcgan):
    """(pack, names) of --data, kept below root."""
    size = ["--size", "32"] if script is dcgan else []
    return script.load_pack(script.parse([*size, "--data", str(data), "--root", str(root), *argv])[0])


def pack_one(image, path, *argv, **options):
    """A picture saved and packed alone: uint8 SIZE,SIZE,C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    (picture,) = load(path.parent, path.parents[1] / "root", *argv)[0]
    return picture


def solid(path, colour=TAN, size=(20, 20), **options):
    """A file with a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def tree(folder, names):
    """A folder with a different picture under each name."""
    for i, name in enumerate(names.split()):
        solid(folder / name, (5 * i, 200 - 3 * i, 9))
    return folder


def halves(left, right, mode="RGB", size=(64, 64)):
    """A picture with one value in its left half and one in its right half."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def numbers(left, right, dtype):
    """The same from an array of numbers."""
    values = np.full((64, 64), right, dtype)
    values[:, :32] = left
    return Image.fromarray(values)


def zipped(folder):
    """The folder as a .zip file beside it."""
    return Path(shutil.make_archive(str(folder), "zip", folder))


def palette(transparent=None):
    """A palette picture, left half entry 0 and right half entry 1; one entry may be transparent."""
    image = halves(0, 1, "P")
    image.putpalette([*TAN, *BLUE])
    if transparent is not None: image.info["transparency"] = transparent
    return image


# What a pixel is worth

PICTURES = {
    "jpeg": (halves(TAN, BLUE), "a.jpg", {"quality": 95}, (TAN, BLUE), 6),
    "upper case name": (halves(TAN, BLUE), "A.JPEG", {"quality": 95}, (TAN, BLUE), 6),
    "jfif": (halves(TAN, BLUE), "a.jfif", {"format": "JPEG", "quality": 95}, (TAN, BLUE), 6),
    "no suffix": (halves(TAN, BLUE), "a", {"format": "PNG"}, (TAN, BLUE), 0),
    "wrong suffix": (halves(TAN, BLUE), "a.jpg", {"format": "PNG"}, (TAN, BLUE), 0),
    "bmp": (halves(TAN, BLUE), "a.bmp", {}, (TAN, BLUE), 0),
    "webp": (halves(TAN, BLUE), "a.webp", {"lossless": True}, (TAN, BLUE), 0),
    "grey": (halves(10, 77, "L"), "a.png", {}, ((10,) * 3, (77,) * 3), 0),
    "one bit": (halves(0, 1, "1"), "a.png", {}, ((0,) * 3, WHITE), 0),
    "8 bits in 16": (numbers(0, 200, np.uint16), "a.png", {}, ((0,) * 3, (200,) * 3), 0),
    "12 bits in 16": (numbers(2048, 4095, np.uint16), "a.png", {}, ((127,) * 3, WHITE), 1),
    "12 bits in 16, tiff": (numbers(1024, 4000, np.uint16), "a.tif", {}, ((64,) * 3, (249,) * 3), 1),
    "16 bits": (numbers(257 * 100, 65535, np.uint16), "a.png", {}, ((100,) * 3, WHITE), 1),
    "32 bits": (numbers(257 * 100, 65535, np.int32), "a.tif", {}, ((100,) * 3, WHITE), 1),
    "numbers up to 1": (numbers(0.5, 1.0, np.float32), "a.tif", {}, ((127,) * 3, WHITE), 1),
    "palette": (palette(), "a.png", {}, (TAN, BLUE), 0),
    "palette with transparency": (palette(0), "a.png", {"transparency": 0}, (WHITE, BLUE), 0),
    "rgba": (halves((0, 0, 255, 0), (255, 0, 0, 128), "RGBA"), "a.png", {}, (WHITE, (255, 127, 127)), 1),
    "grey with alpha": (halves((0, 0), (40, 255), "LA"), "a.png", {}, (WHITE, (40,) * 3), 0),
    "colour key": (halves(TAN, BLUE), "a.png", {"transparency": BLUE}, (TAN, WHITE), 0),
    "cmyk jpeg": (halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "a.jpg", {"quality": 95}, (RED, BLUE),
                  6),
    "cmyk tiff": (halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "a.tif", {}, (RED, BLUE), 0),
    "animation": (halves(TAN, BLUE), "a.gif", {"save_all": True, "append_images": [halves(RED, RED)]},
                  (TAN, BLUE), 0),
    "one pixel": (Image.new("RGB", (1, 1), TAN), "a.png", {}, (TAN, TAN), 0),
    "one pixel high": (Image.new("RGB", (500, 1), TAN), "a.png", {}, (TAN, TAN), 0)}
if features.check("avif"): PICTURES["avif"] = halves(TAN, BLUE), "a.avif", {"quality": 95}, (TAN, BLUE), 12


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("image, name, options, colours, tolerance", PICTURES.values(), ids=PICTURES)
def test_kind_of_picture(image, name, options, colours, tolerance, channels, tmp_path):
    picture = pack_one(image, tmp_path / "set" / name, "--channels", str(channels), **options)
    assert picture.shape == (SIZE, SIZE, channels) and picture.dtype == np.uint8
    for colour, x in zip(colours, (SIZE // 4, 3 * SIZE // 4)):
        if channels == 1: colour = np.dot(colour, (0.299, 0.587, 0.114))
        assert np.abs(picture[SIZE // 2, x] - np.array(colour, float)).max() <= tolerance + (channels == 1)


@pytest.mark.parametrize("orientation, across, colours", [
    (1, 0, (RED, BLUE)), (2, 0, (BLUE, RED)), (3, 0, (BLUE, RED)), (6, 1, (RED, BLUE)), (8, 1, (BLUE, RED))])
def test_exif_orientation_is_applied(orientation, across, colours, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = pack_one(halves(RED, BLUE), tmp_path / "set" / "a.jpg", quality=95, exif=exif)
    picture = picture.swapaxes(0, 1) if across else picture
    assert np.abs(picture[16, [8, 24]].astype(int) - colours).max() <= 8


@pytest.mark.parametrize("alpha, white", [(255, 0), (254, 8), (0, 8)])
def test_only_what_is_transparent_is_shown_whole_on_white(alpha, white, tmp_path):
    """An alpha of 255 everywhere is no cut-out: the middle is taken. With one pixel that is not, it is."""
    image = Image.new("RGBA", (64, 32), (*TAN, 255))
    image.putpixel((32, 16), (*TAN, alpha))
    picture = pack_one(image, tmp_path / "set" / "a.png")
    assert [(row == 255).all() for row in picture].count(True) == 2 * white


@pytest.mark.parametrize("size", [(60, SIZE), (SIZE, 61), (SIZE, SIZE), (200, 201)])
def test_the_middle_square_is_cut_out(size, tmp_path):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = pack_one(Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)),
                       tmp_path / "set" / "a.png")
    side = min(size)
    across = (np.arange(SIZE) + 0.5) * side / SIZE - 0.5
    for pixels, length in (picture[8:-8, 8:-8, 0], size[0]), (picture[8:-8, 8:-8, 1].T, size[1]):
        assert np.abs(pixels - ((length - side) / 2 + across)[None, 8:-8]).max() <= 0.5 + 1e-6


def test_a_large_picture_is_reduced_without_aliasing_and_a_large_jpeg_fast(tmp_path):
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    picture = pack_one(Image.fromarray(stripes), tmp_path / "stripes" / "set" / "a.png")
    assert np.abs(picture[4:-4, 4:-4].astype(int) - 127.5).max() < 8
    small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    large = Image.fromarray(small).resize((1024, 768), Image.BICUBIC)
    fast = pack_one(large, tmp_path / "jpeg" / "set" / "a.jpg", quality=95)
    full = pack_one(large, tmp_path / "png" / "set" / "a.png")
    assert np.abs(fast.astype(int) - full).mean() < 3 and full.std() > 30


# What is left out

def png_of(side):
    """A whole black 1-bit PNG of this many pixels a side, some kilobytes on disk."""
    rows = zlib.compressobj(1)
    data = b"".join(rows.compress(bytes(1 + side // 8)) for _ in range(side)) + rows.flush()
    parts = (b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def mixed(tmp_path):
    """A folder with two good pictures, broken files, other files, and what has to be passed over."""
    folder = tree(tmp_path / "mixed", "good.png deep/down/good.jpg whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    for name, content in (("cut.jpg", data[: len(data) // 2]), ("deep/enormous.png", png_of(20_000)),
                          ("text.jpg", b"no"),
                          ("deep/nothing.PNG", b""), ("notes.txt", b"no"), ("a.heic", b"\0\0\0\x18ftypheic"),
                          ("none", b"")):
        (folder / name).write_bytes(content)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg")).write_text("a name that is no text")
    return tree(folder, "__MACOSX/good.png __MACOSX/deep/._good.png .hidden.png .cache/good.png deep/.x.jpg")


LEFT_OUT = {"cut.jpg", "deep/enormous.png", "text.jpg", "deep/nothing.PNG", "notes.txt", "a.heic", "none",
            "\udcff.jpg"}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_cannot_be_read_is_left_out_counted_and_named(kind, mixed, tmp_path, capsys):
    if kind == "zip": Path(os.fsdecode(os.fsencode(mixed) + b"/\xff.jpg")).unlink()
    for _ in range(2):  # said again when the pack is used again
        pack, names = load(zipped(mixed) if kind == "zip" else mixed, tmp_path / "root")
        assert names == ["deep/down/good.jpg", "good.png"] and len(pack) == 2
        out = capsys.readouterr().out
        (report,) = (tmp_path / "root" / ".packed").glob("*.json")
        lines = json.loads(report.read_text())
        assert set(lines) == LEFT_OUT - ({"\udcff.jpg"} if kind == "zip" else set()) and all(lines.values())
        assert "exceeds limit" in lines["deep/enormous.png"]
        assert str(report) in out and len(out.splitlines()) == 1
        jpegs = 2 if kind == "zip" else 3
        for suffix, count in {".jpg": jpegs, ".png": 2, ".txt": 1, ".heic": 1, "": 1}.items():
            assert f"'{suffix}': {count}" in out


def test_nothing_is_said_when_all_can_be_read(tmp_path, capsys):
    load(tree(tmp_path / "set", "a.png b/c.png"), tmp_path / "root")
    assert capsys.readouterr().out == ""


def test_each_folder_is_taken_once_whatever_links_lead_back_up(tmp_path, capsys):
    """Links to folders, up, to itself, to a neighbour, are not followed but named; those to files are followed."""
    folder = tree(tmp_path / "set", "a/1.png a/2.png b/3.png")
    elsewhere = tree(tmp_path / "elsewhere", "4.png")
    for link, to in (("a/up", folder), ("a/self", folder / "a"), ("again", folder / "b"),
                     ("b/gone", tmp_path / "gone"),
                     ("b/4.png", elsewhere / "4.png"), ("b/gone.png", tmp_path / "gone.png")):
        (folder / link).symlink_to(to)
    assert load(folder, tmp_path / "root")[1] == ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert set(json.loads(report.read_text())) == {"a/up", "a/self", "again", "b/gone", "b/gone.png"}
    said = capsys.readouterr().out
    assert "'': 4" in said and "'.png': 1" in said
    os.utime(elsewhere / "4.png", (1, 1))  # what a link leads to has changed
    load(folder, tmp_path / "root")
    assert len(list((tmp_path / "root" / ".packed").glob("*.npy"))) == 2


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_tiff_of_several_pages_is_left_out_and_others_are_not(kind, tmp_path, capsys):
    """Its first page alone would be a silent loss; of an animation the first frame is the picture it is known by."""
    folder, page = tmp_path / "set", Image.new("RGB", (40, 40), RED)
    folder.mkdir()
    for name, pages in ("one.tif", 1), ("two.tif", 2), ("five.tiff", 5), ("film.gif", 3), ("film.webp", 2):
        others = [Image.new("RGB", (40, 40), (9 * i, 99, 0)) for i in range(1, pages)]
        page.save(folder / name, save_all=True, append_images=others)
    _, names = load(zipped(folder) if kind == "zip" else folder, tmp_path / "root")
    assert names == ["film.gif", "film.webp", "one.tif"]
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert json.loads(report.read_text()) == {"two.tif": "it has 2 pages", "five.tiff": "it has 5 pages"}
    assert "'.tif': 1" in capsys.readouterr().out


def test_a_zip_packed_otherwise_is_left_out_with_the_reason(tmp_path):
    """A picture that this Python cannot unpack, or that is encrypted, beside one that it can."""
    tree(tmp_path / "set", "a.png b.png c.png")
    path = zipped(tmp_path / "set")
    data = bytearray(path.read_bytes())
    for name, offset, value in ((b"a.png", 10, 77), (b"b.png", 8, 1)):
        data[data.rfind(b"PK\x01\x02", 0, data.rfind(name)) + offset] = value
        data[data.rfind(b"PK\x03\x04", 0, data.find(name)) + offset - 2] = value
    path.write_bytes(data)
    assert load(path, tmp_path / "root")[1] == ["c.png"]
    assert set(json.loads(next((tmp_path / "root" / ".packed").glob("*.json")).read_text())) == {"a.png",
                                                                                                 "b.png"}


# Folder, zip, subfolders, packs used again

def test_two_processes_may_pack_the_same_pictures_at_once(tmp_path, monkeypatch):
    """The second, here inside the first, begins and ends while the first decodes."""
    folder, square, number, packs = tree(tmp_path / "set", "1.png 2.png 3.png"), dcgan.square, os.getpid(), []

    def interrupted(*given):
        if not packs:
            packs.append(None)
            monkeypatch.setattr(os, "getpid", lambda: number + 1)
            packs[0] = load(folder, tmp_path / "root")[0].copy()
            monkeypatch.setattr(os, "getpid", lambda: number)
        return square(*given)
    monkeypatch.setattr(dcgan, "square", interrupted)
    packs.append(load(folder, tmp_path / "root")[0])
    assert (packs[0] == packs[1]).all() and packs[0].any() and len(packs[0]) == 3
    assert not list((tmp_path / "root" / ".packed").glob(".part-*"))


@pytest.fixture
def nested(tmp_path):
    return tree(tmp_path / "set", "a/1.png a/2.png b/1.png c/d/1.png top.png")


@pytest.mark.parametrize("wanted, places", [("", (0, 1, 2, 3, 4)), ("a", (0, 1)), ("c", (3,)), ("d", (3,)),
                                            ("b a", (0, 1, 2))])
def test_folder_and_zip_give_the_same_and_only_the_subfolders_asked_for(wanted, places, nested, tmp_path):
    everything = load(nested, tmp_path / "root")[0]
    assert len(np.unique(everything.reshape(5, -1), axis=0)) == 5
    more = ["--classes", *wanted.split()] if wanted else []
    for path in nested, zipped(nested):
        assert np.array_equal(load(path, tmp_path / "root", *more)[0], everything[list(places)])


def test_a_pack_is_used_again_and_writing_to_it_leaves_the_file(nested, tmp_path, monkeypatch):
    first = load(nested, tmp_path / "root")[0]
    kept = first.copy()
    first[:] = 0
    monkeypatch.setattr(dcgan, "square", lambda *given: pytest.fail("decoded again"))
    assert np.array_equal(load(nested, tmp_path / "root")[0], kept)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("change, count", [(lambda p: solid(p / "b" / "1.png", BLUE), 5),
                                           (lambda p: (p / "top.png").unlink(), 4),
                                           (lambda p: solid(p / "b" / "2.png"), 6)], ids=["changed", "gone",
                                                                                          "new"])
def test_a_pack_is_built_anew_when_the_pictures_change(kind, change, count, nested, tmp_path):
    before = load(zipped(nested) if kind == "zip" else nested, tmp_path / "root")[0].copy()
    change(nested)
    after = load(zipped(nested) if kind == "zip" else nested, tmp_path / "root")[0]
    assert len(after) == count and (count != 5 or (before != after).any((1, 2, 3)).tolist() == [False, False,
                                                                                                True, False,
                                                                                                False])


def test_other_sizes_and_channels_have_packs_of_their_own(nested, tmp_path):
    for argv, shape in ((), (5, 32, 32, 3)), (("--channels", "1"), (5, 32, 32, 1)), (("--size", "64"),
                                                                                     (5, 64, 64, 3)):
        assert load(nested, tmp_path / "root", *argv)[0].shape == shape


# What is a class

CLASSES = {  # names of pictures, --classes: the classes with their counts, or None where a person has to say
    "one level": ("cat/1 cat/2 dog/1", "", {"cat": 2, "dog": 1}),
    "below one folder": ("set/cat/1 set/dog/1 set/dog/2", "", {"cat": 1, "dog": 2}),
    "above one folder": ("n1/images/1 n2/images/1", "", {"n1": 1, "n2": 1}),
    "between": ("x/cat/images/1 x/dog/images/1", "", {"cat": 1, "dog": 1}),
    "two levels": ("cat/in/1 cat/out/1 dog/in/1 dog/out/1", "", None),
    "two levels, the upper": ("cat/in/1 cat/out/1 dog/in/1 dog/out/1", "cat dog", {"cat": 2, "dog": 2}),
    "two levels, the lower": ("cat/in/1 cat/out/1 dog/in/1 dog/out/1", "in out", {"in": 2, "out": 2}),
    "train and test": ("train/cat/1 train/dog/1 test/cat/2 test/dog/2", "", None),
    "train and test, said": ("train/cat/1 train/dog/1 test/cat/2 test/dog/2", "cat dog",
                             {"cat": 2, "dog": 2}),
    "scenes as downloaded": ("t/seg/forest/1 t/seg/sea/1 v/seg/forest/1 p/p/1", "", None),
    "scenes, said": ("t/seg/forest/1 t/seg/sea/1 v/seg/forest/2 p/p/1", "forest sea",
                     {"forest": 2, "sea": 1}),
    "one deeper": ("cat/1 dog/images/1", "", None), "one deeper, said": ("cat/1 dog/images/1", "cat dog",
                                                                         {"cat": 1, "dog": 1}),
    "some in none": ("cat/1 dog/1 2", "", None), "none": ("1 2", "", None), "one": ("cat/1 cat/2", "", None),
    "one asked for": ("cat/1 dog/1", "cat", None), "in order of name": ("b/1 a/1 C/1", "",
                                                                        {"C": 1, "a": 1, "b": 1}),
    "in order of name, asked": ("b/1 a/1 c/1", "c a", {"a": 1, "c": 1})}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("names, wanted, classes", CLASSES.values(), ids=CLASSES)
def test_what_a_class_is(names, wanted, classes, kind, tmp_path, capsys):
    """One rule: the folders that not all pictures are in, or --classes, and no more than one of them: printed."""
    folder = tree(tmp_path / "set", " ".join(f"{name}.png" for name in names.split()))
    args = cgan_residual.parse(["--data", str(zipped(folder) if kind == "zip" else folder), "--root",
                                str(tmp_path)]
                               + (["--classes", *wanted.split()] if wanted else []))[0]
    _, names = cgan_residual.load_pack(args)
    if classes is None:
        with pytest.raises(SystemExit) as stop:
            cgan_residual.labels_of(args, names)
        assert stop.value.code == 2 and "--classes" in capsys.readouterr().err
        return
    labels = cgan_residual.labels_of(args, names)
    assert f"classes: {classes}" in capsys.readouterr().out
    assert args.names == list(classes) and labels.shape == (len(names), len(classes))
    assert all(args.names[label.argmax()] in name.split("/") and label.sum() == 1 for name,
               label in zip(names, labels))


# Named sets

def celeba(place):
    """Three pictures as CelebA has them, in the folder or .zip `place`."""
    folder = place.parent / place.stem
    for i in range(3): solid(folder / f"{i:06d}.jpg", (TAN, BLUE, RED)[i], (178, 218))
    if place.suffix == ".zip":
        shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["celeba/img_align_celeba", "celeba/img_align_celeba.zip",
                                   "img_align_celeba",
                                   "img_align_celeba.zip", "some/deep/img_align_celeba/img_align_celeba"])
@pytest.mark.parametrize("where", ["root", "kaggle"])
def test_celeba_is_found(place, where, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CelebA", lambda *given, **options: pytest.fail("downloads"))
    find = dcgan.glob.glob
    monkeypatch.setattr(dcgan.glob, "glob", lambda text, **options: find(
        text.replace("/kaggle/input", str(tmp_path / "kaggle")), **options))
    celeba(tmp_path / where / place)
    assert len(load("celeba", tmp_path / "root")[0]) == 3


def test_celeba_is_downloaded_when_it_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CelebA", lambda root,
                        download: celeba(Path(root, "celeba/img_align_celeba")))
    assert len(load("celeba", tmp_path / "root")[0]) == 3


@pytest.mark.parametrize("data, folder", [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist_and_fashion_are_read_where_torchvision_keeps_them(data, folder, tmp_path):
    """Files in the format of these sets, and no network: the digits, or clothes, with their labels."""
    raw, images = tmp_path / folder / "raw", np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    raw.mkdir(parents=True)
    for name in "train", "t10k":
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 20, 28, 28)
                                                        + images.tobytes())
        labels = bytes(i % 10 for i in range(20))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 20) + labels)
    args = cgan_residual.parse(["--data", data, "--root", str(tmp_path)])[0]
    pack, names = cgan_residual.load_pack(args)
    labels = cgan_residual.labels_of(args, names).argmax(1)
    digits = [str(i) for i in range(10)]
    clothes = "T-shirt or top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
    assert len(names) == 20
    for picture, name, label in zip(pack, names, labels):
        i = int(Path(name).stem)
        assert np.array_equal(picture[..., 0], images[i])
        assert args.names[label] == (digits if data == "mnist" else clothes)[i % 10]


def test_drawn_pictures_are_different_and_follow_from_their_number(script, tmp_path):
    pack = load("synthetic", tmp_path, script=script)[0]
    assert len(pack) == 4096 and len(np.unique(pack[:400].reshape(400, -1), axis=0)) > 395
    again = script.draw_picture(7), script.draw_picture(7), script.draw_picture(11)
    assert again[0].tobytes() == again[1].tobytes() != again[2].tobytes()


@pytest.mark.parametrize("corners, mirrored", [(0, True), (9, True), (11, False), (20, False)])
def test_dcgan_mirrors_pictures_unless_most_have_corners_of_one_colour(corners, mirrored, tmp_path):
    rng = np.random.default_rng(0)
    pack = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
    pack[:corners, [0, 0, -1, -1], [0, -1, 0, -1]] = TAN
    args = dcgan.parse([])[0]
    dcgan.settle(args, pack, [])
    assert (args.flip, args.augment) == (mirrored, True)
    args = dcgan.parse(["--flip", "--no-augment"])[0]
    dcgan.settle(args, pack, [])
    assert (args.flip, args.augment) == (True, False)
