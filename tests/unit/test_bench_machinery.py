# The machinery of the benchmarks on tiny cases: wrong results get no row, and written files can be read. No test depends
# on timings.
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

import fastmaml as fm  # noqa: E402
from bench import arena, divergence, measure, meta_gradient, plan, sinusoid, tables  # noqa: E402
from bench.cases import CASES, WORKLOADS  # noqa: E402
from bench.peers import Missing, fetch, jax_network, learn2learn_maml  # noqa: E402
from fastmaml.benchmark import meta, timing  # noqa: E402
from fastmaml.benchmark.disturbance import Disturbance, Watch  # noqa: E402
from fastmaml.benchmark.exact import FLOAT64_LIMIT, disagreement, error, exact  # noqa: E402
from fastmaml.benchmark.peers import torch_func  # noqa: E402
from fastmaml.benchmark.problem import Case, arithmetic, problem  # noqa: E402
from fastmaml.benchmark.results import Results  # noqa: E402
from fastmaml.benchmark.text import number, table  # noqa: E402
from fastmaml.benchmark.timing import interleaved, summarise  # noqa: E402
from tests import oracle  # noqa: E402

pytestmark = pytest.mark.bench

SINE = replace(CASES["sinusoid-k1"], name="tiny-sine", tasks=3, support=4, query=5, inner_steps=2)
CONV = Case(
    "tiny-conv", "Conv4-4, 16x16", lambda: fm.models.conv4(filters=4, image_size=16, ways=2),
    "cross_entropy", (1, 16, 16), 2, 2, 2, 6, 0.01,
)  # fmt: skip


def learn2learn():
    """Its baseline, where the sources are in the cache already: tests use no network."""
    if not fetch.folder(f"learn2learn-{learn2learn_maml.VERSION}-source").is_dir():
        pytest.skip("learn2learn's sources are not in the cache folder; `python -m bench.meta_gradient` fetches them")
    return learn2learn_maml


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


# ---------------------------------------------------------------- cases


def peers(*names):
    return {name: meta_gradient.PEERS[name] for name in names}


def measured(case, *names, rounds=1):
    return meta.measure(problem(case), peers(*names), meta.How(rounds))


def test_every_workload_has_cases():
    assert [len(WORKLOADS[f"W{i}"]) for i in range(1, 5)] == [3, 2, 8, 8] and len(CASES) == 21
    assert all(WORKLOADS[f"W{i}"] for i in range(5, 9))


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_case_makes_the_tasks_it_names(case):
    made = problem(replace(case, tasks=2))
    batch = made.batch
    assert batch.support_x.shape == (2, case.support, *case.input_shape)
    assert batch.query_x.shape == (2, case.query, *case.input_shape)
    assert batch.support_y.shape == ((2, case.support) if case.ways else (2, case.support, 1))
    again = problem(replace(case, tasks=2)).batch
    assert all(torch.equal(a, b) for a, b in zip(batch, again))
    assert fm.Engine(made.model, loss=case.loss, backend="cpu").fused


def test_arithmetic_counts_the_matrix_products():
    # 1-40-40-1: F = 2 (40 + 1600 + 40), F1 = 80.
    F, F1 = 3360, 80
    assert arithmetic(problem(SINE)) == 3 * (2 * 4 * (9 * F - 5 * F1) + 5 * (3 * F - F1))
    # ALGORITHMS section 8: a forward pass of Conv4-64 on a 28x28 image is 19.6 MFLOP.
    case = replace(CASES["omniglot-t8-k1"], tasks=1, support=5, query=75, inner_steps=0)
    F, F1 = 19.6e6, 2 * 9 * 64 * 784
    assert arithmetic(problem(case)) == pytest.approx(75 * (3 * F - F1), rel=5e-3)


# ---------------------------------------------------------------- agreement before timing


