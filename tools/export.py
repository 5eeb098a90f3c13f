"""A trained generator in other formats, and .keras files of the Keras original as a checkpoint.

    python tools/export.py runs/dcgan --save generator.onnx             # or generator.safetensors
    python tools/export.py runs/fashion_keras_port --save generator.keras discriminator.keras
    python tools/export.py --from generator.keras discriminator.keras --to runs/keras/models.pth

ONNX takes z, N,K+Z with the one-hot class first where the model has classes, and gives images, N,C,H,W in
[-1, 1]. .keras files are for the default networks of fashion_keras_port.py. Such a file is a zip with the
weights and a description of the layers, which can name any code to be run. So it is read as plain JSON first:
unless it lists the layers of this GAN and no others, Keras does not get to see it.
"""
import argparse, functools, itertools, json, os, zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import fail, guarded, load, script_named

KERAS_CLASSES = set(  # what a .keras file may name, from Keras's own modules; initialisers come besides
    "Sequential Functional Model InputLayer Flatten Reshape Dense LeakyReLU BatchNormalization Activation "
    "DTypePolicy __keras_tensor__".split())

# ONNX and safetensors
@torch.no_grad()
def to_onnx(script, args, generator, path):
    """The generator (on the CPU, whose PyTorch operations ONNX knows), compared with torch by onnxruntime."""
    z = script.draw_z(args, 2)
    names = dict(input_names=["z"], output_names=["images"], dynamic_axes=dict(z={0: "n"}, images={0: "n"}))
    try:
        script.write(path, lambda part: torch.onnx.export(generator, (z,), str(part), dynamo=False, **names))
    except ImportError as error:
        fail(f"{error}: pip install onnx")
    try:
        import onnxruntime
    except ImportError:
        return print(f"{path}: written; onnxruntime is not installed, so it is not compared with torch")
    z = script.draw_z(args, 3)  # another number of pictures than it was made with
    (theirs,) = onnxruntime.InferenceSession(path).run(None, {"z": z.numpy()})
    if len(theirs) != len(z): fail(f"{path}: this generator makes {len(theirs)} pictures whatever it gets")
    print(f"{path}: differs from torch by {np.abs(theirs - generator(z).numpy()).max():.1e} at most")

def to_safetensors(script, args, generator, path):
    """The generator's state_dict; the run's arguments go along as JSON."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        fail(f"{error}: pip install safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in generator.state_dict().items()}
    script.write(path, lambda part: save_file(tensors, part, metadata=dict(config=json.dumps(vars(args)))))
    print(f"{path}: {len(tensors)} tensors")

# Keras
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
    for part in value if isinstance(value, list) else ():
        yield from named_classes(part)

def load_keras(path):
    """A Keras model from a .keras file, if it has none but the layers of this GAN; no code in it is run."""
    path = Path(path)  # never a text, which Keras might take for an address to fetch from
    try:
        if path.suffix != ".keras":  # Keras goes by the name: another may be read in another way than here
            raise ValueError("its name does not end in .keras")
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            version = json.loads(archive.read("metadata.json"))["keras_version"]
        config.pop("compile_config", None)  # how it was trained; with compile=False Keras leaves it out too
        parts = list(named_classes(config))
    except Exception as error:  # a missing, foreign or broken file can raise anything
        fail(f"{path} is no .keras file, or cut short ({error}): Keras 3 writes one, model.save('x.keras')")
    if str(version).split(".")[0] in "12":
        fail(f"{path} is of Keras {version}: save it there as .h5, load that in Keras 3 and save it as .keras")
    for module, name, registered in parts:
        initialiser = module == "keras.initializers" and name[:1].isupper()
        known = initialiser or name in KERAS_CLASSES and module.split(".")[0] == "keras"
        if not known or registered != name:
            fail(f"{path} has a {module}.{name}, which is no part of this GAN and is not run")
    keras = import_keras()
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        fail(f"{path} cannot be read by Keras: {error}")

def their_layers(model):
    """What a Keras model computes, models in it laid open: [[class, its setting, its weights in numpy]]."""
    setting = dict(Dense="activation", LeakyReLU="negative_slope", BatchNormalization="epsilon")
    found = []
    for layer in model.layers:
        layer.dtype_policy = "float32"  # to compute in, whatever it was trained in
        kind, config = type(layer).__name__, layer.get_config()
        if hasattr(layer, "layers"):
            found += their_layers(layer)
        elif kind == "Activation" and found and found[-1][1] == "linear":  # as in the Dense
            found[-1][1] = config["activation"]
        elif kind not in ("InputLayer", "Flatten", "Reshape"):
            found.append([kind, config[setting[kind]] if kind in setting else None, layer.get_weights()])
    return found

def our_layers(net):
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
    if hasattr(net, "logit"): found[-1][1] = "sigmoid"
    return found

def describe(layer):
    """A layer of the two functions above as text, as Dense(tanh) with 1024x784, 784."""
    kind, setting, weights = layer or ("nothing", "", [])
    shapes = ", ".join("x".join(map(str, weight.shape)) for weight in weights)
    setting = f"{setting:g}" if isinstance(setting, float) else setting
    return f"{kind}({setting})" + (f" with {shapes}" if shapes else "")

@torch.no_grad()
def from_keras(path, kind):
    """A Generator or Discriminator (`kind`) with a .keras file's weights, compared with it; and its width."""
    model, name = load_keras(path), kind.__name__
    theirs, made = their_layers(model), name == "Generator"
    wide = [layer[2][0].shape[1] for layer in theirs if layer[0] == "Dense" and layer[2]]
    net = kind(width := [*wide, 1, 1][not made]).eval()
    for number, (their, our) in enumerate(itertools.zip_longest(theirs, our_layers(net)), 1):
        if describe(their) != describe(our):
            fail(f"{path} is no {name} of this GAN: layer {number} is {describe(their)}, not {describe(our)}")
        for new, tensor in zip(their[2], our[2]): tensor.copy_(torch.from_numpy(np.array(new, np.float32)))
    x = torch.randn(8, 100) if made else torch.rand(8, 1, 28, 28) * 2 - 1
    try:
        output = model(x.numpy() if made else x.numpy().reshape(8, *model.input_shape[1:]))
        output = import_keras().ops.convert_to_numpy(output).reshape(8, -1)
        apart = np.abs(output - net(x).flatten(1).numpy()).max()
    except Exception as error:  # two inputs, or outputs
        fail(f"{path} is no {name} of this GAN: {error}")
    if not apart < 1e-3:  # the layers are the same, but connected otherwise
        fail(f"{path} is no {name} of this GAN: with the same weights its output differs by {apart:.1e}")
    print(f"{path}: differs from Keras by {apart:.1e} at most")
    return net, width

