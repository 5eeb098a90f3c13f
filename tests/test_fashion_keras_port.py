"""What is fashion_keras_port.py's own: its networks, losses and step, classes, the report, its drawings, the notebook.

That it does what Keras does is test_keras_parity.py's.
"""
import base64
import copy
import itertools
import json
from pathlib import Path

import jupytext
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient
from PIL import Image
from torch import nn

import fashion_keras_port as port
from test_bad_input import error_line

CPU = torch.device("cpu")
TINY = "--width", "2", "--batch-size", "8", "--precision", "fp32", "--device", "cpu"
DRAWN = ["T-shirt", "Trouser", "Dress", "Bag"]
LOSSES = ["bce", "hinge", "lsgan", "wgan-gp"]
NO_BIAS = "hinge", "wgan-gp"  # to which a number added to all scores makes no difference, but beyond the hinge
ARCHES = [(), ("--arch", "dcgan", "--conditional")]


def parsed(*argv):
    """The arguments that a command line gives."""
    return port.parse(list(map(str, argv)))[0]


def run(*argv):
    """Run the command line in this process."""
    return port.main(list(map(str, argv)))


def fails(capsys, *argv):
    """The error line of a command line, which has to end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


@pytest.fixture(autouse=True, scope="module")
def few():
    """Sets of 80 drawn pictures and, to test on, 20."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "SYNTHETIC", 80)
        yield


@pytest.fixture(autouse=True)
def twins_again():
    yield
    port.use_gan_ops(CPU, False)


@pytest.fixture
def undrawn(monkeypatch):
    """Runs that leave out the curves, which take longer than a few steps do."""
    monkeypatch.setattr(port, "draw_run", lambda *args: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fashion")


# The networks

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_the_operation_is_leaky_relu_then_batch_norm(fused, training, dtype, monkeypatch):
    """Written out: values, gradients, and statistics of which the variance is the biased one."""
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert (port.use_gan_ops(CPU, fused) == "serves") == fused
    torch.manual_seed(0)
    norm = port.LeakyReLUBatchNorm(5, **port.KERAS_NORM).to(dtype).train(training)
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 2)
    before = copy.deepcopy(norm.state_dict())
    x, seed = torch.randn(7, 5, dtype=dtype, requires_grad=True), torch.randn(7, 5, dtype=dtype)
    y = torch.where(x > 0, x, 0.2 * x)
    mean, var = y.mean(0), ((y - y.mean(0)) ** 2).mean(0)
    if not training:
        mean, var = before["running_mean"], before["running_var"]
    expected = (y - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias
    values = norm(x), expected
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*values, **close)
    for mine, other in zip(*(torch.autograd.grad(value, (x, norm.weight, norm.bias), seed) for value in values)):
        torch.testing.assert_close(mine, other, **close)
    for name, value in dict(running_mean=mean, running_var=var).items():
        moved = 0.8 * before[name] + 0.2 * value.detach() if training else before[name]
        torch.testing.assert_close(norm.state_dict()[name], moved, **close)


@pytest.mark.parametrize("fused", [True, False])
def test_its_weights_and_statistics_are_exchangeable_with_pytorchs_batch_norm(fused):
    port.use_gan_ops(CPU, fused)
    torch.manual_seed(0)
    ours, theirs = port.LeakyReLUBatchNorm(5, **port.KERAS_NORM), nn.BatchNorm1d(5, eps=1e-3)
    for norm in ours, theirs:
        nn.init.uniform_(norm.weight)
        for _ in range(3):
            norm(torch.randn(7, 5))
    x = torch.randn(7, 5)
    leaky = F.leaky_relu(x, 0.2)
    plain, new = nn.BatchNorm1d(5, eps=1e-3), port.LeakyReLUBatchNorm(5, **port.KERAS_NORM)
    for norm, other, given in (ours, plain, leaky), (theirs, new, x):
        other.load_state_dict(norm.state_dict(), strict=True)
        assert other.state_dict().keys() == norm.state_dict().keys()
        mine = x if norm is ours else leaky
        torch.testing.assert_close(other.eval()(given), norm.eval()(mine))
        torch.testing.assert_close(other.train()(given), norm.train()(mine))


def shapes(network, *inputs):
    """The shape of what each layer with weights gives, without the batch."""
    seen = []
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape[1:])))
    output = network(*inputs)
    return seen, output


