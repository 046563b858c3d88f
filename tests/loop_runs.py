# Runs one LoopCase through the compiled inner loop and its sweep, and by unrolled autograd. The unrolled inner optimizers
# are written again in torch, one task at a time, without engine code.
from __future__ import annotations

import torch
from cases import LoopCase, LoopInputs, split
from torch import Tensor

META_GRADIENT = (
    "loss",
    "grad",
    "output",
    "support_losses",
    "rate_grad",
    "step_rows_grad",
    "query_losses",
    "total_loss",
)
ADAPT = ("params", "losses", "state")
NOTHING = torch.empty(0)


def meta_gradient(
    case: LoopCase, backend: str, i: LoopInputs, memory: str = "low", words: str = ""
) -> dict[str, Tensor]:
    results = torch.ops.fastmaml.meta_gradient(
        case.text, backend, i.theta, i.support_x, i.support_y, i.support_weights, i.query_x, i.query_y, i.query_weights,
        None, i.rates, f"{case.loop} rate_grad=1 {words}", memory, i.loss_weights, i.step_rows, i.lam, i.mask,
        NOTHING.to(i.theta.dtype),
    )  # fmt: skip
    return dict(zip(META_GRADIENT, results, strict=True))


def adapt(
    case: LoopCase, backend: str, i: LoopInputs, state: Tensor | None = None, step_count: Tensor | None = None
) -> dict[str, Tensor]:
    results = torch.ops.fastmaml.adapt(
        case.text, backend, i.theta, i.support_x, i.support_y, i.support_weights, i.rates, case.loop, i.step_rows,
        i.lam, i.mask, state, step_count, NOTHING.to(i.theta.dtype),
    )  # fmt: skip
    return dict(zip(ADAPT, results, strict=True))


def words_of(loop: str) -> dict[str, str]:
    return dict(word.split("=") for word in loop.split())


def clipped(g: Tensor, how: dict[str, str], mask: Tensor | None) -> Tensor:
    if "clip_value" in how:
        return g.clamp(-float(how["clip_value"]), float(how["clip_value"]))
    if "clip_norm" in how:
        norm = (g if mask is None else g * (mask != 0)).norm()
        return g * (float(how["clip_norm"]) / norm) if norm > float(how["clip_norm"]) else g
    return g


class Rule:
    """torch.optim's sgd and adam on one vector, differentiable."""

    def __init__(self, how: dict[str, str]) -> None:
        self.how = how
        self.state: list[Tensor] = []
        self.steps = 0

    def number(self, key: str, otherwise: float = 0.0) -> float:
        return float(self.how.get(key, otherwise))

    def direction(self, g: Tensor, phi: Tensor) -> Tensor:
        """The direction that the rate multiplies. g is already clipped, decayed and pulled to the start."""
        self.steps += 1
        if self.how.get("rule") == "adam":
            beta1, beta2 = self.number("beta1", 0.9), self.number("beta2", 0.999)
            m, s = self.state or (torch.zeros_like(g), torch.zeros_like(g))
            m, s = beta1 * m + (1 - beta1) * g, beta2 * s + (1 - beta2) * g * g
            self.state = [m, s]
            sh = s / (1 - beta2**self.steps)
            root = torch.where(sh == 0, 0.0, torch.where(sh == 0, 1.0, sh).sqrt())
            d = m / (1 - beta1**self.steps) / (root + self.number("eps", 1e-8))
            return d + self.number("weight_decay") * phi if "decoupled" in self.how else d
        if "momentum" not in self.how:
            return g
        mu = self.number("momentum")
        b = mu * self.state[0] + (1 - self.number("dampening")) * g if self.state else g
        self.state = [b]
        return g + mu * b if "nesterov" in self.how else b


def unrolled(case: LoopCase, i: LoopInputs) -> dict[str, Tensor]:
    """The results of meta_gradient and adapt, averaged over tasks, by reverse over reverse through the whole inner loop."""
    how = words_of(case.loop)
    K, order, B = int(how["steps"]), int(how.get("order", how["steps"])), int(how.get("minibatch", 0))
    queries = sorted({K, *(int(k) for k in how.get("queries", str(K)).split(","))})
    tasks = []
    for t in range(case.tasks):
        theta, rates = (x.clone().requires_grad_(True) for x in (i.theta, i.rates))
        rows = None if i.step_rows is None else i.step_rows.clone().requires_grad_(True)
        row_entries = row_positions(case)

        rule, phi, support_losses, query_losses = Rule(how), theta, [], {}
        for k in range(K + 1):
            if k in queries:
                weights = None if i.query_weights is None else i.query_weights[t]
                query_losses[k], output = loss_at(case, phi, i.query_x[t], i.query_y[t], weights)
            if k == K:
                break
            if rows is not None and k > 0:
                phi = phi.index_put((row_entries,), rows[k])
            of_step = slice(k * B, (k + 1) * B) if B else slice(None)
            weights = None if i.support_weights is None else i.support_weights[t, of_step]
            value, _ = loss_at(case, phi, i.support_x[t, of_step], i.support_y[t, of_step], weights)
            (g,) = torch.autograd.grad(value, phi, create_graph=order > 0, retain_graph=True)
            g = clipped(g if order else g.detach(), how, i.mask)
            if "weight_decay" in how and "decoupled" not in how:
                g = g + float(how["weight_decay"]) * phi
            if i.lam is not None:
                g = g + i.lam * (phi - theta)
            step = rates[k if len(rates) > 1 else 0] * rule.direction(g, phi)
            if order and k < K - order:  # the sweep does not go back through this step
                step, rule.state = step.detach(), [s.detach() for s in rule.state]
            phi = phi - step
            support_losses.append(value.detach())
        w = theta.new_ones(1) if i.loss_weights is None else i.loss_weights[queries]
        total = (w * torch.stack([query_losses[k] for k in queries])).sum()
        wanted = [theta, rates] + ([] if rows is None else [rows])
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
        tasks.append(
            {
                "loss": total,
                "grad": grads[0],
                "output": output,
                "support_losses": torch.stack(support_losses) if K else theta.new_empty(0),
                "rate_grad": grads[1],
                "step_rows_grad": grads[2] if rows is not None else theta.new_empty(0),
                "query_losses": torch.stack([query_losses[k] for k in queries]),
                "params": phi,
                "state": torch.cat(rule.state) if rule.state else theta.new_empty(0),
            }
        )
    shared = ("grad", "rate_grad", "step_rows_grad")
    stacked = {name: torch.stack([task[name].detach() for task in tasks]) for name in tasks[0]}
    return {name: x.mean(0) if name in shared else x for name, x in stacked.items()} | {
        "total_loss": stacked["loss"].mean()
    }


def loss_at(case: LoopCase, phi: Tensor, x: Tensor, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, output) of one task."""
    z = case.function(split(phi, case.params), x)
    each = case.loss(z, y)
    return (each.mean() if weights is None else (weights * each).sum()), z


def row_positions(case: LoopCase) -> Tensor:
    """Where the parameters of rows= lie in theta."""
    numbers = split(torch.arange(case.param_count), case.params)
    listed = [int(row) for row in words_of(case.loop).get("rows", "").split(",") if row]
    return torch.cat([numbers[row].reshape(-1) for row in listed]) if listed else torch.empty(0, dtype=torch.long)
