"""The imports of a package as data: who imports whom, on how many levels, and in which circles.

    python tests/imports.py [FOLDER]      prints that of fastmaml/: rooms, levels, arrows, circles

A room is a folder of the package, or a module on top of it. An arrow is one room that imports another, wherever in its
files it does so; imports for type checkers alone do not count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fastmaml"


def modules(package: Path) -> dict[str, Path]:
    """{"fastmaml.engine.engine": its file}; a folder's __init__ has the folder's name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(module: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one of its files imports; itself and the compiled _C are left out."""
    is_folder = file.name == "__init__.py"
    found = set()
    for node in _runtime(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {_longest(alias.name, known) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_folder else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found |= {_longest(f"{base}.{alias.name}", known) for alias in node.names if alias.name != "_C"}
    return found - {module, ""}


def _runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _runtime(other)
            continue
        yield node
        yield from _runtime(node)


def _longest(name: str, known: dict[str, Path]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """{module: the modules it imports}."""
    known = modules(package)
    return {module: imported(module, file, known) for module, file in known.items()}


def room(module: str) -> str:
    """The folder of a module, or the module where it lies on top; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def rooms(of_modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """{room: the rooms it imports}; the package's own __init__, which only hands names on, is left out."""
    arrows: dict[str, set[str]] = {room(module): set() for module in of_modules if room(module)}
    for module, targets in of_modules.items():
        if room(module):
            arrows[room(module)] |= {room(target) for target in targets} - {room(module), ""}
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more that import each other, by way of others or not."""
    reach = {name: _reached(name, arrows) for name in arrows}
    groups = {tuple(sorted(n for n in reach[name] if name in reach[n])) for name in arrows if name in reach[name]}
    return [list(group) for group in sorted(groups)]


def _reached(name: str, arrows: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = [name]
    while left:
        for target in arrows.get(left.pop(), ()):
            if target not in found:
                found.add(target)
                left.append(target)
    return found


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms lie below each, one under the other; rooms of a circle share a level."""
    of_circle = {name: tuple(group) for group in circles(arrows) for name in group}
    known: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in known:
            together = of_circle.get(name, (name,))
            below = {target for member in together for target in arrows.get(member, ())} - set(together)
            found = max((level(target) + 1 for target in below), default=0)
            known.update(dict.fromkeys(together, found))
        return known[name]

    return {name: level(name) for name in arrows}


def describe(package: Path) -> str:
    of_modules = graph(package)
    arrows = rooms(of_modules)
    height = levels(arrows)
    top = [m for m in of_modules if m.count(".") == 1 and not (package / m.split(".")[1]).is_dir()]
    lines = [
        f"{len(arrows)} rooms, {len(top)} of them modules on top: {', '.join(m.split('.')[1] for m in top)}",
        f"{max(height.values()) + 1} levels, {sum(map(len, arrows.values()))} arrows between rooms, "
        f"{sum(map(len, of_modules.values()))} between modules, {len(circles(arrows))} circles",
    ]
    for level in range(max(height.values()), -1, -1):
        lines.append(f"{level:3}  {', '.join(sorted(name for name in arrows if height[name] == level))}")
    lines += [f"a circle: {', '.join(group)}" for group in circles(arrows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE))
