# Assembles a report: the result first, then examples, learning, time and the commands to repeat the run.
# The page is one file: style, plots and pictures are inline, and nothing is fetched. The only script moves a slider.
from __future__ import annotations

import json
import math
import re
import shlex
from html import escape
from typing import Any

import numpy as np

from fastmaml.algorithms.names import ALGORITHMS

from . import examples as image_tasks
from . import plots, tables
from .run_folder import Evaluation, Row, Run, Table
from .style import CSS

QUERIES_SHOWN = 3  # per class and task
TASKS_SHOWN = 3
TABLE_STEPS = (0, 1, 2, 3, 5, 10)
_DATA_NAMES = {"omniglot": "Omniglot", "glyphs": "Glyphs", "sinusoid": "sinusoids", "mini_imagenet": "miniImageNet"}


def html(run: Run) -> str:
    """The whole page. Parts without a file are left out, and the page names the missing files."""
    notes = "".join(f"<p>{_prose(note)}</p>" for note in _unfinished(run) + run.notes)
    sections = [_result(run), _examples(run), _learning(run), _comparisons(run), _time(run), _setup(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title(run))}</title><style>{CSS}</style></head>\n"
        f"<body><main><header><p class='eyebrow'>fastmaml report · {escape(run.name)}</p><h1>{escape(title(run))}</h1>"
        f"<p class='lede'>{headline(run)}</p>{_stats(run)}"
        + (f"<div class='notes'>{notes}</div>" if notes else "")
        + "</header>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>± is the 95 % interval of the mean over tasks. This page is one file and fetches nothing.</footer>"
        "</main></body></html>\n"
    )


def _prose(text: str) -> str:
    """Text with `code` in backticks as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def title(run: Run) -> str:
    """A title such as "MAML on Glyphs, 5-way 1-shot"."""
    config = run.config
    algorithm = str(config.get("algorithm", "meta-learning"))
    algorithm = ALGORITHMS.get(algorithm.lower(), algorithm)
    data = str(config.get("dataset", "tasks"))
    ways, shots = _ways(run), config.get("shots")
    kind = f", {ways}-way {shots}-shot" if ways and shots else (f", {shots}-shot" if shots else "")
    return f"{algorithm} on {_DATA_NAMES.get(data.lower(), data)}{kind}"


def _ways(run: Run) -> int | None:
    ways = run.config.get("ways") or (run.evaluation.facts.get("ways") if run.evaluation else None)
    return int(ways) if ways and run.metric == "accuracy" else None


# ---------------------------------------------------------------- the result in one sentence, and in a row of numbers


def headline(run: Run) -> str:
    """The result in one sentence of HTML: at the trained number of inner steps, against every other row."""
    if run.evaluation is None:
        return _headline_of_training(run)
    evaluation, table = run.evaluation, main_table(run, run.evaluation)
    learner = table.learner or table.rows[0]
    index = trained_index(run, evaluation)
    k = evaluation.inner_steps[index]
    result = f"<b>{tables.with_interval(evaluation.metric, *learner.at(index))}</b>"
    others = [
        f"{_short(evaluation.metric, row, index)} ({escape(row.name)})" for row in table.rows if row is not learner
    ]
    against = f", against {_and(others)}" if others else ""
    where = _tasks_seen(evaluation)
    steps = f"After {_count(k, 'gradient step')}"
    if evaluation.metric == "accuracy":
        ways = f"{_ways(run)}-way" if _ways(run) else ""
        on = f" on {_count(table.shots, 'picture')} of each class" if table.shots else ""
        inside = ", ".join(text for text in (ways, where) if text)
        return (
            f"{steps}{on}, the meta-trained network names {result} of the query pictures correctly ({inside}){against}."
        )
    on = f" on {_count(table.shots, 'point')} of an unseen curve" if table.shots else ""
    before = tables.measure("mse", *learner.at(0))[0]
    falls = f"goes from {before} to" if learner.adapts and index else "is"
    return f"{steps}{on}, the meta-trained network's mean square error {falls} {result} ({where}){against}."


def _headline_of_training(run: Run) -> str:
    train = run.train
    after = train.get("metric_after", np.zeros(0))
    after = after[np.isfinite(after)]
    if not len(after):
        return "No outer step has been logged yet."
    recent = float(np.mean(after[-max(1, len(after) // 20) :]))
    value = f"<b>{tables.with_interval(run.metric, recent)}</b>"
    done = f"At outer step {plots.grouped(run.last_step)}" + _of_wanted(run)
    what = (
        "answers {} of the training queries correctly"
        if run.metric == "accuracy"
        else "has a mean square error of {} on training queries"
    )
    return f"{done} the network {what.format(value)} after adaptation; it has not been evaluated on held-out tasks yet."


def _of_wanted(run: Run) -> str:
    wanted = run.config.get("steps")
    return f" of {plots.grouped(wanted)}" if isinstance(wanted, int) else ""


def _tasks_seen(evaluation: Evaluation) -> str:
    facts = evaluation.facts
    tasks = f"{facts['tasks']} " if "tasks" in facts else ""
    split = {"test": "held-out test", "val": "validation", "validation": "validation"}.get(
        str(facts.get("split", "")), ""
    )
    return f"{tasks}{split} tasks".replace("  ", " ").strip()


def _short(metric: str, row: Row, index: int) -> str:
    """The value without its interval, for running text."""
    mean, half = row.at(index)
    if metric == "accuracy" and math.isfinite(mean):
        return f"{100 * mean:.1f}{tables.NBSP}%"
    return tables.measure(metric, mean, half)[0]


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _count(n: int | None, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def main_table(run: Run, evaluation: Evaluation) -> Table:
    """The table for the trained number of shots, else the first table."""
    wanted = run.config.get("shots")
    usable = [table for table in evaluation.tables if table.rows]
    return next((table for table in usable if table.shots == wanted), usable[0])


def trained_index(run: Run, evaluation: Evaluation) -> int:
    """The index of the headline's number of steps in `inner_steps`. The last index if it was not evaluated."""
    wanted = _quoted_steps(run, evaluation)
    return evaluation.inner_steps.index(wanted) if wanted in evaluation.inner_steps else len(evaluation.inner_steps) - 1