@pytest.mark.parametrize("width", [2, 16])
@pytest.mark.parametrize("classes", [0, 3])
def test_dcgan_has_a_picture_of_7x7_that_doubles_twice(width, classes):
    w, z = width, torch.randn(2, classes + 100)
    seen, pictures = shapes(port.Generator(width, classes, "dcgan"), z)
    assert seen == [(4 * w * 49,), (2 * w, 14, 14), (w, 28, 28), (1, 28, 28)]
    assert pictures.shape == (2, 1, 28, 28) and 0.01 < pictures.abs().max() <= 1
    seen, verdict = shapes(port.Discriminator(width, classes, "dcgan"), pictures.detach())
    assert seen[:5] == [(w, 14, 14), (2 * w, 7, 7), (4 * w, 4, 4), (16 * w,), (1,)] and verdict.shape == (2, 1)
    assert seen[5:] == ([(16 * w,)] if classes else [])


@pytest.mark.parametrize("width", [2, 256])
@pytest.mark.parametrize("classes", [0, 3])
def test_dense_widens_to_784_and_narrows_again(width, classes):
    w, z = width, torch.randn(2, classes + 100)
    seen, pictures = shapes(port.Generator(width, classes), z)
    assert seen == [(w,), (2 * w,), (4 * w,), (784,)] and pictures.shape == (2, 1, 28, 28)
    seen, verdict = shapes(port.Discriminator(width, classes), pictures.detach())
    assert seen[:3] == [(2 * w,), (w,), (1,)] and ((0 < verdict) & (verdict < 1)).all()


@pytest.mark.parametrize("arch", ["dense", "dcgan"])
def test_the_discriminators_verdict_depends_on_the_label(arch):
    """Its logit is that of the picture and the product of features and class; without labels, the classes' mean."""
    torch.manual_seed(0)
    net, x, labels = port.Discriminator(4, 3, arch), torch.randn(5, 1, 28, 28), torch.tensor([2, 0, 1, 2, 0])
    features = net.layers(x)
    logit = net.logit(features) + (features * net.of_class.weight.T[labels]).sum(1, keepdim=True)
    torch.testing.assert_close(net(x, labels, logits=True), logit)
    torch.testing.assert_close(net(x, labels), logit.sigmoid())
    torch.testing.assert_close(net(x, F.one_hot(labels, 3)), logit.sigmoid())
    of_all = torch.cat([net(x, torch.full((5,), label), logits=True) for label in range(3)], 1)
    assert of_all.std(1).min() > 1e-3
    torch.testing.assert_close(net(x, logits=True), of_all.mean(1, keepdim=True))
    torch.testing.assert_close(net(x), of_all.mean(1, keepdim=True).sigmoid())


@pytest.mark.parametrize("arch, batch", [("dense", 32), ("dcgan", 64)])
def test_defaults_follow_from_the_architecture_and_flags_win(arch, batch):
    dense = arch == "dense"
    args = parsed("--arch", arch)
    assert (args.width, args.batch_size) == (256 if dense else 16, batch)
    assert args.lr == args.d_lr == (2e-4 if dense else 5e-4)
    assert (args.beta1, args.ema) == ((0.5, 0.0) if dense else (0.0, 0.999))
    assert (args.augment, args.flip, args.held_out, args.loss, args.conditional) == ("none", False, 0.0, "bce", False)
    args = parsed("--arch", arch, "--width", 3, "--batch-size", 5, "--lr", 0.1, "--d-lr", 0.2, "--beta1", 0.3,
                  "--ema", 0.4, "--augment", "on", "--flip", "--held-out", 0.25)
    assert (args.width, args.batch_size, args.lr, args.d_lr, args.beta1, args.ema) == (3, 5, 0.1, 0.2, 0.3, 0.4)
    assert (args.augment, args.flip, args.held_out) == ("on", True, 0.25)
    nets = port.build(args, CPU, "fp32")
    for optimiser, lr in (nets.opt_g, 0.1), (nets.opt_d, 0.2):
        (group,) = optimiser.param_groups
        assert (optimiser.rate, group["betas"], group["eps"]) == (lr, (0.3, 0.999), 1e-7)


# The losses and the step

