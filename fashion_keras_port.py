"""Train the Keras Fashion-MNIST GAN in PyTorch, in this one file, and what its authors wished for next.

    python fashion_keras_port.py                                  # Fashion-MNIST, which is downloaded
    python fashion_keras_port.py --arch style --conditional --data synthetic --steps 600
    python fashion_keras_port.py --generate 100 --checkpoint runs/fashion_keras_port/models.pth

The default is the fully connected GAN of many a Keras notebook (Goodfellow et al. 2014), to rounding the same
mathematics: first weights, batch norm, Adam, loss. Flags add classes, a style-based generator, losses.
"""
# %% [markdown]
# # Two networks that play against each other
#
# The **generator** turns 100 random numbers into a picture of a piece of clothing. It never sees a real one.
# The **discriminator** is shown pictures, real and made up, and says how likely each is to be real. Each is
# trained on the other's mistakes, so both get better; when it goes well, the discriminator ends up guessing.
# Run this one file as a script, or open it as a notebook, as each section is a cell.

# %%
import argparse, copy, functools, glob, json, math, os, random, signal, sys, threading, time, zipfile, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.utils import save_image
from tqdm.auto import tqdm

SCRIPT, Z, PER_ROW = "fashion_keras_port", 100, 10  # numbers of noise; a row of samples
RECIPES = {  # by --arch: what the Keras original has, and what styles were found to like
    "dense": dict(width=256, batch_size=32, lr=2e-4, d_lr=2e-4, betas=[0.5, 0.999], ema=0.0, gamma=0.0),
    "style": dict(width=16, lr=5e-4, d_lr=1e-3, fall=3000, betas=[0.0, 0.99], ema=0.999, gamma=0.3)}

# %% [markdown]
# ## The two players
#
# The generator widens its 100 numbers step by step, 256, 512, 1024, to the 784 pixels of a 28×28 picture;
# tanh puts them between -1 and 1, as the real pictures are. After each layer comes LeakyReLU and then batch
# norm, which brings each feature to mean 0 and deviation 1 over the batch: without it, deep generators tend
# to give one picture for any noise. (Both read and write much and compute little, so the extension gan_ops,
# where it is installed, makes one operation of them.) The discriminator goes the other way, 784 pixels to
# 512, 256 and one number. It has no batch norm, so that it judges each picture by itself.
#
# Keras and PyTorch do not mean the same by the same words. What had to be translated:
#
# | Keras | PyTorch |
# |---|---|
# | `BatchNormalization(momentum=0.8)` | `momentum=0.2`, the share of the new value; `eps=1e-3` |
# | its moving variance | is the plain variance of the batch; PyTorch's is n/(n-1) times as large |
# | `Dense` starts Glorot-uniform, biases at 0 | `nn.Linear` has other weights to start with |
# | Adam's `epsilon=1e-7` | is added before the bias correction, not after it: a factor of 32 at first |
#
# `--arch style` has convolutions in place of the wide layers: a pixel looks at its neighbours, and far fewer
# weights draw sharper clothes. It starts from one learnt picture; the noise only says how strong each feature
# is (Karras et al. 2020). `--conditional` tells both players the class: the generator gets it as ten numbers
# before the noise, nine 0 and one 1; the discriminator compares its features with a vector for the class
# (Miyato & Koyama 2018). Who has to make a bag when a bag is asked for cannot forget bags.

# %%
# --- shared: fused ---
try:  # the extension of this repository: optional, and a build for another torch can fail in any way
    import gan_ops
    assert gan_ops.torch_version == torch.__version__, f"it was built for torch {gan_ops.torch_version}"
    FUSED, GAN_OPS = gan_ops.devices, f"serves on {' and '.join(gan_ops.devices)}"
except Exception as error:
    FUSED, GAN_OPS = (), f"does not serve: {error} (pip install -e . builds it)"
# --- end shared ---