@pytest.mark.parametrize("case", [SINE, CONV], ids=str)
@pytest.mark.parametrize("peer", ["torch_loop", "torch_func", "fo_rev_torch", "fo_rev_torch_loop", "learn2learn"])
def test_peers_agree_with_the_exact_result(case, peer):
    module = learn2learn() if peer == "learn2learn" else meta_gradient.PEERS[peer]
    made = problem(case)
    answer = exact(made)
    assert error(module.prepare(made.double())(), answer) <= FLOAT64_LIMIT
    call = module.prepare(made)
    first, second = error(call(), answer), error(call(), answer)
    assert first == second and 0 < first < 1e-2, "a second call must not add to the gradients of the first"


@pytest.mark.parametrize("peer", ["higher", "torchopt", "jax", "jax_map", "jax_fo_rev", "jax_fo_rev_map"])
def test_installed_libraries_agree_too(peer):
    if importlib.util.find_spec(peer.split("_")[0]) is None:
        pytest.skip(f"{peer.split('_')[0]} is not installed")
    made = problem(SINE)
    assert error(meta_gradient.PEERS[peer].prepare(made.double())(), exact(made)) <= FLOAT64_LIMIT


def test_jax_pools_and_normalises_as_torch_does():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    made = problem(replace(CONV, tasks=1)).double()
    loss = jax_network.loss_of(made.model, "cross_entropy")
    x, y = made.batch.query_x[0], made.batch.query_y[0]
    found = loss([jax_network.array(p) for p in made.model.parameters()], jax_network.array(x), jax_network.array(y))
    wanted = torch.nn.functional.cross_entropy(made.model(x), y)
    assert float(found) == pytest.approx(wanted.item(), rel=1e-10)


@pytest.mark.parametrize("case", [SINE, CONV], ids=str)
def test_the_exact_result_is_that_of_the_tests_oracle(case):
    double = problem(case).double()
    theta = torch.cat([p.detach().reshape(-1) for p in double.model.parameters()])
    other = oracle.meta_gradient(
        oracle.network(double.model), theta, double.batch, oracle.loss_function(case.loss),
        torch.full_like(theta, case.inner_lr), case.inner_steps,
    )  # fmt: skip
    loss, grad = exact(problem(case))
    assert loss == pytest.approx(float(other.loss.mean()), rel=1e-12)
    torch.testing.assert_close(grad, other.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", [SINE, CONV], ids=str)
def test_measure_gives_a_row_to_all_who_agree(case):
    result = measured(case, "torch_loop", "torch_func", rounds=2)
    assert [row.name for row in result.rows] == [
        "fastmaml",
        "fastmaml engine",
        "torch_loop",
        "torch_func",
    ] and not result.absent
    text = meta.show(result)
    assert all(row.name in text for row in result.rows) and "K = " in text
    value = json.loads(json.dumps(meta.to_json(result)))
    assert value["rows"][0]["ratio_to_fastmaml"] == 1.0 and value["rows"][1]["rounds"] == 2


def test_a_first_order_method_gets_no_row(monkeypatch):
    # The defect that a benchmark of exact second order must not time: a gradient that leaves out the Hessian.
    def prepare(problem):
        maml = fm.FOMAML(problem.own().model, problem.case.inner_lr, problem.case.inner_steps, loss=problem.case.loss)

        def call():
            maml.zero_grad()
            out = maml(*problem.batch)
            out.loss.backward()
            return out.loss, [p.grad for p in maml.parameters()]

        return call

    monkeypatch.setattr(torch_func, "prepare", prepare)
    result = measured(SINE, "torch_func")
    assert [row.name for row in result.rows] == ["fastmaml", "fastmaml engine"]
    assert "disagrees with the exact result in float64" in result.absent["torch_func"]
    assert "torch_func: not measured, disagrees" in meta.show(result)


def test_a_peer_that_breaks_does_not_end_the_run(monkeypatch):
    def prepare(problem):
        raise RuntimeError("no kernel for this\ndetails")

    monkeypatch.setattr(torch_func, "prepare", prepare)
    result = measured(SINE, "torch_func", "torch_loop")
    assert result.absent == {"torch_func": "RuntimeError: no kernel for this"}
    assert [row.name for row in result.rows] == ["fastmaml", "fastmaml engine", "torch_loop"]


def test_float32_alone_can_disagree():
    assert disagreement(1e-12, 5e-3, 1e-6) == ""
    assert "in float32, relative error 5.0e-02 (limit 1.0e-02)" in disagreement(1e-12, 5e-2, 1e-6)
    assert disagreement(1e-12, 5e-2, 2e-2) == "", "plain torch is as far off: masks fall the other way"
    assert disagreement(math.inf, 0.0, 0.0)


def test_a_peer_that_cannot_be_had_is_named_with_the_reason(monkeypatch, tmp_path, capsys):
    def version():
        raise Missing("pip could not fetch higher==0.2.1 (no network)")

    monkeypatch.setattr(meta_gradient.PEERS["higher"], "version", version)
    monkeypatch.setitem(meta_gradient.CASES, SINE.name, SINE)
    out = tmp_path / "meta.json"
    order = [
        SINE.name,
        "--peers",
        "higher",
        "torch_loop",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--no-peak",
        "--out",
        str(out),
    ]
    assert meta_gradient.main(order) == 0
    assert "higher: not measured, pip could not fetch" in capsys.readouterr().out
    value = json.loads(out.read_text())
    assert value["entries"][SINE.name]["absent"] == {"higher": "pip could not fetch higher==0.2.1 (no network)"}
    assert value["threads"] == 1 and value["machine"] and value["versions"]["torch_loop"] == torch.__version__
    assert value["instruction_set"] and "commit" in value


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        meta_gradient.main(["sinusoid-k7"])
    assert "there is no case 'sinusoid-k7'; there are W1 to W4 and sinusoid-k1" in capsys.readouterr().err


def test_the_help_explains_the_columns(capsys):
    with pytest.raises(SystemExit):
        meta_gradient.main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("median time of one meta-gradient", "learn2learn", "float64", "sgemm"))


