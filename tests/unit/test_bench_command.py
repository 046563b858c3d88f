# The command `fastmaml bench`, on built-in cases and on a user's model, and its errors for wrong input.
from __future__ import annotations

import json
import textwrap

import pytest
import torch

pytest.importorskip("fastmaml._C")
from fastmaml.benchmark import cases, hvp, memory, meta, own_model, peak
from fastmaml.benchmark.cases import HvpCase
from fastmaml.benchmark.peers import Missing, torch_loop
from fastmaml.benchmark.peers import hvp as hvp_peers
from fastmaml.cli import bench
from fastmaml.cli.main import main


@pytest.fixture
def file(tmp_path):
    """A user's file with a batch, with examples, with a model that is not fused, and with mistakes."""
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent("""\
            import torch
            from torch import nn

            x, y = torch.rand(3, 4, 2), torch.rand(3, 4, 1)

            def model():
                return nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 1))

            def batch():
                return {"model": model(), "batch": (x, y, x, y), "loss": "mse", "inner_steps": 2, "inner_lr": 0.1}

            def examples():
                return model(), (x[0], y[0]), "mse"

            def unfused():
                return nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1)), (x, y, x, y), "mse"

            def misfit():
                return nn.Linear(3, 1), (x, y, x, y), "mse"

            def frozen():
                net = model()
                net[0].weight.requires_grad_(False)
                return net, (x, y, x, y), "mse"

            def nothing():
                return None

            def unknown():
                return {"model": model(), "batch": (x, y, x, y), "rate": 0.1}
            """)
    )
    return path


def ran(capsys, *arguments):
    code = main(["bench", *map(str, arguments)])
    done = capsys.readouterr()
    return code, done.out, done.err


