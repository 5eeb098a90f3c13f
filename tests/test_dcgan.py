"""What is dcgan.py's own: the paper's networks, small sets, classes, walks through z, and its curves."""
import copy
import filecmp
import itertools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import dcgan
from test_bad_input import DATA, changed, cut, error_line
from test_data import png_of, zipped

CPU = torch.device("cpu")
TINY = "--width", "2", "--size", "32", "--batch-size", "8", "--precision", "fp32", "--device", "cpu"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def parsed(*argv):
    """The arguments that a command line gives."""
    return dcgan.parse(list(map(str, argv)))[0]


def run(*argv):
    """Run the command line in this process."""
    dcgan.main(list(map(str, argv)))


def fails(capsys, *argv):
    """The error line of a command line, which has to end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


def crests(folder, count, first=0, size=40):
    """A folder of small drawn crests."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        dcgan.draw_picture(i).resize((size, size)).save(folder / f"{i - first}.png")
    return folder


def solids(folder, colour, count):
    """A folder of pictures that are one colour, darker from one to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), tuple(value - 3 * i if value else 0 for value in colour)).save(folder / f"{i}.png")
    return folder


def weights(network):
    return copy.deepcopy(network.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step_of(out):
    """How far a run folder's checkpoint is."""
    return torch.load(out / "checkpoint.pt", weights_only=True)["step"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags of a quick run on 45 crests."""
    folder = tmp_path_factory.mktemp("dcgan")
    return "--data", crests(folder / "set", 45), "--root", folder / "root", *TINY


@pytest.fixture
def undrawn(monkeypatch):
    """Runs that leave out the curves, which take longer than a few steps do."""
    monkeypatch.setattr(dcgan, "draw_run", lambda *args: None)


# The networks

def paper(width=64):
    """DCGAN's generator and discriminator for 64x64 RGB, layer by layer, as the paper and its tutorials have them."""
    a, b, c, d = 8 * width, 4 * width, 2 * width, width
    generator = nn.Sequential(
        nn.ConvTranspose2d(100, a, 4, 1, 0, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
        nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
        nn.ConvTranspose2d(b, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
        nn.ConvTranspose2d(c, d, 4, 2, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(),
        nn.ConvTranspose2d(d, 3, 4, 2, 1, bias=False), nn.Tanh())
    discriminator = nn.Sequential(
        nn.Conv2d(3, d, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(d, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(0.2),
        nn.Conv2d(c, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2),
        nn.Conv2d(b, a, 4, 2, 1, bias=False), nn.BatchNorm2d(a), nn.LeakyReLU(0.2),
        nn.Conv2d(a, 1, 4, 1, 0, bias=False))
    return generator, discriminator


def take_weights(network, other):
    """Give `network` the weights and statistics of one that has the same layers under other names."""
    network.load_state_dict(dict(zip(network.state_dict(), other.state_dict().values(), strict=True)))


def convolutions(network):
    """What each convolution is, in order."""
    found = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    return [(type(m), m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.bias) for m in found]


@pytest.fixture(scope="module")
def classic():
    """(generator, discriminator) of --recipe classic at full width."""
    torch.manual_seed(0)
    return dcgan.make_networks(parsed("--recipe", "classic"))


def test_classic_has_the_papers_layers_and_as_many_weights(classic):
    for ours, theirs, count in zip(classic, paper(), (3_576_704, 2_765_568)):
        assert convolutions(ours) == convolutions(theirs)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == count


@pytest.mark.parametrize("training", [True, False])
def test_classic_computes_what_the_paper_does_and_has_its_gradients(classic, training):
    for ours, theirs, x in zip(copy.deepcopy(classic), paper(), (torch.randn(3, 100, 1, 1), torch.randn(3, 3, 64, 64))):
        take_weights(theirs, ours)
        values = [net.train(training)(x) for net in (ours, theirs)]
        torch.testing.assert_close(values[0], values[1].view_as(values[0]), rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(value.square().sum(), net.parameters())
                 for value, net in zip(values, (ours, theirs))]
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("recipe", ["classic", "robust"])
def test_first_weights_are_the_papers(recipe):
    torch.manual_seed(1)
    for network in dcgan.make_networks(parsed("--recipe", recipe)):
        for name, weight in network.named_parameters():
            norm = weight.dim() == 1
            if name.endswith("bias"):
                assert norm and (weight == 0).all()
                continue
            mean, error = float(norm), 5 * 0.02 / weight.numel() ** 0.5
            assert weight.mean().item() == pytest.approx(mean, abs=error)
            assert weight.std().item() == pytest.approx(0.02, abs=error)


def test_robust_differs_from_classic_by_one_channel_of_spread():
    _, d = dcgan.make_networks(parsed("--width", 2))
    _, plain = dcgan.make_networks(parsed("--width", 2, "--recipe", "classic"))
    assert d.logit.in_channels == plain.logit.in_channels + 1
    alike, apart = torch.randn(1, 3, 64, 64).expand(4, -1, -1, -1), torch.randn(4, 3, 64, 64)
    seen = []
    d.logit.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for x in (alike, apart):
        d(x)
    features = d.layers(apart)
    deviation = features.std(0, unbiased=False).mean()
    assert seen[0][:, -1].abs().max() < 1e-3 < deviation
    assert torch.equal(seen[1][:, :-1], features)
    torch.testing.assert_close(seen[1][:, -1], deviation.expand(4, 4, 4), rtol=1e-3, atol=1e-5)


SIZES = {32: [64, 128, 256], 64: [64, 128, 256, 512], 128: [64, 128, 256, 512, 512], 256: [64, 128, 256, 512, 512, 512]}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_goes_from_and_to_4x4_by_doubling(size, channels):
    assert dcgan.widths(size, 64) == SIZES[size]
    g, d = dcgan.make_networks(parsed("--size", size, "--channels", channels, "--width", 1))
    seen, narrow = [], [width // 64 for width in SIZES[size]]
    for layer in (*g.modules(), *d.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    pictures = g(torch.randn(2, 100))
    assert pictures.shape == (2, channels, size, size) and pictures.abs().max() <= 1
    assert d(pictures).shape == (2,)
    sides = [size >> i for i in range(1, len(narrow) + 1)]
    assert sides[-1] == 4
    inner = [(width, side, side) for width, side in zip(narrow, sides)]
    assert seen == [*reversed(inner), (channels, size, size), *inner, (1, 1, 1)]


def test_width_is_in_proportion_everywhere():
    g, d = dcgan.make_networks(parsed("--width", 3))
    assert [m.num_features for m in g.modules() if isinstance(m, nn.BatchNorm2d)] == [24, 12, 6, 3]
    assert [m.num_features for m in d.modules() if isinstance(m, nn.BatchNorm2d)] == [6, 12, 24]


# The recipes

def test_classic_is_the_paper_with_nothing_added():
    args = parsed("--recipe", "classic", "--width", 2)
    assert args.augment == "none" and args.flip is False and args.ema == 0 and args.held_out == 0
    nets = dcgan.build(args, CPU, "fp32")
    for optimiser in (nets.opt_g, nets.opt_d):
        group = optimiser.param_groups[0]
        assert type(optimiser) is torch.optim.Adam and len(optimiser.param_groups) == 1
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.5, 0.999), 1e-8)
        assert group["weight_decay"] == 0 and not group["amsgrad"]
    dcgan.settle(args, photographs(20), 1)  # which robust would mirror and augment
    assert args.augment == "none" and args.flip is False
    kept, held_out = dcgan.hold_out(args, 1000)
    assert len(kept) == 1000 and len(held_out) == 0


def test_the_average_of_classic_is_the_generator_itself():
    args, nets = prepared("--recipe", "classic")
    for step in (1, 2):
        dcgan.train_step(nets, args, inputs(args, step))
        now = {name: value for name, value in nets.G.state_dict().items() if value.is_floating_point()}
        assert same(now, {name: nets.ema.state_dict()[name] for name in now})


def test_a_flag_given_by_hand_wins_over_the_recipe():
    args = parsed("--recipe", "classic", "--augment", "on", "--flip", "--held-out", 0.1, "--beta1", 0.3, "--ema", 0.9)
    assert (args.augment, args.flip, args.held_out, args.beta1, args.ema) == ("on", True, 0.1, 0.3, 0.9)
    assert args.lr == 2e-4


# The training step

def prepared(*flags):
    """Arguments and what a step changes, with neither augmentation nor flips."""
    args = parsed("--width", 2, "--batch-size", 4, "--augment", "none", "--no-flip", *flags)
    return args, dcgan.build(args, CPU, "fp32")


def inputs(args, step=1):
    generator = torch.Generator().manual_seed(step)
    real = torch.randint(0, 256, (4, args.size, args.size, 3), dtype=torch.uint8, generator=generator)
    return real, *dcgan.draws(args, step, CPU, 0, 1)


@pytest.mark.parametrize("recipe", ["classic", "robust"])
def test_a_step_is_the_textbook_one(recipe):
    """The paper's networks in a loop written out plainly end with the same weights, by SGD, and the same metrics."""
    args, nets = prepared("--recipe", recipe)
    G, D = copy.deepcopy(nets.G), copy.deepcopy(nets.D)
    if recipe == "classic":
        G, D = paper(2)
        take_weights(G, nets.G), take_weights(D, nets.D)
    nets.opt_g, nets.opt_d, opt_g, opt_d = (torch.optim.SGD(n.parameters(), 0.05) for n in (nets.G, nets.D, G, D))
    bce, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(4), torch.zeros(4)
    for step in (1, 2, 3):
        batch = inputs(args, step)
        dcgan.train_step(nets, args, batch)
        real, fake = batch[0].permute(0, 3, 1, 2) / 127.5 - 1, G(batch[1][:, :, None, None])
        opt_d.zero_grad()
        of_real, of_fake = D(real).flatten(), D(fake.detach()).flatten()
        loss_d = bce(of_real, ones) + bce(of_fake, zeros)
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        again = D(fake).flatten()
        loss_g = bce(again, ones)
        loss_g.backward()
        opt_g.step()
        metrics = dict(loss_d=loss_d, loss_g=loss_g, d_real=of_real.sigmoid().mean(), d_fake=again.sigmoid().mean(),
                       d_fake_after=of_fake.sigmoid().mean())
        assert tuple(metrics) == dcgan.METRICS
        torch.testing.assert_close(nets.last, torch.stack(list(metrics.values())), rtol=1e-3, atol=1e-5)
    for ours, theirs in ((nets.G, G), (nets.D, D)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_d_fake_is_before_the_generators_step_and_d_fake_after_what_comes_of_it():
    """A discriminator that learns nothing judges the same z's pictures twice, by generators one step apart."""
    args, nets = prepared("--recipe", "classic", "--d-lr", 0, "--lr", 0.01)
    batch = inputs(args)
    dcgan.train_step(nets, args, batch)
    first = dict(zip(dcgan.METRICS, nets.last.tolist()))
    dcgan.train_step(nets, args, batch)
    second = dict(zip(dcgan.METRICS, nets.last.tolist()))
    assert first["d_fake"] == pytest.approx(first["d_fake_after"], abs=1e-6)  # nothing has moved between the two
    assert second["d_fake_after"] > first["d_fake"] + 1e-4  # the generator's step was worth this much


def test_a_resting_discriminator_keeps_its_weights_and_its_metrics():
    args, nets = prepared()
    dcgan.train_step(nets, args, inputs(args))
    d, g, last = [p.clone() for p in nets.D.parameters()], weights(nets.G), nets.last.clone()
    dcgan.train_step(nets, args, inputs(args, 2), train_d=False)
    assert all(map(torch.equal, d, nets.D.parameters())) and not same(g, weights(nets.G))
    assert (nets.last == last).tolist() == [name not in ("loss_g", "d_fake") for name in dcgan.METRICS]


def test_augmentation_is_in_all_three_passes_of_the_discriminator(monkeypatch):
    args, nets = prepared("--augment", "on")
    batch, seen = inputs(args), []
    nets.D.register_forward_hook(lambda module, given, output: seen.append(given[0].detach()))
    with torch.no_grad():
        real, fake = dcgan.to_float(batch[0], batch[2], False), copy.deepcopy(nets.G)(batch[1])
    dcgan.train_step(nets, args, batch)
    for x, plain in zip(seen, (real, fake, fake), strict=True):
        torch.testing.assert_close(x, dcgan.augment(plain, batch[2]))
        assert not torch.allclose(x, plain, atol=0.1)


# Pictures held out

SHARES = [(45, 0.05, 2), (100, 0.3, 30), (19, 0.05, 0), (10, 0.5, 5), (7, 0.0, 0)]


@pytest.mark.parametrize("count, share, held", SHARES)
def test_holding_out_divides_the_pictures_by_the_seed(count, share, held):
    kept, held_out = dcgan.hold_out(parsed("--held-out", share), count)
    assert len(held_out) == held and sorted([*kept.tolist(), *held_out.tolist()]) == list(range(count))
    again, other = (dcgan.hold_out(parsed("--held-out", share, "--seed", seed), count) for seed in (0, 1))
    assert torch.equal(kept, again[0]) and torch.equal(held_out, again[1])
    assert not torch.equal(kept, other[0])


def test_pictures_held_out_never_come_in_a_batch_and_all_others_do():
    args = parsed("--held-out", 0.2, "--batch-size", 4)
    kept, held_out = dcgan.hold_out(args, 50)
    pack = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None], (50, 2, 2, 3)).copy()
    source = dcgan.batches(pack, kept, args, CPU, 0, 1, 0)
    batches = torch.stack([batch for (batch,) in itertools.islice(source, 60)])
    epochs = batches[..., 0, 0, 0].view(6, 40).tolist()
    for epoch in epochs:
        assert sorted(epoch) == sorted(kept.tolist()) and not set(epoch) & set(held_out.tolist())
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_verdicts_are_a_plain_forward_in_training_mode_and_leave_no_trace():
    args, nets = prepared()
    for step in (1, 2):
        dcgan.train_step(nets, args, inputs(args, step))
    seen, held_out = (torch.randn(5, 3, 64, 64), torch.randn(3, 3, 64, 64))
    before, grads = weights(nets.D), [None if p.grad is None else p.grad.clone() for p in nets.D.parameters()]
    flags, plain = [p.requires_grad for p in nets.D.parameters()], copy.deepcopy(nets.D)
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)
    values = dcgan.verdicts(nets, (seen,), (held_out,))
    assert same(before, weights(nets.D)) and nets.D.training
    assert flags == [p.requires_grad for p in nets.D.parameters()]
    for grad, p in zip(grads, nets.D.parameters()):
        assert p.grad is None if grad is None else torch.equal(grad, p.grad)
    assert list(values) == ["d_seen", "d_held_out"]
    with torch.no_grad():
        for value, x in zip(values.values(), (seen, held_out)):
            assert value == pytest.approx(plain.train()(x).sigmoid().mean().item(), abs=1e-6)
    assert not same(before, weights(plain))  # the plain way does change the statistics


def test_metrics_csv_has_the_verdicts_on_pictures_trained_on_and_held_out(data, tmp_path, undrawn):
    run(*data, "--out", tmp_path, "--steps", 3, "--augment", "none", "--held-out", 0.2)
    head, row = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().split())
    assert head[-2:] == ["d_seen", "d_held_out"]
    saved = torch.load(tmp_path / "models.pth", weights_only=True)
    d = dcgan.Discriminator(32, 3, 2, spread=True)
    d.load_state_dict(saved["Discriminator"])
    pack, args = dcgan.load_pack(parsed(*data)), parsed("--held-out", 0.2)
    for numbers, value in zip(dcgan.hold_out(args, 45), row[-2:]):
        x = torch.from_numpy(pack[numbers.numpy()[:9]]).permute(0, 3, 1, 2) / 127.5 - 1
        assert float(value) == pytest.approx(d(x).sigmoid().mean().item(), abs=1e-4)


def test_the_comparison_shows_the_first_64_pictures_that_are_trained_on(data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(dcgan, "draw_run", lambda out, rows, real, fake: drawn.append((real, fake)))
    run("--data", crests(tmp_path / "set", 70, size=32), *data[2:], "--out", tmp_path / "run", "--steps", 1)
    pack = dcgan.load_pack(parsed("--data", tmp_path / "set", *data[2:]))
    kept, held_out = dcgan.hold_out(parsed(), 70)
    ((real, fake),) = drawn
    assert len(held_out) == 3 and fake.shape == (64, 3, 32, 32)
    assert np.array_equal(real.permute(0, 2, 3, 1), pack[kept.numpy()[:64]])


def test_watching_for_memory_changes_no_weight(data, tmp_path, undrawn, monkeypatch):
    run(*data, "--out", tmp_path / "watched", "--steps", 12)
    monkeypatch.setattr(dcgan, "verdicts", lambda nets, *watched: dict(d_seen=0.5, d_held_out=0.5))
    run(*data, "--out", tmp_path / "not", "--steps", 12)
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("watched", "not")]
    assert all(same(saved[0][name], saved[1][name]) for name in ("G", "D", "ema"))


@pytest.mark.parametrize("augment", ["none", "on"])
def test_a_set_of_which_one_picture_is_held_out_trains(augment, tmp_path, undrawn):
    places = "--data", crests(tmp_path / "set", 20), "--root", tmp_path / "root", "--out", tmp_path / "run"
    run(*places, "--steps", 2, "--augment", augment, *TINY)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["used"]["held_out"] == 1
    head, row = (line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().split())
    assert head[-1] == "d_held_out" and 0 < float(row[-1]) < 1


def rows_of(count, seen, held_out):
    """Rows of metrics.csv in which all is well but for what the discriminator remembers."""
    row = dict(step="10", loss_d="1", loss_g="1", d_real="0.6", d_fake="0.4", d_fake_after="0.4")
    return [{**row, **({} if seen is None else dict(d_seen=str(seen), d_held_out=str(held_out)))} for _ in range(count)]


@pytest.mark.parametrize("count, seen, held_out, worried", [
    (20, 0.9, 0.5, True), (40, 0.8, 0.5, True), (20, 0.7, 0.5, False), (19, 0.9, 0.5, False), (20, 0.5, 0.9, False),
    (20, None, None, False)])
def test_a_discriminator_that_memorises_is_a_worry(count, seen, held_out, worried):
    pictures = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    found = list(dcgan.worries(rows_of(count, seen, held_out), pictures, pictures))
    assert len(found) == worried
    if worried:
        assert "memorise" in found[0] and f"{seen:.2f}" in found[0] and f"{held_out:.2f}" in found[0]


def test_only_the_last_rows_count_for_the_worry():
    pictures = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    past, now = rows_of(20, 0.9, 0.4), rows_of(20, 0.5, 0.5)
    assert list(dcgan.worries(past + now, pictures, pictures)) == []
    assert len(list(dcgan.worries(now + past, pictures, pictures))) == 1


def test_a_worry_is_said_once(data, tmp_path, undrawn, capsys, monkeypatch):
    monkeypatch.setattr(dcgan, "LOG_EVERY", 1)
    monkeypatch.setattr(dcgan, "verdicts", lambda nets, *watched: dict(d_seen=0.9, d_held_out=0.2))
    run(*data, "--out", tmp_path, "--steps", 30)
    assert capsys.readouterr().out.count("warning: the discriminator begins to memorise") == 1


# What the set decides

def photographs(count, size=32):
    """A pack of pictures that fill their square, as photographs do: smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.BICUBIC)) for x in noise])


def drawn(count, size=32):
    """A pack of drawn crests."""
    return np.stack([np.asarray(dcgan.draw_picture(i).resize((size, size))) for i in range(count)])


def settled(pack, *flags, steps=100):
    """The arguments once a pack, of which an epoch is so many steps, has decided what they left open."""
    args = parsed(*flags)
    assert dcgan.settle(args, pack, steps) == ()
    return args


def test_crests_are_not_mirrored_and_photographs_are():
    assert settled(drawn(30)).flip is False
    assert settled(photographs(30)).flip is True
    assert settled(np.concatenate([drawn(30), photographs(10)])).flip is False
    assert settled(np.concatenate([drawn(10), photographs(30)])).flip is True
    assert settled(drawn(30)[..., :1]).flip is False and settled(photographs(30)[..., :1]).flip is True


def test_a_ground_of_any_colour_is_plain_and_a_little_noise_does_not_matter():
    pack = np.full((20, 32, 32, 3), 77, np.uint8)
    pack[:, 8:24, 8:24] = photographs(20, 16)
    jitter = np.random.default_rng(0).integers(0, 6, pack.shape, np.uint8)
    assert settled(pack).flip is False and settled(pack + jitter).flip is False
    pack[:, -1, 0] = 177  # one corner is another
    assert settled(pack).flip is True


def test_flip_and_no_flip_win():
    assert settled(drawn(30), "--flip").flip is True
    assert settled(photographs(30), "--no-flip").flip is False


def test_mirroring_reaches_the_training_step():
    """Half of the pictures are mirrored in a run on photographs, none in one on crests."""
    pack = photographs(8)
    uniform = torch.linspace(0, 0.99, 8)[:, None].expand(8, 8)
    seen = {"--flip": [], "--no-flip": []}
    for flags in seen:
        args = parsed("--width", 2, "--size", 32, "--batch-size", 8, "--augment", "none", flags)
        nets = dcgan.build(args, CPU, "fp32")
        nets.D.register_forward_hook(lambda module, given, output, flags=flags: seen[flags].append(given[0]))
        dcgan.train_step(nets, args, (torch.from_numpy(pack), torch.randn(8, 100), uniform, torch.tensor(0.1)))
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(seen["--flip"][0], seen["--no-flip"][0])]
    assert mirrored == [True] * 4 + [False] * 4


@pytest.mark.parametrize("flags, at_9999, at_10000", [
    ([], "on", "none"), (["--augment", "on"], "on", "on"), (["--augment", "none"], "none", "none"),
    (["--recipe", "classic"], "none", "none")])
def test_augmentation_is_for_less_than_ten_thousand_pictures(flags, at_9999, at_10000):
    for count, expected in ((9_999, at_9999), (10_000, at_10000)):
        assert settled(np.broadcast_to(np.uint8(200), (count, 4, 4, 3)), *flags).augment == expected


@pytest.mark.parametrize("count, batch", [(64_000, 64), (16_000, 64), (6400, 64), (500, 64), (100, 64), (10, 8)])
def test_a_run_without_an_end_is_twenty_epochs_or_the_more_that_5000_steps_are(count, batch):
    steps = len(dcgan.hold_out(parsed(), count)[0]) // batch  # an epoch
    args = settled(np.broadcast_to(np.uint8(200), (count, 4, 4, 3)), "--batch-size", batch, steps=steps)
    assert args.epochs * steps >= 5000 and args.steps is None
    assert args.epochs == 20 or (args.epochs - 1) * steps < 5000


def test_an_end_that_is_not_given_is_kept_to(data, tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(dcgan, "STEPS", 101)  # of 4 an epoch, as 36 of 45 pictures are trained on; with all, of 5
    run(*data, "--out", tmp_path, "--held-out", 0.2)
    assert step_of(tmp_path) == 104 and len(list((tmp_path / "samples").iterdir())) == 26


def test_an_end_that_is_given_stays():
    pack = drawn(10)
    assert settled(pack, "--epochs", 3).epochs == 3
    assert settled(pack, "--steps", 7).epochs is None


# Several paths as one set, and classes

def test_several_paths_are_one_set_with_all_pictures_of_the_same_name(tmp_path):
    a, b = crests(tmp_path / "a", 3), crests(tmp_path / "deep" / "b", 4, first=3)
    crests(tmp_path / "c", 2, first=7)
    paths = a, b, zipped(tmp_path / "c")
    flags = "--root", tmp_path / "root", "--size", 32
    alone = [dcgan.load_pack(parsed("--data", path, *flags)) for path in paths]
    together = dcgan.load_pack(parsed("--data", *paths, *flags))
    assert [len(pack) for pack in alone] == [3, 4, 2]
    assert np.array_equal(together, np.concatenate(alone))
    assert len(np.unique(together.reshape(9, -1), axis=0)) == 9
    name, items = dcgan.list_pictures(parsed("--data", *paths))
    assert name == "a+b+c" and len(items) == 9


def test_the_same_path_twice_counts_once(tmp_path):
    a = crests(tmp_path / "a", 3)
    assert len(dcgan.load_pack(parsed("--data", a, a, "--root", tmp_path, "--size", 32))) == 3


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders, each with pictures in subfolders of the same names: red ones, blue ones and white ones."""
    folder = tmp_path_factory.mktemp("places")
    for place, names in (("one", ("red", "blue")), ("two", ("red", "white"))):
        for name in names:
            solids(folder / place / name, dict(red=RED, blue=BLUE, white=WHITE)[name], 9 if name == "red" else 10)
    return folder


def colours(args):
    """How many pictures of the set are red, blue and white."""
    middle = np.asarray(dcgan.load_pack(args))[:, 16, 16].astype(int)
    red, green, blue = (middle > 100).T
    return [int(which.sum()) for which in (red & ~green, blue & ~green, green)]


@pytest.mark.parametrize("paths, names, expected", [
    (["one"], [], [9, 10, 0]), (["one"], ["red"], [9, 0, 0]), (["one"], ["red", "blue"], [9, 10, 0]),
    (["one", "two"], [], [18, 10, 10]), (["one", "two"], ["red"], [18, 0, 0]),
    (["one", "two"], ["white", "blue"], [0, 10, 10]), (["one/red", "two/white"], [], [9, 0, 10])])
def test_classes_of_one_and_of_several_paths(paths, names, expected, places):
    flags = ["--classes", *names] if names else []
    data = [places / path for path in paths]
    assert colours(parsed("--data", *data, *flags, "--root", places / "root", "--size", 32)) == expected


def test_a_path_that_is_missing_among_several_is_named(places, tmp_path, capsys):
    line = fails(capsys, "--data", places / "one", places / "three", "--out", tmp_path / "run", *TINY)
    assert f"there is no {places / 'three'}" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("paths", [["one"], ["one", "two"]])
def test_a_class_that_is_missing_among_several_is_named_with_those_that_exist(paths, places, tmp_path, capsys):
    data = [places / path for path in paths]
    for more in ([], ["--per-class"]):
        line = fails(capsys, "--data", *data, "--classes", "red", "green", *more, "--out", tmp_path / "run", *TINY)
        assert "green" in line and "['blue', 'red'" in line
    assert not (tmp_path / "run").exists()


# A model for each class

@pytest.fixture(scope="module")
def per_class(places, tmp_path_factory):
    """The flags and the run folder of --per-class on a folder with two classes, after two steps each."""
    flags, out = ("--root", places / "root", *TINY), tmp_path_factory.mktemp("per-class") / "runs"
    run("--data", places / "one", "--per-class", "--out", out, "--steps", 2, *flags)
    return ("--data", places / "one", "--per-class", "--out", out, *flags), out


def own_set(out):
    """The arguments by which the run folder of a class was trained."""
    config = json.loads((out / "config.json").read_text())
    assert config["out"] == str(out) and config["used"]["pictures"] > 0
    return SimpleNamespace(**config)


def test_per_class_makes_a_run_folder_for_each_and_a_summary(per_class):
    _, out = per_class
    assert {path.name for path in out.iterdir()} == {"red", "blue", "summary.png"}
    for name, expected in (("red", [9, 0, 0]), ("blue", [0, 10, 0])):
        assert step_of(out / name) == 2 and (out / name / "models.pth").exists()
        assert (out / name / "comparison.png").exists() and (out / name / "losses.png").exists()
        args = own_set(out / name)
        assert colours(args) == expected and args.used["pictures"] == sum(expected)


def test_the_summary_shows_each_class_real_and_made(per_class):
    _, out = per_class
    image = np.asarray(Image.open(out / "summary.png").convert("RGB")).astype(int)
    upper, lower = np.split(image[: len(image) // 2 * 2, : image.shape[1] // 3], 2)  # the pictures that are real
    blueness = [(half[..., 2] - half[..., 0] > 100).mean() for half in (upper, lower)]
    redness = [(half[..., 0] - half[..., 2] > 100).mean() for half in (upper, lower)]
    assert blueness[0] > 0.1 and redness[1] > 0.1 and blueness[1] == redness[0] == 0  # blue comes first
    assert image[:, image.shape[1] // 3 :].std() > 5


def test_per_class_goes_on_with_resume_and_begins_what_is_missing(per_class, tmp_path, capsys):
    flags, out = per_class
    shutil.copytree(out, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "red")
    (tmp_path / "runs" / "summary.png").unlink()
    before = torch.load(out / "blue" / "checkpoint.pt", weights_only=True)
    run(*flags, "--out", tmp_path / "runs", "--steps", 3, "--resume")
    assert [step_of(tmp_path / "runs" / name) for name in ("red", "blue")] == [3, 3]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"red", "blue", "summary.png"}
    printed = capsys.readouterr().out
    assert "red/checkpoint.pt is not there yet" in printed and "blue/checkpoint.pt is not there yet" not in printed
    run(*flags, "--out", tmp_path / "again", "--classes", "blue", "red", "--steps", 3)
    for name in ("red", "blue"):  # as never stopped
        a, b = (torch.load(tmp_path / place / name / "checkpoint.pt", weights_only=True) for place in ("runs", "again"))
        assert same(a["G"], b["G"]) and same(a["D"], b["D"])
    assert not same(before["G"], b["G"])


@pytest.mark.parametrize("kind", ["folders", "classes of several folders", "zip"])
def test_per_class_on_other_sets(kind, places, tmp_path, undrawn):
    data, expected = {
        "folders": ([places / "one" / "blue", places / "two" / "red"], dict(blue=[0, 10, 0], red=[9, 0, 0])),
        "classes of several folders": ([places / "one", places / "two", "--classes", "red", "white"],
                                       dict(red=[18, 0, 0], white=[0, 0, 10])),
        "zip": ([shutil.make_archive(str(tmp_path / "one"), "zip", places / "one")],
                dict(red=[9, 0, 0], blue=[0, 10, 0]))}[kind]
    out = tmp_path / "runs"
    run("--data", *data, "--per-class", "--root", tmp_path / "root", "--out", out, "--steps", 1, *TINY)
    assert {path.name for path in out.iterdir()} == {*expected, "summary.png"}
    for name, count in expected.items():
        assert colours(own_set(out / name)) == count and step_of(out / name) == 1


def test_a_class_that_is_too_small_is_named_before_anything_is_trained(places, tmp_path, capsys):
    shutil.copytree(places / "one", tmp_path / "set")
    solids(tmp_path / "set" / "white", WHITE, 3)
    flags = "--per-class", "--root", tmp_path / "root", "--out", tmp_path / "runs", "--steps", 1, *TINY
    line = fails(capsys, "--data", tmp_path / "set", *flags)
    assert "class white" in line and "3 pictures" in line and "--batch-size" in line and "--classes" in line
    assert not (tmp_path / "runs").exists()
    line = fails(capsys, "--data", tmp_path / "set", *flags, "--classes", "red", "blue", "--held-out", 0.3)
    assert "class blue" in line or "class red" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path, more", [("one/red", []), ("one", ["--classes", "red"]), ("onlyone", [])])
def test_per_class_needs_two_classes(path, more, places, tmp_path, capsys):
    solids(places / "onlyone" / "red", RED, 9)
    line = fails(capsys, "--data", places / path, *more, "--per-class", "--out", tmp_path / "runs", *TINY)
    assert "--per-class" in line and "two classes" in line and not (tmp_path / "runs").exists()


def test_two_folders_of_one_name_are_not_one_class(places, tmp_path, capsys):
    data = places / "one" / "red", places / "two" / "red", places / "two" / "white"
    assert "same" in fails(capsys, "--data", *data, "--per-class", "--out", tmp_path / "runs", *TINY)
    assert not (tmp_path / "runs").exists()


def test_a_stop_within_a_class_stops_them_all_and_says_how_to_go_on(per_class, tmp_path, capsys, monkeypatch):
    begun = []

    def stopped(args, saved):
        begun.append(args.classes)
        raise SystemExit(130)

    monkeypatch.setitem(dcgan.USES, "train", stopped)
    with pytest.raises(SystemExit) as stop:
        run(*per_class[0], "--out", tmp_path / "runs")
    assert stop.value.code == 130 and begun == [["blue"]]
    assert "the classes that are left: the same command with --resume" in capsys.readouterr().out


def test_per_class_is_not_for_several_processes(per_class, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in fails(capsys, *per_class[0], "--out", tmp_path / "runs")


# --interpolate

@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run folder after three steps, from weights so large that generated pictures differ."""
    out, normal = tmp_path_factory.mktemp("trained") / "run", torch.nn.init.normal_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", lambda weight, mean, std: normal(weight, mean, 10 * std))
        run(*data, "--out", out, "--steps", 3)
    return out


def walk(trained, path, steps, *flags):
    """--interpolate into a file."""
    run("--interpolate", steps, "--checkpoint", trained / "models.pth", "--save", path, "--device", "cpu", *flags)
    return Image.open(path)


def cells(image, side=32):
    """The pictures of a grid, rows,columns,H,W,3."""
    pixels = np.asarray(image)
    rows, columns = (length // (side + 2) for length in pixels.shape[:2])
    assert pixels.shape == (rows * (side + 2) + 2, columns * (side + 2) + 2, 3)
    inner = pixels[2:, 2:].reshape(rows, side + 2, columns, side + 2, 3)
    return inner[:, :side, :, :side].swapaxes(1, 2)


def test_a_walk_as_a_png_has_a_row_for_each_picture_and_goes_round_a_circle(trained, tmp_path, capsys):
    found = cells(walk(trained, tmp_path / "walk.png", 12)).astype(float)
    assert found.shape == (16, 12, 32, 32, 3)
    assert f"12 steps: {tmp_path / 'walk.png'}" in capsys.readouterr().out
    a, b = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))
    saved = torch.load(trained / "models.pth", weights_only=True)
    generator = dcgan.Generator(32, 3, 2)
    generator.load_state_dict(saved["Generator"])
    for step in (0, 1, 3, 8):
        turn = math.tau * step / 12
        expected = generator.eval()(math.cos(turn) * a + math.sin(turn) * b).detach().permute(0, 2, 3, 1).numpy()
        assert np.abs(found[:, step] - (expected + 1) * 127.5).max() <= 1.01
    distance = [np.abs(found[:, i] - found[:, (i + 1) % 12]).mean() for i in range(12)]
    opposite = np.mean([np.abs(found[:, i] - found[:, i - 6]).mean() for i in range(12)])
    assert 0 < max(distance) < 2 * min(distance) and max(distance) < 0.7 * opposite
    assert distance[-1] < 1.3 * np.mean(distance[:-1])  # from the last to the first


def test_a_walk_as_a_gif_has_a_frame_for_each_step(trained, tmp_path):
    gif = walk(trained, tmp_path / "new" / "walk.gif", 7)
    assert gif.n_frames == 7 and gif.info["loop"] == 0
    assert gif.width == gif.height <= 512
    columns = cells(walk(trained, tmp_path / "walk.png", 7)).swapaxes(0, 1).astype(float)
    for i in range(7):
        gif.seek(i)
        frame = cells(gif.convert("RGB").resize((138, 138), Image.BOX)).reshape(16, 32, 32, 3)
        distances = [np.abs(frame - column).mean() for column in columns]  # a gif has 256 colours
        assert np.argmin(distances) == i and distances[i] < 20


def test_a_walk_follows_from_the_seed(trained, tmp_path):
    images = [np.asarray(walk(trained, tmp_path / f"{i}.png", 2, "--seed", seed)) for i, seed in enumerate((4, 4, 5))]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("save", [[], ["--save", "walk.npz"], ["--save", "folder"], ["--save", "walk.jpg"]])
def test_a_walk_into_another_kind_of_file(save, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "--interpolate", 4, "--checkpoint", trained / "models.pth", *save)
    assert ".gif" in line and ".png" in line and "--save" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (["--interpolate", "4"], "--checkpoint"), (["--interpolate", "1"], "--interpolate"),
    (["--checkpoint", "models.pth"], "--interpolate")])
def test_a_walk_needs_a_checkpoint_and_two_steps(flags, words, tmp_path, capsys):
    assert words in fails(capsys, *flags, "--save", tmp_path / "walk.gif")
    assert list(tmp_path.iterdir()) == []


def test_files_are_whole_before_they_take_the_place_of_earlier_ones(trained, tmp_path):
    """A second name for an earlier file keeps what was in it; test_run.py has the same of the run folder."""
    for name, use in (("g.npz", ["--generate", 3]), ("g.png", ["--generate", 3]), ("walk.gif", ["--interpolate", 2]),
                      ("walk.png", ["--interpolate", 2]), ("g.onnx", ["--export", tmp_path / "g.onnx"])):
        (tmp_path / name).write_text("earlier\n")
        (tmp_path / f"earlier-{name}").hardlink_to(tmp_path / name)
        run(*use, "--checkpoint", trained / "models.pth", "--save", tmp_path / name, "--device", "cpu")
        assert (tmp_path / name).stat().st_size > 500
        assert (tmp_path / f"earlier-{name}").read_text() == "earlier\n"
    assert len(list(tmp_path.iterdir())) == 10


# Grey pictures, from one end to the other

@pytest.fixture(scope="module")
def grey(data, tmp_path_factory):
    """A run folder after two steps on grey pictures."""
    out = tmp_path_factory.mktemp("grey") / "run"
    run(*data, "--channels", 1, "--out", out, "--steps", 2)
    return out


def test_a_grey_run_has_its_pack_and_its_pictures(grey, data):
    pack = dcgan.load_pack(parsed(*data, "--channels", 1))
    assert pack.shape == (45, 32, 32, 1)
    colour = dcgan.load_pack(parsed(*data)).astype(float)
    assert np.abs(pack[..., 0] - colour @ [0.299, 0.587, 0.114]).max() <= 2
    assert np.asarray(Image.open(grey / "samples" / "epoch_0001.png")).shape == (8 * 34 + 2, 8 * 34 + 2, 3)
    for name in (*(f"{curve}.png" for curve in dcgan.CURVES), "comparison.png", "evolution.gif"):
        assert np.asarray(Image.open(grey / name).convert("L")).std() > 5


def test_grey_pictures_are_generated_into_all_three_kinds(grey, tmp_path):
    use = "--generate", 10, "--checkpoint", grey / "models.pth", "--device", "cpu", "--save"
    for name in ("g.npz", "g.png", "folder"):
        run(*use, tmp_path / name)
    with np.load(tmp_path / "g.npz") as archive:
        images = archive["images"]
    assert images.shape == (10, 32, 32) and images.dtype == np.uint8
    files = sorted((tmp_path / "folder").iterdir())
    assert len(files) == 10 and {Image.open(file).mode for file in files} == {"L"}
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(files, images))
    grid = cells(Image.open(tmp_path / "g.png"))
    assert grid.shape == (3, 4, 32, 32, 3)
    assert np.array_equal(grid.reshape(12, 32, 32, 3)[:10], images[..., None].repeat(3, 3))


def test_a_grey_walk_and_a_grey_resume(grey, tmp_path, undrawn):
    assert walk(grey, tmp_path / "walk.gif", 3).n_frames in (1, 2, 3)  # alike ones, this early, become one frame
    assert cells(walk(grey, tmp_path / "walk.png", 3)).shape == (16, 3, 32, 32, 3)
    shutil.copytree(grey, tmp_path / "run")
    run("--resume", "--out", tmp_path / "run", "--steps", 3)
    assert step_of(tmp_path / "run") == 3


def test_a_grey_generator_as_onnx(grey, tmp_path):
    run("--export", tmp_path / "g.onnx", "--checkpoint", grey / "models.pth")
    generator = dcgan.Generator(32, 1, 2)
    generator.load_state_dict(torch.load(grey / "models.pth", weights_only=True)["Generator"])
    z = torch.randn(5, 100)
    (images,) = onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, {"z": z.numpy()})
    np.testing.assert_allclose(images, generator.eval()(z).detach().numpy(), atol=1e-5)


def test_metrics_are_given_three_channels_of_grey_pictures(grey, monkeypatch, capsys):
    given = []

    class Metric:
        def __init__(self, **options):
            pass

        def to(self, device):
            return self

        def update(self, images, **options):
            given.append((images, options.get("real", False)))

        def compute(self):
            return torch.tensor(1.0)

    class Pair(Metric):
        def compute(self):
            return torch.tensor(2.0), torch.tensor(0.5)

    stand_in = SimpleNamespace(FrechetInceptionDistance=Metric, InceptionScore=Pair, KernelInceptionDistance=Pair)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", stand_in)
    run("--metrics", "--checkpoint", grey / "models.pth", "--device", "cpu")
    assert "45 pictures: FID 1.00, KID 2.0000 +- 0.5000, Inception score 2.00" in capsys.readouterr().out
    assert {tuple(images.shape) for images, _ in given} == {(45, 3, 32, 32)}
    assert {images.dtype for images, _ in given} == {torch.uint8}
    assert sorted(real for _, real in given) == [False, False, False, True, True]


# The curves

def figures(monkeypatch, rows, out):
    """{name: its axes} of the pictures of a run, which are not drawn."""
    found = {}
    monkeypatch.setattr(dcgan, "write", lambda path, make: found.update({path.name: getattr(make, "__self__", None)}))
    (out / "samples").mkdir()
    Image.new("RGB", (9, 9)).save(out / "samples" / "epoch_0001.png")
    pictures = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    dcgan.draw_run(out, rows, pictures, pictures)
    assert found.pop("evolution.gif") is None and len(found.pop("comparison.png").axes) == 2
    return {name: figure.axes[0] for name, figure in found.items()}


COLUMNS = "loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "d_seen", "d_held_out"
SHOWN = {"losses.png": COLUMNS[:2], "scores.png": COLUMNS[2:4], "loss_d.png": COLUMNS[:1], "loss_g.png": COLUMNS[1:2],
         "d_real.png": COLUMNS[2:3], "d_fake.png": COLUMNS[3:5], "held_out.png": COLUMNS[5:]}


def test_each_curve_shows_its_columns_over_the_steps_with_title_and_unit(monkeypatch, tmp_path):
    rows = [dict(step=str(10 * i), **{name: str(k + i / 10) for k, name in enumerate(COLUMNS)}) for i in (1, 2, 3)]
    found = figures(monkeypatch, rows, tmp_path)
    assert found.keys() == SHOWN.keys()
    for name, axes in found.items():
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(SHOWN[name])
        assert axes.get_title().startswith("dcgan: ") and axes.get_xlabel() == "step"
        assert axes.get_ylabel() == ("loss" if "loss" in name else "mean probability of being real")
        lines = {line.get_label(): line for line in axes.lines}
        for column in SHOWN[name]:
            expected = [COLUMNS.index(column) + i / 10 for i in (1, 2, 3)]
            assert list(lines[column].get_xdata()) == [10, 20, 30]
            assert list(lines[column].get_ydata()) == pytest.approx(expected)


def test_without_pictures_held_out_there_is_no_curve_of_them(monkeypatch, tmp_path):
    rows = [dict(step=str(i), **dict.fromkeys(COLUMNS[:5], "0.5")) for i in (10, 20)]
    assert figures(monkeypatch, rows, tmp_path).keys() == SHOWN.keys() - {"held_out.png"}


def test_without_pictures_held_out_there_are_no_columns_of_them(data, tmp_path, undrawn):
    run(*data, "--held-out", 0, "--out", tmp_path, "--steps", 1)
    head = (tmp_path / "metrics.csv").read_text().split()[0]
    assert head == "step,epoch,seconds,images,loss_d,loss_g,d_real,d_fake,d_fake_after"


# The same seed, the same files

def test_two_runs_with_one_seed_are_the_same_byte_for_byte(data, tmp_path, monkeypatch):
    """But for the seconds: a column of metrics.csv, an entry of checkpoint.pt. Both are called `run`."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run(*data, "--out", "run", "--epochs", 2, "--seed", seed)
    files = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 2 + len(dcgan.CURVES) + 2 + 4
    equal, different, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert set(different) <= {"run/metrics.csv", "run/checkpoint.pt"} and len(equal) + len(different) == len(files)
    a, b = (torch.load(tmp_path / name / "run" / "checkpoint.pt", weights_only=True) for name in "ab")
    assert a.keys() == b.keys() and a["config"] == b["config"]
    assert all(same(a[name], b[name]) for name in ("G", "D", "ema")) and torch.equal(a["sums"], b["sums"])
    tables = [(tmp_path / name / "run" / "metrics.csv").read_text().split() for name in "ab"]
    rows = [[line.split(",")[:2] + line.split(",")[3:] for line in table] for table in tables]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    equal, _, missing = filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)
    assert equal == missing == []  # with another seed all differ


# --logger

def test_tensorboard_holds_all_metrics_and_the_samples(data, tmp_path, undrawn, monkeypatch):
    from torch.utils import tensorboard
    writers, make = [], tensorboard.SummaryWriter
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda *args: writers.append(make(*args)) or writers[-1])
    run(*data, "--out", tmp_path, "--steps", 12, "--logger", "tensorboard")
    for writer in writers:
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(COLUMNS) and events.Tags()["images"] == ["samples"]
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().split()]
    for name in COLUMNS:
        values = [float(row[header.index(name)]) for row in rows]
        assert [scalar.value for scalar in events.Scalars(name)] == pytest.approx(values, rel=1e-4)
    images = events.Images("samples")
    assert [image.step for image in images] == [5, 10, 12]
    path = tmp_path / "image.png"
    path.write_bytes(images[-1].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "samples" / "epoch_0003.png")))


def test_wandb_offline_holds_all_metrics_and_the_samples(data, tmp_path, undrawn, monkeypatch):
    import wandb
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    for name, steps in (("before", 1), ("run", 12)):  # in one process, as classes are
        run(*data, "--out", tmp_path / name, "--steps", steps, "--logger", "wandb")
    wandb.finish()
    wandb.teardown()  # its service writes the file until it ends
    (folder,), (other,) = ((tmp_path / name / "wandb").glob("offline-run-*") for name in ("run", "before"))
    (file,) = folder.glob("*.wandb")
    assert all(name.encode() in file.read_bytes() for name in COLUMNS)
    pictures = sorted(folder.rglob("samples_*.png"), key=lambda path: int(path.name.split("_")[1]))
    samples = sorted((tmp_path / "run" / "samples").iterdir())
    assert len(pictures) == len(samples) == 3 and len(list(other.rglob("samples_*.png"))) == 1
    for picture, expected in zip(pictures, samples):
        assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(expected)))


