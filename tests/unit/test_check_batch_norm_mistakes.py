# fm.check names the mistakes of batch norm: which statistics it uses where.
from __future__ import annotations

import pytest
import torch
from mistaken_loops import IMAGES, RATE, TASKS, by_task, check_function, norm_net, says, unrolled, verdicts
from torch import nn
from torch.func import functional_call
from unrolled import cross_entropy

EVAL = "batch_norm='transductive' means batch statistics. Call model.train(), or check with batch_norm='frozen' if eval mode is intended."


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
