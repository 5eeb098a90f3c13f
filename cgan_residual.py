"""Train a conditional GAN on digits by class, with residual blocks and dropout, in this one file.

    python cgan_residual.py                                      # MNIST, which torchvision downloads
    python cgan_residual.py --data synthetic --steps 600         # drawn digits, no data needed
    python cgan_residual.py --generate 20 --labels 3,7 --checkpoint runs/cgan_residual/models.pth

The generator gets the class one-hot before its noise, the discriminator by projection (Miyato & Koyama 2018).
"""

# %% Imports
import argparse
import atexit
import contextlib
import copy
import csv
import functools
import glob
import importlib.util
import inspect
import json
import math
import os
import random
import signal
import sys
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.utils import save_image
from tqdm.auto import tqdm

# %% Settings that are not flags
# Names run folders and checkpoints: a renamed copy has its own
SCRIPT = Path(__file__).stem if "__file__" in globals() else "cgan_residual"
Z_DIM = 246  # length of the noise z
GRID = 10  # rows and columns of a sample grid
SYNTHETIC = [f"{i % 10}/{i}.png" for i in range(4096)]  # names of the images of --data synthetic
Optimiser = torch.optim.Adam  # or AdamW; others take other options in make_training
FIXED = "width", "blocks", "batch_size"  # flags that a resumed run cannot change
RENAMED = {"fall": "lr_decay_from", "names": "class_names"}  # in checkpoints of earlier versions

# Interface: parts from "# --- shared" to "# --- end shared", the same in all scripts, use these settings and
#   make_networks(args): (generator, discriminator);  draw_z(args, count): the generator's input, by --seed
#   train_step(nets, args, real, z, *labels): {metric: tensor}; captured on CUDA: no Python counter or branch
#     by value. nets: G, D, ema, opt_g, opt_d, autocast(), step (a tensor); optimise(nets, loss, optimiser)
#   draw_image(index): of --data synthetic;  prepare(args, pack, names): [] or [labels], numpy float32 N,K
#   add_flags(parser): flags of this script alone;  flag_defaults(args): defaults that depend on them


# --- shared: settings ---
LOG_EVERY = 10  # steps from row to row of metrics.csv
SAMPLE_EVERY = 100  # steps from sample grid to sample grid, rounded up to whole epochs
SMOOTH = 10  # rows of metrics.csv that each point of a curve is the mean of
GIF_FRAMES = 100  # most frames of evolution.gif
COLUMNS = "step", "epoch", "seconds", "images", "loss_d", "loss_g", "d_real", "d_fake"  # of earlier versions
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANKS = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1  # processes
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # number of this one
PART = slice(RANK, None, RANKS)  # this process's part of a batch, and of what is drawn by chance for one
EMA_IMAGES = 256  # that the averaged generator's batch norm statistics are taken over, in 4 batches
RUN_FILES = "config.json metrics.csv losses.png scores.png samples evolution.gif checkpoint.pt models*.pth"
NAMED_SETS = {"mnist": "MNIST", "fashion": "FashionMNIST"}  # of torchvision
WHITES = 1, 255, 1023, 4095, 16383, 65535  # one of them is white in images of more than 8 bits
CROPPED = 2  # longer side over shorter one, from which on half of an image is lost: it is counted
ENLARGED = 4  # times that an image is enlarged, from which on it is counted
Image.MAX_IMAGE_PIXELS = 14_000**2  # images of more than twice as many are left out
# --- end shared ---


# --- shared: batch norm ---
class BatchNormLeakyReLU(nn.BatchNorm2d):
    """leaky_relu(batch_norm(x), slope) of N,C,H,W; its state_dict is nn.BatchNorm2d's."""

    fused = False  # True: gan_ops does it, as one operation

    def __init__(self, channels, slope, **options):
        super().__init__(channels, **options)
        self.slope = slope

    def forward(self, x):
        if not self.fused:
            return F.leaky_relu(super().forward(x), self.slope)
        statistics = self.running_mean, self.running_var, self.training, self.momentum, self.eps
        return torch.ops.gan_ops.batch_norm_leaky_relu(x, self.weight, self.bias, *statistics, self.slope)


# --- end shared ---


# %% Networks
class Residual(nn.Module):
    """x + f(x) for N,C,H,W: f is twice batch norm, LeakyReLU, 3x3 convolution; Dropout2d between."""

    def __init__(self, channels, dropout):
        super().__init__()
        self.layers = nn.Sequential(
            BatchNormLeakyReLU(channels, slope=0.2),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            BatchNormLeakyReLU(channels, slope=0.2),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """One-hot label and noise, concatenated (N,10+246), to images (N,1,28,28) in [-1, 1]."""

    def __init__(self, width=16, classes=10, blocks=1, dropout=0.05):
        super().__init__()
        self.project = nn.Linear(classes + Z_DIM, 4 * width * 49)
        self.layers = nn.Sequential(
            *[Residual(4 * width, dropout) for _ in range(blocks)],
            BatchNormLeakyReLU(4 * width, slope=0.2),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
            BatchNormLeakyReLU(2 * width, slope=0.2),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            BatchNormLeakyReLU(width, slope=0.2),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        x = self.project(z).unflatten(1, (7, 7, -1)).permute(0, 3, 1, 2)  # N,64,7,7, channels_last as it is
        return self.layers(x)  # N,64,7,7; N,32,14,14; N,16,28,28; N,1,28,28


class Discriminator(nn.Module):
    """Images (N,1,28,28), labels (N, or one-hot N,10) to probabilities of being real (N,1), or to logits.

    A label adds the product of the features and the class's vector to the logit; without labels all vectors'
    mean does.
    """

    def __init__(self, width=16, classes=10, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),  # N,16,14,14
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1),  # N,32,7,7
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 4 * width, 3, 2, 1),  # N,64,4,4
            nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * width, 16 * width),  # N,256
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.logit = nn.Linear(16 * width, 1)
        self.of_class = nn.Linear(classes, 16 * width, bias=False)  # a vector for each class

    def judge(self, features, labels):
        """Logits (N,1) of what `layers` gives (N,256), by one-hot labels."""
        class_vectors = self.of_class(labels.to(features.dtype))  # N,256
        return self.logit(features) + (features * class_vectors).sum(1, keepdim=True)

    def forward(self, x, labels=None, logits=False):
        features = self.layers(x)  # N,256
        classes = self.of_class.in_features
        if labels is None:
            labels = torch.full((len(x), classes), 1 / classes, device=x.device)
        if labels.ndim == 1:
            labels = F.one_hot(labels, classes)
        logit = self.judge(features, labels)
        return logit if logits else logit.sigmoid()


