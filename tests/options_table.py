"""The table of MetaGradientOptions in fastmaml/algorithms/README.md, made from the class itself.

python tests/options_table.py          writes the table; tests/unit/test_options.py holds the page to it
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

from fastmaml.engine.options import MetaGradientOptions

PAGE = Path(__file__).resolve().parents[1] / "fastmaml" / "algorithms" / "README.md"
BLOCK = re.compile(r"(<!-- MetaGradientOptions -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """A row for each setting: name, default, and the text under the field."""
    (of_class,) = ast.parse(inspect.getsource(MetaGradientOptions)).body
    assert isinstance(of_class, ast.ClassDef)
    texts = {}
    for field, text in zip(of_class.body, of_class.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), field.target.id
            texts[field.target.id] = str(text.value.value)
    rows = [f"| `{field.name}` | `{field.default!r}` | {texts[field.name]} |" for field in fields(MetaGradientOptions)]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n"


def written(page: str) -> str:
    """The page with today's table."""
    return BLOCK.sub(lambda block: block.group(1) + table() + block.group(2), page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
