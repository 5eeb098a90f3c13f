"""What is cgan_residual.py's own: its networks and step, classes from the data to the pictures, and the report."""
import copy
import csv
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import cgan_residual as cgan
from test_bad_input import error_line

CPU, DROPOUT = torch.device("cpu"), nn.modules.dropout._DropoutNd
TINY = "--width", "2", "--batch-size", "8", "--precision", "fp32", "--device", "cpu"
DIGITS = list("0123456789")
CLOTHES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split() + ["Ankle boot"]
KINDS = dict(mnist=("MNIST", DIGITS), fashion=("FashionMNIST", CLOTHES))
COUNTS = [5, 15, 8, 12, 10, 10, 10, 10, 4, 16]  # of the classes in mnist's test set here, a hundred
WRONG = 8  # of which have a picture of the next class

README = """
import torch as t
from torch.nn import functional as f
from cgan_residual import Discriminator, Generator
generator = Generator()
generator.load_state_dict(t.load('models.pth')['Generator'])
generator.eval()
noise = t.randn(10, 246)
labels = t.randint(0, 10, (10,))
one_hot = f.one_hot(labels, num_classes=10)
images = generator(t.cat([one_hot, noise], dim=-1))   # 10, 1, 28, 28 in [-1, 1]
discriminator = Discriminator()
discriminator.load_state_dict(t.load('models.pth')['Discriminator'])
discriminator.eval()
verdict = discriminator(images)                        # 10, 1 probabilities; labels optional
"""


def parsed(*argv):
    """The arguments that a command line gives."""
    return cgan.parse(list(map(str, argv)))[0]


def run(*argv):
    """Run the command line in this process."""
    return cgan.main(list(map(str, argv)))


def fails(capsys, *argv):
    """The error line of a command line, which has to end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


def bars(labels, seed=0):
    """Pictures, uint8 N,28,28, of a bright bar in the place of their class, on noise that is brighter by class."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 16, (len(labels), 28, 28), np.uint8)
    for picture, label in zip(pictures, labels):
        picture += np.uint8(12 * label)
        picture[:, 2 * label : 2 * label + 3] = rng.integers(200, 256)
    return pictures


def shown(pictures):
    """The classes of bars, a list."""
    return np.asarray(pictures).reshape(-1, 28, 28).mean(1)[:, 1:21:2].argmax(1).tolist()


def write_idx(folder, part, pictures, labels):
    """An idx file of pictures and one of labels, as MNIST's are when unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ("images-idx3", np.asarray(pictures)), ("labels-idx1", np.asarray(labels)):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(length.to_bytes(4, "big") for length in values.shape)
        (folder / f"{part}-{name}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())


def save_bars(folder, label, count):
    """A folder of `count` different pictures of one class."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(bars([label] * count, label)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def labelled(*argv):
    """(pack, labels as one number each, args) of a command line for training."""
    args = parsed(*argv)
    pack = cgan.load_pack(args)
    (one_hot,) = cgan.settle(args, pack, 1)
    assert one_hot.dtype == torch.float and one_hot.shape == (len(pack), len(args.names))
    assert one_hot.sum(1).eq(1).all() and one_hot.max() == 1
    return pack, one_hot.argmax(1).tolist(), args


def cells(path, columns):
    """The pictures of a grid, uint8 N,28,28."""
    grid = np.asarray(Image.open(path).convert("L")).astype(int)
    rows = (grid.shape[0] - 2) // 30
    assert grid.shape == (rows * 30 + 2, columns * 30 + 2)
    return np.stack([grid[2 + 30 * i : 30 + 30 * i, 2 + 30 * k : 30 + 30 * k]
                     for i in range(rows) for k in range(columns)])


def averaged(out):
    """The generator of models.pth, made without the script's own loading."""
    saved = torch.load(out / "models.pth", weights_only=True)
    generator = cgan.Generator(saved["config"]["width"], len(saved["config"]["names"]), saved["config"]["blocks"])
    generator.load_state_dict(saved["Generator"], strict=True)
    return generator.eval().requires_grad_(False)


def made(generator, labels, z):
    """What a generator makes of classes and noise, N,28,28 from 0 to 255."""
    classes = generator.project.in_features - z.shape[1]
    pictures = generator(torch.cat([F.one_hot(torch.as_tensor(labels), classes), z], 1))
    return (pictures.squeeze(1).numpy() + 1) * 127.5


