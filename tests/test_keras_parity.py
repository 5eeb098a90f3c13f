"""fashion_keras_port.py against Keras itself: the same training, and .keras files both ways, none of them run."""
import functools
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="cpu")  # which Keras reads as it is imported

import h5py
import keras
import numpy as np
import pytest
import torch
from keras import layers as L
from torch import nn

import fashion_keras_port as port
from test_fashion_keras_port import fails, run

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
LEAKY = functools.partial(L.LeakyReLU, negative_slope=0.2)


def generator_layers(width=256, dense=L.Dense, norm=functools.partial(L.BatchNormalization, momentum=0.8), last="tanh"):
    """The layers of the original's generator, from the first Dense on."""
    found = []
    for units in (width, 2 * width, 4 * width):
        found += dense(units), LEAKY(), norm()
    return [*found, dense(784, activation=last), L.Reshape((28, 28, 1))]


def discriminator_layers(width=256):
    return [L.Flatten(), L.Dense(2 * width), LEAKY(), L.Dense(width), LEAKY(), L.Dense(1, activation="sigmoid")]


def sequential(shape, layers):
    return keras.Sequential([keras.Input(shape), *layers])


def nested(shape, layers):
    """A functional model around a sequential one."""
    x = keras.Input(shape)
    return keras.Model(x, sequential(shape, layers)(x))


def chained(shape, layers):
    """A functional model of the layers themselves, activations apart from their Dense layers."""
    x = first = keras.Input(shape)
    for layer in layers:
        kind = layer.activation.__name__ if isinstance(layer, L.Dense) else "linear"
        if kind != "linear":
            layer.activation = keras.activations.linear
        x = layer(x)
        x = x if kind == "linear" else L.Activation(kind)(x)
    return keras.Model(first, x)


def of_keras(model):
    """A Keras model's weights and statistics in order, as tensors shaped as PyTorch has them."""
    found = []
    for layer in model.layers:
        inside = hasattr(layer, "layers")
        weights = [] if inside else map(np.array, layer.get_weights())
        found += of_keras(layer) if inside else [
            torch.tensor((w if w.dtype.kind == "f" else w.astype(np.float32)).T) for w in weights]
    return found


def of_port(network):
    """The same of a network of the port, the tensors themselves."""
    found = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            found += [module.weight] if module.bias is None else [module.weight, module.bias]
        elif isinstance(module, nn.BatchNorm1d):
            found += module.weight, module.bias, module.running_mean, module.running_var
    return found


def shake(model, seed=0):
    """Give a Keras model other biases and statistics than those that it begins with, so that they count."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if hasattr(layer, "layers"):
            shake(layer, seed + 1)
        else:
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in layer.get_weights()])
    return model


def numpy_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


# The same training

@pytest.fixture
def double(monkeypatch):
    """float64 throughout, in Keras, which on torch would go back to float32 in each Dense layer, and in the port."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setitem(sys.modules[keras.backend.result_type.__module__].BIT64_TO_BIT32_DTYPE, "float64", "float64")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield torch.float64
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True)
def twins_again():
    yield
    port.use_gan_ops(CPU, False)


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
        real, z, z2 = real.numpy() / 127.5 - 1, z.numpy(), z2.numpy()
        fake, ones, zeros = numpy_of(self.g(z, training=False)), np.ones((len(z), 1)), np.zeros((len(z), 1))
        self.d.trainable = True
        loss_d = self.d.train_on_batch(real, ones) + self.d.train_on_batch(fake, zeros)
        self.d.trainable = False
        return loss_d / 2, self.combined.train_on_batch(z2, ones)

    def tensors(self):
        return of_keras(self.g) + of_keras(self.d)


def translated(original, dtype, fused, width=256):
    """(args, what a step changes) of the port with the original's weights."""
    assert (port.use_gan_ops(CPU, fused) == "serves") == fused
    args = port.parse(["--width", str(width)])[0]
    nets = port.build(args, CPU, "fp32")
    with torch.no_grad():
        for new, tensor in zip(original.tensors(), of_port(nets.G.to(dtype)) + of_port(nets.D.to(dtype)), strict=True):
            tensor.copy_(new)
    if dtype == torch.float64:  # the optimisers' state was made for float32
        nets.opt_g, nets.opt_d = (port.Optimiser(n.parameters(), 2e-4, **nets.adam) for n in (nets.G, nets.D))
    return args, nets


