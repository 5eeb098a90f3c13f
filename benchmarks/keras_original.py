"""python benchmarks/keras_original.py: fashion_keras_port.py's default against the Keras original, images/second.

Three sides train the same fully connected networks at the same batch size on the same pictures, in turn, a round of one
after a round of the other; while one is timed, the others wait. Ours is what the script does: its pack, its precision,
its optimiser, gan_ops where installed. The two others are Keras with TensorFlow beneath, in a process of its own, with
the settings that compile() and train_on_batch() have by themselves, in fp32. A step of theirs takes pictures from an
array in memory by random index; makes as many, by `generator.predict(noise, verbose=0)` as published or else by calling
the model, `generator(noise, training=False)`; and calls discriminator.train_on_batch with the real ones,
discriminator.train_on_batch with the made ones, and combined.train_on_batch with new noise, where the discriminator is
frozen. predict() cuts the noise into batches of 32, as it does by itself; without verbose=0 it would draw a progress
bar in each step. No side computes an accuracy, ours adds up what the discriminator says.

A round begins with steps that are not timed. Before its first round it is checked that of the Keras networks each moves
when it should, and only then. --python names the interpreter that has TensorFlow, which need not have torch, and by
preference does not. Flags not listed below go to fashion_keras_port.py: --precision, --width, --no-fused, --device, ...
"""
import argparse, functools, json, os, statistics, subprocess, sys, time

CHILD = "--child" in sys.argv  # the process with TensorFlow, which may have no torch
if not CHILD:
    import itertools
    from pathlib import Path

    import torch

    from pack import cores, machine  # first, as it makes the scripts known
    from train import make_ours, measure
    import fashion_keras_port as script

SIDES = {"ours": "ours", "predict": "Keras, predict", "call": "Keras, call"}
INSTALL = "pip install tensorflow, by preference in an environment of its own, which --python names"


# The process with TensorFlow: a command comes in as a line of JSON, the answer goes out as another.

def make_keras(width):
    """The original's (generator, discriminator), which is compiled and not yet frozen."""
    from keras import Input, Sequential, layers, optimizers
    hidden = []
    for units in (width, 2 * width, 4 * width):
        hidden += layers.Dense(units), layers.LeakyReLU(negative_slope=0.2), layers.BatchNormalization(momentum=0.8)
    generator = Sequential([Input((100,)), *hidden, layers.Dense(784, activation="tanh"), layers.Reshape((28, 28, 1))])
    hidden = []
    for units in (2 * width, width):
        hidden += layers.Dense(units), layers.LeakyReLU(negative_slope=0.2)
    discriminator = Sequential([Input((28, 28, 1)), layers.Flatten(), *hidden, layers.Dense(1, activation="sigmoid")])
    discriminator.compile(loss="binary_crossentropy", optimizer=optimizers.Adam(2e-4, 0.5))
    return generator, discriminator


def moves(model, step):
    """Whether `step` changes any of the model's trained weights, those of a frozen one included."""
    import numpy as np
    before = model.get_weights()
    step()
    return any(not np.array_equal(a, b) for a, b in zip(before, model.get_weights()))


def make_step(pictures, width, batch, side):
    """A function that trains on one batch and returns (the discriminator's loss, the generator's), checked.

    Keras 3 looks at `trainable` in a model's first step, not when it is compiled: so the discriminator takes a step
    before it is frozen for the combined model, or else it would never learn.
    """
    import numpy as np
    from keras import Sequential, optimizers
    generator, discriminator = make_keras(width)
    ones, zeros = np.ones((batch, 1)), np.zeros((batch, 1))

    def noise():
        return np.random.normal(0, 1, (batch, 100))

    def fakes():
        return generator.predict(noise(), verbose=0) if side == "predict" else generator(noise(), training=False)

    def real():
        return pictures[np.random.randint(0, len(pictures), batch)]

    discriminator.train_on_batch(real(), ones)
    discriminator.trainable = False
    combined = Sequential([generator, discriminator])
    combined.compile(loss="binary_crossentropy", optimizer=optimizers.Adam(2e-4, 0.5))

    def step():
        made = fakes()
        d_real, d_fake = discriminator.train_on_batch(real(), ones), discriminator.train_on_batch(made, zeros)
        return (d_real + d_fake) / 2, combined.train_on_batch(noise(), ones)

    parts = (("the discriminator in a step on real pictures", discriminator, True,
              lambda: discriminator.train_on_batch(real(), ones)),
             ("the discriminator in a step on made ones", discriminator, True,
              lambda: discriminator.train_on_batch(fakes(), zeros)),
             ("the generator in a step of its own", generator, True, lambda: combined.train_on_batch(noise(), ones)),
             ("the discriminator in a step of the generator", discriminator, False,
              lambda: combined.train_on_batch(noise(), ones)),
             ("the generator in a step of the discriminator", generator, False,
              lambda: discriminator.train_on_batch(fakes(), zeros)))
    for what, model, should, part in parts:
        if moves(model, part) != should:
            raise RuntimeError(f"the Keras loop is not what it should be: {what} {'stays' if should else 'moves'}")
    return step