def noise(count, seed=0):
    return torch.randn(count, 246, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A --root with mnist and fashion in small, of bars."""
    folder = tmp_path_factory.mktemp("cgan") / "root"
    labels = np.repeat(range(10), COUNTS)
    places = np.where(np.arange(100) % (100 // WRONG) == 6, (labels + 1) % 10, labels)
    assert (places != labels).sum() == WRONG
    for seed, (name, part, truth, drawn) in enumerate([
            ("MNIST", "train", np.arange(80) % 10, None), ("MNIST", "t10k", labels, places),
            ("FashionMNIST", "train", np.arange(40) % 10, None), ("FashionMNIST", "t10k", np.arange(20) % 10, None)]):
        order = np.random.default_rng(seed).permutation(len(truth))
        write_idx(folder / name / "raw", part, bars((truth if drawn is None else drawn)[order], seed), truth[order])
    return folder


@pytest.fixture(scope="module")
def trained(root):
    """A run folder after a short training at full width, with a report, from weights so large that labels matter."""
    normal = nn.init.normal_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.init, "normal_", lambda weight, mean, std: normal(weight, mean, 5 * std))
        run("--data", "mnist", "--root", root, "--out", root.parent / "run", "--steps", 8, "--batch-size", 16,
            "--precision", "fp32", "--device", "cpu")
    return root.parent / "run"


@pytest.fixture(scope="module")
def clothes(root):
    """A run folder of a tiny generator of clothes."""
    run("--data", "fashion", "--root", root, "--out", root.parent / "clothes", "--steps", 2, "--no-report", *TINY)
    return root.parent / "clothes"


@pytest.fixture
def undrawn(monkeypatch):
    """Runs that leave out the curves, which take longer than a few steps do."""
    monkeypatch.setattr(cgan, "draw_run", lambda *args: None)


@pytest.fixture
def untrained(monkeypatch):
    """Classifiers that nobody trains; a list of what each would have been trained on, (pictures, labels)."""
    seen = []

    def classifier(pictures, labels, classes, device):
        seen.append((pictures, labels))
        return cgan.Classifier(classes).eval()

    monkeypatch.setattr(cgan, "train_classifier", classifier)
    return seen


# The networks

def test_readmes_text_runs_in_a_run_folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    names = {}
    exec(README, names)
    images, labels, judge = names["images"], names["labels"], names["discriminator"]
    assert images.shape == (10, 1, 28, 28) and images.abs().max() <= 1 and images.std() > 0.05
    assert names["verdict"].shape == (10, 1) and 0 < names["verdict"].min() and names["verdict"].max() < 1
    assert torch.equal(judge(images, labels), judge(images, names["one_hot"]))
    logits = torch.cat([judge(images, torch.full((10,), label), logits=True) for label in range(10)], 1)
    assert logits.std(1).min() > 1e-3  # else the labels would say nothing
    torch.testing.assert_close(judge(images, labels), logits.sigmoid().gather(1, labels[:, None]))
    torch.testing.assert_close(names["verdict"], logits.mean(1, keepdim=True).sigmoid())


def randomised(network, seed=0):
    """The network with every weight, bias and statistic drawn by chance."""
    torch.manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(0, 0.3)
    return network


@pytest.mark.parametrize("training", [True, False])
def test_a_block_adds_to_x_what_it_computes(training):
    block = randomised(cgan.Residual(6, 0.0)).train(training)
    state, x = copy.deepcopy(block.state_dict()), torch.randn(4, 6, 7, 7)

    def normalised(x, name):
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.leaky_relu(F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training), 0.2)

    added = F.conv2d(normalised(x, "layers.0"), state["layers.1.weight"], padding=1)
    added = F.conv2d(normalised(added, "layers.2"), state["layers.4.weight"], padding=1)
    torch.testing.assert_close(block(x), x + added, rtol=1e-4, atol=1e-4)
    assert added.std() > 0.1


@pytest.mark.parametrize("width, classes, blocks", [(8, 10, 1), (1, 2, 0), (3, 26, 2)])
def test_shapes_follow_from_width_classes_and_blocks(width, classes, blocks):
    args = parsed("--width", width, "--blocks", blocks)
    args.names = list(map(str, range(classes)))
    g, d = cgan.make_networks(args)
    seen = []
    for module in (*g.modules(), *d.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    pictures = g(torch.cat([torch.eye(classes), torch.randn(classes, 246)], 1))
    assert pictures.shape == (classes, 1, 28, 28) and pictures.abs().max() <= 1
    assert d(pictures).shape == d(pictures, torch.arange(classes)).shape == (classes, 1)
    w = width
    assert seen[: len(seen) - 3] == [*[(4 * w, 7, 7)] * 2 * blocks, (2 * w, 14, 14), (w, 28, 28), (1, 28, 28),
                                     (w, 14, 14), (2 * w, 7, 7), (4 * w, 4, 4)]
    weights = [m.weight.flatten() for m in g.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.03)  # DCGAN's


@pytest.mark.parametrize("kind, inputs", [("Generator", (torch.randn(4, 256),)),
                                          ("Discriminator", (torch.randn(4, 1, 28, 28), torch.arange(4)))])
def test_dropout_is_for_training_alone(kind, inputs):
    network = randomised(getattr(cgan, kind)(4, dropout=0.5))
    assert not torch.equal(network(*inputs), network(*inputs))
    network.eval()
    assert torch.equal(network(*inputs), network(*inputs))
    assert all(module.p > 0 for module in getattr(cgan, kind)().modules() if isinstance(module, DROPOUT))


def test_a_label_decides_on_pictures_and_on_verdicts():
    g, d = (randomised(network).eval() for network in (cgan.Generator(4, 3), cgan.Discriminator(4, 3)))
    pictures = g(torch.cat([torch.eye(3), torch.randn(1, 246).expand(3, -1)], 1)).detach()
    assert (pictures[0] - pictures[1]).std() > 0.01 < (pictures[1] - pictures[2]).std()
    labels = torch.tensor([2, 0, 2])
    features = d.layers(pictures)
    expected = d.logit(features) + (features * d.of_class.weight.T[labels]).sum(1, keepdim=True)
    torch.testing.assert_close(d(pictures, labels, logits=True), expected)
    assert (d(pictures, labels, logits=True) - d(pictures, labels * 0 + 1, logits=True)).abs().min() > 1e-3


# The training step

def prepared(*flags):
    """Arguments, and what a step changes, in float64 and without dropout."""
    args = parsed(*TINY, *flags)
    args.names = DIGITS
    nets = cgan.build(args, CPU, "fp32")
    for network in nets.G, nets.D:
        randomised(network.double())
        for module in network.modules():
            if isinstance(module, DROPOUT):
                module.p = 0.0
    nets.pairs = []  # which .double() has parted from the networks
    return args, nets


def inputs(args, step=1):
    """A batch as train_step takes it, of labels and pictures by chance."""
    generator = torch.Generator().manual_seed(step)
    real = torch.randint(0, 256, (8, 28, 28, 1), dtype=torch.uint8, generator=generator)
    labels = F.one_hot(torch.randint(0, 10, (8,), generator=generator), 10).double()
    z, uniform, weight = cgan.draws(args, step, CPU, 0, 1)
    return real, labels, z.double(), uniform, weight


def test_a_step_is_the_textbook_one():
    """Networks in a loop written out plainly have the same gradients, weights and metrics."""
    args, nets = prepared()
    G, D = copy.deepcopy(nets.G), copy.deepcopy(nets.D)
    opt_g, opt_d = (torch.optim.Adam(network.parameters(), 1e-3, betas=(0.0, 0.999)) for network in (G, D))
    bce, ones, total = nn.BCELoss(), torch.ones(8, 1, dtype=torch.double), 0
    for step in (1, 2, 3):
        batch = inputs(args, step)
        cgan.train_step(nets, args, batch)
        real, labels, z = batch[0].permute(0, 3, 1, 2).float() / 127.5 - 1, *batch[1:3]
        fake = G(torch.cat([labels, z], 1))
        opt_d.zero_grad()
        of_real, of_fake = D(real.double(), labels), D(fake.detach(), labels)
        loss_d = bce(of_real, ones) + bce(of_fake, 0 * ones)
        loss_d.backward()
        of_d = [parameter.grad.clone() for parameter in D.parameters()]
        opt_d.step()
        opt_g.zero_grad()
        again = D(fake, labels)
        loss_g = bce(again, ones)
        loss_g.backward()
        opt_g.step()
        expected = torch.stack([loss_d, loss_g, of_real.mean(), again.mean()]).float()
        torch.testing.assert_close(nets.last, expected, rtol=1e-4, atol=1e-6)
        of_g = [parameter.grad for parameter in G.parameters()]
        for ours, theirs, grads in (nets.D, D, of_d), (nets.G, G, of_g):
            for a, b, grad in zip(ours.parameters(), theirs.parameters(), grads, strict=True):
                torch.testing.assert_close(a.grad, grad, rtol=1e-4, atol=1e-6 * max(1, grad.abs().max().item()))
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        total = total + expected
    torch.testing.assert_close(nets.sums, total, rtol=1e-4, atol=1e-5)


def test_a_resting_discriminator_keeps_its_weights_and_its_metrics():
    args, nets = prepared()
    cgan.train_step(nets, args, inputs(args))
    d, last = [p.clone() for p in nets.D.parameters()], nets.last.clone()
    g = [p.clone() for p in nets.G.parameters()]
    cgan.train_step(nets, args, inputs(args, 2), train_d=False)
    assert all(map(torch.equal, d, nets.D.parameters())) and not any(map(torch.equal, g, nets.G.parameters()))
    assert (nets.last == last).tolist() == [True, False, True, False]


def test_augmentation_and_labels_are_in_all_passes_of_the_discriminator():
    args, nets = prepared("--augment", "on")
    real, labels, z, uniform, _ = batch = inputs(args)
    seen = []
    nets.D.register_forward_hook(lambda module, given, output: seen.append([x.detach() for x in given]))
    with torch.no_grad():
        fake = copy.deepcopy(nets.G)(torch.cat([labels, z], 1))
    cgan.train_step(nets, args, batch)
    both = [cgan.augment(x, uniform) for x in (cgan.to_float(real, uniform, False), fake)]
    for (x, told), pictures in zip(seen, (torch.cat(both), both[1]), strict=True):
        torch.testing.assert_close(x, pictures)
        assert torch.equal(told, labels.repeat(len(x) // 8, 1))


def test_what_networks_draw_follows_from_seed_step_and_rank():
    drawn = {}
    for place in itertools.product((0, 1), (1, 2, 3), (0, 1)):
        for _ in "ab":
            seed, step, rank = place
            torch.rand(5)  # whatever was drawn before
            z = cgan.draws(parsed("--seed", seed), step, CPU, rank, 2)[0]
            masks = torch.rand(4).tolist()
            assert drawn.setdefault(place, (masks, z[0, 0].item())) == (masks, z[0, 0].item())
    for values in zip(*drawn.values()):
        assert len(set(map(str, values))) == len(drawn)


# Labels from the data to the step

BROKEN = {"none": [], "in the middle": [b"b/3.png", b"b/4.png"], "first and last": [b"a/0.png", b"c/8.png"],
          "a class": [b"b/%d.png" % i for i in range(9)], "foreign letters": [b"a/5\xe9.png", b"b/\xe9.png"],
          "odd spaces": [b"a/5\xe2\x80\xa8.png", b"b/5\xc2\x85.png"]}


@pytest.mark.parametrize("names", BROKEN.values(), ids=BROKEN)
def test_each_picture_comes_with_the_label_of_its_folder(names, tmp_path):
    """In three epochs, for each of two processes; pictures that cannot be read are left out."""
    for label, name in enumerate("abc"):
        save_bars(tmp_path / "set" / name, 2 * label, 9)
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/" + name)).write_text("no picture\n")
    flags = "--data", tmp_path / "set", "--root", tmp_path / "root", "--batch-size", 4
    pack, labels, args = labelled(*flags)
    assert args.names == (["a", "c"] if len(names) == 9 else ["a", "b", "c"])
    known = [2 * "abc".index(name) for name in args.names]
    assert len(pack) == len(labels) and [known[label] for label in labels] == shown(pack)
    kept, one_hot = torch.arange(len(pack)), F.one_hot(torch.tensor(labels), len(known)).float()
    for rank in 0, 1:
        source, seen = cgan.batches(pack, kept, args, CPU, rank, 2, 0, (one_hot,)), set()
        for batch, told in itertools.islice(source, 3 * (len(pack) // 8)):
            assert [known[i] for i in told.argmax(1)] == shown(batch)
            seen.update(told.argmax(1).tolist())
        assert seen == set(range(len(known)))


@pytest.mark.parametrize("part", ["", "-test"])
@pytest.mark.parametrize("data", KINDS)
def test_named_sets_have_their_classes_in_order_of_label(data, part, root):
    pack, labels, args = labelled("--data", data + part, "--root", root)
    folder, names = KINDS[data]
    assert args.names == names
    stem = root / folder / "raw" / ("t10k" if part else "train")
    truth = np.frombuffer(Path(f"{stem}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    pictures = np.frombuffer(Path(f"{stem}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    order = np.argsort(truth, kind="stable")
    assert labels == truth[order].tolist()
    assert np.array_equal(pack, pictures.reshape(-1, 28, 28, 1)[order])


@pytest.mark.parametrize("data, wanted, names, places", [
    ("mnist", ["3", "7"], ["3", "7"], [3, 7]), ("mnist", ["9", "0"], ["0", "9"], [0, 9]),
    ("fashion", ["Ankle boot", "Sandal"], ["Sandal", "Ankle boot"], [5, 9])])
def test_some_of_the_classes(data, wanted, names, places, root):
    pack, labels, args = labelled("--data", data, "--root", root, "--classes", *wanted)
    assert args.names == names and set(labels) == {0, 1}
    assert [places[label] for label in labels] == shown(pack)


@pytest.mark.parametrize("kind", ["folder", "zip", "two"])
def test_a_subfolder_is_a_class(kind, tmp_path):
    for place, name in (2, "ox"), (4, "ape"), (6, "bee"):
        save_bars(tmp_path / "set" / name, place, 3)
    save_bars(tmp_path / "more" / "ox", 2, 2), save_bars(tmp_path / "more" / "emu", 8, 2)
    data, names, places = [tmp_path / "set"], ["ape", "bee", "ox"], [4, 6, 2]
    if kind == "zip":
        data = [shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")]
    if kind == "two":
        data, names, places = [*data, tmp_path / "more"], [*names, "emu"], [*places, 8]
    pack, labels, args = labelled("--data", *data, "--root", tmp_path / "root")
    assert args.names == names and [places[label] for label in labels] == shown(pack)
    assert len(pack) == (13 if kind == "two" else 9)


def test_synthetic_digits_are_drawn_by_their_number(monkeypatch, tmp_path):
    monkeypatch.setattr(cgan, "SYNTHETIC", 60)
    packs = {}
    for data, numbers in ("synthetic", range(60)), ("synthetic-test", range(60, 75)):
        packs[data], labels, args = labelled("--data", data, "--root", tmp_path)
        in_order = sorted(numbers, key=lambda i: i % 10)
        assert args.names == DIGITS and labels == [i % 10 for i in in_order]
        drawn = [cgan.square(cgan.draw_picture(i), 28, 1) for i in in_order]
        assert np.array_equal(packs[data], drawn)
    pictures = np.concatenate(list(packs.values())).reshape(75, -1).astype(float)
    assert len(np.unique(pictures, axis=0)) == 75
    means = np.stack([pictures[:60][np.array(range(60)) // 6 == label].mean(0) for label in range(10)])
    nearest = np.square(pictures[:60, None] - means).sum(2).argmin(1)
    assert (nearest == np.arange(60) // 6).mean() > 0.8  # a class's pictures are of one digit


def test_pictures_of_another_size_become_28x28(tmp_path, undrawn):
    for label, name in enumerate("ab"):
        for i, size in enumerate([(40, 56), (64, 48), (9, 9), (28, 28)]):
            save_bars(tmp_path / "set" / name, label, 4)
            Image.new("RGB", size, (50 * i, 90, 20)).save(tmp_path / "set" / name / f"{i}.png")
    run("--data", tmp_path / "set", "--root", tmp_path / "root", "--out", tmp_path / "run", "--steps", 1,
        "--no-report", *TINY)
    assert len(averaged(tmp_path / "run")(torch.randn(2, 248))) == 2


# Bad input

@pytest.mark.parametrize("labels", ["10", "-1", "x", "3,,7", "3;7", "3,", "1.5"])
def test_labels_that_the_model_has_not(labels, trained, tmp_path, capsys):
    line = fails(capsys, "--generate", 4, "--labels", labels, "--checkpoint", trained / "models.pth",
                 "--save", tmp_path / "g.npz")
    assert "--labels" in line and "(0 to 9)" in line and not list(tmp_path.iterdir())


def test_labels_by_name(clothes, tmp_path):
    run("--generate", 5, "--labels", "ANKLE boot,bag, t-Shirt,3,9", "--checkpoint", clothes / "models.pth",
        "--save", tmp_path / "g.npz")
    assert np.load(tmp_path / "g.npz")["labels"].tolist() == [9, 8, 0, 3, 9]


def flat(folder):
    return save_bars(folder / "set", 1, 20)


def one_class(folder):
    return save_bars(folder / "set" / "a", 1, 20).parent


def mixed(folder):
    return save_bars(save_bars(folder / "set" / "a", 1, 20).parent, 2, 3)


@pytest.mark.parametrize("make", [flat, one_class, mixed])
def test_a_folder_without_classes(make, tmp_path, capsys):
    line = fails(capsys, "--data", make(tmp_path), "--root", tmp_path / "root", "--out", tmp_path / "run", *TINY)
    assert "subfolder" in line and not (tmp_path / "run").exists()


TRAINING = {"labels": (["--labels", "3"], "--classes"), "one class": (["--classes", "3"], "subfolder"),
            "no such class": (["--classes", "ten"], "'ten'"), "large batch": (["--batch-size", "81"], "--batch-size")}


@pytest.mark.parametrize("flags, words", TRAINING.values(), ids=TRAINING)
def test_training_that_cannot_be(flags, words, root, tmp_path, capsys):
    line = fails(capsys, "--data", "mnist", "--root", root, "--out", tmp_path / "run", *TINY, *flags)
    assert words in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("other, words", [("mnist", "the model has 10 classes, T-shirt"),
                                          ("folder", "the model has 10 classes"), ("classes", "--classes []")])
@pytest.mark.parametrize("use", ["resume", "report"])
def test_a_checkpoint_of_other_classes(use, other, words, clothes, root, tmp_path, capsys):
    for label, name in enumerate("ab"):
        save_bars(tmp_path / "set" / name, label, 9)
    flags = dict(mnist=["--data", "mnist"], folder=["--data", tmp_path / "set"], classes=["--classes", "Bag", "Coat"])
    uses = dict(resume=["--resume", "--out", clothes, "--steps", 4],
                report=["--report", "--checkpoint", clothes / "models.pth"])
    before = (clothes / "checkpoint.pt").read_bytes()
    assert words in fails(capsys, *uses[use], "--root", root, *flags[other])
    assert (clothes / "checkpoint.pt").read_bytes() == before


def edited(name, change):
    """A function that changes the bytes of one idx file below a --root."""
    def edit(raw):
        path = raw / f"train-{name}-ubyte"
        path.write_bytes(change(path.read_bytes()))
    return edit


def no_pictures(raw):
    write_idx(raw, "train", np.zeros((0, 28, 28)), np.zeros(0))


def one_less(raw):
    write_idx(raw, "train", bars([1] * 5), [1, 0, 1, 0])


IDX = {"fewer labels than pictures": (one_less, "4 labels"), "no pictures": (no_pictures, ""),
       "label 200": (edited("labels-idx1", lambda data: data[:-1] + bytes([200])), "200"),
       "pictures cut": (edited("images-idx3", lambda data: data[:-1]), "cut short"),
       "labels cut": (edited("labels-idx1", lambda data: data[:-1]), "cut short"),
       "too long": (edited("labels-idx1", lambda data: data + b"\0"), "bytes"),
       "cut in the head": (edited("images-idx3", lambda data: data[:10]), "cut short"),
       "magic alone": (edited("labels-idx1", lambda data: data[:4]), "cut short"),
       "empty": (edited("images-idx3", lambda data: b""), "idx"),
       "labels for pictures": (edited("images-idx3", lambda data: b"\0\0\x08\1" + data[4:]), "00000801"),
       "packed": (edited("labels-idx1", lambda data: b"\x1f\x8b\x08\0" + data[4:]), "1f8b0800")}


@pytest.mark.parametrize("edit, words", IDX.values(), ids=IDX)
def test_an_idx_file_that_is_not_what_it_should_be(edit, words, root, tmp_path, capsys):
    shutil.copytree(root / "MNIST", tmp_path / "root" / "MNIST")
    edit(tmp_path / "root" / "MNIST" / "raw")
    line = fails(capsys, "--data", "mnist", "--root", tmp_path / "root", "--out", tmp_path / "run", *TINY)
    assert words in line and (str(tmp_path / "root" / "MNIST" / "raw") in line or edit is no_pictures)


@pytest.mark.parametrize("data, name", [("mnist", "MNIST"), ("fashion", "FashionMNIST"), ("mnist-test", "MNIST")])
def test_no_files_and_no_network(data, name, tmp_path, capsys, monkeypatch):
    def no_network(self):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    line = fails(capsys, "--data", data, "--root", tmp_path / "root", "--out", tmp_path / "run", *TINY)
    assert str(tmp_path / "root" / name / "raw") in line and "name resolution" in line


# Pictures of a checkpoint

def generated(out, path, count, *flags):
    """(images, labels) of --generate in a .npz."""
    run("--generate", count, "--checkpoint", out / "models.pth", "--save", path, "--device", "cpu", *flags)
    with np.load(path) as archive:
        assert archive.files == ["images", "labels"]
        return archive["images"], archive["labels"]


LABELS = [(5, "3,7", [3, 3, 3, 7, 7]), (1, "3,7", [3]), (3, "4", [4, 4, 4]), (20, None, [i // 2 for i in range(20)]),
          (10, None, list(range(10))), (130, "2,0,2", [2] * 44 + [0] * 43 + [2] * 43)]


@pytest.mark.parametrize("count, labels, expected", LABELS)
def test_npz_has_the_pictures_of_the_labels_asked_for(count, labels, expected, trained, tmp_path):
    images, told = generated(trained, tmp_path / "g.npz", count, *(["--labels", labels] if labels else []))
    assert images.shape == (count, 28, 28) and images.dtype == np.uint8
    assert told.tolist() == expected and told.dtype == np.int64
    numbers = torch.Generator().manual_seed(0)
    z = torch.cat([torch.randn(64, 246, generator=numbers) for _ in range(0, count, 64)])[:count]
    generator = averaged(trained)
    assert np.abs(images - made(generator, expected, z)).max() <= 1.01
    other = made(generator, [(label + 1) % 10 for label in expected], z)
    assert np.abs(images - other).max((1, 2)).min() > 3  # another label would have been another picture


@pytest.mark.parametrize("count", [50, 300])
def test_without_labels_each_class_has_its_share(count, clothes, tmp_path):
    assert np.bincount(generated(clothes, tmp_path / "g.npz", count)[1]).tolist() == [count // 10] * 10


def test_grid_and_folders_have_the_same_pictures_and_the_folders_are_data(trained, tmp_path):
    images, labels = generated(trained, tmp_path / "g.npz", 9, "--labels", "7,3")
    for save in "g.png", "set":
        run("--generate", 9, "--labels", "7,3", "--checkpoint", trained / "models.pth", "--save", tmp_path / save)
    assert np.array_equal(cells(tmp_path / "g.png", 3), images)
    files = sorted((tmp_path / "set").rglob("*.png"), key=lambda file: file.name)
    assert [file.parent.name for file in files] == [str(label) for label in labels]
    assert np.array_equal([np.asarray(Image.open(file)) for file in files], images)
    pack, told, args = labelled("--data", tmp_path / "set", "--root", tmp_path / "root")
    assert args.names == ["3", "7"] and [(3, 7)[label] for label in told] == sorted(labels)
    assert np.array_equal(pack[..., 0], images[np.argsort(labels, kind="stable")])


def test_pictures_follow_from_the_seed(trained, tmp_path):
    images = [generated(trained, tmp_path / "g.npz", 9, "--seed", seed)[0] for seed in (5, 5, 6)]
    assert np.array_equal(*images[:2]) and not np.array_equal(*images[1:])


def test_onnx_agrees_with_torch(trained, tmp_path):
    run("--export", tmp_path / "g.onnx", "--checkpoint", trained / "models.pth")
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx")
    assert session.get_inputs()[0].shape[1:] == [256]
    for count in 1, 2, 5:
        z = torch.cat([F.one_hot(torch.arange(count), 10), noise(count)], 1)
        (images,) = session.run(None, {"z": z.numpy()})
        np.testing.assert_allclose(images, averaged(trained)(z).numpy(), atol=1e-4)


def test_sample_grid_has_a_row_for_each_class(trained):
    last = max((trained / "samples").iterdir())
    expected = made(averaged(trained), np.repeat(range(10), 10), noise(100))
    assert np.abs(cells(last, 10) - expected).max() <= 1.01
    assert expected.reshape(10, 10, -1).mean(1).std(0).max() > 3  # the rows differ


@pytest.mark.parametrize("kind, classes", [("trained", 10), ("two", 2)])
def test_one_noise_is_the_same_noise_through_all_classes(kind, classes, trained, root, tmp_path, undrawn, monkeypatch):
    out = trained
    if kind == "two":
        monkeypatch.setattr(cgan, "report", None)
        out = tmp_path / "run"
        run("--data", "mnist", "--classes", 1, 2, "--root", root, "--out", out, "--steps", 1, "--no-report", *TINY)
        assert not (out / "report.json").exists()
    expected = made(averaged(out), list(range(classes)) * 8, noise(8).repeat_interleave(classes, 0))
    pictures = cells(out / "one_noise.png", classes)
    assert len(pictures) == 8 * classes and np.abs(pictures - expected).max() <= 1.01


# The report

def test_frechet_distance_of_known_gaussians():
    """Between sets whose means and covariances are known exactly, and any two against another formula."""
    unit = torch.cat([torch.eye(3), -torch.eye(3)]).double() * (5 / 2) ** 0.5  # mean 0, covariance 1
    one, two = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 0.0, 3.5]).double()
    assert cgan.frechet(unit, unit) == pytest.approx(0, abs=1e-6)
    assert cgan.frechet(unit, unit + one) == pytest.approx(14)
    assert cgan.frechet(unit * one, unit * two) == pytest.approx(3**2 + 2**2 + 0.5**2)
    assert cgan.frechet(unit * one + 1, unit * one - 1) == pytest.approx(12)
    torch.manual_seed(0)
    a, b = (torch.randn(n, 4).double() @ torch.randn(4, 4).double() + torch.randn(4) for n in (30, 50))
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ b.T.cov() @ root).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * mixed
    assert cgan.frechet(a, b) == pytest.approx(expected.item())
    assert cgan.frechet(a, b) == pytest.approx(cgan.frechet(b, a))


def test_reading_gives_features_and_classes_of_each_picture():
    net = randomised(cgan.Classifier(4)).eval()
    pictures = torch.randint(0, 256, (501, 1, 28, 28), dtype=torch.uint8)
    features, classes = cgan.read(net, pictures)
    assert features.shape == (501, 128) and features.dtype == torch.double
    logits = net(pictures.float() / 127.5 - 1)
    assert logits.shape == (501, 4) and torch.equal(classes, logits.argmax(1))
    torch.testing.assert_close(net.logits(features.float()), logits, rtol=1e-3, atol=1e-3)


class Echo(nn.Module):
    """A generator that gives pictures of the class asked for, or of the one `shift` after it, each in its turn."""
    def __init__(self, pictures, labels, shift=0):
        super().__init__()
        self.classes, self.shift, self.asked = int(labels.max()) + 1, shift, []
        self.turns = [itertools.cycle(pictures[labels == label]) for label in range(self.classes)]

    def forward(self, z):
        asked = z[:, : self.classes].argmax(1).tolist()
        self.asked += asked
        return torch.stack([next(self.turns[(label + self.shift) % self.classes]) for label in asked]) / 127.5 - 1


def echo(monkeypatch, *data):
    """Put an Echo in the generator's place."""
    network = Echo(*data)
    monkeypatch.setattr(cgan, "load_generator", lambda *args: network)
    return network


def test_training_ends_with_a_report(trained):
    figures = json.loads((trained / "report.json").read_text())
    assert list(figures) == ["classifier_accuracy", "frechet", "frechet_floor", "by_class", "read_as_asked", "vanished"]
    assert list(figures["by_class"]) == DIGITS
    assert figures["classifier_accuracy"] == pytest.approx(1 - WRONG / 100, abs=0.021)
    assert figures["frechet"] > figures["frechet_floor"] > 0
    share, real_share, as_asked = (column(figures, name) for name in ("share", "real_share", "read_as_asked"))
    assert np.average(as_asked, weights=COUNTS) == pytest.approx(figures["read_as_asked"])
    assert real_share == pytest.approx(np.array(COUNTS) / 100) and share.sum() == pytest.approx(1)
    assert (0 <= share).all() and (0 <= as_asked).all() and (as_asked <= 1).all()


def column(figures, name):
    """One of a report's figures for all classes, in their order."""
    assert all(list(row) == ["share", "real_share", "read_as_asked"] for row in figures["by_class"].values())
    return np.array([row[name] for row in figures["by_class"].values()])


@pytest.fixture
def once(monkeypatch):
    """Reports that may not train a classifier: there is one beside the pack."""
    monkeypatch.setattr(cgan, "train_classifier", None)


def test_a_report_on_a_checkpoint_is_the_same_one(trained, root, once, capsys):
    capsys.readouterr()
    figures = run("--report", "--checkpoint", trained / "models.pth", "--root", root)
    assert figures == json.loads((trained / "report.json").read_text())
    out = capsys.readouterr().out
    assert "10,000" in out and f"right on {figures['classifier_accuracy']:.2%}" in out
    rows = [line.replace(";", "").split() for line in out.splitlines() if " of the pictures; " in line]
    assert [row[:2] + row[5:6] for row in rows] == [[name, f"{row['share']:.2%}", f"{row['read_as_asked']:.2%}"]
                                                    for name, row in figures["by_class"].items()]
    assert f"{figures['read_as_asked']:.2%} of all are read as asked" in out and f"{figures['frechet']:.4f}" in out
    assert f"{figures['frechet_floor']:.4f}" in out


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_a_report_on_real_pictures(shift, trained, root, once, monkeypatch):
    """Those of the labels asked for are read as well as the test set is; those of other classes are not."""
    pack, labels, _ = labelled("--data", "mnist-test", "--root", root)
    pictures = torch.from_numpy(np.array(pack)).permute(0, 3, 1, 2)
    network = echo(monkeypatch, pictures, torch.tensor(labels), shift)
    figures = run("--report", "--checkpoint", trained / "models.pth", "--root", root)
    assert np.bincount(network.asked).tolist() == [100 * count for count in COUNTS]
    if shift:
        assert figures["read_as_asked"] < 0.12 and column(figures, "read_as_asked").max() < 0.3
        return
    assert figures["read_as_asked"] == pytest.approx(figures["classifier_accuracy"])
    assert figures["frechet"] == pytest.approx(0, abs=0.01) and figures["frechet_floor"] > 0.05
    assert (1 - column(figures, "read_as_asked")) @ COUNTS == pytest.approx(100 * (1 - figures["classifier_accuracy"]))


@pytest.mark.parametrize("names, counts", [(["1", "2"], [30, 70]), (["b", "a"], [70, 30]), (["x", "y"], [9000, 3000]),
                                           (DIGITS, [103] * 4 + [102] * 6), (["A", "a"], [50, 50])])
def test_a_report_asks_for_each_class_as_often_as_the_test_set_has_it(names, counts, clothes, monkeypatch):
    """Whatever the classes are called, and however many test pictures there are."""
    labels, features = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), torch.randn(20, 4).double()
    network = echo(monkeypatch, torch.zeros(len(labels), 1, 28, 28), labels)
    monkeypatch.setattr(cgan, "load_evaluator", lambda *args: (None, 0.9, features, labels, 0.1))
    monkeypatch.setattr(cgan, "read", lambda net, pictures: (torch.randn(len(pictures), 4).double(),
                                                             torch.zeros(len(pictures), dtype=torch.long)))
    args = parsed("--device", "cpu")
    args.names = names
    figures = cgan.report(args, dict(config=dict(seed=0)))
    shares = np.bincount(network.asked, minlength=len(names)) / 10_000
    assert len(network.asked) == 10_000 and shares.tolist() == pytest.approx(np.divide(counts, sum(counts)), abs=0.001)
    assert list(figures["by_class"]) == names
    assert column(figures, "real_share").tolist() == shares.tolist()
    for name in "share", "read_as_asked":  # all are read as the first class
        assert column(figures, name).tolist() == [1.0] + [0.0] * (len(names) - 1)


