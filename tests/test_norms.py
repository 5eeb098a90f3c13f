"""The averaged generator's batch norm has statistics of its own: those of the trained generators do not fit it."""
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def settled(kind):
    """(script, its arguments, a generator with other weights than it began with, settled; its first batch norm, the
    inputs of that, N,C,...); None where the networks have no batch norm."""
    script, flags = kind
    args, _ = script.parse(flags.split())
    args.names = ["a", "b", "c", "d"]
    generator, seen = script.make_networks(args)[0].eval(), []
    norm = next((module for module in generator.modules() if isinstance(module, _BatchNorm)), None)
    if norm is None: return None
    for parameter in generator.parameters(): parameter.data.mul_(3)
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    script.settle_norms(generator, script.draw_z(args, 64))
    hook.remove()
    return script, args, generator, norm, seen


def test_statistics_are_those_of_all_pictures(kind):
    found = settled(kind)
    if not found: return  # --scheme exact and styles: there is nothing to settle
    _, _, generator, norm, seen = found
    if type(norm).__name__ == "LeakyReLUBatchNorm": seen = [nn.functional.leaky_relu(x, 0.2) for x in seen]
    parts = [x.transpose(0, 1).flatten(1) for x in seen]
    assert len(parts) == 4
    torch.testing.assert_close(norm.running_mean, torch.cat(parts, 1).mean(1), rtol=1e-3, atol=1e-5)
    mean_variance = torch.stack([part.var(1, correction=0) for part in parts]).mean(0)
    torch.testing.assert_close(norm.running_var, mean_variance, rtol=0.1, atol=1e-6)
    assert not any(module.training for module in generator.modules())


def test_again_gives_the_same(kind):
    """So a resumed run, which settles them at other steps, ends with the same numbers."""
    found = settled(kind)
    if not found: return
    script, args, generator, _, _ = found
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    script.settle_norms(generator, script.draw_z(args, 64))
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())
