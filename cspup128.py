"""Train a GAN on 128x128 faces with the CSPup generator, in this one file.

    python cspup128.py --width 16 --batch-size 32 --steps 600      # drawn faces, no data needed
    python cspup128.py --data celeba --epochs 20                   # CelebA, on a GPU
    python cspup128.py --generate 64 --checkpoint runs/cspup128/models.pth --save faces.png

The generator is a known course scheme: blocks that send the halves of their channels down two branches, as
CSPNet does (Wang et al. 2020), and double the picture. The discriminator is DCGAN's (Radford et al. 2016)
without batch norm; both play the relativistic game under gradient penalties (Huang et al. 2024, R3GAN).
"""
# %% Imports
import argparse, copy, functools, glob, hashlib, itertools, json, math, os, random, signal, sys, threading
import time, zipfile, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm.auto import tqdm

SCRIPT, Z, PER_ROW, Optimiser = "cspup128", 100, 8, torch.optim.Adam  # noise; pictures in a row of samples
RECIPES = {  # the one found to converge, and the slides with nothing added; a flag given by hand wins
    "stable": dict(loss="relativistic", gamma=10.0, up="mixed", slope=0.2, lr=4e-4, d_lr=4e-4,
                   fall=1e9, betas=[0.0, 0.99], ema=0.999, flip=True),
    "exact": dict(loss="bce", gamma=0.0, up="deconv", slope=0.0, lr=2e-4, d_lr=2e-4, fall=1e9,
                  betas=[0.5, 0.999], ema=0.999, flip=True)}

# --- shared: fused ---
try:  # the extension of this repository: optional, and a build for another torch can fail in any way
    import gan_ops
    assert gan_ops.torch_version == torch.__version__, f"it was built for torch {gan_ops.torch_version}"
    FUSED, GAN_OPS = gan_ops.devices, f"serves on {' and '.join(gan_ops.devices)}"
except Exception as error:
    FUSED, GAN_OPS = (), f"does not serve: {error} (pip install -e . builds it)"

class BatchNormLeakyReLU(nn.BatchNorm2d):
    """leaky_relu(batch_norm(x), slope), where `fused` by gan_ops; its state_dict is nn.BatchNorm2d's."""
    def __init__(self, channels, slope):
        super().__init__(channels)
        self.slope, self.fused = slope, False

    def forward(self, x):
        if not self.fused: return F.leaky_relu(super().forward(x), self.slope)
        statistics = self.running_mean, self.running_var, self.training, self.momentum, self.eps
        return torch.ops.gan_ops.batch_norm_leaky_relu(x, self.weight, self.bias, *statistics, self.slope)
# --- end shared ---

# %% Networks
class SplitAdd(nn.Module):
    """The seam: adds branches, batch norm and LeakyReLU if `norm`, cuts into channel halves if `split`."""
    fused = False  # whether gan_ops does it, as one operation

    def __init__(self, channels, slope, norm=True, split=True):
        super().__init__()
        self.norm, self.split = BatchNormLeakyReLU(channels, slope) if norm else nn.Identity(), split

    def forward(self, left, right):
        norm = self.norm
        if not self.fused:
            return norm(left + right).chunk(2, dim=1) if self.split else norm(left + right)
        if isinstance(norm, nn.Identity):
            parts = torch.ops.gan_ops.split_add(left, right, self.split)
        else:
            statistics = norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
            parts = torch.ops.gan_ops.split_add_batch_norm_leaky_relu(
                left, right, norm.weight, norm.bias, *statistics, norm.slope, self.split)
        return parts if self.split else parts[0]

def double(c_in, c_out, how):
    """N,c_in,H,W to N,c_out,2H,2W: a transposed convolution, or interpolation, where c_in is c_out."""
    if how == "deconv": return nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)
    return nn.Upsample(scale_factor=2, mode=how)

