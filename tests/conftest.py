"""What the tests share: the four scripts, a command line of each that takes a moment, images."""

import os
import re

os.environ["OMP_NUM_THREADS"] = "1"  # in processes too: bits of a sum depend on how many threads share it

import pytest
import torch

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port

SCRIPTS = dcgan, cspup128, cgan_residual, fashion_keras_port
KINDS = {  # what a script trains, each with its flags
    "dcgan": (dcgan, "--size 32 --width 2"),
    "dcgan-classic-grey": (dcgan, "--size 32 --width 2 --recipe classic --channels 1"),
    "cspup128": (cspup128, "--width 2"),
    "cspup128-exact": (cspup128, "--width 2 --scheme exact --d-every 2"),
    "cgan_residual": (cgan_residual, "--width 2"),
    "fashion": (fashion_keras_port, "--width 4 --batch-size 8"),
    "fashion-style": (fashion_keras_port, "--width 2 --arch style --conditional"),
    "fashion-wgan-gp": (fashion_keras_port, "--width 2 --arch dcgan --loss wgan-gp --conditional"),
}
TINY = {}  # of each script the first of these, in full
for _script, _flags in reversed(KINDS.values()):
    TINY[_script] = f"{_flags} --batch-size 8 --precision fp32 --device cpu".split()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws by chance is the same each time."""
    torch.manual_seed(0)


@pytest.fixture
def without_curves(monkeypatch):
    """No run draws losses.png and scores.png, which takes longer than its few steps."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "draw_curves", lambda *given: None)


@pytest.fixture(scope="session", params=SCRIPTS, ids=lambda script: script.SCRIPT)
def script(request):
    """Each script in turn."""
    return request.param


@pytest.fixture(scope="session", params=KINDS.values(), ids=KINDS)
def kind(request):
    """(script, flags) of each kind in turn."""
    return request.param


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A --root, and in it `set`: 40 images in four folders, digits with a bar of some colour."""
    root = tmp_path_factory.mktemp("root")
    for i in range(40):
        path = root / "set" / "abcd"[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        digit = cgan_residual.draw_image(10 * (i // 4) + i % 4).resize((48, 40)).convert("RGB")
        digit.paste((6 * i, 250 - 5 * i, 90), (0, 0, 48, i % 9))
        digit.save(path)
    return root


def flags(script, root, out, *more):
    """A command line that trains on the set below `root` in a moment, into the run folder `out`."""
    places = "--data", root / "set", "--root", root, "--out", out
    return [*TINY[script], *map(str, places), *map(str, more)]


@pytest.fixture(scope="session")
def trained(script, root, tmp_path_factory):
    """A run folder of the script after three steps, to be read alone."""
    out = tmp_path_factory.mktemp("trained") / "run"
    script.main(flags(script, root, out, "--steps", 3))
    return out


def load(path):
    """What a checkpoint.pt or models.pth holds."""
    return torch.load(path, weights_only=True)


def error_line(text):
    """The one error line that ends what was written to stderr, where progress bars may stand before it."""
    lines = re.split(r"[\r\n]+", text.strip())
    assert "Traceback" not in text
    assert [line for line in lines if "error: " in line] == lines[-1:], text
    assert lines[-1].startswith("error: ") and len(lines[-1]) > 20, text
    return lines[-1]


@pytest.fixture
def fails(capfd):
    """Function that gives the error line of a script's command line, which has to end with status 2."""

    def run(script, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.main(list(map(str, argv)))
        assert stop.value.code == 2
        return error_line(capfd.readouterr().err)

    return run
