"""Settings of a run as text: YAML or TOML files, the YAML of --print-config, and NAME=VALUE options."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from fastmaml.training.run_config import RunConfig, typed


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a .yaml, .yml or .toml file, by RunConfig's names. `options` and `model` are mappings.

    Raises ValueError for an unreadable file, an unknown name, or a value of the wrong kind.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"{path} must be named .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
        values = _parse_toml(text) if suffix == ".toml" else _parse_yaml(text)
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as {suffix[1:]}: {_in_one_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings by name, not a {type(values).__name__}")
    known = [item.name for item in fields(RunConfig)]
    for name in values:
        if name not in known:
            (nearest,) = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"{path}: there is no setting {str(name)!r}; the nearest is {nearest!r}")
    try:
        return typed(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_yaml(config: RunConfig) -> str:
    """Every setting, as YAML for `read_settings`."""
    return str(_yaml().safe_dump(config.settings(), sort_keys=False, allow_unicode=True, default_flow_style=None))


def read_option(text: str) -> tuple[str, Any]:
    """ "lam=2.0" as ("lam", 2.0). The value is parsed as YAML: numbers, true, null, [0, 0.999], words."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option takes NAME=VALUE, as in lam=2.0, not {text!r}")
    try:
        return name, _parse_yaml(value)
    except ValueError as error:
        if value[0] not in "[{\"'":
            return name, value  # a parameter name pattern such as *.weight
        raise ValueError(f"--option {text}: {_in_one_line(error)}") from None


def _parse_yaml(text: str) -> Any:
    yaml = _yaml()
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    # YAML 1.1 reads 1e-3 as a word, because it has no point. YAML 1.2 reads a number, and so do we.
    number = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # before Python 3.11
        try:
            import tomli as tomllib  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:
            raise ImportError("TOML files need tomli on Python 3.10: pip install 'fastmaml[train]'") from None
    values: dict[str, Any] = tomllib.loads(text)
    return values


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError:
        raise ImportError("YAML needs PyYAML: pip install 'fastmaml[train]'") from None
    module: ModuleType = yaml
    return module


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