def prepared(*flags):
    """Arguments, and what a step changes, in float64."""
    args = parsed(*TINY, *flags)
    args.names = ["a", "b"] if args.conditional else []
    nets = port.build(args, CPU, "fp32")
    for network in nets.G.double(), nets.D.double():
        for value in network.parameters():
            value.data.add_(0.05 * torch.randn_like(value))
    nets.pairs = []  # which .double() has parted from the networks
    nets.opt_g, nets.opt_d = (port.Optimiser(network.parameters(), 0.001, **nets.adam) for network in (nets.G, nets.D))
    return args, nets


@pytest.fixture
def double(monkeypatch):
    """Steps in float64 throughout."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def inputs(args, step=1):
    """A batch as train_step takes it; of two classes by turns where there are any."""
    generator = torch.Generator().manual_seed(step)
    real = torch.randint(0, 256, (8, 28, 28, 1), dtype=torch.uint8, generator=generator)
    labels = [F.one_hot(torch.arange(8) % 2, 2).double()] if args.conditional else []
    z, uniform, weight = port.draws(args, step, CPU, 0, 1)
    torch.manual_seed(step)
    return real, *labels, z.double(), uniform.double(), weight


def slopes(judge, x):
    """The length of the gradient of each picture's score, one picture at a time."""
    lengths = []
    for i in range(len(x)):
        one = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(one)[i, 0], one, create_graph=True)
        lengths.append((gradient[i] ** 2).sum().sqrt())
    return torch.stack(lengths)


def learn(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def textbook(kind, G, D, opt_g, opt_d, real, labels, z, z2, mix):
    """The iteration written out; returns the metrics."""
    G.eval()
    fake = G(torch.cat([*labels, z], 1)).detach()
    G.train()

    def judge(x):
        return D(x, *labels, logits=True)

    def bce(logit, target):
        return nn.BCELoss()(logit.sigmoid(), torch.full_like(logit, target))

    r = judge(real)
    d_real = r.sigmoid().mean()
    if kind == "bce":
        of_real = bce(r, 1.0)
        learn(opt_d, of_real)
        f = judge(fake)
        of_fake = bce(f, 0.0)
        learn(opt_d, of_fake)
        d_loss = (of_real + of_fake) / 2
    else:
        f = judge(fake)
        d_loss = {"hinge": ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean()) / 2,
                  "lsgan": ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2, "wgan-gp": (f.mean() - r.mean()) / 2}[kind]
        if kind == "wgan-gp":
            between = real + (fake - real) * mix[:, None, None, None]
            d_loss = d_loss + 10 * ((slopes(judge, between) - 1) ** 2).mean() / 2
        learn(opt_d, d_loss)
    g = judge(G(torch.cat([*labels, z2], 1)))
    g_loss = {"bce": bce(g, 1.0), "lsgan": ((g - 1) ** 2).mean()}.get(kind, -g.mean())
    learn(opt_g, g_loss)
    return torch.stack([d_loss, g_loss, d_real, f.sigmoid().mean()]).detach()


@pytest.mark.parametrize("flags", ARCHES, ids=["dense", "dcgan with labels"])
@pytest.mark.parametrize("kind", LOSSES)
def test_steps_are_the_textbooks(kind, flags, double):
    """Plain code ends with the same metrics, weights and statistics, by gradient descent."""
    args, nets = prepared("--loss", kind, *flags)
    G, D = copy.deepcopy(nets.G), copy.deepcopy(nets.D)
    nets.opt_g, nets.opt_d, opt_g, opt_d = (torch.optim.SGD(net.parameters(), 0.02) for net in (nets.G, nets.D, G, D))
    before = [value.clone() for value in (*nets.G.parameters(), *nets.D.parameters())]
    total = 0
    for step in 1, 2, 3:
        real, *labels, z, uniform, _ = batch = inputs(args, step)
        z2 = torch.randn_like(z)
        torch.manual_seed(step)
        D.requires_grad_(True)
        expected = textbook(kind, G, D, opt_g, opt_d, real.permute(0, 3, 1, 2).double() / 127.5 - 1, labels, z, z2,
                            uniform[:, 0])
        port.train_step(nets, args, batch)
        torch.testing.assert_close(nets.last.double(), expected, rtol=1e-5, atol=1e-6)
        total = total + expected
    torch.testing.assert_close(nets.sums.double(), total, rtol=1e-5, atol=1e-5)
    for ours, theirs in (nets.G, G), (nets.D, D):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    after = [*nets.G.parameters(), *nets.D.parameters()]
    assert sum((a - b).abs().max() < 1e-6 for a, b in zip(before, after)) == (kind in NO_BIAS)


