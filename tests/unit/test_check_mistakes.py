# fm.check names the mistake: each is planted in a hand-written loop, and the test holds the sentence that a user reads.
from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from unrolled import cross_entropy, image_batch, mse, regression_batch, small_mlp

from fastmaml.checking import check

TASKS, SUPPORT, QUERY = 4, 5, 6
BATCH = regression_batch(TASKS, SUPPORT, QUERY)
IMAGES = image_batch(TASKS, 6, 6, shape=(1, 6, 6))
RATE = 0.3


def norm_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    with torch.no_grad():  # running statistics of a network in use
        net[1].running_mean.uniform_(-0.5, 0.5)
        net[1].running_var.uniform_(0.5, 2.0)
    return net


def unrolled(
    steps=2, rate=RATE, create_graph=True, loss=mse, step_gradient=lambda k, g: g, start=lambda k, p: p,
    after=lambda k, p: p, before_inner=lambda model: None, before_query=lambda model: None, inner_scale=1.0, total=None,
    moves=lambda name: True, sets=lambda task: task, query_loss=None,
):  # fmt: skip
    """A user's loop over tasks; the arguments say where it goes wrong."""

    def meta_loss(model, batch):
        losses = []
        for task in zip(*batch):
            support_x, support_y, query_x, query_y = sets(task)
            phi = dict(model.named_parameters())
            for k in range(steps):
                before_inner(model)
                value = inner_scale * loss(functional_call(model, phi, (support_x,)), support_y)
                grads = torch.autograd.grad(value, list(phi.values()), create_graph=create_graph)
                moved = {n: start(k, p) - rate * step_gradient(k, g) for (n, p), g in zip(phi.items(), grads)}
                phi = {n: after(k, moved[n]) if moves(n) else phi[n] for n in phi}
            before_query(model)
            losses.append((query_loss or loss)(functional_call(model, phi, (query_x,)), query_y))
        return torch.stack(losses).mean() if total is None else total(losses)

    return meta_loss


def by_adjoint(rate, steps=2, order="H(a*v)", forget_query=False):
    """A user's adjoint sweep that fills .grad itself: v = q; v = v - H (a * v)."""

    def meta_loss(model, batch):
        names, params = zip(*model.named_parameters())
        sizes = [p.numel() for p in params]
        theta = torch.cat([p.detach().reshape(-1) for p in params])
        rates = torch.full_like(theta, rate) if isinstance(rate, float) else rate.to(theta)

        def value(flat, x, y):
            pieces = {n: f.reshape(p.shape) for n, p, f in zip(names, params, flat.split(sizes))}
            return mse(functional_call(model, pieces, (x,)), y)

        total, loss = torch.zeros_like(theta), 0.0
        for support_x, support_y, query_x, query_y in zip(*batch):
            points = [theta]
            for _ in range(steps):
                g = torch.func.grad(value)(points[-1], support_x, support_y)
                points.append(points[-1] - rates * g)
            q, here = torch.func.grad_and_value(value)(points[-1], query_x, query_y)
            v = q
            for point in reversed(points[:-1]):

                def gradient(at, x=support_x, y=support_y):
                    return torch.func.grad(value)(at, x, y)

                u = rates * v if order == "H(a*v)" else v
                hu = torch.func.jvp(gradient, (point,), (u,))[1]
                v = v - (hu if order == "H(a*v)" else rates * hu)
            total, loss = total + (v - q if forget_query else v), loss + float(here)
        for p, g in zip(params, (total / len(batch[0])).split(sizes)):
            p.grad = g.reshape(p.shape)
        return loss / len(batch[0])

    return meta_loss


def check_function(function, model=None, batch=BATCH, loss="mse", inner_lr=RATE, inner_steps=2, **options):
    options.setdefault("directions", 0)
    return check(
        function, batch, model=model or small_mlp(), loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **options
    )


def says(report, *beginnings):
    """The report is not ok, and its first sentences begin so (numbers that depend on the network stand as #)."""
    assert not report.ok, str(report)
    for sentence, beginning in zip(report.sentences, beginnings):
        pattern = re.escape(beginning).replace(r"\#", r"[-\d.e]+")
        assert re.match(pattern, sentence), f"{sentence}\nis not\n{beginning}"


def verdicts(report):
    return {row.name: row.verdict for row in report.table}