class CSPup(nn.Module):
    """Halves a, b (N,C/2,H,W) to branches (N,c_out,2H,2W; `first`: 1x1 to 4x4) that a seam adds.

    The slide has "upsample or deconv". Interpolated, the left branch passes its channels on as they are. The
    3x3 convolutions are padded by 1: with 0, as in the version that circulates, the branches do not fit.
    """
    def __init__(self, c_in, c_out, slope, norm, up="mixed", first=False):
        super().__init__()
        half, ways = c_in // 2, ("bilinear", "nearest") if up == "mixed" else (up, up)
        grow = functools.partial(nn.ConvTranspose2d, kernel_size=4, bias=False)
        self.left, right = (grow(half, c_out) if first else double(half, c_out, how) for how in ways)

        def activate(c):
            return BatchNormLeakyReLU(c, slope) if norm else nn.LeakyReLU(slope)
        self.right = nn.Sequential(
            nn.Conv2d(half, half, 1), activate(half), right,
            nn.Conv2d(c_out, c_out, 3, padding=1), activate(c_out), nn.Conv2d(c_out, c_out, 3, padding=1))

    def forward(self, a, b):
        return self.left(a), self.right(b)

class Generator(nn.Module):
    """z (N,100) to pictures (N,3,128,128) in [-1, 1]; `width`: channels of the last block, 64 on the slide.

    The slide ends in a ReLU, which cannot reach [-1, 0); this ends in Tanh. Where pictures are interpolated,
    the last doubling has a hidden layer of its own, or nothing finer than 64x64 could be learnt.
    """
    def __init__(self, width=64, slope=0.2, norm=True, up="mixed"):
        super().__init__()
        channels = [Z] + [width << i for i in (4, 3, 2, 1, 0)]
        pairs = list(zip(channels, channels[1:]))
        self.blocks = nn.ModuleList(CSPup(a, b, slope, norm, up, first=a == Z) for a, b in pairs)
        self.seams = nn.ModuleList(SplitAdd(c, slope, norm, split=c > width) for c in channels[1:])
        self.picture = nn.ConvTranspose2d(width, 3, 4, 2, 1) if up == "deconv" else nn.Sequential(
            double(width, width, "bilinear" if up == "bilinear" else "nearest"),
            nn.Conv2d(width, width, 3, padding=1), BatchNormLeakyReLU(width, slope),
            nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z):
        x = z[:, :, None, None].chunk(2, dim=1)  # 2 of N,50,1,1
        for block, seam in zip(self.blocks, self.seams):
            x = seam(*block(*x))  # 2 of N,512,4,4; N,256,8,8; N,128,16,16; N,64,32,32; at last N,64,64,64
        return torch.tanh(self.picture(x))  # N,3,128,128

class Discriminator(nn.Sequential):
    """Pictures (N,3,128,128) to logits (N): `convs` 4x4 convolutions of stride 2, then a valid one.

    Each has twice the channels of the one before it; the fourth, where `wide`, four times as many.
    """
    def __init__(self, width=64, convs=5, wide=True):
        channels, layers = [3] + [width << i + (wide and i > 2) for i in range(convs)], []
        for c_in, c_out in zip(channels, channels[1:]):
            layers += nn.Conv2d(c_in, c_out, 4, 2, 1), nn.LeakyReLU(0.2)  # N,64,64,64 to N,2048,4,4
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 128 >> convs), nn.Flatten(0))

def make_networks(args):
    """(generator, discriminator); stable: the generator's weights are DCGAN's, N(0, 0.02), of batch norm
    N(1, 0.02), those of the discriminator He et al.'s (2015), as no batch norm mends their scale."""
    stable = args.recipe == "stable"
    G, D = Generator(args.width, args.slope, stable, args.up), Discriminator(args.width, args.d_convs, stable)
    for name, weight in G.named_parameters() if stable else ():
        if name.endswith("weight"): nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.02)
    for layer in D if stable else ():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)
    return G, D

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
    "hinge": (lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)).mean(),
              lambda real, fake: -fake.mean())}

