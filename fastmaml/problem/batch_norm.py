"""The modes of batch norm, applied to an ordinary module without changing its running buffers.

transductive   each batch uses its own statistics, also the query set (MAML).
support        the query set uses the support set's statistics, at the adapted parameters.
frozen         all batches use the running statistics, as constants.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

MODES = ("transductive", "support", "frozen")


def check_mode(model: nn.Module, mode: str) -> None:
    """Raises ValueError if the mode is unknown, or if 'frozen' lacks running statistics."""
    if mode == "per_step":
        raise ValueError("batch_norm='per_step' belongs to MAML++: use MAMLPlusPlus(bn_stats='running_per_step')")
    if mode not in MODES:
        raise ValueError(f"batch_norm {mode!r} is not one of {', '.join(MODES)}")
    if mode == "frozen":
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"batch_norm='frozen' needs running statistics, and layer '{name}' ({type(module).__name__}) keeps none"
                )


@contextmanager
def statistics(model: nn.Module, mode: str, support_rows: int | None = None) -> Iterator[None]:
    """Within the block every batch norm of the model follows the mode and keeps its buffers.

    support_rows: in mode 'support', the number of leading rows of a batch whose statistics are used.
    """
    undo = []
    for module in model.modules():
        if not isinstance(module, _NormBase):
            continue
        undo.append((module, module.training, module.track_running_stats, module.__dict__.get("forward")))
        if not isinstance(module, _BatchNorm):  # instance norm has statistics per example: only protect its buffers
            module.track_running_stats = module.track_running_stats and not module.training
        elif mode == "frozen":
            module.training = False
        elif support_rows is None:
            module.training, module.track_running_stats = True, False
        else:
            module.__dict__["forward"] = functools.partial(_normalise_by_support, module, support_rows)
    try:
        yield
    finally:
        for module, training, track, forward in undo:
            module.training, module.track_running_stats = training, track
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _normalise_by_support(module: _BatchNorm, support_rows: int, x: Tensor) -> Tensor:
    """y = g (x - mean) / sqrt(var + eps) + b with the mean and biased variance of the first support_rows rows of x."""
    module._check_input_dim(x)
    own = x[:support_rows]
    over = [d for d in range(x.dim()) if d != 1]
    if own.numel() == own.shape[1]:
        raise ValueError(f"batch norm needs more than one value per channel in the support set, got {list(own.shape)}")
    mean = own.mean(over, keepdim=True)
    var = (own - mean).square().mean(over, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + module.eps)
    if module.weight is not None:
        per_channel = [-1 if d == 1 else 1 for d in range(x.dim())]
        y = y * module.weight.view(per_channel) + module.bias.view(per_channel)
    return y


def settle(model: nn.Module, mode: str, support_x: Tensor) -> None:
    """Makes the batch norms of a module follow the mode permanently, and puts the module in eval mode.

    The module must hold the adapted parameters. In mode 'support' the support set's statistics become the running ones.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if mode == "transductive":
        for norm in norms:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    elif mode == "support" and norms:
        handles = [norm.register_forward_pre_hook(_keep_statistics) for norm in norms]
        try:
            with torch.no_grad():
                model(support_x)
        finally:
            for handle in handles:
                handle.remove()


def _keep_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(norm, _BatchNorm)
    x = inputs[0]
    over = [d for d in range(x.dim()) if d != 1]
    norm.track_running_stats = True
    norm.running_mean = x.mean(over)
    norm.running_var = x.var(over, unbiased=False)