def batch(step, dtype, size=32):
    """Pictures and the noise of both passes; torch.manual_seed(step) makes train_step draw the second."""
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


def race(dtype, width, seed, steps):
    """Train the original and, with gan_ops and without, the port; yields (step, moved of Keras, of the port's two).

    The losses have to agree on the way.
    """
    original = Original(width, seed)
    began, ports = original.tensors(), [(fused, *translated(original, dtype, fused, width)) for fused in (True, False)]
    for step in range(1, max(steps) + 1):
        real, z, z2 = batch(step, dtype)
        losses = original.step(real, z, z2)
        for fused, args, nets in ports:
            port.use_gan_ops(CPU, fused)
            torch.manual_seed(step)
            port.train_step(nets, args, (real, z, torch.zeros(32, 8), torch.ones(())))
            assert nets.last[:2].tolist() == pytest.approx(losses, rel=1e-6 if dtype == torch.float64 else 1e-3)
        if step in steps:
            yield step, moved(original.tensors(), began), [moved(of_port(nets.G) + of_port(nets.D), began)
                                                           for _, _, nets in ports]


def test_twenty_steps_in_float64_are_kerass(double):
    """Every weight and statistic, at the original's size, after the first step and after twenty."""
    for step, theirs, both in race(double, 256, 0, (1, 20)):
        assert sum(map(len, theirs)) == 1_493_520 + 533_505 and theirs[0].abs().mean() > 1e-4 < theirs[1].abs().mean()
        for ours in both:
            for mine, other in zip(ours, theirs):
                assert (mine - other).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_twenty_steps_in_float32_are_kerass_to_rounding(seed):
    """By norm: at times one value near LeakyReLU's kink falls on the other side, and Adam makes much of it.

    After one step they differ by 1e-5 of how far they have moved; after twenty by 1e-6 as a rule, but 2e-2 was seen.
    """
    for step, theirs, both in race(torch.float32, 32, seed, (1, 20)):
        for ours in both:
            for mine, other in zip(ours, theirs):
                assert (mine - other).norm() / other.norm() < (1e-4 if step == 1 else 5e-2)


def gradients(loss, weights):
    """Of a loss by weights, each a tensor or a Keras variable, shaped as PyTorch has them."""
    weights = list(weights)
    found = torch.autograd.grad(loss, [getattr(weight, "value", weight) for weight in weights])
    return [gradient.mT if gradient.ndim == 2 and hasattr(weight, "value") else gradient
            for gradient, weight in zip(found, weights)]


@pytest.mark.parametrize("fused", [True, False])
def test_values_losses_and_gradients_are_kerass(fused, double):
    """In inference and in training mode, from weights and statistics other than those they begin with."""
    original = Original(16)
    shake(original.g), shake(original.d)
    _, nets = translated(original, double, fused, 16)
    real, z, z2 = batch(1, double)
    x, bce, ones = real.double() / 127.5 - 1, keras.losses.binary_crossentropy, torch.ones(32, 1).double()

    def same(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)

    with torch.no_grad():
        fake, theirs = nets.G.eval()(z), original.g(z, training=False)
    assert fake.std() > 0.1
    same(fake[:, 0], theirs[..., 0])
    for pictures, is_real in (x, True), (theirs, False):
        loss = port.LOSSES["bce"][0](nets.D(pictures.permute(0, 3, 1, 2), logits=True), is_real)
        expected = bce(ones * is_real, original.d(pictures)).mean()
        same(loss, expected)
        mine, other = gradients(loss, nets.D.parameters()), gradients(expected, original.d.trainable_weights)
        for a, b in zip(mine, other, strict=True):
            same(a, b)
    fake, theirs = nets.G.train()(z2), original.g(z2, training=True)
    same(fake[:, 0], theirs[..., 0])
    loss = port.LOSSES["bce"][1](nets.D(fake, logits=True))
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
    ours, theirs = torch.full((3,), 0.5, dtype=double, requires_grad=True), keras.Variable(np.full(3, 0.5))
    plain = ours.detach().clone().requires_grad_()
    adam, optimiser = keras.optimizers.Adam(2e-4, 0.5), port.Optimiser([ours], 2e-4, betas=(0.5, 0.999), fused=True)
    torch_adam = torch.optim.Adam([plain], 2e-4, betas=(0.5, 0.999), eps=1e-7)
    for step in range(30):
        gradient = size * torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=double)
        adam.apply([gradient.clone()], [theirs])
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        optimiser.step(), torch_adam.step()
        torch.testing.assert_close(ours.detach(), theirs.value.detach(), rtol=0, atol=1e-13)
        if step == 0 and size <= 1e-6:
            assert (plain - ours).abs().min() > 1e-6


