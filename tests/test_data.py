"""Images in: what is packed, what is left out and said so, classes, and what named sets are.

It stands in parts that are the same text in every script, so it is asked of one: dcgan.py for images,
cgan_residual.py for classes.
"""

import importlib.util
import json
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import TINY
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
    """An image saved and packed alone: uint8 SIZE,SIZE,C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    (pixels,) = load(path.parent, path.parents[1] / "root", *argv)[0]
    return pixels


def solid(path, colour=TAN, size=(20, 20)):
    """A file with an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def tree(folder, names):
    """A folder with a different image under each name."""
    for i, name in enumerate(names.split()):
        solid(folder / name, (5 * i, 200 - 3 * i, 9))
    return folder


def halves(left, right, mode="RGB", size=(64, 64)):
    """An image with one value in its left half and one in its right half."""
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
    """A palette image, left half entry 0 and right half entry 1; one entry may be transparent."""
    image = halves(0, 1, "P")
    image.putpalette([*TAN, *BLUE])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


# What a pixel is worth

CMYK = (0, 255, 255, 0), (255, 255, 0, 0)  # red and blue
IMAGES = {  # image, file name, options of saving it, colours of its halves, tolerance
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
    "cmyk jpeg": (halves(*CMYK, "CMYK"), "a.jpg", {"quality": 95}, (RED, BLUE), 6),
    "cmyk tiff": (halves(*CMYK, "CMYK"), "a.tif", {}, (RED, BLUE), 0),
    "gif": (halves(TAN, BLUE), "a.gif", {}, (TAN, BLUE), 0),
    "one pixel": (Image.new("RGB", (1, 1), TAN), "a.png", {}, (TAN, TAN), 0),
    "one pixel high": (Image.new("RGB", (500, 1), TAN), "a.png", {}, (TAN, TAN), 0),
}
if features.check("avif"):
    IMAGES["avif"] = halves(TAN, BLUE), "a.avif", {"quality": 95}, (TAN, BLUE), 12


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("image, name, options, colours, tolerance", IMAGES.values(), ids=IMAGES)
def test_kind_of_image(image, name, options, colours, tolerance, channels, tmp_path):
    pixels = pack_one(image, tmp_path / "set" / name, "--channels", str(channels), **options)
    assert pixels.shape == (SIZE, SIZE, channels) and pixels.dtype == np.uint8
    for colour, x in zip(colours, (SIZE // 4, 3 * SIZE // 4)):
        if channels == 1:
            colour = np.dot(colour, (0.299, 0.587, 0.114))
        assert np.abs(pixels[SIZE // 2, x] - np.array(colour, float)).max() <= tolerance + (channels == 1)


@pytest.mark.parametrize(
    "orientation, across, colours",
    [(1, 0, (RED, BLUE)), (2, 0, (BLUE, RED)), (3, 0, (BLUE, RED)), (6, 1, (RED, BLUE)), (8, 1, (BLUE, RED))],
)
def test_exif_orientation_is_applied(orientation, across, colours, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = pack_one(halves(RED, BLUE), tmp_path / "set" / "a.jpg", quality=95, exif=exif)
    pixels = pixels.swapaxes(0, 1) if across else pixels
    assert np.abs(pixels[16, [8, 24]].astype(int) - colours).max() <= 8


@pytest.mark.parametrize("alpha, white", [(255, 0), (254, 8), (0, 8)])
def test_only_what_is_transparent_is_shown_whole_on_white(alpha, white, tmp_path):
    """An alpha of 255 everywhere is no cut-out: the middle is taken. With one pixel that is not, it is."""
    image = Image.new("RGBA", (64, 32), (*TAN, 255))
    image.putpixel((32, 16), (*TAN, alpha))
    pixels = pack_one(image, tmp_path / "set" / "a.png")
    assert [(row == 255).all() for row in pixels].count(True) == 2 * white


@pytest.mark.parametrize("size", [(60, SIZE), (SIZE, 61), (SIZE, SIZE), (200, 201)])
def test_the_middle_square_is_cut_out(size, tmp_path):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    pixels = pack_one(image, tmp_path / "set" / "a.png")
    side = min(size)
    across = (np.arange(SIZE) + 0.5) * side / SIZE - 0.5
    for values, length in (pixels[8:-8, 8:-8, 0], size[0]), (pixels[8:-8, 8:-8, 1].T, size[1]):
        assert np.abs(values - ((length - side) / 2 + across)[None, 8:-8]).max() <= 0.5 + 1e-6


def test_a_large_image_is_reduced_without_aliasing_and_a_large_jpeg_fast(tmp_path):
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = pack_one(Image.fromarray(stripes), tmp_path / "stripes" / "set" / "a.png")
    assert np.abs(pixels[4:-4, 4:-4].astype(int) - 127.5).max() < 8
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
    """A folder with two good images, broken files, other files, and what has to be passed over."""
    folder = tree(tmp_path / "mixed", "good.png deep/down/good.jpg whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    broken = {
        "cut.jpg": data[: len(data) // 2],
        "deep/enormous.png": png_of(20_000),
        "text.jpg": b"no",
        "deep/nothing.PNG": b"",
        "notes.txt": b"no",
        "a.heic": b"\0\0\0\x18ftypheic",
        "none": b"",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg")).write_text("a name that is no text")
    return tree(folder, "__MACOSX/good.png __MACOSX/deep/._good.png .hidden.png .cache/good.png deep/.x.jpg")


LEFT_OUT = {
    "cut.jpg",
    "deep/enormous.png",
    "text.jpg",
    "deep/nothing.PNG",
    "notes.txt",
    "a.heic",
    "none",
    "\udcff.jpg",
}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_cannot_be_read_is_left_out_counted_and_named(kind, mixed, tmp_path, capsys):
    if kind == "zip":
        Path(os.fsdecode(os.fsencode(mixed) + b"/\xff.jpg")).unlink()
    for _ in range(2):  # said again when the pack is used again
        pack, names = load(zipped(mixed) if kind == "zip" else mixed, tmp_path / "root")
        assert names == ["deep/down/good.jpg", "good.png"] and len(pack) == 2
        out = capsys.readouterr().out
        (report,) = (tmp_path / "root" / ".packed").glob("*.json")
        lines = json.loads(report.read_text())["left_out"]
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
    """Links to folders, up, to itself, to a neighbour, are not followed but named; those to files are."""
    folder = tree(tmp_path / "set", "a/1.png a/2.png b/3.png")
    elsewhere = tree(tmp_path / "elsewhere", "4.png")
    links = {
        "a/up": folder,
        "a/self": folder / "a",
        "again": folder / "b",
        "b/gone": tmp_path / "gone",
        "b/4.png": elsewhere / "4.png",
        "b/gone.png": tmp_path / "gone.png",
    }
    for link, target in links.items():
        (folder / link).symlink_to(target)
    assert load(folder, tmp_path / "root")[1] == ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    left_out = json.loads(report.read_text())["left_out"]
    assert set(left_out) == {"a/up", "a/self", "again", "b/gone", "b/gone.png"}
    assert set(left_out.values()) == {"a link to a folder, or to nothing"}
    said = capsys.readouterr().out
    assert "'': 4" in said and "'.png': 1" in said
    os.utime(elsewhere / "4.png", (1, 1))  # what a link leads to has changed
    load(folder, tmp_path / "root")
    assert len(list((tmp_path / "root" / ".packed").glob("*.npy"))) == 2


def test_a_folder_that_may_not_be_opened_is_named(tmp_path, monkeypatch, capsys):
    """What is in it cannot be counted. (The tests may run as root, who may open any.)"""
    folder = tree(tmp_path / "set", "a/1.png 2.png")
    (folder / "secret").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "secret" and access(path, mode))
    assert load(folder, tmp_path / "root")[1] == ["2.png", "a/1.png"]
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert json.loads(report.read_text())["left_out"] == {"secret": "a folder that may not be opened"}
    assert "'': 1" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_image_of_several_pages_or_frames_is_left_out_and_others_are_not(kind, tmp_path, capsys):
    """Its first one alone would be a silent loss; a photograph before its own preview is whole."""
    folder = tmp_path / "set"
    page = Image.new("RGB", (40, 40), RED)
    folder.mkdir()
    kept = ["one.gif", "one.png", "one.tif", "one.webp", "photo.jpg"]
    left_out = {"two.tif": 2, "five.tiff": 5, "film.gif": 3, "film.webp": 2, "film.png": 4}
    if features.check("avif"):
        left_out["film.avif"] = 2
    for name, pages in {**dict.fromkeys(kept[:-1], 1), **left_out}.items():
        others = [Image.new("RGB", (40, 40), (9 * i, 99, 0)) for i in range(1, pages)]
        page.save(folder / name, save_all=pages > 1, append_images=others)
    page.save(folder / "photo.jpg", "MPO", save_all=True, append_images=[page.resize((8, 8))])
    assert Image.open(folder / "photo.jpg").n_frames == 2
    _, names = load(zipped(folder) if kind == "zip" else folder, tmp_path / "root")
    assert names == kept
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    reasons = json.loads(report.read_text())["left_out"]
    assert reasons == {name: f"it has {pages} pages or frames" for name, pages in left_out.items()}
    said = capsys.readouterr().out
    assert "'.tif': 1" in said and "'.gif': 1" in said


def test_a_zip_packed_otherwise_is_left_out_with_the_reason(tmp_path):
    """An image that this Python cannot unpack, or that is encrypted, beside one that it can."""
    tree(tmp_path / "set", "a.png b.png c.png")
    path = zipped(tmp_path / "set")
    data = bytearray(path.read_bytes())
    for name, offset, value in ((b"a.png", 10, 77), (b"b.png", 8, 1)):
        data[data.rfind(b"PK\x01\x02", 0, data.rfind(name)) + offset] = value
        data[data.rfind(b"PK\x03\x04", 0, data.find(name)) + offset - 2] = value
    path.write_bytes(data)
    assert load(path, tmp_path / "root")[1] == ["c.png"]
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert set(json.loads(report.read_text())["left_out"]) == {"a.png", "b.png"}


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
@pytest.mark.parametrize(
    "highest, white", [(200, 255), (1000, 1023), (4000, 4095), (4200, 16383), (60_000, 65535)]
)
def test_one_white_for_all_images_of_a_set(highest, white, kind, tmp_path):
    """Darker images of more than 8 bits stay darker; those of 8 bits stay as they are."""
    folder = tmp_path / "set"
    folder.mkdir()
    values = highest * np.array([1, 0.5, 0.25])
    for i, value in enumerate(values):
        suffix = "png" if kind == "uint16" else "tif"
        Image.fromarray(np.full((40, 40), value, kind)).save(folder / f"{i}.{suffix}")
    Image.new("L", (40, 40), 200).save(folder / "8 bits.png")
    (folder / "broken.png").write_bytes(b"no")
    dark = Image.fromarray(np.full((40, 40), 65535, np.int32))
    dark.putpixel((0, 0), -1)
    dark.save(folder / "below 0.tif")
    pack, names = load(folder, tmp_path / "root", "--channels", "1")
    assert [name.split(".")[0] for name in names] == ["0", "1", "2", "8 bits"]
    expected = [*(values * 255 / white), 200]
    assert np.abs(pack[:, 9, 9, 0] - expected).max() <= 1
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert json.loads(report.read_text())["left_out"]["below 0.tif"].startswith("it has values below 0")


@pytest.mark.parametrize("value, expected", [(np.nan, 0), (1.0, 255), (0.5, 127)])
def test_numbers_that_are_none_are_black(value, expected, tmp_path):
    image = Image.fromarray(np.full((40, 40), value, np.float32))
    assert (pack_one(image, tmp_path / "set" / "a.tif") == expected).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, 65536, 2e6])
def test_one_value_that_is_too_high_darkens_no_other_image(value, tmp_path):
    """Its image is left out and named, and white is what it is without."""
    (tmp_path / "set").mkdir()
    for i in range(3):
        values = np.full((40, 40), 0.5, np.float32)
        values[0, 0] = value if i == 1 else 1
        Image.fromarray(values).save(tmp_path / "set" / f"{i}.tif")
    pack, names = load(tmp_path / "set", tmp_path / "root")
    assert names == ["0.tif", "2.tif"] and (pack[:, 9, 9] == 127).all()
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert "above 65535" in json.loads(report.read_text())["left_out"]["1.tif"]


ODD = {
    (60, 30): 1,
    (30, 61): 1,
    (3000, 60): 1,
    (1, 1): 1,
    (8, 8): 1,
    (8, 900): 1,
    (9, 9): 0,
    (59, 30): 0,
    (178, 218): 0,
}


def test_long_and_small_images_are_counted_in_one_line(tmp_path, capsys):
    for size in ODD:
        solid(tmp_path / "set" / f"{size}.png", size=size)
    for _ in range(2):
        load(tmp_path / "set", tmp_path / "root")
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{sum(ODD.values())} images")
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    assert str(report) in line
    odd = json.loads(report.read_text())["odd"]
    assert odd == {f"{size}.png": list(size) for size, is_odd in ODD.items() if is_odd}


def test_a_very_large_image_is_read(tmp_path, recwarn):
    """Of 195 million pixels; there is no word of bombs."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "map.png").write_bytes(png_of(13_968))
    pack, _ = load(tmp_path / "set", tmp_path / "root")
    assert len(pack) == 1 and not [str(warning.message) for warning in recwarn]


def archive_of(path, *names):
    """A .zip with an image of another colour under each name, which may be bytes, or stand there twice."""
    solid(path.with_suffix(".png"))
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            solid(path.with_suffix(".png"), (9 * i, 99, 0))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                archive.write(path.with_suffix(".png"), name)
    path.with_suffix(".png").unlink()
    return path


def test_an_entry_of_a_name_used_before_is_left_out(tmp_path, capsys):
    """In a .zip, and where names are the same but for the way in which their letters are written."""
    path = archive_of(tmp_path / "x.zip", "a/1.png", "a/2.png", "a/1.png", "a\\2.png", "a/3.png")
    pack, names = load(path, tmp_path / "root")
    assert names == ["a/1.png", "a/2.png", "a/3.png"] and pack[:, 9, 9, 0].tolist() == [0, 9, 36]
    (report,) = (tmp_path / "root" / ".packed").glob("*.json")
    left_out = json.loads(report.read_text())["left_out"]
    assert len(left_out) == 2 and set(left_out.values()) == {"a file before it has the same name"}
    assert "{'.png again': 2}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "name, wanted",
    [
        ("cats\\1.png", "cats"),  # made on Windows; or such a one unpacked by Python elsewhere
        ("set\\cats\\1.png", "cats"),
        ("Bu\u0308cher/1.png", "B\u00fccher"),  # made on macOS
        ("B\u00fccher/1.png", "Bu\u0308cher"),
        ("猫/1.png", "猫"),
        ("a, b/1.png", "a, b"),
        (" a /1.png", " a "),
        ("[a]/1.png", "[a]"),
        ("./cats/1.png", "cats"),
    ],
)
def test_classes_are_found_however_their_names_are_written(name, wanted, kind, tmp_path):
    path = archive_of(tmp_path / "x.zip", name, "other/2.png")
    if kind == "folder":
        shutil.unpack_archive(path, tmp_path / "x")
        path = tmp_path / "x"
        if "\\" in name:
            shutil.rmtree(path)
            solid(path / name)
    _, names = load(path, tmp_path / "root [v2]", "--classes", wanted)
    assert [Path(found).name for found in names] == ["1.png"]


def test_what_a_set_has_instead_of_a_class_is_said(tmp_path, fails):
    path = archive_of(tmp_path / "x.zip", "caf\x82/1.png", "dog/2.png")
    line = fails(dcgan, "--data", path, "--root", tmp_path, "--classes", "café")
    assert "café" in line and "dog" in line and "caf" in line


@pytest.mark.parametrize("what", ["zips", "links", "a zip in a zip"])
def test_what_is_no_set_of_images_is_said(what, tmp_path, fails):
    folder = tmp_path / "set"
    inner = archive_of(tmp_path / "a.zip", "1.png")
    folder.mkdir()
    if what == "links":
        tree(tmp_path / "cats", "1.png")
        (folder / "cats").symlink_to(tmp_path / "cats")
    else:
        shutil.copy(inner, folder)
    path = zipped(folder) if what == "a zip in a zip" else folder
    line = fails(dcgan, "--data", path, "--root", tmp_path / "root")
    assert "0 images in 1 files" in line and "the images themselves, or one .zip" in line
    assert ("a link to a folder" in line) == (what == "links")


@pytest.mark.parametrize(
    "name, root",
    [*zip(["synthetic", "mnist", "fashion", "celeba"], ["data"] * 4), ("synthetic", "."), ("mnist", ".")],
)
def test_a_folder_with_the_name_of_a_set(name, root, tmp_path, monkeypatch, fails):
    """Which of them is meant has to be said."""
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / name, "a.png b.png")
    line = fails(dcgan, *TINY[dcgan], "--steps", "1", "--data", name, "--root", root, "--out", "run")
    assert f"./{name} is the folder" in line and not (tmp_path / "run").exists()
    assert load(f"./{name}", "data")[1] == load(f"{tmp_path}/{name}", "data")[1] == ["a.png", "b.png"]


def test_a_named_set_in_root_is_no_folder_of_its_name(tmp_path, monkeypatch):
    """As where --root is the current folder, or `data` has such a folder."""
    monkeypatch.chdir(tmp_path)
    celeba(tmp_path / "celeba" / "img_align_celeba")
    assert len(load("celeba", ".")[0]) == 3
    celeba(tmp_path / "data" / "celeba" / "img_align_celeba")
    (tmp_path / "celeba").rename(tmp_path / "faces")
    assert len(load("celeba", "data")[0]) == 3


def test_what_a_run_has_written_among_the_images_is_none_of_them(tmp_path, monkeypatch):
    """--data . trains on the same images again, also in another run, and the first one can be resumed."""
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, " ".join(f"{i}.png" for i in range(10)))
    argv = "--data . --size 32 --width 2 --batch-size 8 --device cpu --precision fp32 --steps 2".split()
    dcgan.main(argv)
    dcgan.main([*argv, "--out", "runs/deeper/second"])
    dcgan.main(["--resume", "--steps", "3"])
    for name in "checkpoint.pt", "models.pth":  # people delete them, they are large
        (tmp_path / "runs" / "dcgan" / name).unlink()
    assert len(load(".", "data")[0]) == 10
    for run in "runs/dcgan", "runs/deeper/second":
        assert json.loads(Path(run, "config.json").read_text())["used"]["images"] == 10


# Folder, zip, subfolders, packs used again


def same_but_for_pixels(path, colour):
    """An image of the same size in bytes and the same time, whatever its colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path, "BMP")
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("how", ["another folder", "another link", "in place", "moved there"])
def test_a_pack_is_of_the_images_that_are_there(how, tmp_path):
    """Of equal names, sizes and times, as archives and containers give them."""
    for kind, colour in ("horse", RED), ("apple", GREEN):
        same_but_for_pixels(tmp_path / kind / "trainA" / "1.bmp", colour)
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "horse")
    first, then = tmp_path / "horse" / "trainA", tmp_path / "horse" / "trainA"
    if how == "another folder":
        then = tmp_path / "apple" / "trainA"
    elif how == "another link":
        first = then = link / "trainA"
    red = load(first, tmp_path / "root")[0].copy()
    if how == "in place":
        same_but_for_pixels(then / "1.bmp", GREEN)
    elif how == "moved there":
        (tmp_path / "horse").rename(tmp_path / "old")
        (tmp_path / "apple").rename(tmp_path / "horse")
    elif how == "another link":
        link.unlink()
        link.symlink_to(tmp_path / "apple")
    green = load(then, tmp_path / "root")[0]
    assert (red == RED).all() and (green == GREEN).all()


def test_a_named_set_is_packed_anew_where_its_files_are_others(tmp_path):
    """As KMNIST's in the place of MNIST's."""
    packs = []
    for seed in 1, 2, 1:
        raw_set(
            tmp_path / "MNIST" / "raw", np.random.default_rng(seed).integers(0, 256, (20, 28, 28), np.uint8)
        )
        packs.append(load("mnist", tmp_path, script=cgan_residual)[0].copy())
    assert (packs[0] == packs[2]).all() and (packs[0] != packs[1]).any()


def test_two_processes_may_pack_the_same_images_at_once(tmp_path, monkeypatch):
    """The second, here inside the first, begins and ends while the first decodes."""
    folder = tree(tmp_path / "set", "1.png 2.png 3.png")
    square = dcgan.square
    number = os.getpid()
    packs = []

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


@pytest.mark.parametrize(
    "wanted, places", [("", (0, 1, 2, 3, 4)), ("a", (0, 1)), ("c", (3,)), ("d", (3,)), ("b a", (0, 1, 2))]
)
def test_folder_and_zip_give_the_same_and_only_the_subfolders_wanted(wanted, places, nested, tmp_path):
    everything = load(nested, tmp_path / "root")[0]
    assert len(np.unique(everything.reshape(5, -1), axis=0)) == 5
    more = ["--classes", *wanted.split()] if wanted else []
    for path in nested, zipped(nested):
        assert np.array_equal(load(path, tmp_path / "root", *more)[0], everything[list(places)])


def forbid_decoding(monkeypatch, script):
    """Fail where the images are packed once more, of which a progress bar tells."""
    monkeypatch.setattr(script, "tqdm", lambda *given, **options: pytest.fail("decoded again"))


def test_a_pack_is_used_again_and_writing_to_it_leaves_the_file(nested, tmp_path, monkeypatch):
    first = load(nested, tmp_path / "root")[0]
    kept = first.copy()
    first[:] = 0
    forbid_decoding(monkeypatch, dcgan)
    assert np.array_equal(load(nested, tmp_path / "root")[0], kept)


def draw_image(index):
    return Image.new("RGB", (9, 9), (index, 1, 2))


def open_image(opener, size):
    return opener().rotate(90)


def square(image, size, channels):
    return np.full((size, size, channels), 7, np.uint8)


@pytest.mark.parametrize("changed", [draw_image, open_image, square], ids=lambda code: code.__name__)
def test_a_pack_is_built_anew_when_the_code_that_makes_it_changes(changed, tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan, "SYNTHETIC", ["0.png", "1.png", "2.png"])
    before = load("synthetic", tmp_path)[0].copy()
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, changed.__name__, changed)
        after = load("synthetic", tmp_path)[0]
        assert (before != after).any((1, 2, 3)).all()
    assert len(list((tmp_path / ".packed").glob("*.npy"))) == 2
    forbid_decoding(monkeypatch, dcgan)
    assert np.array_equal(load("synthetic", tmp_path)[0], before)


def test_a_renamed_copy_with_the_same_code_uses_the_same_pack(nested, tmp_path, monkeypatch):
    pack = load(nested, tmp_path / "root")[0]
    shutil.copy(dcgan.__file__, tmp_path / "mygan.py")
    spec = importlib.util.spec_from_file_location("mygan", tmp_path / "mygan.py")
    mygan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mygan)
    forbid_decoding(monkeypatch, mygan)
    args = mygan.parse(["--size", "32", "--data", str(nested), "--root", str(tmp_path / "root")])[0]
    assert np.array_equal(mygan.load_pack(args)[0], pack)


