"""The losses and the training step: against PyTorch's own, on one process and on two."""
import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cspup128

CPU = torch.device("cpu")
SCRIPT = Path(cspup128.__file__)


def prepared(*flags, precision="fp32"):
    args, _ = cspup128.parse(["--width", "2", "--batch-size", "4", "--augment", "none", *flags])
    return args, cspup128.build(args, CPU, precision)


def inputs(args, step=1):
    real = torch.randint(0, 256, (4, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return real, *cspup128.draws(args, step, CPU, 0, 1)


def weights(network):
    return copy.deepcopy(network.state_dict())


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_losses_are_pytorchs_own():
    real, fake = torch.randn(9), torch.randn(9)
    ones, zeros = torch.ones(9), torch.zeros(9)
    for name, loss, view in (("bce", nn.BCELoss(), torch.sigmoid), ("logits", nn.BCEWithLogitsLoss(), lambda x: x)):
        of_d, of_g = cspup128.LOSSES[name]
        torch.testing.assert_close(of_d(real, fake), loss(view(real), ones) + loss(view(fake), zeros))
        torch.testing.assert_close(of_g(real, fake), loss(view(fake), ones))
    of_d, of_g = cspup128.LOSSES["hinge"]
    torch.testing.assert_close(of_d(real, fake), (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(of_g(real, fake), -fake.mean())
    of_d, of_g = cspup128.LOSSES["relativistic"]
    torch.testing.assert_close(of_d(real, fake), nn.BCEWithLogitsLoss()(real - fake, ones))
    torch.testing.assert_close(of_g(real, fake), nn.BCEWithLogitsLoss()(fake - real, ones))


def test_the_squared_slope_of_a_linear_discriminator_is_its_weights():
    weight, pictures = torch.randn(3 * 8 * 8, requires_grad=True), torch.randn(5, 3, 8, 8, requires_grad=True)
    slope = cspup128.squared_slope(pictures.flatten(1) @ weight, pictures)
    torch.testing.assert_close(slope, weight.square().sum())
    (by_weight,) = torch.autograd.grad(slope, weight)
    torch.testing.assert_close(by_weight, 2 * weight)


def penalty(logit, pictures):
    """R1 or R2 written out picture by picture."""
    slopes = [torch.autograd.grad(logit[i], pictures, create_graph=True)[0][i] for i in range(len(logit))]
    return sum((slope**2).sum() for slope in slopes) / len(logit)


@pytest.mark.parametrize("flags", [[], ["--gamma", "0"], ["--scheme", "exact"], ["--loss", "hinge", "--d-norm", "spectral"],
                                   ["--loss", "bce", "--d-norm", "batch", "--up", "deconv", "--gamma", "0"]])
def test_a_step_is_the_textbook_one(flags):
    """The same networks in a loop written out plainly end with the same weights; by SGD, as Adam amplifies rounding."""
    args, nets = prepared(*flags, "--no-flip")
    G, D = copy.deepcopy(nets.G), copy.deepcopy(nets.D)
    nets.opt_g, nets.opt_d, opt_g, opt_d = (torch.optim.SGD(n.parameters(), 0.05) for n in (nets.G, nets.D, G, D))
    of_d, of_g = cspup128.LOSSES[args.loss]
    for step in (1, 2, 3):
        batch = inputs(args, step)
        cspup128.train_step(nets, args, batch)
        real, fake = batch[0].permute(0, 3, 1, 2) / 127.5 - 1, G(batch[1])
        opt_d.zero_grad()
        pictures = real.requires_grad_(), fake.detach().requires_grad_()
        logits = [D(x) for x in pictures]
        penalties = sum(map(penalty, logits, pictures)) if args.gamma else 0
        (of_d(*logits) + args.gamma / 2 * penalties).backward()
        opt_d.step()
        opt_g.zero_grad()
        of_g(D(real).detach() if args.loss == "relativistic" else None, D(fake)).backward()
        opt_g.step()
    for ours, theirs in ((nets.G, G), (nets.D, D)):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_optimisers_are_adam_with_two_learning_rates():
    _, nets = prepared("--lr", "0.001", "--d-lr", "0.004")
    assert isinstance(nets.opt_g, torch.optim.Adam) and isinstance(nets.opt_d, torch.optim.Adam)
    assert [nets.opt_g.param_groups[0][key] for key in ("lr", "betas")] == [0.001, (0.0, 0.99)]
    assert nets.opt_d.param_groups[0]["lr"] == 0.004


def test_a_resting_discriminator_keeps_its_weights_and_its_metrics():
    args, nets = prepared()
    cspup128.train_step(nets, args, inputs(args))
    before, last = [p.clone() for p in nets.D.parameters()], nets.last.clone()
    g = weights(nets.G)
    cspup128.train_step(nets, args, inputs(args, 2), train_d=False)
    assert all(torch.equal(a, b) for a, b in zip(before, nets.D.parameters()))
    assert not same(g, weights(nets.G))
    assert torch.equal(nets.last[[0, 2]], last[[0, 2]]) and not torch.equal(nets.last[[1, 3]], last[[1, 3]])


def test_the_average_moves_by_its_weight_statistics_too():
    args, nets = prepared()
    before = weights(nets.ema)
    batch = (*inputs(args)[:3], torch.tensor(0.25))
    cspup128.train_step(nets, args, batch)
    now, average = nets.G.state_dict(), nets.ema.state_dict()
    assert any("running_var" in name for name in average)
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[name] + 0.25 * (now[name] - before[name]))


def test_metrics_are_the_means_of_the_steps():
    args, nets = prepared()
    rows = []
    for step in range(1, 4):
        cspup128.train_step(nets, args, inputs(args, step))
        rows.append(nets.last.clone())
    values, stop = cspup128.read_metrics(nets, 3, [], 1)
    torch.testing.assert_close(torch.tensor(list(values.values())), torch.stack(rows).mean(0))
    assert list(values) == ["loss_d", "loss_g", "d_real", "d_fake"] and not stop
    assert 0 < values["d_real"] < 1 and 0 < values["d_fake"] < 1


def test_random_numbers_follow_from_seed_and_step():
    args, _ = prepared()
    first, again, later = (cspup128.draws(args, step, CPU, 0, 1) for step in (7, 7, 8))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], later[0])
    args.seed = 1
    assert not torch.equal(first[0], cspup128.draws(args, 7, CPU, 0, 1)[0])


@pytest.mark.parametrize("scheme", ["stable", "exact"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_follows_fp32(precision, scheme):
    runs = []
    for p in ("fp32", precision):
        args, nets = prepared("--scheme", scheme, precision=p)
        for step in (1, 2):
            cspup128.train_step(nets, args, inputs(args, step))
        runs.append(nets)
    assert nets.scaler.is_enabled() == (precision == "fp16")
    assert all(p.dtype == torch.float32 for p in nets.G.parameters())
    torch.testing.assert_close(runs[0].sums, runs[1].sums, rtol=0.05, atol=0.05)
    assert not torch.equal(runs[0].sums, runs[1].sums)


def test_augmentation_trains():
    args, nets = prepared("--augment", "on")
    args.augment = "on"
    before = weights(nets.G)
    cspup128.train_step(nets, args, inputs(args))
    assert not same(before, weights(nets.G)) and torch.isfinite(nets.sums).all()


def test_a_captured_step_runs_three_times_and_is_replayed_from_then_on(monkeypatch):
    """The order of calls alone, with stand-ins for CUDA: what a graph computes only a GPU can show."""
    events = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: events.append("replay"))
    for name, stand_in in dict(Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=lambda: graph,
                               stream=lambda s: nullcontext(), graph=lambda g, **options: nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    run_step = cspup128.captured(lambda inputs, variant: events.append((inputs[0].item(), variant)), True)
    first = torch.tensor(1)
    run_step((first,), True)
    for number in (2, 3, 4, 5, 6):
        run_step((torch.tensor(number),), True)
    run_step((torch.tensor(7),), False)
    eager = [(1, True), (2, True), (3, True)]
    assert events == [*eager, (4, True), "replay", "replay", "replay", (7, False)]
    assert first.item() == 1  # the graph's inputs are its own


def run(flags, processes=1):
    command = [sys.executable, str(SCRIPT)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(SCRIPT)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_fp16_takes_second_derivatives_in_fp32():
    seen = []
    args, nets = prepared(precision="fp16")
    nets.D.layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    cspup128.train_step(nets, args, inputs(args))
    assert seen == [torch.float32] * 2 + [torch.float16] * 2  # the discriminator's step, then the generator's


def test_two_processes_at_half_the_batch_train_as_one_at_the_whole(tmp_path):
    """--scheme exact has no batch norm, so here the two agree to rounding; metrics.csv is of both processes."""
    flags = ["--scheme", "exact", "--width", "4", "--steps", "20", "--precision", "fp32", "--root", str(tmp_path)]
    run([*flags, "--batch-size", "8", "--out", str(tmp_path / "one")])
    run([*flags, "--batch-size", "4", "--out", str(tmp_path / "two")], processes=2)
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    start = cspup128.build(cspup128.parse(flags)[0], CPU, "fp32")
    for name in ("G", "D", "ema"):  # against how far they moved, as Adam turns the rounding of a gradient near 0 to a step
        a, b, c = (torch.cat([value.flatten() for value in state.values()])
                   for state in (one[name], two[name], getattr(start, name).state_dict()))
        assert (a - b).norm() < 0.02 * (a - c).norm()
    rows = [(tmp_path / name / "metrics.csv").read_text().split()[-1].split(",") for name in ("one", "two")]
    assert rows[0][3] == rows[1][3] == "160"
    for a, b in zip(rows[0][4:], rows[1][4:]):
        assert float(a) == pytest.approx(float(b), rel=1e-3)