# ---------------------------------------------------------------- right


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_exact_loop_is_exact(steps):
    report = check_function(unrolled(steps), inner_steps=steps, directions=2)
    assert report.ok, str(report)
    assert report.sentences[0].startswith("Exact: the meta-gradient agrees with unrolled float64 autograd to ")
    assert set(verdicts(report).values()) == {"exact"}
    assert max(row.relative_error for row in report.table) < 1e-12
    assert "Finite differences of the returned loss agree with the gradient along 8 directions" in report.sentences[-1]


@pytest.mark.parametrize("rate", [0.3, torch.linspace(0.05, 0.4, 78, dtype=torch.float64)], ids=["number", "vector"])
def test_an_exact_adjoint_sweep_is_exact(rate):
    report = check_function(by_adjoint(rate), inner_lr=rate, directions=1)
    assert report.ok, str(report)
    assert "The Hessian terms are " in report.sentences[1] and "would have been noticed" in report.sentences[1]


# ---------------------------------------------------------------- the graph


FIRST_ORDER = (
    "First order only: the Hessian terms are missing. Either the inner gradient is taken without create_graph=True (or is "
    "detached), or this is the gradient of the adapted copy, not of the start."
)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_missing_create_graph(steps):
    report = check_function(unrolled(steps, create_graph=False), inner_steps=steps, directions=1)
    says(report, FIRST_ORDER, "The gradient is # % off the exact meta-gradient (cosine #).")
    assert "Finite differences of the returned loss agree with the oracle along all 7 directions." in report.sentences
    assert set(verdicts(report).values()) == {"first order"}


def test_gradient_of_the_adapted_clone_instead_of_the_start():
    def meta_loss(model, batch):
        for support_x, support_y, query_x, query_y in zip(*batch):
            clone = copy.deepcopy(model)
            optimizer = torch.optim.SGD(clone.parameters(), lr=RATE)
            for _ in range(2):
                optimizer.zero_grad()
                mse(clone(support_x), support_y).backward()
                optimizer.step()
            grads = torch.autograd.grad(mse(clone(query_x), query_y), list(clone.parameters()))
            for p, g in zip(model.parameters(), grads):
                p.grad = g / TASKS if p.grad is None else p.grad + g / TASKS

    report = check_function(meta_loss, directions=1)
    says(report, FIRST_ORDER)
    assert (
        "Finite differences of the oracle's meta-loss agree with the oracle along all 7 directions." in report.sentences
    )


def test_one_detached_inner_step():
    report = check_function(unrolled(3, step_gradient=lambda k, g: g.detach() if k == 1 else g), inner_steps=3)
    says(
        report,
        "The Hessian term of inner step 2 of 3 is missing: its gradient is detached or taken without "
        "create_graph=True.",
    )
    assert set(verdicts(report).values()) == {"step 2 detached"}


def test_a_graph_that_is_cut_after_some_steps():
    report = check_function(unrolled(3, step_gradient=lambda k, g: g.detach() if k < 2 else g), inner_steps=3)
    says(
        report,
        "The Hessian terms of the first 2 of 3 inner steps are missing. The graph is cut after step 2, by a detach() or a "
        "new leaf. This is the gradient with respect to the parameters after step 2, not the start.",
    )


def test_detached_gradients_in_the_last_steps():
    report = check_function(unrolled(3, step_gradient=lambda k, g: g.detach() if k > 0 else g), inner_steps=3)
    says(
        report,
        "The Hessian terms of the last 2 of 3 inner steps are missing: their gradients are detached or taken without "
        "create_graph=True.",
    )


def test_an_inner_step_that_is_detached_altogether():
    report = check_function(unrolled(2, after=lambda k, p: p.detach().requires_grad_() if k == 0 else p))
    says(
        report,
        "Detached: no gradient reaches any parameter of the model. Perhaps the graph is cut between the model's parameters and "
        "the query loss: by deepcopy, state_dict, p.data, detach() or no_grad() around the inner loop. Or backward() was ",
    )
    assert set(verdicts(report).values()) == {"detached"}