VANISHED = [([5000, 3000, 2000], []), ([6000, 3900, 100], ["bee"]), ([9601, 299, 100], ["ox", "bee"]),
            ([6501, 3400, 99], ["bee"]), ([0, 10_000, 0], ["ape", "bee"]), ([500, 8900, 600], []),
            ([499, 8901, 600], ["ape"])]


@pytest.mark.parametrize("counts, vanished", VANISHED)
def test_classes_that_the_model_hardly_makes_have_vanished(counts, vanished, clothes, monkeypatch, capsys):
    """Those with less than a tenth of their share of the test pictures, where they are half, 30% and 20%."""
    labels, features = torch.arange(3).repeat_interleave(torch.tensor([5, 3, 2])), torch.randn(20, 4).double()
    echo(monkeypatch, torch.zeros(10, 1, 28, 28), labels)
    monkeypatch.setattr(cgan, "load_evaluator", lambda *args: (None, 0.9, features, labels, 0.1))
    monkeypatch.setattr(cgan, "read", lambda net, pictures: (torch.randn(len(pictures), 4).double(),
                                                             torch.arange(3).repeat_interleave(torch.tensor(counts))))
    args = parsed("--device", "cpu")
    args.names = ["ape", "ox", "bee"]
    figures = cgan.report(args, dict(config=dict(seed=0)))
    assert column(figures, "share").tolist() == [count / 10_000 for count in counts]
    assert column(figures, "real_share").tolist() == [0.5, 0.3, 0.2] and figures["vanished"] == vanished
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    if vanished:
        assert len(warnings) == 1 and f"{len(vanished)} of 3 classes" in warnings[0]
        assert ", ".join(vanished) in warnings[0]
    assert bool(warnings) == bool(vanished)


