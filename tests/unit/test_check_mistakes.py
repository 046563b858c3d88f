# fm.check names the mistake. Each test plants one in a hand-written loop and checks the sentence that a user reads.
from __future__ import annotations

import copy

import pytest
import torch
from mistaken_loops import (
    FIRST_ORDER,
    IMAGES,
    RATE,
    SUPPORT,
    TASKS,
    by_adjoint,
    by_task,
    check_function,
    norm_net,
    says,
    unrolled,
    verdicts,
)
from torch import nn
from torch.func import functional_call
from unrolled import mse

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