# ---------------------------------------------------------------- result files


IDENTITY = {"rounds": 3}


def test_a_result_file_is_continued_by_the_same_run_alone(tmp_path):
    path = tmp_path / "r.json"
    Results(path, "what", IDENTITY, {"date": "today"}, sources="abc").save("one", {"ms": 1})
    again = Results(path, "what", IDENTITY, {"date": "tomorrow"}, sources="abc")
    assert again.entries == {"one": {"ms": 1, "sources": "abc", "date": "today"}} and again.done("one")
    again.save("two", {"ms": 2})
    again.finish()
    content = json.loads(path.read_text())
    assert list(content["entries"]) == ["one", "two"] and content["complete"] and content["date"] == "tomorrow"
    with pytest.raises(
        ValueError, match="was measured with rounds 3, not 5: use --again to start a new file, or --out to name another"
    ):
        Results(path, "what", {**IDENTITY, "rounds": 5}, {})
    assert not Results(path, "what", {**IDENTITY, "rounds": 5}, {}, again=True).entries


def test_an_entry_of_other_sources_stays_until_it_is_measured_again(tmp_path):
    path = tmp_path / "r.json"
    old = Results(path, "what", IDENTITY, {"commit": "a", "date": "today"}, sources="abc")
    for name in ("one", "two"):
        old.save(name, {"ms": 1})
    new = Results(path, "what", IDENTITY, {"commit": "b", "date": "tomorrow"}, sources="def")
    assert not new.done("one")
    new.save("one", {"ms": 2})
    assert new.done("one") and not new.done("two")
    content = json.loads(path.read_text())
    assert [(e["ms"], e["commit"]) for e in content["entries"].values()] == [(2, "b"), (1, "a")]
    facts = {**content, "versions": {"torch": "2"}, "machine": "m", "threads": 2}
    assert tables.belongs_to(facts) == "m, 2 threads; torch 2; commit b, tomorrow: one; commit a, today: two."


