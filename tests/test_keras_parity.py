"""fashion_keras_port.py against Keras itself: networks, first weights, Adam, losses, training."""

import functools
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="cpu")  # which Keras reads as it is imported

import keras
import numpy as np
import pytest
import torch
from keras import layers as L
from torch import nn

import fashion_keras_port as port

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LEAKY = functools.partial(L.LeakyReLU, negative_slope=0.2)
NO_NETWORKS = SimpleNamespace(G=nn.Sequential(), D=nn.Sequential())
SAID = port.use_gan_ops(port.parse([])[0], NO_NETWORKS, torch.device("cpu"))
FUSED = [False, True] if SAID == "serves on cpu" else [False]  # by gan_ops too, where it is installed


def generator_layers(width=256):
    """The layers of the original's generator."""
    found = []
    for units in (width, 2 * width, 4 * width):
        found += L.Dense(units), LEAKY(), L.BatchNormalization(momentum=0.8)
    return [*found, L.Dense(784, activation="tanh"), L.Reshape((28, 28, 1))]


def discriminator_layers(width=256):
    layers = [L.Flatten(), L.Dense(2 * width), LEAKY(), L.Dense(width), LEAKY()]
    return [*layers, L.Dense(1, activation="sigmoid")]


def sequential(shape, layers):
    return keras.Sequential([keras.Input(shape), *layers])


def of_keras(model):
    """A Keras model's weights and statistics in order, as tensors shaped as PyTorch has them."""
    return [torch.tensor(np.array(w).T) for layer in model.layers for w in layer.get_weights()]


def of_port(network):
    """The same of a network of the port, the tensors themselves."""
    found = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            found += module.weight, module.bias
        elif isinstance(module, nn.BatchNorm1d):
            found += module.weight, module.bias, module.running_mean, module.running_var
    return found


def shake(model):
    """Give a Keras model other biases and statistics than those that it begins with, so that they count."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in layer.get_weights()])


def numpy_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.fixture
def double(monkeypatch):
    """float64 throughout, in the port and in Keras, whose Dense layers on torch would go back to float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    dtypes = sys.modules[keras.backend.result_type.__module__].BIT64_TO_BIT32_DTYPE
    monkeypatch.setitem(dtypes, "float64", "float64")
    torch.set_default_dtype(torch.float64)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield torch.float64
    torch.set_default_dtype(torch.float32)
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class Original:
    """The GAN and its loop as they are written in Keras."""

    def __init__(self, width=256, seed=0):
        keras.utils.set_random_seed(seed)
        self.g = sequential((100,), generator_layers(width))
        self.d = sequential((28, 28, 1), discriminator_layers(width))
        z = keras.Input((100,))
        self.combined = keras.Model(z, self.d(self.g(z)))
        for model in self.d, self.combined:
            model.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adam(2e-4, 0.5))

    def step(self, real, z, z2):
        """(the discriminator's mean loss, the generator's) of one iteration."""
        real = real.numpy() / 127.5 - 1
        fake = numpy_of(self.g(z.numpy(), training=False))
        ones, zeros = np.ones((len(z), 1)), np.zeros((len(z), 1))
        self.d.trainable = True
        loss_d = self.d.train_on_batch(real, ones) + self.d.train_on_batch(fake, zeros)
        self.d.trainable = False
        return loss_d / 2, self.combined.train_on_batch(z2.numpy(), ones)

    def tensors(self):
        return of_keras(self.g) + of_keras(self.d)


