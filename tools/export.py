"""A trained generator in other formats, and .keras files of the Keras original as a checkpoint.

    python tools/export.py runs/dcgan --save generator.onnx             # or generator.safetensors
    python tools/export.py runs/mygan --script mygan.py --save generator.pth    # of a copy, in half precision
    python tools/export.py runs/fashion_keras_port --save generator.keras discriminator.keras
    python tools/export.py --from generator.keras discriminator.keras --to runs/keras/models.pth

ONNX takes z, N,K+Z with the one-hot class first where the model has classes, and gives images, N,C,H,W in
[-1, 1]. .keras files are for the default networks of fashion_keras_port.py. Such a file is a zip with the
weights and a description of the layers, which can name any code to be run. So it is read as plain JSON first:
unless it lists the layers of this GAN and no others, Keras does not get to see it.
"""

import argparse
import itertools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import add_script_flag, fail, load, mendable_errors, scripts_named

SUFFIXES = ".onnx", ".safetensors", ".pth", ".keras"
ROUNDING = 1e-3  # outputs that differ by more are of different networks
SETTINGS = {"Dense": "activation", "LeakyReLU": "negative_slope", "BatchNormalization": "epsilon"}
KERAS_CLASSES = {  # what a .keras file may name, from Keras's own modules; initialisers come besides
    "Sequential",
    "Functional",
    "Model",
    "InputLayer",
    "Flatten",
    "Reshape",
    "Dense",
    "LeakyReLU",
    "BatchNormalization",
    "Activation",
    "DTypePolicy",
    "__keras_tensor__",
}


# ONNX, safetensors, half precision
@torch.no_grad()
def to_onnx(script, args, generator, path):
    """The generator (on the CPU, whose PyTorch operations ONNX knows), compared with torch by onnxruntime."""
    options = {
        "input_names": ["z"],
        "output_names": ["images"],
        "dynamic_axes": {"z": {0: "n"}, "images": {0: "n"}},
    }
    try:
        with script.replacing(path) as part:
            torch.onnx.export(generator, (script.draw_z(args, 2),), str(part), dynamo=False, **options)
    except ImportError as error:
        fail(f"{error}: pip install onnx")
    try:
        import onnxruntime
    except ImportError:
        print(f"{path}: written; onnxruntime is not installed, so it is not compared with torch")
        return
    z = script.draw_z(args, 3)  # another number of images than it was made with
    (images,) = onnxruntime.InferenceSession(path).run(None, {"z": z.numpy()})
    if len(images) != len(z):
        fail(f"{path}: this generator makes {len(images)} images whatever it gets")
    print(f"{path}: differs from torch by {np.abs(images - generator(z).numpy()).max():.1e} at most")


def to_safetensors(script, args, generator, path):
    """The generator's state_dict; the run's arguments go along as JSON."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        fail(f"{error}: pip install safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in generator.state_dict().items()}
    with script.replacing(path) as part:
        save_file(tensors, part, metadata={"config": json.dumps(vars(args))})
    print(f"{path}: {len(tensors)} tensors")


def to_half(script, args, saved, path):
    """The averaged generator alone, in half precision, as a checkpoint that --generate takes.

    As such files are given away, its arguments name no folder of this machine.
    """
    state = {}
    for name, tensor in saved["Generator"].items():
        state[name] = tensor.half() if tensor.is_floating_point() else tensor
    public = {"root": "data", "out": f"runs/{script.SCRIPT}", "data": Path(args.data).name}
    with script.replacing(path) as part:
        torch.save({"Generator": state, "config": saved["config"] | public}, part)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


# Reading .keras files
def import_keras():
    """The package keras, on torch unless the user has chosen otherwise."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras
    except ImportError as error:
        fail(f"{error}: pip install keras")
    return keras


def named_classes(value):
    """Yield (module, class, registered name), as texts, of all that a part of config.json has Keras make."""
    if isinstance(value, dict):
        if "class_name" in value:
            name = str(value["class_name"])
            yield str(value.get("module") or "keras"), name, str(value.get("registered_name") or name)
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from named_classes(part)


def read_description(path):
    """(Keras's version, all that Keras is to make, by named_classes) of a .keras file, read as JSON."""
    try:
        if path.suffix != ".keras":  # Keras goes by the name: another may be read in another way than here
            raise ValueError("its name does not end in .keras")
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            version = json.loads(archive.read("metadata.json"))["keras_version"]
        config.pop("compile_config", None)  # how it was trained; with compile=False Keras leaves it out too
        return str(version), list(named_classes(config))
    except Exception as error:  # a missing, foreign or broken file can raise anything
        fail(f"{path} is no .keras file, or cut short ({error}): Keras 3 writes one, model.save('x.keras')")