def test_a_case_that_is_done_is_not_measured_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(meta_gradient.CASES, SINE.name, SINE)
    order = [SINE.name, "--peers", "torch_loop", "--threads", "1", "--no-peak", "--out", str(tmp_path / "meta.json")]
    assert meta_gradient.main([*order, "--rounds", "1"]) == 0
    monkeypatch.setattr(meta_gradient, "_measure", lambda *_: pytest.fail("measured again"))
    assert meta_gradient.main([*order, "--rounds", "1"]) == 0
    assert f"{SINE.name}: done before" in capsys.readouterr().out
    assert meta_gradient.main([*order, "--rounds", "2"]) == 2
    assert "was measured with rounds 1, not 2" in capsys.readouterr().err


def test_sources_tell_a_benchmarks_own_file():
    assert measure.sources() == measure.sources() != measure.sources(str(measure.ROOT / "bench" / "policy.py"))


# ---------------------------------------------------------------- timing


def test_calls_take_turns():
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, least_s=0.0)
    turns = [
        name for i, name in enumerate(order[3:]) if i == 0 or order[3:][i - 1] != name
    ]  # a disturbed sample comes again
    assert "".join(turns) == "abcbcacab"
    assert times["a"].rounds == 3 and times["a"].calls == 1


def test_slow_calls_get_fewer_rounds_spread_over_all():
    turns = []

    def clock(call, repeats):
        turns.append(call)
        return 10.0 if call == "slow" else 0.01

    times = interleaved({"slow": "slow", "quick": "quick"}, rounds=9, least_s=0.0, clock=clock)
    assert times["slow"].rounds == timing.SLOW_ROUNDS and times["quick"].rounds == 9
    cheap = interleaved({"quick": "quick"}, rounds=9, least_s=0.0, clock=clock, budget_s=0.05)
    assert cheap["quick"].rounds == 5


def test_a_disturbed_sample_is_taken_again_a_bounded_number_of_times(monkeypatch):
    class Busy:
        def stop(self):
            return Disturbance(0.5, 0.0, 0.0, 0.01)

    monkeypatch.setattr(timing, "Watch", Busy)
    times = interleaved({"a": lambda: None}, rounds=4, least_s=0.0, clock=lambda call, repeats: 1.0)
    assert times["a"].rounds == 4 and times["a"].retaken == 4 and times["a"].disturbed == 4 and times["a"].others == 0.5


def test_own_work_is_no_disturbance():
    if Watch().stop() is None:
        pytest.skip("this system has no /proc/stat")
    assert not Disturbance(0.2, 0.0, 0.0, known_to=0.1).disturbed, "two ticks may be feigned"
    assert Disturbance(0.2, 0.0, 0.0, known_to=0.01).disturbed and Disturbance(0.0, 0.2, 0.0, 0.01).disturbed


def test_summarise_gives_median_and_spread():
    times = summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert times.median == 3.0 and times.fastest == 1.0 and times.spread == pytest.approx((4 - 2) / 2 / 3)
    assert summarise([2.0]).spread == 0.0


def test_numbers_have_no_exponent():
    assert [number(v) for v in (0.75842, 24.731, 15771.2, None)] == ["0.7584", "24.73", "15771", ""]


def test_table_aligns_columns():
    assert table(["a", "long"], [["bcd", "1"]]).splitlines() == ["a    long", "---  ----", "bcd     1"]


# ---------------------------------------------------------------- the other benchmarks