def translated(original, dtype, fused, width=256):
    """(args, what a step changes) of the port with the original's weights."""
    args = port.parse(["--width", str(width)])[0]
    G, D = (net.to(dtype) for net in port.make_networks(args))
    with torch.no_grad():
        for new, tensor in zip(original.tensors(), of_port(G) + of_port(D), strict=True):
            tensor.copy_(new)
    for module in G.modules():
        module.fused = fused
    opt_g = port.Optimiser(G.parameters(), args.lr, betas=args.betas, fused=True)
    opt_d = port.Optimiser(D.parameters(), args.d_lr, betas=args.betas, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    options = {"autocast": nullcontext, "scaler": scaler, "lr_factor": 1.0}
    return args, SimpleNamespace(G=G, D=D, opt_g=opt_g, opt_d=opt_d, **options)


def batch(step, dtype, size=32):
    """Images and the noise of both passes; torch.manual_seed(step) makes train_step draw the second."""
    generator = torch.Generator().manual_seed(step)
    real = torch.randint(0, 256, (size, 28, 28, 1), generator=generator, dtype=torch.uint8)
    z = torch.randn(size, 100, generator=generator, dtype=dtype)
    torch.manual_seed(step)
    return real, z, torch.randn_like(z)


STATISTICS = {4, 5, 10, 11, 16, 17}  # the generator's, among all tensors


def moved(tensors, began):
    """How far weights and statistics are from where they began, two vectors."""
    parts = [], []
    for i, (tensor, before) in enumerate(zip(tensors, began, strict=True)):
        parts[i in STATISTICS].append((tensor.detach() - before).flatten())
    return [torch.cat(part) for part in parts]


def train_both(dtype, width, seed, steps):
    """Train the original and the port, by gan_ops too; yield (step, moved of Keras, [moved of the port]).

    The losses have to agree on the way.
    """
    original = Original(width, seed)
    began = original.tensors()
    ports = [translated(original, dtype, fused, width) for fused in FUSED]
    for step in range(1, max(steps) + 1):
        real, z, z2 = batch(step, dtype)
        losses = original.step(real, z, z2)
        for args, nets in ports:
            torch.manual_seed(step)
            images = real.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
            metrics = port.train_step(nets, args, images, z)
            ours = [metrics[name].item() for name in ("loss_d", "loss_g")]
            assert ours == pytest.approx(losses, rel=1e-6 if dtype == torch.float64 else 1e-3)
        if step in steps:
            ours = [moved(of_port(nets.G) + of_port(nets.D), began) for _, nets in ports]
            yield step, moved(original.tensors(), began), ours


def test_twenty_steps_in_float64_are_kerass(double):
    """Every weight and statistic, at the original's size, after the first step and after twenty."""
    for _, theirs, both in train_both(double, 256, 0, (1, 20)):
        assert sum(map(len, theirs)) == 1_493_520 + 533_505
        assert theirs[0].abs().mean() > 1e-4 < theirs[1].abs().mean()
        for ours in both:
            for mine, other in zip(ours, theirs):
                assert (mine - other).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_twenty_steps_in_float32_are_kerass_to_rounding(seed):
    """By norm: at times one value near LeakyReLU's kink falls on the other side, and Adam makes much of it.

    After one step they differ by 1e-5 of how far they have moved; after twenty by 1e-6, or at times 2e-2.
    """
    for step, theirs, both in train_both(torch.float32, 32, seed, (1, 20)):
        for ours in both:
            for mine, other in zip(ours, theirs):
                assert (mine - other).norm() / other.norm() < (1e-4 if step == 1 else 5e-2)


def gradients(loss, weights):
    """Of a loss by weights, each a tensor or a Keras variable, shaped as PyTorch has them."""
    weights = list(weights)
    found = list(torch.autograd.grad(loss, [getattr(weight, "value", weight) for weight in weights]))
    for i, weight in enumerate(weights):
        if hasattr(weight, "value") and found[i].ndim == 2:  # a Keras kernel
            found[i] = found[i].mT
    return found


@pytest.mark.parametrize("fused", FUSED)
def test_values_losses_and_gradients_are_kerass(fused, double):
    """In inference and in training mode, from weights and statistics other than those they begin with."""
    original = Original(16)
    shake(original.g)
    shake(original.d)
    _, nets = translated(original, double, fused, 16)
    real, z, z2 = batch(1, double)
    x = real.double() / 127.5 - 1
    bce = keras.losses.binary_crossentropy
    ones = torch.ones(32, 1).double()

    def same(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)

    with torch.no_grad():
        fake, theirs = nets.G.eval()(z), original.g(z, training=False)
    assert fake.std() > 0.1
    same(fake[:, 0], theirs[..., 0])
    for images, is_real in (x, True), (theirs, False):
        loss = port.adversarial_loss("bce", nets.D(images.permute(0, 3, 1, 2), logits=True), is_real)
        expected = bce(ones * is_real, original.d(images)).mean()
        same(loss, expected)
        mine, other = gradients(loss, nets.D.parameters()), gradients(expected, original.d.trainable_weights)
        for a, b in zip(mine, other, strict=True):
            same(a, b)
    fake, theirs = nets.G.train()(z2), original.g(z2, training=True)
    same(fake[:, 0], theirs[..., 0])
    loss = port.adversarial_loss("bce", nets.D(fake, logits=True), True)
    expected = bce(ones, original.d(theirs)).mean()
    same(loss, expected)
    mine, other = gradients(loss, nets.G.parameters()), gradients(expected, original.g.trainable_weights)
    assert len(mine) == 14 and min(gradient.abs().max() for gradient in other) > 1e-9
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())
    for a, b in zip(of_port(nets.G), of_keras(original.g), strict=True):
        same(a.detach(), b)  # the statistics, which have moved once