class LeakyReLUBatchNorm(nn.BatchNorm1d):
    """batch_norm(leaky_relu(x, 0.2)) of N,C as Keras has it: running_var is the batch's own variance."""
    fused = False  # whether gan_ops does it, as one operation

    def forward(self, x):
        affine, mean, var = (self.weight, self.bias), self.running_mean, self.running_var
        options, op = (self.training, self.momentum, self.eps), torch.ops.gan_ops
        if self.fused: return op.leaky_relu_batch_norm(x, *affine, mean, var, *options, 0.2, True)
        share = 1 - 1 / len(x) if self.training else 1  # of PyTorch's variance that is the batch's own
        theirs = var / share
        x = F.batch_norm(F.leaky_relu(x, 0.2), mean, theirs, *affine, *options)
        if self.training: var.copy_(theirs * share)
        return x

class Generator(nn.Sequential):
    """Noise N,100, after a one-hot label where there are `classes`, to pictures (N,1,28,28) in [-1, 1]."""
    def __init__(self, width=256, classes=0):
        w, norm = width, functools.partial(LeakyReLUBatchNorm, momentum=0.2, eps=1e-3)
        super().__init__(nn.Linear(classes + Z, w), norm(w), nn.Linear(w, 2 * w), norm(2 * w),
                         nn.Linear(2 * w, 4 * w), norm(4 * w), nn.Linear(4 * w, 784), nn.Tanh(),
                         nn.Unflatten(1, (1, 28, 28)))

class StyleGenerator(nn.Module):
    """The same by convolutions of a learnt start, the last two doubling, whose inputs a style scales and
    whose outputs are brought back to one deviation (Karras et al. 2020); each adds grey to the picture."""
    def __init__(self, width=16, classes=0):
        super().__init__()
        w, leaky = width, functools.partial(nn.LeakyReLU, 0.2)
        self.map = nn.Sequential(nn.Linear(classes + Z, 128), leaky(), nn.Linear(128, 128), leaky())
        self.start, self.noise = nn.Parameter(torch.randn(1, 4 * w, 7, 7)), nn.Parameter(torch.zeros(3))
        self.styles = nn.ModuleList(nn.Linear(128, c) for c in (4 * w, 4 * w, 2 * w))
        self.convs = nn.ModuleList(nn.ConvTranspose2d(c * w, d * w, size, size - 2, 1)  # 4x4 ones double
                                   for c, d, size in ((4, 4, 3), (4, 2, 4), (2, 1, 4)))
        self.greys = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in (4 * w, 2 * w, w))

    def forward(self, z):
        latent, x, picture = self.map(z), self.start.expand(z.shape[0], -1, -1, -1), z.new_zeros(1, 1, 7, 7)
        for noise, style, conv, grey in zip(self.noise, self.styles, self.convs, self.greys):
            scale = 1 + style(latent)  # N,c_in
            power = scale.square() @ conv.weight.square().sum((2, 3)) / conv.stride[0] ** 2  # N,c_out
            x = x * scale[..., None, None]
            if self.training: x = x + noise * torch.randn_like(x[:, :1])
            x = F.leaky_relu(conv(x) * (2 / (power + 1e-8)).sqrt()[..., None, None], 0.2)  # to N,16,28,28
            picture = F.interpolate(picture, x.shape[2:], mode="bilinear") + grey(x)
        return picture.tanh()

class Discriminator(nn.Module):
    """Pictures (N,1,28,28) to probabilities of being real (N,1), or to logits, to which one-hot labels
    (N,classes), where there are any, add the features' product with the class's vector."""
    def __init__(self, width=256, classes=0, arch="dense"):
        super().__init__()
        w, leaky = width, functools.partial(nn.LeakyReLU, 0.2)
        if arch == "dense":
            layers = [nn.Flatten(), nn.Linear(784, 2 * w), leaky(), nn.Linear(2 * w, w), leaky()]
        else:
            layers = [nn.Conv2d(1, w, 4, 2, 1), leaky(), nn.Conv2d(w, 2 * w, 4, 2, 1), leaky(),  # N,32,7,7
                      nn.Conv2d(2 * w, 4 * w, 3, 2, 1), leaky(), nn.Flatten(),  # of N,64,4,4
                      nn.Linear(64 * w, 16 * w), leaky()]
        self.layers, self.logit = nn.Sequential(*layers), nn.Linear(layers[-2].out_features, 1)
        self.of_class = nn.Linear(classes, self.logit.in_features, bias=False) if classes else None

    def forward(self, x, labels=None, logits=False):
        features = self.layers(x)  # N,256
        logit = self.logit(features)
        if labels is not None: logit = logit + (features * self.of_class(labels)).sum(1, keepdim=True)
        return logit if logits else logit.sigmoid()  # N,1

