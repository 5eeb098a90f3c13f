"""The training step: against plain PyTorch written out here, its optimisers, by gan_ops."""

import copy
import itertools
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, flags, load
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port

pytestmark = pytest.mark.usefixtures("without_curves")


@pytest.fixture
def double(monkeypatch):
    """Steps in float64 throughout."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepared(script, *argv, dtype=torch.float64, optimiser=None):
    """(args, what a step changes): networks without dropout, by gradient descent if no optimiser is named."""
    args = script.parse([*TINY[script], *argv])[0]
    args.class_names = ["a", "b"]
    torch.manual_seed(0)
    G, D = (net.to(dtype) for net in script.make_networks(args))
    for module in (*G.modules(), *D.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    if script is fashion_keras_port:
        for weight in G.parameters():
            weight.data.add_(0.05 * torch.randn_like(weight))  # biases too
    if optimiser:
        opt_g = optimiser(G.parameters(), args.lr, betas=args.betas, fused=True)
        opt_d = optimiser(D.parameters(), args.d_lr, betas=args.betas, fused=True)
    else:
        opt_g = torch.optim.SGD(G.parameters(), 0.02)
        opt_d = torch.optim.SGD(D.parameters(), 0.02)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    options = {"autocast": nullcontext, "scaler": scaler, "lr_factor": 1.0}
    return args, SimpleNamespace(G=G, D=D, opt_g=opt_g, opt_d=opt_d, **options)


def batch(script, args, step, dtype=torch.float64, count=6):
    """Real images, noise and, where the networks are given them, one-hot labels of two classes."""
    generator = torch.Generator().manual_seed(step)
    real = torch.rand(count, args.channels, args.size, args.size, generator=generator, dtype=dtype) * 2 - 1
    z = torch.randn(count, script.Z_DIM, generator=generator, dtype=dtype)
    if script is cgan_residual or getattr(args, "conditional", False):
        return [real, z, F.one_hot(torch.arange(count) // 2 % 2, 2).to(dtype)]
    return [real, z]


def gradient_lengths(logits_of, x):
    """The length of the gradient of each image's logit, one image at a time."""
    lengths = []
    for i in range(len(x)):
        one = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(logits_of(one).flatten()[i], one, create_graph=True)
        lengths.append((gradient[i] ** 2).sum().sqrt())
    return torch.stack(lengths)


