# The independent oracle: unrolled autograd with double backward in plain torch, one task at a time, without engine code.
# It builds batch norm from elementary operations and loops over tasks. The reason: on torch 2.13 torch.func.vmap of
# reverse over reverse through F.batch_norm(training=True) is silently wrong (relative error 1.7e-2).
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Apply = Callable[..., Tensor]  # (phi [P], x [N, ...], support_x=None) -> output [N, ...]


def normalise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(biased variance + eps) over dims."""
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def written_batch_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Batch norm over the batch's own statistics, x [N, C] or [N, C, H, W]."""
    form = (1, -1) + (1,) * (x.dim() - 2)
    y = normalise(x, (0, *range(2, x.dim())), eps)
    y = y if gamma is None else y * gamma.view(form)
    return y if beta is None else y + beta.view(form)


class WrittenBatchNorm(nn.Module):
    """A batch norm of elementary operations with the parameters and buffers of the torch module it replaces."""

    def __init__(self, of: nn.Module, mode: str) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.mode = of.weight, of.bias, of.eps, mode
        self.register_buffer("running_mean", of.running_mean)
        self.register_buffer("running_var", of.running_var)
        self.recording = False
        self.recorded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        form = (1, -1) + (1,) * (x.dim() - 2)
        dims = (0, *range(2, x.dim()))
        if self.mode == "frozen":
            mean, var = self.running_mean, self.running_var
        elif self.recorded is not None and not self.recording:
            mean, var = self.recorded
        else:
            mean = x.mean(dims)
            var = (x - mean.view(form)).square().mean(dims)
            if self.recording:
                self.recorded = mean, var
        y = (x - mean.view(form)) / (var.view(form) + self.eps).sqrt()
        return y if self.weight is None else y * self.weight.view(form) + self.bias.view(form)


def _replace_batch_norms(module: nn.Module, mode: str) -> list[WrittenBatchNorm]:
    replaced = []
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            written = WrittenBatchNorm(child, mode)
            setattr(module, name, written)
            replaced.append(written)
        else:
            replaced += _replace_batch_norms(child, mode)
    return replaced


