"""Marked parts stand in several scripts: `python tests/shared_parts.py` copies the original over the others.

A part begins with `# --- shared: NAME ---` and ends with `# --- end shared ---`. dcgan.py has the originals,
and cgan_residual.py those that only scripts with classes need. A script has the parts that it needs.
"""

import re
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
SCRIPTS = ("dcgan.py", "cspup128.py", "cgan_residual.py", "fashion_keras_port.py")
PART = re.compile(
    r"^( *)# --- shared: ([^\n]+?) ---\n(.*?)^ *# --- end shared ---$", re.DOTALL | re.MULTILINE
)


def parts(text):
    """The marked parts of a script's text, by name, each with its markers."""
    found = {match[2]: match[0] for match in PART.finditer(text)}
    if len(found) != text.count("# --- shared: ") or len(found) != text.count("# --- end shared ---"):
        raise ValueError("a shared part has no end, has no beginning, or stands twice")
    return found


def updated(text, originals):
    """A script's text with each of its marked parts as in `originals`; KeyError for one that is not there."""
    return PART.sub(lambda match: originals[match[2]], text)


def differing(folder=TOP):
    """(path, text as it should be) of each script in the folder whose marked parts are not the original's."""
    scripts = [folder / name for name in SCRIPTS if (folder / name).exists()]
    originals = {}
    for script in reversed(scripts):  # the first that has a part holds its original
        originals.update(parts(script.read_text()))
    for script in scripts[1:]:
        text = script.read_text()
        parts(text)
        if updated(text, originals) != text:
            yield script, updated(text, originals)


if __name__ == "__main__":
    for path, text in differing():
        path.write_text(text)
        print(f"{path.name} updated", file=sys.stderr)
