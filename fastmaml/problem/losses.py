"""Losses per example: a function (output, target) -> [examples], for one task at a time.

Built from elementary operations, because torch.func.jvp of the gradient of F.mse_loss raises on torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]
Loss = str | LossFunction

LOSSES = ("cross_entropy", "mse")


class CrossEntropy:
    """Softmax cross-entropy of scores [N, C] and labels [N]. With smoothing e the target is (1 - e) onehot + e / C."""

    def __init__(self, smoothing: float = 0.0):
        self.smoothing = smoothing

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        log_p = output.log_softmax(dim=1)
        losses = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        if self.smoothing:
            losses = (1.0 - self.smoothing) * losses - self.smoothing * log_p.mean(dim=1)
        return losses


class SquaredError:
    """The mean over an example's outputs of (output - target)^2: output and target [N, ...] -> [N]."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().flatten(1).mean(dim=1)


def per_example(loss: Loss, label_smoothing: float = 0.0) -> LossFunction:
    """The function for a loss's name. A loss written in Python is returned unchanged.

    Raises ValueError for an unknown name, smoothing outside [0, 1], or smoothing without cross_entropy.
    """
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must lie between 0 and 1")
    if label_smoothing and loss != "cross_entropy":
        raise ValueError(f"label_smoothing={label_smoothing} works only with loss='cross_entropy', not with {loss!r}")
    if loss == "cross_entropy":
        return CrossEntropy(float(label_smoothing))
    if loss == "mse":
        return SquaredError()
    if callable(loss):
        return loss
    raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)} nor a function (output, target) -> [examples]")


def weighted(loss: LossFunction, output: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """sum_i w_i l_i over the examples of one task, w [N]. Raises ValueError unless the loss returns [N]."""
    losses = loss(output, target)
    if losses.shape != w.shape:
        raise ValueError(
            f"the loss returned {list(losses.shape)} for {w.shape[0]} examples; it must return one loss for each"
        )
    return (losses * w).sum()
