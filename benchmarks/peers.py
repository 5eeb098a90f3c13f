"""python benchmarks/peers.py keras --python PYTHON_WITH_TENSORFLOW: our Keras port against the Keras original
   python benchmarks/peers.py plain --slice 150: cgan_residual.py against the plain conditional GAN

keras: images a second, in turn, each round in a process of its own. Both sides train the same fully connected
networks at the same batch size on the same images, ours as in train.py, Keras with the settings that
compile() and train_on_batch() have by themselves, in fp32. A step of it makes images by `predict(noise,
verbose=0)` as published, or else by calling the model; then the discriminator's train_on_batch with these and
with real ones, of an array in memory by random index, and combined.train_on_batch with new noise, where the
discriminator is frozen. It is checked that each network moves when it should, and only then (keras_loop.py).

plain: quality after equal time. The plain one is the best-known such script as published: fully connected, an
embedding of the label beside noise and image, batch norm whose eps is 0.8, least squares, Adam at 2e-4, 64
a batch, a DataLoader in the main process, 28x28 pixels. Both train on MNIST in turn, a slice of one after a
slice of the other; only the time of training counts. After each slice the classifier of
tools/evaluate.py reads 10,000 images of each, with the labels of the test set. The plain generator is
judged in training mode, as its script samples, and in evaluation mode; the better one counts.

Flags not listed below go to the script: --root, --width, --precision, --seed, --no-fused, ...
"""

import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.utils import save_image
from train import CORES, DATASETS, compare, fail, machine, measure, save, show, show_ratio, start_parser

# Of tools/, which train.py has put into the path
from classifier import accuracies, frechet, load_classifier, read

KERAS = "predict", "call"  # how it makes images for the discriminator
KERAS_WARM_UP = 20  # steps
CLASSES = 10
PLAIN_Z_DIM = 100


