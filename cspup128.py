"""Train a GAN on 128x128 faces with the CSPup generator, end to end, in this one file.

The generator is a known course scheme: blocks that send the halves of their channels down two branches, as CSPNet
does (Wang et al. 2020), and double the picture. The discriminator is DCGAN's (Radford et al. 2016) without batch norm;
the two play the relativistic game under gradient penalties that is known to converge (Huang et al. 2024, R3GAN).

    python cspup128.py --width 16 --batch-size 32 --steps 600        # drawn faces, no data needed
    python cspup128.py --data celeba --epochs 20                     # CelebA, on a GPU
    python cspup128.py --generate 64 --checkpoint runs/cspup128/models.pth --save faces.png
"""
# %% Imports
import argparse, contextlib, copy, csv, functools, hashlib, importlib.metadata, io, itertools, json, math, os, random
import signal, sys, time, zipfile, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm.auto import tqdm

SCRIPT, DATA, SIZE, CHANNELS, Z, END = "cspup128", "synthetic", 128, 3, 100, "20 epochs"
DRAWN, SAMPLES, PER_ROW = (), 64, 8  # classes of what draw_picture draws; pictures of a sample grid, and in its rows
ALL = dict(batch_size=64, ema=0.999, augment="auto", flip=True, held_out=0.0)
RECIPES = {  # the one found to converge, and the slides with nothing added; a flag given by hand wins
    "stable": dict(ALL, loss="relativistic", gamma=10.0, up="mixed", d_norm="none", slope=0.2, lr=4e-4, d_lr=4e-4,
                   beta1=0.0, beta2=0.99),
    "exact": dict(ALL, loss="bce", gamma=0.0, up="deconv", d_norm="none", slope=0.0, lr=2e-4, d_lr=2e-4, beta1=0.5,
                  beta2=0.999),
}
METRICS = "loss_d", "loss_g", "d_real", "d_fake"  # what train_step adds up
CURVES = {  # picture: its title, its unit, and the columns of metrics.csv that it shows
    "losses": ("losses of discriminator and generator", "loss", ("loss_d", "loss_g")),
    "scores": ("verdicts of the discriminator", "mean probability of being real", ("d_real", "d_fake")),
}

# %% Networks
UP = {  # what doubles the picture in the left and in the right branch
    "mixed": ("bilinear", "nearest"), "bilinear": ("bilinear", "bilinear"), "nearest": ("nearest", "nearest"),
    "deconv": ("deconv", "deconv"),
}

def double(c_in, c_out, how):
    """N,c_in,H,W to N,c_out,2H,2W: a transposed convolution as DCGAN has it, or interpolation, where c_in is c_out."""
    if how == "deconv":
        return nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)
    return nn.Upsample(scale_factor=2, mode=how)

class CSPup(nn.Module):
    """Halves a, b (N,C/2,H,W each) to two branches (N,c_out,2H,2W each; `first`: 1x1 to 4x4), for a seam to add.

    The slide has "upsample or deconv". Interpolated, the left branch passes its channels on as they are.
    The 3x3 convolutions are padded by 1. The version of this block that circulates pads them by 0: its right branch
    ends four pixels short of the left one, and the sum of the two fails. `norm`: batch norm before each activation.
    """
    def __init__(self, c_in, c_out, slope, norm, up="mixed", first=False):
        super().__init__()
        half = c_in // 2
        activate = functools.partial(BatchNormLeakyReLU, slope=slope) if norm else lambda c: nn.LeakyReLU(slope)
        left, right = (nn.ConvTranspose2d(half, c_out, 4, bias=False) if first else double(half, c_out, how)
                       for how in UP[up])
        self.left = left
        self.right = nn.Sequential(
            nn.Conv2d(half, half, 1), activate(half), right,
            nn.Conv2d(c_out, c_out, 3, padding=1), activate(c_out), nn.Conv2d(c_out, c_out, 3, padding=1))

    def forward(self, a, b):
        return self.left(a), self.right(b)

class Generator(nn.Module):
    """z (N,100) to pictures (N,3,128,128) in [-1, 1]; `width`: channels of the last block, 64 on the slide.

    The slide ends in a ReLU, which cannot reach [-1, 0); this ends in Tanh. Where pictures are interpolated, their last
    doubling has a hidden layer of its own, or nothing finer than 64x64 could be learnt.
    """
    def __init__(self, width=64, slope=0.2, norm=True, up="mixed"):
        super().__init__()
        channels = [Z] + [width << i for i in (4, 3, 2, 1, 0)]
        self.blocks = nn.ModuleList(CSPup(*pair, slope, norm, up, pair[0] == Z) for pair in zip(channels, channels[1:]))
        self.seams = nn.ModuleList(SplitAdd(c, slope, norm, split=c > width) for c in channels[1:])
        self.picture = nn.ConvTranspose2d(width, CHANNELS, 4, 2, 1) if up == "deconv" else nn.Sequential(
            double(width, width, UP[up][1]), nn.Conv2d(width, width, 3, padding=1), BatchNormLeakyReLU(width, slope),
            nn.Conv2d(width, CHANNELS, 3, padding=1))

    def forward(self, z):
        x = z[:, :, None, None].chunk(2, dim=1)  # 2 of N,50,1,1
        for block, seam in zip(self.blocks, self.seams):
            x = seam(*block(*x))  # 2 of N,512,4,4; N,256,8,8; N,128,16,16; N,64,32,32; at last N,64,64,64
        return torch.tanh(self.picture(x))  # N,3,128,128

class Discriminator(nn.Module):
    """Pictures (N,3,128,128) to logits (N): `convs` 4x4 stride-2 convolutions, then a valid one over what is left.

    norm: "none"; "batch" from the second convolution on, as DCGAN has it; "spectral" (Miyato et al. 2018).
    """
    def __init__(self, width=64, convs=5, norm="none"):
        super().__init__()
        channels, layers = [CHANNELS] + [width << i for i in range(convs)], []
        wrap = nn.utils.parametrizations.spectral_norm if norm == "spectral" else lambda layer: layer
        for c_in, c_out in zip(channels, channels[1:]):
            normalised = norm == "batch" and c_in != CHANNELS
            layers.append(wrap(nn.Conv2d(c_in, c_out, 4, 2, 1, bias=not normalised)))
            layers.append(BatchNormLeakyReLU(c_out, slope=0.2) if normalised else nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, wrap(nn.Conv2d(channels[-1], 1, SIZE >> convs)))

    def forward(self, x):
        return self.layers(x).flatten()  # N,64,64,64; N,128,32,32; N,256,16,16; N,512,8,8; N,1024,4,4; N

def recipe(args):
    """The flags' defaults by --scheme; UserError for one that the slides leave no choice of."""
    for name in ("loss", "gamma", "up") if args.scheme == "exact" else ():
        if getattr(args, name) not in (None, RECIPES["exact"][name]):
            raise UserError(f"--scheme exact has --{name} {RECIPES['exact'][name]}: leave --{name} or --scheme out")
    return RECIPES[args.scheme]

def make_networks(args):
    """(generator, discriminator) on the CPU, with PyTorch's own weights; stable: DCGAN's, N(0, 0.02) and N(1, 0.02),
    and in a discriminator without batch norm, which would mend any scale, He et al.'s (2015)."""
    stable = args.scheme == "stable"
    g, d = Generator(args.width, args.slope, stable, args.up), Discriminator(args.width, args.d_convs, args.d_norm)
    for module in itertools.chain(g.modules(), d.modules()) if stable else ():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
    for module in d.modules() if stable and args.d_norm == "none" else ():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, 0.2)
            nn.init.zeros_(module.bias)
    return g, d

