# Shared by the learners' tests: small smooth networks in float64 and a batch of tasks. For inner_oracle.py: the loss as a
# function of the flat parameters, and a learner's gradients in the oracle's order.
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml as fm

BACKENDS = ("autodiff", "cpu", "reference")
TASKS, SUPPORT, QUERY, CLASSES = 3, 6, 4, 3
RTOL = 1e-8  # the acceptance tests of ALGORITHMS 9 in float64
NORM = ("1.weight", "1.bias")  # the batch norm of network("conv")


def network(name: str = "mlp", seed: int = 1) -> nn.Module:
    """A smooth network. With ReLU the engine and the oracle may take different branches near a kink."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, CLASSES))
        else:
            model = nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)
            )
        model = model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(name: str = "mlp", support: int = SUPPORT, tasks: int = TASKS, seed: int = 2) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (3,) if name == "mlp" else (2, 4, 4)

    def examples(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, n, *shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (tasks, n), generator=generator)

    return fm.tasks.TaskBatch(*examples(support), *examples(QUERY))


def loss_of(model: nn.Module):
    """(phi [P], x, y) -> mean cross-entropy. torch's own batch norm is right here: a plain loop, no vmap."""
    layout = [(n, p.shape, p.numel()) for n, p in model.named_parameters()]

    def loss(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = phi.split([size for _, _, size in layout])
        named = {n: piece.view(shape) for (n, shape, _), piece in zip(layout, pieces)}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return nn.functional.cross_entropy(functional_call(model, {**named, **buffers}, (x,)), y)

    return loss


def theta_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def grad_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def mask_of(model: nn.Module, *names: str) -> Tensor:
    """[P]: 1 on the parameters whose names begin with one of `names`."""
    return torch.cat(
        [torch.full((p.numel(),), float(n.startswith(names))) for n, p in model.named_parameters()]
    ).double()


def per_parameter(model: nn.Module, of_name) -> Tensor:
    """[P] from a function of the name whose value broadcasts to the parameter, e.g. a dict's __getitem__."""
    return torch.cat(
        [
            torch.as_tensor(of_name(n), dtype=torch.float64).expand(p.shape).reshape(-1)
            for n, p in model.named_parameters()
        ]
    )