# The Keras original
def measure_keras(options, device, order):
    """A round of Keras in a process of its own, on the kind of device that ours is on: its figures."""
    if not shutil.which(options.python):
        fail(f"--python {options.python} is no program")
    environment = {"KERAS_BACKEND": "tensorflow"} | os.environ
    environment |= {"TF_NUM_INTRAOP_THREADS": str(CORES), "TF_NUM_INTEROP_THREADS": str(CORES)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        environment["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    loop = Path(__file__).with_name("keras_loop.py")
    command = [options.python, str(loop), json.dumps(order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "it has ended"
        fail(f"{options.python}: {reason.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def keras_rounds(script, options, flags, batch, order):
    """{name: figures of its rounds} at one batch size, the sides in turn."""
    flags = [*flags, "--batch-size", str(batch)]
    rounds = {name: [] for name in ("ours", *KERAS)}
    for number, name in itertools.product(range(options.rounds), rounds):
        if name == "ours":
            found = measure(script.SCRIPT, "ours", flags, options.steps)
        else:
            device = rounds["ours"][0]["about"]["device"]
            found = measure_keras(options, device, {**order, "batch": batch, "side": name})
        rounds[name].append(found)
        if number == 0:
            show({"side": name} | found["about"])
        rate = found["images_per_second"]
        print(f"batch {batch}, round {number + 1}: {name:8} {rate:9.1f} images/s", flush=True)
    return rounds


def compare_keras(script, options, flags):
    """Run the rounds at each batch size and print them; returns all figures as a dict."""
    args, _ = script.parse(flags)
    if (args.arch, args.conditional, args.loss) != ("dense", False, "bce"):
        fail("the Keras original is --arch dense with --loss bce, and knows no classes")
    flags = [*flags, "--data", "fashion", "--root", args.root]
    found = {}
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/images.npy"
        images = DATASETS["fashion"](args.root, download=True).data
        np.save(file, images.numpy()[..., None])
        order = {"images": file, "width": args.width, "warm_up": KERAS_WARM_UP, "steps": options.steps}
        for batch in options.batch_sizes:
            rounds = keras_rounds(script, options, flags, batch, order)
            rates = {name: [row["images_per_second"] for row in rows] for name, rows in rounds.items()}
            found[batch] = rounds
            ratios[batch] = {name: compare(rates["ours"], rates[name]) for name in KERAS}
            for name, ratio in ratios[batch].items():
                show_ratio(f"batch {batch}, ours to {name}", ratio)
    return {"batch_sizes": found, "ratios": ratios}


# The plain conditional GAN
class LabelFirst(nn.Module):
    """Layers that get an embedding of the labels (N) after their input (N,...), flattened."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, CLASSES)
        self.layers = nn.Sequential(*layers)

    def forward(self, x, labels):
        return self.layers(torch.cat([x.flatten(1), self.embedding(labels)], 1))


def make_plain(device):
    """The plain one's generator, of noise (N,100) and labels, and discriminator, of images (N,1,28,28)."""
    layers = [nn.Linear(PLAIN_Z_DIM + CLASSES, 128), nn.LeakyReLU(0.2, inplace=True)]
    for c_in, c_out in ((128, 256), (256, 512), (512, 1024)):
        layers.append(nn.Linear(c_in, c_out))
        layers.append(nn.BatchNorm1d(c_out, eps=0.8))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    generator = LabelFirst([*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))])

    layers = [nn.Linear(784 + CLASSES, 512), nn.LeakyReLU(0.2, inplace=True)]
    for _ in range(2):
        layers.append(nn.Linear(512, 512))
        layers.append(nn.Dropout(0.4))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    discriminator = LabelFirst([*layers, nn.Linear(512, 1)])
    return generator.to(device), discriminator.to(device)


def train_plain(root, G, D, device):
    """Train them without end; yields after each step."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    dataset = DATASETS["mnist"](root, transform=transform)
    opt_g = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_d = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    mse = nn.MSELoss()
    epochs = (DataLoader(dataset, 64, shuffle=True) for _ in itertools.count())
    for real, labels in itertools.chain.from_iterable(epochs):
        real = real.to(device)
        labels = labels.to(device)
        ones = torch.ones(len(real), 1, device=device)
        zeros = torch.zeros(len(real), 1, device=device)

        opt_g.zero_grad()
        fake_labels = torch.randint(CLASSES, (len(real),), device=device)
        fake = G(torch.randn(len(real), PLAIN_Z_DIM, device=device), fake_labels)
        loss_g = mse(D(fake, fake_labels), ones)
        loss_g.backward()
        opt_g.step()

        opt_d.zero_grad()
        loss_real = mse(D(real, labels), ones)
        loss_fake = mse(D(fake.detach(), fake_labels), zeros)
        loss_d = (loss_real + loss_fake) / 2
        loss_d.backward()
        opt_d.step()
        yield loss_d.item(), loss_g.item()


@torch.no_grad()
def sample_plain(G, labels, training, seed):
    """What it makes of labels (N), in batches of all classes, as in training: uint8 N,1,28,28."""
    device = next(G.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=rng)
    parts = []
    G.train(training)
    for part in labels[order].split(64):
        noise = torch.randn(len(part), PLAIN_Z_DIM, generator=rng)
        fake = G(noise.to(device), part.to(device))
        parts.append(fake.mul(127.5).add(128).clamp(0, 255).byte().cpu())
    G.train()
    return torch.cat(parts)[order.argsort()]


def train_ours(script, flags, seconds):
    """Let the script train for so many seconds more; returns its steps so far and its averaged generator."""
    batches = script.batches

    def until(*arguments):
        began = time.perf_counter()
        for batch in batches(*arguments):
            if time.perf_counter() - began > seconds:
                signal.raise_signal(signal.SIGTERM)  # it saves and ends
            yield batch

    args, _ = script.parse(flags)
    if Path(args.out, "checkpoint.pt").exists():
        flags = [*flags, "--resume"]
    try:
        with mock.patch.object(script, "batches", until):
            script.main([*flags, "--steps", "1000000"])
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:
            raise
    args, saved = script.parse([*flags, "--resume"])
    generator = script.make_networks(args)[0].eval()
    generator.load_state_dict(saved["Generator"])
    device, _ = script.pick_device(args)
    return saved["step"], generator.to(device)


def judge(classifier, real, labels, images):
    """The figures of images made for labels, by name; real: features of the test set."""
    features, predicted = read(classifier, images)
    accuracy, lowest = accuracies(predicted, labels)
    return {
        "conditional_accuracy": accuracy,
        "lowest_class_accuracy": lowest,
        "frechet": frechet(features, real),
    }


def make_judge(script, args, device):
    """(function that gives the figures of images, labels of these, the training images' distance)."""
    pack, names = script.load_pack(args)
    images = torch.from_numpy(pack).permute(0, 3, 1, 2)
    numbers = torch.tensor([int(name[0]) for name in names])
    path = Path(pack.filename).with_suffix(".all.pth")
    classifier = load_classifier(path, images, numbers, CLASSES, device)
    test = DATASETS["mnist"](args.root, train=False)
    labels, order = test.targets.sort()
    real, _ = read(classifier, test.data[order, None])
    floor = frechet(read(classifier, images)[0], real)
    return functools.partial(judge, classifier, real, labels), labels, floor


def save_pairs(path, labels, made):
    """Ten images of each class of both sides, ours on the left."""
    first = torch.cat([(labels == i).nonzero()[:10, 0] for i in range(CLASSES)])
    halves = [images[first].unflatten(0, (CLASSES, 10)) for images in made.values()]  # 10,10,1,28,28
    save_image(torch.cat(halves, 1).flatten(0, 1) / 255, path, nrow=20)


def print_slice(side, seconds, steps, conditional_accuracy, lowest_class_accuracy, frechet):
    """The figures after a slice, in one line."""
    print(f"{side:6} {seconds:6.0f} s {steps:6} steps:", end=" ")
    print(f"conditional accuracy {conditional_accuracy:.2%},", end=" ")
    print(f"lowest class {lowest_class_accuracy:.2%}, Frechet distance {frechet:.4f}", flush=True)


def run_slices(script, args, options, flags):
    """Train both in turn, print the figures after each slice; returns all figures as a dict."""
    device, _ = script.pick_device(args)
    judge_images, labels, floor = make_judge(script, args, device)
    about = {"floor": floor, "seed": args.seed, "width": args.width, "device": str(device)}
    show(about)
    noise = torch.randn(len(labels), script.Z_DIM, generator=torch.Generator().manual_seed(args.seed))
    z = torch.cat([F.one_hot(labels, CLASSES).float(), noise], 1)
    torch.manual_seed(args.seed)
    G, D = make_plain(device)
    plain_steps = train_plain(args.root, G, D, device)

    rows = []
    made = {}
    steps = {"ours": 0, "plain": 0}
    for number, name in itertools.product(range(options.slices), steps):
        if name == "ours":
            steps[name], generator = train_ours(script, flags, options.slice)
            made[name] = script.sample(generator, z)
            figures = judge_images(made[name])
        else:
            began = time.perf_counter()
            while time.perf_counter() - began < options.slice:
                next(plain_steps)
                steps[name] += 1
            both = [sample_plain(G, labels, training, args.seed) for training in (True, False)]
            judged = [judge_images(images) for images in both]
            better = min((0, 1), key=lambda i: judged[i]["frechet"])
            made[name] = both[better]
            figures = judged[better]
        rows.append({"side": name, "seconds": options.slice * (number + 1), "steps": steps[name], **figures})
        print_slice(**rows[-1])
    if options.picture:
        save_pairs(options.picture, labels, made)
    return {**about, "rows": rows}


def compare_plain(script, options, flags):
    """Compare with the plain one, print the ratios; returns all figures as a dict."""
    with tempfile.TemporaryDirectory() as out:
        flags = [*flags, "--data", "mnist", "--out", out, "--save-every", "1000"]
        args, _ = script.parse(flags)
        found = run_slices(script, args, options, flags)
    rows = found["rows"]
    ratios = [plain["frechet"] / ours["frechet"] for ours, plain in zip(rows[::2], rows[1::2])]
    shown = " ".join(f"{ratio:.1f}" for ratio in ratios)
    print(f"Frechet distance of the plain one over ours, by slice: {shown}")
    return {**found, "ratios": ratios}


def main():
    parser = start_parser(__doc__)
    add = parser.add_argument
    add("peer", choices=("keras", "plain"))
    add("--python", default=sys.executable, help="keras: the interpreter that has TensorFlow (this one)")
    add("--batch-sizes", type=int, nargs="+", default=[32, 128], help="keras: (32 128)")
    add("--steps", type=int, default=200, help="keras: timed steps in a round (200)")
    add("--slice", type=float, default=60.0, help="plain: seconds before the other side's turn (60)")
    add("--slices", type=int, default=4, help="plain: for each side (4)")
    add("--picture", help="plain: write both sides' images there")
    options, flags = parser.parse_known_args()
    about = machine()
    show(about)
    if options.peer == "keras":
        script = importlib.import_module("fashion_keras_port")
        found = compare_keras(script, options, flags)
    else:
        script = importlib.import_module("cgan_residual")
        found = compare_plain(script, options, flags)
    save(options.json, {**about, "script": script.SCRIPT, **found})


if __name__ == "__main__":
    main()
