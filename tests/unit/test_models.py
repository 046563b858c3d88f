"""The ready-made networks have the papers' sizes and initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmaml.models import conv4, mlp, sinusoid_mlp


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_conv4_sizes_of_the_papers():
    assert count(conv4()) == 112_261  # Omniglot, 64 filters, max pooling
    assert count(conv4(3, 5, 32, 84)) == 32_901  # miniImageNet: flatten to 800
    assert conv4(3, 5, 32, 84)[-1].in_features == 800
    assert conv4(pooling="stride")[-1].in_features == 64
    assert conv4(pooling="stride_flat")[-1].in_features == 256


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "stride"}, {"pooling": "stride_flat"}, {"norm": "group"}, {"norm": "layer"}, {"norm": "none"}],
)
def test_conv4_maps_images_to_scores(options):
    assert conv4(ways=7, filters=8, **options)(torch.randn(3, 1, 28, 28)).shape == (3, 7)


def test_conv4_starts_as_in_finns_code():
    torch.manual_seed(0)
    model = conv4(pooling="stride")
    convolution, head = model[3], model[-1]
    bound = (6 / (64 * 9 + 64 * 9)) ** 0.5  # Xavier uniform
    assert 0.95 * bound < float(convolution.weight.abs().max()) <= bound
    assert 0.8 < float(head.weight.std()) < 1.2
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert model[1].eps == 1e-3


def test_sinusoid_network_starts_as_in_finns_code():
    torch.manual_seed(0)
    model = sinusoid_mlp()
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [(40, 1), (40, 40), (1, 40)]
    assert float(model[2].weight.abs().max()) <= 0.02
    assert 0.007 < float(model[2].weight.std()) < 0.01  # a normal of std 0.01 cut at two of them has 0.0088
    assert not any(m.bias.any() for m in model if isinstance(m, nn.Linear))


def test_mlp_options():
    model = mlp([3, 4, 5, 2], activation="tanh", init="xavier")
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert not model[0].bias.any()
    assert mlp([3, 2])[0].bias.any()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: mlp([3]), r"sizes \[3\] must hold at least an input and an output size"),
        (lambda: mlp([3, 0, 2]), r"sizes \[3, 0, 2\] must hold"),
        (lambda: mlp([3, 2], "swish"), "activation 'swish' is not one of relu, leaky_relu"),
        (lambda: mlp([3, 2], init="he"), "init 'he' is not one of torch, xavier, truncated_normal"),
        (lambda: conv4(pooling="mean"), "pooling 'mean' is not one of max, stride, stride_flat"),
        (lambda: conv4(norm="instance"), "norm 'instance' is not one of batch, layer, group, none"),
        (lambda: conv4(image_size=12), "image_size 12 is too small for four halvings"),
    ],
)
def test_models_refuse_what_they_cannot_build(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
