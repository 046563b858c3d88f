"""First-order MAML: the query gradient at the adapted parameters (Finn et al. 2017, section 5.2). Also Reptile's FOML."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastmaml.algorithms.maml import MAML
from fastmaml.algorithms.reptile import Reptile, mini_batches
from fastmaml.inner import InnerLr
from fastmaml.problem.checks import whole_number
from fastmaml.problem.results import Adaptation


class FOMAML(MAML):
    """MAML without the Hessian terms: lambda[K] = grad L_query(phi[K]). The arguments are MAML's, without first_order."""

    def __init__(self, model: nn.Module, inner_lr: InnerLr | None = None, inner_steps: int = 1, **options: Any):
        super().__init__(model, inner_lr, inner_steps, first_order=True, **options)


class FOML(Reptile):
    """The first-order MAML of Reptile's repository: theta follows only the LAST inner step (variant b of ALGORITHMS 2.2).

        inner_steps mini-batch steps from theta;   .grad = mean_i(phi_i[K-1] - phi_i[K]);   outer SGD with lr = eps

    The inner optimizer takes the last step too, so with Adam the last step is an Adam step. With SGD the step is
    inner_lr times the gradient of the last batch at phi[K-1]. If no earlier step saw that batch, this is FOMAML.

    tail_shots: reserve the last tail_shots examples of every class for the last step (regression: of the support set).
    The earlier steps do not see them. None: every step draws from the whole support set.
    The other arguments are Reptile's.
    """

    def __init__(self, model: nn.Module, *given: Any, tail_shots: int | None = None, **options: Any):
        super().__init__(model, *given, **options)
        self.tail_shots = None if tail_shots is None else whole_number("tail_shots", tail_shots, 1)

    def direction(self, x: Any, y: Tensor) -> tuple[Tensor, Adaptation]:
        K, size = self.inner_steps, self.minibatch
        if self.tail_shots is not None:
            earlier, last = split_tail(x, y, self.tail_shots)
            earlier = mini_batches(*earlier, K - 1, size)
        else:
            earlier = last = mini_batches(x, y, K, size)
            if size is not None:
                last = tree_map(lambda part: part[:, -size:], earlier)
                earlier = tree_map(lambda part: part[:, :-size], earlier)
        moments, taken = self.carried(len(y))
        before = self.descend(self.start(x, y), *earlier, K - 1, size, moments, taken)
        after = self.descend(before.params, *last, 1, None, before.state, taken + K - 1)
        losses = torch.cat([before.losses, after.losses], dim=1)
        return before.params - after.params, Adaptation(after.params, losses, after.state)


def split_tail(x: Any, y: Tensor, shots: int) -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    """((x, y) of the rest, (x, y) of the last `shots` examples of every class), each [T, N, ...].

    Targets that are not labels [T, S] count as one class.
    Raises ValueError if the tasks differ in their number of classes, or if no example is left for the rest.
    """
    labelled = y.dim() == 2 and not y.is_floating_point()
    classes = y if labelled else torch.zeros(y.shape[:2], device=y.device)
    followers = (classes[:, :, None] == classes[:, None, :]).triu(1).sum(2)  # [T, S] later examples of the same class
    in_tail = followers < shots
    sizes = in_tail.sum(1)
    size = int(sizes[0])
    if bool((sizes != size).any()) or size == y.shape[1]:
        raise ValueError(
            f"tail_shots={shots} takes {sizes.tolist()} of the {y.shape[1]} support examples of the tasks; it must take "
            "the same number from each task, and leave at least one"
        )
    order = in_tail.long().argsort(dim=1, stable=True)
    task = torch.arange(len(y), device=y.device)[:, None]
    rest, tail = order[:, :-size], order[:, -size:]
    return tree_map(lambda part: part[task, rest], (x, y)), tree_map(lambda part: part[task, tail], (x, y))