def _quoted_steps(run: Run, evaluation: Evaluation) -> Any:
    """The number of inner steps of the headline: the algorithm's number at test, else the trained number."""
    return evaluation.facts.get("quoted_steps", run.config.get("inner_steps"))


def _stats(run: Run) -> str:
    stats: list[tuple[str, str]] = []
    if run.evaluation is not None:
        evaluation, table = run.evaluation, main_table(run, run.evaluation)
        learner = table.learner or table.rows[0]
        name = "accuracy" if evaluation.metric == "accuracy" else "MSE"
        chosen = sorted({0, trained_index(run, evaluation), len(evaluation.inner_steps) - 1}) if learner.adapts else [0]
        for i in chosen:
            k = evaluation.inner_steps[i]
            when = "before adaptation" if k == 0 else f"after {_count(k, 'inner step')}"
            mean, pm = tables.measure(evaluation.metric, *learner.at(i))
            unit = "\u2009%" if evaluation.metric == "accuracy" else ""
            stats.append((f"{name} {when}", f"{mean}<small>{unit}{f' ± {pm}' if pm else ''}</small>"))
    seconds = run.elapsed_s
    if math.isfinite(seconds):
        stats.append((f"{plots.grouped(run.last_step)} outer steps", tables.duration(seconds)))
        if seconds > 0:
            stats.append(("outer steps a second", tables.rate(run.last_step / seconds)))
    return (
        f"<dl class='stats'>{''.join(f'<div><dt>{dt}</dt><dd>{dd}</dd></div>' for dt, dd in stats)}</dl>"
        if stats
        else ""
    )


def _unfinished(run: Run) -> list[str]:
    notes = []
    if not run.finished:
        notes.append(
            f"Training is not finished: the last logged outer step is {plots.grouped(run.last_step)}{_of_wanted(run)}."
        )
    missing = [name for name in ("evaluation.json", "examples.npz") if not (run.path / name).is_file()]
    if missing:
        parts = {"evaluation.json": "the evaluation", "examples.npz": "the example tasks"}
        what = _and([parts[name] for name in missing])
        notes.append(
            f"This page lacks {what}: the run folder has no {_and(missing)} yet. "
            f"Write the missing files with `fastmaml evaluate {run.place}`."
        )
    return notes


