# The command `fastmaml check`: its input, output and exit codes.
from __future__ import annotations

import json
import textwrap

import pytest

from fastmaml.cli.main import main


@pytest.fixture
def example(tmp_path, capsys):
    file = tmp_path / "my_check.py"
    assert main(["check", "--example", str(file)]) == 0
    assert f"{file}:problem" in capsys.readouterr().out
    return file


def checked(capsys, *arguments):
    code = main(["check", *map(str, arguments)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_example_is_exact(example, capsys):
    code, out, err = checked(capsys, f"{example}:problem")
    assert code == 0 and not err
    assert out.startswith(
        "ok: meta_loss, compared with 2 inner steps of SGD at rate 0.1 (4 tasks, 5 support and 8 query "
    )
    assert "- Exact: the meta-gradient agrees with unrolled float64 autograd to " in out
    assert "parameter  entries  relative error  cosine  verdict\n0.weight        20 " in out


def test_the_example_without_create_graph_is_wrong(example, capsys, tmp_path):
    example.write_text(example.read_text().replace(", create_graph=True)", ")"))
    report = tmp_path / "report.json"
    code, out, _ = checked(capsys, f"{example}:problem", "--directions", 0, "--out", report)
    assert code == 1
    assert out.startswith("WRONG: meta_loss, ") and "- First order only: the Hessian terms are missing; " in out
    written = json.loads(report.read_text())
    assert written["ok"] is False and written["sentences"][0].startswith("First order only")
    assert {row["verdict"] for row in written["table"]} == {"first order"}


def test_an_example_never_overwrites_a_file(example, capsys):
    code, _, err = checked(capsys, "--example", example)
    assert code == 2 and err == f"fastmaml: {example} exists already; name another file for the example\n"


def write(folder, text):
    file = folder / "given.py"
    head = "import torch, fastmaml as fm\nfrom torch import nn\nx = torch.rand(2, 4, 1)\nbatch = (x, x, x, x)\n"
    file.write_text(head + textwrap.dedent(text))
    return file


@pytest.mark.parametrize(
    "returned",
    [
        "nn.Linear(1, 1), batch, 'mse', 0.1, 2",
        "nn.Linear(1, 1), batch, 'mse', 0.1, 2, lambda m, b: fm.MAML(m, 0.1, 2, 'mse')(*b)",
        "fm.MAML(nn.Linear(1, 1), 0.1, 2, loss='mse'), batch",
        "{'learner': fm.MAML(nn.Linear(1, 1), 0.1, 2, loss='mse'), 'batch': batch}",
        "{'model': nn.Linear(1, 1), 'batch': batch, 'loss': 'mse', 'inner_lr': 0.1, 'adapted': '*bias'}",
    ],
)
def test_dicts_and_tuples(tmp_path, capsys, returned):
    code, out, err = checked(capsys, f"{write(tmp_path, f'def problem(): return {returned}')}:problem", "--seed", 3)
    assert (code, err) == (0, ""), out


def test_the_file_may_import_its_neighbours(tmp_path, capsys):
    (tmp_path / "neighbour_of_check.py").write_text("steps = 2\n")
    file = write(
        tmp_path,
        """
        import neighbour_of_check
        def problem(): return nn.Linear(1, 1), batch, "mse", 0.1, neighbour_of_check.steps
        """,
    )
    assert checked(capsys, f"{file}:problem")[0] == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def problem(): 1 / 0", "given.py:problem() raised ZeroDivisionError: division by zero"),
        ("def problem(): return 3", "given.py:problem() returned int; it must return a dict, or a tuple (model, batch, loss, "
                                   "inner_lr, inner_steps, meta_loss)"),
        ("def problem(): return {'model': 1, 'btach': 2}", "given.py:problem() returned the key 'btach', which is none of adapted, backend, "),
        ("def problem(): return {'model': 1}", "given.py:problem() must return 'batch' and 'model' (or 'learner')"),
        ("def problem(): return {'model': nn.Linear(1, 1), 'batch': batch[:2]}", "batch must be (support_x, support_y, query_x, query_y)"),
        ("def problem(): return nn.Linear(1, 1), batch, 'mse'", "give either inner_lr "),
        ("def problem(): return nn.Linear(2, 1), batch, 'mse', 0.1", "support_x [2, 4, 1] does not fit the model"),
        ("def other(): pass", "has no function 'problem' (it has other)"),
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def problem(:", "cannot be imported: SyntaxError: "),
    ],
)  # fmt: skip
def test_bad_files_cost_one_sentence(tmp_path, capsys, text, sentence):
    code, out, err = checked(capsys, f"{write(tmp_path, text)}:problem")
    assert code == 2 and not out
    assert err.startswith("fastmaml: ") and sentence in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (["nothing.py:problem"], "there is no file nothing.py"),
        (["problem"], "'problem' is not FILE.py:FUNCTION"),
        (["a.py:b.c"], "'a.py:b.c' is not FILE.py:FUNCTION"),
        ([], "give FILE.py:FUNCTION to check, or --example to get a file to start from"),
    ],
)
def test_bad_targets_cost_one_sentence(capsys, monkeypatch, tmp_path, target, sentence):
    monkeypatch.chdir(tmp_path)
    assert checked(capsys, *target) == (2, "", f"fastmaml: {sentence}\n")
