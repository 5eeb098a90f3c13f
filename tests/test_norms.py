"""The averaged generator's batch norm has statistics of its own: the trained generator's do not fit it."""

import argparse

import pytest
import torch
from conftest import flags, load
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import fashion_keras_port

pytestmark = pytest.mark.usefixtures("without_curves")


def test_the_average_is_saved_with_the_statistics_of_what_it_makes(kind, root, tmp_path):
    """Those of 256 images in four batches; where nothing is averaged, or normalised, they are left alone."""
    script, argv = kind
    script.main(flags(script, root, tmp_path, *argv.split(), "--steps", 2))
    saved = load(tmp_path / "models.pth")
    args = argparse.Namespace(**saved["config"])
    generator = script.make_networks(args)[0].eval()
    generator.load_state_dict(saved["Generator"])
    norm = next((module for module in generator.modules() if isinstance(module, _BatchNorm)), None)
    if norm is None:
        return
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for module in generator.modules():
        if isinstance(module, (_BatchNorm, torch.nn.Dropout2d)):
            module.train()
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    with torch.no_grad():
        for i in range(4):
            generator(script.draw_z(args, 256)[i::4])
    parts = [x.transpose(0, 1).flatten(1) for x in seen]  # of the first norm, before which is no dropout
    in_keras_order = isinstance(norm, fashion_keras_port.LeakyReLUBatchNorm)
    if in_keras_order:
        parts = [F.leaky_relu(part, 0.2) for part in parts]
    expected_mean = torch.cat(parts, 1).mean(1)
    expected_variance = torch.stack([part.var(1, correction=not in_keras_order) for part in parts]).mean(0)
    assert torch.allclose(mean, expected_mean, rtol=1e-3, atol=1e-6) == (args.ema > 0)
    assert torch.allclose(variance, expected_variance, rtol=1e-3, atol=1e-6) == (args.ema > 0)


@pytest.mark.parametrize("fused", [False, True])
def test_batch_norm_as_keras_has_it_can_be_averaged_over_batches_too(fused):
    """Each batch counts alike, with its plain variance, where a run of dense networks is given --ema."""
    if fused:
        pytest.importorskip("gan_ops")
    norm = fashion_keras_port.LeakyReLUBatchNorm(3, momentum=0.2, eps=1e-3)
    norm.fused = fused
    x = torch.randn(4, 8, 3) * torch.arange(1.0, 5)[:, None, None]
    torch.optim.swa_utils.update_bn(x, norm)
    y = F.leaky_relu(x, 0.2)
    torch.testing.assert_close(norm.running_mean, y.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, y.var(1, unbiased=False).mean(0))