def test_a_class_that_the_model_never_makes_is_named(trained, root, once, monkeypatch, capsys):
    """Real pictures of all digits but 4, in whose place there are those of 1."""
    pack, labels, _ = labelled("--data", "mnist", "--root", root)
    network = echo(monkeypatch, torch.from_numpy(np.array(pack)).permute(0, 3, 1, 2), torch.tensor(labels))
    network.turns[4] = network.turns[1]
    capsys.readouterr()
    figures = run("--report", "--checkpoint", trained / "models.pth", "--root", root)
    share = column(figures, "share")
    assert share.sum() == pytest.approx(1) and share[1] > 0.2 and share[4] < 0.01
    assert figures["vanished"] == ["4"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "1 of 10 classes" in line and ", 4:" in line


def test_a_classifier_is_trained_once_for_each_data(root, tmp_path, untrained):
    shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns(".packed"))
    flags = {"first": (), "again": (), "other data": ("--data", "fashion"), "some": ("--classes", "3", "7"),
             "held out": ("--held-out", 0.25), "other seed": ("--held-out", 0.25, "--seed", 1), "last": ()}
    results = {}
    for name, more in flags.items():
        args = parsed("--data", "mnist", "--root", tmp_path / "root", *more)
        results[name] = cgan.load_evaluator(args, CPU)
        if name == "held out":
            (pictures, labels), held = untrained[-1], cgan.hold_out(args, 80)[1]
            assert shown(pictures) == labels.tolist() and len(held) == 20
            truth = labelled("--data", "mnist", "--root", tmp_path / "root")[1]
            assert results[name][3].tolist() == [truth[i] for i in held]
            assert sorted(labels.tolist() + results[name][3].tolist()) == truth
    assert [len(pictures) for pictures, _ in untrained] == [80, 40, 16, 60, 60]
    assert results["first"][3].tolist() == np.repeat(range(10), COUNTS).tolist()
    assert results["first"][1:2] == results["again"][1:2] == results["last"][1:2]
    assert len(list((tmp_path / "root" / ".packed").glob("*.pth"))) == 5