def test_the_penalty_is_of_slopes_that_are_known():
    """Of a plane its slope wherever one looks; of a bowl the way to the middle, from a place between the pictures."""
    real, fake, mix = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double(), torch.rand(3, 1).double()
    plane = torch.randn(16).double()
    flat = port.gradient_penalty(lambda x: x.flatten(1) @ plane[:, None], real, fake, mix)
    torch.testing.assert_close(flat, (plane.norm() - 1) ** 2)
    bowl = port.gradient_penalty(lambda x: x.flatten(1).square().sum(1, keepdim=True) / 2, real, fake, mix)
    lengths = [((1 - mix[i]) * real[i] + mix[i] * fake[i]).norm() for i in range(3)]
    torch.testing.assert_close(bowl, sum((length - 1) ** 2 for length in lengths) / 3)


@pytest.mark.parametrize("flags", ARCHES, ids=["dense", "dcgan with labels"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_changes_both_networks_and_bce_takes_two_of_the_discriminator(kind, flags, double):
    args, nets = prepared("--loss", kind, *flags)
    before, counts = [copy.deepcopy(net.state_dict()) for net in (nets.G, nets.D)], dict(opt_g=0, opt_d=0)
    for name in counts:
        optimiser = getattr(nets, name)

        def step(name=name, really=optimiser.step):
            counts[name] += 1
            return really()
        optimiser.step = step
    port.train_step(nets, args, inputs(args))
    assert counts == dict(opt_g=1, opt_d=2 if kind == "bce" else 1)
    for net, old in zip((nets.G, nets.D), before):
        for name, parameter in net.named_parameters():
            moved = name != "logit.bias" or kind not in NO_BIAS
            assert torch.equal(parameter, old[name]) != moved and parameter.isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_with_fp16s_scaler_too_each_optimiser_takes_its_steps(kind):
    """The scaler allows an optimiser one step between two updates, and bce has two of the discriminator."""
    args, _ = prepared("--loss", kind)
    nets = port.build(args, CPU, "fp16")
    assert nets.scaler.is_enabled()
    nets.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # at which nothing overflows
    before = {name: value.clone() for name, value in nets.D.state_dict().items()}
    port.train_step(nets, args, [part.float() if part.is_floating_point() else part for part in inputs(args)])
    steps = {state["step"].item() - port.Optimiser.OFFSET for state in nets.opt_d.state.values()}
    assert steps == {2 if kind == "bce" else 1}
    assert nets.last.isfinite().all() and not torch.equal(before["layers.1.weight"], nets.D.layers[1].weight)


@pytest.mark.parametrize("augment", ["none", "on"])
@pytest.mark.parametrize("flags", ARCHES, ids=["dense", "dcgan with labels"])
def test_what_the_networks_are_given(flags, augment, double):
    """Two noises, the first in inference mode; labels everywhere; all that is judged is augmented alike.

    The discriminator stands still for the second, which costs it no gradients.
    """
    args, nets = prepared("--augment", augment, *flags)
    real, *labels, z, uniform, _ = batch = inputs(args)
    z2 = torch.randn_like(z)
    torch.manual_seed(1)
    made, judged, learns, G = [], [], [], copy.deepcopy(nets.G)
    nets.G.register_forward_hook(lambda net, given, output: made.append((given[0].clone(), net.training)))
    nets.D.register_forward_hook(lambda net, given, output: judged.append([x.detach().clone() for x in given]))
    nets.D.register_forward_hook(lambda net, given, output: learns.append(net.logit.weight.requires_grad))
    with torch.no_grad():
        first, second = G.eval()(torch.cat([*labels, z], 1)), G.train()(torch.cat([*labels, z2], 1))
    port.train_step(nets, args, batch)
    assert [training for _, training in made] == [False, True] and learns == [True, True, False]
    assert torch.equal(made[0][0], torch.cat([*labels, z], 1)) and torch.equal(made[1][0], torch.cat([*labels, z2], 1))
    assert not torch.equal(z, z2)
    for (x, *told), plain in zip(judged, (real.permute(0, 3, 1, 2) / 127.5 - 1, first, second), strict=True):
        torch.testing.assert_close(x, port.augment(plain.double(), uniform) if augment == "on" else plain.double())
        assert len(told) == len(labels) and all(map(torch.equal, told, labels))
    for name, value in G.state_dict().items():  # which has seen the second noise in training, and the first not
        if "running" in name:
            torch.testing.assert_close(nets.G.state_dict()[name], value)
            assert value.sub(value.new_tensor(float("var" in name))).abs().max() > 1e-3


def test_real_pictures_are_mirrored_where_asked_and_nothing_else_is(double):
    args, nets = prepared("--flip")
    real, z, uniform, _ = batch = inputs(args)
    judged = []
    nets.D.register_forward_hook(lambda net, given, output: judged.append(given[0].detach().clone()))
    port.train_step(nets, args, batch)
    x, mirrored = real.permute(0, 3, 1, 2) / 127.5 - 1, uniform[:, 0] < 0.5
    assert 0 < mirrored.sum() < 8
    for i in range(8):
        torch.testing.assert_close(judged[0][i], (x[i].flip(2) if mirrored[i] else x[i]).double())


def test_a_resting_discriminator_keeps_its_weights_and_its_metrics(double):
    args, nets = prepared()
    port.train_step(nets, args, inputs(args))
    d, g, last = [p.clone() for p in nets.D.parameters()], [p.clone() for p in nets.G.parameters()], nets.last.clone()
    port.train_step(nets, args, inputs(args, 2), train_d=False)
    assert all(map(torch.equal, d, nets.D.parameters())) and not any(map(torch.equal, g, nets.G.parameters()))
    assert (nets.last == last).tolist() == [True, False, True, True]


def test_d_every_lets_the_discriminator_rest(root, tmp_path, undrawn, monkeypatch):
    trained, step = [], port.train_step
    monkeypatch.setattr(port, "train_step", lambda nets, args, given, train_d: trained.append(train_d) or step(
        nets, args, given, train_d))
    run("--data", "synthetic", "--root", root, "--steps", 7, "--d-every", 3, "--no-report", "--out", tmp_path / "run",
        *TINY)
    assert trained == [False, False, True, False, False, True, False]


# Classes

@pytest.fixture(scope="module")
def bags(root):
    """A run with labels, of two classes, with a generator so that labels matter."""
    out = root / "bags"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "draw_run", lambda *args: None)
        run("--data", "synthetic", "--classes", "T-shirt", "Bag", "--root", root, "--conditional", "--steps", 12,
            "--lr", 0.05, "--no-report", "--out", out, *TINY)
    return out


def generator_of(out):
    """The generator of models.pth, made without the script's own loading."""
    saved = torch.load(out / "models.pth", weights_only=True)
    generator = port.Generator(saved["config"]["width"], len(saved["config"]["names"]), saved["config"]["arch"])
    generator.load_state_dict(saved["Generator"], strict=True)
    return generator.eval().requires_grad_(False)


def test_a_run_with_labels_trains_both_networks_on_them(root, tmp_path, undrawn, monkeypatch):
    """Each picture comes with the label of its class: here the picture itself is one grey for each class."""
    for name, grey in ("dark", 40), ("light", 200):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (28, 28), grey).save(tmp_path / "set" / name / f"{i}.png")
    seen, step = [], port.train_step

    def spy(nets, args, given, train_d):
        before = [nets.G.layers[0].weight.clone(), nets.D.of_class.weight.clone()]
        step(nets, args, given, train_d)
        seen.append((given, before, [nets.G.layers[0].weight.clone(), nets.D.of_class.weight.clone()]))

    monkeypatch.setattr(port, "train_step", spy)
    run("--data", tmp_path / "set", "--root", root, "--conditional", "--steps", 5, "--no-report", "--out",
        tmp_path / "run", *TINY)
    assert len(seen) == 5
    for (real, labels, z, *_), before, after in seen:
        assert labels.shape == (8, 2) and labels.dtype == torch.float and (labels.sum(1) == 1).all()
        assert labels.argmax(1).tolist() == [int(picture.min() == 200) for picture in real] and z.shape == (8, 100)
        assert before[0].shape[1] == 102 and all(not torch.equal(a, b) for a, b in zip(before, after))
        assert not any(torch.equal(before[0][:, i], after[0][:, i]) for i in (0, 1))
    saved = torch.load(tmp_path / "run" / "models.pth", weights_only=True)
    assert saved["config"]["names"] == ["dark", "light"]


