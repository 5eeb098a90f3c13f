"""What the README says to type is what CI types, and what the command line takes."""
import re
import shlex

import pytest

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port
from shared_parts import TOP

README = (TOP / "README.md").read_text()
SCRIPTS = cspup128, dcgan, cgan_residual, fashion_keras_port
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)


def commands(script):
    """Every `python SCRIPT ...` line in the README's code blocks, without comments."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.DOTALL))
    return re.findall(rf"^!?python {script} ?([^#\n]*)", blocks, re.MULTILINE)


def test_ci_runs_the_readmes_two_commands():
    typed = [line for line in (TOP / ".ci" / "run").read_text().splitlines() if line.startswith("pip install")]
    assert len(typed) == 2
    for line in typed:
        assert f"\n{line}\n" in README


@each
def test_every_command_of_the_readme_is_understood(script, monkeypatch):
    monkeypatch.setattr(script, "load_weights", lambda path: dict(config=vars(script.parse([])[0])))
    found = commands(f"{script.SCRIPT}.py")
    assert len(found) > (5 if script is cspup128 else 3)
    for command in found:
        args, _ = script.parse(shlex.split(command.replace("&&", "").strip()))
        assert args.width


@each
def test_every_command_of_the_docstring_is_understood(script, monkeypatch):
    monkeypatch.setattr(script, "load_weights", lambda path: dict(config=vars(script.parse([])[0])))
    found = re.findall(rf"^    python {script.SCRIPT}.py ([^#\n]*)", script.__doc__, re.MULTILINE)
    assert len(found) == 3
    for command in found:
        assert script.parse(shlex.split(command))[0].width


def flags(script):
    """Every flag of the script, but for those that only take another one back."""
    found = {option for action in script.make_parser()._actions for option in action.option_strings}
    return {flag for flag in found if flag.startswith("--") and flag.replace("--no-", "--") not in found - {flag}}


@each
def test_every_flag_is_in_the_readme(script):
    assert sorted(flag for flag in flags(script) if not re.search(rf"{flag}(?![\w-])", README)) == []


@each
def test_help_has_every_flag_with_what_it_does(script):
    parser = script.make_parser()
    text = parser.format_help()
    assert all(flag in text for flag in flags(script)) and script.__doc__.splitlines()[0] in text


def test_pictures_in_the_readme_are_there_and_small():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (TOP / picture).stat().st_size < 1_500_000