def import_models(files, path):
    """.keras files, a generator and after it perhaps its discriminator, as a models.pth in `path`."""
    script = script_named("fashion_keras_port")
    if len(files) > 2: fail("--from takes a generator and, after it, a discriminator")
    if path.exists(): fail(f"{path} is there already: name another one with --to")
    found = {kind.__name__: from_keras(file, kind)
             for kind, file in zip((script.Generator, script.Discriminator), files)}
    widths = sorted({width for _, width in found.values()})
    if len(widths) > 1: fail(f"the two have different widths, {widths}: import the generator alone")
    args, _ = script.parse(["--width", str(widths[0])])
    models = {name: net.state_dict() for name, (net, _) in found.items()}
    script.write(path, functools.partial(torch.save, dict(models, config=vars(args))))
    print(f"{path}: {' and '.join(found)}, of width {widths[0]}")

def to_keras(script, args, saved, kind, path):
    """The Generator or Discriminator (`kind`) of a checkpoint as a .keras file."""
    if script.SCRIPT != "fashion_keras_port" or args.recipe != "dense" or args.conditional:
        fail(f"{path}: that is for models of fashion_keras_port.py --arch dense without --conditional")
    if kind not in saved: fail("the checkpoint has no discriminator: name one .keras file, for the generator")
    keras, net = import_keras(), getattr(script, kind)(args.width)
    net.load_state_dict(saved[kind])
    shape, made = ((100,), (28, 28, 1)) if kind == "Generator" else ((28, 28, 1), (1,))
    model = keras.Sequential([keras.Input(shape), keras.layers.Flatten()], name=kind.lower())
    for name, setting, weights in our_layers(net):
        if name == "Dense":
            layer = keras.layers.Dense(weights[0].shape[1], activation=setting)
        elif name == "LeakyReLU":
            layer = keras.layers.LeakyReLU(negative_slope=setting)
        else:
            layer = keras.layers.BatchNormalization(momentum=0.8, epsilon=setting)
        model.add(layer)
        layer.set_weights([weight.detach().numpy() for weight in weights])
    model.add(keras.layers.Reshape(made))
    script.write(path, lambda part: model.save(part))
    print(f"{path}: the {kind.lower()}, for keras.saving.load_model")

def to_half(script, args, saved, path):
    """The averaged generator alone, in half precision, as a checkpoint that --generate takes; as such files are
    given away, its arguments name no folder of this machine."""
    config = dict(saved["config"], root="data", out=f"runs/{script.SCRIPT}", data=Path(args.data).name)
    state = {name: v.half() if v.is_floating_point() else v for name, v in saved["Generator"].items()}
    script.write(path, functools.partial(torch.save, dict(Generator=state, config=config)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

def export(run, paths):
    """A run folder or checkpoint into files of the kinds that their names end in."""
    script, args, saved, generator = load(run, device="cpu")
    kinds = iter(("Generator", "Discriminator"))
    for path in paths:
        if path.suffix == ".onnx": to_onnx(script, args, generator, path)
        elif path.suffix == ".safetensors": to_safetensors(script, args, generator, path)
        elif path.suffix == ".pth": to_half(script, args, saved, path)
        else: to_keras(script, args, saved, next(kinds), path)

def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("run", nargs="?", metavar="RUN", help="run folder, models.pth or checkpoint.pt of any script")
    add("--save", nargs="+", type=Path, default=[], metavar="FILE",
        help=".onnx, .safetensors, .pth (half precision) or .keras; a second .keras is the discriminator")
    add("--from", nargs="+", dest="files", metavar="KERAS", help="generator and, after it, discriminator")
    add("--to", type=Path, metavar="FILE.pth", help="of --from: the checkpoint (models.pth)")
    options = parser.parse_args(argv)
    suffixes = [path.suffix for path in options.save]
    if bool(options.run) == bool(options.files) or bool(options.run) != bool(options.save):
        fail("it takes RUN --save FILE, or --from FILE.keras --to models.pth")
    if set(suffixes) - {".onnx", ".safetensors", ".pth", ".keras"} or suffixes.count(".keras") > 2:
        fail("--save takes names that end in .onnx, .safetensors, .pth or, two at most, in .keras")
    if options.files:
        guarded(import_models, options.files, options.to or Path("models.pth"))
    else:
        guarded(export, options.run, options.save)

if __name__ == "__main__":
    main()
