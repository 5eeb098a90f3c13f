"""gan_ops in the script: found or named as missing, the same training as the twins, the same files."""
import importlib.metadata
import sys

import pytest
import torch  # before gan_ops, whose libraries it loads
from torch import nn

import cspup128
import gan_ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def twins_again():
    yield
    cspup128.use_gan_ops(CPU, False)


def trained(fused, dtype=torch.float32, scheme="stable", noise=0.0, steps=20):
    """The networks after some steps, in one type throughout; `noise` moves the generator's first weights by so much."""
    assert (cspup128.use_gan_ops(CPU, fused) == "serves") == fused
    args, _ = cspup128.parse(["--width", "4", "--batch-size", "4", "--augment", "none", "--scheme", scheme])
    nets = cspup128.build(args, CPU, "fp32")
    for net in (nets.G, nets.D, nets.ema):
        net.to(dtype)
    with torch.no_grad():
        for parameter in nets.G.parameters() if noise else ():
            parameter.mul_(1 + noise * torch.randn_like(parameter))
    for step in range(1, steps + 1):
        real = torch.randint(0, 256, (4, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        z, *rest = cspup128.draws(args, step, CPU, 0, 1)
        cspup128.train_step(nets, args, (real, z.to(dtype), *rest))
    return nets


def distance(a, b):
    """Of all weights and statistics of the generator and of the discriminator, relative to their size."""
    def flat(net):
        return torch.cat([t.flatten().double() for t in net.state_dict().values() if t.is_floating_point()])
    return max(((flat(x) - flat(y)).norm() / flat(x).norm()).item() for x, y in ((a.G, b.G), (a.D, b.D)))


@pytest.mark.parametrize("scheme", ["stable", "exact"])
def test_twenty_steps_in_float64_end_with_the_same_weights(monkeypatch, scheme):
    to_float = cspup128.to_float
    monkeypatch.setattr(cspup128, "to_float", lambda *args: to_float(*args).double())
    one, two = (trained(fused, torch.float64, scheme) for fused in (False, True))
    assert distance(one, two) < 1e-6  # 1e-9 as a rule


def test_twenty_steps_in_fp32_differ_from_the_twins_as_much_as_rounding_does():
    """Adam makes any rounding grow: first weights that differ by 1e-7 are the measure."""
    twins = trained(False)
    assert distance(twins, trained(True)) < 3 * distance(twins, trained(False, noise=1e-7))


def test_two_runs_with_gan_ops_have_the_same_bits():
    one, two = (trained(True, steps=3) for _ in range(2))
    for a, b in ((one.G, two.G), (one.D, two.D), (one.ema, two.ema)):
        for x, y in zip(a.state_dict().values(), b.state_dict().values()):
            assert torch.equal(x, y)


def test_every_batch_norm_of_the_networks_goes_through_gan_ops():
    cspup128.use_gan_ops(CPU)
    args, _ = cspup128.parse(["--width", "2", "--batch-size", "2"])
    nets = cspup128.build(args, CPU, "fp32")
    with torch.profiler.profile() as profile:
        nets.D(nets.G(torch.randn(2, 100))).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["gan_ops::_normalise"] == calls["gan_ops::_normalise_backward"] == 5 + 10 + 1  # seams, blocks, the last layers
    assert not any("batch_norm" in name and name.startswith("aten::") for name in calls)


def test_module_is_exchangeable_with_pytorchs_own_through_gan_ops():
    cspup128.use_gan_ops(CPU)
    ours, theirs = cspup128.BatchNormLeakyReLU(6, 0.1), nn.BatchNorm2d(6)
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5)
        torch.testing.assert_close(ours(x), nn.functional.leaky_relu(theirs(x), 0.1))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(mine, other)  # num_batches_tracked too
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(ours.eval()(x), nn.functional.leaky_relu(theirs.eval()(x), 0.1))


def test_no_fused_leaves_the_twins():
    assert cspup128.use_gan_ops(CPU, False) == "does not serve: --no-fused" and cspup128.gan_ops is None


@pytest.mark.parametrize("text", ["raise ImportError('undefined symbol: _ZN3c10\\nmore')", "torch_version = '1.0'"])
def test_a_build_that_does_not_fit_is_named_with_both_versions(monkeypatch, tmp_path, text):
    monkeypatch.delitem(sys.modules, "gan_ops")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gan_ops.py").write_text(text)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0+torch.1.0.cpu")
    said = cspup128.use_gan_ops(CPU)
    assert cspup128.gan_ops is None and "\n" not in said and "pip install -e ." in said
    assert "1.0.cpu" in said and torch.__version__ in said
    assert ("undefined symbol" if "symbol" in text else "another torch") in said


def test_a_missing_build_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gan_ops", None)
    said = cspup128.use_gan_ops(CPU)
    assert said.startswith("does not serve: import of gan_ops halted") and cspup128.gan_ops is None


def test_a_device_without_kernels_keeps_the_twins():
    assert "mps" not in gan_ops.devices
    assert "without mps" in cspup128.use_gan_ops(torch.device("mps")) and cspup128.gan_ops is None