@pytest.mark.parametrize("name", ["draw_image", "open_image", "square"])
def test_a_mistake_in_ones_own_code_that_makes_images_is_a_traceback(name, nested, tmp_path, monkeypatch):
    """It is no broken file, and what it cut short is removed."""
    monkeypatch.setattr(dcgan, name, lambda *given: no_such_name)
    with pytest.raises(NameError, match="no_such_name"):
        load("synthetic" if name == "draw_image" else nested, tmp_path / "root")
    assert not list((tmp_path / "root" / ".packed").glob("*"))


OWN = {  # of open_image, which is called where a broken file can raise anything
    AttributeError: lambda opener, size: opener().rotated(90),
    TypeError: lambda opener, size: opener().rotate(),
    KeyError: lambda opener, size: opener().info["none"],
    ZeroDivisionError: lambda opener, size: opener().resize((size // 0, size)),
}


@pytest.mark.parametrize("error", OWN)
def test_ones_own_open_image_is_not_taken_for_a_broken_file(error, nested, tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan, "open_image", OWN[error])
    with pytest.raises(error):
        load(nested, tmp_path / "root")


def test_an_image_that_ones_own_open_image_refuses_is_left_out(nested, tmp_path, monkeypatch):
    original = dcgan.open_image

    def open_image(opener, size):
        image = original(opener, size)
        if image.getpixel((0, 0)) == BLUE:
            raise ValueError("it is blue")
        return image

    solid(nested / "b" / "1.png", BLUE)
    monkeypatch.setattr(dcgan, "open_image", open_image)
    assert len(load(nested, tmp_path / "root")[0]) == 4


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "change, count",
    [
        (lambda p: solid(p / "b" / "1.png", BLUE), 5),
        (lambda p: (p / "top.png").unlink(), 4),
        (lambda p: solid(p / "b" / "2.png"), 6),
    ],
    ids=["changed", "gone", "new"],
)
def test_a_pack_is_built_anew_when_the_images_change(kind, change, count, nested, tmp_path):
    before = load(zipped(nested) if kind == "zip" else nested, tmp_path / "root")[0].copy()
    change(nested)
    after = load(zipped(nested) if kind == "zip" else nested, tmp_path / "root")[0]
    assert len(after) == count
    if count == 5:
        assert (before != after).any((1, 2, 3)).tolist() == [False, False, True, False, False]


def test_other_sizes_and_channels_have_packs_of_their_own(nested, tmp_path):
    shapes = {"": (5, 32, 32, 3), "--channels 1": (5, 32, 32, 1), "--size 64": (5, 64, 64, 3)}
    for argv, shape in shapes.items():
        assert load(nested, tmp_path / "root", *argv.split())[0].shape == shape


# What is a class

SPLIT = "train/cat/1 train/dog/1 test/cat/2 test/dog/2"
SCENES = "t/seg/forest/1 t/seg/sea/1 v/seg/forest/2 p/p/1"
CLASSES = {  # names of images, --classes: the classes with their counts, or None where the user has to say
    "one level": ("cat/1 cat/2 dog/1", "", {"cat": 2, "dog": 1}),
    "below one folder": ("set/cat/1 set/dog/1 set/dog/2", "", {"cat": 1, "dog": 2}),
    "above one folder": ("n1/images/1 n2/images/1", "", {"n1": 1, "n2": 1}),
    "between": ("x/cat/images/1 x/dog/images/1", "", {"cat": 1, "dog": 1}),
    "two levels": ("cat/in/1 cat/out/1 dog/in/1 dog/out/1", "", None),
    "two levels, the upper": ("cat/in/1 cat/out/1 dog/in/1 dog/out/1", "cat dog", {"cat": 2, "dog": 2}),
    "two levels, the lower": ("cat/in/1 cat/out/1 dog/in/1 dog/out/1", "in out", {"in": 2, "out": 2}),
    "train and test": (SPLIT, "", None),
    "train and test, named": (SPLIT, "cat dog", {"cat": 2, "dog": 2}),
    "scenes as downloaded": (SCENES, "", None),
    "scenes, named": (SCENES, "forest sea", {"forest": 2, "sea": 1}),
    "one deeper": ("cat/1 dog/images/1", "", None),
    "one deeper, named": ("cat/1 dog/images/1", "cat dog", {"cat": 1, "dog": 1}),
    "some in none": ("cat/1 dog/1 2", "", None),
    "none": ("1 2", "", None),
    "one": ("cat/1 cat/2", "", None),
    "one wanted": ("cat/1 dog/1", "cat", None),
    "in order of name": ("b/1 a/1 C/1", "", {"C": 1, "a": 1, "b": 1}),
    "in order of name, wanted": ("b/1 a/1 c/1", "c a", {"a": 1, "c": 1}),
}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("names, wanted, classes", CLASSES.values(), ids=CLASSES)
def test_what_a_class_is(names, wanted, classes, kind, tmp_path, capsys):
    """One rule: the folders that not all images are in, or --classes; each image in one of them; printed."""
    folder = tree(tmp_path / "set", " ".join(f"{name}.png" for name in names.split()))
    path = zipped(folder) if kind == "zip" else folder
    more = ["--classes", *wanted.split()] if wanted else []
    args = cgan_residual.parse(["--data", str(path), "--root", str(tmp_path), *more])[0]
    _, names = cgan_residual.load_pack(args)
    if classes is None:
        with pytest.raises(SystemExit, match="^error: .*--classes"):
            cgan_residual.labels_of(args, names)
        return
    labels = cgan_residual.labels_of(args, names)
    assert f"classes: {classes}" in capsys.readouterr().out
    assert args.class_names == list(classes) and labels.shape == (len(names), len(classes))
    for name, label in zip(names, labels):
        assert args.class_names[label.argmax()] in name.split("/") and label.sum() == 1


# Named sets


def celeba(place):
    """Three images as CelebA has them, in the folder or .zip `place`."""
    folder = place.parent / place.stem
    for i in range(3):
        solid(folder / f"{i:06d}.jpg", (TAN, BLUE, RED)[i], (178, 218))
    if place.suffix == ".zip":
        shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "place",
    [
        "celeba/img_align_celeba",
        "celeba/img_align_celeba.zip",
        "img_align_celeba",
        "img_align_celeba.zip",
        "some/deep/img_align_celeba/img_align_celeba",
    ],
)
@pytest.mark.parametrize("where", ["root", "kaggle"])
def test_celeba_is_found(place, where, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CelebA", lambda *given, **options: pytest.fail("downloads"))
    plain_glob = dcgan.glob.glob

    def glob(text, **options):
        return plain_glob(text.replace("/kaggle/input", str(tmp_path / "kaggle")), **options)

    monkeypatch.setattr(dcgan.glob, "glob", glob)
    celeba(tmp_path / where / place)
    assert len(load("celeba", tmp_path / "root")[0]) == 3


def test_celeba_is_downloaded_when_it_is_nowhere(tmp_path, monkeypatch):
    def download(root, download):
        celeba(Path(root, "celeba/img_align_celeba"))

    monkeypatch.setattr(torchvision.datasets, "CelebA", download)
    assert len(load("celeba", tmp_path / "root")[0]) == 3


def raw_set(raw, images):
    """Files as MNIST's, with labels 0 to 9 in turn."""
    raw.mkdir(parents=True, exist_ok=True)
    image_bytes = struct.pack(">4I", 2051, *images.shape) + images.tobytes()
    label_bytes = struct.pack(">2I", 2049, len(images)) + bytes(i % 10 for i in range(len(images)))
    for name in "train", "t10k":
        (raw / f"{name}-images-idx3-ubyte").write_bytes(image_bytes)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(label_bytes)


@pytest.mark.parametrize("data, folder", [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist_and_fashion_are_read_where_torchvision_keeps_them(data, folder, tmp_path):
    """Files in the format of these sets, and no network: the digits, or clothes, with their labels."""
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    raw_set(tmp_path / folder / "raw", images)
    args = cgan_residual.parse(["--data", data, "--root", str(tmp_path)])[0]
    pack, names = cgan_residual.load_pack(args)
    labels = cgan_residual.labels_of(args, names).argmax(1)
    digits = [str(i) for i in range(10)]
    clothes = "T-shirt or top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
    assert len(names) == 20
    for pixels, name, label in zip(pack, names, labels):
        i = int(Path(name).stem)
        assert np.array_equal(pixels[..., 0], images[i])
        assert args.class_names == (digits if data == "mnist" else clothes) and label == i % 10


@pytest.mark.parametrize("names", [None, sorted(range(10), reverse=True)])
def test_an_old_checkpoint_keeps_the_order_of_its_classes(names, tmp_path):
    """Whose clothes were numbered by the alphabet."""
    raw_set(tmp_path / "FashionMNIST" / "raw", np.zeros((20, 28, 28), np.uint8))
    args = cgan_residual.parse(["--data", "fashion", "--root", str(tmp_path)])[0]
    own = cgan_residual.classes_of_set("fashion")
    args.class_names = sorted(own) if names is None else [own[i] for i in names]
    kept = list(args.class_names)
    _, found = cgan_residual.load_pack(args)
    labels = cgan_residual.labels_of(args, found).argmax(1)
    assert args.class_names == kept
    assert [kept[label] for label in labels] == [name.split("/")[0] for name in found]


def test_drawn_images_are_different_and_follow_from_their_number(script, tmp_path):
    pack = load("synthetic", tmp_path, script=script)[0]
    assert len(pack) == 4096 and len(np.unique(pack[:400].reshape(400, -1), axis=0)) > 395
    first, again, other = (script.draw_image(i).tobytes() for i in (7, 7, 11))
    assert first == again != other


@pytest.mark.parametrize("corners, mirrored", [(0, True), (9, True), (11, False), (20, False)])
def test_dcgan_mirrors_images_unless_most_have_corners_of_one_colour(corners, mirrored, tmp_path):
    rng = np.random.default_rng(0)
    pack = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
    pack[:corners, [0, 0, -1, -1], [0, -1, 0, -1]] = TAN
    args = dcgan.parse([])[0]
    dcgan.prepare(args, pack, [])
    assert (args.flip, args.augment) == (mirrored, True)
    args = dcgan.parse(["--flip", "--no-augment"])[0]
    dcgan.prepare(args, pack, [])
    assert (args.flip, args.augment) == (True, False)