@pytest.mark.parametrize("count, labels, expected", [
    (4, "Bag", [1] * 4), (3, "0", [0] * 3), (4, "1,T-shirt", [1, 1, 0, 0]), (5, " t-SHIRT ,1", [0, 0, 0, 1, 1]),
    (6, None, [0] * 3 + [1] * 3), (70, "0,1", [0] * 35 + [1] * 35)])
def test_pictures_of_the_labels_asked_for(count, labels, expected, bags, tmp_path):
    flags = "--checkpoint", bags / "models.pth", "--device", "cpu", *(["--labels", labels] if labels else [])
    run("--generate", count, "--save", tmp_path / "g.npz", *flags)
    with np.load(tmp_path / "g.npz") as archive:
        images, told = archive["images"], archive["labels"]
    assert told.tolist() == expected and images.shape == (count, 28, 28)
    numbers, generator = torch.Generator().manual_seed(0), generator_of(bags)
    z = torch.cat([torch.randn(64, 100, generator=numbers) for _ in range(0, count, 64)])[:count]
    for wanted, near in (expected, True), ([1 - label for label in expected], False):
        made = generator(torch.cat([F.one_hot(torch.tensor(wanted), 2), z], 1))
        apart = np.abs(images - (made[:, 0].numpy() + 1) * 127.5).max((1, 2))
        assert apart.max() <= 1.01 if near else apart.min() > 3