def make_networks(args):
    """(generator, discriminator) with Keras's initial weights: Glorot-uniform, biases 0."""
    classes = len(args.names) if args.conditional else 0
    G = (StyleGenerator if args.recipe == "style" else Generator)(args.width, classes)
    nets = G, Discriminator(args.width, classes, args.recipe)
    for name, weight in nn.ModuleList(nets).named_parameters():
        if name.endswith("bias"): nn.init.zeros_(weight)
        elif name.endswith("weight") and weight.ndim > 1: nn.init.xavier_uniform_(weight)
    return nets

class Optimiser(torch.optim.Adam):
    """Keras's Adam: eps 1e-7 is added before the bias correction, which goes into the learning rate."""
    def step(self, closure=None):
        group = self.param_groups[0]
        rate, (beta1, beta2) = group["lr"], group["betas"]
        for p in () if self.state else group["params"]:  # counting from 1e5, where PyTorch's correction is 1
            m, v, step = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(1e5, device=p.device)
            self.state[p] = dict(exp_avg=m, exp_avg_sq=v, step=step)
        step = self.state[group["params"][0]]["step"] - 99_999
        if not group["capturable"]: step = step.item()  # where no graph needs a tensor, in float64
        group.update(eps=1e-7, lr=rate * (1 - beta2**step) ** 0.5 / (1 - beta1**step))
        super().step(closure)
        group["lr"] = rate

# %% [markdown]
# ## The two losses, and why labels are flipped
#
# The discriminator answers a question with two answers, so its loss is binary cross-entropy: -log p for a
# real picture, -log(1 - p) for a made one, where p is its probability of "real". It learns from a batch of
# real pictures, then from a batch of made ones, as the Keras loop calls `train_on_batch` twice.
#
# The generator wants the opposite. It could be trained to make log(1 - p) small, but as long as the
# discriminator sees through it, p is near 0 and that curve is flat: there is nothing to learn from. So the
# labels are flipped: its pictures are given the label "real", and its loss is -log p, steep just where it is
# worst. The discriminator stands still; only its opinion is passed back to the generator's weights.
#
# What collapse looks like: the generator finds a few pictures that pass, and makes only these. The grids show
# one sneaker, whatever the noise; its loss jumps as the discriminator learns it and a shirt comes next.
#
# Other losses score pictures instead of giving probabilities: `hinge` asks for scores beyond 1 and -1 and no
# further (Lim & Ye 2017), `lsgan` for scores of 1 and 0 (Mao et al. 2017). `--gamma` penalises any slope at
# real pictures, so that the discriminator stays calm where it is right (R1, Mescheder et al. 2018).

# %%
LOSSES = {  # of logits (N,1) that are to say that pictures are `real`, or not; Keras clips probabilities
    "bce": lambda x, real: -(x.sigmoid().clamp(1e-7, 1 - 1e-7) + (real - 1)).abs().log().mean(),  # p, 1 - p
    "hinge": lambda x, real: F.relu(1 - x if real else 1 + x).mean(),
    "lsgan": lambda x, real: (x - int(real)).square().mean()}