def make_networks(args):
    """(generator, discriminator) for the classes args.class_names.

    The generator alone has DCGAN's weights, N(0, 0.02): the other's logits would stay near 0 for long.
    """
    G = Generator(args.width, len(args.class_names), args.blocks)
    for weight in G.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, 0, 0.02)
    return G, Discriminator(args.width, len(args.class_names))


# %% Losses and one training step
def train_step(nets, args, real, z, labels):
    """A step of both networks on real images (N,1,28,28), z (N,246), one-hot labels (N,10); returns metrics.

    Real images under the label of another class count as fake (Reed et al. 2016): their features are there,
    so it costs one product.
    """
    nets.D.requires_grad_(True)
    wrong_labels = labels.roll(1, 0)
    with nets.autocast():
        fake = nets.G(torch.cat([labels, z], 1))
        real_features, fake_features = nets.D.layers(torch.cat([real, fake.detach()])).chunk(2)
        real_logit = nets.D.judge(real_features, labels).float()
        wrong_logit = nets.D.judge(real_features, wrong_labels).float()
        fake_logit = nets.D.judge(fake_features, labels).float()
    is_wrong = (labels != wrong_labels).any(1, keepdim=True)  # N,1: by chance it is the same class
    loss_real = F.softplus(-real_logit)  # -log D(x)
    loss_fake = (F.softplus(fake_logit) + F.softplus(wrong_logit) * is_wrong) / 2  # -log(1 - D(G(z)))
    loss_d = (loss_real + loss_fake).mean()
    optimise(nets, loss_d, nets.opt_d)

    nets.D.requires_grad_(False)
    with nets.autocast():
        fake_logit = nets.D(fake, labels, logits=True).float()
    loss_g = F.softplus(-fake_logit).mean()  # -log D(G(z))
    optimise(nets, loss_g, nets.opt_g)

    d_real = real_logit.sigmoid().mean()
    d_fake = fake_logit.sigmoid().mean()
    return {"loss_d": loss_d, "loss_g": loss_g, "d_real": d_real, "d_fake": d_fake}


# %% Data
def draw_image(index):
    """Digit number `index` of --data synthetic, index % 10 in Pillow's own font, shifted and turned."""
    rng = random.Random(index)
    image = Image.new("L", (112, 112))
    font = ImageFont.load_default(rng.uniform(67, 106))
    middle = rng.uniform(49, 63), rng.uniform(49, 63)
    ImageDraw.Draw(image).text(middle, str(index % 10), 255, font, "mm", stroke_width=rng.randint(0, 4))
    return image.rotate(rng.uniform(-20, 20), Image.BILINEAR)


def prepare(args, pack, names):
    """[labels], one-hot, which stand beside the images in each batch."""
    return [labels_of(args, names)]


def draw_z(args, count):
    """The generator's input for `count` images, the same for each --seed: labels and z, count,256."""
    z = torch.randn(count, Z_DIM, generator=torch.Generator().manual_seed(args.seed))
    return torch.cat([chosen_labels(args, count), z], 1)


# --- shared: classes ---
def labels_of(args, names):
    """One-hot labels, float32 N,classes, by the one folder in each image's name that is a class.

    Classes are --classes or, without these, the folders that not all images are in. args.class_names is set,
    in the order of the checkpoint, of the named set or of the alphabet.
    """
    paths = [name.split("/")[:-1] for name in names]
    folders = set(args.classes) or set().union(*paths) - set.intersection(*map(set, paths))
    found = ["/".join(folder for folder in path if folder in folders) for path in paths]
    counts = dict(sorted(Counter(found).items()))
    class_names = [name for name in args.class_names or classes_of_set(args.data) if name in counts]
    if len(class_names) < len(counts):
        class_names = list(counts)
    if len(counts) < 2 or any(not name or "/" in name for name in class_names):
        fail(f"--data {args.data}: which are the classes? It has {counts}; name them with --classes")
    if args.class_names not in (None, class_names):
        fail(f"the model's classes are {args.class_names}, not {class_names}")
    args.class_names = class_names
    print(f"classes: {counts}")
    return np.eye(len(counts), dtype=np.float32)[[class_names.index(name) for name in found]]


