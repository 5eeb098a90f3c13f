"""Scripts and tools are plain: as ruff formats and checks them, and short in tokens, few to a line."""

import ast
import io
import subprocess
import sys
import tokenize

import pytest
from shared_parts import SCRIPTS, TOP

LIMITS = {
    "dcgan.py": 9_080,
    "cgan_residual.py": 9_330,
    "cspup128.py": 9_745,
    "fashion_keras_port.py": 10_695,
}
TOOLS = sorted(f"tools/{path.name}" for path in TOP.glob("tools/*.py"))
COUNTED = {"NAME", "OP", "NUMBER", "STRING", "FSTRING_START", "FSTRING_MIDDLE"}  # names, operators, literals


def ruff(*arguments):
    """Run ruff on the repository; (exit status, what it printed)."""
    command = [sys.executable, "-m", "ruff", *arguments]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def count(source):
    """(tokens, lines that hold any) of Python source, without docstrings and comments."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    documented = [node.body[0] for node in documented if ast.get_docstring(node, clean=False) is not None]
    docstrings = {(statement.lineno, statement.col_offset) for statement in documented}
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] in COUNTED and token.start not in docstrings:
            tokens.append(token)
    return len(tokens), len({token.start[0] for token in tokens})


def test_ruff_would_format_nothing_otherwise():
    status, text = ruff("format", "--check", ".")
    assert status == 0, text


def test_ruff_finds_nothing_in_scripts_and_tools():
    status, text = ruff("check", *SCRIPTS, *TOOLS, "setup.py")
    assert status == 0, text


def test_ruff_is_silenced_nowhere():
    assert not [name for name in (*SCRIPTS, *TOOLS) if "noqa" in (TOP / name).read_text()]


def test_what_a_token_is():
    source = '"""Free."""\n\n\ndef f(x):  # free\n    """Free."""\n    return x + 1\n'
    assert count(source) == (6 + 4, 2)


@pytest.mark.parametrize("name", [*SCRIPTS, *TOOLS])
def test_tokens_and_tokens_a_line(name):
    tokens, lines = count((TOP / name).read_text())
    assert tokens <= LIMITS.get(name, 3_200)
    assert tokens / lines <= 13.5


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_interface_stands_above_the_first_shared_part(name):
    """In six lines, and it names what the script has to have."""
    above = (TOP / name).read_text().split("# --- shared: ")[0]
    (lines,) = [part.split("\n\n")[0].splitlines() for part in above.split("# Interface: ")[1:]]
    assert len(lines) <= 6
    functions = "make_networks train_step draw_image draw_z prepare add_flags flag_defaults".split()
    assert all(f"{name}(" in "\n".join(lines) for name in functions)