def test_steps_from_detached_parameters():
    report = check_function(unrolled(2, start=lambda k, p: p.detach()))
    says(
        report,
        "The direct path to the start is cut: every inner step starts from detached parameters (p.detach() - lr * g or "
        "p.data). Only the path through the inner gradient is left.",
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_forgotten_query_gradient_term(steps):
    report = check_function(by_adjoint(0.3, steps, forget_query=True), inner_steps=steps)
    says(
        report,
        "The query gradient at the adapted parameters is missing; only the Hessian terms are left. Either the adjoint sweep "
        "forgets its first term, or the inner step starts from detached parameters (p.detach() - lr * g).",
    )
    assert set(verdicts(report).values()) == {"no query gradient"}


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("steps", [1, 2])
def test_wrong_order_of_rate_and_hessian_with_rates_per_parameter(steps):
    rates = torch.linspace(0.05, 0.4, 78, dtype=torch.float64)
    report = check_function(by_adjoint(rates, steps, order="a*(H v)"), inner_lr=rates, inner_steps=steps)
    says(
        report,
        "The learning rates multiply the Hessian-vector product, a*(H v), instead of the vector, H(a*v). The two are equal "
        "only if the rates are one number.",
    )
    assert set(verdicts(report).values()) == {"rate order"}


def test_the_order_does_not_matter_for_one_rate():
    assert check_function(by_adjoint(0.3, order="a*(H v)")).ok


def test_an_inner_loss_that_is_summed():
    says(
        check_function(unrolled(inner_scale=SUPPORT)),
        "The inner learning rate is 5 times the given one: the inner loss is summed over its 5 examples instead of averaged.",
    )


def test_uphill():
    says(
        check_function(unrolled(rate=-RATE)),
        "The inner learning rate is -1 times the given one: the inner step goes uphill, theta + lr * g.",
    )


def test_another_rate_than_was_said():
    report = check_function(unrolled(rate=0.2), directions=1)
    says(report, "The inner learning rate is 0.2, not 0.3. For that rate the gradient is exact.")
    assert (
        "Finite differences of the returned loss agree with the gradient along 7 directions. The gradient fits this loss, so "
        "the loss is not the one described."
    ) in report.sentences


def test_the_sign_of_the_hessian_term():
    def plus(model, batch):
        exact, first = (_grads(unrolled(1, create_graph=create), model, batch) for create in (True, False))
        for p, e, f in zip(model.parameters(), exact, first):
            p.grad = 2 * f - e

    says(check_function(plus, inner_steps=1), "The Hessian term has the wrong sign: it is added instead of subtracted.")


def test_a_hessian_term_without_the_rate():
    def without(model, batch):
        exact, first = (_grads(unrolled(1, create_graph=create), model, batch) for create in (True, False))
        for p, e, f in zip(model.parameters(), exact, first):
            p.grad = f + (e - f) / RATE

    says(
        check_function(without, inner_steps=1), "The Hessian term lacks the learning rate: it is H v instead of H(a*v)."
    )


def _grads(function, model, batch):
    return torch.autograd.grad(function(model, batch), list(model.parameters()))


def test_learned_rates_are_compared_too():
    rate = nn.Parameter(torch.tensor(0.3))

    def meta_loss(model, batch):
        return unrolled(2, rate)(model, batch)

    report = check_function(meta_loss, inner_lr=rate)
    assert report.ok and verdicts(report)["inner_lr"] == "exact"
    assert rate.grad is None and rate.dtype == torch.float32

    def detached(model, batch):
        return unrolled(2, rate.detach() + 0 * rate)(model, batch)

    report = check_function(detached, inner_lr=rate)
    says(
        report,
        "The gradient of the parameters is exact, but the gradient of the learning rates ('inner_lr') is wrong by 100 %.",
    )
    assert verdicts(report)["inner_lr"] == "detached"


# ---------------------------------------------------------------- steps, sets, sums


def test_too_few_inner_steps():
    report = check_function(unrolled(1))
    says(report, "This is the meta-gradient of 1 inner step, not of 2.")


def test_adapted_parameters_that_the_query_pass_does_not_use():
    def meta_loss(model, batch):
        return torch.stack([mse(model(x), y) for x, y in zip(batch[2], batch[3])]).mean()

    says(
        check_function(meta_loss),
        "The inner steps have no effect: this is the gradient of the query loss at the start. The query pass does not use "
        "the adapted parameters.",
    )


def test_inner_gradients_that_are_all_taken_at_the_start():
    def meta_loss(model, batch):
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch):
            phi = dict(model.named_parameters())
            for _ in range(2):
                grads = torch.autograd.grad(
                    mse(model(support_x), support_y), list(model.parameters()), create_graph=True
                )
                phi = {n: p - RATE * g for (n, p), g in zip(phi.items(), grads)}
            losses.append(mse(functional_call(model, phi, (query_x,)), query_y))
        return torch.stack(losses).mean()

    says(
        check_function(meta_loss),
        "Every inner gradient is taken at the start. The inner forward pass does not use the adapted parameters of the step "
        "before.",
    )


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (lambda t: (t[2], t[3], t[2], t[3]), "The inner loop adapts on the query set instead of the support set."),
        (lambda t: (t[0], t[1], t[0], t[1]), "The meta-loss is taken on the support set instead of the query set."),
        (lambda t: (t[2], t[3], t[0], t[1]), "Support and query set are exchanged."),
    ],
    ids=["query", "support", "exchanged"],
)
def test_the_wrong_examples(sets, sentence):
    says(check_function(unrolled(sets=sets)), sentence)