def test_first_weights_are_glorot_uniform_and_biases_zero():
    """Kernels fill the range that Keras draws them from, evenly; batch norm begins at 1 and 0."""
    torch.manual_seed(1)
    nets = port.make_networks(port.parse([])[0])
    for ours, theirs in zip(of_port(nets[0]) + of_port(nets[1]), Original().tensors(), strict=True):
        if ours.ndim == 1:
            assert torch.equal(ours.detach(), theirs)
            continue
        bound = (6 / sum(ours.shape)) ** 0.5
        for kernel in ours, theirs:
            assert bound * (1 - 20 / kernel.numel()) < kernel.abs().max() <= bound
            assert kernel.var().item() == pytest.approx(bound**2 / 3, rel=6 / kernel.numel() ** 0.5)
            assert abs(kernel.mean().item()) < 5 * bound / 3**0.5 / kernel.numel() ** 0.5


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-3, 1.0])
def test_adam_is_kerass_for_small_gradients_too(size, double):
    """Where epsilon counts; PyTorch's own, given the same epsilon, would be far off at the first steps."""
    ours = torch.full((3,), 0.5, dtype=double, requires_grad=True)
    theirs = keras.Variable(np.full(3, 0.5))
    plain = ours.detach().clone().requires_grad_()
    adam = keras.optimizers.Adam(2e-4, 0.5)
    optimiser = port.Optimiser([ours], 2e-4, betas=(0.5, 0.999), fused=True)
    torch_adam = torch.optim.Adam([plain], 2e-4, betas=(0.5, 0.999), eps=1e-7)
    for step in range(30):
        gradient = size * torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=double)
        adam.apply([gradient.clone()], [theirs])
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        optimiser.step()
        torch_adam.step()
        torch.testing.assert_close(ours.detach(), theirs.value.detach(), rtol=0, atol=1e-13)
        if step == 0 and size <= 1e-6:
            assert (plain - ours).abs().min() > 1e-6


@pytest.mark.parametrize("is_real", [True, False])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 3e-8), (torch.float64, 0)])
def test_loss_is_kerass_where_the_probability_is_near_0_or_1(is_real, dtype, rounding):
    """Keras clips probabilities at 1e-7, beyond which there is no gradient."""
    for value in -30.0, -17.0, -15.0, -3.0, 0.0, 3.0, 15.0, 17.0, 30.0:
        ours, theirs = (torch.full((1, 1), value, dtype=dtype, requires_grad=True) for _ in range(2))
        loss = port.adversarial_loss("bce", ours, is_real)
        target = torch.full((1, 1), float(is_real), dtype=dtype)
        expected = keras.losses.binary_crossentropy(target, keras.ops.sigmoid(theirs)).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=rounding)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-12)
        assert (ours.grad.item() == 0) == (abs(value) > 16.2)