def test_what_a_generator_is_told_is_one_hot():
    args = parsed("--conditional")
    args.names = ["a", "b", "c"]
    assert port.condition(args, 6).tolist() == torch.eye(3).repeat_interleave(2, 0).tolist()
    args.labels = "c,0"
    assert port.condition(args, 4).argmax(1).tolist() == [2, 2, 0, 0]
    assert port.condition(parsed(), 5).shape == (5, 0)


def test_one_noise_is_the_same_noise_through_both_classes(bags):
    grid = np.asarray(Image.open(bags / "one_noise.png").convert("L")).astype(int)
    assert grid.shape == (8 * 30 + 2, 2 * 30 + 2)
    z = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    for row, column in itertools.product(range(8), range(2)):
        made = generator_of(bags)(torch.cat([torch.eye(2)[column], z[row]])[None])[0, 0]
        cell = grid[2 + 30 * row : 30 + 30 * row, 2 + 30 * column : 30 + 30 * column]
        assert np.abs(cell - (made.numpy() + 1) * 127.5).max() <= 1.01


def plain(path):
    """A folder of pictures without classes, and the name of a run without them."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(20):
        port.draw_picture(i).resize((28, 28)).save(path / f"{i}.png")
    return path


def test_what_labels_need(root, bags, tmp_path, undrawn, capsys):
    """Each is one line, and nothing is written."""
    data = "--data", "synthetic", "--root", root, "--out", tmp_path / "run", *TINY
    assert "--classes" in fails(capsys, *data, "--conditional", "--labels", "Bag")
    assert "--classes" in fails(capsys, *data, "--labels", "Bag")
    assert "has no classes" in fails(capsys, "--data", plain(tmp_path / "set"), "--root", root, "--out",
                                     tmp_path / "run", "--conditional", *TINY)
    assert "has no classes" in fails(capsys, *data, "--conditional", "--classes", "Bag")
    assert not (tmp_path / "run").exists()
    use = "--generate", 2, "--save", tmp_path / "g.npz"
    assert "'Dress'" in fails(capsys, *use, "--checkpoint", bags / "models.pth", "--labels", "Dress")
    assert "'2'" in fails(capsys, *use, "--checkpoint", bags / "models.pth", "--labels", "0,2")
    run("--data", tmp_path / "set", "--root", root, "--out", tmp_path / "run", "--steps", 1, "--no-report", *TINY)
    line = fails(capsys, *use, "--checkpoint", tmp_path / "run" / "models.pth", "--labels", "0")
    assert "--labels" in line and "--conditional" in line
    assert not (tmp_path / "g.npz").exists() and not (tmp_path / "run" / "one_noise.png").exists()


# The report

@pytest.fixture(scope="module")
def reported(root):
    """A run without labels that ends with a report; its classifier serves the tests below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "draw_run", lambda *args: None)
        run("--data", "synthetic", "--root", root, "--steps", 2, "--out", root / "run", *TINY)
    return root / "run"