def serve(threads):
    """Answer commands until stdin ends: the first says what to train on, each other one is a round."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what TensorFlow prints goes elsewhere
    try:
        import keras, tensorflow
    except ImportError as error:
        print(json.dumps(dict(error=f"{sys.executable} has no TensorFlow ({error}): {INSTALL}")), file=answers)
        return
    import numpy as np
    tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(threads)
    about = dict(keras=keras.__version__, tensorflow=tensorflow.__version__, backend=keras.backend.backend(),
                 keras_threads=tensorflow.config.threading.get_intra_op_parallelism_threads(),
                 keras_precision=keras.config.dtype_policy().name,
                 keras_gpus=len(tensorflow.config.list_physical_devices("GPU")))
    first = json.loads(input())
    pictures = np.load(first["pictures"]).astype(np.float32) / 127.5 - 1
    print(json.dumps(about), file=answers)
    make = functools.cache(functools.partial(make_step, pictures, first["width"]))
    for line in sys.stdin:
        order = json.loads(line)
        step = make(order["batch"], order["side"])
        for _ in range(order["warm"]):
            step()
        began = time.perf_counter()
        for _ in range(order["steps"]):
            losses = step()
        print(json.dumps(dict(seconds=time.perf_counter() - began, losses=list(map(float, losses)))), file=answers)


# The process with torch, which starts the other.

def start_child(options, device):
    """The process with TensorFlow, on the kind of device that ours is on."""
    hidden = dict(TF_FORCE_GPU_ALLOW_GROWTH="true") if device.type == "cuda" else dict(CUDA_VISIBLE_DEVICES="-1")
    environment = dict(os.environ, KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", **hidden)
    command = [options.python, __file__, "--child", str(options.threads)]
    try:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise script.UserError(f"--python {options.python} cannot be started ({error.strerror})") from None


def ask(child, **order):
    """The child's answer to an order."""
    try:
        child.stdin.write(json.dumps(order) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # its answer, or that there is none, says more
    line = child.stdout.readline()
    answer = json.loads(line) if line else dict(error="the process with TensorFlow has ended; what it printed says why")
    if "error" in answer:
        raise script.UserError(answer["error"])
    return answer


def train_ours(args, device, precision):
    """A function that trains for so many steps after so many that warm up: (seconds, losses of the last)."""
    open_source, step, _ = make_ours(script, args, device, precision)
    source, losses = open_source(), [0, 0]

    def keep(batch):
        losses[:] = step(batch)

    def run(warm, steps):
        seconds, _ = measure(source, keep, warm, steps, device)
        return dict(seconds=seconds, losses=list(map(float, losses)))
    return run


def compare_at(batch, args, options, about, child):
    """Run the rounds at one batch size and print them; returns its figures as a dict."""
    args.batch_size = batch
    ours = train_ours(args, torch.device(about["device"]), about["precision"])
    rates, losses = {name: [] for name in SIDES}, {}
    for number, name in itertools.product(range(options.rounds), SIDES):
        lengths = dict(warm=options.warm, steps=options.steps)
        done = ours(**lengths) if name == "ours" else ask(child, side=name, batch=batch, **lengths)
        rates[name].append(options.steps * batch / done["seconds"])
        losses[name] = dict(zip(("loss_d", "loss_g"), done["losses"]))
        print(f"batch {batch}, round {number + 1}: {SIDES[name]:14} {rates[name][-1]:9.1f} images/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, label in SIDES.items():
        last = ", ".join(f"{key} {value:.3f}" for key, value in losses[name].items())
        print(f"batch {batch}, median:  {label:14} {medians[name]:9.1f} images/s; at the end {last}")
    ratios = {name: medians["ours"] / medians[name] for name in SIDES if name != "ours"}
    for name, ratio in ratios.items():
        single = [f"{a / b:.2f}" for a, b in zip(rates["ours"], rates[name])]
        print(f"batch {batch}, ours to {SIDES[name]}: ratio of the medians {ratio:.2f}; of the single rounds:", *single)
    return dict(images_per_second=rates, median=medians, ratios=ratios, losses=losses)


def compare(args, options):
    """Start the child, run all rounds; returns all figures as a dict."""
    if (args.arch, args.conditional, args.loss) != ("dense", False, "bce"):
        raise script.UserError("the Keras original is --arch dense with --loss bce, and knows no classes")
    torch.set_num_threads(options.threads)
    device, precision, _ = script.pick_device(args)
    script.load_pack(args)  # made where there is none
    child = start_child(options, device)
    try:
        theirs = ask(child, pictures=str(script.find_pack(args)[0]), width=args.width)
        if device.type == "cuda" and not theirs["keras_gpus"]:
            raise script.UserError("TensorFlow finds no GPU: pip install 'tensorflow[and-cuda]', or --device cpu")
        fused = script.use_gan_ops(device, not args.no_fused)
        about = dict(machine(), script=script.SCRIPT, data=args.data[0], threads=torch.get_num_threads(),
                     device=str(device), precision=precision, gan_ops=fused, width=args.width, steps=options.steps,
                     warm=options.warm, **theirs)
        print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
        return dict(about, batch_sizes={n: compare_at(n, args, options, about, child) for n in options.batch_sizes})
    finally:
        child.communicate()  # closes its stdin, at which it ends


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    add = parser.add_argument
    add("--python", default=sys.executable, help="the interpreter that has TensorFlow (this one)")
    add("--batch-sizes", type=int, nargs="+", default=[32, 128], help="(32 128)")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=200, help="timed steps in a round (200)")
    add("--warm", type=int, default=20, help="steps before them (20)")
    add("--threads", type=int, default=cores(), help="for each side (all cores)")
    add("--json", type=Path, help="write the results there")
    options, others = parser.parse_known_args()
    try:
        args, _ = script.parse(others)
        result = compare(args, options)
    except script.UserError as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    serve(int(sys.argv[-1])) if CHILD else main()