def train_step(nets, args, real, z, *labels):
    """A step on real (N,1,28,28), z (N,100) and, if --conditional, one-hot labels (N,10). dense, as Keras's
    loop: the discriminator's on real, then on pictures made in inference mode, the generator's from noise of
    its own; style: one of each, on the same pictures. Returns losses and the discriminator's logits."""
    def judge(x):
        with nets.autocast(): return nets.D(x, *labels, logits=True).float()
    loss_of, dense = LOSSES[args.loss], args.recipe == "dense"
    nets.D.requires_grad_(True)
    nets.G.train(not dense)
    with torch.set_grad_enabled(not dense), nets.autocast(): made = nets.G(torch.cat([*labels, z], 1))
    real_logit = judge(real.requires_grad_(args.gamma > 0))
    of_real = loss_of(real_logit, True)
    if args.gamma:
        (slope,) = torch.autograd.grad(real_logit.sum(), real, create_graph=True)
        of_real = of_real + args.gamma / 2 * slope.square().sum((1, 2, 3)).mean()
    if dense: optimise(nets, of_real, nets.opt_d)
    fake_logit = judge(made.detach())
    of_fake = loss_of(fake_logit, False)
    optimise(nets, of_fake if dense else of_real + of_fake, nets.opt_d)
    nets.D.requires_grad_(False)
    if dense:
        with nets.autocast(): made = nets.G.train()(torch.cat([*labels, torch.randn_like(z)], 1))
    logit = judge(made)
    loss_g = -logit.mean() if args.loss == "hinge" else loss_of(logit, True)
    optimise(nets, loss_g, nets.opt_g)
    return (of_real + of_fake) / 2, loss_g, real_logit, fake_logit

# %% [markdown]
# ## The pictures
#
# 60,000 pieces of clothing in ten classes, 28×28 grey pixels each. They are decoded once and kept as bytes; a
# batch is brought from 0..255 to -1..1 as it is used, because that is what tanh can reach. Each epoch goes
# through all of them in a new order that follows from the seed, so the same command gives the same run.

# %%
CLOTHES = {"Dress": [(13, 16), (11, 44), (32, 96)], "Trouser": [(20, 16), (24, 98), (7, 98), (0, 38)],
           "Bag": [(11, 20), (18, 46), (42, 46), (38, 96)]}  # right halves of outlines: from the middle, top
DRAWN = [f"{[*CLOTHES][i % 3]}/{i}.png" for i in range(4096)]  # the pictures of --data synthetic
settle = lambda args, pack, names: [labels_of(args, names)] if args.conditional else []  # labels

def draw_picture(index):
    """Piece of clothing number `index` of --data synthetic: a dress, trousers or a bag."""
    rng, image, half = random.Random(index), Image.new("L", (112, 112)), [*CLOTHES.values()][index % 3]
    points, wide = half + [(-x, y) for x, y in reversed(half)], rng.uniform(0.85, 1.2)
    ImageDraw.Draw(image).polygon([(56 + x * wide, y) for x, y in points], rng.randint(110, 255))
    return image.rotate(rng.uniform(-6, 6), Image.BILINEAR)

def draw_z(args, count):
    """What the generator makes `count` pictures from, the same for each --seed: labels, if any, and z."""
    if args.labels and not args.conditional: fail("--labels is for a model trained with --conditional")
    z = torch.randn(count, Z, generator=torch.Generator().manual_seed(args.seed))
    return torch.cat([asked_labels(args, count), z], 1) if args.conditional else z

# --- shared: classes ---
def labels_of(args, names):
    """One-hot labels, float32 N,classes, by the one folder in each picture's name that is a class, as in
    args.names: one of --classes; without these, a folder that not all pictures are in."""
    paths = [name.split("/")[:-1] for name in names]
    kinds = set(args.classes) or set().union(*paths).difference(set.intersection(*map(set, paths)))
    found = ["/".join(folder for folder in path if folder in kinds) for path in paths]
    counts = Counter(sorted(found))
    if len(counts) < 2 or any(not kind or "/" in kind for kind in counts):
        fail(f"--data {args.data}: which are the classes? It has {dict(counts)}; name them with --classes")
    if args.names not in (None, [*counts]): fail(f"the model's classes are {args.names}, not {[*counts]}")
    args.names = list(counts)
    print(f"classes: {dict(counts)}")
    return np.eye(len(counts), dtype=np.float32)[[args.names.index(kind) for kind in found]]

