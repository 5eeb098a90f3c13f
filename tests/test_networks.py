"""The networks are the ones that the docstrings name: shapes, numbers of weights, first weights, labels."""

import copy

import pytest
import torch
from shared_parts import TOP
from torch import nn
from torch.nn import functional as F

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port

CONVS = nn.Conv2d, nn.ConvTranspose2d


def networks(script, flags, classes=10):
    """(generator, discriminator) that a command line gives, here for this many classes."""
    args = script.parse(flags.split())[0]
    if hasattr(args, "class_names"):
        args.class_names = [str(i) for i in range(classes)]
    return script.make_networks(args)


def count(network):
    return sum(p.numel() for p in network.parameters())


def randomised(network):
    """The network with every weight, bias and statistic drawn by chance."""
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(0, 0.3)
    return network


def of_cspup(width):
    """The slides' networks counted by hand: per block two transposed, one 1x1 and two 3x3 convolutions."""
    channels = [100, 16 * width, 8 * width, 4 * width, 2 * width, width]
    g = width * 3 * 16 + 3
    for half, c in zip([c // 2 for c in channels], channels[1:]):
        g += 2 * half * c * 16 + half * half + half + 2 * (c * c * 9 + c)
    channels = [3, width, 2 * width, 4 * width, 8 * width, 16 * width]
    return g, convolutions(channels)


def convolutions(channels):
    """4x4 convolutions with biases, and one to a logit."""
    return sum(a * b * 16 + b for a, b in zip(channels, channels[1:])) + channels[-1] * 16 + 1


def of_digits():
    """cgan_residual.py's networks counted by hand."""
    g = 256 * 3136 + 3136  # linear layer to 64x7x7
    g += 4 * 64 + 2 * 9 * 64 * 64  # residual block: two batch norms, two convolutions
    g += 2 * 64 + 16 * 64 * 32 + 2 * 32 + 16 * 32 * 16 + 2 * 16  # batch norms, transposed convolutions
    g += 9 * 16 + 1
    return g, CONDITIONAL_D


# Three convolutions and two linear layers, and a vector of 256 for each of ten classes
CONDITIONAL_D = 16 * 16 + 16 + 512 * 16 + 32 + 9 * 32 * 64 + 64 + 1024 * 256 + 256 + 256 + 1 + 10 * 256


def of_style(w, classes):
    """`--arch style` counted by hand: mapping, start, per block a style, a convolution, noise, bias, grey."""
    g = (classes + 100) * 128 + 128 + 128 * 128 + 128 + 4 * w * 49
    for a, b, taps in (4 * w, 4 * w, 9), (4 * w, 2 * w, 16), (2 * w, w, 16):
        g += 129 * a + taps * a * b + 1 + b + b + 1
    return g


def of_dcgan(w, classes):
    """`--arch dcgan` likewise: a linear layer, two that double, a convolution, norms after all but the last."""
    return (101 + classes) * 4 * w * 49 + (16 * 8 + 16 * 2) * w * w + 3 * w + 2 * 7 * w + 9 * w + 1


@pytest.mark.parametrize(
    "script, flags, g, d",
    [
        (dcgan, "--recipe classic", 3_576_704, 2_765_568),
        (dcgan, "", 3_576_704, 2_765_568 + 16),
        (cspup128, "--scheme exact", *of_cspup(64)),
        (cspup128, "--scheme exact --width 6", *of_cspup(6)),
        (cgan_residual, "", *of_digits()),
        (fashion_keras_port, "", 1_489_936, 533_505),
        (fashion_keras_port, "--conditional", 1_489_936 + 2560, 533_505 + 2560),
        (fashion_keras_port, "--arch style --conditional", of_style(16, 10), CONDITIONAL_D),
        (fashion_keras_port, "--arch dcgan --conditional", of_dcgan(16, 10), CONDITIONAL_D),
        (fashion_keras_port, "--arch dcgan --width 5", of_dcgan(5, 0), None),
    ],
    ids=lambda value: getattr(value, "SCRIPT", None),
)
def test_numbers_of_weights(script, flags, g, d):
    assert count(networks(script, flags)[0]) == g
    assert d is None or count(networks(script, flags)[1]) == d


def test_the_default_discriminator_of_cspup128_is_twice_as_wide_at_its_end():
    assert count(networks(cspup128, "--width 6")[1]) == convolutions([3, 6, 12, 24, 96, 192])


@pytest.mark.parametrize(
    "script, flags, shapes",
    [
        (dcgan, "--width 4", [(32, 4, 4), (16, 8, 8), (8, 16, 16), (4, 32, 32)]),
        (
            dcgan,
            "--width 2 --size 128 --channels 1",
            [(16, 4, 4), (16, 8, 8), (8, 16, 16), (4, 32, 32), (2, 64, 64)],
        ),
        (cspup128, "--width 2", [(32, 4, 4), (16, 8, 8), (8, 16, 16), (4, 32, 32), (2, 64, 64)]),
        (
            cspup128,
            "--width 2 --scheme exact",
            [(32, 4, 4), (16, 8, 8), (8, 16, 16), (4, 32, 32), (2, 64, 64)],
        ),
        (cgan_residual, "--width 2", [(8, 7, 7), (4, 14, 14), (2, 28, 28)]),
        (cgan_residual, "--width 2 --blocks 3", [(8, 7, 7), (4, 14, 14), (2, 28, 28)]),
        (fashion_keras_port, "--width 2 --arch style", [(8, 7, 7), (4, 14, 14), (2, 28, 28)]),
        (fashion_keras_port, "--width 2 --arch dcgan", [(8, 7, 7), (4, 14, 14), (2, 28, 28)]),
    ],
    ids=lambda value: getattr(value, "SCRIPT", None),
)
def test_each_layer_doubles_the_image(script, flags, shapes):
    G, D = networks(script, flags)
    seen = []

    def note(module, inputs, output):
        for x in (*inputs, output):
            if torch.is_tensor(x) and x.ndim == 4:
                seen.append(tuple(x.shape[1:]))

    for module in G.modules():
        module.register_forward_hook(note)
    args = script.parse(flags.split())[0]
    z_dim = script.Z_DIM + 10 if script is cgan_residual else script.Z_DIM
    images = G(torch.randn(3, z_dim))
    places = [seen.index(shape) for shape in shapes]
    assert places == sorted(places)
    assert images.shape == (3, args.channels, args.size, args.size) and images.abs().max() <= 1
    assert D(images).shape == ((3,) if script in (dcgan, cspup128) else (3, 1))


@pytest.mark.parametrize("script", [dcgan, cspup128, cgan_residual], ids=lambda script: script.SCRIPT)
def test_first_weights_are_dcgans(script):
    """Of the generator; cspup128.py's discriminator has He's, whose variance keeps the logits' scale."""
    torch.manual_seed(0)
    G, D = networks(script, "")
    nets = [G, D] if script is dcgan else [G]
    layers = [m for net in nets for m in net.modules() if isinstance(m, (*CONVS, nn.Linear))]
    weights = [layer.weight.flatten() for layer in layers]
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.02)
    norms = torch.cat([m.weight for m in G.modules() if isinstance(m, nn.BatchNorm2d)])
    if script is not cgan_residual:
        assert norms.mean().item() == pytest.approx(1, abs=0.005)
        assert norms.std().item() == pytest.approx(0.02, rel=0.1)
    if script is cspup128:
        for layer in (m for m in D.modules() if isinstance(m, nn.Conv2d)):
            fan = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / (1.04 * fan)) ** 0.5, rel=0.05)