def test_the_sum_over_tasks_instead_of_the_mean():
    report = check_function(unrolled(total=sum))
    says(
        report,
        "The direction is exact, but the gradient is 4 times as large: the sum over the 4 tasks instead of their mean (if "
        "intended, check with reduction='sum').",
    )
    assert set(verdicts(report).values()) == {"4 times"}
    assert check_function(unrolled(total=sum), reduction="sum").ok


def test_the_sum_over_query_examples_instead_of_the_mean():
    says(
        check_function(unrolled(query_loss=lambda output, y: ((output - y) ** 2).sum())),
        "The direction is exact, but the gradient is 6 times as large: the query loss is summed over its 6 examples instead "
        "of averaged.",
    )


def test_two_mistakes_at_once():
    report = check_function(unrolled(create_graph=False, total=sum))
    says(
        report,
        FIRST_ORDER,
        "In addition, the gradient is 4 times as large: the sum over the 4 tasks instead of their mean",
    )


def test_a_mistake_of_the_forward_pass_and_first_order():
    report = check_function(unrolled(1, create_graph=False), inner_steps=2, directions=1)
    says(report, "This is the meta-gradient of 1 inner step, not of 2.", f"In addition: {FIRST_ORDER}")
    report = check_function(
        by_task(before_inner=nn.Module.eval, create_graph=False), norm_net(), IMAGES, "cross_entropy"
    )
    says(
        report,
        "The batch norm '1' uses its running statistics in the inner loop and the query pass",
        f"In addition: {FIRST_ORDER}",
    )


def test_one_task_only():
    says(
        check_function(unrolled(total=lambda losses: losses[-1])),
        "The tasks' gradients have unequal weights: 0, 0, 0, 4 instead of 1 each. Only task 4 of "
        "4 counts (zero_grad() or '=' instead of '+=' in the loop).",
    )


def test_part_of_the_model_is_not_adapted():
    report = check_function(unrolled(moves=lambda name: name.startswith("4")))
    says(
        report,
        "The inner loop does not adapt anything but the last layer. If this is intended, check with adapted=[...].",
    )
    assert check_function(unrolled(moves=lambda name: name.startswith("4")), adapted="4.*").ok


# ---------------------------------------------------------------- batch norm


EVAL = "batch_norm='transductive' means batch statistics. Call model.train(), or check with batch_norm='frozen' if eval mode is intended."


def by_task(**modes):
    """Backward task by task."""

    def meta_loss(model, batch):
        total = 0.0
        for task in zip(*batch):
            loss = unrolled(loss=cross_entropy, **modes)(model, [part[None] for part in task]) / TASKS
            loss.backward()
            total += loss.item()
        return total

    return meta_loss


def test_batch_norm_in_eval_mode():
    report = check_function(by_task(before_inner=nn.Module.eval), norm_net(), IMAGES, "cross_entropy")
    where = "in the inner loop and the query pass"
    says(
        report,
        f"The batch norm '1' uses its running statistics {where}, because the model is in eval mode there. But {EVAL}",
    )
    assert verdicts(report)["1.weight"] == "batch norm in eval mode"


def test_batch_norm_in_eval_mode_whose_statistics_the_query_pass_changes_before_backward():
    # torch takes the changed statistics in backward, without a word: the gradient is that of no loss at all
    report = check_function(
        by_task(before_inner=nn.Module.eval, before_query=nn.Module.train), norm_net(), IMAGES, "cross_entropy"
    )
    assert not report.ok
    where = "in the inner loop (as updated by the query passes so far)"
    assert (
        f"The loss fits this mistake, but the gradient does not: The batch norm '1' uses its running statistics {where}, "
        f"because the model is in eval mode there. But {EVAL}"
    ) in report.sentences
    assert any(sentence.startswith("Stateful layer '1' (BatchNorm2d)") for sentence in report.sentences)


def test_batch_norm_in_eval_mode_in_the_inner_loop():
    def eval_without_track(model):
        model[1].training = False

    def train_without_track(model):
        model[1].training, model[1].momentum = True, 0.0

    report = check_function(
        unrolled(loss=cross_entropy, before_inner=eval_without_track, before_query=train_without_track),
        norm_net(),
        IMAGES,
        "cross_entropy",
    )
    says(
        report,
        f"The batch norm '1' uses its running statistics in the inner loop, because the model is in eval mode there. But {EVAL}",
    )