def is_known(module, name, registered):
    """Whether a file may have Keras make this: a layer of this GAN, or an initialiser of Keras."""
    is_initialiser = module == "keras.initializers" and name[:1].isupper()
    is_layer = module.split(".")[0] == "keras" and name in KERAS_CLASSES
    return registered == name and (is_initialiser or is_layer)


def load_keras(path):
    """A Keras model from a .keras file, if it has none but the layers of this GAN; no code in it is run."""
    path = Path(path)  # never a text, which Keras might take for an address to fetch from
    version, parts = read_description(path)
    if version.split(".")[0] in ("1", "2"):
        fail(f"{path} is of Keras {version}: save it there as .h5, load that in Keras 3, save it as .keras")
    for module, name, registered in parts:
        if not is_known(module, name, registered):
            fail(f"{path} has a {module}.{name}, which is no part of this GAN and is not run")
    keras = import_keras()
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # a part that is missing or does not fit can raise anything
        fail(f"{path} cannot be read by Keras: {error}")


# Layers of Keras and of this GAN
def keras_layers(model):
    """What a Keras model computes, models in it laid open: [[class, its setting, its weights in numpy]]."""
    found = []
    for layer in model.layers:
        layer.dtype_policy = "float32"  # to compute in, whatever it was trained in
        kind = type(layer).__name__
        config = layer.get_config()
        if hasattr(layer, "layers"):
            found += keras_layers(layer)
        elif kind == "Activation" and found and found[-1][1] == "linear":  # as in the Dense
            found[-1][1] = config["activation"]
        elif kind not in ("InputLayer", "Flatten", "Reshape"):
            setting = config[SETTINGS[kind]] if kind in SETTINGS else None
            found.append([kind, setting, layer.get_weights()])
    return found


def torch_layers(net):
    """The same of a network of --arch dense, with the tensors of its weights, shaped as Keras has them."""
    found = []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            found.append(["Dense", "linear", [module.weight.T, module.bias]])
        elif isinstance(module, nn.Tanh):
            found[-1][1] = "tanh"
        elif isinstance(module, (nn.LeakyReLU, nn.BatchNorm1d)):  # which here has its LeakyReLU before it
            found.append(["LeakyReLU", 0.2, []])
        if isinstance(module, nn.BatchNorm1d):
            weights = [module.weight, module.bias, module.running_mean, module.running_var]
            found.append(["BatchNormalization", module.eps, weights])
    if hasattr(net, "logit"):
        found[-1][1] = "sigmoid"
    return found


def describe(layer):
    """A layer of the two functions above as text, as Dense(tanh) with 1024x784, 784."""
    if layer is None:
        return "nothing"
    kind, setting, weights = layer
    shapes = ", ".join("x".join(map(str, weight.shape)) for weight in weights)
    setting = f"{setting:g}" if isinstance(setting, float) else setting
    return f"{kind}({setting})" + (f" with {shapes}" if shapes else "")


@torch.no_grad()
def difference(model, net):
    """Largest difference of the outputs of a Keras model and a network, for inputs drawn at random."""
    if type(net).__name__ == "Generator":
        x = torch.randn(8, 100)
        keras_x = x.numpy()
    else:
        x = torch.rand(8, 1, 28, 28) * 2 - 1
        keras_x = x.numpy().reshape(8, *model.input_shape[1:])
    output = import_keras().ops.convert_to_numpy(model(keras_x)).reshape(8, -1)
    return np.abs(output - net(x).flatten(1).numpy()).max()


# From and to Keras
@torch.no_grad()
def from_keras(path, kind):
    """A Generator or Discriminator (`kind`) with a .keras file's weights, compared with it; and its width."""
    model = load_keras(path)
    layers = keras_layers(model)
    refusal = f"{path} is no {kind.__name__} of this GAN"
    units = [weights[0].shape[1] for name, _, weights in layers if name == "Dense" and weights]
    first, second = [*units, 1, 1][:2]
    width = first if kind.__name__ == "Generator" else second
    net = kind(width).eval()
    for number, (theirs, ours) in enumerate(itertools.zip_longest(layers, torch_layers(net)), 1):
        if describe(theirs) != describe(ours):
            fail(f"{refusal}: layer {number} is {describe(theirs)}, not {describe(ours)}")
        for array, tensor in zip(theirs[2], ours[2]):
            tensor.copy_(torch.from_numpy(np.array(array, np.float32)))
    try:
        apart = difference(model, net)
    except Exception as error:  # two inputs, or outputs: Keras can raise anything
        fail(f"{refusal}: {error}")
    if not apart < ROUNDING:  # the layers are the same, but connected otherwise
        fail(f"{refusal}: with the same weights its output differs by {apart:.1e}")
    print(f"{path}: differs from Keras by {apart:.1e} at most")
    return net, width