def chosen_labels(args, count):
    """One-hot labels for `count` images in order, count,classes: as many of each of --labels, or of all.

    --labels has names or, where no name is a number, numbers, as a row of CSV: names with commas in quotes.
    """
    names = [nfc(name) for name in args.class_names]
    numbers = list(range(len(names)))
    if args.labels:
        lower = [name.strip().lower() for name in names]
        exact = {name: i for i, name in enumerate(names)}
        loose = {name: i for i, name in enumerate(lower) if lower.count(name) == 1}
        if all(name.strip("+-.0123456789") for name in lower):
            loose |= {str(i): i for i in numbers}
        words = [args.labels]
        if args.labels not in exact:
            words = next(csv.reader(words, skipinitialspace=True))
        numbers = [exact.get(word, loose.get(word.strip().lower())) for word in words]
        if None in numbers:
            fail(f"--labels {args.labels}: the model has {', '.join(names)} (names with commas in quotes)")
    labels = torch.tensor(numbers)[torch.arange(count) * len(numbers) // count]
    return F.one_hot(labels, len(names)).float()


# --- end shared ---


# --- shared: data ---
def fail(message):
    """End with one line, which main() prints: for what can be put right without changing the code."""
    raise SystemExit(f"error: {message}".replace("\n", " "))


def nfc(text):
    """Text with each letter written in one way, of several that Unicode has: names of images and classes."""
    return unicodedata.normalize("NFC", text)


def download(dataset, root):
    """A dataset of torchvision's below `root`, downloaded where it is not there yet."""
    try:
        return dataset(root, download=True)
    except Exception as error:  # no network, a quota that is used up: it can raise anything
        name = dataset.__name__
        fail(f"{name} is not in --root {root} (put files such as img_align_celeba.zip there), and: {error}")


def find_celeba(root):
    """The folder img_align_celeba or its .zip below `root` or in Kaggle's input folders, else downloaded."""
    for folder in glob.escape(root), "/kaggle/input":
        for path in sorted(glob.glob(f"{folder}/**/img_align_celeba*", recursive=True)):
            if path.endswith(("img_align_celeba", "img_align_celeba.zip")):
                return Path(path)
    download(torchvision.datasets.CelebA, root)
    return Path(root, "celeba", "img_align_celeba")


def classes_of_set(data):
    """The classes of --data mnist or fashion, as names of folders, in the order of the set's numbers."""
    if data not in NAMED_SETS:
        return []
    names = getattr(torchvision.datasets, NAMED_SETS[data]).classes
    return [name.split(" - ")[0].replace("/", " or ") for name in names]


def list_files(path):
    """Yield (name, what changes with it, function that opens it or why not to) of a folder or .zip."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file():
                stat = file.stat()
                stamp = str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
                yield name, stamp, functools.partial(Image.open, file)
            elif file.is_symlink():  # links to folders can lead back up
                yield name, None, "a link to a folder, or to nothing"
            elif not os.access(file, os.R_OK | os.X_OK):
                yield name, None, "a folder that may not be opened"
    else:
        archive = zipfile.ZipFile(path)
        for info in archive.infolist():
            yield info.filename, (info.CRC, info.file_size), lambda info=info: Image.open(archive.open(info))


def find_images(data, root):
    """{name, as cat/1.png: (what changes with the file, function that opens it or why it is left out)}."""
    place = Path(data).expanduser()
    of_root = data == "celeba" and place.resolve() == Path(root, data).resolve()  # as torchvision names it
    if data in ("synthetic", "celeba", *NAMED_SETS) and data in os.listdir() and not of_root:
        fail(f"--data {data} is a set and, here, a folder: ./{data} is the folder; for the set, rename it")
    if data == "synthetic":
        code = source_of(draw_image)
        return {name: (code, functools.partial(draw_image, i)) for i, name in enumerate(SYNTHETIC)}
    if data in NAMED_SETS:
        dataset = download(getattr(torchvision.datasets, NAMED_SETS[data]), root)
        folders = classes_of_set(data)
        stamp = zlib.crc32(dataset.data.numpy())
        return {f"{folders[k]}/{i}.png": (stamp, image.copy) for i, (image, k) in enumerate(dataset)}
    path = find_celeba(root).resolve() if data == "celeba" else place.resolve()
    if not path.is_dir() and not zipfile.is_zipfile(path):
        fail(f"--data {data} is none of: a folder, a .zip, synthetic, mnist, fashion, celeba")
    found = {}
    for name, stamp, opener in list_files(path):
        name = nfc(name.replace("\\", "/").removeprefix("./"))  # as in zip files of Windows
        while name in found:
            name += " again"
            opener = "a file before it has the same name"
        if not name.endswith("/") and "/." not in f"/{name}" and "__MACOSX" not in name:
            found[name] = stamp, opener
    return found


def open_image(opener, size):
    """The image that opener() gives, upright, RGB, RGBA or, if it has more than 8 bits, of mode F.

    ValueError: the opener is a reason to leave it out, or there is one in the image.
    """
    if isinstance(opener, str):
        raise ValueError(opener)
    image = opener()
    if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "PSD"):  # their first is the whole
        raise ValueError(f"it has {image.n_frames} pages or frames")
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
    image = ImageOps.exif_transpose(image)
    if image.mode[0] not in "IF":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    values = np.nan_to_num(np.asarray(image, np.float32))
    if values.min() < 0 or values.max() > WHITES[-1]:
        raise ValueError(f"it has values below 0 or above {WHITES[-1]}")
    return Image.fromarray(values)


def square(image, size, channels):
    """An image as uint8 size,size,channels: its middle or, if parts are transparent, all of it on white."""
    if image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.pad(image, (size, size), Image.BILINEAR, color="white")
    image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.BILINEAR)).reshape(size, size, -1)


def pack_images(path, openers, args):
    """Decode images, {name: opener}, into the .npy `path`, and say of some in a .json beside it.

    These are the images left out, with the reasons, and odd ones with their sizes; and the pixels' checksum.
    """
    peaks = []  # of images of more than 8 bits
    white = None
    fitting = WHITES[-1]

    def decode(name):
        try:
            image = open_image(openers[name], args.size)
        except Exception as error:  # a broken file can raise anything within Pillow
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            is_own = raised_in == open_image.__code__.co_filename and not isinstance(error, ValueError)
            if args.data == "synthetic" or is_own:
                raise  # a mistake in this script
            report["left_out"][name] = str(error)
            return b""
        if max(image.size) >= CROPPED * min(image.size) or args.size >= ENLARGED * min(image.size):
            report["odd"][name] = image.size
        if image.mode == "F":
            peaks.append(image.getextrema()[1])
            image = Image.fromarray(np.uint8(np.asarray(image) * 255.0 / white))
        return square(image, args.size, args.channels).tobytes()

    shape = len(openers), args.size, args.size, args.channels
    with replacing(path) as part:
        while white != fitting:  # all are decoded once more if another white fits their peaks
            white = fitting
            report = {"left_out": {}, "odd": {}, "crc": 0}
            with open(part, "wb") as file, ThreadPoolExecutor() as threads:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
                end = file.tell() + math.prod(shape)
                for pixels in tqdm(threads.map(decode, openers), "packing", len(openers), unit="img"):
                    file.write(pixels)
                    report["crc"] = zlib.crc32(pixels, report["crc"])
                file.truncate(end)  # images left out leave as many empty rows at the end
            fitting = next(value for value in WHITES if value >= max(peaks, default=white))
        with replacing(path.with_suffix(".json")) as report_part:
            report_part.write_text(json.dumps(report, indent=1))


def source_of(*functions):
    """Their source, or None where Python keeps none, as in exec()."""
    with contextlib.suppress(OSError):
        return [inspect.getsource(function) for function in functions]


def names_of(found):
    """The names, in order, of what find_images() gives, without what is in run folders."""
    runs = [name.removesuffix("metrics.csv") for name in found if name.endswith("metrics.csv")]
    runs = tuple(folder for folder in runs if f"{folder}config.json" in found)
    return sorted(name for name in found if not name.startswith(runs))


def load_pack(args):
    """The images of --data, uint8 N,size,size,channels, memory-mapped, and their names; decoded once.

    args.image_set is set to what identifies them: a checksum of names and pixels.
    """
    found = find_images(args.data, args.root)
    names = names_of(found)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    if not names or set(args.classes) - folders:
        fail(f"--data {args.data} has no images in {args.classes or 'it'}; its folders are {sorted(folders)}")
    if args.classes:
        names = [name for name in names if set(name.split("/")[:-1]) & set(args.classes)]

    code = source_of(open_image, square, pack_images)  # it decides the pixels
    key = zlib.crc32(repr([args.channels, [(name, found[name][0]) for name in names], code]).encode())
    path = Path(args.root, ".packed", f"{Path(args.data).resolve().stem}-{args.size}-{key:08x}.npy")
    if not path.exists():
        pack_images(path, {name: found[name][1] for name in names}, args)
    report_path = path.with_suffix(".json")
    report = json.loads(report_path.read_text())
    left_out = report["left_out"]
    if left_out:
        print(f"left out, see {report_path}: {dict(Counter(Path(name).suffix.lower() for name in left_out))}")
    kept = [name for name in names if name not in left_out]
    if not kept:
        reason = f"as {names[0]}: {left_out[names[0]]} (--data takes the images themselves, or one .zip)"
        fail(f"--data {args.data}: 0 images in {len(names)} files, {reason}")
    if report["odd"]:
        print(f"{len(report['odd'])} images are long and mostly cropped, or small: see {report_path}")
    args.image_set = f"{zlib.crc32(repr(kept).encode(), report['crc']):08x}"
    return np.load(path, mmap_mode="c")[: len(kept)], kept


def batches(arrays, args, device, step):
    """Yield this process's part of batches after `step`: rows of each array, in an order by --seed."""
    arrays = [torch.from_numpy(array) for array in arrays]
    steps_per_epoch = len(arrays[0]) // args.batch_size
    if device.type == "cuda" and arrays[0].nbytes < torch.cuda.mem_get_info()[0] / 2:
        arrays = [array.to(device) for array in arrays]
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(arrays[0]))
        rows = torch.from_numpy(order).to(arrays[0].device).split(args.batch_size)
        for numbers in rows[done:steps_per_epoch]:
            yield [array[numbers[PART]].to(device) for array in arrays]
            step += 1