def test_the_exact_scheme_has_no_normalisation_and_relu_in_the_generator():
    G, D = networks(cspup128, "--scheme exact --width 2")
    assert not list(G.buffers()) and not list(D.buffers())
    assert {m.negative_slope for m in G.modules() if isinstance(m, nn.LeakyReLU)} == {0}
    assert {m.negative_slope for m in D.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_the_block_that_circulates_pads_by_0_and_its_sum_fails():
    block = cspup128.CSPup(8, 4, slope=0.0, norm=False, up="deconv")
    halves = torch.randn(2, 1, 4, 6, 6)
    assert torch.equal(torch.cat(block(*halves), 1), block.left(halves[0]) + block.right(halves[1]))
    for layer in block.right:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.padding = (0, 0)
    with pytest.raises(RuntimeError):
        block(*halves)


def test_the_seam_adds_normalises_activates_and_splits_in_this_order():
    left, right = torch.randn(2, 5, 4, 3, 3)
    x = left + right
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    made = cspup128.SplitAdd(4, slope=0.3)(left, right)
    assert [part.shape[1] for part in made] == [2, 2]
    torch.testing.assert_close(torch.cat(made, dim=1), torch.where(x > 0, x, 0.3 * x))


@pytest.mark.parametrize(
    "up, left, right",
    [("nearest", "bilinear", "nearest"), ("bilinear", "bilinear", "bilinear"), ("deconv", None, None)],
)
def test_what_doubles_the_image_in_each_branch(up, left, right):
    G, _ = networks(cspup128, f"--width 2 --up {up}")
    assert G(torch.randn(2, 100)).shape == (2, 3, 128, 128)
    for number, block in enumerate(G.blocks):  # the first makes 4x4 of 1x1
        for layer, mode in ((block.left, left), (block.right[2], right)):
            assert getattr(layer, "mode", None) == (mode if number > 0 else None)


@pytest.mark.parametrize("convs", [4, 5])
def test_four_or_five_strided_convolutions(convs):
    _, D = networks(cspup128, f"--width 2 --d-convs {convs}")
    assert sum(m.stride == (2, 2) for m in D.modules() if isinstance(m, nn.Conv2d)) == convs
    assert D(torch.randn(3, 3, 128, 128)).shape == (3,)


def test_minibatch_standard_deviation_is_the_mean_over_the_features():
    D = randomised(dcgan.Discriminator(32, 3, 2, minibatch_std=True)).eval()
    x = torch.randn(6, 3, 32, 32)
    features = D.layers(x)
    std = features.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(6, 1, 4, 4)
    torch.testing.assert_close(D(x), F.conv2d(torch.cat([features, std], 1), D.logit.weight).flatten())
    same = D(x[:1].expand(6, -1, -1, -1))
    assert (same[0] - D(x)[0]).abs() > 1e-4  # one and the same image, beside others and beside itself


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_block_adds_to_x_what_it_computes(training):
    block = randomised(cgan_residual.Residual(6, 0.0)).train(training)
    state = copy.deepcopy(block.state_dict())
    x = torch.randn(4, 6, 7, 7)

    def normalised(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.leaky_relu(F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training), 0.2)

    added = F.conv2d(normalised(x, "layers.0"), state["layers.1.weight"], padding=1)
    added = F.conv2d(normalised(added, "layers.2"), state["layers.4.weight"], padding=1)
    torch.testing.assert_close(block(x), x + added, rtol=1e-4, atol=1e-4)
    assert added.std() > 0.1


def test_dropout_is_for_training_alone():
    for network, inputs in (
        (cgan_residual.Generator(4, dropout=0.5), [torch.randn(4, 256)]),
        (cgan_residual.Discriminator(4, dropout=0.5), [torch.randn(4, 1, 28, 28), torch.arange(4)]),
    ):
        randomised(network)
        assert not torch.equal(network(*inputs), network(*inputs))
        assert torch.equal(network.eval()(*inputs), network(*inputs))
        assert any(m.p > 0 for m in type(network)().modules() if isinstance(m, nn.modules.dropout._DropoutNd))


@pytest.mark.parametrize(
    "script, flags",
    [
        (cgan_residual, "--width 4"),
        (fashion_keras_port, "--width 4 --conditional --arch dense"),
        (fashion_keras_port, "--width 4 --conditional --arch style"),
        (fashion_keras_port, "--width 4 --conditional --arch dcgan"),
    ],
)
def test_a_label_decides_on_images_and_on_logits(script, flags):
    """By projection: the class's vector times the features; of digits without labels the mean over all."""
    G, D = (randomised(network).eval() for network in networks(script, flags, 3))
    images = G(torch.cat([torch.eye(3), torch.randn(1, script.Z_DIM).expand(3, -1)], 1)).detach()
    assert (images[0] - images[1]).std() > 1e-5 < (images[1] - images[2]).std()
    labels = torch.tensor([2, 0, 2])
    one_hot = F.one_hot(labels, 3).float()
    features = D.layers(images)
    class_logits = D.logit(features) + features @ D.of_class.weight  # N,3: the logit for each class
    expected = class_logits.gather(1, labels[:, None])
    torch.testing.assert_close(D(images, one_hot, logits=True), expected)
    torch.testing.assert_close(D(images, one_hot), expected.sigmoid())
    if script is cgan_residual:  # as README's text on digits calls it
        torch.testing.assert_close(D(images, labels, logits=True), expected)
        torch.testing.assert_close(D(images, logits=True), class_logits.mean(1, True))
    assert class_logits.std(1).min() > 1e-3  # else the labels would say nothing


def test_styled_convolutions_are_the_papers():
    """Weights are scaled by the style and brought to one length, for each image (Karras et al. 2020).

    The length is root 2, as LeakyReLU halves the power, over the taps that a pixel sees, a quarter of them
    where the size doubles.
    """
    G = randomised(fashion_keras_port.StyleGenerator(2, 3)).eval()
    z = torch.randn(3, 103)
    expected = []
    for latent in G.map(z):
        x, image = G.start, torch.zeros(1, 1, 7, 7)
        for i, (layer, style, grey) in enumerate(zip(G.convs, G.styles, G.greys)):
            stride = 1 if i == 0 else 2
            weight = layer.weight * (1 + style(latent))[:, None, None, None]  # c_in,c_out,kernel,kernel
            power = weight.square().sum((0, 2, 3)) / stride**2
            length = (2 / (power + 1e-8)).sqrt()
            weight = weight * length[None, :, None, None]
            x = F.conv_transpose2d(x, weight, layer.bias * length, stride, padding=1)
            x = F.leaky_relu(x, 0.2)
            if stride == 2:
                image = F.interpolate(image, scale_factor=2, mode="bilinear")
            image = image + grey(x)
        expected.append(image.tanh())
    torch.testing.assert_close(G(z), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert G(z).std() > 0.03 and G(z).abs().max() < 0.99  # where tanh tells values apart
    assert (G.train()(z) - G.eval()(z)).std() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_modules_are_exchangeable_with_pytorchs(training):
    x = torch.randn(3, 4, 6, 5, 5)
    ours, theirs = dcgan.BatchNormLeakyReLU(6, 0.1), nn.BatchNorm2d(6)
    theirs.load_state_dict(randomised(ours).state_dict())
    for batch in x:
        expected = F.leaky_relu(theirs.train(training)(batch), 0.1)
        torch.testing.assert_close(ours.train(training)(batch), expected)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_readmes_text_on_digits_runs_in_a_run_folder(tmp_path, monkeypatch):
    """Word for word: README's own, with its names and shapes, on weights of the default's size."""
    text = (TOP / "README.md").read_text()
    (text,) = [part for part in text.split("```python\n") if part.startswith("import torch as t\n")]
    G, D = map(randomised, networks(cgan_residual, ""))
    models = {"Generator": G.state_dict(), "Discriminator": D.state_dict()}
    torch.save(models, tmp_path / "models.pth")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(text.split("```")[0], names)
    images, labels, judge = names["images"], names["labels"], names["discriminator"]
    assert images.shape == (10, 1, 28, 28) and images.abs().max() <= 1 and images.std() > 0.05
    assert names["verdict"].shape == (10, 1) and 0 <= names["verdict"].min() <= names["verdict"].max() <= 1
    torch.testing.assert_close(judge(images, labels), judge(images, names["one_hot"]))