class Fixed(nn.Module):
    """A generator that gives known pictures, float N,1,28,28: number k of them where z's first number says so."""
    def __init__(self, pictures, choose):
        super().__init__()
        self.pictures, self.choose, self.count, self.asked = pictures, choose, 0, []

    def forward(self, z):
        self.asked.append(z[:, : z.shape[1] - 100].clone())
        which = self.choose(torch.arange(self.count, self.count + len(z)), z)
        self.count += len(z)
        return self.pictures[which] / 127.5 - 1


def drawn_tests():
    """The test pictures of --data synthetic, five of each class in their order, N,1,28,28."""
    args = parsed("--data", "synthetic-test")
    pictures = [port.square(port.draw_picture(i), 28, 1) for i in sorted(range(80, 100), key=lambda i: i % 4)]
    assert args.size == 28
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


def report_of(models, root, monkeypatch, choose):
    """(figures, the generator) of --report with known pictures in place of those that the model makes."""
    fixed = Fixed(drawn_tests(), choose)
    monkeypatch.setattr(port, "train_classifier", None)  # there is one beside the pack
    monkeypatch.setattr(port, "load_generator", lambda *args: fixed)
    return run("--report", "--checkpoint", models, "--root", root, "--device", "cpu"), fixed


def test_training_ends_with_a_report_unless_told_not_to(reported, bags):
    figures = json.loads((reported / "report.json").read_text())
    assert list(figures["by_class"]) == DRAWN and not (bags / "report.json").exists()
    assert sum(row["share"] for row in figures["by_class"].values()) == pytest.approx(1)
    assert [row["real_share"] for row in figures["by_class"].values()] == [0.25] * 4
    assert all(set(row) == {"share", "real_share"} for row in figures["by_class"].values())
    assert "read_as_asked" not in figures and not (reported / "one_noise.png").exists()
    assert figures["classifier_accuracy"] > 0.9 and figures["frechet"] > figures["frechet_floor"] > 0


def test_a_report_on_real_pictures_has_each_classs_share(reported, root, monkeypatch, capsys):
    figures, _ = report_of(reported / "models.pth", root, monkeypatch, lambda i, z: i % 20)
    assert figures["vanished"] == [] and "vanished" not in capsys.readouterr().out
    wrong = 1 - figures["classifier_accuracy"]
    for row in figures["by_class"].values():
        assert row["share"] == pytest.approx(0.25, abs=wrong + 1e-3)
    assert figures["frechet"] < 0.03 < json.loads((reported / "report.json").read_text())["frechet"] / 10


@pytest.mark.parametrize("kept", [[0], [0, 1], [1, 2, 3]])
def test_classes_that_have_vanished_are_named_and_warned_of(kept, reported, root, monkeypatch, capsys):
    """A generator that gives one picture, or pictures of some classes only; it is put down in figures and in words."""
    places = torch.tensor([5 * label + 1 for label in kept])
    figures, _ = report_of(reported / "models.pth", root, monkeypatch, lambda i, z: places[i % len(kept)])
    gone = [name for label, name in enumerate(DRAWN) if label not in kept]
    assert figures["vanished"] == gone
    assert [figures["by_class"][name]["share"] for name in gone] == [0] * len(gone)
    for label in kept:
        assert figures["by_class"][DRAWN[label]]["share"] == pytest.approx(1 / len(kept), abs=1e-3)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    assert f"{len(gone)} of 4 classes" in line and ", ".join(gone) in line


@pytest.mark.parametrize("share, vanished", [(0.02, ["Bag"]), (0.03, [])])
def test_a_class_has_vanished_below_a_tenth_of_its_share(share, vanished, reported, root, monkeypatch):
    def choose(i, z):
        rare = i % 100 < round(100 * share)
        return torch.where(rare, torch.tensor(16), 5 * (i % 3) + 1)
    figures, _ = report_of(reported / "models.pth", root, monkeypatch, choose)
    assert figures["vanished"] == vanished
    assert figures["by_class"]["Bag"]["share"] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