# --- end shared ---


# %% Images out
# --- shared: images out ---
@contextlib.contextmanager
def replacing(path):
    """Give a path beside `path` to write to, then flush that file and rename it: all of it or nothing."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")  # two runs may pack the same images
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        fail(f"{path} cannot be written: {error} (see --out, --root, --save)")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # what is left if anything failed


@torch.no_grad()
def sample(generator, z):
    """What a generator in evaluation mode makes of z (N,...), 64 at a time: uint8 N,C,H,W on the CPU."""
    device = next(generator.parameters()).device
    parts = (generator(part.to(device)).float() for part in z.split(64))  # one at a time
    return torch.cat([part.mul(127.5).add(128).clamp(0, 255).byte().cpu() for part in parts])


def generate(args, saved):
    """--generate: images by a checkpoint's averaged generator, and their labels: a .npz, .png or folder."""
    path = Path(args.save)
    suffix = "" if args.save.endswith(("/", os.sep)) else path.suffix.lower()
    is_grid = Image.registered_extensions().get(suffix) in Image.SAVE
    if suffix not in ("", ".npz") and not is_grid:
        fail(f"--save {path} is none of: .npz, an image such as .png, a folder (with a dot in it: name/)")
    if not suffix and path.is_dir() and os.listdir(path):
        fail(f"--save {path} has other files in it: a new or empty folder is needed")
    generator = make_networks(args)[0].to(pick_device(args)[0]).eval()
    load_states({"Generator": generator}, saved)
    z = draw_z(args, args.generate)
    images = sample(generator, z)
    arrays = {"images": images.permute(0, 2, 3, 1).squeeze(3).numpy()}  # N,H,W,3 or, grey, N,H,W
    if z.shape[1] > Z_DIM:  # one-hot labels before the noise: the script has classes
        arrays["labels"] = z[:, :-Z_DIM].argmax(1).numpy()
    if suffix == ".npz":
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    elif is_grid:
        with replacing(path) as part:
            save_image(images / 255, part, nrow=math.ceil(args.generate**0.5))
    else:  # a folder, with one in it for each class, as --data takes them
        for i, pixels in enumerate(arrays["images"]):
            folder = args.class_names[arrays["labels"][i]] if "labels" in arrays else ""
            with replacing(path / folder / f"{i:06d}.png") as part:
                Image.fromarray(pixels).save(part)
    print(f"{args.generate} images: {path}")


