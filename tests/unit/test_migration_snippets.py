# The snippets of fastmaml/compat/README.md, before and after moving to fastmaml, as files in tests/migration. Each is executed. Their
# meta-gradients and the weights after the outer step must agree. Missing libraries are skipped, with the reason.
from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from unrolled import regression_batch, small_mlp

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = ROOT / "tests" / "migration"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

LIBRARIES = ("learn2learn", "higher", "torchopt", "torch_func")


def available(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a library importable, from the environment or from where bench/ has fetched it; skips where it is not there."""
    from bench.peers import fetch, higher_loop, learn2learn_maml

    if library == "torch_func" or (library != "learn2learn" and importlib.util.find_spec(library) is not None):
        return
    if library == "higher" and fetch.folder(f"higher-{higher_loop.VERSION}").is_dir():
        fetch.installed("higher", higher_loop.VERSION)
        return
    if library == "learn2learn" and fetch.folder(f"learn2learn-{learn2learn_maml.VERSION}-source").is_dir():
        maml = learn2learn_maml.wrapper()  # of a package whose __init__ needs gym
        monkeypatch.setattr(sys.modules["learn2learn.algorithms"], "MAML", maml, raising=False)
        monkeypatch.setattr(
            sys.modules["learn2learn"], "algorithms", sys.modules["learn2learn.algorithms"], raising=False
        )
        return
    fetched = (
        "" if library == "torchopt" else f"; `python -m bench.meta_gradient sinusoid-k1 --peers {library}` fetches it"
    )
    pytest.skip(f"{library} is not installed{fetched}")


def trained(snippet: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The meta-gradients and the weights that a snippet leaves."""
    text = (SNIPPETS / snippet).read_text()
    model = small_mlp()
    torch.manual_seed(0)
    names = {"model": model, "batch": regression_batch(), "mse_loss": lambda output, y: ((output - y) ** 2).mean()}
    exec(compile(text, snippet, "exec"), names)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return grads, {name: p.detach() for name, p in model.named_parameters()}


def agree(one: str, other: str) -> None:
    for of_one, of_other in zip(trained(one), trained(other)):
        for name, value in of_one.items():
            # all in float64: 1e-12 is above rounding and far below any other inner loop
            torch.testing.assert_close(value, of_other[name], rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.filterwarnings("ignore")
def test_before_and_after_agree(library, monkeypatch):
    available(library, monkeypatch)
    agree(f"{library}_before.py", "after.py")


def test_the_loop_of_learn2learn_runs_with_one_changed_line():
    agree("learn2learn_compat.py", "after.py")
    before, after = ((SNIPPETS / f"learn2learn_{kind}.py").read_text().splitlines() for kind in ("before", "compat"))
    changed = set(after) ^ set(before)
    assert changed == {"import learn2learn as l2l", "from fastmaml.compat import learn2learn as l2l"}


def test_snippets_would_notice_another_inner_loop(tmp_path, monkeypatch):
    other = tmp_path / "other.py"
    other.write_text((SNIPPETS / "after.py").read_text().replace("inner_lr=0.1", "inner_lr=0.11"))
    monkeypatch.setattr(sys.modules[__name__], "SNIPPETS", tmp_path)
    wrong = trained("other.py")[0]
    monkeypatch.undo()
    right = trained("after.py")[0]
    assert any(float((wrong[name] - right[name]).norm()) > 1e-3 * float(right[name].norm()) for name in right)


def test_the_page_shows_lines_of_the_snippets():
    page = (ROOT / "fastmaml" / "compat" / "README.md").read_text()
    after = (SNIPPETS / "after.py").read_text()
    for line in re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].splitlines():
        assert line.partition("  #")[0].rstrip() in after
    rows = re.findall(r"^\| (\S+) \| (`.*) \|$", page, re.MULTILINE)
    assert [library.replace(".", "_") for library, _ in rows] == list(LIBRARIES)
    for library, code in rows:
        before = (SNIPPETS / f"{library.replace('.', '_')}_before.py").read_text()
        missing = [line for line in re.findall(r"`(.*?)`", code) if line not in before]
        assert not missing, f"{library}: {missing}"
