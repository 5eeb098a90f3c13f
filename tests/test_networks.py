"""The networks are the scheme: shapes, layers, numbers of weights, and the padding that the copies lack."""
import pytest
import torch
from torch import nn

import cspup128


def networks(*flags):
    return cspup128.make_networks(cspup128.parse(list(flags))[0])


def count(network):
    return sum(p.numel() for p in network.parameters())


def exact_generator_weights(width):
    """The slide's generator counted by hand: per block two transposed, one 1x1 and two 3x3 convolutions."""
    channels = [100, 16 * width, 8 * width, 4 * width, 2 * width, width]
    total = 0
    for c_in, c_out in zip(channels, channels[1:]):
        half = c_in // 2
        total += 2 * half * c_out * 16  # left and right transposed convolution, no bias
        total += half * half + half  # 1x1
        total += 2 * (c_out * c_out * 9 + c_out)  # 3x3, twice
    return total + width * 3 * 16 + 3


def exact_discriminator_weights(width):
    channels = [3, width, 2 * width, 4 * width, 8 * width, 16 * width]
    convs = sum(c_in * c_out * 16 + c_out for c_in, c_out in zip(channels, channels[1:]))
    return convs + 16 * width * 16 + 1


@pytest.mark.parametrize("width", [64, 6])
def test_exact_scheme_has_the_weights_of_the_slides_and_no_normalisation(width):
    g, d = networks("--scheme", "exact", "--width", str(width))
    assert count(g) == exact_generator_weights(width)
    assert count(d) == exact_discriminator_weights(width)
    assert not list(g.buffers()) and not list(d.buffers())
    assert all(m.negative_slope == 0 for m in g.modules() if isinstance(m, nn.LeakyReLU))
    assert all(m.negative_slope == 0.2 for m in d.modules() if isinstance(m, nn.LeakyReLU))


@pytest.mark.parametrize("scheme", ["stable", "exact"])
def test_every_block_doubles_the_picture_and_halves_the_channels(scheme):
    g, d = networks("--scheme", scheme, "--width", "2")
    seen = []
    for seam in g.seams:
        seam.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1:]))
    pictures = g(torch.randn(2, 100))
    assert [tuple(s) for s in seen] == [(32, 4, 4), (16, 8, 8), (8, 16, 16), (4, 32, 32), (2, 64, 64)]
    assert pictures.shape == (2, 3, 128, 128)
    assert d(pictures).shape == (2,)


def test_pictures_reach_both_ends_of_the_range():
    g, _ = networks("--scheme", "exact", "--width", "2")
    with torch.no_grad():
        g.picture.weight.mul_(1e6)
        pictures = g(torch.randn(4, 100))
    assert pictures.min() == -1 and pictures.max() == 1


def test_the_block_that_circulates_pads_by_0_and_its_sum_fails():
    block = cspup128.CSPup(8, 4, slope=0.0, norm=False)
    left, right = block(torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6))
    assert left.shape == right.shape == (1, 4, 12, 12)
    for layer in block.right:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.padding = (0, 0)
    left, right = block(torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6))
    assert left.shape[-1] - right.shape[-1] == 4
    with pytest.raises(RuntimeError):
        cspup128.SplitAdd(4, 0.0, norm=False)(left, right)


def test_the_seam_adds_normalises_activates_and_splits_in_this_order():
    seam = cspup128.SplitAdd(4, slope=0.3)
    left, right = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    x = left + right
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + seam.eps).sqrt()
    expected = torch.where(x > 0, x, 0.3 * x)
    torch.testing.assert_close(torch.cat(seam(left, right), dim=1), expected)
    bare = cspup128.SplitAdd(4, slope=0.3, norm=False, split=False)
    assert torch.equal(bare(left, right), left + right)


@pytest.mark.parametrize("convs", range(1, 6))
def test_fewer_convolutions_still_end_in_one_logit(convs):
    _, d = networks("--width", "2", "--d-convs", str(convs))
    strided = [m for m in d.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == convs
    assert d(torch.randn(3, 3, 128, 128)).shape == (3,)


def test_spectral_norm_bounds_every_convolution():
    _, d = networks("--width", "2", "--d-norm", "spectral")
    for _ in range(30):
        d(torch.randn(2, 3, 128, 128))
    for layer in d.modules():
        if isinstance(layer, nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            assert norm == pytest.approx(1.0, rel=0.05)


def test_slope_and_width_reach_the_generator():
    g, _ = networks("--width", "3", "--slope", "0.05")
    slopes = {m.slope for m in g.modules() if isinstance(m, cspup128.BatchNormLeakyReLU)}
    assert slopes == {0.05} and g.picture[1].in_channels == 3


@pytest.mark.parametrize("up, left, right", [
    ("mixed", "bilinear", "nearest"), ("bilinear", "bilinear", "bilinear"), ("nearest", "nearest", "nearest"),
    ("deconv", None, None)])
def test_what_doubles_the_picture_in_each_branch(up, left, right):
    g, _ = networks("--width", "2", "--up", up)
    assert g(torch.randn(2, 100)).shape == (2, 3, 128, 128)
    for number, block in enumerate(g.blocks):
        for layer, how in ((block.left, left), (block.right[2], right)):
            if how is None or number == 0:  # the first makes 4x4 of 1x1
                assert isinstance(layer, nn.ConvTranspose2d)
            else:
                assert layer.mode == how and layer.scale_factor == 2
    assert isinstance(g.picture, nn.ConvTranspose2d) == (up == "deconv")


def test_an_interpolating_left_branch_passes_its_channels_on():
    block = cspup128.CSPup(8, 4, slope=0.2, norm=True)
    a = torch.randn(2, 4, 6, 6)
    left, _ = block(a, torch.randn(2, 4, 6, 6))
    assert torch.equal(left, nn.functional.interpolate(a, scale_factor=2, mode="bilinear"))


def test_batch_norm_module_is_exchangeable_with_pytorchs():
    ours, theirs = cspup128.BatchNormLeakyReLU(6, 0.1), nn.BatchNorm2d(6)
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5)
        torch.testing.assert_close(ours(x), nn.functional.leaky_relu(theirs(x), 0.1))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(ours.eval()(x), nn.functional.leaky_relu(theirs.eval()(x), 0.1))