def learn(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def bce(logit, target):
    return nn.BCELoss()(logit.sigmoid(), torch.full_like(logit, target))


def dcgan_step(G, D, opt_g, opt_d, args, view, real, z):
    """DCGAN's step as every tutorial has it; returns the losses and the logits of real and of fake images."""
    fake = G(z)
    real_logit = D(view(real))
    loss_d = bce(real_logit, 1.0) + bce(D(view(fake.detach())), 0.0)
    learn(opt_d, loss_d)
    fake_logit = D(view(fake))
    loss_g = bce(fake_logit, 1.0)
    learn(opt_g, loss_g)
    return loss_d, loss_g, real_logit, fake_logit


def conditional_step(G, D, opt_g, opt_d, args, _, real, z, labels):
    """The same with classes; half of what is fake are real images with the label of the one before."""
    fake = G(torch.cat([labels, z], 1))
    real_logit = D(real, labels, logits=True)
    fake_logit = D(fake.detach(), labels, logits=True)
    wrong = []
    for i in range(len(real)):
        if labels[i].argmax() != labels[i - 1].argmax():
            wrong.append(bce(D(real[i : i + 1], labels[[i - 1]], logits=True), 0.0))
    assert 0 < len(wrong) < len(real)
    loss_d = bce(real_logit, 1.0) + (bce(fake_logit, 0.0) + sum(wrong) / len(real)) / 2
    learn(opt_d, loss_d)
    fake_logit = D(fake, labels, logits=True)
    loss_g = bce(fake_logit, 1.0)
    learn(opt_g, loss_g)
    return loss_d, loss_g, real_logit, fake_logit


def r3gan_step(G, D, opt_g, opt_d, args, _, real, z):
    """R3GAN's: the discriminator by the difference of logits under R1 and R2, then the generator."""
    losses = {  # of the discriminator, of the generator, by logits of real and of fake images
        "relativistic": (lambda r, f: bce(r - f, 1.0), lambda r, f: bce(f - r, 1.0)),
        "bce": (lambda r, f: bce(r, 1.0) + bce(f, 0.0), lambda r, f: bce(f, 1.0)),
        "hinge": (
            lambda r, f: (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(),
            lambda r, f: -f.mean(),
        ),
    }
    d_loss, g_loss = losses[args.loss]
    fake = G(z)
    real_logit = D(real)
    loss_d = d_loss(real_logit, D(fake.detach()))
    penalty = 0
    if args.gamma:
        penalty = sum((gradient_lengths(D, x) ** 2).mean() for x in (real, fake))
    learn(opt_d, loss_d + args.gamma / 2 * penalty)
    for turn in range(args.d_every):
        if turn > 0:
            fake = G(torch.randn_like(z))
        fake_logit = D(fake)
        loss_g = g_loss(real_logit.detach(), fake_logit)
        learn(opt_g, loss_g)
    return loss_d, loss_g, real_logit, fake_logit


def keras_step(G, D, opt_g, opt_d, args, _, real, z, *labels):
    """Keras's loop: the discriminator on real images, then on what inference mode makes; then the generator.

    With convolutions the discriminator learns from both at once, and both networks from the same images; with
    wgan-gp from both at once too, as Wasserstein's distance is a difference.
    """
    losses = {  # of the discriminator on real and on fake images, of the generator
        "bce": (lambda x: bce(x, 1.0), lambda x: bce(x, 0.0), lambda x: bce(x, 1.0)),
        "hinge": (
            lambda x: (1 - x).clamp(min=0).mean(),
            lambda x: (1 + x).clamp(min=0).mean(),
            lambda x: -x.mean(),
        ),
        "lsgan": (lambda x: ((x - 1) ** 2).mean(), lambda x: (x**2).mean(), lambda x: ((x - 1) ** 2).mean()),
        "wgan-gp": (lambda x: -x.mean(), lambda x: x.mean(), lambda x: -x.mean()),
    }
    d_loss_real, d_loss_fake, g_loss = losses[args.loss]

    def logits_of(x):
        return D(x, *labels, logits=True)

    def loss_of_real(logit):
        if not args.gamma:
            return d_loss_real(logit)
        if args.loss != "wgan-gp":
            return d_loss_real(logit) + args.gamma / 2 * (gradient_lengths(logits_of, real) ** 2).mean()
        share = torch.rand(len(real), 1, 1, 1)
        lengths = gradient_lengths(logits_of, (1 - share) * real + share * fake.detach())
        return d_loss_real(logit) + args.gamma / 2 * ((lengths - 1) ** 2).mean()

    keras = args.arch == "dense"
    if keras:
        fake = G.eval()(torch.cat([*labels, z], 1)).detach()
        G.train()
    else:
        fake = G(torch.cat([*labels, z], 1))
    if not keras or args.loss == "wgan-gp":
        real_logit = logits_of(real)
        fake_logit = logits_of(fake.detach())
        loss_real = loss_of_real(real_logit)
        loss_fake = d_loss_fake(fake_logit)
        learn(opt_d, loss_real + loss_fake)
    else:
        real_logit = logits_of(real)
        loss_real = loss_of_real(real_logit)
        learn(opt_d, loss_real)
        fake_logit = logits_of(fake)
        loss_fake = d_loss_fake(fake_logit)
        learn(opt_d, loss_fake)
    if keras:
        fake = G(torch.cat([*labels, torch.randn_like(z)], 1))
    loss_g = g_loss(logits_of(fake))
    learn(opt_g, loss_g)
    return (loss_real + loss_fake) / 2, loss_g, real_logit, fake_logit


STEPS = [
    (dcgan, dcgan_step, ""),
    (dcgan, dcgan_step, "--augment"),
    (dcgan, dcgan_step, "--recipe classic --channels 1"),
    (cgan_residual, conditional_step, ""),
    (cspup128, r3gan_step, ""),
    (cspup128, r3gan_step, "--gamma 0"),
    (cspup128, r3gan_step, "--scheme exact --d-every 2"),
    (cspup128, r3gan_step, "--loss hinge --d-every 3"),
    (cspup128, r3gan_step, "--loss bce --up deconv"),
    (fashion_keras_port, keras_step, "--gamma 2"),
]
for _arch in "dense", "dcgan", "style":
    for _loss in "bce", "hinge", "lsgan", "wgan-gp":
        _more = "" if _arch == "dense" else "--conditional"
        STEPS.append((fashion_keras_port, keras_step, f"--arch {_arch} --loss {_loss} {_more}"))


@pytest.mark.parametrize("script, textbook, argv", STEPS, ids=[f"{s.SCRIPT} {argv}" for s, _, argv in STEPS])
def test_a_step_is_the_textbook_one(script, textbook, argv, double):
    """Losses, mean sigmoids, weights and statistics after three steps are those of plain code."""
    args, nets = prepared(script, *argv.split())
    G, D = copy.deepcopy(nets.G), copy.deepcopy(nets.D)
    opt_g, opt_d = (torch.optim.SGD(net.parameters(), 0.02) for net in (G, D))
    before = [weight.clone() for weight in (*G.parameters(), *D.parameters())]

    def view(x):  # all that the discriminator sees
        return dcgan.augment(x, uniform) if getattr(args, "augment", False) else x

    for step in 1, 2, 3:
        given = batch(script, args, step)
        torch.manual_seed(step)
        uniform = torch.rand(6, 7)
        torch.manual_seed(step)
        D.requires_grad_(True)
        loss_d, loss_g, real_logit, fake_logit = textbook(G, D, opt_g, opt_d, args, view, *given)
        scores = {"d_real": real_logit.sigmoid().mean(), "d_fake": fake_logit.sigmoid().mean()}
        torch.manual_seed(step)
        metrics = script.train_step(nets, args, *given)
        expected = {"loss_d": loss_d, "loss_g": loss_g, **scores}
        assert list(metrics) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name].detach(), value.detach(), rtol=1e-6, atol=1e-8)
    for ours, theirs in (nets.G, G), (nets.D, D):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    moved = [(a - b).abs().max().item() for a, b in zip(before, (*nets.G.parameters(), *nets.D.parameters()))]
    assert sum(way > 1e-12 for way in moved) > 0.7 * len(moved)  # not biases that batch norm takes away
    assert max(moved) > 1e-4


