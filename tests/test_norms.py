"""The averaged generator's batch norm has statistics of its own: those of the trained generators do not fit it."""
import argparse

import torch
from conftest import flags, load
from torch.nn.modules.batchnorm import _BatchNorm


def test_the_average_is_saved_with_the_statistics_of_what_it_makes(kind, root, tmp_path):
    """Those of 256 pictures in four batches; where nothing is averaged, or normalised, they are left alone."""
    script, argv = kind
    script.main(flags(script, root, tmp_path, *argv.split(), "--steps", 2))
    saved = load(tmp_path / "models.pth")
    args, seen = argparse.Namespace(**saved["config"]), []
    generator = script.make_networks(args)[0].eval()
    generator.load_state_dict(saved["Generator"])
    norm = next((module for module in generator.modules() if isinstance(module, _BatchNorm)), None)
    if norm is None: return
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for module in generator.modules():
        if isinstance(module, (_BatchNorm, torch.nn.Dropout2d)): module.train()
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    with torch.no_grad():
        for i in range(4): generator(script.draw_z(args, 256)[i::4])
    parts = [x.transpose(0, 1).flatten(1) for x in seen]  # of the first norm, before which is no dropout
    expected = torch.cat(parts, 1).mean(1), torch.stack([part.var(1) for part in parts]).mean(0)
    fits = [torch.allclose(*pair, rtol=1e-3, atol=1e-6) for pair in zip((mean, variance), expected)]
    assert fits == [args.ema > 0] * 2
