"""The command line as --help shows it: every default as a number, also where it depends on another flag."""

import re

import pytest
from conftest import SCRIPTS

import cspup128
import dcgan
import fashion_keras_port

ADAM = "lr", "d-lr", "betas", "ema", "lr-decay-from"


def help_of(script, argv, capsys):
    """{flag: its help in one line} by --help."""
    with pytest.raises(SystemExit) as stop:
        script.main([*argv.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out.split("options:\n")[1]
    found = {}
    for part in re.split(r"\n(?=  -)", text):
        words = part.split()
        flag = next(word for word in words if word.startswith("--")).strip(",")
        found[flag.removeprefix("--")] = " ".join(words)
    return found


def default_of(line):
    """What stands in parentheses at the end of a flag's help."""
    return line[line.rindex("(") + 1 :].rstrip(")")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
def test_help_shows_defaults_as_numbers(script, capsys):
    shown = help_of(script, "", capsys)
    args = script.parse([])[0]
    assert not [line for line in shown.values() if "None" in line or "recipe)" in line]
    for flag in *ADAM, "batch-size", "width", "seed", "save-every":
        assert default_of(shown[flag]) == str(getattr(args, flag.replace("-", "_"))), shown[flag]
        assert re.fullmatch(r"[\d.e, \[\]-]+", default_of(shown[flag])), shown[flag]


OTHERS = [
    (dcgan, "--recipe classic", {"d-lr": "0.0002", "betas": "[0.5, 0.999]", "ema": "0.0", "flip": "False"}),
    (cspup128, "--scheme exact", {"lr": "0.0002", "betas": "[0.5, 0.999]", "loss": "bce", "up": "deconv"}),
    (fashion_keras_port, "--arch style", {"lr": "0.0005", "d-lr": "0.001", "ema": "0.999", "width": "16"}),
    (fashion_keras_port, "--loss wgan-gp", {"gamma": "20.0"}),
    (fashion_keras_port, "--arch dcgan", {"gamma": "0.3", "batch-size": "64"}),
]


@pytest.mark.parametrize("script, argv, defaults", OTHERS, ids=[argv for _, argv, _ in OTHERS])
def test_help_shows_the_defaults_of_the_flags_before_it(script, argv, defaults, capsys):
    shown = help_of(script, argv, capsys)
    args = script.parse(argv.split())[0]
    for flag, default in defaults.items():
        assert default_of(shown[flag]) == default == str(getattr(args, flag.replace("-", "_")))
        assert default_of(help_of(script, "", capsys)[flag]) != default


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
def test_a_flag_given_wins_over_what_another_flag_makes_its_default(script):
    for recipe in ["--recipe classic", "--scheme exact", "--arch style", ""]:
        name = recipe.split(" ")[0].strip("-")
        if name and not hasattr(script.parse([])[0], name):
            continue
        args = script.parse(["--lr", "0.5", "--betas", "0.1", "0.2", *recipe.split(), "--ema", "0.3"])[0]
        assert (args.lr, args.betas, args.ema) == (0.5, [0.1, 0.2], 0.3)
