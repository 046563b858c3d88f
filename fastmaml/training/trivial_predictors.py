"""Predictors that a meta-trained network must beat: they learn a task without meta-training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def nearest_neighbour(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    """The label of the nearest support example, by Euclidean distance of raw inputs (pixels), as one-hot logits.

    Shapes: support_x [T, S, ...], support_y [T, S] integer labels, query_x [T, N, ...] -> [T, N, ways]. Of equally near
    examples, the first wins.
    """
    if support_x.shape[2:] != query_x.shape[2:] or support_x.shape[:2] != support_y.shape[:2]:
        raise ValueError(
            f"support_x {list(support_x.shape)}, support_y {list(support_y.shape)} and query_x {list(query_x.shape)} "
            "do not fit together"
        )
    distance = torch.cdist(query_x.flatten(2).double(), support_x.flatten(2).double())
    labels = support_y.gather(1, distance.argmin(-1))
    return one_hot(labels, int(support_y.max()) + 1).double()


def mean_predictor(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    """The mean of the support targets for every query: support_y [T, S, ...], query_x [T, N, ...] -> [T, N, ...]."""
    return support_y.mean(1, keepdim=True).expand(-1, query_x.shape[1], *support_y.shape[2:])


# loss -> (name in the table, predictor)
WITHOUT_NETWORK = {
    "cross_entropy": ("nearest neighbour on pixels", nearest_neighbour),
    "mse": ("mean predictor", mean_predictor),
}