@pytest.mark.parametrize("shared", [False, True], ids=["a copy of the buffers for each task", "the model's buffers"])
def test_batch_norm_in_eval_mode_in_the_query_pass(shared):
    def meta_loss(model, batch):
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch):
            buffers = dict(model.named_buffers())
            if not shared:
                buffers = {n: b.clone() for n, b in buffers.items()}
            phi = dict(model.named_parameters())
            for _ in range(2):
                model.train()
                loss = cross_entropy(functional_call(model, {**phi, **buffers}, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
                phi = {n: p - RATE * g for (n, p), g in zip(phi.items(), grads)}
            model.eval()
            # the running statistics are changed in place by the next task, so backward runs here
            loss = cross_entropy(functional_call(model, {**phi, **buffers}, (query_x,)), query_y) / TASKS
            loss.backward()
            losses.append(loss.item())
        return sum(losses)

    report = check_function(meta_loss, norm_net(), IMAGES, "cross_entropy")
    of = " of all tasks so far" if shared else ""
    says(
        report,
        f"The batch norm '1' uses its running statistics in the query pass (as updated by the inner passes{of}), because the "
        f"model is in eval mode there. But {EVAL}",
    )
    stateful = [s for s in report.sentences if s.startswith("Stateful")]
    assert len(stateful) == int(shared)


def test_batch_norm_modes_that_are_right():
    plain = unrolled(loss=cross_entropy)
    report = check_function(plain, norm_net(), IMAGES, "cross_entropy", directions=1)
    assert report.ok and verdicts(report)["0.bias"] == "zero"
    assert check_function(plain, norm_net().eval(), IMAGES, "cross_entropy", batch_norm="frozen").ok


def test_batch_norm_in_train_mode_where_frozen_is_meant():
    says(
        check_function(unrolled(loss=cross_entropy), norm_net(), IMAGES, "cross_entropy", batch_norm="frozen"),
        "The batch norm '1' uses batch statistics everywhere, but batch_norm='frozen' means running statistics. The model is "
        "in train mode there.",
    )


# ---------------------------------------------------------------- parts of the gradient


def test_one_layer_that_is_detached():
    def meta_loss(model, batch):
        loss = unrolled()(model, batch)
        loss.backward()
        model[2].weight.grad = None
        return loss.detach()

    report = check_function(meta_loss)
    says(
        report,
        "Detached: no gradient reaches '2.weight', but it should.",
        "Right in '0.weight', '0.bias', ",
    )
    assert verdicts(report)["2.weight"] == "detached" and verdicts(report)["2.bias"] == "exact"
    assert "The loss is right, so the mistake is in the backward pass." in report.sentences


def test_first_order_in_one_layer():
    def meta_loss(model, batch):
        exact, first = (_grads(unrolled(create_graph=create), model, batch) for create in (True, False))
        for (name, p), e, f in zip(model.named_parameters(), exact, first):
            p.grad = f if name.startswith("0") else e

    report = check_function(meta_loss)
    says(report, "The gradient of '0.weight', '0.bias' shows this mistake: First order only")
    assert verdicts(report)["0.bias"] == "first order" and verdicts(report)["4.weight"] == "exact"


def test_a_mistake_nobody_knows():
    def meta_loss(model, batch):
        loss = unrolled()(model, batch)
        loss.backward()
        model[0].weight.grad.mul_(torch.linspace(0.5, 1.5, 7, dtype=torch.float64).unsqueeze(1))
        return loss.detach()

    report = check_function(meta_loss)
    says(
        report,
        "Wrong in '0.weight'; the worst is '0.weight', wrong by # %. No usual mistake explains this.",
        "Right in '0.bias', '2.weight', '2.bias', '4.weight' and 1 more.",
        "The gradient is # % off",
    )


def test_nan_is_named():
    def meta_loss(model, batch):
        loss = unrolled()(model, batch)
        loss.backward()
        model[0].bias.grad[0] = torch.nan
        return loss.detach()

    says(
        check_function(meta_loss, directions=2),
        "Not finite: the gradient holds NaN or infinity in '0.bias'; the exact one is finite.",
    )


def test_second_order_where_first_order_is_meant():
    says(
        check_function(unrolled(), first_order=True),
        "Second order: this is the exact meta-gradient, although first_order=True was asked for.",
    )
    assert check_function(unrolled(create_graph=False), first_order=True).ok
