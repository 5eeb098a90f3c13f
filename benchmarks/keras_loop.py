"""The Keras original's loop, for peers.py, which runs this file by the interpreter that has Keras.

    PYTHON_WITH_TENSORFLOW benchmarks/keras_loop.py '{"images": "images.npy", "side": "call", ...}'

It trains as the JSON says and prints its figures in the last line, as JSON. No torch is needed.
"""

import json
import sys
import time

import keras
import numpy as np


def make_networks(width):
    """The original's (generator, discriminator), which is compiled and not yet frozen."""
    layers = keras.layers
    generator = keras.Sequential([keras.Input((100,))])
    for units in (width, 2 * width, 4 * width):
        generator.add(layers.Dense(units))
        generator.add(layers.LeakyReLU(negative_slope=0.2))
        generator.add(layers.BatchNormalization(momentum=0.8))
    generator.add(layers.Dense(784, activation="tanh"))
    generator.add(layers.Reshape((28, 28, 1)))

    discriminator = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten()])
    for units in (2 * width, width):
        discriminator.add(layers.Dense(units))
        discriminator.add(layers.LeakyReLU(negative_slope=0.2))
    discriminator.add(layers.Dense(1, activation="sigmoid"))
    discriminator.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adam(2e-4, 0.5))
    return generator, discriminator


def check_moves(model, step, should):
    """End unless `step` changes the model's weights, or leaves them if it should."""
    before = model.get_weights()
    step()
    moves = any((a != b).any() for a, b in zip(before, model.get_weights()))
    if moves != should:
        raise SystemExit(f"{step.__name__}: {model.name} moves: {moves}")


def make_step(images, width, batch, side):
    """A function that trains on one batch, checked."""
    generator, discriminator = make_networks(width)
    ones = np.ones((batch, 1))
    zeros = np.zeros((batch, 1))

    def noise():
        return np.random.normal(0, 1, (batch, 100))

    def train_on_real():
        rows = np.random.randint(0, len(images), batch)
        discriminator.train_on_batch(images[rows], ones)

    def train_on_fake():
        if side == "predict":  # as published
            fake = generator.predict(noise(), verbose=0)
        else:
            fake = generator(noise(), training=False)
        discriminator.train_on_batch(fake, zeros)

    def train_generator():
        combined.train_on_batch(noise(), ones)

    def step():
        train_on_fake()
        train_on_real()
        train_generator()

    train_on_real()  # in which Keras 3 looks at `trainable`: frozen before it, it would never learn
    discriminator.trainable = False
    combined = keras.Sequential([generator, discriminator])
    combined.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adam(2e-4, 0.5))
    check_moves(discriminator, train_on_real, True)
    check_moves(discriminator, train_on_fake, True)
    check_moves(generator, train_generator, True)
    check_moves(discriminator, train_generator, False)
    check_moves(generator, train_on_fake, False)
    return step


def main(order):
    images = np.load(order["images"]) / np.float32(127.5) - 1
    step = make_step(images, order["width"], order["batch"], order["side"])
    for _ in range(order["warm_up"]):
        step()
    began = time.perf_counter()
    for _ in range(order["steps"]):
        step()
    rate = order["steps"] * order["batch"] / (time.perf_counter() - began)
    backend = keras.backend.backend()
    about = {
        "keras": keras.__version__,
        "precision": keras.config.dtype_policy().name,
        backend: sys.modules[backend].__version__,
    }
    print(json.dumps({"images_per_second": rate, "about": about}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
