"""The marked parts are the same text in every script, and the command that copies them makes them so."""
import shutil

import pytest
import shared_parts


def test_marked_parts_are_the_originals():
    assert [path.name for path, _ in shared_parts.differing()] == []
    names = {"fused", "data", "run folder", "training", "uses", "flags", "command line"}
    for script in shared_parts.SCRIPTS:
        more = {"classes", "classifier"} if script in ("cgan_residual.py", "fashion_keras_port.py") else set()
        assert names | more == set(shared_parts.parts((shared_parts.TOP / script).read_text()))


def test_a_changed_copy_is_found_and_mended_and_its_own_lines_stay(tmp_path):
    original = (shared_parts.TOP / "dcgan.py").read_text()
    (tmp_path / "dcgan.py").write_text(original)
    copy = tmp_path / "cgan_residual.py"
    changed = original.replace("LOG_EVERY = 10", "LOG_EVERY = 20")
    copy.write_text(changed.replace("SCRIPT, DATA", '"""Own."""\nSCRIPT, DATA'))
    ((path, text),) = shared_parts.differing(tmp_path)
    assert path == copy and "LOG_EVERY = 10" in text and '"""Own."""' in text
    copy.write_text(text)
    assert not list(shared_parts.differing(tmp_path))


def test_what_dcgan_has_not_is_held_to_the_first_script_that_has_it(tmp_path):
    for name in ("dcgan.py", "cspup128.py", "cgan_residual.py"):
        shutil.copy(shared_parts.TOP / name, tmp_path)
    found = shared_parts.parts((tmp_path / "cgan_residual.py").read_text())
    later = "".join(f"{found[name]}\n" for name in ("fused", "classes", "classifier"))
    assert 'torch.tensor([names.index(folder)' in later and later.count("128 at least") == 1
    (tmp_path / "fashion_keras_port.py").write_text(later)
    assert not list(shared_parts.differing(tmp_path))
    for old, new in (("names.index(folder)", "0"), ("128 at least", "64 at least"), ('"serves"', '"does"')):
        changed = later.replace(old, new)
        (tmp_path / "fashion_keras_port.py").write_text(changed)
        ((path, text),) = shared_parts.differing(tmp_path)
        assert path.name == "fashion_keras_port.py" and text == later != changed
    edited = (tmp_path / "cgan_residual.py").read_text().replace("128 at least", "64 at least")
    (tmp_path / "cgan_residual.py").write_text(edited)  # where the original of a part has been edited
    (tmp_path / "fashion_keras_port.py").write_text(later)
    ((path, text),) = shared_parts.differing(tmp_path)
    assert path.name == "fashion_keras_port.py" and text == later.replace("128 at least", "64 at least")


def test_the_command_mends_a_copy(tmp_path):
    import subprocess
    import sys

    (tmp_path / "tests").mkdir()
    shutil.copy(shared_parts.__file__, tmp_path / "tests")
    original = (shared_parts.TOP / "dcgan.py").read_text()
    (tmp_path / "dcgan.py").write_text(original)
    (tmp_path / "cspup128.py").write_text(original.replace("def write(", "def write_all("))
    subprocess.run([sys.executable, tmp_path / "tests" / "shared_parts.py"], check=True)
    assert (tmp_path / "cspup128.py").read_text() == original


def test_a_part_without_an_end_is_an_error():
    with pytest.raises(ValueError):
        shared_parts.parts("# --- shared: data ---\nx = 1\n")
