"""What the tools share: they find the script that made a run, open its checkpoint, and end with one line."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

SCRIPTS = "dcgan", "cspup128", "cgan_residual", "fashion_keras_port"  # all that a checkpoint may name
ERROR_LENGTH = 600  # characters of an error line


# Errors and arguments
def fail(message):
    """End with one line, for what the user can mend."""
    print("error:", textwrap.shorten(str(message), ERROR_LENGTH), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def mendable_errors():
    """Have what the user can mend end in one line; a mistake in code, of a changed script too, is raised.

    What is printed may be in characters that the output cannot have, such as those of a class.
    """
    with contextlib.suppress(AttributeError):  # a notebook's output has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        fail(f"{error} (see --device cpu)")
    except (OSError, KeyboardInterrupt) as error:
        fail(f"{type(error).__name__}: {error}")
    except SystemExit as end:
        if isinstance(end.code, str):  # the line with which fail() of a script ends
            fail(end.code.removeprefix("error: "))
        raise


def count(text):
    """An argument of the command line from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def seed(text):
    """An argument of the command line, any whole number, that random generators take."""
    return int(text) % 2**63


def python_file(text):
    """An argument of the command line that names a .py file."""
    path = Path(text).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError
    return path


def add_script_flag(parser):
    """--script, by which the tools open what changed or renamed copies of the scripts made."""
    parser.add_argument(
        "--script",
        nargs="+",
        type=python_file,
        default=[],
        metavar="FILE.py",
        help="changed or renamed copies of the scripts: they open the runs that they made",
    )


# Scripts
@functools.cache
def import_file(path):
    """The module of a script that --script names; what it raises is not caught."""
    spec = importlib.util.spec_from_file_location(f"script {path}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # under a name that no other module has
    sys.path.append(str(path.parent))  # for what it imports from beside it
    spec.loader.exec_module(module)
    return module


def import_own(name):
    """One of the four scripts, which stands beside the tools or in the folder above; None if it does not."""
    here = Path(__file__).resolve().parent
    for folder in here, here.parent:
        if name in SCRIPTS and (folder / f"{name}.py").exists():
            sys.path.insert(0, str(folder))
            return importlib.import_module(name)
    return None


def scripts_named(name, run, files):
    """Yield the scripts that can have made `run`: of --script the `files` called `name`.py, then the own one.

    A name out of a checkpoint alone imports nothing but these.
    """
    given = [file for file in files if file.stem == name]
    for file in given:
        yield import_file(file)
    own = import_own(name)
    if own:
        yield own
    elif not given:
        fail(f"{run} was made by {name}.py: name that file with --script")


# Runs
def arguments(script, config, **changes):
    """The script's arguments by a run's config, where it is silent the script's defaults; `changes` win.

    Changes that are None are none.
    """
    renamed = {script.RENAMED.get(name, name): value for name, value in config.items()}
    given = {name: value for name, value in changes.items() if value is not None}
    defaults = vars(script.parse([])[0])
    return argparse.Namespace(**{**defaults, **renamed, "device": "auto", "precision": "auto", **given})


def script_name(path):
    """Which script made a checkpoint, as it says; no code in it is run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return str(saved["config"]["script"])
    except Exception as error:  # a missing, cut or foreign file fails in many ways
        fail(f"{path} is no checkpoint of the scripts: {error}")


def load_networks(script, args, saved):
    """The script's generator with a checkpoint's weights; RuntimeError if those of a network do not fit."""
    G, D = script.make_networks(args)
    G.load_state_dict(saved["Generator"])
    if "Discriminator" in saved:  # only to see whether this is the script
        D.load_state_dict(saved["Discriminator"])
    return G.eval().requires_grad_(False)


def load(run, files=(), **changes):
    """(script, its arguments, checkpoint, averaged generator on the device) of a run folder or a checkpoint.

    files: of --script. `changes` that are not None win over the checkpoint's arguments.
    """
    path = Path(run, "models.pth") if Path(run).is_dir() else Path(run)
    unfit = []
    for script in scripts_named(script_name(path), path, files):
        saved = script.load_checkpoint(path)
        if "Generator" not in saved:
            fail(f"{path} has no Generator")
        args = arguments(script, saved["config"], **changes)
        try:
            generator = load_networks(script, args, saved)
        except RuntimeError as error:
            unfit.append(f"{script.__file__}: {error}")
            continue
        if unfit:
            print(f"{path}: opened by {script.__file__}, as it does not fit that of --script")
        return script, args, saved, generator.to(script.pick_device(args)[0])
    fail(f"{path} does not fit its script (if a changed copy made it, name that with --script): {unfit[0]}")


def load_images(script, args):
    """The script's (pack, names) of --data; a line says so where the run was trained on other images."""
    trained_on = getattr(args, "image_set", "")
    pack, names = script.load_pack(args)
    if trained_on not in ("", args.image_set):
        print(f"warning: {args.out} was trained on other images than --data {args.data} has now")
    return pack, names


def to_grid(images, columns):
    """Images, uint8 N,C,H,W, as one PIL image with so many columns."""
    return Image.fromarray(make_grid(images, columns).permute(1, 2, 0).numpy())
