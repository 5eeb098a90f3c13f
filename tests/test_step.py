"""The training step: against plain PyTorch written out here, by gan_ops."""
import copy
import itertools
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, flags, load
from torch import nn
from torch.nn import functional as F

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port


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
    args.names = ["a", "b"]
    torch.manual_seed(0)
    G, D = (net.to(dtype) for net in script.make_networks(args))
    for module in (*G.modules(), *D.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd): module.p = 0.0
    for weight in G.parameters() if script is fashion_keras_port else ():
        weight.data.add_(0.05 * torch.randn_like(weight))  # biases too
    make = optimiser or (lambda weights, lr, **options: torch.optim.SGD(weights, 0.02))
    opt_g, opt_d = (make(net.parameters(), lr, betas=args.betas, fused=True) for net, lr in ((G, args.lr),
                                                                                             (D, args.d_lr)))
    return args, SimpleNamespace(G=G, D=D, opt_g=opt_g, opt_d=opt_d, autocast=nullcontext,
                                 scaler=torch.amp.GradScaler("cpu", enabled=False))


def batch(script, args, step, dtype=torch.float64, count=6):
    """Real pictures, noise and, where the networks are told them, one-hot labels of two classes."""
    generator = torch.Generator().manual_seed(step)
    real = torch.rand(count, args.channels, args.size, args.size, generator=generator, dtype=dtype) * 2 - 1
    z = torch.randn(count, script.Z, generator=generator, dtype=dtype)
    told = script is cgan_residual or getattr(args, "conditional", False)
    return [real, z, F.one_hot(torch.arange(count) // 2 % 2, 2).to(dtype)] if told else [real, z]


def slopes(judge, x):
    """The length of the gradient of each picture's logit, one picture at a time."""
    lengths = []
    for i in range(len(x)):
        one = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(one).flatten()[i], one, create_graph=True)
        lengths.append((gradient[i] ** 2).sum().sqrt())
    return torch.stack(lengths)


def learn(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def loss_of(logit, target):
    return nn.BCELoss()(logit.sigmoid(), torch.full_like(logit, target))


def plain(G, D, opt_g, opt_d, args, view, real, z):
    """DCGAN's step as every tutorial has it; returns the losses and the logits."""
    fake = G(z)
    r, f = D(view(real)), D(view(fake.detach()))
    loss_d = loss_of(r, 1.0) + loss_of(f, 0.0)
    learn(opt_d, loss_d)
    again = D(view(fake))
    loss_g = loss_of(again, 1.0)
    learn(opt_g, loss_g)
    return loss_d, loss_g, r, again


def matching(G, D, opt_g, opt_d, args, _, real, z, labels):
    """The same, told the class; half of what is fake are real pictures with the label of the one before."""
    fake = G(torch.cat([labels, z], 1))

    def judge(x, told):
        return D(x, told, logits=True)
    r, f = judge(real, labels), judge(fake.detach(), labels)
    wrong = [loss_of(judge(real[i : i + 1], labels[[i - 1]]), 0.0) for i in range(len(real))
             if labels[i].argmax() != labels[i - 1].argmax()]
    assert 0 < len(wrong) < len(real)
    loss_d = loss_of(r, 1.0) + (loss_of(f, 0.0) + sum(wrong) / len(real)) / 2
    learn(opt_d, loss_d)
    again = judge(fake, labels)
    loss_g = loss_of(again, 1.0)
    learn(opt_g, loss_g)
    return loss_d, loss_g, r, again


def relativistic(G, D, opt_g, opt_d, args, _, real, z):
    """R3GAN's: the discriminator by the difference of logits under R1 and R2, then the generator."""
    fake = G(z)
    kinds = {"relativistic": (lambda r, f: loss_of(r - f, 1.0), lambda r, f: loss_of(f - r, 1.0)),
             "bce": (lambda r, f: loss_of(r, 1.0) + loss_of(f, 0.0), lambda r, f: loss_of(f, 1.0)),
             "hinge": (lambda r, f: (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(), lambda r, f:
                       -f.mean())}
    of_d, of_g = kinds[args.loss]
    r = D(real)
    loss_d = of_d(r, D(fake.detach()))
    penalty = sum((slopes(D, x) ** 2).mean() for x in (real, fake)) if args.gamma else 0
    learn(opt_d, loss_d + args.gamma / 2 * penalty)
    for turn in range(args.d_every):
        if turn: fake = G(torch.randn_like(z))
        f = D(fake)
        loss_g = of_g(r.detach(), f)
        learn(opt_g, loss_g)
    return loss_d, loss_g, r, f


def keras_loop(G, D, opt_g, opt_d, args, _, real, z, *labels):
    """The Keras loop: the discriminator on real, then on what inference mode makes; then the generator. With
    styles the discriminator learns from both at once, and both from the same pictures."""
    of_real, of_fake, of_g = {
        "bce": (lambda x: loss_of(x, 1.0), lambda x: loss_of(x, 0.0), lambda x: loss_of(x, 1.0)),
        "hinge": (lambda x: (1 - x).clamp(min=0).mean(), lambda x: (1 + x).clamp(min=0).mean(),
                  lambda x: -x.mean()),
        "lsgan": (lambda x: ((x - 1)**2).mean(), lambda x: (x**2).mean(),
                  lambda x: ((x - 1)**2).mean())}[args.loss]

    def judge(x):
        return D(x, *labels, logits=True)

    def penalty():
        return args.gamma / 2 * (slopes(judge, real) ** 2).mean() if args.gamma else 0
    if args.recipe == "style":
        made = G(torch.cat([*labels, z], 1))
        r, f = judge(real), judge(made.detach())
        on_real, on_fake = of_real(r) + penalty(), of_fake(f)
        learn(opt_d, on_real + on_fake)
    else:
        fake = G.eval()(torch.cat([*labels, z], 1)).detach()
        G.train()
        r = judge(real)
        on_real = of_real(r) + penalty()
        learn(opt_d, on_real)
        f = judge(fake)
        on_fake = of_fake(f)
        learn(opt_d, on_fake)
        made = G(torch.cat([*labels, torch.randn_like(z)], 1))
    loss_g = of_g(judge(made))
    learn(opt_g, loss_g)
    return (on_real + on_fake) / 2, loss_g, r, f


STEPS = [(dcgan, plain, ""), (dcgan, plain, "--augment"), (dcgan, plain, "--recipe classic --channels 1"),
         (cgan_residual, matching, ""),
         *((cspup128, relativistic, more) for more in (
             "", "--gamma 0", "--scheme exact --d-every 2", "--loss hinge --d-every 3",
             "--loss bce --up deconv")),
         *((fashion_keras_port, keras_loop, f"{arch} --loss {loss}") for loss in ("bce", "hinge", "lsgan")
           for arch in ("", "--arch style --conditional"))]


@pytest.mark.parametrize("script, textbook, argv", STEPS, ids=[f"{s.SCRIPT} {argv}" for s, _, argv in STEPS])
def test_a_step_is_the_textbook_one(script, textbook, argv, double):
    """Losses, logits, weights and statistics after three steps are those of plain code."""
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
        expected = textbook(G, D, opt_g, opt_d, args, view, *given)
        torch.manual_seed(step)
        for ours, theirs in zip(script.train_step(nets, args, *given), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-8)
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
    assert {w.dtype for w in load(tmp_path / name / "models.pth")["Generator"].values()} <= {torch.float32,
                                                                                             torch.int64}
    rows = np.array(rows, float)
    assert rows[0] == pytest.approx(rows[1], rel=0.1, abs=0.05) and (rows[0] != rows[1]).any()


def test_fp16_takes_second_derivatives_in_fp32():
    args, nets = prepared(cspup128, dtype=torch.float32)
    nets.autocast = lambda: torch.autocast("cpu", torch.float16)
    seen = []
    nets.D[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for enabled in True, False:
        nets.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        cspup128.train_step(nets, args, *batch(cspup128, args, 1, torch.float32))
    assert seen == [torch.float32] + [torch.float16] * 3


def test_two_learning_rates_and_the_recipes_betas_reach_the_optimisers(script, root, tmp_path, monkeypatch):
    set_in_recipes(monkeypatch, script, betas=[0.4, 0.9])
    script.main(flags(script, root, tmp_path, "--steps", 1, "--lr", 0.003, "--d-lr", 0.004))
    saved = load(tmp_path / "checkpoint.pt")
    groups = [saved[name]["param_groups"][0] for name in ("opt_g", "opt_d")]
    assert [list(group["betas"]) for group in groups] == [[0.4, 0.9]] * 2
    assert [float(group["lr"]) for group in groups] == pytest.approx([0.003, 0.004])
    script.main(["--resume", "--out", str(tmp_path), "--steps", "2", "--lr", "0.0"])
    before, after = saved, load(tmp_path / "checkpoint.pt")
    weights = [name for name in before["G"] if name.endswith(("weight", "bias"))]
    assert all(torch.equal(before["G"][name], after["G"][name]) for name in weights)  # a flag given wins
    assert any(not torch.equal(before["D"][name], after["D"][name]) for name in after["D"])


def set_in_recipes(monkeypatch, script, **settings):
    """What a recipe has and no flag sets."""
    for recipe in script.RECIPES.values():
        for name, value in settings.items(): monkeypatch.setitem(recipe, name, value)


def test_learning_rates_fall_with_the_root_of_the_steps(script, root, tmp_path, monkeypatch):
    """From `fall` on; until then they stay, and so does what the run comes to."""
    ends = {}
    for fall in 1, 4, 1e9:
        set_in_recipes(monkeypatch, script, fall=fall)
        script.main(flags(script, root, tmp_path / str(fall), "--steps", 4, "--lr", 0.004, "--d-lr", 0.002))
        ends[fall] = load(tmp_path / str(fall) / "checkpoint.pt")
        share = min(fall / 4, 1) ** 0.5
        rates = [float(ends[fall][name]["param_groups"][0]["lr"]) for name in ("opt_g", "opt_d")]
        assert rates == pytest.approx([0.004 * share, 0.002 * share])
    for name in "G", "D":
        same, slower = ({k: torch.equal(v, ends[4][name][k]) for k, v in ends[fall][name].items()}
                        for fall in (1e9, 1))
        assert all(same.values()) and not all(slower[k] for k in slower if "weight" in k)


def test_the_average_follows_the_generator(script, root, tmp_path, monkeypatch):
    """Its half-life is a tenth of the steps so far, up to `ema` of the recipe; with 0 it is the generator itself.

    Batch norm's statistics are its own (test_norms.py), unless it is the generator itself.
    """
    for ema in 0.95, 0.0:
        out, states = tmp_path / str(ema), []
        if ema and script is fashion_keras_port: continue  # its dense networks are never averaged
        set_in_recipes(monkeypatch, script, ema=ema)
        for step, argv in (11, flags(script, root, out)), (12, ["--resume", "--out", str(out)]):
            script.main([*argv, "--steps", str(step)])
            states.append(load(out / "checkpoint.pt"))
        weight = 1 - min(0.5 ** (10 / 12), ema)
        for name, average in states[1]["ema"].items():
            if average.is_floating_point() and (ema == 0 or "running" not in name):
                expected = states[0]["ema"][name].lerp(states[1]["G"][name], weight)
                torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
                assert ema or torch.equal(average, states[1]["G"][name])
        moved = [name for name, value in states[1]["ema"].items() if not torch.equal(value, states[1]["G"][name])]
        assert any("weight" in name for name in moved) == bool(ema)


# Augmentation

def test_augmentation_is_the_papers():
    """Colour, shift and cutout (Zhao et al. 2020) by hand, picture by picture; gradients pass through."""
    x = torch.rand(8, 3, 16, 24, dtype=torch.float64) * 2 - 1
    u = torch.rand(8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 1e-9
    for made, picture, (light, colour, contrast, *place) in zip(dcgan.augment(x, u), x, u.tolist()):
        picture = picture + light - 0.5
        grey = picture.mean(0, keepdim=True)
        picture = grey + (picture - grey) * 2 * colour
        picture = picture.mean() + (picture - picture.mean()) * (contrast + 0.5)
        (down, up), (right, left) = ((int(p * (2 * n // 8 + 1)) - n // 8, p2) for p, p2,
                                     n in zip(place, place[2:], (16, 24)))
        expected = torch.zeros_like(picture)
        for i, j in itertools.product(range(max(0, -down), min(16, 16 - down)), range(max(0, -right),
                                                                                      min(24, 24 - right))):
            if abs((i + down) / 16 - up) >= 0.25 or abs((j + right) / 24 - left) >= 0.25:
                expected[:, i, j] = picture[:, i + down, j + right]
        torch.testing.assert_close(made, expected)
    x.requires_grad_()
    dcgan.augment(x, u).sum().backward()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("more, views", [("--no-flip", 1), ("--flip", 2)])
def test_what_a_step_is_given(script, more, views, root, tmp_path, monkeypatch):
    """Real pictures in [-1, 1] as they are or mirrored; fresh noise."""
    seen = []

    def record(nets, args, real, z, *labels):
        fake = nets.G(torch.cat([*labels, z], 1))
        seen.append((real, z))
        return (fake.sum() * 0,) * 2 + (fake[:, 0, 0, 0] * 0,) * 2
    monkeypatch.setattr(script, "train_step", record)
    script.main(flags(script, root, tmp_path, "--epochs", 4, *more.split()))
    assert len(seen) == 20 and len({z.sum().item() for *_, z in seen}) == 20
    real = torch.cat([real for real, *_ in seen])
    assert real.shape[1] == script.parse(TINY[script])[0].channels and real.abs().max() <= 1
    different = len({tuple(picture[0, ::3].flatten().tolist()) for picture in real})
    assert different == 40 if views == 1 else 60 < different <= 80
    epochs = [real[i * 40: i * 40 + 40].sum((1, 2, 3)) for i in range(4)]
    if views == 1:  # every picture once in each epoch, in another order
        torch.testing.assert_close(epochs[0].sort()[0], epochs[1].sort()[0])
        assert not torch.equal(epochs[0], epochs[1])


# gan_ops

def test_steps_by_gan_ops_are_the_twins(kind):
    """In float32 to rounding, by how far the weights moved in three steps of gradient descent."""
    pytest.importorskip("gan_ops")
    script, argv = kind
    ends = []
    for fused in None, False, True:
        args, nets = prepared(script, *argv.split(), dtype=torch.float32)
        for module in (*nets.G.modules(), *nets.D.modules()): module.fused = fused
        for step in (1, 2, 3) if fused is not None else ():
            torch.manual_seed(step)
            script.train_step(nets, args, *batch(script, args, step, torch.float32))
        ends.append([torch.cat([w.detach().flatten() for w in net.parameters()]) for net in (nets.G, nets.D)])
    for start, twin, fused in zip(*ends):
        assert (twin - fused).norm() < 1e-3 * (twin - start).norm()


def test_runs_by_gan_ops_have_the_same_bits_and_say_what_served(script, root, tmp_path):
    gan_ops, saved = pytest.importorskip("gan_ops"), []
    for name, more in ("a", []), ("b", []), ("c", ["--no-fused"]):
        script.main(flags(script, root, tmp_path / name, "--steps", 3, *more))
        saved.append(load(tmp_path / name / "checkpoint.pt"))
    said = [run["config"]["used"]["gan_ops"] for run in saved]
    serves = f"serves on {' and '.join(gan_ops.devices)}"
    assert said == [serves, serves, "does not serve: --no-fused"]
    assert all(torch.equal(value, saved[1]["G"][name]) for name, value in saved[0]["G"].items())


def test_batch_norms_go_through_gan_ops_where_it_serves(kind):
    """As many calls as there are such modules, and no batch norm of PyTorch's beside them."""
    pytest.importorskip("gan_ops")
    script, argv = kind
    args, nets = prepared(script, *argv.split(), dtype=torch.float32)
    modules = [m for net in (nets.G, nets.D) for m in net.modules() if hasattr(m, "fused")]
    for module in modules: module.fused = True
    norms = [m for m in modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.profiler.profile() as profile:
        script.train_step(nets, args, *batch(script, args, 1, torch.float32))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert not any("batch_norm" in name and name.startswith("aten::") for name in calls)
    assert any(name.startswith("gan_ops::") for name in calls) == bool(norms)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize("text, words", [
    ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"), ("torch_version = '1.0'",
                                                                             "built for torch 1.0"),
    ("torch_version = None", "torch None"), ("raise OSError('libcudart.so.13: cannot open')", "libcudart"),
                                         ("1 / 0", "zero")])
def test_a_build_that_does_not_fit_is_named_and_the_twins_serve(script, text, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gan_ops", raising=False)
    (tmp_path / "gan_ops.py").write_text(text)
    source = open(script.__file__).read()
    names = {}
    exec(source[: source.index("# --- end shared ---")], names)
    said = names["GAN_OPS"]
    assert names["FUSED"] == () and said.startswith("does not serve: ")
    assert "pip install -e ." in said and words in said


# CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_as_the_step_does(kind, root, tmp_path):
    """The first three steps of a life run as they are, the later ones as a graph: one life against four."""
    script, argv = kind
    more = [*argv.split(), "--device", "cuda"]
    script.main(flags(script, root, tmp_path / "graph", *more, "--steps", 12))
    for steps in 3, 6, 9, 12:
        script.main(flags(script, root, tmp_path / "eager", *more, "--steps", steps, "--resume"))
    graph, eager = (load(tmp_path / name / "checkpoint.pt") for name in ("graph", "eager"))
    for name in "GD":
        a, b = (torch.cat([v.flatten().double() for v in state[name].values()]) for state in (graph, eager))
        assert (a - b).norm() < 0.02 * a.norm()
