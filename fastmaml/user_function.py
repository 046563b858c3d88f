"""FILE.py:FUNCTION: loads a function from the user's file, for commands that take one."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(target: str) -> tuple[Callable[[], Any], str]:
    """(the function, its name for sentences). Raises ValueError if the file or function does not exist."""
    file, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier() or not file:
        raise ValueError(f"'{target}' is not FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # the file may import its neighbours, as in `python FILE.py`
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        own = ((n, value) for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        functions = [n for n, value in own if inspect.isfunction(value) and not n.startswith("_")]
        raise ValueError(f"{file} has no function '{name}' (it has {', '.join(functions) or 'none'})")
    return function, f"{path.name}:{name}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").split("\n")[0]