def test_with_labels_pictures_are_asked_for_as_the_test_set_has_them(shift, reported, root, tmp_path, monkeypatch):
    """And read as asked, or all as another class."""
    args = parsed("--conditional", "--data", "synthetic", "--root", root, *TINY)
    args.names = DRAWN
    torch.save(dict(Generator={}, config=dict(vars(args), script=port.SCRIPT)), tmp_path / "models.pth")
    figures, fixed = report_of(tmp_path / "models.pth", root, monkeypatch,
                               lambda i, z: (z[:, :4].argmax(1) + shift) % 4 * 5 + 1)
    assert torch.cat(fixed.asked).sum(0).tolist() == [2500] * 4
    assert figures["read_as_asked"] == (0 if shift else 1) and figures["vanished"] == []
    assert [row["read_as_asked"] for row in figures["by_class"].values()] == [1 - shift] * 4


def test_a_run_with_labels_ends_with_a_report(reported, root, tmp_path, undrawn, monkeypatch, capsys):
    monkeypatch.setattr(port, "train_classifier", None)
    run("--data", "synthetic", "--root", root, "--steps", 1, "--conditional", "--out", tmp_path / "run", *TINY)
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(figures["by_class"]) == DRAWN and "read_as_asked" in figures
    assert all(set(row) == {"share", "real_share", "read_as_asked"} for row in figures["by_class"].values())
    out = capsys.readouterr().out
    assert all(name in out for name in DRAWN) and "read as asked" in out and "Fréchet distance" in out
    assert (tmp_path / "run" / "one_noise.png").exists()


# The drawings

def test_drawings_are_of_four_classes_and_follow_from_their_number():
    pictures = np.stack([port.square(port.draw_picture(i), 28, 1) for i in range(40)])
    again = np.stack([port.square(port.draw_picture(i), 28, 1) for i in reversed(range(40))])[::-1]
    assert np.array_equal(pictures, again) and pictures.shape == (40, 28, 28, 1) and port.DRAWN == tuple(DRAWN)
    assert len({picture.tobytes() for picture in pictures}) == 40
    assert all(picture.max() > 90 and (picture == 0).mean() > 0.2 for picture in pictures)
    shapes = (pictures > 60).reshape(10, 4, -1).astype(float)
    of_class = shapes.mean(0)
    for picture, label in itertools.product(range(10), range(4)):  # nearer to its own class than to the others
        assert np.abs(of_class - shapes[picture, label]).mean(1).argmin() == label
    args = parsed("--data", "synthetic")
    _, found = port.list_pictures(args)
    assert [name.split("/")[0] for name in found] == [name for name in DRAWN for _ in range(20)]


# The notebook

def notebook():
    """The script as an editor or jupytext opens it."""
    return jupytext.reads(Path(port.__file__).read_text(), fmt="py:percent")


def test_each_section_of_the_notebook_is_explained():
    cells = notebook().cells
    assert len(cells) >= 20 and [cell.cell_type for cell in cells[1:]] == ["markdown", "code"] * (len(cells) // 2)
    for cell in cells[1::2]:
        words = [word for word in cell.source.split() if any(map(str.isalpha, word))]
        assert cell.source.startswith("#") and len(words) >= 40, f"{len(words)} words: {cell.source}"


def test_the_notebook_runs_from_top_to_bottom_and_shows_its_pictures(tmp_path):
    book, flags = notebook(), ["--data", str(plain(tmp_path / "set")), "--steps", "11", "--out", "run", *TINY]
    source = book.cells[-1].source
    book.cells[-1].source = source.replace("\n    main()\n", f"\n    main({flags})\n")
    assert book.cells[-1].source != source
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = itertools.chain.from_iterable(cell.get("outputs", ()) for cell in book.cells)
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", ())]
    for name, picture in zip(("loss_g.png", "comparison.png"), pictures, strict=True):
        assert base64.b64decode(picture) == (tmp_path / "run" / name).read_bytes()


def test_outside_a_notebook_nothing_is_shown(root, tmp_path, undrawn, monkeypatch):
    """draw_run makes no picture here, so to show one would fail."""
    monkeypatch.setattr(port.sys, "modules", {name: module for name, module in port.sys.modules.items()
                                              if name != "ipykernel"})
    run("--data", "synthetic", "--root", root, "--steps", 1, "--no-report", "--out", tmp_path / "run", *TINY)
    assert (tmp_path / "run" / "models.pth").exists() and not (tmp_path / "run" / "comparison.png").exists()