def asked_labels(args, count):
    """One-hot labels for `count` pictures in order, count,classes: as many of each of --labels, or of all."""
    numbers = range(len(args.names))
    known = dict(zip(map(str, numbers), numbers)) | {name.lower(): i for i, name in enumerate(args.names)}
    wanted = [known.get(w.strip().lower()) for w in args.labels.split(",")] if args.labels else numbers
    if None in wanted: fail(f"--labels {args.labels}: the model has {', '.join(args.names)}")
    return F.one_hot(torch.tensor(wanted)[torch.arange(count) * len(wanted) // count], len(numbers)).float()
# --- end shared ---

# --- shared: data and training ---
def fail(message):
    """End with one line, for what the user can mend."""
    print("error:", *str(message).split("\n"), file=sys.stderr)
    raise SystemExit(2)

def find_pictures(data, root):
    """{name: (what changes whenever the file does, function that opens it)} of --data."""
    if data == "synthetic":
        return {name: (SCRIPT, functools.partial(draw_picture, i)) for i, name in enumerate(DRAWN)}
    if kind := dict(mnist="MNIST", fashion="FashionMNIST").get(data):
        found = getattr(torchvision.datasets, kind)(root, download=True)  # where it is not there yet
        folders = [name.split(" - ")[0].replace("/", " or ") for name in found.classes]
        return {f"{folders[k]}/{i}.png": (data, image.copy) for i, (image, k) in enumerate(found)}
    path = Path(data).expanduser()
    if data == "celeba":
        places = [f"{at}/**/img_align_celeba{end}" for at in (root, "/kaggle/input") for end in ("", ".zip")]
        if not any(glob.glob(place, recursive=True) for place in places):
            torchvision.datasets.CelebA(root, download=True)
        path = Path(next(file for place in places for file in glob.glob(place, recursive=True)))
    if path.is_dir():  # links to folders, which can lead back up, are not followed, but named as left out
        tree = {f.relative_to(path).as_posix(): f for f in path.rglob("*") if f.is_file() or f.is_symlink()}
        return {n: (f.is_file() and f.stat().st_mtime_ns, lambda f=f: Image.open(f)) for n, f in tree.items()}
    archive = zipfile.ZipFile(path)
    return {i.filename: (i.CRC, lambda i=i: Image.open(archive.open(i))) for i in archive.infolist()}

def square(image, size, channels):
    """A PIL picture as uint8 size,size,channels: its middle; if parts are transparent, all of it on white."""
    assert image.format != "TIFF" or image.n_frames == 1, f"it has {image.n_frames} pages"
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
    image, mode = ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB"
    if image.mode[0] in "IF":  # grey of 16 bits, of which 12 may be in use, or of numbers up to 1
        values, tops = np.asarray(image, np.float32).clip(0, 65535), (1, 255, 4095, 65535)
        image = Image.fromarray(np.uint8(values * 255 / next(top for top in tops if top >= values.max())))
    if image.has_transparency_data and (image := image.convert("RGBA")).getextrema()[3][0] < 255:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.pad(image, (size, size), Image.BILINEAR, color="white")
    return np.asarray(ImageOps.fit(image.convert(mode), (size, size), Image.BILINEAR)).reshape(size, size, -1)

def load_pack(args):
    """The pictures of --data, uint8 N,size,size,channels, memory-mapped, and their names; decoded once."""
    try:
        found = find_pictures(args.data, args.root)
    except Exception as error:  # not there, no network, a used up quota, cut short, another kind of archive
        fail(f"--data {args.data}: {error}; it is a folder, a .zip, synthetic, mnist, fashion or celeba, "
             f"whose img_align_celeba.zip belongs into --root {args.root} where the download fails")
    names = sorted(n for n in found if n[-1] != "/" and "/." not in f"/{n}" and "__MACOSX" not in n)
    folders = {folder for n in names for folder in n.split("/")[:-1]}
    if not names or set(args.classes) - folders:
        fail(f"{args.data} has no pictures in {args.classes or 'it'}; folders, not links: {sorted(folders)}")
    names = [n for n in names if not args.classes or set(n.split("/")[:-1]) & set(args.classes)]
    key = zlib.crc32(repr([args.channels, [(n, found[n][0]) for n in names]]).encode())
    path = Path(args.root, ".packed", f"{Path(args.data).resolve().stem}-{args.size}-{key:08x}.npy")
    report, left_out, shape = path.with_suffix(".json"), {}, (len(names), args.size, args.size, args.channels)

    def decode(name):
        try:
            return square(found[name][1](), args.size, args.channels).tobytes()
        except Exception as error:  # no picture, or a broken one, which can raise anything
            left_out[name] = str(error)

    def pack(part):
        with open(part, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as threads:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
            end = file.tell() + math.prod(shape)  # empty rows stand there for pictures left out
            file.writelines(filter(None, tqdm(threads.map(decode, names), "packing", len(names), unit="img")))
            file.truncate(end)
        write(report, lambda part: part.write_text(json.dumps(left_out, indent=1)))
    if not path.exists(): write(path, pack)
    if left_out := json.loads(report.read_text()):
        print(f"left out, see {report}: {dict(Counter(Path(n).suffix.lower() for n in left_out))}")
    names = [n for n in names if n not in left_out]
    return np.load(path, mmap_mode="c")[: len(names)], names

def batches(arrays, args, device, step):
    """Yield batches after `step` on the device, rows of each array, in an order that follows from --seed."""
    arrays, steps = [torch.from_numpy(array) for array in arrays], len(arrays[0]) // args.batch_size
    if device.type == "cuda" and arrays[0].nbytes < torch.cuda.mem_get_info()[0] / 2:
        arrays = [array.to(device) for array in arrays]
    while True:
        order = np.random.default_rng([args.seed, step // steps]).permutation(len(arrays[0]))
        rows = torch.from_numpy(order).to(arrays[0].device).split(args.batch_size)[step % steps : steps]
        yield from ([array[numbers].to(device) for array in arrays] for numbers in rows)
        step += len(rows)

# %% Pictures out
def write(path, make, *what, **options):
    """Have make(*what, part, **options) make a file beside `path`, flush and rename it: all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")  # two runs may pack the same pictures
    make(*what, part, **options)
    with open(part, "rb+") as file: os.fsync(file.fileno())
    os.replace(part, path)

@torch.no_grad()
def sample(generator, z):
    """What a generator in evaluation mode makes of z (N,...), 64 at a time: uint8 N,C,H,W on the CPU."""
    pictures = (generator(part.to(next(generator.parameters()).device)).float() for part in z.split(64))
    return torch.cat([part.mul(127.5).add(128).clamp(0, 255).byte().cpu() for part in pictures])

def generate(args, saved):
    """--generate: pictures by a checkpoint's averaged generator, and their labels: a .npz, .png or folder."""
    generator, path = make_networks(args)[0].to(pick_device(args)[0]).eval(), Path(args.save)
    generator.load_state_dict(saved["Generator"])
    z = draw_z(args, args.generate)
    images, labels = sample(generator, z), z[:, :-Z].nonzero()[:, 1].numpy()  # of no classes there are none
    pixels = images.permute(0, 2, 3, 1).squeeze(3).numpy()  # N,H,W,3 or, grey, N,H,W
    if path.suffix == ".npz":
        write(path, np.savez, images=pixels, **(dict(labels=labels) if len(labels) else {}))
    elif path.suffix.lower() in Image.registered_extensions():
        write(path, save_image, images / 255, nrow=math.ceil(args.generate**0.5))
    else:  # a folder for each class, as --data takes them
        folders = [path / args.names[label] for label in labels] or [path] * len(pixels)
        for i, folder in enumerate(folders): write(folder / f"{i:06d}.png", Image.fromarray(pixels[i]).save)
    print(f"{args.generate} pictures: {path}")

# %% Training
LOG_EVERY, SAMPLE_EVERY = 10, 100  # steps from row to row of metrics.csv, and at least from sample to sample
COLUMNS = "step", "epoch", "seconds", "images", "loss_d", "loss_g", "d_real", "d_fake"

def pick_device(args):
    """(device, precision) by the flags; where they are auto, the fastest that this machine has."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    cpu = {word for file in glob.glob("/proc/cpuinfo") for word in Path(file).read_text().split()}
    fast = "bf16" if "amx_bf16" in cpu or {"avx512_bf16", "AuthenticAMD"} <= cpu else "fp32"
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be captured on the default one
        fast = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    torch.ones(8, device=device).mul(2).tolist()  # a GPU that this torch has no kernels for fails here
    return device, fast if args.precision == "auto" else args.precision

def optimise(nets, loss, optimiser):
    """Back-propagate `loss` and take a step."""
    optimiser.zero_grad(set_to_none=True)
    nets.scaler.scale(loss).backward()
    nets.scaler.step(optimiser)
    nets.scaler.update()

def train(args, saved):
    """Train from the start, or from the checkpoint `saved`, into the run folder --out."""
    (device, precision), out, saved_at = pick_device(args), Path(args.out), time.monotonic()
    if (out / "checkpoint.pt").exists() and not saved: fail(f"{out} holds a run: --resume, or another --out")
    # Pictures
    pack, names = load_pack(args)
    steps = len(pack) // args.batch_size  # of an epoch
    if steps == 0: fail(f"{len(pack)} pictures are too few for --batch-size {args.batch_size}")
    args.used = dict(pictures=len(pack), set=f"{zlib.crc32(repr(names).encode()):08x}", device=str(device),
                     precision=precision, torch=str(torch.__version__),
                     gan_ops="does not serve: --no-fused" if args.no_fused else GAN_OPS)  # set: by names
    if saved and saved["config"]["used"]["set"] != args.used["set"]: fail(f"{out} began with other pictures")
    arrays = [pack, *settle(args, pack, names)]
    last = min(filter(None, (args.steps, (args.epochs or 0) * steps)), default=max(20 * steps, 5000))
    # Networks, average, optimisers
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    G, D = (net.to(device, memory_format=torch.channels_last) for net in make_networks(args))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    for module in (*G.modules(), *D.modules()): module.fused = device.type in FUSED and not args.no_fused
    adam = dict(betas=args.betas, fused=device.type != "mps", capturable=device.type == "cuda")
    opt_g, opt_d = (Optimiser(net.parameters(), lr, **adam) for net, lr in ((G, args.lr), (D, args.d_lr)))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = dict(G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d, scaler=scaler)  # of a checkpoint
    nets, half = argparse.Namespace(**parts), torch.float16 if precision == "fp16" else torch.bfloat16
    nets.autocast = functools.partial(torch.autocast, device.type, half, precision != "fp32")
    rows, start, began = [], 0, time.monotonic()
    if saved:
        for name, part in parts.items(): part.load_state_dict(saved[name])
        start, began = saved["step"], began - saved["rows"][-1][2]
        rows = [row for row in saved["rows"] if row[0] % LOG_EVERY == 0]

    def iterate(at, z, real, *labels):  # a step, its metrics and the average
        real = real.permute(0, 3, 1, 2).float() / 127.5 - 1  # N,C,H,W, channels_last
        if args.flip: real = torch.where(torch.rand_like(real[:, :1, :1, :1]) < 0.5, real.flip(3), real)
        for opt, lr in (opt_g, args.lr), (opt_d, args.d_lr):  # tensors, as a CUDA graph keeps a plain number
            opt.param_groups[0].update(adam, lr=lr * torch.clamp(args.fall / at, max=1.0).sqrt())
        loss_d, loss_g, *logits = train_step(nets, args, real, z, *labels)
        weight = 1 - torch.clamp(0.5 ** (10 / at), max=args.ema)  # a half-life of a tenth of the steps so far
        for average, value in zip(ema.state_dict().values(), G.state_dict().values()):
            if value.is_floating_point(): average.lerp_(value, weight)
        return torch.stack([loss_d, loss_g, *(logit.sigmoid().mean() for logit in logits)]).detach()
    # Steps
    print("; ".join(f"{n} {v}" for n, v in args.used.items()) + f"; into {out} from step {start}", flush=True)
    write(out / "config.json", lambda part: part.write_text(json.dumps(vars(args), indent=2)))
    source, fixed = batches(arrays, args, device, start), draw_z(args, PER_ROW**2)
    graph, caught, step, own = None, [], start, torch.default_generator if device.type == "cpu" else torch
    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {kind: signal.signal(kind, lambda kind, frame: caught.append(kind)) for kind in kinds}
    for step in (bar := tqdm(range(start + 1, last + 1), SCRIPT, last, initial=start)):
        own.manual_seed((args.seed * 1_000_003 + step) % 2**63)  # what is drawn follows from seed and step
        z = torch.randn(args.batch_size, Z, device=device)
        inputs = [torch.full((), step, device=device), z, *next(source)]
        if device.type == "cuda" and precision != "fp16" and step == start + 4:  # three to warm up
            graph, static = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()): metrics = iterate(*static)
        for mine, new in zip(static, inputs) if graph else (): mine.copy_(new)
        if graph: graph.replay()
        else: metrics = iterate(*inputs)
        epoch, logs, stop = math.ceil(step / steps), step % LOG_EVERY == 0, step == last or bool(caught)
        if logs or stop:
            values = metrics.tolist()
            if not all(map(math.isfinite, values)):
                raise ValueError(f"no finite loss at step {step}: --resume --precision fp32 or a lower --lr")
            rows.append([step, epoch, round(time.monotonic() - began, 2), step * args.batch_size, *values])
            bar.set_postfix(epoch=epoch, loss_d=values[0], loss_g=values[1])
        ends = stop or step % (steps * math.ceil(SAMPLE_EVERY / steps)) == 0  # of an epoch, or of some
        due = stop or (logs and time.monotonic() - saved_at > 60 * args.save_every)  # the losses are finite
        if args.ema and (ends or due):  # averaged weights have statistics of their own
            torch.optim.swa_utils.update_bn(draw_z(args, 256).to(device).view(64, 4, -1).unbind(1), ema)
        if ends:
            write(out / f"samples/epoch_{epoch:04d}.png", save_image, sample(ema, fixed) / 255, nrow=PER_ROW)
        if due:
            states, saved_at = {name: part.state_dict() for name, part in parts.items()}, time.monotonic()
            models = dict(Generator=states["ema"], Discriminator=states["D"], config=vars(args))
            np.savetxt(out / "metrics.csv", rows, "%.10g", ",", header=",".join(COLUMNS), comments="")
            write(out / "checkpoint.pt", torch.save, dict(models, **states, step=step, rows=rows))
            write(out / "models.pth", torch.save, models)
        if stop and step < last: break
    for kind in handlers: signal.signal(kind, handlers[kind])  # a notebook goes on
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
    add("--arch", dest="recipe", choices=RECIPES, default="dense", help="dense is Keras's (dense)")
    add("--conditional", action="store_true", help="tell both networks the class")
    add("--loss", choices=LOSSES, default="bce", help="(bce)")
    add("--gamma", type=float, help="weight of R1 (0; style: 0.3)")
    add("--width", type=int, help="of the narrowest layer (256; style: 16)")
    add("--labels", help="with --generate: the classes wanted, by number or name, as Bag,3 (all)")
    add("--data", default="fashion", help="fashion, mnist, synthetic, a folder or .zip (fashion)")
    parser.set_defaults(size=28, channels=1, names=None, flip=False, fall=1e9)
    fixed = "recipe", "conditional", "loss", "gamma", "width", "batch_size"  # of a checkpoint
    # --- shared: command line ---
    add("--root", default="data", help="folder of the named sets and of decoded pictures (data)")
    add("--classes", nargs="+", default=[], help="only these subfolders of --data")
    add("--epochs", type=int, help="the end of a run (20, but at least 5000 steps)")
    add("--steps", type=int, help="the same, in steps; whichever comes first")
    add("--batch-size", type=int, default=64, help="pictures a step (64)")
    add("--lr", type=float, help="Adam's learning rate for the generator (by recipe)")
    add("--d-lr", type=float, help="and for the discriminator (by recipe)")
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
    if given.generate or (given.resume and path.exists()):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("config", {}).get("script") != SCRIPT: fail(f"{path} is no checkpoint of {SCRIPT}.py")
        kept = dict(saved["config"], generate=None, out=str(path.parent))
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
    try:
        args, saved = parse([] if argv is None and "kernel_launcher" in sys.argv[0] else argv)
        generate(args, saved) if args.generate else train(args, saved)
    except (Exception, KeyboardInterrupt) as e:
        if "GAN_DEBUG" in os.environ: raise
        fail(f"{type(e).__name__}: {e} (see --checkpoint, --device cpu, --root, --out, --save; GAN_DEBUG=1)")

if __name__ == "__main__":
    main()
# --- end shared ---
