"""python benchmarks/train.py --script dcgan: images a second of training, our way against the usual way.

Each round runs each side once, one after the other, in a process of its own: the same networks, losses and
batch size on the same images. Figures are the median, lowest and highest of the rounds' ratios.
- ours: the script as it is, its averaged generator and flips included, without augmentation.
- without gan_ops: the same with --no-fused, where gan_ops serves.
- memory kept (--keep-memory): ours, where the C library keeps freed memory, not giving it back to Linux.
- usual: PyTorch's DCGAN example. A DataLoader with workers over torchvision's ImageFolder of JPEG files,
  MNIST or FashionMNIST; eager fp32 with torch's own settings, contiguous, activations in place, plain Adam,
  .item() of both losses at each step.
Flags not listed below go to the script: --width, --batch-size (64; cspup128 and fashion_keras_port 32),
--device, ... Unless they say otherwise dcgan has --recipe classic, cspup128 --loss bce --gamma 0.
"""

import argparse
import functools
import importlib
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

TOP = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOP), str(TOP / "tools")]  # where the scripts and the tools are
FLAGS = {  # by script: what is measured, where flags given do not say otherwise
    "dcgan": ["--recipe", "classic"],
    "cspup128": ["--batch-size", "32", "--loss", "bce", "--gamma", "0"],
    "cgan_residual": [],
    "fashion_keras_port": [],
}
DATASETS = {"mnist": torchvision.datasets.MNIST, "fashion": torchvision.datasets.FashionMNIST}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
KEEP_MEMORY = {  # for glibc, which reads it as a process starts
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
WARM_UP = {"cuda": 10}  # steps before the timed ones, on other devices 2; the 4th captures a graph
TIMED = {"cuda": 50}  # timed steps unless --steps says otherwise, on other devices 4
JPEG_IMAGES = 512  # for --data synthetic
FACE_SIZE = 178, 218  # of aligned CelebA


# For all benchmarks
def fail(message):
    """End with one line, for what the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def machine():
    """The processor, the GPU if there is one, the versions and the command, as a dict."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    about = {"cpu": cpu, "cores": CORES}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    about["python"] = platform.python_version()
    about["torch"] = str(torch.__version__)
    about["command"] = shlex.join(["python", *sys.argv])
    return about


def start_parser(doc, script=None):
    """An argparse parser with --rounds, --json and, where `script` is the default one, --script."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    if script:
        parser.add_argument("--script", choices=FLAGS, default=script, help=f"what is measured ({script})")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser


def show(about):
    """Print a dict in one line."""
    print("; ".join(f"{name} {value}" for name, value in about.items()), flush=True)


def save(path, figures):
    """Write figures as JSON, if a path is given."""
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def compare(ours, theirs):
    """[median, lowest, highest] of the ratios of two lists of rounds' figures."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def show_ratio(name, ratio):
    """Print what compare() has found."""
    middle, lowest, highest = ratio
    print(f"{name}: {middle:.2f} times ({lowest:.2f} to {highest:.2f})", flush=True)


def draw_file(script, index):
    """Image `index` of the script's --data synthetic, in the size and kind that files of it would have.

    Faces have the size of aligned CelebA's, and blurred noise, which gives their files the size, and so the
    time to decode, of photographs. Others are flat, of 64 to 150 pixels a side as those found online.
    """
    image = script.draw_image(index)
    if script.SCRIPT != "cspup128":
        side = random.Random(index).randint(64, 150)
        return ImageOps.fit(image, (side, side))
    image = ImageOps.fit(image, FACE_SIZE)
    width, height = FACE_SIZE
    noise = np.random.default_rng(index).normal(0, 3, (height // 2, width // 2)).astype(np.float32)
    noise = Image.fromarray(noise).resize(FACE_SIZE, Image.BICUBIC)
    noisy = np.asarray(image) + np.asarray(noise)[..., None]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_images(script, folder, count):
    """Write `count` images that the script draws into the folder as JPEG, those of no class into drawn/."""
    for index, name in enumerate(script.SYNTHETIC[:count]):
        file = Path(folder, name if "/" in name else f"drawn/{name}").with_suffix(".jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_file(script, index).save(file, quality=90)


def measure(script, side, flags, steps=None, **environment):
    """One side's round, in a process of its own: its figures as a dict (see report_to)."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, "--script", script, "--side", side, "--json", str(result)]
        command += ["--steps", str(steps or 0), *flags, "--out", f"{folder}/run"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if result.exists():
            return json.loads(result.read_text())
    for line in done.stderr.splitlines():
        if line.startswith("error: "):
            fail(line.removeprefix("error: "))
    fail(f"{shlex.join(command)} failed:\n{done.stderr}")


# One side of one round
def timed(source, device, steps, report):
    """Yield batches of `source`, some to warm up and then `steps`, or TIMED if that is 0; then call
    report(steps, seconds, share of these that was spent on waiting for batches)."""
    synchronize = getattr(torch, device.type).synchronize
    steps = steps or TIMED.get(device.type, 4)
    for _ in range(WARM_UP.get(device.type, 2)):
        yield next(source)
    synchronize()
    began = time.perf_counter()
    waited = 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - asked
        yield batch
    synchronize()
    seconds = time.perf_counter() - began
    report(steps, seconds, waited / seconds)


def time_ours(script, flags, steps, report):
    """Have the script train, and end it after the timed steps."""
    batches = script.batches
    load_pack = script.load_pack

    def timed_batches(arrays, args, device, step):
        source = batches(arrays, args, device, step)
        yield from timed(source, device, steps, functools.partial(report, args))
        raise SystemExit  # which the script lets pass

    def load_repeated(args):
        """The images so often that no epoch, at whose end samples are made, ends in the round."""
        pack, names = load_pack(args)
        count = args.batch_size * (11 + (steps or 50))
        if len(pack) >= count:
            return pack, names
        rows = np.arange(count) % len(pack)
        return pack[rows], [names[row] for row in rows]

    script.batches = timed_batches
    script.load_pack = load_repeated
    script.save = lambda *given: None  # it is no part of a step
    if script.SCRIPT == "dcgan":
        flags.append("--no-augment")
    script.main(flags)


def usual_layers(script, module):
    """What the DCGAN example would write for one of the script's modules, or None where that is the same."""
    if type(module) is getattr(script, "BatchNormLeakyReLU", None):
        norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
        norm.load_state_dict(module.state_dict())
        activation = nn.LeakyReLU(module.slope, inplace=True) if module.slope else nn.ReLU(inplace=True)
        return nn.Sequential(norm, activation)
    if isinstance(module, nn.BatchNorm1d):  # Keras's order
        norm = nn.BatchNorm1d(module.num_features, module.eps, module.momentum)
        return nn.Sequential(nn.LeakyReLU(0.2, inplace=True), norm)
    if isinstance(module, nn.LeakyReLU):
        return nn.LeakyReLU(module.negative_slope, inplace=True)
    return None


def as_usual(script, network):
    """The network as the DCGAN example would write it: torch's batch norm, activations in place."""
    if hasattr(network, "project"):  # gives its feature map channels_last, a view would be the usual way
        network.layers.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    for module in list(network.modules()):
        for name, child in module.named_children():
            layers = usual_layers(script, child)
            if layers is not None:
                setattr(module, name, layers)
    return network


def usual_data(args, workers):
    """A DataLoader over images and labels without end, as the DCGAN example has it."""
    steps = [
        transforms.Resize(args.size),
        transforms.CenterCrop(args.size),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    if args.channels == 1:
        steps.insert(0, transforms.Grayscale())
    transform = transforms.Compose(steps)
    if args.data in DATASETS:
        dataset = DATASETS[args.data](args.root, transform=transform, download=True)
    else:
        dataset = torchvision.datasets.ImageFolder(args.data, transform)

    def endless():  # no pause between epochs
        while True:
            yield from torch.randperm(len(dataset)).tolist()

    return DataLoader(dataset, args.batch_size, sampler=endless(), num_workers=workers, drop_last=True)


def usual_step(args, nets, real, one_hot):
    """A step of both networks on images and labels ([] or [N,classes]); returns the losses as numbers.

    It is in as many parts as the script's: for Keras's networks the discriminator takes a step on real images
    and one on fake ones, made in inference mode.
    """
    ones = torch.ones(len(real), device=real.device)
    zeros = torch.zeros(len(real), device=real.device)
    criterion = F.binary_cross_entropy_with_logits
    keras = getattr(args, "arch", None) == "dense"

    def make_fake():
        z = torch.randn(len(real), nets.z_dim, device=real.device)
        return nets.G(torch.cat([*one_hot, z], 1))

    def logits(images):
        if "class_names" in args:  # the discriminator is one of the two that know classes
            return nets.D(images, *one_hot, logits=True).flatten()
        return nets.D(images)

    nets.D.zero_grad()
    loss_real = criterion(logits(real), ones)
    loss_real.backward()
    if keras:
        nets.opt_d.step()
        nets.D.zero_grad()
        nets.G.eval()
    with torch.set_grad_enabled(not keras):
        fake = make_fake()
    loss_fake = criterion(logits(fake.detach()), zeros)
    loss_fake.backward()
    nets.opt_d.step()

    nets.G.train()
    nets.G.zero_grad()
    if keras:
        fake = make_fake()
    loss_g = criterion(logits(fake), ones)
    loss_g.backward()
    nets.opt_g.step()
    return (loss_real + loss_fake).item(), loss_g.item()


def time_usual(script, flags, steps, workers, report):
    """Train in the usual way for the timed steps."""
    args, _ = script.parse(flags)
    device, _ = script.pick_device(args)
    loader = usual_data(args, workers)
    conditional = getattr(args, "conditional", "class_names" in args)
    if conditional:
        args.class_names = loader.dataset.classes
    args.used = {"device": str(device), "precision": "fp32"}
    torch.manual_seed(args.seed)
    G, D = script.make_networks(args)
    G = as_usual(script, G).to(device)
    D = as_usual(script, D).to(device)
    opt_g = torch.optim.Adam(G.parameters(), args.lr, args.betas, fused=False)
    opt_d = torch.optim.Adam(D.parameters(), args.d_lr, args.betas, fused=False)
    nets = argparse.Namespace(G=G, D=D, opt_g=opt_g, opt_d=opt_d, z_dim=script.Z_DIM)
    for images, labels in timed(iter(loader), device, steps, functools.partial(report, args)):
        real = images.to(device)
        labels = labels.to(device)
        one_hot = [F.one_hot(labels, len(args.class_names)).float()] if conditional else []
        usual_step(args, nets, real, one_hot)


def report_to(path, args, steps, seconds, waiting):
    """Write the figures of a round."""
    about = {name: args.used[name] for name in ("device", "precision", "gan_ops") if name in args.used}
    about |= {"width": args.width, "batch": args.batch_size}
    about |= {"threads": torch.get_num_threads(), "steps": steps}
    figures = {
        "images_per_second": steps * args.batch_size / seconds,
        "waiting": waiting,
        "peak_cuda_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "about": about,
    }
    save(path, figures)


def run_side(options, flags):
    """Be one side of one round: write its figures into the file --json."""
    script = importlib.import_module(options.script)
    report = functools.partial(report_to, options.json)
    if options.side == "usual":
        time_usual(script, flags, options.steps, options.workers, report)
    else:
        time_ours(script, flags, options.steps, report)


# The rounds
def gan_ops_serves(script, args):
    """Whether gan_ops serves this script where it is to run."""
    device, _ = script.pick_device(args)
    no_nets = argparse.Namespace(G=nn.Identity(), D=nn.Identity())
    return script.use_gan_ops(args, no_nets, device).startswith("serves")


def make_sides(script, args, flags, keep_memory):
    """{name: (side, flags, environment)} of what is compared."""
    sides = {"ours": ("ours", flags, {})}
    if gan_ops_serves(script, args):
        sides["without gan_ops"] = "ours", [*flags, "--no-fused"], {}
    if keep_memory:
        sides["memory kept"] = "ours", flags, KEEP_MEMORY
    sides["usual"] = "usual", flags, {}
    return sides


def run_rounds(options, sides):
    """{name: figures of its rounds}, the sides in turn."""
    rounds = {name: [] for name in sides}
    for number, name in itertools.product(range(options.rounds), sides):
        side, flags, environment = sides[name]
        found = measure(options.script, side, flags, options.steps, **environment)
        if number == 0:
            show({"side": name} | found["about"])
        rounds[name].append(found)
        rate = found["images_per_second"]
        waiting = found["waiting"]
        print(f"round {number + 1}: {name:15} {rate:9.2f} images/s, {waiting:6.2%} of it waiting for data")
        sys.stdout.flush()
    return rounds


def main():
    parser = start_parser(__doc__, "dcgan")
    add = parser.add_argument
    add("--data", help="a folder of folders of images, mnist, fashion, synthetic: 512 drawn (the script's)")
    add("--root", default="data", help="folder of mnist and fashion (data)")
    add("--steps", type=int, default=0, help="timed steps in a round (4; on CUDA 50)")
    add("--workers", type=int, default=2, help="of the usual way's DataLoader (2)")
    add("--keep-memory", action="store_true", help="ours with freed memory kept, too")
    add("--side", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    flags = FLAGS[options.script] + flags + ["--root", options.root]
    if options.data:
        flags += ["--data", options.data]
    if options.side:
        run_side(options, flags)
        return

    script = importlib.import_module(options.script)
    args, _ = script.parse(flags)
    if getattr(args, "loss", "bce") != "bce" or getattr(args, "gamma", 0) > 0:
        fail("the usual way has no other loss: --loss bce --gamma 0")
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        if args.data == "synthetic":
            args.data = f"{folder}/images"
            args.root = folder
            make_images(script, args.data, JPEG_IMAGES)
        flags += ["--data", args.data, "--root", args.root, "--workers", str(options.workers)]
        sides = make_sides(script, args, flags, options.keep_memory)
        show(about)
        rounds = run_rounds(options, sides)

    rates = {name: [found["images_per_second"] for found in rows] for name, rows in rounds.items()}
    ratios = {f"ours to {name}": compare(rates["ours"], rates[name]) for name in sides if name != "ours"}
    if options.keep_memory:
        ratios["memory kept to ours"] = compare(rates["memory kept"], rates["ours"])
    for name, ratio in ratios.items():
        show_ratio(name, ratio)
    save(options.json, {**about, "script": options.script, "rounds": rounds, "ratios": ratios})


if __name__ == "__main__":
    main()