def draw_curves(out, columns, table):
    """Draw losses.png, scores.png and, of each other metric, NAME.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figures = {}
    for name, values in zip(columns[4:], table.T[4:]):  # after step, epoch, seconds and images
        chart = "losses" if name.startswith("loss_") else "scores" if name.startswith("d_") else name
        figure = figures.setdefault(chart, Figure(figsize=(8, 4.5), layout="constrained"))
        steps, values = table[np.isfinite(values), 0], values[np.isfinite(values)]
        means = [values[max(0, end - SMOOTH) : end].mean() for end in range(1, len(values) + 1)]
        axes = figure.gca()
        axes.set(title=f"{SCRIPT}: {chart}", xlabel="step")
        axes.plot(steps, means, label=name)
        axes.legend()
    for chart, figure in figures.items():
        with replacing(out / f"{chart}.png") as part:
            figure.savefig(part)


def epoch_of(file):
    """The epoch in the name of a sample grid."""
    return int(file.stem.removeprefix("epoch_"))


def draw_animation(out):
    """Draw evolution.gif, the sample grids in order."""
    files = sorted(out.glob("samples/epoch_*[0-9].png"), key=epoch_of)
    if not files:
        return
    shown = files[:: -math.ceil(len(files) / GIF_FRAMES)][::-1]  # the last one always
    first, *rest = [ImageOps.contain(Image.open(file), (512, 512)) for file in shown]
    with replacing(out / "evolution.gif") as part:
        first.save(part, save_all=True, append_images=rest, duration=250, loop=0)


# --- end shared ---


# %% Training
# --- shared: training ---
def pick_device(args):
    """(device, precision) by the flags; where they are auto, the fastest that this machine has."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if name == "cuda" and RANKS > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.ones(8, device=device).mul(2).tolist()  # a GPU that this torch has no kernels for fails here
    except Exception as error:
        fail(f"--device {name} cannot be used: {error} (see --device cpu)")
    if args.precision != "auto":
        return device, args.precision
    if name == "cuda":
        return device, "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text() if cpuinfo.exists() else ""
    multiplies_bf16 = "amx_bf16" in cpu or ("avx512_bf16" in cpu and "AuthenticAMD" in cpu)
    return device, "bf16" if multiplies_bf16 else "fp32"


def use_gan_ops(args, nets, device):
    """Have gan_ops serve where it can, and say so. A build for another torch can fail in any way."""
    if args.no_fused:
        return "does not serve: --no-fused"
    try:
        import gan_ops

        if gan_ops.torch_version != torch.__version__:
            raise ImportError(f"it was built for torch {gan_ops.torch_version}")
        if device.type not in gan_ops.devices:
            raise ImportError(f"it was built for {' and '.join(gan_ops.devices)}")
    except Exception as error:
        return f"does not serve: {error} (pip install -e . builds it)"
    for module in (*nets.G.modules(), *nets.D.modules()):
        module.fused = True
    return f"serves on {device.type}"


def load_states(parts, saved):
    """Load the state of each of `parts` from a checkpoint."""
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (KeyError, ValueError, RuntimeError) as error:
            fail(
                f"the checkpoint's {name} is missing (only a checkpoint.pt can be resumed) "
                f"or does not fit this {SCRIPT}.py: {error}"
            )


def make_training(args, device, precision, saved):
    """Networks, average, optimisers and what else a step needs; its `parts` are what a checkpoint holds."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be captured on the default one
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    G, D = nn.ModuleList(make_networks(args)).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    options = {"betas": args.betas, "fused": device.type != "mps", "capturable": device.type == "cuda"}
    opt_g = Optimiser(G.parameters(), args.lr, **options)
    opt_d = Optimiser(D.parameters(), args.d_lr, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d, "scaler": scaler}
    if saved:
        saved["scaler"] = saved.get("scaler") or scaler.state_dict()  # it began in another precision
        load_states(parts, saved)
    for optimiser, lr in (opt_g, args.lr), (opt_d, args.d_lr):  # the flags win over the checkpoint
        group = optimiser.param_groups[0]
        if "initial_lr" in group:  # but not over a scheduler of your own
            lr = group["lr"]
        group.update(options, lr=torch.as_tensor(lr, device=device))  # a CUDA graph would freeze a number
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = functools.partial(torch.autocast, device.type, half, precision != "fp32")
    return argparse.Namespace(**parts, parts=parts, device=device, autocast=autocast)


def lr_factor(args, step):
    """What both learning rates are multiplied by at `step`, a tensor: 1, then falling with 1 / sqrt(step)."""
    if not args.lr_decay_from:
        return torch.ones_like(step)
    return torch.clamp(args.lr_decay_from / step, max=1.0).sqrt()


def optimise(nets, loss, optimiser):
    """Back-propagate `loss` and take a step, at the optimiser's learning rate times nets.lr_factor."""
    optimiser.zero_grad(set_to_none=True)
    nets.scaler.scale(loss).backward()
    group = optimiser.param_groups[0]
    if RANKS > 1:
        average_gradients(group["params"])
    lr = group["lr"]
    group["lr"] = lr * nets.lr_factor
    nets.scaler.step(optimiser)
    group["lr"] = lr  # as it was: a scheduler of your own may set it
    nets.scaler.update()


def average_gradients(parameters):
    """Give each process the mean of all processes' gradients."""
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= RANKS


def agree(metrics, stop, step, last):
    """(mean metrics, whether to stop) of all processes, which look at each other every LOG_EVERY steps."""
    if RANKS == 1:
        return metrics, stop
    if step % LOG_EVERY and step < last:
        return metrics, False
    values = torch.tensor([stop, *metrics.values()], dtype=torch.float64)
    torch.distributed.all_reduce(values)
    stops, *means = (values / RANKS).tolist()
    metrics = dict(zip(metrics, means))
    return metrics, stops > 0 or not finite(metrics)


def update_ema(nets, args, step):
    """Average the generator's weights, with a half-life of a tenth of the steps so far."""
    share = 1 - torch.clamp(0.5 ** (10 / step), max=args.ema)
    for average, value in zip(nets.ema.state_dict().values(), nets.G.state_dict().values()):
        if value.is_floating_point():
            average.lerp_(value, share)