def network(
    model: nn.Module, batch_norm: str = "transductive", plain: bool = False, detach_stats: bool = False
) -> Apply:
    """The model as a function of a flat parameter vector.

    plain=True keeps torch's own batch norm, as in a user's float32 loop. In `support` mode `apply(phi, x, support_x)`
    normalises x with support_x's statistics in every batch norm. The gradient flows through them unless `detach_stats`.
    """
    model = copy.deepcopy(model).train()
    names = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]
    if plain:
        assert batch_norm == "transductive"
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
        norms: list[WrittenBatchNorm] = []
    else:
        norms = _replace_batch_norms(model, batch_norm)

    def apply(phi: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        named, at = {}, 0
        for name, shape, size in names:
            named[name] = phi[at : at + size].view(shape)
            at += size
        assert at == phi.numel()
        for norm in norms:
            norm.recorded, norm.recording = None, batch_norm == "support" and support_x is not None
        if batch_norm == "support" and support_x is not None:
            functional_call(model, named, (support_x,))
            for norm in norms:
                norm.recording = False
                if detach_stats:
                    norm.recorded = tuple(s.detach() for s in norm.recorded)
        output = functional_call(model, named, (x,))
        for norm in norms:
            norm.recorded = None
        return output

    return apply


def trainable(model: nn.Module) -> Tensor:
    """[P]: 1 where a parameter is adapted, 0 where requires_grad is False."""
    return torch.cat([torch.full((p.numel(),), float(p.requires_grad)) for _, p in model.named_parameters()]).double()


def loss_function(kind: str, smoothing: float = 0.0) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(output [N, ...], target, weights [N] or None) -> scalar: sum_i w_i l_i, w = 1/N by default."""

    def loss(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        if kind == "cross_entropy":
            classes = output.shape[-1]
            wanted = (1 - smoothing) * F.one_hot(target, classes).to(output.dtype) + smoothing / classes
            each = -(wanted * (output - torch.logsumexp(output, -1, keepdim=True))).sum(-1)
        else:
            each = (output - target).square().flatten(1).mean(1)
        return each.mean() if weights is None else (weights * each).sum()

    return loss


@dataclass
class Result:
    loss: Tensor  # [T]
    grad: Tensor  # [P]
    query_output: Tensor  # [T, Nq, ...]
    support_losses: Tensor  # [T, K]
    rate_grad: Tensor  # [K, P]; of the same objective as grad
    params: Tensor  # [T, P]: phi[K]


def meta_gradient(
    apply: Apply,
    theta: Tensor,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    loss: Callable[..., Tensor],
    rates: Tensor,
    inner_steps: int,
    *,
    first_order: bool = False,
    support_weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    task_weights: Tensor | None = None,
    mask: Tensor | None = None,
    support_statistics: bool = False,
) -> Result:
    """Unrolled double backward of sum_t w_t L_query(phi_t[K]), one task at a time.

    rates: [P] or [K, P]. mask [P]: 1 on parameters that are adapted and meta-trained.
    """
    support_x, support_y, query_x, query_y = data
    T, P = support_x.shape[0], theta.numel()
    rates = rates.expand(max(inner_steps, 1), P)
    mask = torch.ones_like(theta) if mask is None else mask.to(theta.dtype)
    weights = torch.full((T,), 1.0 / T, dtype=theta.dtype) if task_weights is None else task_weights
    losses, outputs, support_losses, adapted = [], [], [], []
    grad, rate_grad = torch.zeros_like(theta), torch.zeros_like(rates).clone()
    for t in range(T):
        start = theta.detach().clone().requires_grad_(True)
        a = rates.detach().clone().requires_grad_(True)
        phi, steps = start, []
        for k in range(inner_steps):
            step_loss = loss(
                apply(phi, support_x[t]), support_y[t], None if support_weights is None else support_weights[t]
            )
            (g,) = torch.autograd.grad(step_loss, phi, create_graph=not first_order, retain_graph=True)
            phi = phi - a[k] * mask * g
            steps.append(step_loss.detach())
        output = apply(phi, query_x[t], support_x[t]) if support_statistics else apply(phi, query_x[t])
        query_loss = loss(output, query_y[t], None if query_weights is None else query_weights[t])
        d_start, d_rates = torch.autograd.grad(query_loss, (start, a), allow_unused=True)
        grad += weights[t] * mask * d_start
        if d_rates is not None:
            rate_grad += weights[t] * d_rates
        losses.append(query_loss.detach())
        outputs.append(output.detach())
        adapted.append(phi.detach())
        support_losses.append(torch.stack(steps) if steps else theta.new_zeros(0))
    return Result(
        torch.stack(losses), grad, torch.stack(outputs), torch.stack(support_losses), rate_grad, torch.stack(adapted)
    )


def loss_and_grad(
    apply: Apply, params: Tensor, x: Tensor, y: Tensor, loss: Callable[..., Tensor], weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per task: loss [T], grad [T, P]; params [P] or [T, P]."""
    params = params.expand(x.shape[0], -1)
    losses, grads = [], []
    for t in range(x.shape[0]):
        phi = params[t].detach().clone().requires_grad_(True)
        value = loss(apply(phi, x[t]), y[t], None if weights is None else weights[t])
        grads.append(torch.autograd.grad(value, phi)[0])
        losses.append(value.detach())
    return torch.stack(losses), torch.stack(grads)


def hvp(
    apply: Apply,
    params: Tensor,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    loss: Callable[..., Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """Per task, reverse over reverse: H v [T, P]."""
    T = x.shape[0]
    params, v = params.expand(T, -1), v.expand(T, -1)
    products = []
    for t in range(T):
        phi = params[t].detach().clone().requires_grad_(True)
        value = loss(apply(phi, x[t]), y[t], None if weights is None else weights[t])
        (g,) = torch.autograd.grad(value, phi, create_graph=True)
        products.append(torch.autograd.grad(g, phi, grad_outputs=v[t])[0])
    return torch.stack(products)


def hessian(
    apply: Apply, params: Tensor, x: Tensor, y: Tensor, loss: Callable[..., Tensor], weights: Tensor | None = None
) -> Tensor:
    """Per task, dense [T, P, P], row by row."""
    P = params.shape[-1]
    rows = [hvp(apply, params, x, y, torch.eye(P, dtype=params.dtype)[i], loss, weights) for i in range(P)]
    return torch.stack(rows, 1)


def passes(
    function: Callable[[list[Tensor], Tensor], Tensor],
    params: list[Tensor],
    params_dot: list[Tensor],
    x: Tensor,
    x_dot: Tensor,
    dy: Tensor,
    dy_dot: Tensor,
):
    """One task: (y, y_dot, dx, dx_dot, dparams, dparams_dot), jvp of the vjp; parameter gradients flattened to [P]."""

    def both(p: tuple[Tensor, ...], x: Tensor, dy: Tensor):
        y, pull = torch.func.vjp(lambda p, x: function(list(p), x), p, x)
        dp, dx = pull(dy)
        return y, dx, torch.cat([d.reshape(-1) for d in dp]) if dp else x.new_zeros(0)

    (y, dx, dp), (y_dot, dx_dot, dp_dot) = torch.func.jvp(
        both, (tuple(params), x, dy), (tuple(params_dot), x_dot, dy_dot)
    )
    return y, y_dot, dx, dx_dot, dp, dp_dot
