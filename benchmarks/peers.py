"""python benchmarks/peers.py keras --python PYTHON_WITH_TENSORFLOW: our Keras port against the Keras original
   python benchmarks/peers.py plain --slice 150: cgan_residual.py against the plain conditional GAN

keras: images a second, in turn, each round in a process of its own. Both sides train the same fully connected
networks at the same batch size on the same pictures, ours as in train.py, Keras with the settings that
compile() and train_on_batch() have by themselves, in fp32. A step of it makes pictures by `predict(noise,
verbose=0)` as published, or else by calling the model; then the discriminator's train_on_batch with these and
with real ones, of an array in memory by random index, and combined.train_on_batch with new noise, where the
discriminator is frozen. It is checked that each network moves when it should, and only then.

plain: quality after equal time. The plain one is the best-known such script as published: fully connected, an
embedding of the label beside noise and picture, batch norm whose eps is 0.8, least squares, Adam at 2e-4, 64
a batch, a DataLoader in the main process, 28x28 pixels. Both train on MNIST in turn, a slice of one after a
slice of the other; only the time of training counts. After each slice the classifier of
tools/evaluate.py reads 10,000 pictures of each, with the labels of the test set. The plain generator is
judged in training mode, as its script samples, and in evaluation mode; the better one counts.

Flags not listed below go to the script: --root, --width, --precision, --seed, --no-fused, ...
"""
import json, os, sys, time

import numpy as np

CHILD = "--child" in sys.argv  # the process with TensorFlow, which may have no torch
if not CHILD:
    import importlib, itertools, shutil, signal, subprocess, tempfile
    from pathlib import Path
    from unittest import mock
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.utils import save_image

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
    from train import CORES, DIGITS, compare, fail, machine, measure, save, show, start_parser

KERAS = "predict", "call"  # how it makes pictures for the discriminator

# The Keras original
def make_keras(width):
    """The original's (generator, discriminator), which is compiled and not yet frozen."""
    from keras import Input, Sequential, layers, optimizers
    made, seen = [Input((100,))], [Input((28, 28, 1)), layers.Flatten()]
    for units in (width, 2 * width, 4 * width):
        made += layers.Dense(units), layers.LeakyReLU(negative_slope=0.2)
        made.append(layers.BatchNormalization(momentum=0.8))
    for units in (2 * width, width):
        seen += layers.Dense(units), layers.LeakyReLU(negative_slope=0.2)
    generator = Sequential([*made, layers.Dense(784, activation="tanh"), layers.Reshape((28, 28, 1))])
    discriminator = Sequential([*seen, layers.Dense(1, activation="sigmoid")])
    discriminator.compile(loss="binary_crossentropy", optimizer=optimizers.Adam(2e-4, 0.5))
    return generator, discriminator

def moves(model, step):
    """Whether `step` changes any of the model's weights."""
    before = model.get_weights()
    step()
    return any((a != b).any() for a, b in zip(before, model.get_weights()))

def keras_step(pictures, width, batch, side):
    """A function that trains on one batch, checked."""
    from keras import Sequential, optimizers
    generator, discriminator = make_keras(width)
    ones, zeros = np.ones((batch, 1)), np.zeros((batch, 1))

    def noise():
        return np.random.normal(0, 1, (batch, 100))

    def on_real():
        discriminator.train_on_batch(pictures[np.random.randint(0, len(pictures), batch)], ones)

    def on_made():
        published = side == "predict"
        made = generator.predict(noise(), verbose=0) if published else generator(noise(), training=False)
        discriminator.train_on_batch(made, zeros)

    def of_generator():
        combined.train_on_batch(noise(), ones)

    on_real()  # in which Keras 3 looks at `trainable`: frozen before it, the discriminator would never learn
    discriminator.trainable = False
    combined = Sequential([generator, discriminator])
    combined.compile(loss="binary_crossentropy", optimizer=optimizers.Adam(2e-4, 0.5))
    for model, step, should in ((discriminator, on_real, True), (discriminator, on_made, True),
                                (generator, of_generator, True), (discriminator, of_generator, False),
                                (generator, on_made, False)):
        assert moves(model, step) == should, f"{step.__name__}: {model.name} moves: {not should}"
    return lambda: (on_made(), on_real(), of_generator())