@pytest.fixture(autouse=True)
def quick(threads, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(bench, "_peaks", lambda args: False)  # a process for each row


def test_own_model_is_measured_beside_plain_torch(file, capsys, tmp_path):
    out = tmp_path / "out.json"
    code, text, err = ran(capsys, "meta", "--model", f"{file}:batch", "--rounds", 1, "--tasks", 5, "--out", out)
    assert code == 0 and not err
    assert "5 tasks, 4 support, 4 query, K = 2" in text and "fo_rev_torch_loop" in text
    (entry,) = json.loads(out.read_text())["entries"].values()
    assert [row["name"] for row in entry["rows"]][:3] == ["fastmaml", "fastmaml engine", "torch_loop"] and not entry[
        "absent"
    ]
    assert all(row["error_float64"] < 1e-12 for row in entry["rows"]) and entry["memory"] == "stash"


def test_examples_become_tasks(file):
    given = own_model.problem_of(f"{file}:examples", tasks=6)
    assert given.batch.support_x.shape == (6, 2, 2) and given.batch.query_y.shape == (6, 2, 1)
    together = torch.cat([given.batch.support_x, given.batch.query_x], 1)
    assert len({tuple(task.flatten().tolist()) for task in together}) > 1, "every task draws in an order of its own"
    assert torch.equal(together[0].sum(), together[1].sum()) or torch.allclose(together[0].sum(), together[1].sum())


def test_hvps_of_an_own_model(file, capsys):
    code, text, _ = ran(
        capsys, "hvp", "--model", f"{file}:batch", "--rounds", 1, "--peers", "double_backward", "func_jvp"
    )
    assert (
        code == 0 and "func_jvp " in text and "fastmaml, 8 v" in text and "including their shared linearisation" in text
    )


def test_memory_of_an_own_model(file, capsys, monkeypatch):
    monkeypatch.setattr(memory, "MODES", ("stash",))  # every cell is a process
    code, text, _ = ran(
        capsys, "memory", "--model", f"{file}:batch", "--inner-steps", 1, 2, "--peers", "torch_loop", "--threads", 1
    )
    assert code == 0 and "K=1  K=2" in text and all(name in text for name in ("fastmaml stash", "torch_loop"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["meta", "--model", "{file}:none"], "has no function 'none' (it has model, batch, examples, "),
        (["meta", "--model", "gone.py:f"], "there is no file gone.py"),
        (["meta", "--model", "{file}:unfused"], "Softplus) is not one of the fused layers; use --backend autodiff to measure"),
        (["hvp", "--model", "{file}:unfused"], "Softplus) is not one of the fused layers; use --backend autodiff to measure"),
        (["meta", "--model", "{file}:misfit"], "the model of mine.py:misfit() cannot run examples [4, 2]: mat1 and mat2"),
        (["meta", "--model", "{file}:frozen"], "parameter '0.weight' of mine.py:frozen() is frozen"),
        (["meta", "--model", "{file}:nothing"], "mine.py:nothing() returned NoneType; it must return a dict or a tuple"),
        (["meta", "--model", "{file}:unknown"], "returned the key 'rate', which is none of batch, examples, inner_lr"),
        (["meta", "--model", "{file}:batch", "--cases", "mlp-k1"], "--model measures your own model and mlp-k1 is a built-in case"),
        (["meta", "--cases", "nothing"], "there is no case 'nothing' of bench meta"),
        (["hvp", "--peers", "jax"], "there is no peer 'jax' of bench hvp; there are double_backward, "),
        (["meta", "--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["meta", "--inner-steps", "1", "2"], "bench meta takes one value of --inner-steps, not 2"),
        (["hvp", "--inner-steps", "1"], "bench hvp has no inner steps"),
    ],
)  # fmt: skip
def test_wrong_input_costs_one_sentence(file, capsys, arguments, sentence):
    code, _, err = ran(capsys, *(word.format(file=file) for word in arguments))
    assert code == 1 and err.startswith("fastmaml: ") and sentence in err and err.count("\n") == 1


def test_an_absent_device_costs_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_cuda", lambda: "no CUDA driver on this machine")
    assert ran(capsys, "meta", "--device", "cuda")[2] == "fastmaml: --device cuda: no CUDA driver on this machine\n"


def test_ctrl_c_leaves_what_was_measured(capsys, monkeypatch, tmp_path):
    measure = meta.measure

    def interrupted(given, *how):
        if given.case.name == "sinusoid-k5":
            raise KeyboardInterrupt
        return measure(given, *how)

    monkeypatch.setattr(meta, "measure", interrupted)
    out = tmp_path / "out.json"
    order = (
        "meta",
        "--cases",
        "sinusoid-k1",
        "sinusoid-k5",
        "--tasks",
        2,
        "--rounds",
        1,
        "--peers",
        "torch_loop",
        "--out",
        out,
    )
    code, _, err = ran(capsys, *order)
    assert code == 130 and f"stopped; measured so far: sinusoid-k1, in {out}" in err
    content = json.loads(out.read_text())
    assert list(content["entries"]) == ["sinusoid-k1"] and not content["complete"]


def test_the_list_shows_cases_and_peers(capsys):
    code, out, _ = ran(capsys, "hvp", "--list")
    assert code == 0 and all(name in out for name in (*cases.HVP, *hvp.PEERS))


# ---------------------------------------------------------------- the machinery of the package


@pytest.mark.parametrize("name", [name for name in hvp.PEERS if "+" not in name])
@pytest.mark.parametrize("case", [HvpCase(5, 3, 4), HvpCase(None, 2, 5)], ids=str)
def test_hvp_peers_agree(case, name):
    p = hvp.problem(case).to(dtype=torch.float64)
    try:
        found = hvp.PEERS[name](p)()
    except Missing as reason:
        assert case.width is None and name == "double_backward_batched" and "MLPs" in str(reason)
        return
    torch.testing.assert_close(found, hvp.exact(p), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", hvp_peers.REPEATED)
def test_kept_linearisations_agree(name):
    p = hvp.problem(HvpCase(5, 3, 4)).to(dtype=torch.float64)
    directions = hvp._directions(p)
    found = hvp_peers.REPEATED[name](p, directions)()
    torch.testing.assert_close(found, hvp._again_and_again(p, directions, "cpu")(), rtol=1e-9, atol=1e-11)


def test_a_wrong_product_gets_no_row(monkeypatch):
    p = hvp.problem(HvpCase(5, 2, 4))
    result = hvp.measure(p, {"doubled": lambda p: lambda: 2 * hvp.exact(p)}, hvp.How(rounds=1))
    assert [row.name for row in result.rows] == ["fastmaml"]
    assert "disagrees with the exact result in float64, relative error 1.0e+00" in result.absent["doubled"]


SINE = peak.Source("fastmaml.benchmark.peak:built_in", {"case": "sinusoid-k1", "tasks": 2})


def test_peak_memory_is_measured_in_a_process_of_its_own():
    found = peak.in_a_process(torch_loop, SINE)
    assert 0 <= found.bytes < 2**28 and found.seconds > 0 and found.first_call_s > 0


def test_a_process_that_takes_too_much_or_fails_is_named():
    with pytest.raises(Missing, match="needs more than the 0.0 GiB it was given"):
        peak.in_a_process(torch_loop, SINE, limit_bytes=2**20)
    with pytest.raises(Missing, match="TypeError: prepare.. got an unexpected keyword argument 'nonsense'"):
        peak.in_a_process(torch_loop, SINE, {"nonsense": 1})
