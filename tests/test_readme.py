"""What the README and the docstrings say to type is what CI types, and what the command lines take."""

import re
import shlex

import pytest
from shared_parts import TOP

README = (TOP / "README.md").read_text()


def commands(script, text):
    """Every `python SCRIPT ...` line in a text's code blocks, without comments."""
    return re.findall(rf"^(?:    )?!?python {script.SCRIPT}\.py ?([^#\n]*)", text, re.MULTILINE)


def test_ci_runs_the_readmes_two_commands():
    typed = [
        line for line in (TOP / ".ci" / "run").read_text().splitlines() if line.startswith("pip install")
    ]
    assert len(typed) == 2 and all(f"\n{line}\n" in README for line in typed)


@pytest.mark.parametrize("text", ["README", "docstring"])
def test_every_command_is_understood(script, text, monkeypatch):
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.DOTALL))
    found = commands(script, blocks if text == "README" else script.__doc__)
    assert len(found) == 3 if text == "docstring" else found
    config = vars(script.parse([])[0])
    monkeypatch.setattr(script.torch, "load", lambda *given, **options: dict(config=config))
    for command in found:
        argv = shlex.split(re.split(r"&&|\||;", command)[0])
        assert script.parse([word for word in argv if word != "…"])[0].data


def test_help_has_every_flag_with_its_default_and_the_docstring(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__.splitlines()[0] in text
    flags = set(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE))
    expected = (
        "--data --root --classes --epochs --steps --minutes --batch-size --lr --d-lr --lr-decay-from --betas "
        "--ema --seed --device --precision --no-fused --out --save-every --keep-every --logger --resume "
        "--generate --checkpoint --save"
    )
    assert set(expected.split()) <= flags
    for flag in flags - {"--precision", "--device"}:
        assert re.search(rf"^  {flag}[ ,].*\n?.*[a-z]{{3}}", text, re.MULTILINE), flag


def test_pictures_in_the_readme_are_there_and_small():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (TOP / picture).stat().st_size < 1_500_000
