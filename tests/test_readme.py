"""What the README says to type is what CI types, and what the command line takes."""
import re
import shlex

import cspup128
from shared_parts import TOP

README = (TOP / "README.md").read_text()


def commands(script):
    """Every `python SCRIPT ...` line in the README's code blocks, without comments."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.DOTALL))
    return re.findall(rf"^!?python {script} ?([^#\n]*)", blocks, re.MULTILINE)


def test_ci_runs_the_readmes_two_commands():
    typed = [line for line in (TOP / ".ci" / "run").read_text().splitlines() if line.startswith("pip install")]
    assert len(typed) == 2
    for line in typed:
        assert f"\n{line}\n" in README


def test_every_command_of_the_readme_is_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(cspup128, "load_weights", lambda path: dict(config=vars(cspup128.parse([])[0])))
    found = commands("cspup128.py")
    assert len(found) > 5
    for command in found:
        args, _ = cspup128.parse(shlex.split(command.replace("&&", "").strip()))
        assert args.width


def test_every_flag_is_in_the_readme():
    flags = [option for action in cspup128.make_parser()._actions for option in action.option_strings]
    missing = [flag for flag in flags if flag.startswith("--") and flag not in README and not flag.startswith("--no-f")]
    assert missing == []


def test_pictures_in_the_readme_are_there_and_small():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (TOP / picture).stat().st_size < 1_500_000
