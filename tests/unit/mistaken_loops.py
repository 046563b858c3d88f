# A user's meta-learning loop with a place for each mistake, and what fm.check says of it.
from __future__ import annotations

import re

import torch
from torch import nn
from torch.func import functional_call
from unrolled import cross_entropy, image_batch, mse, regression_batch, small_mlp

from fastmaml.checking import check

TASKS, SUPPORT, QUERY = 4, 5, 6
BATCH = regression_batch(TASKS, SUPPORT, QUERY)
IMAGES = image_batch(TASKS, 6, 6, shape=(1, 6, 6))
RATE = 0.3

FIRST_ORDER = (
    "First order only: the Hessian terms are missing. Either the inner gradient is taken without create_graph=True (or is "
    "detached), or this is the gradient of the adapted copy, not of the start."
)


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
    """A user's loop over tasks. The arguments plant a mistake."""

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


def by_adjoint(rate, steps=2, order="H(a*v)", forget_query=False):
    """A user's adjoint sweep that fills .grad itself: v = q, then v = v - H (a * v)."""

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
    """Checks that the report is not ok, and the beginnings of its first sentences. # matches any number."""
    assert not report.ok, str(report)
    for sentence, beginning in zip(report.sentences, beginnings):
        pattern = re.escape(beginning).replace(r"\#", r"[-\d.e]+")
        assert re.match(pattern, sentence), f"{sentence}\nis not\n{beginning}"


def verdicts(report):
    return {row.name: row.verdict for row in report.table}