def update_ema_batch_norm(nets, args):
    """Give the averaged generator batch norm statistics of its own, as the generator's do not fit it."""
    if args.ema:
        z = draw_z(args, EMA_IMAGES).to(nets.device)
        torch.optim.swa_utils.update_bn(z.view(EMA_IMAGES // 4, 4, -1).unbind(1), nets.ema)


def iterate(nets, args, step, z, real, *labels):
    """A training step with all around it that is captured; `step` is a tensor. Returns metrics."""
    real = real.permute(0, 3, 1, 2).float() / 127.5 - 1  # N,C,H,W, channels_last
    if args.flip:
        mirrored = torch.rand(args.batch_size, 1, 1, 1, device=real.device)[PART] < 0.5
        real = torch.where(mirrored, real.flip(3), real)
    nets.step = step
    nets.lr_factor = lr_factor(args, step)
    metrics = train_step(nets, args, real, z, *labels)
    update_ema(nets, args, step)
    return {name: torch.as_tensor(value).detach() for name, value in metrics.items()}


class Captured:
    """Calls `work` three times, then captures it as a CUDA graph, which it replays from then on."""

    def __init__(self, work):
        self.work = work
        self.calls = 0
        self.graph = None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls < 4:  # three to warm up
            return self.work(*inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.inputs = [tensor.clone() for tensor in inputs]
            try:
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self.result = self.work(*self.inputs)
            except RuntimeError as error:  # that the capture cannot end, after what went wrong in it
                raise (error.__context__ or error) from None
        for static, tensor in zip(self.inputs, inputs):
            static.copy_(tensor)
        self.graph.replay()
        return self.result


@contextlib.contextmanager
def signals_noted(caught):
    """Append Ctrl-C, SIGTERM and a closed terminal to the list `caught`, instead of ending the process."""
    handlers = {}
    kinds = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
        kinds.append(signal.SIGHUP)
    with contextlib.suppress(ValueError):  # not in the main thread
        for kind in kinds:
            handlers[kind] = signal.signal(kind, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        for kind, handler in handlers.items():  # a notebook goes on
            signal.signal(kind, handler)


@contextlib.contextmanager
def logger(args, step):
    """Give a function of (metrics, step) that sends them to --logger, in a resumed run to the same place."""
    if RANK > 0:  # the first process writes
        yield
    elif args.logger == "wandb":
        import wandb

        run = wandb.init(project=SCRIPT, id=args.wandb_id, resume="allow", dir=args.out, config=vars(args))
        args.wandb_id = run.id
        with run:
            yield run.log
    elif args.logger == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(Path(args.out, "tensorboard"), purge_step=step + 1) as writer:

            def log(metrics, step):
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

            yield log
    else:
        yield lambda metrics, step: None


def save_metrics(out, rows):
    """metrics.csv, a row each LOG_EVERY steps, and its curves."""
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))  # all that any row has
    table = np.array([[row.get(name, math.nan) for name in columns] for row in rows])
    with replacing(out / "metrics.csv") as part:
        np.savetxt(part, table, "%.10g", ",", header=",".join(columns), comments="")
    draw_curves(out, columns, table)


def save_torch(path, content):
    """torch.save, whole or not at all."""
    with replacing(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"is there room? {error}") from error


def models_of(args, nets):
    """The two networks, the generator averaged, as --generate and the tools take them."""
    return {"Generator": nets.ema.state_dict(), "Discriminator": nets.D.state_dict(), "config": vars(args)}


def save(args, nets, step, rows):
    """config.json, metrics.csv, models.pth, the curves and checkpoint.pt of a run."""
    out = Path(args.out)
    models = models_of(args, nets)
    states = {name: part.state_dict() for name, part in nets.parts.items()}
    checkpoint = {**models, **states, "step": step, "rows": rows}
    if not (out / "checkpoint.pt").exists():  # so that whatever ends the first save, the run can be resumed
        save_torch(out / "checkpoint.pt", checkpoint)
    with replacing(out / "config.json") as part:
        part.write_text(json.dumps(vars(args), indent=2))
    save_torch(out / "models.pth", models)
    try:
        save_metrics(out, rows)
    finally:  # last, so that a kill leaves none of the others older; whatever the curves raise
        save_torch(out / "checkpoint.pt", checkpoint)


def last_step(args, steps_per_epoch):
    """The step that ends the run, by --steps or --epochs, whichever comes first."""
    ends = [args.steps, args.epochs and args.epochs * steps_per_epoch]
    return min([end for end in ends if end], default=max(20 * steps_per_epoch, 5000))


def training_steps(nets, args, arrays, step, last, ends_at, caught):
    """Train from `step` to step `last`, to a time or to a signal; yield (step, metrics, whether it ends).

    Of several processes, which take the same steps, it yields to the first alone: that one writes.
    """
    source = batches(arrays, args, nets.device, step)
    run_step = functools.partial(iterate, nets, args)
    if nets.device.type == "cuda":
        run_step = Captured(run_step)
    stop = step >= last
    while not stop:
        step += 1
        # random numbers follow from --seed and the step, so that a resumed run has the same
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)
        z = torch.randn(args.batch_size, Z_DIM, device=nets.device)[PART]
        batch = next(source)
        nets.whole = False  # an error in a step leaves the networks half updated
        metrics = run_step(torch.full((), step, device=nets.device), z, *batch)
        stop = step == last or bool(caught) or time.monotonic() > ends_at
        metrics, stop = agree(metrics, stop, step, last)
        nets.whole = True
        if RANK == 0:
            yield step, metrics, stop


def finite(metrics):
    """Whether all losses are finite."""
    return math.isfinite(sum(value for name, value in metrics.items() if name.startswith("loss")))


def check_finite(metrics, args, step, rows):
    """End with one line, after the metrics are saved, if a loss is not finite."""
    if not finite(metrics):
        save_metrics(Path(args.out), rows)
        fail(
            f"no finite loss at step {step}: try a lower --lr or --precision fp32, resumed or in a new --out"
        )


def run_files(folder):
    """The names of what a folder holds of a run."""
    return [path.name for pattern in RUN_FILES.split() for path in sorted(Path(folder).glob(pattern))]


@contextlib.contextmanager
def held(args, saved):
    """Hold the run folder --out for this process; fail if another process does, or it holds another run."""
    from filelock import FileLock, Timeout  # torch brings it

    out = Path(args.out)
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"another process trains in {out}")
    except OSError as error:
        fail(f"{out} cannot be written: {error} (see --out)")
    try:
        files = run_files(out)
        if files and not (saved and saved["path"].parent.samefile(out)):
            fail(f"{out} holds a run ({', '.join(files)}): take another --out, or --resume its checkpoint.pt")
        if saved and load_checkpoint(saved["path"]).get("step") != saved.get("step"):
            fail(
                f"another process went on with {saved['path']} meanwhile: the same command goes on from there"
            )
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            (out / ".lock").unlink()
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # it stays if there is anything in it
                out.rmdir()