def serve(order):
    """Train as the order (JSON) says and print the figures in the last line, as JSON."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import keras
    order = json.loads(order)
    pictures = np.load(order["pictures"]) / np.float32(127.5) - 1
    step = keras_step(pictures, order["width"], order["batch"], order["side"])
    for _ in range(order["warm"]): step()
    began = time.perf_counter()
    for _ in range(order["steps"]): step()
    rate = order["steps"] * order["batch"] / (time.perf_counter() - began)
    beneath, precision = keras.backend.backend(), keras.config.dtype_policy().name
    about = dict(keras=keras.__version__, precision=precision, **{beneath: sys.modules[beneath].__version__})
    print(json.dumps(dict(images_per_second=rate, about=about)))

def measure_keras(options, device, **order):
    """A round of Keras in a process of its own, on the kind of device that ours is on: its figures."""
    command = [options.python, __file__, "--child", json.dumps(order)]
    around = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), str(CORES))
    around |= dict(CUDA_VISIBLE_DEVICES="-1") if device == "cpu" else dict(TF_FORCE_GPU_ALLOW_GROWTH="true")
    if not shutil.which(options.python): fail(f"--python {options.python} is no program")
    done = subprocess.run(command, env=os.environ | around, capture_output=True, text=True)
    if done.returncode: fail(f"{options.python}: {(done.stderr.strip() or 'it has ended').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])

def compare_keras(script, options, flags):
    """Run the rounds at each batch size and print them; returns all figures as a dict."""
    args, _ = script.parse(flags)
    if (args.recipe, args.conditional, args.loss) != ("dense", False, "bce"):
        fail("the Keras original is --arch dense with --loss bce, and knows no classes")
    found, ratios = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = f"{folder}/pictures.npy"
        np.save(pictures, DIGITS["fashion"](args.root, download=True).data.numpy()[..., None])
        for batch in options.batch_sizes:
            rounds = found[batch] = {name: [] for name in ("ours", *KERAS)}
            for number, (name, rows) in itertools.product(range(options.rounds), rounds.items()):
                if name == "ours":
                    more = ["--data", "fashion", "--root", args.root, "--batch-size", str(batch)]
                    rows.append(measure(script.SCRIPT, "ours", [*flags, *more], options.steps))
                else:
                    order = dict(pictures=pictures, width=args.width, warm=20, steps=options.steps)
                    device = rounds["ours"][0]["about"]["device"]
                    rows.append(measure_keras(options, device, side=name, batch=batch, **order))
                if not number: show({"side": name} | rows[-1]["about"])
                rate = rows[-1]["images_per_second"]
                print(f"batch {batch}, round {number + 1}: {name:8} {rate:9.1f} images/s", flush=True)
            rates = {name: [row["images_per_second"] for row in rows] for name, rows in rounds.items()}
            ratios[batch] = {name: compare(rates["ours"], rates[name]) for name in KERAS}
            for name, ratio in ratios[batch].items():
                print("batch {}, ours to {}: {:.2f} times ({:.2f} to {:.2f})".format(batch, name, *ratio))
    return dict(batch_sizes=found, ratios=ratios)

# The plain conditional GAN
def make_plain(device):
    """Its generator, of noise N,100 and labels N, and discriminator, of pictures N,1,28,28 and labels."""
    layers, judges = [], []
    for i, (c_in, c_out) in enumerate(((110, 128), (128, 256), (256, 512), (512, 1024))):
        norm = [nn.BatchNorm1d(c_out, eps=0.8)] if i else []
        layers += nn.Linear(c_in, c_out), *norm, nn.LeakyReLU(0.2, inplace=True)
    for c_in in (794, 512, 512):
        dropout = [nn.Dropout(0.4)] if c_in == 512 else []
        judges += nn.Linear(c_in, 512), *dropout, nn.LeakyReLU(0.2, inplace=True)
    layers += nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))
    both = layers, [*judges, nn.Linear(512, 1)]
    return [nn.ModuleList([nn.Embedding(10, 10), nn.Sequential(*part)]).to(device) for part in both]

def apply(net, x, labels):
    """One of its networks on x and the embedded labels."""
    return net[1](torch.cat([x.flatten(1), net[0](labels)], 1))

def train_plain(args, g, d, device):
    """Train them without end; yields after each step."""
    way = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    data, mse = DIGITS["mnist"](args.root, transform=way), nn.MSELoss()
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (g, d))
    batches = (batch for _ in itertools.count() for batch in DataLoader(data, 64, shuffle=True))
    for real, labels in ((x.to(device), labels.to(device)) for x, labels in batches):
        ones, zeros = torch.ones(len(real), 1, device=device), torch.zeros(len(real), 1, device=device)
        opt_g.zero_grad()
        asked = torch.randint(10, (len(real),), device=device)
        fake = apply(g, torch.randn(len(real), 100, device=device), asked)
        loss_g = mse(apply(d, fake, asked), ones)
        loss_g.backward()
        opt_g.step()
        opt_d.zero_grad()
        loss_d = (mse(apply(d, real, labels), ones) + mse(apply(d, fake.detach(), asked), zeros)) / 2
        loss_d.backward()
        opt_d.step()
        yield loss_d.item(), loss_g.item()

def plain_pictures(g, labels, training, seed):
    """What it makes of labels (N), in batches of all classes, as in training: uint8 N,1,28,28."""
    numbers, parts = torch.Generator().manual_seed(seed), []
    order, device = torch.randperm(len(labels), generator=numbers), g[0].weight.device
    g.train(training)
    with torch.no_grad():
        for part in labels[order].split(64):
            fake = apply(g, torch.randn(len(part), 100, generator=numbers).to(device), part.to(device))
            parts.append(fake.mul(127.5).add(128).clamp(0, 255).byte().cpu())
    g.train()
    return torch.cat(parts)[order.argsort()]

def train_ours(script, flags, seconds):
    """Let the script train for so many seconds more; returns its steps so far and its averaged generator."""
    batches = script.batches

    def until(*arguments):
        began = time.perf_counter()
        for batch in batches(*arguments):
            if time.perf_counter() - began > seconds: signal.raise_signal(signal.SIGTERM)  # it saves and ends
            yield batch
    try:
        with mock.patch.object(script, "batches", until):
            script.main([*flags, "--resume", "--steps", "1000000"])
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM: raise
    args, saved = script.parse([*flags, "--resume"])
    generator = script.make_networks(args)[0].eval()
    generator.load_state_dict(saved["Generator"])
    return saved["step"], generator.to(script.pick_device(args)[0])

def judge(classifier, real, labels, made):
    """The figures of pictures made for labels, by name; real: features of the test set."""
    from classifier import frechet, read
    features, classes = read(classifier, made)
    right = (classes == labels).double()
    lowest = min(right[labels == i].mean().item() for i in range(10))
    return dict(as_asked=right.mean().item(), lowest_class=lowest, frechet=frechet(features, real))

def compare_plain(script, options, flags):
    """Train both in turn, print the figures after each slice; returns all figures as a dict."""
    from classifier import frechet, load_classifier, read
    with tempfile.TemporaryDirectory() as out:
        flags = [*flags, "--data", "mnist", "--out", out]
        args, _ = script.parse(flags)
        device, (pack, names) = script.pick_device(args)[0], script.load_pack(args)
        known = torch.from_numpy(pack).permute(0, 3, 1, 2), torch.tensor([int(name[0]) for name in names])
        path, test = Path(pack.filename).with_suffix(".all.pth"), DIGITS["mnist"](args.root, train=False)
        classifier = load_classifier(path, *known, 10, device)
        labels, order = test.targets.sort()
        real, rows = read(classifier, test.data[order, None])[0], []
        floor = frechet(read(classifier, known[0])[0], real)
        show(about := dict(floor=floor, seed=args.seed, width=args.width, device=str(device)))
        noise = torch.randn(len(labels), script.Z, generator=torch.Generator().manual_seed(args.seed))
        z, made = torch.cat([nn.functional.one_hot(labels, 10).float(), noise], 1), {}
        torch.manual_seed(args.seed)
        g, d = make_plain(device)
        plain, steps = train_plain(args, g, d, device), dict(ours=0, plain=0)
        for number, name in itertools.product(range(options.slices), steps):
            if name == "ours":
                steps[name], generator = train_ours(script, flags, options.slice)
                made[name] = script.sample(generator, z)
                figures = judge(classifier, real, labels, made[name])
            else:
                began = time.perf_counter()
                while time.perf_counter() - began < options.slice:
                    next(plain)
                    steps[name] += 1
                both = [plain_pictures(g, labels, training, args.seed) for training in (True, False)]
                judged = [judge(classifier, real, labels, pictures) for pictures in both]
                made[name], figures = min(zip(both, judged), key=lambda pair: pair[1]["frechet"])
            rows.append(dict(side=name, seconds=options.slice * (number + 1), steps=steps[name], **figures))
            print("{side:6} {seconds:6.0f} s {steps:6} steps: {as_asked:.2%} read as asked, lowest class "
                  "{lowest_class:.2%}, Frechet distance {frechet:.4f}".format(**rows[-1]), flush=True)
    ratios = [b["frechet"] / a["frechet"] for a, b in zip(rows[::2], rows[1::2])]
    print("Frechet distance of the plain one over ours, by slice:", *(f"{ratio:.1f}" for ratio in ratios))
    if options.picture:  # ten of each class, ours on the left
        first = torch.cat([(labels == i).nonzero()[:10, 0] for i in range(10)])
        pairs = torch.cat([images[first].unflatten(0, (10, 10)) for images in made.values()], 1).flatten(0, 1)
        save_image(pairs / 255, options.picture, nrow=20)
    return dict(about, rows=rows, ratios=ratios)

def main():
    parser = start_parser(__doc__)
    add = parser.add_argument
    add("peer", choices=("keras", "plain"))
    add("--python", default=sys.executable, help="keras: the interpreter that has TensorFlow (this one)")
    add("--batch-sizes", type=int, nargs="+", default=[32, 128], help="keras: (32 128)")
    add("--steps", type=int, default=200, help="keras: timed steps in a round (200)")
    add("--slice", type=float, default=60.0, help="plain: seconds before the other side's turn (60)")
    add("--slices", type=int, default=4, help="plain: for each side (4)")
    add("--picture", help="plain: write both sides' pictures there")
    options, flags = parser.parse_known_args()
    show(about := machine())
    script = importlib.import_module("fashion_keras_port" if options.peer == "keras" else "cgan_residual")
    found = (compare_keras if options.peer == "keras" else compare_plain)(script, options, flags)
    save(options.json, dict(about, script=script.SCRIPT, **found))

if __name__ == "__main__":
    serve(sys.argv[-1]) if CHILD else main()