@pytest.mark.parametrize("is_real", [True, False])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 3e-8), (torch.float64, 0)])
def test_loss_is_kerass_where_the_verdict_is_certain(is_real, dtype, rounding):
    """Keras clips probabilities at 1e-7, beyond which there is no gradient."""
    for value in -30.0, -17.0, -15.0, -3.0, 0.0, 3.0, 15.0, 17.0, 30.0:
        ours, theirs = (torch.full((1, 1), value, dtype=dtype, requires_grad=True) for _ in range(2))
        loss, expected = port.clipped_bce(ours, is_real), keras.losses.binary_crossentropy(
            torch.full((1, 1), float(is_real), dtype=dtype), keras.ops.sigmoid(theirs)).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=rounding)
        loss.backward(), expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-12)
        assert (ours.grad.item() == 0) == (abs(value) > 16.2)


# .keras files

G_SHAPE, D_SHAPE = (100,), (28, 28, 1)


def probe(model, seed=0):
    """What a Keras model makes of one and the same batch, N,-1."""
    x = np.random.default_rng(seed).normal(0, 0.5, (16, *model.input_shape[1:])).astype(np.float32)
    return numpy_of(model(x, training=False)).reshape(16, -1)


def load(file):
    return keras.saving.load_model(file)


def checkpoint(path, *flags, drop=()):
    """A models.pth of networks that have seen no training."""
    args = port.parse(["--width", "2", *flags])[0]
    args.names = ["a", "b"] if args.conditional else []
    nets = port.build(args, CPU, "fp32")
    for tensor in of_port(nets.G) + of_port(nets.D):
        tensor.data.uniform_(0.5, 1.5) if tensor.ndim == 1 else None
    saved = dict(Generator=nets.G.state_dict(), Discriminator=nets.D.state_dict(),
                 config=dict(vars(args), script=port.SCRIPT))
    torch.save({name: value for name, value in saved.items() if name not in drop}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """g.keras and d.keras, of width 4, in a folder."""
    folder = tmp_path_factory.mktemp("keras")
    for name, shape, layers in ("g", G_SHAPE, generator_layers), ("d", D_SHAPE, discriminator_layers):
        shake(nested(shape, layers(4))).save(folder / f"{name}.keras")
    return folder


@pytest.mark.parametrize("make", [sequential, nested, chained])
@pytest.mark.parametrize("width, d_width", [(256, 256), (128, 128), (4, 4)])
def test_from_keras_to_the_port_and_back(make, width, d_width, tmp_path, monkeypatch, capsys):
    """Equal weights, statistics and outputs; models.pth makes pictures, too."""
    monkeypatch.chdir(tmp_path)
    models = shake(make(G_SHAPE, generator_layers(width))), shake(make(D_SHAPE, discriminator_layers(d_width)), 5)
    for model, name in zip(models, "gd"):
        model.save(f"{name}.keras")
    run("--import-keras", "g.keras", "d.keras", "--out", "run")
    told = [float(line.split(" by ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if " by " in line]
    assert len(told) == 2 and max(told) < 1e-5
    run("--export-keras", "back-g.keras", "back-d.keras", "--checkpoint", "run/models.pth")
    for model, name in zip(models, "gd"):
        back = load(f"back-{name}.keras")
        assert back.input_shape == model.input_shape and back.output_shape == model.output_shape
        for a, b in zip(of_keras(back), of_keras(model), strict=True):
            assert torch.equal(a, b)
        np.testing.assert_allclose(probe(back), probe(model), atol=1e-6)
        assert probe(back).std() > 1e-3
        norms = [layer for layer in back.layers if isinstance(layer, L.BatchNormalization)]
        assert [(norm.momentum, norm.epsilon) for norm in norms] == [(0.8, 1e-3)] * (3 if name == "g" else 0)
    run("--generate", 70, "--checkpoint", "run/models.pth", "--save", "g.npz", "--device", "cpu")
    z = torch.cat([torch.randn(64, 100, generator=(numbers := torch.Generator().manual_seed(0))),
                   torch.randn(64, 100, generator=numbers)])[:70]
    pictures = numpy_of(models[0](z.numpy(), training=False))[..., 0]
    assert np.abs(np.load("g.npz")["images"] - (pictures + 1) * 127.5).max() <= 1.01


def test_trained_here_it_is_the_same_in_keras_and_comes_back_the_same(tmp_path):
    """From a checkpoint.pt, by way of both files; the one with the generator alone works as well."""
    path = checkpoint(tmp_path / "models.pth")
    run("--export-keras", tmp_path / "g.keras", tmp_path / "d.keras", "--checkpoint", path)
    run("--export-keras", tmp_path / "alone.keras", "--checkpoint", path)
    assert np.array_equal(probe(load(tmp_path / "g.keras")), probe(load(tmp_path / "alone.keras")))
    run("--import-keras", tmp_path / "g.keras", tmp_path / "d.keras", "--out", tmp_path / "both")
    run("--import-keras", tmp_path / "alone.keras", "--out", tmp_path / "one")
    saved, both, one = (torch.load(file, weights_only=True) for file in (
        path, tmp_path / "both" / "models.pth", tmp_path / "one" / "models.pth"))
    assert list(one) == ["Generator", "config"] and list(both) == ["Generator", "Discriminator", "config"]
    for name in "Generator", "Discriminator":
        for other in (both, one) if name == "Generator" else (both,):
            assert saved[name].keys() == other[name].keys()
            assert all(torch.equal(value, other[name][key]) for key, value in saved[name].items()
                       if not key.endswith("num_batches_tracked"))
    run("--generate", 2, "--checkpoint", tmp_path / "one" / "models.pth", "--save", tmp_path / "g.png")
    assert (tmp_path / "g.png").exists()


def compiled(model):
    model.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adam(2e-4, 0.5), metrics=["accuracy"])
    return model


def frozen(model):
    model.trainable = False
    return model


def drawn(units, **options):
    """A Dense layer that begins in another way."""
    return L.Dense(units, kernel_initializer=keras.initializers.RandomNormal(0, 0.02, seed=3),
                   bias_initializer=keras.initializers.Constant(0.1), **options)


def mixed(policy):
    """A function that makes a generator which computes in 16 bits, with weights as large as trained ones."""
    def make():
        dense = functools.partial(L.Dense, dtype=policy, kernel_initializer=keras.initializers.RandomNormal(0, 0.5, 1))
        norm = functools.partial(L.BatchNormalization, dtype=policy)
        return [shake(sequential(G_SHAPE, generator_layers(16, dense, norm)))]
    return make


ALIKE = {
    "mixed bfloat16": mixed("mixed_bfloat16"), "mixed float16": mixed("mixed_float16"),
    "compiled": lambda: [compiled(nested(G_SHAPE, generator_layers(4))), compiled(nested(D_SHAPE,
                                                                                         discriminator_layers(4)))],
    "frozen": lambda: [nested(G_SHAPE, generator_layers(4)), frozen(sequential(D_SHAPE, discriminator_layers(4)))],
    "initialisers": lambda: [sequential(G_SHAPE, generator_layers(4, drawn))],
    "other momentum": lambda: [sequential(G_SHAPE, generator_layers(4, norm=L.BatchNormalization))],
    "bfloat16": lambda: [sequential(G_SHAPE, generator_layers(4, functools.partial(L.Dense, dtype="bfloat16")))],
    "float64": lambda: [sequential(G_SHAPE, generator_layers(4, functools.partial(L.Dense, dtype="float64")))],
    "without a channel": lambda: [sequential(G_SHAPE, generator_layers(4)[:-1]),
                                  sequential((28, 28), discriminator_layers(4))],
    "flat pictures": lambda: [sequential(G_SHAPE, generator_layers(4)), sequential((784,),
                                                                                   discriminator_layers(4)[1:])]}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_files_that_are_as_good(make, tmp_path):
    """Compiled, frozen, begun otherwise or of another shape outside, it is the same GAN."""
    models = make()
    for i, model in enumerate(models):
        model.save(tmp_path / f"{i}.keras")
    run("--import-keras", *(tmp_path / f"{i}.keras" for i in range(len(models))), "--out", tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "models.pth", weights_only=True)
    for model, kind in zip(models, (port.Generator, port.Discriminator)):
        net = kind(saved["config"]["width"])
        net.load_state_dict(saved[kind.__name__])
        for a, b in zip(of_port(net), of_keras(model), strict=True):
            assert torch.equal(a.detach(), b.float())


def refused(capsys, tmp_path, *argv):
    """The error line of --import-keras, which has to leave nothing behind."""
    line = fails(capsys, "--import-keras", *argv, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return line


OTHERS = {
    "other layer": (lambda: [*generator_layers(4), L.Dropout(0.5)], "Dropout"),
    "convolution": (lambda: [*generator_layers(4), L.Conv2D(1, 3, padding="same")], "Conv2D"),
    "layer left out": (lambda: generator_layers(4)[3:], "layer "),
    "other widths": (lambda: [*generator_layers(4)[:3], L.Dense(9), *generator_layers(4)[4:]], "4x9"),
    "no bias": (lambda: generator_layers(4, functools.partial(L.Dense, use_bias=False)), "layer 1 "),
    "slope": (lambda: [generator_layers(4)[0], L.LeakyReLU(negative_slope=0.3), *generator_layers(4)[2:]], "0.3"),
    "epsilon": (lambda: generator_layers(4, norm=functools.partial(L.BatchNormalization, epsilon=1e-5)), "1e-05"),
    "no scale": (lambda: generator_layers(4, norm=functools.partial(L.BatchNormalization, scale=False)), "layer 3 "),
    "last activation": (lambda: generator_layers(4, last="sigmoid"), "sigmoid"),
    "no last activation": (lambda: generator_layers(4, last=None), "linear"),
    "activation too many": (lambda: [*generator_layers(4), L.Activation("tanh")], "layer 11 "),
    "inner activation": (lambda: [L.Dense(4, activation="relu"), *generator_layers(4)[1:]], "relu"),
    "order": (lambda: [generator_layers(4)[i] for i in (0, 2, 1, *range(3, 11))], "layer 2 "),
    "nothing": (lambda: [L.Flatten()], "nothing")}


@pytest.mark.parametrize("layers, words", OTHERS.values(), ids=OTHERS)
def test_another_network_is_no_generator_of_this_gan(layers, words, tmp_path, capsys):
    sequential(G_SHAPE, layers()).save(tmp_path / "g.keras")
    line = refused(capsys, tmp_path, tmp_path / "g.keras")
    assert str(tmp_path / "g.keras") in line and words in line


def twice():
    """A generator's layers, LeakyReLU's first used twice in a row."""
    first, leaky, *rest = generator_layers(4)
    x = keras.Input(G_SHAPE)
    y = leaky(leaky(first(x)))
    for layer in rest:
        y = layer(y)
    return keras.Model(x, y)


def two_outputs():
    model = sequential(G_SHAPE, generator_layers(4))
    return keras.Model(model.inputs, [model.outputs[0], model.layers[0].output])


def unbuilt():
    return keras.Sequential(generator_layers(4))


def other_noise():
    return sequential((50,), generator_layers(4))


@pytest.mark.parametrize("make", [twice, two_outputs, unbuilt, other_noise])
def test_the_layers_connected_otherwise_are_no_generator(make, tmp_path, capsys):
    shake(make()).save(tmp_path / "g.keras") if make is not unbuilt else make().save(tmp_path / "g.keras")
    assert "no generator" in refused(capsys, tmp_path, tmp_path / "g.keras")


def test_two_files_that_do_not_go_together(files, tmp_path, capsys):
    g, d = files / "g.keras", files / "d.keras"
    assert "784x8" in refused(capsys, tmp_path, d, g)
    assert "no discriminator" in refused(capsys, tmp_path, g, g)
    assert "generator and, after it" in refused(capsys, tmp_path, g, d, g)
    nested(D_SHAPE, discriminator_layers(5)).save(tmp_path / "d.keras")
    assert "different widths, 4 and 5" in refused(capsys, tmp_path, g, tmp_path / "d.keras")
    assert "--arch dense" in refused(capsys, tmp_path, g, d, "--arch", "dcgan")
    assert "--arch dense" in refused(capsys, tmp_path, g, d, "--conditional")


def test_models_that_are_there_already_stay(files, tmp_path, capsys):
    (tmp_path / "models.pth").write_text("mine")
    assert "already" in fails(capsys, "--import-keras", files / "g.keras", "--out", tmp_path)
    assert (tmp_path / "models.pth").read_text() == "mine"


def edited(source, path, change=None, compression=zipfile.ZIP_STORED):
    """A copy of a .keras file whose parts are what change(name, bytes) gives, or left out where that is None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name)) if change else old.read(name)
            if data is not None:
                new.writestr(name, data)
    return path


def marked(path, offset, value):
    """A zip whose directory says something else of each part: a byte at so many from where its entry begins."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        data[place + offset] = value
        place = data.find(b"PK\x01\x02", place + 4)
    path.write_bytes(data)


def damaged(path):
    """A compressed file whose config.json is garbage from some byte on."""
    data = bytearray(edited(path, path.with_name("c.keras"), compression=zipfile.ZIP_DEFLATED).read_bytes())
    place = data.find(b"config.json") + 40
    data[place : place + 30] = b"\xff" * 30
    path.write_bytes(data)


def config_of(text):
    """A function that puts another config.json into the file."""
    def change(path):
        shutil.move(path, path.with_name("c.keras"))
        edited(path.with_name("c.keras"), path, lambda name, data: text if name == "config.json" else data)
    return change


def part_of(end, share):
    """A function that leaves but a share of each part with a name that ends so, and with 0 nothing of it."""
    def change(path):
        shutil.move(path, path.with_name("c.keras"))
        edited(path.with_name("c.keras"), path,
               lambda name, data: (data[: int(share * len(data))] or None) if name.endswith(end) else data)
    return change


BROKEN = {"missing": Path.unlink, "text": lambda path: path.write_text("hello\n" * 99), "folder": lambda path: (
    path.unlink(), path.mkdir()), "hdf5": lambda path: h5py.File(path, "w").close(),
    "no config": part_of("config.json", 0), "half a config": part_of("config.json", 0.5),
    "no weights": part_of(".h5", 0), "half the weights": part_of(".h5", 0.5), "encrypted": lambda p: marked(p, 8, 1),
    "unknown compression": lambda p: marked(p, 10, 77), "damaged": damaged, "list": config_of("[]"),
    "number": config_of("3"), "no classes": config_of("{}"), "deep": config_of("[" * 99999 + "]" * 99999),
    "not utf-8": config_of(b"\xff\xfe\xff")}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read(spoil, files, tmp_path, capsys):
    path = tmp_path / "set" / "g.keras"
    path.parent.mkdir()
    shutil.copy(files / "g.keras", path)
    spoil(path)
    assert str(path) in refused(capsys, tmp_path, path)


@pytest.mark.parametrize("length", [0, 1, 30, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999, -22, -1])
def test_a_file_that_is_cut_short(length, files, tmp_path, capsys):
    data = (files / "g.keras").read_bytes()
    length = int(length * len(data)) if isinstance(length, float) else length
    (tmp_path / "g.keras").write_bytes(data[:length])
    assert "g.keras" in refused(capsys, tmp_path, tmp_path / "g.keras")


# Code in .keras files

@pytest.fixture
def unread(monkeypatch):
    """Keras may not see the file at all."""
    def load_model(*args, **options):
        pytest.fail("Keras has got the file")
    monkeypatch.setattr(keras.saving, "load_model", load_model)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A Lambda whose code makes a file, `ran` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return L.Lambda(lambda x: [open("ran", "w").close(), x][1])


def test_a_lambda_is_not_run(trap, tmp_path, capsys):
    """It would have been: Keras, told to trust the file, runs it."""
    ran = tmp_path / "ran"
    sequential(G_SHAPE, [trap, *generator_layers(4)]).save(tmp_path / "g.keras")
    ran.unlink()
    assert "keras.layers.Lambda" in refused(capsys, tmp_path, tmp_path / "g.keras")
    assert not ran.exists()
    keras.saving.load_model(tmp_path / "g.keras", safe_mode=False)
    assert ran.exists()


@pytest.mark.parametrize("end", [".h5", ".hdf5", ".zip", "", ".KERAS"])
def test_a_good_file_hidden_in_another_does_not_get_it_read(end, trap, files, tmp_path, capsys, unread):
    """Keras goes by the name: an HDF5 file with a zip behind it is two models, of which the other has a Lambda."""
    path, ran = tmp_path / "g.h5", tmp_path / "ran"
    sequential(G_SHAPE, [trap]).save(path)
    with zipfile.ZipFile(path, "a") as archive, zipfile.ZipFile(files / "g.keras") as good:
        for name in good.namelist():
            archive.writestr(name, good.read(name))
    ran.unlink()
    path = path.rename(tmp_path / f"g{end}")
    assert ".keras" in refused(capsys, tmp_path, path) and not ran.exists()


class Registered(L.Layer):
    """A class that the user's own program has made known to Keras; from a file it would make another."""
    made = []

    def __init__(self, **options):
        super().__init__()
        Registered.made.append(options)


@pytest.fixture(autouse=True)
def registered():
    with keras.saving.custom_object_scope({"mine>Registered": Registered}):
        yield Registered.made.clear()


def places(value, path=()):
    """Where in a config.json something is named that Keras makes."""
    if isinstance(value, dict) and "class_name" in value:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def evil(module, name, registered=None, **more):
    return dict(module=module, class_name=name, config=dict(command="true"), registered_name=registered, **more)


EVIL = [evil("os", "system"), evil("subprocess", "Popen"), evil("builtins", "eval", "eval"), evil("os", "Dense"),
        evil("keras.layers", "Lambda"), evil("keras.layers", "TorchModuleWrapper"), evil("keras.layers", "TFSMLayer"),
        evil("keras.src.layers", "Lambda"), evil("kerasx", "Dense"), evil("keras_hub.layers", "Dense"),
        evil("", "system"), evil(None, "Lambda"), evil("keras.layers", "Dense", "mine>Registered"),
        evil(None, "Dense", "Registered"), evil("keras.initializers", "Zeros", "mine>Registered"),
        evil("keras.initializers", "__lambda__"), evil("keras.initializers", "function"),
        evil("keras.initializers", "deserialize"), evil("keras.initializers.os", "System"),
        evil("keras.initializersx", "Zeros"), evil("builtins", "__lambda__"), evil("keras.optimizers", "Adam"),
        evil("keras.saving", "load_model"), evil("keras.layers", ["Dense"]), evil(["keras"], "Dense"),
        evil("keras.layers", {"a": 1}), evil("keras.layers", None), evil("os", 5), dict(class_name="Lambda"),
        evil("keras.layers", "Dense", ["mine>Registered"]), dict(class_name="system", module="os")]
WAYS = None, "config", "dtype", "activation", "build_config", "compile_config"


def put(config, path, way, named):
    """A copy of a config.json with something else named at a place of it, or in what that is made with."""
    whole = dict(config=json.loads(json.dumps(config)))
    parent = whole
    for key in ("config", *path)[:-1]:
        parent = parent[key]
    last = ("config", *path)[-1]
    if way is None:
        parent[last] = {**named, "inbound_nodes": parent[last].get("inbound_nodes", [])}
    else:
        parent[last]["config"][way] = {"x": [named]}
    return json.dumps(whole["config"])


@pytest.mark.parametrize("named", EVIL, ids=str)
def test_whatever_else_a_file_names_keras_does_not_get_to_see_it(named, files, tmp_path, unread):
    """In the place of each part of a good file, and two levels deep in what each is made with."""
    with zipfile.ZipFile(files / "g.keras") as archive:
        good = json.loads(archive.read("config.json"))
    where = list(places(good))
    assert len(where) > 40
    for i, path in enumerate(where):
        for way in WAYS if i < 4 else WAYS[:2]:
            text = put(good, path, way, named)
            broken = edited(files / "g.keras", tmp_path / "g.keras",
                            lambda name, data: text if name == "config.json" else data)
            with pytest.raises(port.UserError, match="no part of this GAN and is not run"):
                port.load_keras(str(broken))


def test_a_class_of_the_users_program_is_not_made(files, tmp_path):
    """It would have been, by its registered name, whatever else the file says."""
    def change(name, data):
        if name != "config.json":
            return data
        config = json.loads(data)
        layer = config["config"]["layers"][1]["config"]["layers"][1]
        layer.update(module=None, class_name="Dense", registered_name="mine>Registered")
        return json.dumps(config)

    path = edited(files / "g.keras", tmp_path / "g.keras", change)
    with pytest.raises(port.UserError, match="is not run"):
        port.load_keras(str(path))
    assert not Registered.made
    with pytest.raises(Exception):
        keras.saving.load_model(path)
    assert Registered.made


def test_keras_too_is_told_to_run_nothing(files, monkeypatch):
    """And is given a path, since it fetches what a text may name from the network."""
    given, load_model = [], keras.saving.load_model
    monkeypatch.setattr(keras.saving, "load_model", lambda path, **options: given.append((path, options)) or load_model(
        path, **options))
    port.load_keras(str(files / "g.keras"))
    assert given == [(files / "g.keras", dict(compile=False, safe_mode=True))] and isinstance(given[0][0], Path)


def test_how_it_was_compiled_is_not_looked_at(files, tmp_path):
    """The one part that may name anything, since Keras does not read it either."""
    def change(name, data):
        return json.dumps({**json.loads(data), "compile_config": evil(None, "Adam", "mine>Registered")}
                          ) if name == "config.json" else data

    path = edited(files / "g.keras", tmp_path / "g.keras", change)
    run("--import-keras", path, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "models.pth").exists() and not Registered.made


# What cannot be exported

EXPORTS = {"no suffix": (["g.h5"], [], ".keras"), "one of two": (["g.keras", "d"], [], ".keras"),
           "three": (["a.keras", "b.keras", "c.keras"], [], ".keras"),
           "dcgan": (["g.keras"], ["--arch", "dcgan"], "--arch dense"),
           "conditional": (["g.keras"], ["--conditional"], "--conditional"),
           "no discriminator": (["g.keras", "d.keras"], ["Discriminator"], "no discriminator")}


@pytest.mark.parametrize("names, flags, words", EXPORTS.values(), ids=EXPORTS)
def test_what_cannot_be_exported(names, flags, words, tmp_path, capsys):
    drop = [flag for flag in flags if flag == "Discriminator"]
    path = checkpoint(tmp_path / "models.pth", *(flag for flag in flags if flag not in drop), drop=drop)
    line = fails(capsys, "--export-keras", *(tmp_path / name for name in names), "--checkpoint", path)
    assert words in line and [file.name for file in tmp_path.iterdir()] == ["models.pth"]


def test_without_keras(files, tmp_path, capsys, monkeypatch):
    path = checkpoint(tmp_path / "models.pth")
    monkeypatch.setitem(sys.modules, "keras", None)
    assert "pip install keras" in refused(capsys, tmp_path, files / "g.keras")
    assert "pip install keras" in fails(capsys, "--export-keras", tmp_path / "g.keras", "--checkpoint", path)
    assert not (tmp_path / "g.keras").exists()
