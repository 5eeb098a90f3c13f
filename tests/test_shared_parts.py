"""The marked parts are the same text in every script, and the command that copies them makes them so."""
import shutil

import pytest
import shared_parts


def test_marked_parts_are_the_originals():
    assert [path.name for path, _ in shared_parts.differing()] == []
    names = {"fused", "data", "run folder", "training", "uses", "flags", "command line"}
    for script in ("dcgan.py", "cspup128.py"):
        assert names == set(shared_parts.parts((shared_parts.TOP / script).read_text()))


def test_a_changed_copy_is_found_and_mended_and_its_own_lines_stay(tmp_path):
    original = (shared_parts.TOP / "dcgan.py").read_text()
    (tmp_path / "dcgan.py").write_text(original)
    copy = tmp_path / "cgan_residual.py"
    copy.write_text(original.replace("LOG_EVERY = 10", "LOG_EVERY = 20").replace("SCRIPT, Z", '"""Own."""\nSCRIPT, Z'))
    ((path, text),) = shared_parts.differing(tmp_path)
    assert path == copy and "LOG_EVERY = 10" in text and '"""Own."""' in text
    copy.write_text(text)
    assert not list(shared_parts.differing(tmp_path))


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