def import_models(files, path, script_files):
    """.keras files, a generator and after it perhaps its discriminator, as a models.pth in `path`."""
    if len(files) > 2:
        fail("--from takes a generator and, after it, a discriminator")
    if path.exists():
        fail(f"{path} is there already: name another one with --to")
    script = next(scripts_named("fashion_keras_port", path, script_files))
    models = {}
    widths = set()
    for kind, file in zip((script.Generator, script.Discriminator), files):
        net, width = from_keras(file, kind)
        models[kind.__name__] = net.state_dict()
        widths.add(width)
    if len(widths) > 1:
        fail(f"the two have different widths, {sorted(widths)}: import the generator alone")
    args, _ = script.parse(["--width", str(width)])
    with script.replacing(path) as part:
        torch.save({**models, "config": vars(args)}, part)
    print(f"{path}: {' and '.join(models)}, of width {width}")


def keras_model(net, kind):
    """A Keras model with the layers and weights of a Generator or Discriminator (`kind`) of --arch dense."""
    keras = import_keras()
    shapes = {"Generator": ((100,), (28, 28, 1)), "Discriminator": ((28, 28, 1), (1,))}
    input_shape, output_shape = shapes[kind]
    model = keras.Sequential([keras.Input(input_shape), keras.layers.Flatten()], name=kind.lower())
    for name, setting, weights in torch_layers(net):
        if name == "Dense":
            layer = keras.layers.Dense(weights[0].shape[1], activation=setting)
        elif name == "LeakyReLU":
            layer = keras.layers.LeakyReLU(negative_slope=setting)
        else:
            layer = keras.layers.BatchNormalization(momentum=0.8, epsilon=setting)
        model.add(layer)
        layer.set_weights([weight.detach().numpy() for weight in weights])
    model.add(keras.layers.Reshape(output_shape))
    return model


def to_keras(script, args, saved, kind, path):
    """The Generator or Discriminator (`kind`) of a checkpoint as a .keras file, compared with it."""
    if getattr(args, "arch", None) != "dense" or args.conditional:
        fail(f"{path}: that is for models of fashion_keras_port.py --arch dense without --conditional")
    if kind not in saved:
        fail("the checkpoint has no discriminator: name one .keras file, for the generator")
    net = getattr(script, kind)(args.width).eval()
    net.load_state_dict(saved[kind])
    model = keras_model(net, kind)
    apart = difference(model, net)
    if not apart < ROUNDING:
        fail(f"{path}: not written, as it would differ by {apart:.1e}: this {kind} has other layers")
    with script.replacing(path) as part:
        model.save(part)
    print(f"{path}: the {kind.lower()}, for keras.saving.load_model; differs by {apart:.1e} at most")


# The command line
def export(run, paths, script_files):
    """A run folder or checkpoint into files of the kinds that their names end in."""
    script, args, saved, generator = load(run, script_files, device="cpu")
    kinds = iter(("Generator", "Discriminator"))  # of .keras files
    for path in paths:
        if path.suffix == ".onnx":
            to_onnx(script, args, generator, path)
        elif path.suffix == ".safetensors":
            to_safetensors(script, args, generator, path)
        elif path.suffix == ".pth":
            to_half(script, args, saved, path)
        else:
            to_keras(script, args, saved, next(kinds), path)


@mendable_errors()
def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="run folder, models.pth or checkpoint.pt of any script")
    add_script_flag(parser)
    add(
        "--save",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help=".onnx, .safetensors, .pth (half precision) or .keras; a second .keras is the discriminator",
    )
    add("--from", nargs="+", dest="files", metavar="KERAS", help="generator and, after it, discriminator")
    add("--to", type=Path, metavar="FILE.pth", help="of --from: the checkpoint (models.pth)")
    options = parser.parse_args(argv)
    suffixes = [path.suffix for path in options.save]
    if bool(options.run) == bool(options.files) or bool(options.run) != bool(options.save):
        fail("it takes RUN --save FILE, or --from FILE.keras --to models.pth")
    if not set(suffixes) <= set(SUFFIXES) or suffixes.count(".keras") > 2:
        fail("--save takes names that end in .onnx, .safetensors, .pth or, two at most, in .keras")
    if options.files:
        import_models(options.files, options.to or Path("models.pth"), options.script)
    else:
        export(options.run, options.save, options.script)


if __name__ == "__main__":
    main()
