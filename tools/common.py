"""What the tools have in common: they find the script that a checkpoint is of, and open it."""
import argparse, importlib, os, sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

SCRIPTS = "dcgan", "cspup128", "cgan_residual", "fashion_keras_port"


def fail(message):
    """End with one line, for what the user can mend."""
    print("error:", *str(message).strip().split("\n")[:1], file=sys.stderr)
    raise SystemExit(2)


def guarded(work, *arguments):
    """work(*arguments), where whatever a library raises ends in one line."""
    try:
        return work(*arguments)
    except (Exception, KeyboardInterrupt) as error:
        if "GAN_DEBUG" in os.environ: raise
        fail(f"{type(error).__name__}: {error} (GAN_DEBUG=1 shows where)")


def to_grid(images, columns):
    """uint8 N,C,H,W as one PIL picture."""
    return Image.fromarray(make_grid(images, columns).permute(1, 2, 0).numpy())


def script_named(name):
    """The module of one of the four scripts, which stands beside the tools or in the folder above."""
    if name not in SCRIPTS:  # whatever else a file may name is not imported
        raise ValueError(f"it is of {name}, not of {', '.join(SCRIPTS)}")
    here = Path(__file__).resolve().parent
    folder = next((str(folder) for folder in (here, here.parent) if (folder / f"{name}.py").exists()), None)
    if not folder: raise ValueError(f"{name}.py is neither in {here} nor in {here.parent}")
    if folder not in sys.path: sys.path.insert(0, folder)
    return importlib.import_module(name)


def load(run, **changes):
    """(script, its arguments, checkpoint, averaged generator on the device) of a run folder or a checkpoint.

    `changes` that are not None win over the checkpoint's arguments. Code in a file does not run.
    """
    path = Path(run, "models.pth") if Path(run).is_dir() else Path(run)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script = script_named(saved["config"]["script"])
        given = {name: value for name, value in changes.items() if value is not None}
        args = argparse.Namespace(**saved["config"] | dict(device="auto", precision="auto") | given)
        generator = script.make_networks(args)[0].eval().requires_grad_(False)
        generator.load_state_dict(saved["Generator"])
    except Exception as error:  # a missing, cut or foreign file fails in many ways
        fail(f"{path} is no checkpoint of the scripts: {error}")
    return script, args, saved, generator.to(script.pick_device(args)[0])