def test_sinusoid_loops_are_the_same_loop(tmp_path, monkeypatch, capsys):
    learn2learn()
    out = tmp_path / "sinusoid.json"
    monkeypatch.setattr(sinusoid, "AGREE_ITERATIONS", 3)
    assert sinusoid.main(["--iterations", "4", "--blocks", "2", "--threads", "1", "--out", str(out)]) == 0
    assert "extrapolated to 70,000" in capsys.readouterr().out
    value = json.loads(out.read_text())
    assert value["loss_agreement_float64"] <= 1e-8 and value["iterations"] == 4
    assert [row["name"] for row in value["rows"]] == ["fastmaml", "learn2learn"]


def test_the_paper_run_prints_wall_time_and_slowdown(tmp_path, capsys):
    out = tmp_path / "paper.json"
    assert sinusoid.main(["--paper", "--paper-iterations", "200", "--threads", "1", "--paper-out", str(out)]) == 0
    assert "200 iterations in " in capsys.readouterr().out
    value = json.loads(out.read_text())
    assert value["iterations"] == 200 and value["wall_s"] > 0 and len(value["blocks_ms"]) == 100
    assert value["loss_last"] < value["loss_first"]


def test_sinusoid_refuses_loops_that_differ(monkeypatch, capsys):
    learn2learn()
    monkeypatch.setattr(sinusoid, "AGREE_ITERATIONS", 3)
    original = sinusoid.fastmaml_loop
    monkeypatch.setattr(sinusoid, "fastmaml_loop", lambda dtype, seed: original(dtype, seed + 1))
    assert sinusoid.main(["--threads", "1", "--out", ""]) == 1
    assert "the loops disagree" in capsys.readouterr().err


def test_memory_is_explained_by_phi(tmp_path, capsys):
    out = tmp_path / "memory.json"
    assert arena.main(["--filters", "8", "--query-shots", "2", "--out", str(out)]) == 0
    assert "only phi grows" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["inner_steps"] for row in rows] == [1, 5, 20]
    assert rows[2]["stash_bytes"] > rows[2]["low_bytes"] + 15 * rows[0]["low_bytes"] / 20, "stash keeps activations"


def test_memory_notices_other_growth(monkeypatch, capsys):
    original = arena.arena_bytes
    monkeypatch.setattr(arena, "arena_bytes", lambda *how: original(*how) + 4096 * how[3])
    assert arena.main(["--filters", "8", "--query-shots", "2", "--out", ""]) == 1
    assert "does NOT explain the growth" in capsys.readouterr().out


QUICK = [
    "--dataset",
    "glyphs",
    "--filters",
    "4",
    "--meta-batch",
    "2",
    "--steps",
    "4",
    "--steps64",
    "3",
    "--threads",
    "1",
]


class FakeTasks:
    """Seeded noise in the form of glyph tasks, so that no font is needed."""

    def sample(self, tasks, step):
        random = torch.Generator().manual_seed(step)
        x = torch.rand(2, tasks, 5, 1, 28, 28, generator=random)
        y = torch.arange(5).repeat(tasks, 1)
        return fm.TaskBatch(x[0], y, x[1], y)