def set_up(args, saved):
    """What a run begins with: arrays that batches are rows of, nets, step, metrics so far."""
    if Path(args.out).resolve() == Path(args.data).resolve():
        fail(f"--out {args.out} is the folder of the images, of which its samples would be some")
    device, precision = pick_device(args)
    if RANKS > 1:
        torch.distributed.init_process_group()
        atexit.register(torch.distributed.destroy_process_group)
    if RANK > 0:
        torch.distributed.barrier()  # until the first process has packed the images
    pack, names = load_pack(args)
    if RANKS > 1 and RANK == 0:
        torch.distributed.barrier()
    if len(pack) < args.batch_size:
        fail(f"{len(pack)} images are too few for --batch-size {args.batch_size}")
    if args.batch_size % RANKS:
        fail(f"--batch-size {args.batch_size}, that of all {RANKS} processes, is not a multiple of them")
    if saved and saved["config"].get("image_set", args.image_set) != args.image_set:
        fail(f"{args.out} began with other images than --data {args.data} has now: put those back")
    arrays = [pack, *prepare(args, pack, names)]
    nets = make_training(args, device, precision, saved)
    args.used = {
        "images": len(pack),
        "device": str(device),
        "precision": precision,
        "torch": str(torch.__version__),
        "gan_ops": use_gan_ops(args, nets, device),
    }
    step = saved["step"] if saved else 0
    epoch = math.ceil(step / (len(pack) // args.batch_size))
    for file in Path(args.out).glob("samples/epoch_*[0-9].png"):
        if epoch_of(file) > epoch:  # by a process that was killed: it is drawn again
            file.unlink(missing_ok=True)
    used = "; ".join(f"{name} {value}" for name, value in args.used.items())
    print(f"{used}; into {args.out} from step {step}", flush=True)
    return arrays, nets, step, saved["rows"] if saved else []


def train(args, saved):
    """Train from the start, or on from the checkpoint `saved`, into the run folder --out."""
    ends_at = time.monotonic() + 60 * (args.minutes or math.inf)
    out = Path(args.out)
    arrays, nets, start, rows = set_up(args, saved)
    saved_at = -math.inf  # soon, so that what can be resumed is there before samples are
    began = time.monotonic() - (rows[-1]["seconds"] if rows else 0)
    rows = [row for row in rows if row["step"] % LOG_EVERY == 0]  # a stop may have added one in between
    steps_per_epoch = len(arrays[0]) // args.batch_size
    sample_every = steps_per_epoch * math.ceil(SAMPLE_EVERY / steps_per_epoch)
    last = last_step(args, steps_per_epoch)
    fixed_z = draw_z(args, GRID**2)
    step = start
    caught = []
    steps = training_steps(nets, args, arrays, start, last, ends_at, caught)
    bar = tqdm(steps, SCRIPT, last, initial=start, disable=RANK > 0)
    with logger(args, start) as log, signals_noted(caught), bar:
        try:
            for step, metrics, stop in bar:
                epoch = math.ceil(step / steps_per_epoch)
                now = time.monotonic()
                log_now = stop or step % LOG_EVERY == 0
                draw_now = stop or step % sample_every == 0
                keep_now = args.keep_every and step % (args.keep_every * steps_per_epoch) == 0
                save_now = stop or ((log_now or keep_now) and now - saved_at > 60 * args.save_every)
                if log_now:
                    metrics = {name: float(value) for name, value in metrics.items()}
                    rows.append(
                        {
                            "step": step,
                            "epoch": epoch,
                            "seconds": round(now - began, 2),
                            "images": step * args.batch_size,
                            **metrics,
                        }
                    )
                    check_finite(metrics, args, step, rows)
                    bar.set_postfix({"epoch": epoch, **metrics})
                    log(metrics, step)
                if draw_now or save_now or keep_now:
                    check_finite(metrics, args, step, rows)
                    update_ema_batch_norm(nets, args)
                if draw_now:
                    with replacing(out / f"samples/epoch_{epoch:04d}.png") as part:
                        save_image(sample(nets.ema, fixed_z) / 255, part, nrow=GRID)
                if save_now:
                    save(args, nets, step, rows)
                    saved_at = now
                if keep_now:
                    save_torch(out / f"models_{epoch:04d}.pth", models_of(args, nets))
        except BaseException:  # a mistake in a changed script, a closed terminal: save what is whole
            if step > start and nets.whole and finite(metrics):
                with contextlib.suppress(Exception):
                    update_ema_batch_norm(nets, args)
                with contextlib.suppress(SystemExit):  # where the disk is full
                    save(args, nets, step, rows)
            raise
    if RANK == 0:
        finish(args, start, step, last, caught)


def finish(args, start, step, last, caught):
    """Draw the animation, and say how to go on."""
    draw_animation(Path(args.out))
    if start >= last:
        print(f"{args.out} has had its {last} steps: a larger --steps or --epochs goes on")
    if caught or step < last:
        print(f"stopped at step {step} and saved; to go on: python {SCRIPT}.py --resume --out {args.out}")
    if caught:
        raise SystemExit(128 + caught[0])


# --- end shared ---


# %% Command line
def add_flags(parser):
    """Flags of this script alone, and those whose defaults are."""
    add = parser.add_argument
    add("--blocks", type=int, default=1, help="residual blocks of the generator (%(default)s)")
    add("--width", type=count, default=16, help="channels of the layer next to the image (%(default)s)")
    add("--labels", type=nfc, help="classes to make: names or numbers, as 3,7 (all)")
    add(
        "--data", default="mnist", help="mnist, fashion, synthetic, a folder or .zip of folders (%(default)s)"
    )
    parser.set_defaults(lr=1e-3, d_lr=1e-3, lr_decay_from=500, betas=[0.0, 0.999], ema=0.999, flip=False)
    parser.set_defaults(size=28, channels=1, class_names=None)


def flag_defaults(args):
    """No default depends on another flag."""
    return {}


# --- shared: command line ---
def load_checkpoint(path):
    """A checkpoint.pt or models.pth of this script, on the CPU; no code in it is run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["config"] = {RENAMED.get(name, name): value for name, value in saved["config"].items()}
        rows = saved.get("rows", [])
        saved["rows"] = [dict(zip(COLUMNS, row)) if isinstance(row, list) else row for row in rows]
        if saved["config"]["script"] != SCRIPT:
            raise ValueError(f"it is of {saved['config']['script']}.py")
    except Exception as error:  # a missing, cut or foreign file fails in many ways
        fail(
            f"{path} is no checkpoint of {SCRIPT}.py: {error}; "
            f"of a run its folder has {run_files(path.parent) or 'nothing'}"
        )
    saved["path"] = path
    return saved


def count(text):
    """A whole number on the command line, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def amount(text):
    """A number on the command line, 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is less than 0, or not finite")
    return float(text)


def fraction(text):
    """A number on the command line, 0 or more and less than 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def parse(argv):
    """(flags, checkpoint or None); a flag that is given wins over the checkpoint's, that over a recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add_flags(parser)
    add("--root", default="data", help="folder of named sets and of decoded images (%(default)s)")
    add("--classes", type=nfc, nargs="+", default=[], help="only these subfolders of --data (all)")
    add("--epochs", type=count, help="end of the run (20, and at least 5000 steps)")
    add("--steps", type=count, help="the same in steps; whichever comes first")
    add("--minutes", type=amount, default=0, help="the same in minutes, for notebooks; 0: none (%(default)s)")
    add("--batch-size", type=count, default=64, help="images a step (%(default)s)")
    add("--lr", type=amount, help="learning rate of the generator (%(default)s)")
    add("--d-lr", type=amount, help="learning rate of the discriminator (%(default)s)")
    add(
        "--lr-decay-from",
        type=amount,
        help="step after which both fall with 1 / sqrt; 0: never (%(default)s)",
    )
    add("--betas", type=fraction, nargs=2, help="Adam's (%(default)s)")
    add("--ema", type=fraction, help="highest decay of the generator's average; 0: none (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images (%(default)s)")
    add("--seed", type=int, default=0, help="of all that is drawn by chance (%(default)s)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="(%(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="(%(default)s)")
    add("--no-fused", action="store_true", help="PyTorch's operations even where gan_ops is installed")
    add("--out", default=f"runs/{SCRIPT}", help="run folder (%(default)s)")
    add("--save-every", type=amount, default=5.0, help="minutes between checkpoints (%(default)s)")
    add("--keep-every", type=count, help="keep the weights of every Nth epoch too, models_0010.pth")
    add("--logger", choices=("tensorboard", "wandb"), help="where metrics go besides, live")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=count, metavar="N", help="make N images by --checkpoint")
    add("--checkpoint", help="models.pth or checkpoint.pt (the one in --out)")
    add("--save", default="generated.npz", help="of --generate: .npz, .png or folder (%(default)s)")

    # Flags that are given decide on the defaults of others: by recipe, or those that a checkpoint holds
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    defaults = {"script": SCRIPT, "wandb_id": None, **flag_defaults(given)}
    saved = None
    path = Path(given.checkpoint or f"{given.out}/checkpoint.pt")
    if given.generate or given.resume:
        saved = load_checkpoint(path)
        defaults.update(saved["config"], out=str(path.parent))
        if defaults["device"] == "cuda" and not torch.cuda.is_available():
            defaults["device"] = "auto"  # begun on another machine
        if given.epochs or given.steps:
            defaults.update(epochs=None, steps=None, minutes=0)  # in place of the earlier end
    elif given.checkpoint:
        fail("--checkpoint is for --generate and --resume")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.seed %= 2**63  # as random generators take it
    if args.logger and not args.generate and not importlib.util.find_spec(args.logger):
        fail(f"--logger {args.logger}: pip install {args.logger}")
    for name in FIXED:
        kept = parser.get_default(name)
        if saved and getattr(args, name) != kept:
            fail(f"{path} was begun with --{name.replace('_', '-')} {kept}, which cannot be changed")
    return args, saved


def main(argv=None):
    """Run the command line `argv`; in a notebook, where sys.argv is the kernel's, the defaults."""
    if argv is None:
        argv = [] if "kernel_launcher" in sys.argv[0] else sys.argv[1:]
    with contextlib.suppress(AttributeError):  # a notebook's output has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if RANK > 0:
        sys.stdout = None  # the first process speaks for all
    try:
        try:
            args, saved = parse(argv)
            if args.generate:
                generate(args, saved)
            elif RANK == 0:
                with held(args, saved):
                    train(args, saved)
            else:
                train(args, saved)
        except torch.cuda.OutOfMemoryError as error:
            fail(f"{error} (see --batch-size, --width, --device cpu)")
        except KeyboardInterrupt:
            fail("interrupted (KeyboardInterrupt)")
    except SystemExit as end:
        if isinstance(end.code, str):  # by fail()
            print(end.code, file=sys.stderr)
            end.code = 2
        raise


if __name__ == "__main__":
    main()
# --- end shared ---
