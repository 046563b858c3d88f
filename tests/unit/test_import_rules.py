"""The walls of fastmaml/: which room may import which. CONTRIBUTING.md says what each room holds."""

from __future__ import annotations

import ast

import imports
import pytest

TOP = {"build", "inner", "machine", "models", "tasks", "user_function"}  # these import no other room
PROBLEM = {"problem", "inner"}
ENGINE = {*PROBLEM, "network", "autodiff", "compiled", "engine"}
LEARNERS = {*ENGINE, *TOP, "algorithms"}
MAY_IMPORT = {
    **{name: set[str]() for name in TOP},
    "problem": {"inner"},  # not backends, the engine, MAML
    "network": PROBLEM,  # not the derivatives of losses, backends
    "autodiff": PROBLEM,  # not the compiled module
    "compiled": {*PROBLEM, "network", "autodiff", "build"},  # not learners
    "engine": ENGINE,  # not learners
    "algorithms": ENGINE,  # not training
    "training": LEARNERS,  # not the command line, not checking
    "checking": LEARNERS,  # not training
    "report": {"algorithms"},  # a run folder on disk and the learners' names: not training
    "benchmark": {*LEARNERS, "checking", "training"},  # not bench/, prediction
    "prediction": {*LEARNERS, "training", "benchmark"},  # not the command line
    "studies": {*LEARNERS, "training", "checking"},  # not rl, distributed
    "rl": LEARNERS,  # not distributed, not training, which hands it in
    "distributed": LEARNERS,  # not rl, not training, which hands it in
    "compat": set[str](),  # public names alone: `import fastmaml`
    "cli": {*LEARNERS, "training", "checking", "report", "benchmark", "prediction", "studies", "rl", "distributed"},
    "__main__": {"cli"},
}
# These use the public names by `import fastmaml`, as a user does; below them that would be a way around the walls.
MAY_IMPORT_ALL = {"cli", "benchmark", "prediction", "studies", "compat"}
# The compiled module is reached through these alone.
MAY_TOUCH_C = ("fastmaml.compiled", "fastmaml.build")


def wrong(package) -> list[str]:
    """A sentence for each import that goes through a wall."""
    found = []
    for module, targets in imports.graph(package).items():
        own = imports.room(module)
        if own and own not in MAY_IMPORT:
            found.append(f"{own} has no line in MAY_IMPORT")
            continue
        if own and "fastmaml" in targets and own not in MAY_IMPORT_ALL:
            found.append(f"{module} imports the whole package")
        for target in sorted(targets):
            other = imports.room(target)
            if own and other not in {"", own} and other not in MAY_IMPORT[own]:
                found.append(f"{module} imports {target}, and {own} may not import {other}")
    for module, file in imports.modules(package).items():
        for name in named(file):
            if name.startswith("fastmaml._C") and not module.startswith(MAY_TOUCH_C):
                found.append(f"{module} imports fastmaml._C, which only fastmaml/compiled/ touches")
            if name.split(".")[0] == "bench":
                found.append(f"{module} imports {name}, which is not shipped")
    return found


def named(file) -> list[str]:
    """All that a file imports, by its full name."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_import_keeps_to_the_walls():
    assert wrong(imports.PACKAGE) == []


def test_there_are_no_circles():
    assert imports.circles(imports.rooms(imports.graph())) == []
    inside = {module: targets - {"fastmaml"} for module, targets in imports.graph().items() if module != "fastmaml"}
    assert imports.circles(inside) == []


def test_few_modules_lie_on_top():
    on_top = [file for file in imports.PACKAGE.glob("*.py") if file.stem != "__init__"]
    assert len(on_top) <= 14, "a module that is not for everybody belongs into a folder"


@pytest.mark.parametrize(
    "file, line, sentence",
    [
        ("problem/checks.py", "from fastmaml.engine.engine import Engine", "problem may not import engine"),
        ("problem/checks.py", "def f():\n    import fastmaml.engine.engine", "problem may not import engine"),
        ("checking/oracle.py", "from fastmaml.training import trainer", "checking may not import training"),
        ("training/trainer.py", "from ..cli import main", "training may not import cli"),
        ("tasks/glyphs.py", "from fastmaml import _C", "only fastmaml/compiled/ touches"),
        ("benchmark/meta.py", "from bench.measure import facts", "which is not shipped"),
        ("problem/checks.py", "import fastmaml as fm", "imports the whole package"),
        ("attic/old.py", "", "attic has no line in MAY_IMPORT"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path, file, line, sentence):
    package = tmp_path / "fastmaml"
    for existing in ("__init__.py", "engine/engine.py", "training/trainer.py", "cli/main.py", file):
        (package / existing).parent.mkdir(parents=True, exist_ok=True)
        (package / existing).write_text("")
    assert wrong(package) == ([] if line else ["attic has no line in MAY_IMPORT"])
    (package / file).write_text(line)
    assert sum(sentence in said for said in wrong(package)) == 1


def test_a_planted_circle_is_found():
    assert imports.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert imports.levels({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b": 0, "c": 0, "a": 1, "d": 2}