# ---------------------------------------------------------------- sections


def _section(heading: str, text: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{f'<p class=quiet>{text}</p>' if text else ''}{body}</section>"


def _figure(svg: str, marks: list[plots.Mark] | None = None, caption: str = "") -> str:
    legend = plots.legend(marks) if marks else ""
    return f"<figure>{svg}{legend}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


def _beside(svg: str, marks: list[plots.Mark], caption: str = "") -> str:
    """One plot, with its legend at the right if there is room."""
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure class='beside'>{svg}<div>{plots.legend(marks)}{text}</div></figure>"


def _result(run: Run) -> str:
    evaluation = run.evaluation
    if evaluation is None:
        return ""
    ways = _ways(run)
    figures, marks = plots.inner_steps_plots(evaluation, 1 / ways if ways else None)
    if len(figures) == 1:
        grid = _beside(figures[0], marks)
    else:
        grid = f"<div class='figures three'>{''.join(_figure(svg) for svg in figures)}</div>{plots.legend(marks)}"
    quoted = _quoted_steps(run, evaluation)
    shown = [k for k in evaluation.inner_steps if k in TABLE_STEPS or k == quoted]
    table = tables.evaluation_table(evaluation, shown, quoted)
    every = tables.evaluation_table(evaluation, evaluation.inner_steps, quoted)
    middle = tables.evaluation_table(evaluation, evaluation.inner_steps, quoted, median=True)
    wall = evaluation.facts.get("wall_s")
    origin = _origin(evaluation.facts)
    cost = f" Evaluating took {tables.duration(float(wall))}." if isinstance(wall, (int, float)) else ""
    where = "in training" if quoted == run.config.get("inner_steps") else "by this algorithm at test"
    tint = f" The tinted column is the number of inner steps used {where}, {quoted}." if quoted in shown else ""
    text = (
        f"Every learner gets the same {_tasks_seen(evaluation)}, adapts on the support set and is judged on the query "
        f"set. Bands and ± are 95 % intervals.{tint}{origin}{cost}"
    )
    details = f"<details><summary>All inner steps, means and medians</summary>{every}{middle}</details>"
    name = "Accuracy" if evaluation.metric == "accuracy" else "Error"
    return _section(f"{name} against inner steps", text, grid + table + details)


def _origin(facts: dict[str, Any]) -> str:
    """A sentence about the evaluated checkpoint."""
    members = facts.get("ensemble")
    if isinstance(members, list):
        steps = _and([plots.grouped(step) for step in sorted(members)])
        return f" The evaluation uses the mean output of the best checkpoints by validation, outer steps {steps}."
    name = {"best": "the best checkpoint by validation", "last": "the last checkpoint"}.get(
        str(facts.get("checkpoint"))
    )
    step = facts.get("step")
    return f" The evaluation uses {name}, outer step {plots.grouped(step)}." if name and isinstance(step, int) else ""


def _examples(run: Run) -> str:
    if run.examples is None:
        return ""
    return _fits(run.examples) if "curves" in run.examples else _pictures(run)


def _fits(examples: dict[str, np.ndarray]) -> str:
    figures = "".join(_figure(svg) for svg in plots.fit_plots(examples))
    marks = [plots.TRUTH, plots.SUPPORT, *plots.curve_marks(examples["curves"])]
    last = examples["curves"].shape[1] - 1
    player = (
        "<div class='player'><button type='button'>Play</button>"
        f"<input type='range' min='0' max='{last}' value='{last}' aria-label='inner steps'><output></output></div>"
    )
    text = "The first unseen tasks drawn. The network sees only the support points and takes gradient steps on them."
    body = f"{plots.legend(marks)}{player}<div class='figures three'>{figures}</div>"
    return f"<div id='fits'>{_section('Fitted curves', text, body)}</div><script>{_SLIDER}</script>"


_SLIDER = """
document.documentElement.classList.add("js");
{
  const box = document.getElementById("fits"), range = box.querySelector("input"), button = box.querySelector("button");
  const last = Number(range.max);
  let timer = null;
  const show = k => {
    range.value = k;
    box.querySelector("output").textContent = k === 1 ? "after 1 inner step" : "after " + k + " inner steps";
    const each = (kind, display) => {
      for (const g of box.querySelectorAll("[id*='-" + kind + "-']")) g.style.display = display(g.id);
    };
    each("play", id => id.endsWith("-play-" + k) ? "inline" : "");
    each("still", id => id.endsWith("-still-0") ? "" : "none");
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  range.addEventListener("input", () => { stop(); show(Number(range.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    let k = 0;
    show(k);
    button.textContent = "Stop";
    timer = setInterval(() => { if (k >= last) stop(); else show(++k); }, 550);
  });
}
"""


def _pictures(run: Run) -> str:
    assert run.examples is not None
    found = image_tasks.tasks(run.examples)
    shown = "".join(
        image_tasks.task_html(task, i, QUERIES_SHOWN) for i, task in enumerate(found[:TASKS_SHOWN], start=1)
    )
    text = (
        f"The first tasks drawn and the first {QUERIES_SHOWN} queries of each class; none are selected. A column is a "
        "class: its support on top, its queries below, with the probability of the answer. ✓ is right; ✗ names the class "
        "answered."
    )
    mistakes = image_tasks.mistakes_html(found)
    total = sum(len(task.answers) for task in found)
    wrong = total - sum(task.accuracy("after")[0] for task in found)
    saved = _count(len(found), "saved task")
    caption = f"<p class=quiet>{wrong} of {total} answers in {saved} are wrong. The most confident come first.</p>"
    below = f"<div class='task'><header><h3>Wrong answers</h3></header>{caption}{mistakes}</div>" if mistakes else ""
    return _section("A few tasks", text, shown + below)


def _learning(run: Run) -> str:
    train, validation = run.train, run.validation
    if not len(train["step"]):
        return ""
    metric, marks = plots.metric_curves(train, validation, run.metric)
    if _loss_is_metric(run):
        body = _beside(metric, marks, _best(run))
    else:
        loss, loss_marks = plots.loss_curves(
            train, validation, str(run.config.get("loss")), run.config.get("inner_steps")
        )
        body = f"<div class='figures'>{_figure(loss, loss_marks)}{_figure(metric, marks, _best(run))}</div>"
    window = plots.smoothed(train["step"], train.get("loss", np.zeros(len(train["step"])))).window
    text = (
        f"Lines are moving averages over {_count(window, 'logged row')}. The rows themselves are drawn faintly behind."
        if window > 1
        else ""
    )
    return _section("Learning", text, body)


def _loss_is_metric(run: Run) -> bool:
    """Whether loss and metric are equal (regression by MSE), so one plot is enough."""
    loss, metric = run.train.get("loss"), run.train.get("metric_after")
    return loss is not None and metric is not None and np.allclose(loss, metric, rtol=1e-3, equal_nan=True)


def _best(run: Run) -> str:
    best = plots.best_index(run.validation, run.metric != "accuracy")
    if best is None:
        return "No validation has run yet."
    columns = run.validation
    half = float(columns["ci95"][best]) if "ci95" in columns else math.nan
    value = tables.with_interval(run.metric, float(columns["metric_after"][best]), half)
    return f"Best checkpoint: {value} on validation tasks at outer step {plots.grouped(float(columns['step'][best]))}."


def _comparisons(run: Run) -> str:
    sections = []
    for block in run.comparisons:
        drawn = plots.comparison_plots(block)
        figures = "".join(_figure(svg, marks) for svg, marks in drawn)
        same = _identical(block)
        text = " ".join(part for part in (escape(block.note), same) if part)
        sections.append(_section(escape(block.title), text, f"<div class='figures'>{figures}</div>"))
    return "\n".join(sections)


def _identical(block: Any) -> str:
    """A sentence about points that are equal to the last bit, which the difference plot cannot show."""
    parts = []
    for series in block.series[1:]:
        x, apart = plots.distance(block.series[0], series)
        equal = int(np.sum(apart == 0))
        if equal:
            every = "all" if equal == len(x) else f"{equal} of"
            parts.append(f"{escape(series.name)} equals {escape(block.series[0].name)} in {every} {len(x)} points")
    return f"The logarithmic scale cannot show equal points: {_and(parts)}." if parts else ""


def _time(run: Run) -> str:
    train, config = run.train, run.config
    speed, share = train.get("steps_per_second", np.zeros(0)), train.get("sampling_share", np.zeros(0))
    speed, share = speed[np.isfinite(speed)], share[np.isfinite(share)]
    if not len(speed) and not math.isfinite(run.elapsed_s):
        return ""
    tasks = config.get("meta_batch")
    pairs: list[tuple[str, Any]] = [("training, wall clock", tables.duration(run.elapsed_s))]
    if len(speed):
        middle = float(np.median(speed))
        pairs.append(("outer steps a second, median", tables.rate(middle)))
        if isinstance(tasks, int):
            pairs.append(("tasks a second, median", tables.rate(middle * tasks)))
    pairs += [*_engine(config), ("threads", config.get("threads")), ("machine", config.get("machine"))]
    versions = config.get("versions")
    if isinstance(versions, dict):
        pairs += [(str(name), str(version)) for name, version in versions.items()]
    left = f"<div>{tables.facts(pairs)}{_share_bar(float(share.mean())) if len(share) else ''}</div>"
    right = _figure(plots.speed_curve(train)) if len(speed) > 2 else ""
    return _section("Time and machine", "", f"<div class='figures'>{left}{right}</div>")


def _engine(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The engine of the gradients: its backend, whether the network is fused, and why if not."""
    engine = config.get("engine")
    if not isinstance(engine, dict):
        return [("backend", config.get("backend"))]
    fused = ", fused" if engine.get("fused") else ""
    return [("backend", f"{engine.get('backend')}{fused}"), ("because", engine.get("why") or None)]


def _share_bar(share: float) -> str:
    width = min(max(100 * share, 0.0), 100.0)
    return (
        f"<div class='share' role='img' aria-label='sampling share'><i style='width:{width:.2f}%'></i></div>"
        f"<p class=quiet><span class=num>{100 * share:.2g} %</span> of the training time went into sampling tasks, "
        "the rest into learning.</p>"
    )


def _setup(run: Run) -> str:
    commands = "\n".join([command(run), f"fastmaml evaluate {run.place}", f"fastmaml report {run.place}"])
    raw = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    again = f"<h3 style='margin-top:28px'>Run it again</h3><pre><code>{escape(commands)}</code></pre>"
    whole = f"<details><summary>config.json</summary><pre><code>{raw}</code></pre></details>"
    return _section("Setup", "", tables.config_cards(run.config) + again + whole)


# Settings in config.json that are options of `fastmaml train`. `root` is left out, because it belongs to one machine.
_TASK = ("ways", "shots", "train_shots", "query_shots")
_INNER = ("algorithm", "inner_steps", "inner_lr", "filters", "batch_norm")
_OUTER = ("meta_batch", "outer_lr", "schedule", "outer_lr_min", "clip_grad")
_RUN = ("steps", "time_limit", "validate_every", "ensemble", "eval_tasks", "backend", "memory", "seed")
_OPTIONS = _TASK + _INNER + _OUTER + _RUN


def command(run: Run, width: int = 96) -> str:
    """The command that repeats this run, with every setting from config.json."""
    model = run.config.get("model")
    settings = {**run.config, **({"filters": model.get("filters")} if isinstance(model, dict) else {})}
    words = [f"fastmaml train {settings.get('dataset', 'DATASET')}"]
    for name in _OPTIONS:
        value = settings.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            words.append(f"--{name.replace('_', '-')} {value}")
    options = settings.get("options")
    for name, value in options.items() if isinstance(options, dict) else ():
        words.append(f"--option {shlex.quote(f'{name}={json.dumps(value)}')}")
    lines = [""]
    for word in [*words, f"--out {run.place}"]:
        if len(lines[-1]) + len(word) > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return "\n".join(lines)