# Pictures of all kinds

def pack_one(image, folder, *flags, **options):
    """A picture saved and packed alone."""
    (folder / "set").mkdir()
    image.save(folder / "set" / "a.png", **options)
    (picture,) = dcgan.load_pack(parsed("--data", folder / "set", "--root", folder / "root", "--size", 64, *flags))
    return picture.astype(int)


def crest(mode, size):
    """A crest that was cut out: red to its edge, a blue bar at each end, around it nothing, which is black below."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    w, h = size
    image.paste((*RED, 255), (w // 10, h // 10, w - w // 10, h - h // 10))
    bar = (w // 10, h // 10, w // 4, h - h // 10) if w > h else (w // 10, h // 10, w - w // 10, h // 4)
    image.paste((*BLUE, 255), bar)
    image.paste(image.crop(bar), (w - bar[2], bar[1]) if w > h else (bar[0], h - bar[3]))
    return image if mode == "RGBA" else image.quantize(8) if mode == "P" else image.convert("LA")


@pytest.mark.parametrize("size", [(400, 200), (200, 400)], ids=["wide", "high"])
@pytest.mark.parametrize("mode, channels", [("RGBA", 3), ("RGBA", 1), ("P", 3), ("LA", 3)])
def test_a_crest_that_is_cut_out_stays_whole_on_white(mode, channels, size, tmp_path):
    picture = pack_one(crest(mode, size), tmp_path, "--channels", channels)
    if size[0] < size[1]:
        picture = picture.swapaxes(0, 1)
    grey = mode == "LA" or channels == 1
    red, blue = ([76] * channels, [29] * channels) if grey else (RED, BLUE)
    assert (picture[:15] == 255).all() and (picture[-15:] == 255).all()  # above and below
    assert (picture[16:48, :5] == 255).all() and (picture[16:48, -5:] == 255).all()  # at its ends, cut out
    for x in (10, 53):  # both bars
        assert np.abs(picture[32, x] - blue).max() <= 4
    assert np.abs(picture[22:42, 20:44] - red).max() <= 4


def test_what_is_square_or_not_cut_out_is_as_before(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    square = pack_one(Image.new("RGBA", (100, 100), (*RED, 255)), tmp_path / "a")
    assert (square == RED).all()
    wide = Image.new("RGB", (200, 100), BLUE)
    wide.paste(RED, (50, 0, 150, 100))
    assert (pack_one(wide, tmp_path / "b")[:, 1:-1] == RED).all()  # its middle, nothing white


def test_pictures_from_1x1_to_10000x10000_in_one_folder_are_all_packed(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(png_of(10_000))
    Image.new("RGBA", (10_000, 1), (*RED, 255)).save(folder / "b.png")
    Image.new("RGBA", (1, 10_000), (*RED, 255)).save(folder / "c.png")
    for name, size in (("d", (1, 1)), ("e", (3000, 2)), ("f", (17, 4000)), ("g", (64, 64)), ("h", (2, 1))):
        Image.new("RGB", size, BLUE).save(folder / f"{name}.png")
    capsys.readouterr()
    pack = dcgan.load_pack(parsed("--data", folder, "--root", tmp_path, "--size", 32)).astype(int)
    assert pack.shape == (8, 32, 32, 3) and "left out" not in capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / ".packed").iterdir()] == [".npy"]
    assert (pack[0] == 0).all() and (pack[3:] == BLUE).all()
    for strip in (pack[1], pack[2].swapaxes(0, 1)):  # a line of one pixel, whole
        red = (strip == RED).all(2)
        assert red.sum() == 32 and red.any(1).sum() == 1 and (strip[~red] == 255).all()


# What the user can mend

BAD_FLAGS = [
    "--size 48", "--size 100", "--size 512", "--size 0", "--size big", "--channels 2", "--channels 4", "--width 0",
    "--held-out 0.6", "--held-out -1", "--held-out nan", "--recipe exact", "--augment off", "--interpolate 0",
    "--batch-size 1", "--steps 0", "--lr inf", "--seed -1", "--device tpu", "--precision fp8", "--data", "--classes",
    "--scheme exact", "--no-such-flag", "stray"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flag_that_cannot_be(flags, data, tmp_path, capsys):
    line = fails(capsys, *data, "--out", tmp_path / "run", *flags.split())
    assert flags.split()[0] in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("make, name, words", DATA, ids=[make.__name__ for make, _, _ in DATA])
def test_data_that_cannot_be_used_alone_or_beside_good_data(make, name, words, data, tmp_path, capsys):
    make(tmp_path / name)
    places = "--root", tmp_path / "root", "--out", tmp_path / "run", *TINY
    assert words in fails(capsys, "--data", tmp_path / name, *places)
    if make.__name__ != "broken_folder":  # whose pictures alone are left out
        assert words in fails(capsys, "--data", data[1], tmp_path / name, *places)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", 46], ["46", "45 pictures", "2 are held out"]),
    (["--batch-size", 45], ["45 pictures", "2 are held out"]),
    (["--batch-size", 46, "--held-out", 0], ["46", "45 pictures"])])
def test_batch_larger_than_what_is_trained_on(flags, words, data, tmp_path, capsys):
    line = fails(capsys, *data, "--out", tmp_path / "run", *flags)
    assert all(word in line for word in (*words, "--batch-size")) and not (tmp_path / "run").exists()
    assert ("held out" in line) == (len(flags) == 2)


CHECKPOINTS = {
    "missing": lambda trained, path: None,
    "cut short": cut,
    "text": lambda trained, path: path.write_text("not a checkpoint\n"),
    "of another script": lambda trained, path: changed(trained, path, script="cspup128"),
    "of something else": lambda trained, path: torch.save({"model": {}}, path),
}


@pytest.mark.parametrize("make", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoint_that_cannot_be_read(make, trained, tmp_path, capsys):
    make(trained, tmp_path / "c.pt")
    for use in (["--generate", 4], ["--interpolate", 4], ["--metrics"], ["--export", tmp_path / "g.onnx"]):
        line = fails(capsys, *use, "--checkpoint", tmp_path / "c.pt", "--save", tmp_path / "g.gif")
        assert "no checkpoint of dcgan.py" in line and str(tmp_path / "c.pt") in line
    assert {path.name for path in tmp_path.iterdir()} <= {"c.pt"}


@pytest.mark.parametrize("flags", ["--size 64", "--channels 1", "--width 4", "--recipe classic", "--held-out 0.1",
                                   "--augment none", "--flip"])
def test_flag_other_than_the_checkpoints(flags, trained, tmp_path, capsys):
    name, *_ = flags.split()
    before = (trained / "checkpoint.pt").read_bytes()
    for use in (["--interpolate", 4, "--checkpoint", trained / "models.pth", "--save", tmp_path / "g.gif"],
                ["--resume", "--out", trained, "--steps", 9]):
        line = fails(capsys, *use, *flags.split())
        assert f"was trained with {name} " in line and f"leave {name} out" in line
    assert list(tmp_path.iterdir()) == [] and (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flags", [["--augment", "auto"], ["--augment", "on"], ["--no-flip"], ["--held-out", "0.1"]])
def test_the_same_command_with_resume_goes_on(flags, data, tmp_path, undrawn):
    for step, more in ((1, []), (2, ["--resume"])):
        run(*data, *flags, "--out", tmp_path / "run", "--steps", step, *more)
        assert step_of(tmp_path / "run") == step
