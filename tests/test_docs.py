"""What the documents say is there: commands, options, names, modules, tests, links. Nothing is run; no torch."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import hermes
from hermes.checkpoint.synth import ARCHS
from hermes.cli.app import app
from hermes.units import parse_bytes

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "hermes"
README, ARCHITECTURE, CONTRIBUTING = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
)
DOCUMENTS = {"README.md": README, "ARCHITECTURE.md": ARCHITECTURE, "CONTRIBUTING.md": CONTRIBUTING}
COMMANDS = typer.main.get_command(app).commands


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_lines(text):
    return [line for block in fenced(text, "sh") for line in block.splitlines() if line.startswith("hermes ")]


@pytest.mark.parametrize("line", command_lines(README))
def test_a_command_can_be_typed_as_it_stands(line):
    _, name, *words = shlex.split(line, comments=True)
    values = COMMANDS[name].make_context(name, words).params  # parses, and runs nothing
    if values.get("budget") is not None:
        assert parse_bytes(values["budget"]) > 0
    assert values.get("granularity") in (None, "leaf", "joined", "half", "layer")
    assert name != "synth" or values["arch"] in ARCHS


def test_the_tour_shows_every_command():
    assert {line.split()[1] for line in command_lines(README)} == set(COMMANDS)


def test_every_option_named_exists():
    known = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - {"--help"}  # which every command has
    assert named <= known, named - known


@pytest.mark.parametrize("example", fenced(README, "python"))
def test_an_example_uses_what_there_is(example):
    tree = ast.parse(example)
    parameters = {}
    for module in ("api.py", "fleet/fleet.py", "fleet/blocks.py"):
        for node in ast.parse((SOURCE / module).read_text(encoding="utf-8")).body:
            makers = [f for f in getattr(node, "body", []) if getattr(f, "name", "") == "__init__"]
            for maker in makers or ([node] if isinstance(node, ast.FunctionDef) else []):
                parameters[node.name] = {argument.arg for argument in [*maker.args.args, *maker.args.kwonlyargs]}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hermes":
            used.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hermes."):
            given = {keyword.arg for keyword in node.keywords}
            assert given <= parameters[node.func.attr], given
    assert used
    assert used <= set(hermes.__all__)


def test_public_names_in_prose_exist():
    named = {name for text in DOCUMENTS.values() for name in re.findall(r"`hermes\.(\w+)", text)}
    below = {path.stem for path in SOURCE.iterdir()}
    assert named <= set(hermes.__all__) | below, named


def test_the_results_have_their_place():
    assert re.findall(r"<!-- results:(\w+) -->", README) == ["begin", "end"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_make_targets_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[name]):
        assert (ROOT / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", DOCUMENTS[name])) <= targets


def listed_modules():
    """The modules of ARCHITECTURE.md as paths below src/hermes, in its order; a package stands for its __init__.py."""
    rooms = ARCHITECTURE.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    paths, package = [], ""
    for line in "".join(fenced(rooms, "")).splitlines():
        indented, name = re.match(r"( *)(\S+)", line).groups()
        if name.endswith("/"):
            package = name
            paths.append(f"{name}__init__.py")
        else:
            paths.append(f"{package if indented else ''}{name}")
    return paths


def test_every_module_is_listed_once():
    there = [path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")]
    assert sorted(listed_modules()) == sorted(there)


def test_a_module_imports_only_what_is_listed_before_it():
    place = {path: number for number, path in enumerate(listed_modules())}
    for path, own in place.items():
        if path.endswith("__init__.py"):
            continue  # a package gathers up its own modules
        for imported in imports(SOURCE / path):
            assert place[imported] < own, f"{path} imports {imported}"


def imports(module):
    """Of our own modules, as paths below src/hermes, wherever in the file they stand; the root package left out."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"hermes.{alias.name}" for alias in node.names] if node.module == "hermes" else [node.module]
        for name in names:
            if name.startswith("hermes."):
                path = name.removeprefix("hermes.").replace(".", "/")
                yield f"{path}.py" if (SOURCE / f"{path}.py").exists() else f"{path}/__init__.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tests_that_are_named_exist(name):
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", DOCUMENTS[name]):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
