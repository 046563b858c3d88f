# The pages that people read are true and easy: what they name exists, and README.md's sentences are short.
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import prose
import pytest
import torch

import fastmaml as fm

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "csrc/README.md",
    "csrc/DECISIONS.md",
    "csrc/cuda/README.md",
    "bench/README.md",
    "bench/kernels/README.md",
    "bench/results/ATTEMPTS.md",
    "tests/README.md",
    *(f"fastmaml/{folder}/README.md" for folder in ("algorithms", "checking", "cli", "compat")),
]
# Where a page's paths may start, besides its own folder.
STARTS = ("", "csrc", "fastmaml", "bench", "csrc/cuda")
# Files that the reader, a command or another project makes.
NOT_OURS = re.compile(
    r"FILE\.py|my_check\.py|trial\.py|run\.yaml|01_idea\.cuh|fastmaml/_cuda\.so|build\.log|_C\b.*|runs/.*|\.venv"
    r"|(config|evaluation|metrics|comparison)\.jsonl?|examples\.npz|report\.html|checkpoints/|tensorboard/|/proc/.*"
    r"|images_\w+\.zip|\.json|\.backward\(\)"
)
ENDINGS = "py|pyi|cpp|h|cu|cuh|md|json|jsonl|png|svg|toml|yaml|html|npz|so|log|zip"
FILE = re.compile(rf"[\w.*/-]+\.(?:{ENDINGS})|[\w.-]+/(?:[\w.*-]+/)*|(?:[\w.-]+/)+[\w.-]+")


def named_files(page: str) -> list[str]:
    """The paths that a page names: targets of links, and code spans that look like paths."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    spans = [word for span in re.findall(r"`([^`\n]+)`", text) for word in re.split(r"[\s,;:]+", span)]
    looks = [word for word in spans if FILE.fullmatch(word) and not NOT_OURS.fullmatch(word)]
    return [link for link in links if "://" not in link] + looks


def exists(name: str, page: str) -> bool:
    """A file or folder of the repository; a bare file name may lie in any folder of it."""
    starts = [ROOT / page, *(ROOT / start / "x" for start in STARTS)]
    if any(next(start.parent.glob(name), None) or (start.parent / name).exists() for start in starts):
        return True
    return "/" not in name and any(path.name == name for path in FILES)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [Path(line) for line in listed.splitlines()] or [p for p in ROOT.rglob("*") if "build" not in p.parts]


FILES = tracked()


def pages() -> list[str]:
    return [page for page in PAGES if (ROOT / page).exists()]  # a source distribution holds a part of them


@pytest.mark.parametrize("page", pages())
def test_files_that_a_page_names_exist(page):
    missing = [name for name in named_files((ROOT / page).read_text()) if not exists(name, page)]
    assert not missing, f"{page} names {', '.join(missing)}"


@pytest.mark.parametrize("page", pages())
def test_modules_that_a_page_names_exist(page):
    named = set(re.findall(r"python -m ([\w.]+)", (ROOT / page).read_text()))
    places = {name: ROOT / name.replace(".", "/") for name in named}
    missing = [n for n, at in places.items() if not (at.with_suffix(".py").is_file() or (at / "__main__.py").is_file())]
    assert not missing, f"{page} names {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", pages())
def test_make_targets_that_a_page_names_exist(page):
    text = "\n".join(re.findall(r"^```\n.*?^```|`[^`\n]+`", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))
    for folder, pattern in (("", r"\bmake ([a-z][\w-]*)"), ("csrc", r"\bmake -C csrc ([a-z][\w-]*)")):
        targets = set(re.findall(r"^([\w -]+):(?!=)", (ROOT / folder / "Makefile").read_text(), re.MULTILINE))
        known = {word for target in targets for word in target.split()}
        assert set(re.findall(pattern, text)) <= known


def test_a_missing_file_is_noticed():
    page = "See [x](csrc/none.md), `meta/none.cpp`, `none.h`, `program/op.h`, `bench/results/*.json` and `FILE.py:FUNCTION`."
    assert [name for name in named_files(page) if not exists(name, "README.md")] == [
        "csrc/none.md",
        "meta/none.cpp",
        "none.h",
    ]


def test_the_readme_is_short_and_easy():
    text = (ROOT / "README.md").read_text()
    found = prose.measure(text)
    assert len(text.splitlines()) <= 160
    assert found.median <= 12 and found.tenth_longest <= 25, f"longest sentence: {found.longest}"


def test_sentences_are_measured():
    page = """# A title is left out

One two three. Four `a code span` six,
seven! ![a picture](of.png)

- An item of [five words](a/link.md) here
  1. Et al. ends no sentence, e.g. here: no; nor there.

```python
x = "No. Prose. Here."
```

| a table | is none |
|---|---|
"""
    assert prose.sentences(page) == [
        "One two three.",
        "Four \x00 six, seven!",
        "An item of five words here",
        "Et al ends no sentence, eg here: no; nor there.",
    ]
    found = prose.measure(page)
    assert (found.words, found.lengths, found.median, found.tenth_longest) == (23, (3, 4, 6, 10), 5, 10)
    assert prose.measure("").lengths == ()


def code_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_first_code_of_the_readme_runs(capsys):
    first = code_of("README.md")[0]
    assert len(first.splitlines()) <= 12 and "range(200)" in first
    exec(first.replace("range(200)", "range(2)").replace("filters=32", "filters=8"), {})
    loss, backend = capsys.readouterr().out.split()
    assert float(loss) < 2 and backend in ("cpu", "cuda")


@pytest.mark.parametrize("page", ["README.md", "fastmaml/algorithms/README.md", "fastmaml/checking/README.md"])
def test_the_other_code_of_a_page_runs(page, capsys):
    torch.manual_seed(0)
    model = fm.models.mlp([2, 8, 3])
    labels = "cross_entropy" in "".join(code_of(page))
    names = {f"{part}_x": torch.randn(4, 5, 2) for part in ("support", "query")}
    for part in ("support", "query"):
        names[f"{part}_y"] = torch.arange(20).reshape(4, 5) % 3 if labels else torch.randn(4, 5, 3)
    names["batch"] = [names[name] for name in ("support_x", "support_y", "query_x", "query_y")]
    names |= {"fm": fm, "model": model, "maml": fm.MAML(model, inner_lr=0.1, loss="cross_entropy" if labels else "mse")}
    names |= {"params": names["maml"].engine.flatten(), "x": names["support_x"], "y": names["support_y"]}
    names["v"] = torch.randn(4, names["params"].numel())
    names["my_meta_loss"] = lambda net, batch: fm.MAML(net, inner_lr=0.1, inner_steps=2, loss="mse")(*batch).loss
    for code in code_of(page)[page == "README.md" :]:
        exec(code, names)
    said = capsys.readouterr().out
    assert said.count("- Exact: ") == "".join(code_of(page)).count("fm.check(") and "WRONG" not in said