@pytest.fixture
def fake_tasks(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(divergence, "DRAWS", 3)
    monkeypatch.setattr(divergence, "_tasks", lambda args: FakeTasks())


def test_divergence_writes_what_the_report_reads(fake_tasks, tmp_path, capsys):
    from fastmaml.report import run_folder

    earlier = [{"title": title, "series": [{"x": [1], "y": [2]}]} for title in ("another", divergence.TITLES[0])]
    (tmp_path / "comparison.json").write_text(json.dumps(earlier))
    assert divergence.main([*QUICK, "--run", str(tmp_path), "--out", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    assert "3 losses of cpu and autodiff agree" in printed and "the float32 rule is met" in printed
    single, double, other = run_folder._read_comparisons(tmp_path / "comparison.json")
    assert [s.name for s in single.series] == ["autodiff", "cpu", "autodiff, start moved by 1e-07"]
    assert [s.name for s in double.series] == ["autodiff", "cpu"] and other.title == "another"
    assert list(single.series[0].x) == [1, 2, 3, 4] and len(double.series[0].x) == 3
    assert (tmp_path / "divergence.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "all.json").read_text())["agreed_float64"] is True


def test_divergence_fails_where_training_differs(fake_tasks, tmp_path, monkeypatch, capsys):
    original = divergence.train

    def another_rate_on_cpu(model, tasks, args, backend, steps):
        changed = argparse.Namespace(**vars(args) | ({"inner_lr": 1.001 * args.inner_lr} if backend == "cpu" else {}))
        return original(model, tasks, changed, backend, steps)

    monkeypatch.setattr(divergence, "train", another_rate_on_cpu)
    assert divergence.main([*QUICK, "--run", str(tmp_path)]) == 1
    assert "cpu and autodiff DISAGREE" in capsys.readouterr().out


def test_predictions_are_compared_run_by_run(monkeypatch, tmp_path, capsys):
    assert plan.runs(["mlp-k1", "omniglot-t4-k5", "mlp32-t16-n32"]) == {
        "mlp-k1 auto": ("mlp-k1", "auto"),
        "omniglot-t4-k5 low": ("omniglot-t4-k5", "low"),
        "omniglot-t4-k5 stash": ("omniglot-t4-k5", "stash"),
        "mlp32-t16-n32": ("mlp32-t16-n32", ""),
    }
    out = tmp_path / "plan.json"
    off = {"sinusoid-k1": 1.2, "sinusoid-k5": 1.5}  # of the time measured
    rows = {name: plan.Row(name, "stash", 1.0, times, None, 2**24, 2**24) for name, times in off.items()}
    monkeypatch.setattr(plan, "measured", lambda name, *_: rows[name])
    order = ["--threads", "1", "--passes", "1", "--out", str(out)]
    assert plan.main(["sinusoid-k1", *order]) == 0
    monkeypatch.setattr(plan, "measured", lambda name, *_: {"sinusoid-k5": rows["sinusoid-k5"]}[name])  # no other is
    assert plan.main(["sinusoid-k1", "sinusoid-k5", *order]) == 1
    sentence = "1 of 2 rows within 30 % of the time and 15 % or 1 MiB of the memory, all but sinusoid-k5 stash."
    assert sentence in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["entries"]["sinusoid-k1 auto"]["predicted_s"] == 1.2
    assert tables.predicted(content).startswith(sentence)


def test_the_smallest_of_all_passes_counts(monkeypatch, tmp_path):
    out = tmp_path / "plan.json"
    # measured, predicted, and memory where it is asked for
    seen = iter([(2.0, 1.5, 64), (1.0, 1.6, None), (3.0, 1.2, None)])

    def one_pass(name, mode, rounds, threads, machine_of, memory):
        measured_s, predicted_s, held = next(seen)
        assert memory == (held is not None)
        return plan.Row(name, mode, measured_s, predicted_s, measured_s / 100, held, held)

    monkeypatch.setattr(plan, "_one_pass", one_pass)
    assert plan.main(["sinusoid-k1", "--threads", "1", "--passes", "2", "--out", str(out)]) == 1  # 1.5 of 1.0
    row = json.loads(out.read_text())["entries"]["sinusoid-k1 auto"]
    assert (row["measured_s"], row["predicted_s"], row["others"], row["measured_bytes"], row["passes"]) == (
        1.0, 1.5, 0.01, 64, 2,
    )  # fmt: skip
    assert plan.main(["sinusoid-k1", "--threads", "1", "--passes", "3", "--out", str(out)]) == 0  # the third alone
    entry = json.loads(out.read_text())["entries"]["sinusoid-k1 auto"]
    assert (entry["measured_s"], entry["predicted_s"], entry["others"], entry["passes"]) == (1.0, 1.2, 0.01, 3)
    del entry["passes"]  # of a file from before there were any
    assert plan.of_entries({"old": entry})[0].passes == 1