def folder_run(tmp_path, *flags):
    """A run on a folder of two classes, 24 pictures."""
    for label, name in enumerate("ab"):
        save_bars(tmp_path / "set" / name, 3 * label, 12)
    run("--data", tmp_path / "set", "--root", tmp_path / "root", "--out", tmp_path / "run", "--steps", 2, *TINY, *flags)


def test_a_folder_has_no_report(tmp_path, untrained, undrawn, capsys):
    folder_run(tmp_path)
    assert "no report: " in (out := capsys.readouterr().out) and "--held-out" in out
    assert not untrained and not (tmp_path / "run" / "report.json").exists()
    assert (tmp_path / "run" / "one_noise.png").exists()


def test_a_folder_with_pictures_held_out_has_a_report_and_their_verdicts(tmp_path, untrained, undrawn):
    """Their columns are the mean probabilities that the discriminator gives them, with their labels."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        verdicts = cgan.verdicts
        patch.setattr(cgan, "verdicts", lambda nets, *watched: seen.append(watched) or verdicts(nets, *watched))
        folder_run(tmp_path, "--held-out", 0.25, "--augment", "none")  # which would make the pictures others
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert 0 < float(row["d_seen"]) < 1 and 0 < float(row["d_held_out"]) < 1
    for (pictures, one_hot), count in zip(seen[0], (6, 6)):
        assert len(pictures) == count
        assert [3 * label for label in one_hot.argmax(1).tolist()] == shown((pictures + 1) * 127.5)
    assert len(untrained[0][0]) == 18
    assert list(json.loads((tmp_path / "run" / "report.json").read_text())["by_class"]) == ["a", "b"]


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_so_few_pictures_held_out_that_there_can_be_no_report(share, tmp_path, untrained, undrawn, monkeypatch, capsys):
    """None of 24, or a single one, which has no covariance."""
    eigvals = torch.linalg.eigvals

    def guarded(matrix):  # torch's own crashes the process
        assert matrix.isfinite().all()
        return eigvals(matrix)

    monkeypatch.setattr(torch.linalg, "eigvals", guarded)
    folder_run(tmp_path, "--held-out", share)
    assert "no report: " in capsys.readouterr().out


def test_metrics_take_real_pictures_of_all_classes_alike(clothes, monkeypatch, capsys):
    """10,000 of 12,000 that lie in order of class, and as many generated ones."""
    given = []

    class Metric:
        def __init__(self, **options):
            pass

        def to(self, device):
            return self

        def update(self, images, real=False):
            given.append((images[:, 0], real))

        def compute(self):
            return torch.tensor(1.0), torch.tensor(0.5)

    single = type("Single", (Metric,), dict(compute=lambda self: torch.tensor(3.0)))
    stand_in = SimpleNamespace(FrechetInceptionDistance=single, InceptionScore=Metric, KernelInceptionDistance=Metric)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", stand_in)
    monkeypatch.setattr(cgan, "load_pack", lambda args: bars(np.repeat(range(10), 1200))[..., None])
    run("--metrics", "--checkpoint", clothes / "models.pth", "--device", "cpu")
    assert "10000 pictures: FID 3.00" in capsys.readouterr().out
    real = torch.cat([images for images, real in given if real])
    assert np.bincount(shown(real)).tolist() == [2000] * 10  # each metric of two has seen them
    assert sum(len(images) for images, real in given if not real) == 30_000