probability = torch.sigmoid  # of being real, from what the discriminator gives
Optimiser = torch.optim.Adam  # of both networks

def condition(args, count):
    """What the generator is told of `count` pictures besides z, count,0: nothing."""
    return torch.zeros(count, 0)

# %% Losses and one training step
def bce(logit, target):
    """nn.BCELoss of the sigmoids of logits (N) against one target, 0 or 1."""
    return F.binary_cross_entropy(logit.sigmoid(), torch.full_like(logit, target))

LOSSES = {  # name: (the discriminator's, the generator's), each from the logits of real and of fake
    "relativistic": (lambda real, fake: F.softplus(fake - real).mean(),
                     lambda real, fake: F.softplus(real - fake).mean()),
    "bce": (lambda real, fake: bce(real, 1) + bce(fake, 0), lambda real, fake: bce(fake, 1)),
    "logits": (lambda real, fake: (F.softplus(-real) + F.softplus(fake)).mean(),
               lambda real, fake: F.softplus(-fake).mean()),
    "hinge": (lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)).mean(), lambda real, fake: -fake.mean()),
}

def squared_slope(logit, pictures):
    """Mean squared norm of the gradient of the logits (N) with respect to the pictures they are of: R1, or R2."""
    (slope,) = torch.autograd.grad(logit.sum(), pictures, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()

def train_step(nets, args, inputs, train_d=True):
    """One iteration: the discriminator if `train_d`, the generator, its average. It never waits for the device.

    The discriminator's loss has besides gamma / 2 times R1 (of real pictures; Mescheder et al. 2018) and R2 (of fake
    ones), which need its second derivatives. inputs: real, uint8 N,128,128,3; z, N,100; uniform, N,8 in [0, 1), for
    flips and augmentation; the average's weight, 0-d. Adds loss_d (without the penalties), loss_g, d_real, d_fake to
    nets.sums; of a discriminator that rests, the last ones.
    """
    real, z, uniform, weight = inputs
    view = functools.partial(augment, uniform=uniform) if args.augment == "on" else lambda x: x
    real, (loss_of_d, loss_of_g) = view(to_float(real, uniform, args.flip)), LOSSES[args.loss]  # N,3,128,128
    with nets.autocast():
        fake = nets.G(z)
    fake = view(fake.to(real.dtype))  # once for both networks
    if train_d:
        nets.D.requires_grad_(True)
        pair = [x.detach().requires_grad_(args.gamma > 0) for x in (real, fake)]
        narrow = args.gamma > 0 and nets.scaler.is_enabled()  # gradients of gradients do not fit fp16
        with contextlib.nullcontext() if narrow else nets.autocast():
            logits = [nets.D(x).float() for x in pair]
        loss = loss_of_d(*logits)
        nets.last[0], nets.last[2] = loss.detach(), logits[0].detach().sigmoid().mean()
        if args.gamma:
            loss = loss + args.gamma / 2 * sum(map(squared_slope, logits, pair))
        optimise(nets, loss, nets.opt_d)
    nets.D.requires_grad_(False)
    with nets.autocast():
        real_logit = nets.D(real).float() if args.loss == "relativistic" else None
        fake_logit = nets.D(fake).float()
    loss = loss_of_g(real_logit, fake_logit)
    optimise(nets, loss, nets.opt_g)
    nets.last[1], nets.last[3] = loss.detach(), fake_logit.detach().sigmoid().mean()
    finish_step(nets, weight)

# %% Fused operations, or their PyTorch twins
# --- shared: fused ---
gan_ops = None  # the extension's operations, where use_gan_ops has found them

def use_gan_ops(device, wanted=True):
    """Look for the extension gan_ops; returns "serves", or why the PyTorch twins below serve in its place."""
    global gan_ops
    gan_ops, here = None, torch.__version__
    if not wanted:
        return "does not serve: --no-fused"
    try:
        built = importlib.import_module("gan_ops")
        if built.torch_version != here:
            raise ImportError("it was built for another torch")
    except Exception as error:  # it is not there, or cannot be loaded: neither stops a script
        try:
            label = importlib.metadata.version("gan-scripts").partition("+torch.")[2]
        except importlib.metadata.PackageNotFoundError:
            label = ""
        return f"does not serve: {one_line(error)} (built for {label or 'no'} torch, this is {here}): pip install -e ."
    if device.type not in built.devices:
        return f"does not serve: built without {device.type} ({built.without_cuda or 'it has no such kernels'})"
    gan_ops = torch.ops.gan_ops
    return "serves"

class BatchNormLeakyReLU(nn.BatchNorm2d):
    """`leaky_relu(batch_norm(x), slope)` as one operation; state_dict and evaluation are nn.BatchNorm2d's."""
    def __init__(self, channels, slope, **options):
        super().__init__(channels, **options)
        self.slope = slope

    def norm_arguments(self):
        """What gan_ops needs besides x; counts the batch, as nn.BatchNorm2d does."""
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        of_batch = self.training or not self.track_running_stats
        return (self.weight, self.bias, self.running_mean, self.running_var, of_batch, self.momentum, self.eps,
                self.slope)

    def forward(self, x):
        if gan_ops:
            return gan_ops.batch_norm_leaky_relu(x, *self.norm_arguments())
        return F.leaky_relu(super().forward(x), self.slope)
# --- end shared ---

class SplitAdd(BatchNormLeakyReLU):
    """The seam: adds two branches, batch norm and LeakyReLU if `norm`, cuts into channel halves if `split`."""
    def __init__(self, channels, slope, norm=True, split=True):
        super().__init__(channels, slope, affine=norm, track_running_stats=norm)
        self.norm, self.split = norm, split

    def forward(self, left, right):
        if gan_ops and self.norm:
            parts = gan_ops.split_add_batch_norm_leaky_relu(left, right, *self.norm_arguments(), self.split)
        elif gan_ops:
            parts = gan_ops.split_add(left, right, self.split)
        else:
            x = super().forward(left + right) if self.norm else left + right
            parts = x.chunk(2 if self.split else 1, dim=1)
        return parts if self.split else parts[0]

# %% Data
def draw_picture(index):
    """Face number `index` of --data synthetic, drawn with Pillow at twice the size: always the same one."""
    rng, s = random.Random(index), 2 * SIZE
    image = Image.new("RGB", (s, s), tuple(rng.randint(30, 230) for _ in range(3)))
    draw, tone, turn = ImageDraw.Draw(image), rng.random(), rng.uniform(-0.12, 0.12)
    skin, dark = ([int(k * (a + (b - a) * tone)) for a, b in ((95, 255), (58, 219), (40, 186))] for k in (1, 0.75))
    hair = rng.choice([(25, 20, 18), (72, 45, 26), (122, 82, 45), (196, 160, 96), (130, 126, 124)])
    x, y, w, h = (s * rng.uniform(*span) for span in ((0.46, 0.54), (0.52, 0.57), (0.21, 0.26), (0.29, 0.34)))

    def oval(dx, dy, rx, ry, colour, shape=draw.ellipse, *angles):  # in half axes of the face, from its middle
        shape((x + (dx - rx) * w, y + (dy - ry) * h, x + (dx + rx) * w, y + (dy + ry) * h), *angles, fill=tuple(colour))

    oval(0, 1.9, 1.9, 0.9, [rng.randint(20, 220) for _ in range(3)])  # shoulders
    oval(0, 0.2, 1.35, rng.choice([0.9, 1.35]), hair)
    oval(0, 0.9, 0.42, 0.5, dark)  # neck
    oval(0, -0.3, 1.14, 0.9, hair)
    oval(0, 0, 1, 1, skin)
    oval(0, -0.35, 1, rng.uniform(0.68, 0.85), hair, draw.pieslice, 180, 360)
    iris, brow = rng.choice([(60, 40, 25), (50, 90, 140), (70, 110, 60)]), rng.uniform(0.2, 0.27)
    for side in (turn - 0.42, turn + 0.42):
        oval(side, -0.1, 0.2, 0.085, (245, 245, 245))
        oval(side + turn / 3, -0.1, 0.09, 0.08, iris)
        oval(side, -0.1 - brow, 0.22, 0.03, hair)
    oval(turn * 1.5, 0.22, 0.13, 0.1, dark)  # nose
    oval(turn, 0.52, rng.uniform(0.3, 0.46), rng.uniform(0.06, 0.16), (175, 60, 70), draw.chord, 0, 180)
    return image

def settle(args, pack, steps):
    """Decide what the command line left open, now that the pictures are known: augmentation, and the end.

    Returns what a step takes of each picture besides the picture: here nothing.
    """
    if args.augment == "auto":
        args.augment = "on" if len(pack) < 2000 else "none"
    if not (args.epochs or args.steps):
        args.epochs = 20
    return ()

# --- shared: data ---
PICTURES, SYNTHETIC = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"), 4096
DIGITS = dict(mnist=torchvision.datasets.MNIST, fashion=torchvision.datasets.FashionMNIST)

class UserError(Exception):
    """What the user can mend: main prints it as one line and exits with status 2."""

def one_line(error):
    """The first line of an exception's text, or its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

def find_celeba(root):
    """The aligned CelebA pictures, a folder or .zip: under root, in Kaggle's input folders, or downloaded to root."""
    places = [Path(root, f"{folder}img_align_celeba{end}") for end in ("", ".zip") for folder in ("celeba/", "")]
    for depth in ("*", "*/*", "datasets/*/*"):
        places += Path("/kaggle/input").glob(f"{depth}/img_align_celeba")
    try:
        if not any(place.exists() for place in places):
            torchvision.datasets.CelebA(root, download=True)
        return next(place for place in places if place.exists())
    except Exception as error:  # quota, network, a package: whatever it was, the way out is the same
        raise UserError(
            f"CelebA is not in {', '.join(map(str, places))} or /kaggle/input/*, and its download failed "
            f"({one_line(error)}): put img_align_celeba.zip into {Path(root, 'celeba')}") from None

def read_idx(path, dimensions):
    """An idx file of bytes with so many dimensions, the first of its pictures or labels, as a numpy array."""
    data, head = path.read_bytes(), 4 * (dimensions + 1)
    if data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} begins with {data[:4].hex()}, not with 0000080{dimensions} as idx files of this kind "
                        "do: delete it, and it is unpacked or fetched again")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, head, 4)]
    if len(data) != head + math.prod(shape):
        raise UserError(f"{path} is cut short: it has {len(data)} bytes, not {head + math.prod(shape)}; delete it, and "
                        "it is unpacked or fetched again")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)