def squared_slope(logit, pictures):
    """R1 or R2: mean squared norm of the gradient of the first logits with respect to their pictures."""
    (slope,) = torch.autograd.grad(logit[: len(pictures)].sum(), pictures, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()

def train_step(nets, args, real, z):
    """A step of the discriminator and --d-every of the generator on real (N,3,128,128) and z (N,100).

    The discriminator's loss has besides gamma / 2 times R1 (of real pictures; Mescheder et al. 2018) and R2
    (of fake ones), which need second derivatives: of half the batch, at a sixth less time for the step. It
    never waits for the GPU. Returns losses and logits.
    """
    loss_of_d, loss_of_g = LOSSES[args.loss]
    nets.D.requires_grad_(True)
    with nets.autocast():
        fake = nets.G(z)
    pair = [x.detach().to(real.dtype).chunk(2) for x in (real, fake)]
    steep = [halves[0].requires_grad_(args.gamma > 0) for halves in pair]  # whose slopes are penalised
    narrow = args.gamma > 0 and nets.scaler.is_enabled()  # gradients of gradients do not fit fp16
    with torch.autocast(real.device.type, enabled=False) if narrow else nets.autocast():
        logits = [torch.cat([nets.D(half) for half in halves]).float() for halves in pair]
    loss_d = loss_of_d(*logits)
    penalty = args.gamma / 2 * sum(map(squared_slope, logits, steep)) if args.gamma else 0
    optimise(nets, loss_d + penalty, nets.opt_d)
    nets.D.requires_grad_(False)
    for turn in range(args.d_every):
        with nets.autocast():
            if turn: fake = nets.G(torch.randn_like(z))
            real_logit = nets.D(real).float() if args.loss == "relativistic" else logits[0].detach()
            fake_logit = nets.D(fake).float()
        loss_g = loss_of_g(real_logit, fake_logit)
        optimise(nets, loss_g, nets.opt_g)
    return loss_d, loss_g, logits[0], fake_logit

# %% Data
DRAWN = [f"{i}.png" for i in range(4096)]  # the pictures of --data synthetic

def draw_picture(index):
    """Face number `index` of --data synthetic: always the same one."""
    rng = random.Random(index)
    image = Image.new("RGB", (256, 256), f"#{rng.randrange(1 << 24):06x}")
    skin, hair = rng.choice(["#ffdbba", "#e8b890", "#b07e5c"]), rng.choice(["#191412", "#7a522d", "#c4a060"])
    middle = rng.uniform(118, 138), rng.uniform(108, 128)

    def oval(x, y, width, height, colour):  # half axes, from the middle of the face
        box = middle[0] + x - width, middle[1] + y - height, middle[0] + x + width, middle[1] + y + height
        ImageDraw.Draw(image).ellipse(box, colour)
    oval(0, 150, 110, 74, "#405080")  # shoulders
    oval(0, 6, 72, rng.choice([82, 112]), hair)
    oval(0, 16, 56, 74, skin)
    for side in (-24, 24):
        oval(side, 2, 11, 7, "white")
        oval(side, 2, 5, 6, "black")
        oval(side, -17, 12, 3, hair)
    oval(0, 56, rng.uniform(14, 26), rng.uniform(4, 9), "#af3c46")
    return image

def settle(args, pack, names):
    """What the flags left open, now that the pictures are known; returns labels beside them, if any."""
    if args.gamma < 0: fail("--gamma begins at 0")
    for name in ("loss", "gamma", "up") if args.recipe == "exact" else ():
        if getattr(args, name) != RECIPES["exact"][name]: fail(f"--scheme exact leaves no choice of --{name}")
    return []

def draw_z(args, count):
    """What the generator makes `count` pictures from, the same for each --seed: z, count,100."""
    return torch.randn(count, Z, generator=torch.Generator().manual_seed(args.seed))

# --- shared: data and pictures ---
def fail(message):
    """End with one line, for what the user can mend."""
    print("error:", *str(message).split("\n"), file=sys.stderr)
    raise SystemExit(2)

def find_pictures(data, root):
    """(names of the files of --data, function to what changes whenever one does, function that opens one)."""
    if data == "synthetic":
        return DRAWN, lambda name: SCRIPT, lambda name: draw_picture(int(Path(name).stem))
    if data in ("mnist", "fashion"):
        kind = torchvision.datasets.MNIST if data == "mnist" else torchvision.datasets.FashionMNIST
        found = kind(root, download=True)  # where it is not there yet
        folders = [name.split(" - ")[0].replace("/", " or ") for name in found.classes]
        images = {f"{folders[k]}/{i}.png": image for i, (image, k) in enumerate(found)}
        return list(images), lambda n: zlib.crc32(images[n].tobytes()), images.get
    path = Path(data).expanduser()
    if data == "celeba":
        places = [f"{at}/**/img_align_celeba{end}" for at in (root, "/kaggle/input") for end in ("", ".zip")]
        if not any(glob.glob(place, recursive=True) for place in places):
            torchvision.datasets.CelebA(root, download=True)
        path = Path(next(file for place in places for file in glob.glob(place, recursive=True)))
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*")]
        links = [n for n in names if (path / n).is_symlink() and (path / n).is_dir()]
        if links: print(f"links to folders are not followed, as they can lead back up: {', '.join(links)}")
        names = [n for n in names if (path / n).is_file()]
        return names, lambda n: (path / n).stat().st_mtime_ns, lambda n: Image.open(path / n)
    archive = zipfile.ZipFile(path)
    return archive.namelist(), lambda n: archive.getinfo(n).CRC, lambda n: Image.open(archive.open(n))

def square(image, size, channels):
    """A PIL picture as uint8 size,size,channels: its middle; if parts are transparent, all of it on white."""
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
    image, mode = ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB"
    if image.mode[0] in "IF":  # grey of 16 bits, of which 12 may be in use, or of numbers up to 1
        values = np.asarray(image, np.float32)
        top = next((top for top in (1, 255, 4095) if values.max() <= top), 65535)
        image = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data and (image := image.convert("RGBA")).getextrema()[3][0] < 255:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.pad(image, (size, size), Image.BILINEAR, color="white")
    image = ImageOps.fit(image.convert(mode), (size, size), Image.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)

def load_pack(args):
    """The pictures of --data, uint8 N,size,size,channels, memory-mapped, and their names; decoded once."""
    try:
        names, stamp, open_picture = find_pictures(args.data, args.root)
    except Exception as error:  # not there, no network, a used up quota, cut short, another kind of archive
        fail(f"--data {args.data}: {error}; it is a folder, a .zip, synthetic, mnist, fashion or celeba, "
             f"whose img_align_celeba.zip belongs into --root {args.root} where the download fails")
    names = sorted(n for n in names if n[-1] != "/" and "/." not in f"/{n}" and "__MACOSX" not in n)
    folders = {folder for n in names for folder in n.split("/")[:-1]}
    if not names or set(args.classes) - folders:
        fail(f"{args.data} has no pictures in {args.classes or 'it'}; its folders are {sorted(folders)}")
    names = [n for n in names if not args.classes or set(n.split("/")[:-1]) & set(args.classes)]
    key = hashlib.sha256(repr([args.channels, [(n, stamp(n)) for n in names]]).encode()).hexdigest()[:12]
    path = Path(args.root, ".packed", f"{Path(args.data).resolve().stem}-{args.size}-{key}.npy")
    report, left_out = path.with_suffix(".json"), {}

    def decode(name):
        try:
            image = open_picture(name)
            assert image.format != "TIFF" or image.n_frames == 1, f"it has {image.n_frames} pages"
            return square(image, args.size, args.channels).tobytes()
        except Exception as error:  # no picture, or a broken one, which can raise anything
            left_out[name] = str(error)
            return b""

    def pack(part):
        with open(part, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as threads:
            file.seek(128)  # behind the header of an .npy file, which is written at the end
            file.writelines(tqdm(threads.map(decode, names), "packing", len(names), unit="img"))
            shape = len(names) - len(left_out), args.size, args.size, args.channels
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        write(report, lambda part: part.write_text(json.dumps(left_out, indent=1)))
    if not path.exists(): write(path, pack)
    if left_out := json.loads(report.read_text()):
        print(f"left out, see {report}: {dict(Counter(Path(n).suffix.lower() for n in left_out))}")
    return np.load(path, mmap_mode="c"), [n for n in names if n not in left_out]

def batches(arrays, args, device, rank, world, step):
    """Yield this rank's batches after `step` on the device, rows of each array, in an order by --seed."""
    size, steps = args.batch_size, len(arrays[0]) // (args.batch_size * world)  # steps of an epoch
    arrays = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda" and arrays[0].nbytes < torch.cuda.mem_get_info()[0] / 2:
        arrays = [array.to(device) for array in arrays]
    for epoch in itertools.count(step // steps):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(arrays[0]))[: steps * world * size]
        order = torch.from_numpy(order.reshape(steps, world, size)[:, rank]).to(arrays[0].device)
        yield from ([array[numbers].to(device) for array in arrays] for numbers in order[step % steps :])
        step = 0

# %% Pictures out
def write(path, make):
    """Have make(part) make a file beside `path`, flush it and rename it: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    make(part)
    with open(part, "rb+") as file: os.fsync(file.fileno())
    os.replace(part, path)

@torch.no_grad()
def sample(generator, z):
    """What a generator in evaluation mode makes of z (N,...), 64 at a time: uint8 N,C,H,W on the CPU."""
    pictures = (generator(part.to(next(generator.parameters()).device)).float() for part in z.split(64))
    return torch.cat([part.mul(127.5).add(128).clamp(0, 255).byte().cpu() for part in pictures])

def to_grid(images, columns=PER_ROW):
    """uint8 N,C,H,W as one PIL picture."""
    return Image.fromarray(torchvision.utils.make_grid(images, columns).permute(1, 2, 0).numpy())

def worries(rows, fake, real):
    """Lines on what has gone wrong, by the rows of metrics.csv and pictures (uint8 N,C,H,W) made and real."""
    ahead = np.array([row[6] - row[7] for row in rows[-20:]])  # D(x) - D(G(z)) over 200 steps
    if len(rows) >= 20 and ahead.min() > 0.95: yield "the discriminator has won: a lower --d-lr may help"
    if len(rows) >= 20 and ahead.mean() < 0.002: yield "the discriminator guesses: a higher --d-lr may help"
    if real.float().std() < 8: yield "the pictures of --data are nearly all of one colour, or black"
    flat = (F.adaptive_avg_pool2d(images.float(), 16).flatten(1) for images in (fake, real))
    made, true = (torch.cdist(x, x).fill_diagonal_(math.inf).amin(1).median() for x in flat)
    if len(rows) >= 50 and made < 0.4 * true: yield "the samples repeat themselves"
# --- end shared ---

# --- shared: generate ---
def generate(args, saved):
    """--generate: pictures by a checkpoint's averaged generator, into a .npz, a .png grid or a folder."""
    generator, path = make_networks(args)[0].to(pick_device(args)[0]).eval(), Path(args.save)
    generator.load_state_dict(saved["Generator"])
    images = sample(generator, draw_z(args, args.generate))
    pixels = images.permute(0, 2, 3, 1).squeeze(3).numpy()  # N,H,W,3 or, grey, N,H,W
    if path.suffix == ".npz":
        write(path, lambda part: np.savez(part.open("wb"), images=pixels))
    elif path.suffix == ".png":
        write(path, to_grid(images, math.ceil(args.generate**0.5)).save)
    else:
        for i, image in enumerate(pixels): write(path / f"{i:06d}.png", Image.fromarray(image).save)
    print(f"{args.generate} pictures: {path}")
# --- end shared ---

# --- shared: training ---
# %% Training
SIGNALS = signal.SIGINT, signal.SIGTERM  # on which a run is saved
LOG_EVERY = 10  # steps between two rows of metrics.csv, each of which waits for the device
COLUMNS = "step", "epoch", "seconds", "images", "loss_d", "loss_g", "d_real", "d_fake"

def pick_device(args):
    """(device, precision) by the flags; where they are auto, the fastest that this machine has."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    cpu = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    fast = "bf16" if "amx_bf16" in cpu or {"avx512_bf16", "AuthenticAMD"} <= cpu else "fp32"
    try:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be captured on the default one
            fast = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
        torch.ones(8, device=device).mul(2).tolist()  # a GPU that this torch has no kernels for fails here
    except Exception as error:
        fail(f"torch {torch.__version__} cannot use {device}: try --device cpu ({error})")
    return device, fast if args.precision == "auto" else args.precision

def optimise(nets, loss, optimiser):
    """Back-propagate `loss`, average the gradients over the processes, take a step."""
    optimiser.zero_grad(set_to_none=True)
    nets.scaler.scale(loss).backward()
    for parameter in optimiser.param_groups[0]["params"] if dist.is_initialized() else ():
        dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
    nets.scaler.step(optimiser)
    nets.scaler.update()

def train(args, saved):
    """Train from the start, or from the checkpoint `saved`, into the run folder --out."""
    (device, precision), out, saved_at = pick_device(args), Path(args.out), time.monotonic()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
    if (out / "checkpoint.pt").exists() and not saved:
        fail(f"{out} holds an earlier run: --resume goes on with it, --out FOLDER begins another")
    # Pictures
    if world > 1: dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank: dist.barrier()  # until the first process has packed the pictures
    pack, names = load_pack(args)
    if world > 1 and rank == 0: dist.barrier()
    images = args.batch_size * world  # of a step
    steps = len(pack) // images  # of an epoch
    args.used = dict(pictures=len(pack), set=f"{zlib.crc32(repr(names).encode()):08x}", processes=world,
                     device=str(device), precision=precision, torch=str(torch.__version__),
                     gan_ops="does not serve: --no-fused" if args.no_fused else GAN_OPS)
    if steps == 0: fail(f"{len(pack)} pictures are too few for a batch of {images}: a smaller --batch-size")
    for name in ("pictures", "set", "processes") if saved else ():  # set: of their names, whatever the folder
        was, now = saved["config"]["used"].get(name), args.used[name]
        if was not in (now, None): fail(f"{out} began with {name} {was}, now it is {now}: take another --out")
    arrays = [pack, *settle(args, pack, names)]
    last = min(filter(None, (args.steps, (args.epochs or 0) * steps)), default=max(20 * steps, 5000))
    # Networks, average, optimisers
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    G, D = (net.to(device, memory_format=torch.channels_last) for net in make_networks(args))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    for module in itertools.chain(G.modules(), D.modules()):
        module.fused = device.type in FUSED and not args.no_fused
    adam = dict(betas=args.betas, fused=device.type != "mps", capturable=device.type == "cuda")
    opt_g, opt_d = (Optimiser(net.parameters(), lr, **adam) for net, lr in ((G, args.lr), (D, args.d_lr)))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = dict(G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d, scaler=scaler)  # of a checkpoint
    nets, half = argparse.Namespace(**parts), torch.float16 if precision == "fp16" else torch.bfloat16
    nets.autocast = functools.partial(torch.autocast, device.type, half, precision != "fp32")
    sums, rows, start, began = torch.zeros(4, device=device), [], 0, time.monotonic()  # sums of COLUMNS[4:]
    if saved:
        for name, part in parts.items(): part.load_state_dict(saved[name])
        for opt in opt_g, opt_d: opt.param_groups[0].update(adam)
        sums.copy_(saved["sums"])
        start, began = saved["step"], began - saved["rows"][-1, 2].item()
        rows = [row for row in saved["rows"].tolist() if row[0] % LOG_EVERY == 0 or start >= last]

    def iterate(at, z, real, *labels):  # a step, its metrics and the average
        real = real.permute(0, 3, 1, 2).float() / 127.5 - 1  # N,C,H,W, channels_last
        if args.flip: real = torch.where(torch.rand_like(real[:, :1, :1, :1]) < 0.5, real.flip(3), real)
        for opt, lr in (opt_g, args.lr), (opt_d, args.d_lr):  # tensors, as a CUDA graph keeps a plain number
            opt.param_groups[0]["lr"] = lr * torch.clamp(args.fall / at, max=1.0).sqrt()
        loss_d, loss_g, *logits = train_step(nets, args, real, z, *labels)
        sums.add_(torch.stack([loss_d, loss_g, *(logit.sigmoid().mean() for logit in logits)]).detach())
        weight = 1 - torch.clamp(0.5 ** (10 / at), max=args.ema)  # a half-life of a tenth of the steps so far
        for average, value in zip(ema.state_dict().values(), G.state_dict().values()):
            if value.is_floating_point(): average.lerp_(value, weight)
    # Run folder
    real = torch.from_numpy(pack[np.linspace(0, len(pack) - 1, PER_ROW**2).astype(int)]).permute(0, 3, 1, 2)
    if rank == 0:
        print(*(f"{name} {value}" for name, value in args.used.items()), f"into {out}", sep="; ", flush=True)
        write(out / "config.json", lambda part: part.write_text(json.dumps(vars(args), indent=2)))
        write(out / "samples" / "real.png", to_grid(real).save)
    # Steps
    own = torch.default_generator if device.type == "cpu" else getattr(torch, device.type)  # random numbers
    source, fixed = batches(arrays, args, device, rank, world, start), draw_z(args, PER_ROW**2)
    many = draw_z(args, 256).to(device)
    graph, warned, caught, stop, step = None, set(), [], False, start
    for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():  # others get none
        signal.signal(number, lambda number, frame: caught.append(number))
    for step in (bar := tqdm(range(start + 1, last + 1), SCRIPT, last, initial=start, disable=rank > 0)):
        own.manual_seed((args.seed * 1_000_003 + step) % 2**63)  # what is drawn follows from seed and step
        z = torch.randn(images, Z, device=device).chunk(world)[rank]
        if rank: own.manual_seed(own.initial_seed() + (rank << 40))  # flips, views, dropout differ
        inputs = [torch.full((), step, device=device), z, *next(source)]
        if device.type == "cuda" and precision != "fp16" and step == start + 4:  # three to warm up
            graph, static = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()): iterate(*static)
        for mine, new in zip(static, inputs) if graph else (): mine.copy_(new)
        graph.replay() if graph else iterate(*inputs)
        epoch, since = math.ceil(step / steps), (step - 1) % LOG_EVERY + 1
        if since == LOG_EVERY or step == last or (caught and world == 1):
            values = torch.cat([sums / since, sums.new_tensor([len(caught)])]) / world
            if world > 1: dist.all_reduce(values)
            *values, stop = values.tolist()
            if not all(map(math.isfinite, values)):
                raise ValueError(f"no finite loss at step {step}: --resume --precision fp32 or a lower --lr")
            rows.append([step, epoch, round(time.monotonic() - began, 2), step * images, *values])
            bar.set_postfix(epoch=epoch, loss_d=values[0], loss_g=values[1])
            if since == LOG_EVERY: sums.zero_()
        ends = step % steps == 0 or step == last or stop
        due = since == LOG_EVERY and time.monotonic() - saved_at > 60 * args.save_every  # known finite
        if args.ema and rank == 0 and (ends or due):  # averaged weights have statistics of their own
            torch.optim.swa_utils.update_bn([many[i::4] for i in range(4)], ema)
        if rank == 0 and ends:
            fake = sample(ema, fixed)
            write(out / "samples" / f"epoch_{epoch:04d}.png", to_grid(fake).save)
            for worry in set(worries(rows, fake, real)) - warned:
                warned.add(worry)
                bar.write(f"warning: {worry}")
        if rank == 0 and (due or stop or step == last):
            states, saved_at = {name: part.state_dict() for name, part in parts.items()}, time.monotonic()
            models = dict(Generator=states["ema"], Discriminator=states["D"], config=vars(args))
            run = dict(models, **states, step=step, sums=sums, rows=torch.tensor(rows, dtype=torch.float64))
            np.savetxt(out / "metrics.csv", rows, "%.10g", ",", header=",".join(COLUMNS), comments="")
            for name, content in ("checkpoint.pt", run), ("models.pth", models):
                write(out / name, functools.partial(torch.save, content))
        if stop: break
    if world > 1: dist.destroy_process_group()
    if start >= last: print(f"{out} has had its {last} steps: a larger --steps or --epochs goes on")
    if caught:
        print(f"stopped at step {step} and saved; to go on: python {SCRIPT}.py --resume --out {out}")
        raise SystemExit(128 + caught[0])
# --- end shared ---

# %% Command line
def parse(argv):
    """(flags, checkpoint or None): a flag that is given wins over the checkpoint's, over the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add, switch = fail, parser.add_argument, argparse.BooleanOptionalAction
    add("--scheme", dest="recipe", choices=RECIPES, default="stable", help="exact is the slides' (stable)")
    add("--loss", choices=LOSSES, help="(relativistic; exact: bce)")
    add("--gamma", type=float, help="weight of R1 and R2 (10; exact: 0)")
    add("--up", choices=("mixed", "bilinear", "nearest", "deconv"), help="(mixed; exact: deconv)")
    add("--slope", type=float, help="of the generator's LeakyReLU (0.2; exact: 0)")
    add("--d-convs", type=int, choices=(4, 5), default=5, help="the discriminator's strided convolutions (5)")
    add("--d-every", type=int, default=1, help="the generator's steps for each of the discriminator's (1)")
    add("--width", type=int, default=64, help="channels beside the picture, all others in proportion (64)")
    add("--data", default="synthetic", help="celeba, synthetic, mnist, fashion, a folder or .zip (synthetic)")
    parser.set_defaults(size=128, channels=3)
    fixed = "recipe", "loss", "gamma", "up", "slope", "d_convs", "d_every", "width", "batch_size"
    # --- shared: command line ---
    add("--root", default="data", help="folder of the named sets and of decoded pictures (data)")
    add("--classes", nargs="+", default=[], help="only these subfolders of --data")
    add("--epochs", type=int, help="the end of a run (20, or the more that 5000 steps are)")
    add("--steps", type=int, help="the same, in steps; whichever comes first")
    add("--batch-size", type=int, default=64, help="pictures a step, in each process (64)")
    add("--lr", type=float, help="Adam's learning rate for the generator (by recipe)")
    add("--d-lr", type=float, help="and for the discriminator (by recipe)")
    add("--betas", type=float, nargs=2, help="Adam's (by recipe)")
    add("--flip", action=switch, help="mirror half of the pictures (by recipe)")
    add("--seed", type=lambda text: int(text) % 2**63, default=0, help="of all that is drawn by chance (0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="weights stay fp32")
    add("--no-fused", action="store_true", help="PyTorch's operations even where gan_ops is installed")
    add("--out", default=f"runs/{SCRIPT}", help=f"run folder (runs/{SCRIPT})")
    add("--save-every", type=float, default=5.0, help="minutes between checkpoints (5)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=int, metavar="N", help="make N pictures by --checkpoint")
    add("--checkpoint", help="models.pth or checkpoint.pt (the one in --out)")
    add("--save", default="generated.npz", help="of --generate: .npz, .png or folder (generated.npz)")
    given, saved, kept = parser.parse_args(argv), None, {}
    path = Path(given.checkpoint or f"{given.out}/checkpoint.pt")
    if given.resume and not path.exists(): print(f"there is no {path} to go on from: a new run begins")
    if given.generate or (given.resume and path.exists()):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            assert saved["config"]["script"] == SCRIPT, f"it is of {saved['config']['script']}.py"
        except Exception as error:  # a missing, cut or foreign file fails in many ways
            fail(f"{path} is no checkpoint of {SCRIPT}.py: {error}")
        kept = dict(saved["config"], generate=None) | (dict(device="auto") if given.generate else {})
        if given.epochs or given.steps: kept.update(epochs=None, steps=None)  # a new end, no second one
    parser.set_defaults(**dict(RECIPES[given.recipe], script=SCRIPT) | kept)
    args = parser.parse_args(argv)
    for name in "epochs", "steps", "batch_size", "width", "fall", "generate":
        if (value := getattr(args, name)) is not None and value < 1: fail(f"--{name} {value}: at least 1")
    if saved and any(kept[name] != getattr(args, name) for name in fixed):
        fail(f"{path} is of another --{', --'.join(fixed).replace('_', '-')}: leave them out")
    return args, saved

def main(argv=None):
    """Run the command line `argv`; in a notebook, where sys.argv is the kernel's, the defaults."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        args, saved = parse([] if argv is None and "kernel_launcher" in sys.argv[0] else argv)
        generate(args, saved) if args.generate else train(args, saved)
    except (Exception, KeyboardInterrupt) as error:
        if "GAN_DEBUG" in os.environ: raise
        places = "; --root, --out and --save say where to write" if isinstance(error, OSError) else ""
        fail(f"{type(error).__name__}: {error}{places} (GAN_DEBUG=1 shows where)")
    finally:
        for number, handler in handlers.items():  # a notebook goes on
            if signal.getsignal(number) is not handler: signal.signal(number, handler)

if __name__ == "__main__":
    main()
# --- end shared ---
