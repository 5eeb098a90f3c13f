"""The marked parts are the same text in every script, and the command that copies them makes them so."""

import shutil
import subprocess
import sys

import pytest
import shared_parts

NAMES = {"settings", "data", "images out", "training", "command line"}
MORE = {
    "dcgan.py": {"batch norm"},
    "cspup128.py": {"batch norm"},
    "cgan_residual.py": {"batch norm", "classes"},
    "fashion_keras_port.py": {"classes"},
}


@pytest.mark.parametrize("name", shared_parts.SCRIPTS)
def test_marked_parts_are_the_originals(name):
    assert set(shared_parts.parts((shared_parts.TOP / name).read_text())) == NAMES | MORE[name]
    assert name not in [path.name for path, _ in shared_parts.differing()]


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("cspup128.py", "LOG_EVERY = 10 ", "LOG_EVERY = 20 "),
        ("cspup128.py", "images: {path}", "images in {path}"),
        ("fashion_keras_port.py", "which are the classes?", "no classes"),
        ("cgan_residual.py", "def replacing(", "def writing("),
    ],
)
def test_the_command_mends_a_changed_copy_and_leaves_its_own_lines(name, old, new, tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(shared_parts.__file__, tmp_path / "tests")
    for script in shared_parts.SCRIPTS:
        shutil.copy(shared_parts.TOP / script, tmp_path)
    text = (tmp_path / name).read_text()
    assert old in text
    own = text.replace("# %% Settings", "# Own.\n# %% Settings")
    assert own != text
    (tmp_path / name).write_text(own.replace(old, new))
    assert [path.name for path, _ in shared_parts.differing(tmp_path)] == [name]
    subprocess.run([sys.executable, tmp_path / "tests" / "shared_parts.py"], check=True)
    assert (tmp_path / name).read_text() == own and not list(shared_parts.differing(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "# --- shared: data ---\nx = 1\n",
        "# --- end shared ---\n",
        2 * ("# --- shared: data ---\nx = 1\n# --- end shared ---\n"),
    ],
    ids=["no end", "no beginning", "twice"],
)
def test_a_part_that_is_not_whole_is_an_error(text):
    with pytest.raises(ValueError):
        shared_parts.parts(text)