def open_idx(name, root, part):
    """The pictures of mnist or fashion, `part` train or t10k, each in its class's folder; downloaded where need be."""
    kind = DIGITS[name]
    folder = Path(root, kind.__name__, "raw")
    files = [folder / f"{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]
    try:
        if not all(file.exists() for file in files):
            kind(root, download=True)
    except Exception as error:  # network, a broken .gz: whatever it was, the way out is the same
        raise UserError(f"{name} is not in {folder}, and its download failed ({one_line(error)}): put its four .gz "
                        "files there") from None
    pictures, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    classes = [text.split(" - ")[0].split("/")[0] for text in kind.classes]
    if len(labels) != len(pictures) or labels.max(initial=0) >= len(classes):
        raise UserError(f"{files[1]} does not match {files[0].name}: {len(labels)} labels up to {labels.max(initial=0)}"
                        f" for {len(pictures)} pictures of {len(classes)} classes; delete both, and fetch them again")
    return {f"{classes[labels[i]]}/{i:05d}": (zlib.crc32(pictures[i]), functools.partial(Image.fromarray, pictures[i]))
            for i in np.argsort(labels, kind="stable").tolist()}

def open_source(data, root):
    """What one word of --data names: (name, {name of a picture: (stamp, function that opens it)}).

    A set's own test pictures are mnist-test, fashion-test and, of what is drawn, synthetic-test.
    """
    known, part = data.removesuffix("-test"), "t10k" if data.endswith("-test") else "train"
    if known in DIGITS:
        return data, open_idx(known, root, part)
    if known == "synthetic":
        drawn = range(SYNTHETIC) if part == "train" else range(SYNTHETIC, SYNTHETIC * 5 // 4)
        drawn = sorted(drawn, key=lambda i: i % max(1, len(DRAWN)))  # in the order of their classes
        names = [f"{DRAWN[i % len(DRAWN)]}/{i}" if DRAWN else str(i) for i in drawn]
        return data, {name: (SYNTHETIC, functools.partial(draw_picture, i)) for name, i in zip(names, drawn)}
    path = find_celeba(root) if data == "celeba" else Path(os.path.expanduser(data))
    if not path.exists():
        raise UserError(f"there is no {path}: --data takes celeba, mnist, fashion, synthetic, a folder or a .zip file")
    if path.is_dir():
        files = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        found = {file.relative_to(path).as_posix(): file for file in files if file.is_file()}
        load, stamp = lambda name: Image.open(path / name), lambda file: [file.stat().st_size, file.stat().st_mtime_ns]
    else:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path} is no zip file, or cut short ({one_line(error)}): fetch it again") from None
        found = {info.filename: info for info in archive.infolist()}
        load, stamp = lambda name: Image.open(io.BytesIO(archive.read(name))), lambda info: info.CRC
    names = [n for n in sorted(found) if n.lower().endswith(PICTURES) and "__MACOSX" not in n and "/." not in f"/{n}"]
    if not names:
        raise UserError(f"{path} holds no pictures: looked for {' '.join(PICTURES)}")
    return path.resolve().stem, {name: (stamp(found[name]), functools.partial(load, name)) for name in names}

def list_pictures(args):
    """The pictures of --data in --classes: (name, {name of a picture: (stamp, function that opens it)})."""
    names, found, folders, wanted = [], {}, set(), set(args.classes)
    for data in args.data:
        name, pictures = open_source(data, args.root)
        names.append(name)
        for picture, entry in pictures.items():
            inside = set(picture.split("/")[:-1])
            folders |= inside
            if not wanted or wanted & inside:
                found[f"{data.rstrip('/')}/{picture}" if len(args.data) > 1 else picture] = entry
    if wanted - folders:
        raise UserError(f"{' '.join(args.data)} has no pictures in {sorted(wanted - folders)}: "
                        f"--classes can be of {sorted(folders)}")
    return "+".join(names)[:60], found

def square(image, size, channels):
    """A PIL picture as uint8 size,size,channels, resized with antialiasing: its centre square.

    A picture with transparency is cut out already: all of it is laid on white.
    """
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which convert would clip
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    (w, h), side, cut_out = image.size, min(image.size), "A" in image.getbands() or "transparency" in image.info
    if cut_out:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if cut_out and w != h:
        whole = [max(1, round(size * length / max(w, h))) for length in (w, h)]
        canvas = Image.new(image.mode, (size, size), "white")
        canvas.paste(image.resize(whole, Image.BILINEAR), ((size - whole[0]) // 2, (size - whole[1]) // 2))
        image = canvas
    else:
        box = (w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2
        image = image.resize((size, size), Image.BILINEAR, box=box)
    return np.asarray(image).reshape(size, size, channels)

def find_pack(args):
    """(where the pack of --data is or will be, where its report of pictures left out, list_pictures' pictures)."""
    name, items = list_pictures(args)
    stamps = [SCRIPT, args.channels, [(picture, stamp) for picture, (stamp, _) in items.items()]]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]
    path = Path(args.root, ".packed", f"{name}-{args.size}-{key}.npy")
    return path, path.with_suffix(".left-out.txt"), items

def load_pack(args):
    """The pictures of --data as uint8 N,size,size,channels, memory-mapped; on first use decoded into <root>/.packed."""
    path, report, items = find_pack(args)
    if not path.exists():
        write(path, lambda part: pack_pictures(part, report, items, args.size, args.channels))
    if report.exists():
        left_out = len(report.read_text().splitlines())
        print(f"{left_out} of {len(items)} pictures cannot be read and are left out: {report} names them")
    return np.load(path, mmap_mode="c")  # copy on write, since torch warns of what is read-only

def pack_pictures(path, report, items, size, channels):
    """Decode pictures in threads into the .npy file `path`; list those that cannot be read in `report`.

    Its lines are JSON: [name, why].
    """
    def decode(item):
        name, (_, load) = item
        try:
            with load() as image:
                return square(image, size, channels)
        except Exception as error:  # a broken file can raise anything; the report says what
            return json.dumps([name, one_line(error)])  # which spells any name in plain letters, on one line

    def header(count):  # numpy pads it, so its length does not depend on the count
        head = dict(descr="|u1", fortran_order=False, shape=(count, size, size, channels))
        np.lib.format.write_array_header_1_0(file, head)

    if not items:
        raise UserError(f"there is not one picture to pack into {path.parent}")
    Image.MAX_IMAGE_PIXELS, failed, items = 1 << 27, [], list(items.items())
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        header(len(items))
        for start in tqdm(range(0, len(items), 256), desc=f"packing {len(items)} pictures", unit="x 256"):
            for result in pool.map(decode, items[start : start + 256]):  # few at a time: they do not pile up
                failed.append(result) if isinstance(result, str) else file.write(result)
        file.seek(0)
        header(len(items) - len(failed))
    if len(failed) == len(items):
        raise UserError(f"none of the {len(items)} pictures can be read; the first is {failed[0]}")
    if failed:
        write(report, lambda part: part.write_text("\n".join(failed) + "\n"))

def hold_out(args, count):
    """(numbers of the pictures to train on, numbers of those held out), of `count`, at random by --seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    held_out = int(args.held_out * count)
    return order[held_out:], order[:held_out]

def batches(pack, kept, args, device, rank, world, step, labels=()):
    """Yield this rank's batches after `step` on the device, lists: pictures number `kept`, uint8 B,H,W,C, and `labels`.

    Their order follows from seed and epoch. A pack that half of the GPU's free memory can hold is moved there; else a
    thread reads one batch ahead. labels: tensors with a row for each picture of the pack.
    """
    data, size, orders = [torch.from_numpy(pack), *labels], args.batch_size, {}
    steps = len(kept) // (size * world)
    if device.type == "cuda" and pack.nbytes < torch.cuda.mem_get_info()[0] / 2:
        data = [part.to(device) for part in data]

    def rows(step):
        epoch, start = step // steps, (step % steps * world + rank) * size
        if epoch not in orders:
            orders.clear()
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            orders[epoch] = kept[torch.randperm(len(kept), generator=generator)].to(data[0].device)
        return orders[epoch][start : start + size]

    def read(which):
        if data[0].is_cuda:
            return [part[which] for part in data]
        # By numpy, as PyTorch would start OpenMP threads for this thread too: with more of them than cores they no
        # longer wait for work awake, and all that the training does in parallel takes up to half as long again.
        batch = [torch.from_numpy(part.numpy()[which.numpy()]) for part in data]
        return [part.pin_memory() for part in batch] if device.type == "cuda" else batch

    choose = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None  # for its thread
    with ThreadPoolExecutor(1, initializer=choose) as thread:
        ahead = thread.submit(read, rows(step))
        for step in itertools.count(step + 1):
            now, ahead = ahead, thread.submit(read, rows(step))
            yield [part.to(device, non_blocking=True) for part in now.result()]

def to_float(batch, uniform, flip):
    """uint8 N,H,W,C to float N,C,H,W (channels_last) in [-1, 1]; if `flip`, half of the pictures are mirrored."""
    x = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.where(uniform[:, :1, None, None] < 0.5, x.flip(3), x) if flip else x

def augment(x, uniform):
    """Differentiable augmentation (Zhao et al. 2020) of N,C,H,W by 7 of N,8 uniform numbers: colour, shift, cutout."""
    (n, _, h, w), u = x.shape, uniform[:, 1:, None, None, None].unbind(1)  # u: 7 of N,1,1,1
    bright, saturation, contrast = u[0] - 0.5, 2 * u[1], u[2] + 0.5
    grey = x.mean(1, keepdim=True)  # N,1,H,W
    mean = grey.mean((2, 3), keepdim=True)
    rest = contrast * (1 - saturation) * grey + (1 - contrast) * mean + bright
    x = torch.addcmul(rest, x, contrast * saturation)  # the three one after the other, in one pass
    down, right = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    hole = ((down[:, None] / h - u[5]).abs() < 0.25) & ((right / w - u[6]).abs() < 0.25)
    x = F.pad(x.masked_fill(hole, 0.0), (w // 8, w // 8, h // 8, h // 8))
    down = down + (u[3].flatten(1) * (2 * (h // 8) + 1)).long()  # N,H
    right = right + (u[4].flatten(1) * (2 * (w // 8) + 1)).long()  # N,W
    which = torch.arange(n, device=x.device)[:, None, None]
    return x[which, :, down[:, :, None], right[:, None]].permute(0, 3, 1, 2)
# --- end shared ---

# %% Run folder
# --- shared: run folder ---
COLUMNS = "step", "epoch", "seconds", "images", *METRICS  # of metrics.csv, and where pictures are held out two more
STATE = "G", "D", "ema", "opt_g", "opt_d", "scaler"

def write(path, make):
    """Have make(part) make a file beside `path`, flush it and rename it: whole, or not at all."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def load_weights(path):
    """A checkpoint.pt or models.pth of this script, as a dict; code in a pickle does not run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["config"]["script"] == SCRIPT:
            return saved
        raise ValueError(f"it is of {saved['config']['script']}.py")
    except Exception as error:  # a missing, cut or foreign file fails in many ways
        raise UserError(f"{path} is no checkpoint of {SCRIPT}.py that can be read: {one_line(error)}") from None

@torch.no_grad()
def sample(generator, z):
    """Condition and z (N,K+Z) to pictures, uint8 N,C,H,W on the CPU, by a generator in evaluation mode."""
    return generator(z).float().mul(127.5).add(128).clamp(0, 255).byte().cpu()

def to_grid(images, columns=PER_ROW):
    """uint8 N,C,H,W as one PIL picture."""
    return Image.fromarray(torchvision.utils.make_grid(images, columns).permute(1, 2, 0).numpy())

def apart(images):
    """How far pictures (uint8 N,C,H,W) are from the nearest other one, in the median: RMS of 16x16 values in [0, 1]."""
    flat = F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)
    distances = torch.cdist(flat, flat).fill_diagonal_(math.inf).amin(1)
    return (distances.median() / flat.shape[1] ** 0.5).item()

def draw_run(out, rows, real, fake):
    """CURVES from the rows of metrics.csv, comparison.png, and evolution.gif from samples/."""
    from matplotlib.figure import Figure  # here, since it takes half a second, and a run should begin at once
    window, steps = max(1, len(rows) // 50), [int(row["step"]) for row in rows]
    for name, (title, unit, columns) in CURVES.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.set(title=f"{SCRIPT}: {title}", xlabel="step", ylabel=unit)
        for column, colour in zip(columns, ("tab:blue", "tab:orange")) if columns[0] in rows[0] else ():
            values = np.array([row[column] for row in rows], float)
            axes.plot(steps, values, color=colour, alpha=0.3)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=colour, label=column)
        if axes.lines:
            axes.legend()
            write(out / f"{name}.png", figure.savefig)
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axes, images, title in zip(figure.subplots(1, 2), (real, fake), ("real", "generated")):
        axes.set(title=title, xticks=[], yticks=[])
        axes.imshow(to_grid(images))
    write(out / "comparison.png", figure.savefig)
    files = sorted((out / "samples").glob("epoch_*.png"))
    files = dict.fromkeys(files[:: len(files) // 100 + 1] + files[-1:])  # about 100, and the last one always
    if files:  # there is none before an epoch has ended
        save_gif(out / "evolution.gif", (Image.open(file) for file in files), 250)

def save_gif(path, frames, milliseconds):
    """PIL pictures as an animation without end, each frame in at most 512x512."""
    first, *rest = (ImageOps.contain(frame, (512, 512)) for frame in frames)
    write(path, lambda part: first.save(part, save_all=True, append_images=rest, duration=milliseconds, loop=0))

def open_run(args, config, resumed):
    """Make the run folder and config.json, an earlier run moved aside; returns log(step, values, picture)."""
    out = Path(args.out)
    if not resumed and (out / "checkpoint.pt").exists():
        if Path.cwd().is_relative_to(out.resolve()):
            raise UserError(f"{out} holds an earlier run and is where you stand: name another --out")
        aside = next(p for n in itertools.count(1) if not (p := out.with_name(f"{out.name}.{n}")).exists())
        print(f"{out} holds an earlier run, which is now {out.rename(aside)}")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for part in out.rglob(".part-*"):  # of a process that was killed as it wrote
        part.unlink()
    write(out / "config.json", lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
    try:
        if args.logger == "wandb":
            import wandb
            wandb.finish()  # the run of the class, or of the notebook's cell, before this one
            run = wandb.init(project=SCRIPT, dir=out, config=config)
            return lambda step, values, picture=None: run.log(
                values if picture is None else dict(values, samples=wandb.Image(picture)), step)
        if args.logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out / "tensorboard")

            def log(step, values, picture=None):
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                if picture is not None:
                    writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            return log
    except ImportError as error:
        raise UserError(f"--logger {args.logger} needs a package ({error}): pip install {args.logger}") from None
    return lambda step, values, picture=None: None

def save_tensors(path, state):
    """torch.save, all or nothing; OSError where the disk is full, which torch has another name for."""
    def make(part):
        with open(part, "wb") as file:
            torch.save(state, file)
    try:
        write(path, make)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written, the one from before is as it was: {one_line(error)}") from None

def save_metrics(out, rows):
    """Write metrics.csv from its rows, each a dict of strings."""
    lines = [rows[0] if rows else COLUMNS, *(row.values() for row in rows)]
    write(out / "metrics.csv", lambda part: part.write_text("\n".join(map(",".join, lines)) + "\n"))

def save_run(args, nets, rows, step, seconds):
    """Write metrics.csv, then checkpoint.pt, which counts on it, then models.pth."""
    out, state = Path(args.out), {name: getattr(nets, name).state_dict() for name in STATE}
    save_metrics(out, rows)
    models = dict(Generator=state["ema"], Discriminator=state["D"], config=dict(vars(args), script=SCRIPT))
    state.update(models, step=step, seconds=seconds, last=nets.last, sums=nets.sums)
    save_tensors(out / "checkpoint.pt", state)
    save_tensors(out / "models.pth", models)

def restore(args, nets, saved):
    """Take up a checkpoint; returns its step, its seconds, and the rows of metrics.csv up to there."""
    for name in STATE:
        getattr(nets, name).load_state_dict(saved[name])
    for optimiser in (nets.opt_g, nets.opt_d):
        optimiser.param_groups[0].update(nets.adam)  # as this device wants them, not the one of the checkpoint
    for name in ("last", "sums"):
        getattr(nets, name).copy_(saved[name])
    rows = csv.DictReader(Path(args.out, "metrics.csv").read_text().split())
    rows = [row for row in rows if int(row["step"]) <= saved["step"] and int(row["step"]) % LOG_EVERY == 0]
    return saved["step"], saved["seconds"], rows
# --- end shared ---

# %% Training
# --- shared: training ---
LOG_EVERY = 10  # steps between two readings of the metrics, each of which waits for the device
MEMORISED = 0.25  # by how much the discriminator may prefer pictures that it was trained on
REPEATED = 0.4  # of the distance between two neighbours among real pictures: what is nearer repeats itself

def pick_device(args):
    """(device, precision, why) for --device and --precision; UserError for one that cannot be used."""
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = next(kind for kind in have if have[kind]) if args.device == "auto" else args.device
    why, version = "as asked" if args.device == kind else "the first here of cuda, mps and cpu", torch.__version__
    if not have[kind]:
        raise UserError(f"torch {version} finds no {kind} device: try --device cpu")
    try:
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.ones(8, device=kind).mul(2).tolist()  # a GPU that this torch has no kernels for fails only here
    except RuntimeError as error:
        why = f"torch {version} has no kernels for this GPU ({one_line(error)})"
        if args.device == kind:
            raise UserError(f"{why}: try --device cpu") from None
        kind = "cpu"
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if kind == "cpu" and cpuinfo.exists() else set()
    bf16 = "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= flags  # Intel's without AMX is slower than fp32
    bf16 = bf16 or kind == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    best = "bf16" if bf16 else "fp16" if kind == "cuda" else "fp32"  # the fastest that the hardware has
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    if args.precision != "auto":
        return device, args.precision, why
    return device, best, f"{why}; {best} is the fastest that it is known to have in hardware"

def start_processes(device):
    """(rank, world): (0, 1), or this process's place among those that torchrun started."""
    if "RANK" in os.environ and not dist.is_initialized():  # the others wait while rank 0 packs the pictures
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def build(args, device, precision):
    """All that a step changes, on the device: networks, average, optimisers, sums of the metrics."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    G, D = (net.to(device, memory_format=torch.channels_last) for net in make_networks(args))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    floats = [[t for t in net.state_dict().values() if t.is_floating_point()] for net in (ema, G)]
    adam = dict(betas=(args.beta1, args.beta2), fused=device.type != "mps", capturable=device.type == "cuda")
    opt_g, opt_d = (Optimiser(net.parameters(), lr, **adam) for net, lr in ((G, args.lr), (D, args.d_lr)))
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision)
    autocast = functools.partial(torch.autocast, device.type, dtype or torch.bfloat16, enabled=bool(dtype))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    last, sums, pairs = (*torch.zeros(2, len(METRICS), device=device), list(zip(*floats)))
    if not args.ema:  # the average is the generator itself: the same tensors, and nothing to move
        ema.load_state_dict(G.state_dict(), assign=True)
        pairs = []
    return argparse.Namespace(**{name: value for name, value in locals().items() if name not in ("args", "floats")})

def optimise(nets, loss, optimiser):
    """Back-propagate `loss`, average the gradients over the processes, take a step."""
    optimiser.zero_grad(set_to_none=True)
    nets.scaler.scale(loss).backward()
    if dist.is_initialized():  # all in one message
        gradients = [parameter.grad for parameter in optimiser.param_groups[0]["params"]]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))
    nets.scaler.step(optimiser)

def finish_step(nets, weight):
    """Move the averaged generator, batch norm's statistics too, by `weight`; add up the metrics."""
    nets.scaler.update()
    nets.sums.add_(nets.last)
    for average, value in nets.pairs:
        average.lerp_(value, weight)

def captured(step, wanted):
    """step(inputs, variant); if wanted, a CUDA graph for each variant, made at its fourth call and then replayed."""
    if not wanted:
        return step
    stream, static, graphs, calls = torch.cuda.Stream(), [], {}, Counter()

    def run(inputs, variant):
        static.extend([] if static else [tensor.clone() for tensor in inputs])
        for mine, new in zip(static, inputs):
            mine.copy_(new)
        calls[variant] += 1
        stream.wait_stream(torch.cuda.current_stream())
        if calls[variant] == 4:
            graphs[variant] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[variant], stream=stream, capture_error_mode="thread_local"):
                step(static, variant)
        with torch.cuda.stream(stream):
            graphs[variant].replay() if variant in graphs else step(static, variant)
        torch.cuda.current_stream().wait_stream(stream)
    return run

def draws(args, step, device, rank, world):
    """This rank's share of a step's random numbers, z N,Z and uniform N,8, and the average's weight, 0-d.

    They follow from seed and step alone: no state to save, and two ranks draw what one with twice the batch would.
    """
    seed, n = args.seed * 1_000_003 + step, args.batch_size
    # For what networks draw themselves, as dropout does; ranks differ in the low 32 bits, the only ones a CPU looks at.
    # Of this device alone: torch.manual_seed also notes down a call, and who made it, for each kind that is not there.
    own = torch.default_generator if device.type == "cpu" else getattr(torch, device.type)
    own.manual_seed((seed + (rank + 1) * 2_654_435_769) % 2**63)
    generator = torch.Generator(device).manual_seed(seed)
    z = torch.randn(n * world, Z, generator=generator, device=device)[n * rank : n * (rank + 1)]
    uniform = torch.rand(n * world, 8, generator=generator, device=device)[n * rank : n * (rank + 1)]
    decay = min(args.ema, 0.5 ** (10 / step))  # its half-life is at most a tenth of the steps so far
    return z, uniform, torch.full((), 1 - decay, device=device)

def read_metrics(nets, step, caught, world):
    """(the means since the last reading by name, whether a signal was caught), over all processes."""
    sums = torch.cat([nets.sums / ((step - 1) % LOG_EVERY + 1), nets.sums.new_full((1,), len(caught))]) / world
    if world > 1:
        dist.all_reduce(sums)
    if step % LOG_EVERY == 0:
        nets.sums.zero_()
    *means, signals = sums.tolist()
    return dict(zip(METRICS, means)), signals > 0

def views(args, pictures):
    """Pictures, uint8 N,H,W,C, as the discriminator is shown them, N,C,H,W: augmented, in ways that --seed sets."""
    uniform = torch.rand(len(pictures), 8, generator=torch.Generator().manual_seed(args.seed))
    x = to_float(torch.from_numpy(pictures), uniform, False)
    return augment(x, uniform) if args.augment == "on" and len(x) else x

@torch.no_grad()
def verdicts(nets, seen, held_out):
    """D(x) of pictures trained on and held out, each a tuple of N,C,H,W and, where there are any, labels.

    Batch norm is as in training, its statistics left alone.
    """
    buffers = {name: buffer.clone() for name, buffer in nets.D.named_buffers()}
    with nets.autocast():
        verdict = [torch.func.functional_call(nets.D, buffers, inputs) for inputs in (seen, held_out)]
    return {name: probability(x.float()).mean().item() for name, x in zip(("d_seen", "d_held_out"), verdict)}

def worries(rows, fake, real):
    """Lines on what has gone wrong, from the rows of metrics.csv and samples (uint8 N,C,H,W) made and real."""
    late = {name: np.array([row[name] for row in rows[-20:]], float) for name in rows[0]} if len(rows) >= 20 else {}
    ahead = late["d_real"] - late["d_fake"] if late else np.full(1, np.nan)
    if (ahead > 0.95).all():
        yield "the discriminator has won for 200 steps: a lower --d-lr may help, or --augment on for a small set"
    if ahead.mean() < 0.002:
        yield "the discriminator has been no better than chance for 200 steps: a higher --d-lr may help"
    if "d_held_out" in late and (late["d_seen"] - late["d_held_out"]).mean() > MEMORISED:
        yield (f"the discriminator begins to memorise: over 200 steps D(x) is {late['d_seen'].mean():.2f} for pictures "
               f"trained on, {late['d_held_out'].mean():.2f} for others; more pictures help, --augment on, or to stop")
    if len(rows) >= 50 and (near := apart(fake)) < REPEATED * (usual := apart(real)):
        yield (f"the samples repeat themselves: two neighbours among them are {near / usual:.2f} times as "
               "far apart as among real pictures; a lower --lr may help, or --augment on for a small set")

def train(args, saved=None):
    """Train as the arguments say, from the start or from the checkpoint `saved`, into the run folder."""
    (device, precision, why), out = pick_device(args), Path(args.out)
    if args.resume and not saved:
        print(f"{out / 'checkpoint.pt'} is not there yet: starting from the beginning")
    fused = use_gan_ops(device, not args.no_fused)
    rank, world = start_processes(device)
    pack = load_pack(args) if rank == 0 else None
    if world > 1:
        dist.barrier()
    pack = load_pack(args) if pack is None else pack
    kept, held_out = hold_out(args, len(pack))
    images = args.batch_size * world  # a step
    steps = len(kept) // images  # an epoch
    if steps == 0:
        held = f", of which {len(held_out)} are held out" if len(held_out) else ""
        raise UserError(f"a batch of {images} is more than the {len(pack)} pictures{held}: take a smaller --batch-size")
    labels = settle(args, pack, steps)
    nets = build(args, device, precision)
    start, seconds, rows = restore(args, nets, saved) if saved else (0, 0.0, [])
    last = min((args.epochs or sys.maxsize) * steps, args.steps or sys.maxsize)
    about = dict(pictures=len(pack), held_out=len(held_out), augment=args.augment, flip=args.flip, processes=world,
                 device=str(device), precision=precision, why=why, gan_ops=fused)
    if rank == 0:
        print(*(f"{name} {value}" for name, value in about.items()), f"into {out}", sep="; ", flush=True)
        about.update(torch=torch.__version__, python=sys.version, numpy=np.__version__)
        log = open_run(args, dict(vars(args), used=about), saved)
    if rank == 0 and not saved:
        save_run(args, nets, rows, 0, 0.0)
    run_step = captured(functools.partial(train_step, nets, args), device.type == "cuda" and precision != "fp16")
    source, saved_at = batches(pack, kept, args, device, rank, world, start, labels), time.monotonic()
    began = saved_at - seconds
    fixed = torch.randn(SAMPLES, Z, generator=torch.Generator().manual_seed(args.seed))
    fixed = torch.cat([condition(args, SAMPLES), fixed], 1).to(device)
    watched = [which[: min(64, len(held_out))] for which in (kept, held_out)]
    watched = [(views(args, pack[which.numpy()]).to(device), *(label[which].to(device) for label in labels))
               for which in watched]
    real, warned, caught = torch.from_numpy(pack[kept[:SAMPLES].numpy()]).permute(0, 3, 1, 2), set(), []
    handlers = {n: signal.signal(n, lambda n, frame: caught.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=last * images, initial=start * images, unit="img", unit_scale=True, disable=rank > 0)
    try:
        for step in range(start + 1, last + 1):
            run_step((*next(source), *draws(args, step, device, rank, world)), step % args.d_every == 0)
            bar.update(images)
            epoch, seconds, stop = -(-step // steps), time.monotonic() - began, bool(caught) and world == 1
            if step % LOG_EVERY == 0 or step == last or stop:
                values, stop = read_metrics(nets, step, caught, world)
                values.update(verdicts(nets, *watched) if len(held_out) else {})
                row = step, epoch, round(seconds, 2), step * images, *(f"{value:.6g}" for value in values.values())
                rows.append(dict(zip((*COLUMNS, *list(values)[len(METRICS):]), map(str, row))))
                bar.set_postfix(epoch=epoch, loss_d=f"{values['loss_d']:.3f}", loss_g=f"{values['loss_g']:.3f}")
                if rank == 0:
                    log(step, values)
                if not all(map(math.isfinite, values.values())):
                    save_metrics(out, rows) if rank == 0 else None
                    raise UserError(f"the loss at step {step} is not finite; {out}/checkpoint.pt is from before: try "
                                    "--resume with --precision fp32, or a new run with a lower --lr")
            if rank == 0 and (step % steps == 0 or step == last):
                fake = sample(nets.ema, fixed)
                write(out / "samples" / f"epoch_{epoch:04d}.png", to_grid(fake).save)
                log(step, {}, to_grid(fake))
                for worry in set(worries(rows, fake, real)) - warned:
                    warned.add(worry)
                    bar.write(f"warning: {worry}")
            due = step % LOG_EVERY == 0 and time.monotonic() - saved_at > 60 * args.save_every  # and known to be finite
            if rank == 0 and (due or stop or step == last):
                save_run(args, nets, rows, step, seconds)
                saved_at = time.monotonic()
            if stop:
                break
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if rank == 0 and rows:
        draw_run(out, rows, real, sample(nets.ema, fixed))
    if dist.is_initialized():
        dist.destroy_process_group()
    if caught:
        print(f"stopped at step {step} and saved; this goes on: python {SCRIPT}.py --resume --out {out}")
        raise SystemExit(128 + caught[0])
# --- end shared ---

# %% What a checkpoint is good for
# --- shared: uses ---
def sampled(args, saved, count):
    """Yield `count` pictures, uint8 N,C,H,W, by the averaged generator of a checkpoint; they follow from --seed."""
    (device, _, _), asked = pick_device(args), condition(args, count)
    generator, numbers = load_generator(args, saved).to(device), torch.Generator().manual_seed(args.seed)
    for start in tqdm(range(0, count, 64), desc="sampling", unit="x 64 pictures"):
        z = torch.randn(64, Z, generator=numbers)[: count - start]
        yield sample(generator, torch.cat([asked[start : start + 64], z], 1).to(device))

def load_generator(args, saved):
    """The averaged generator of a checkpoint, in evaluation mode."""
    generator = make_networks(args)[0]
    generator.load_state_dict(saved["Generator"])
    return generator.eval().requires_grad_(False)

def generate(args, saved):
    """--generate: pictures into a .npz, a .png grid or a folder; all but the grid in constant memory.

    Where the model has classes, the .npz has labels, and the folder one for each class, as --data takes them.
    """
    path, asked, pictures = Path(args.save), condition(args, args.generate), sampled(args, saved, args.generate)
    labels = asked.argmax(1).tolist() if asked.shape[1] else None

    def npz(part):
        with zipfile.ZipFile(part, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as file:
                shape = (args.generate, args.size, args.size, *[3] * (args.channels == 3))
                np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
                for batch in pictures:
                    file.write(batch.permute(0, 2, 3, 1).contiguous().numpy())
            if labels:
                with archive.open("labels.npy", "w", force_zip64=True) as file:
                    np.save(file, np.array(labels, np.int64))

    if path.suffix == ".npz":
        write(path, npz)
    elif path.suffix == ".png":
        write(path, to_grid(torch.cat(list(pictures)), math.ceil(args.generate**0.5)).save)
    else:
        for i, image in enumerate(itertools.chain.from_iterable(pictures)):
            folder = path / args.names[labels[i]] if labels else path
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{i:06d}.png")
    print(f"{args.generate} pictures: {path}")

def measure(args, saved):
    """--metrics: FID, KID and Inception score of as many generated pictures as --data has, 10,000 at most."""
    pack, device = load_pack(args), pick_device(args)[0]
    count = min(len(pack), 10_000)
    if count < 2:
        raise UserError("--metrics needs two pictures in --data, and better ten thousand")
    try:
        from torchmetrics.image import FrechetInceptionDistance, InceptionScore, KernelInceptionDistance
        fid, score = FrechetInceptionDistance().to(device), InceptionScore().to(device)
        kid = KernelInceptionDistance(subset_size=min(count, 1000)).to(device)
    except (ImportError, OSError) as error:  # the package, or the network that its weights come by
        raise UserError(f"--metrics: {one_line(error)}; it needs pip install torchmetrics[image] and, once, "
                        "a network to fetch Inception's weights") from None
    pack = torch.from_numpy(pack[np.arange(count) * len(pack) // count])  # as packs may lie in order of class
    for real, fake in zip(pack.permute(0, 3, 1, 2).split(64), sampled(args, saved, count)):
        real, fake = (images.expand(-1, 3, -1, -1).to(device) for images in (real, fake))
        score.update(fake)
        for metric in (fid, kid):
            metric.update(real, real=True)
            metric.update(fake, real=False)
    values = fid.compute(), *kid.compute(), *score.compute()
    print("{} pictures: FID {:.2f}, KID {:.4f} +- {:.4f}, Inception score {:.2f} +- {:.2f}".format(count, *values))

def export(args, saved):
    """--export: the generator as ONNX, z (N,K+Z, of which K is the condition) to images (N,C,H,W).

    It is compared with torch where onnxruntime is there.
    """
    use_gan_ops(torch.device("cpu"), False)  # ONNX knows PyTorch's own operations alone
    z = torch.cat([condition(args, 2), torch.randn(2, Z)], 1)
    generator, path = load_generator(args, saved), Path(args.export)
    names = dict(input_names=["z"], output_names=["images"], dynamic_axes=dict(z={0: "n"}, images={0: "n"}))
    try:
        write(path, lambda part: torch.onnx.export(generator, (z,), str(part), dynamo=False, **names))
    except ImportError as error:
        raise UserError(f"--export: {one_line(error)}; it needs pip install onnx") from None
    try:
        import onnxruntime
        (theirs,) = onnxruntime.InferenceSession(path).run(None, {"z": z.numpy()})
        print(f"{path}: differs from torch by {np.abs(theirs - generator(z).numpy()).max():.1e} at most")
    except ImportError:
        print(f"{path}: written; onnxruntime is not installed, so it is not compared with torch")

USES = dict(generate=generate, metrics=measure, export=export, train=train)  # by the flag, train without any
# --- end shared ---

# %% Command line
def make_parser():
    """The command line: this script's own flags, then those of all four."""
    parser = Parser(prog=f"{SCRIPT}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scheme", choices=RECIPES, default="stable", help="stable converges; exact is the slides alone (stable)")
    add("--width", type=number(1), default=64, help="channels of the last block, all others in proportion (64)")
    add("--loss", choices=LOSSES, help=f"bce: BCELoss of sigmoids; logits: BCEWithLogitsLoss ({by_recipe('loss')})")
    add("--gamma", type=number(0, float), help=f"weight of the gradient penalties R1 and R2 ({by_recipe('gamma')})")
    add("--up", choices=UP, help=f"what doubles a picture in CSPup ({by_recipe('up')})")
    add("--slope", type=number(0, float), help=f"of LeakyReLU in CSPup, 0 is ReLU ({by_recipe('slope')})")
    add("--d-norm", choices=("batch", "spectral", "none"), help=f"in the discriminator ({by_recipe('d_norm')})")
    add("--d-convs", type=int, choices=range(1, 6), default=5, help="stride-2 convolutions of the discriminator (5)")
    # --- shared: flags ---
    add("--data", nargs="+", default=[DATA], help="celeba, mnist, fashion, synthetic, folders or .zips of "
        f"pictures ({DATA})")
    add("--root", default="data", help="folder where named sets are looked for, and pictures kept decoded (data)")
    add("--classes", nargs="+", default=[], help="only these subfolders of --data")
    add("--epochs", type=number(1), help=f"ends the run, if --steps does not before (with neither: {END})")
    add("--steps", type=number(1), help="ends the run, if --epochs does not before")
    add("--batch-size", type=number(2), help=f"pictures a step, in each process ({by_recipe('batch_size')})")
    add("--lr", type=number(0, float), help=f"Adam's learning rate for the generator ({by_recipe('lr')})")
    add("--d-lr", type=number(0, float), help=f"and for the discriminator ({by_recipe('d_lr')})")
    add("--beta1", type=number(0, float, 1), help=f"Adam's first beta ({by_recipe('beta1')})")
    add("--beta2", type=number(0, float, 1), help=f"Adam's second beta ({by_recipe('beta2')})")
    add("--d-every", type=number(1), default=1, help="train the discriminator at every k-th step only (1)")
    add("--ema", type=number(0, float), help=f"decay a step of the averaged generator, 0 is none ({by_recipe('ema')})")
    add("--augment", choices=("auto", "on", "none"), help=f"differentiable augmentation ({by_recipe('augment')})")
    add("--flip", action=argparse.BooleanOptionalAction, help=f"mirror half of the pictures ({by_recipe('flip')})")
    add("--held-out", type=number(0, float, 0.5), help="share of the pictures that is not trained on, to see whether "
        f"the discriminator memorises the others ({by_recipe('held_out')})")
    add("--seed", type=number(0), default=0, help="of all that is drawn by chance (0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="weights stay fp32")
    add("--no-fused", action="store_true", help="PyTorch's operations even where gan_ops is installed")
    add("--out", default=f"runs/{SCRIPT}", help=f"run folder (runs/{SCRIPT})")
    add("--save-every", type=number(0, float), default=5.0, help="minutes between checkpoints (5)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--logger", choices=("tensorboard", "wandb"), help="besides metrics.csv")
    add("--checkpoint", help="checkpoint.pt or models.pth, for what follows")
    add("--generate", type=number(1), metavar="N", help="make N pictures and put them into --save")
    add("--save", default="generated.npz", help=".npz (images: uint8 N,H,W,3 or N,H,W), .png or folder (generated.npz)")
    add("--metrics", action="store_true", help="FID, KID and Inception score against --data")
    add("--export", metavar="FILE.onnx", help="the generator as ONNX")
    # --- end shared ---
    parser.set_defaults(size=SIZE, channels=CHANNELS)
    return parser

# --- shared: command line ---
FREE = {  # what may differ from the checkpoint's; the other flags must not
    *"data root epochs steps device precision no_fused out save_every resume logger checkpoint save".split(),
    "labels", *USES}

def by_recipe(name):
    """For --help: the default of a flag, in the first recipe and, where they differ, in the others."""
    (_, first), *others = ((recipe, values[name]) for recipe, values in RECIPES.items())
    return "; ".join([str(first), *(f"{recipe}: {value}" for recipe, value in others if value != first)])

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")

def number(low, kind=int, high=2**43):
    """A type for argparse: a number of this kind from `low` to `high`, by which seeds still count in 64 bits."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value
    parse.__name__ = "number"
    return parse

def parse(argv):
    """(arguments, checkpoint or None). A flag given wins over the checkpoint's, over the scheme's, over the default."""
    parser = make_parser()
    defaults, unset = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    args = argparse.Namespace(**{**defaults, **given})
    needs_one = [name for name in USES if name not in ("per_class", "import_keras", "train")]
    asked = [name for name in needs_one if getattr(args, name)]
    if bool(asked) != bool(args.checkpoint):
        which = " or ".join(f"--{name}" for name in asked or needs_one)
        raise UserError(f"{which} and --checkpoint go together; to train on: --resume")
    path = Path(args.out, "checkpoint.pt") if args.resume else args.checkpoint
    saved = load_weights(path) if path and not (args.resume and not path.exists()) else None
    kept = dict(saved["config"] if saved else recipe(args))
    if saved:  # what auto came to stays
        given = {name: value for name, value in given.items() if value != "auto" or name in FREE}
    for name in given.keys() - FREE - {"resume" if args.resume else "seed"} if saved else ():
        if given[name] != kept[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{path} was trained with {flag} {kept[name]}, not {given[name]}: leave {flag} out")
    if given.keys() & {"epochs", "steps"}:  # a new end in place of the old one, not besides it
        kept.update(epochs=None, steps=None)
    args = argparse.Namespace(**{**defaults, **{name: kept[name] for name in kept.keys() & defaults.keys()}, **given})
    args.argv = list(argv)
    return args, saved

def main(argv=None):
    """Run the command line `argv`; in a notebook, where sys.argv is the kernel's, the defaults."""
    if argv is None:
        in_kernel = "ipykernel" in sys.modules and not sys.argv[0].endswith(f"{SCRIPT}.py")
        argv = [] if in_kernel else sys.argv[1:]
    try:
        args, saved = parse(argv)
        use = next((name for name in USES if getattr(args, name, False)), "train")
        return USES[use](args, saved)
    except UserError as error:
        message = error
    except torch.cuda.OutOfMemoryError:
        message = "the GPU's memory is too small: take a smaller --batch-size or --width"
    except OSError as error:
        message = f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

if __name__ == "__main__":
    main()
# --- end shared ---