def test_fp16s_scaler_lets_each_optimiser_take_its_steps(kind):
    """As many steps as without, which are two for a network that learns twice in turn."""
    script, argv = kind
    counts, weights = [], []
    for enabled in False, True:
        args, nets = prepared(script, *argv.split(), dtype=torch.float32, optimiser=script.Optimiser)
        start = torch.cat([w.detach().clone().flatten() for w in nets.G.parameters()])
        nets.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in 1, 2:
            torch.manual_seed(step)
            script.train_step(nets, args, *batch(script, args, step, torch.float32))
        counts.append([next(iter(o.state.values()))["step"].item() for o in (nets.opt_d, nets.opt_g)])
        weights.append(torch.cat([w.detach().flatten() for w in nets.G.parameters()]))
    assert counts[0] == counts[1]
    assert (weights[0] - weights[1]).norm() < 0.05 * (weights[0] - start).norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_follows_fp32(kind, precision, root, tmp_path):
    """Weights stay float32, and the losses of the first steps are near those of float32, not the same."""
    script, argv = kind
    rows = []
    for name in "fp32", precision:
        script.main(flags(script, root, tmp_path / name, *argv.split(), "--steps", 2, "--precision", name))
        rows.append((tmp_path / name / "metrics.csv").read_text().split()[-1].split(",")[4:])
    dtypes = {weight.dtype for weight in load(tmp_path / name / "models.pth")["Generator"].values()}
    assert dtypes <= {torch.float32, torch.int64}
    rows = np.array(rows, float)
    assert rows[0] == pytest.approx(rows[1], rel=0.1, abs=0.05) and (rows[0] != rows[1]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_penalties_are_taken_in_the_precision_of_the_run(dtype):
    args, nets = prepared(cspup128, dtype=torch.float32)
    nets.autocast = lambda: torch.autocast("cpu", dtype)
    seen = []
    nets.D[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    nets.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    cspup128.train_step(nets, args, *batch(cspup128, args, 1, torch.float32))
    assert seen == [dtype] * 2


@pytest.mark.parametrize(
    "dtype, autocast, tolerance",
    [
        (torch.float64, None, 1e-10),
        (torch.float32, None, 1e-4),
        (torch.float32, torch.bfloat16, 0.1),
        (torch.float32, torch.float16, 0.03),
    ],
)
def test_gradients_of_gradients_are_pytorchs(dtype, autocast, tolerance):
    """Of the discriminator's loss with R1 and R2, by its own convolutions and by PyTorch's in float64."""
    torch.manual_seed(0)
    ours = cspup128.Discriminator(width=3)
    theirs = cspup128.Discriminator(width=3).double()
    for i, layer in enumerate(theirs):
        if isinstance(layer, nn.Conv2d):
            theirs[i] = nn.Conv2d(*layer.weight.shape[1::-1], layer.kernel_size, layer.stride, layer.padding)
    theirs.double().load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 128, 128, dtype=torch.float64).requires_grad_()
    found = []
    for D, precision in (ours.to(dtype), autocast), (theirs, None):
        x = images.detach().to(next(D.parameters()).dtype).requires_grad_()
        with torch.autocast("cpu", precision, enabled=bool(precision)):
            logit = D(x)
        (gradient,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
        penalty = gradient.square().sum((1, 2, 3)).mean()
        (F.softplus(-logit).mean() + 10 * penalty).backward()
        by_weights = torch.cat([weight.grad.double().flatten() for weight in D.parameters()])
        found.append((gradient.detach().double().flatten(), x.grad.double().flatten(), by_weights))
    for a, b in zip(*found):
        assert (a - b).norm() < tolerance * b.norm()
    assert type(ours[0]) is cspup128.Conv2d and type(theirs[0]) is nn.Conv2d


# Optimisers, learning rates, the average


def same_weights(a, b, **tolerance):
    """Whether the floating-point values of two state_dicts are close to each other, by default to the bit."""
    options = {"rtol": 0, "atol": 0, **tolerance}
    floats = [name for name, value in a.items() if value.is_floating_point()]
    return all(torch.allclose(a[name], b[name], **options) for name in floats)


def resumed(script, run, copy_to, *argv):
    """The checkpoint of a copy of a run folder after one more step, with more flags."""
    shutil.copytree(run, copy_to)
    step = load(run / "checkpoint.pt")["step"] + 1
    script.main(["--resume", "--out", str(copy_to), "--steps", str(step), *map(str, argv)])
    return load(copy_to / "checkpoint.pt")


def test_flags_of_the_optimisers_reach_them_and_win_over_a_checkpoint(script, root, tmp_path):
    """Two learning rates and the betas; what is not given again stays."""
    argv = "--lr", 0.003, "--d-lr", 0.004, "--betas", 0.4, 0.9
    script.main(flags(script, root, tmp_path / "run", "--steps", 1, *argv))
    begun = load(tmp_path / "run" / "checkpoint.pt")
    kept = resumed(script, tmp_path / "run", tmp_path / "kept")
    other = resumed(script, tmp_path / "run", tmp_path / "other", "--lr", 0.0, "--betas", 0.1, 0.5)
    for saved, lr, betas in (begun, 0.003, [0.4, 0.9]), (kept, 0.003, [0.4, 0.9]), (other, 0.0, [0.1, 0.5]):
        groups = [saved[name]["param_groups"][0] for name in ("opt_g", "opt_d")]
        assert [float(group["lr"]) for group in groups] == pytest.approx([lr, 0.004])
        assert [list(group["betas"]) for group in groups] == [betas] * 2
        assert saved["config"]["betas"] == betas
    weights = [name for name in begun["G"] if name.endswith(("weight", "bias"))]
    assert all(torch.equal(begun["G"][name], other["G"][name]) for name in weights)  # learning rate 0
    assert not same_weights(begun["G"], kept["G"]) and not same_weights(kept["D"], other["D"])


@pytest.mark.parametrize("start, factors", [(0, [1] * 5), (2, [1, 1, 0.5**0.5, 0.5, 1e-2]), (1e9, [1] * 5)])
def test_learning_rates_fall_with_the_root_of_the_steps(start, factors, script):
    args = script.parse(["--lr-decay-from", str(start)])[0]
    found = [script.lr_factor(args, torch.tensor(step)).item() for step in (1, 2, 4, 8, 20_000)]
    assert found == pytest.approx(factors)


def test_both_networks_train_at_the_learning_rate_that_has_fallen(script, root, tmp_path):
    """Step 2, if they fall from step 1 on, is one at the root of a half, whether begun or resumed so."""
    rates = {"--lr": 0.004, "--d-lr": 0.002}
    argv = [word for pair in rates.items() for word in pair]
    script.main(flags(script, root, tmp_path / "run", "--steps", 1, *argv, "--lr-decay-from", 0))
    slower = [word for name, rate in rates.items() for word in (name, rate * 0.5**0.5)]
    expected = resumed(script, tmp_path / "run", tmp_path / "slower", *slower)
    decayed = resumed(script, tmp_path / "run", tmp_path / "decayed", "--lr-decay-from", 1)
    constant = resumed(script, tmp_path / "run", tmp_path / "constant")
    script.main(flags(script, root, tmp_path / "whole", "--steps", 2, *argv, "--lr-decay-from", 1))
    whole = load(tmp_path / "whole" / "checkpoint.pt")
    for name in "G", "D":
        assert same_weights(decayed[name], expected[name], rtol=1e-4, atol=1e-6)
        assert same_weights(decayed[name], whole[name])
        assert not same_weights(constant[name], decayed[name], rtol=1e-4, atol=1e-6)
    assert decayed["config"]["lr_decay_from"] == 1


def test_a_scheduler_of_ones_own_has_its_effect(script, root, tmp_path, monkeypatch):
    """One of PyTorch's: half the rate at step 2, none at step 3; a resumed run goes on where it was."""
    plain_step = script.train_step

    def scheduled_step(nets, args, *given):
        if not hasattr(nets, "scheduler"):
            done = load(f"{args.out}/checkpoint.pt")["step"] if args.resume else 0
            nets.scheduler = CosineAnnealingLR(nets.opt_g, T_max=2, last_epoch=done - 1)
        metrics = plain_step(nets, args, *given)
        nets.scheduler.step()
        return metrics

    monkeypatch.setattr(script, "train_step", scheduled_step)
    script.main(flags(script, root, tmp_path / "one", "--steps", 1, "--lr", 0.01))
    two = resumed(script, tmp_path / "one", tmp_path / "two")
    three = resumed(script, tmp_path / "two", tmp_path / "three")
    weights = [name for name in two["G"] if name.endswith(("weight", "bias"))]
    assert all(torch.equal(two["G"][name], three["G"][name]) for name in weights)
    assert not same_weights(two["D"], three["D"])
    script.main(flags(script, root, tmp_path / "whole", "--steps", 3, "--lr", 0.01))
    whole = load(tmp_path / "whole" / "checkpoint.pt")
    assert all(same_weights(whole[name], three[name]) for name in ("G", "D"))


@pytest.mark.parametrize("ema", [0.95, 0.0])
def test_the_average_follows_the_generator(ema, script, root, tmp_path):
    """Its half-life is a tenth of the steps so far, up to --ema; with 0 it is the generator itself.

    Batch norm's statistics are its own (test_norms.py), unless it is the generator itself.
    """
    script.main(flags(script, root, tmp_path / "run", "--steps", 11, "--ema", 0.5))
    before = load(tmp_path / "run" / "checkpoint.pt")
    after = resumed(script, tmp_path / "run", tmp_path / "more", "--ema", ema)  # a flag given wins
    assert after["config"]["ema"] == ema
    weight = 1 - min(0.5 ** (10 / 12), ema)
    moved = set()
    for name, average in after["ema"].items():
        value = after["G"][name]
        if not torch.equal(average, value):
            moved.add(name.split(".")[-1])
        if average.is_floating_point() and (ema == 0 or "running" not in name):
            expected = before["ema"][name].lerp(value, weight)
            torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
            assert ema or torch.equal(average, value)
    assert ("weight" in moved) == (ema > 0)


# Augmentation


def test_augmentation_is_the_papers():
    """Colour, shift and cutout (Zhao et al. 2020) by hand, image by image; gradients pass through."""
    x = torch.rand(8, 3, 16, 24, dtype=torch.float64) * 2 - 1
    u = torch.rand(8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 1e-9
    for augmented, image, numbers in zip(dcgan.augment(x, u), x, u.tolist()):
        brightness, saturation, contrast, shift_y, shift_x, hole_y, hole_x = numbers
        image = image + brightness - 0.5
        grey = image.mean(0, keepdim=True)
        image = grey + (image - grey) * 2 * saturation
        image = image.mean() + (image - image.mean()) * (contrast + 0.5)
        down = int(shift_y * 5) - 2  # an eighth of the height either way
        right = int(shift_x * 7) - 3
        expected = torch.zeros_like(image)
        for i, j in itertools.product(range(16), range(24)):
            y, x_from = i + down, j + right
            if not (0 <= y < 16 and 0 <= x_from < 24):
                continue
            if abs(y / 16 - hole_y) >= 0.25 or abs(x_from / 24 - hole_x) >= 0.25:
                expected[:, i, j] = image[:, y, x_from]
        torch.testing.assert_close(augmented, expected)
    x.requires_grad_()
    dcgan.augment(x, u).sum().backward()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("more, views", [("--no-flip", 1), ("--flip", 2)])
def test_what_a_step_is_given(script, more, views, root, tmp_path, monkeypatch):
    """Real images in [-1, 1] as they are or mirrored; fresh noise; the number of the step."""
    seen = []
    steps = []

    def record(nets, args, real, z, *labels):
        seen.append((real, z))
        steps.append(nets.step.item())
        return {"loss_d": torch.zeros(()), "loss_g": torch.zeros(())}

    monkeypatch.setattr(script, "train_step", record)
    script.main(flags(script, root, tmp_path, "--epochs", 4, *more.split()))
    assert steps == [*range(1, 21)] and len({z.sum().item() for *_, z in seen}) == 20
    real = torch.cat([real for real, *_ in seen])
    assert real.shape[1] == script.parse(TINY[script])[0].channels and real.abs().max() <= 1
    different = len({tuple(image[0, ::3].flatten().tolist()) for image in real})
    assert different == 40 if views == 1 else 60 < different <= 80
    epochs = [real[i * 40 : i * 40 + 40].sum((1, 2, 3)) for i in range(4)]
    if views == 1:  # every image once in each epoch, in another order
        torch.testing.assert_close(epochs[0].sort()[0], epochs[1].sort()[0])
        assert not torch.equal(epochs[0], epochs[1])


# gan_ops


def test_steps_by_gan_ops_are_pytorchs(kind):
    """In float32 to rounding, by how far the weights moved in three steps of gradient descent."""
    pytest.importorskip("gan_ops")
    script, argv = kind
    ends = []
    for fused, steps in (False, 0), (False, 3), (True, 3):
        args, nets = prepared(script, *argv.split(), dtype=torch.float32)
        for module in (*nets.G.modules(), *nets.D.modules()):
            module.fused = fused
        for step in range(steps):
            torch.manual_seed(step)
            script.train_step(nets, args, *batch(script, args, step, torch.float32))
        ends.append([nn.utils.parameters_to_vector(net.parameters()).detach() for net in (nets.G, nets.D)])
    for start, plain, by_gan_ops in zip(*ends):
        assert (plain - by_gan_ops).norm() < 1e-3 * (plain - start).norm()


def test_runs_by_gan_ops_have_the_same_bits_and_say_what_served(script, root, tmp_path):
    pytest.importorskip("gan_ops")
    saved = []
    for name, more in ("a", []), ("b", []), ("c", ["--no-fused"]):
        script.main(flags(script, root, tmp_path / name, "--steps", 3, *more))
        saved.append(load(tmp_path / name / "checkpoint.pt"))
    said = [run["config"]["used"]["gan_ops"] for run in saved]
    assert said == ["serves on cpu", "serves on cpu", "does not serve: --no-fused"]
    assert all(torch.equal(value, saved[1]["G"][name]) for name, value in saved[0]["G"].items())


def test_batch_norms_go_through_gan_ops_where_it_serves(kind):
    """As many calls as there are such modules, and no batch norm of PyTorch's beside them."""
    pytest.importorskip("gan_ops")
    script, argv = kind
    args, nets = prepared(script, *argv.split(), dtype=torch.float32)
    modules = [m for net in (nets.G, nets.D) for m in net.modules() if hasattr(m, "fused")]
    for module in modules:
        module.fused = True
    norms = [m for m in modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.profiler.profile() as profile:
        script.train_step(nets, args, *batch(script, args, 1, torch.float32))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert not any("batch_norm" in name and name.startswith("aten::") for name in calls)
    assert any(name.startswith("gan_ops::") for name in calls) == bool(norms)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize(
    "text, words",
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
        ("torch_version = '1.0'", "built for torch 1.0"),
        ("torch_version = None", "torch None"),
        ("raise OSError('libcudart.so.13: cannot open')", "libcudart"),
        ("1 / 0", "zero"),
        (f"torch_version = '{torch.__version__}'; devices = ['cuda', 'xpu']", "built for cuda and xpu"),
    ],
)
def test_a_build_that_does_not_fit_is_named_and_pytorch_serves(script, text, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gan_ops", raising=False)
    (tmp_path / "gan_ops.py").write_text(text)
    args, nets = prepared(script)
    said = script.use_gan_ops(args, nets, torch.device("cpu"))
    assert said.startswith("does not serve: ") and "pip install -e ." in said and words in said
    assert not any(getattr(module, "fused", False) for module in (*nets.G.modules(), *nets.D.modules()))


# CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_as_the_step_does(kind, root, tmp_path):
    """The first three steps of a life run as they are, the later ones as a graph: one life against four."""
    script, argv = kind
    more = [*argv.split(), "--device", "cuda"]
    script.main(flags(script, root, tmp_path / "graph", *more, "--steps", 12))
    for steps in 3, 6, 9, 12:
        again = ["--resume"] if steps > 3 else []
        script.main(flags(script, root, tmp_path / "eager", *more, "--steps", steps, *again))
    graph, eager = (load(tmp_path / name / "checkpoint.pt") for name in ("graph", "eager"))
    for name in "GD":
        a, b = (torch.cat([v.flatten().double() for v in state[name].values()]) for state in (graph, eager))
        assert (a - b).norm() < 0.02 * a.norm()
