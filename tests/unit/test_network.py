"""An nn.Module becomes Program text that computes the same function, or a sentence that names the layer.

The text is checked by a small interpreter of its own (no compiled module needed).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import POINTWISE, torch_pointwise
from torch import nn
from unrolled import BACKENDS

from fastmaml import Engine
from fastmaml.models import conv4, mlp, sinusoid_mlp
from fastmaml.network.fused_layers import Unsupported
from fastmaml.network.trace import read_network
from fastmaml.problem.parameters import ParameterLayout


def program(model, input_shape, loss="none", norm_mode="transductive", smoothing=0.0):
    return read_network(model, ParameterLayout(model)).program(input_shape, loss, smoothing, norm_mode)


def interpret(text, theta, x, buffers=None):
    """Runs Program text on x [N, *input]: the format's meaning in plain torch."""
    lines = text.strip().split("\n")
    assert lines[0] == "fastmaml 1"
    params, running, values = [], [], [x]
    for line in lines[1:]:
        kind, *words = line.split()
        if kind == "input":
            assert list(x.shape[1:]) == [int(w) for w in words]
            continue
        if kind == "param":
            offset, *shape = map(int, words)
            params.append(theta[offset : offset + torch.Size(shape).numel()].view(shape))
            continue
        if kind == "buffer":
            offset, size = map(int, words)
            running.append(buffers[offset : offset + size])
            continue
        if kind == "output":
            return values[int(words[0])]
        inputs = [values[int(v)] for v in words[0].split(",")]
        o = dict(w.split("=") for w in words[1:])
        w, b = (None if int(o.get(k, -1)) < 0 else params[int(o[k])] for k in ("weight", "bias"))
        values.append(LAYERS[kind](*inputs, w, b, o, running))
    raise AssertionError("no output line")


def pair(word):
    return tuple(int(v) for v in word.split(","))


def batch_norm(x, w, b, o, running):
    if o["mode"] == "frozen":
        return F.batch_norm(x, running[int(o["mean"])], running[int(o["var"])], w, b, False, 0.0, float(o["eps"]))
    assert o["mode"] == "batch"
    return F.batch_norm(x, None, None, w, b, True, 0.0, float(o["eps"]))


def pointwise(kind, key):
    return lambda x, w, b, o, r: torch_pointwise(kind, x, *([float(o[key])] if key else []))


LAYERS = {
    "linear": lambda x, w, b, o, r: x @ w.T + (0 if b is None else b),
    "conv2d": lambda x, w, b, o, r: F.conv2d(x, w, b, pair(o["stride"]), pair(o["padding"])),
    "batch_norm": batch_norm,
    "layer_norm": lambda x, w, b, o, r: F.layer_norm(x, x.shape[-int(o["dims"]) :], w, b, float(o["eps"])),
    "group_norm": lambda x, w, b, o, r: F.group_norm(x, int(o["groups"]), w, b, float(o["eps"])),
    "max_pool2d": lambda x, w, b, o, r: F.max_pool2d(x, pair(o["kernel"]), pair(o["stride"]), pair(o["padding"])),
    "avg_pool2d": lambda x, w, b, o, r: F.avg_pool2d(
        x, pair(o["kernel"]), pair(o["stride"]), pair(o["padding"]), False, o["count_include_pad"] == "1"
    ),
    "global_avg_pool2d": lambda x, w, b, o, r: x.mean((2, 3), keepdim=True),
    "flatten": lambda x, w, b, o, r: x.flatten(1),
    "add": lambda x, y, w, b, o, r: x + y,
    **{kind: pointwise(kind, key) for kind, key in POINTWISE.items()},
}


def expect_same(model, input_shape):
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(6, *input_shape, dtype=torch.float64)
    made = program(model, input_shape)
    result = interpret(made.text, ParameterLayout(model).flatten(dict(model.named_parameters())), x)
    expected = model.train()(x.clone()).detach()
    assert tuple(result.shape[1:]) == made.output_shape
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)
    return made


def test_conv4_text_is_the_documented_one():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )
    made = program(model, (3, 2, 2), "cross_entropy")
    assert made.text == (
        "fastmaml 1\ninput 3 2 2\n"
        "param 0 64 3 3 3\nparam 1728 64\nparam 1792 64\nparam 1856 64\nparam 1920 5 64\nparam 2240 5\n"
        "conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1\n"
        "batch_norm 1 weight=2 bias=3 eps=1e-05 mode=batch\n"
        "relu 2\n"
        "max_pool2d 3 kernel=2,2 stride=2,2 padding=0,0\n"
        "flatten 4\n"
        "linear 5 weight=4 bias=5\n"
        "output 6\n"
        "loss cross_entropy smoothing=0.0\n"
    )
    assert made.output_shape == (5,)
    assert made.norms == (("1", 4),)


SEQUENTIAL = {
    "mlp": (mlp([3, 4, 2]), (3,)),
    "sinusoid": (sinusoid_mlp(), (1,)),
    "conv4 max": (conv4(filters=4, image_size=16), (1, 16, 16)),
    "conv4 stride": (conv4(filters=4, pooling="stride", activation="leaky_relu"), (1, 28, 28)),
    "conv4 group": (conv4(filters=8, norm="group", activation="silu", image_size=16), (1, 16, 16)),
    "conv4 layer": (conv4(filters=2, norm="layer", activation="gelu", image_size=16), (1, 16, 16)),
    "kernels": (nn.Sequential(nn.Conv2d(2, 3, (3, 1), stride=(2, 1), padding=(0, 2), bias=False)), (2, 7, 5)),
    "same": (nn.Sequential(nn.Conv2d(1, 2, (3, 5), padding="same"), nn.Conv2d(2, 1, 2, padding="valid")), (1, 5, 6)),
    "pools": (
        nn.Sequential(
            nn.MaxPool2d(3, 2, 1), nn.Tanh(), nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.Conv2d(1, 1, 1)
        ),
        (1, 8, 8),
    ),
    "global pool": (nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()), (1, 4, 4)),
    "norms": (
        nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6, affine=False), nn.LayerNorm(6), nn.GroupNorm(3, 6), nn.Sigmoid()
        ),
        (3,),
    ),
    "layer norm of images": (nn.Sequential(nn.Conv2d(1, 2, 1), nn.LayerNorm([2, 4, 3])), (1, 4, 3)),
    "gelu tanh": (nn.Sequential(nn.Linear(2, 2), nn.GELU(approximate="tanh"), nn.Identity(), nn.LeakyReLU(0.2)), (2,)),
    "inplace": (nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3, 1)), (2,)),
    "nested": (nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 1))), (2,)),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sequential_text_computes_what_the_module_does(name):
    torch.manual_seed(0)
    expect_same(*SEQUENTIAL[name])


class Functional(nn.Module):
    """Every function and method form of the fused layers, with residual sums in four spellings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Parameter(torch.randn(3, 4))

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        h = F.relu(self.conv(x), inplace=True)
        g = F.conv2d(h, self.weight, padding="same")
        h = h + torch.relu(g)
        h = torch.add(h, F.leaky_relu(h, 0.1))
        h = F.max_pool2d(h, 2, padding=1)
        h = F.group_norm(h, 2, self.scale, None, eps=1e-4)
        h = F.avg_pool2d(h, kernel_size=2, stride=1)
        h = F.silu(h)
        h += F.relu(h)
        h = h.add(F.gelu(h, approximate="tanh")).contiguous()
        h = F.layer_norm(h, (4, 3, 3)).tanh()
        h = F.adaptive_avg_pool2d(h, 1)
        h = torch.sigmoid(torch.flatten(h, 1))
        return F.linear(h, self.head)


FLATTENINGS = {
    "view(x.size(0), -1)": lambda x: x.view(x.size(0), -1),
    "view(x.shape[0], -1)": lambda x: x.view(x.shape[0], -1),
    "view(x.size()[0], 12)": lambda x: x.view(x.size()[0], 12),
    "view(-1, 12)": lambda x: x.view(-1, 12),
    "view((n, 12))": lambda x: x.view((x.size(dim=0), 12)),
    "reshape(n, -1)": lambda x: x.reshape(x.shape[0], -1),
    "flatten(1)": lambda x: x.flatten(1),
    "torch.flatten(x, start_dim=1)": lambda x: torch.flatten(x, start_dim=1),
    "mean((2, 3))": lambda x: x.mean((2, 3)),
    "mean([-1, -2])": lambda x: x.mean([-1, -2]),
    "torch.mean(x, dim=(2, 3))": lambda x: torch.mean(x, dim=(2, 3)),
    "mean keepdim": lambda x: x.mean(dim=(2, 3), keepdim=True).flatten(1),
    "same view": lambda x: x.view(x.shape[0], 3, 2, 2).flatten(1),
}


class Wrapped(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.body = nn.Sequential(*(layers or (nn.Conv2d(1, 3, 1),)))
        self.function = function

    def forward(self, x):
        return self.function(self.body(x))


def test_functions_methods_and_residual_sums_are_read():
    torch.manual_seed(0)
    expect_same(Functional(), (2, 6, 6))


def test_a_value_added_to_itself_counts_twice():
    torch.manual_seed(0)
    expect_same(Wrapped(lambda x: (x + x).flatten(1)), (1, 2, 2))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", [*SEQUENTIAL, "functional", "twice"])
def test_the_compiled_module_reads_the_text_as_meant(name, backend):
    torch.manual_seed(0)
    own = {"functional": (Functional(), (2, 6, 6)), "twice": (Wrapped(lambda x: (x + x).tanh().flatten(1)), (1, 2, 2))}
    model, shape = {**SEQUENTIAL, **own}[name]
    model = model.double()
    x = torch.randn(2, 4, *shape, dtype=torch.float64)
    engines = [Engine(model, "mse", b) for b in (backend, "autodiff")]
    assert engines[0].fused
    theta = engines[0].flatten() + 0.1 * torch.randn(2, engines[0].layout.size, dtype=torch.float64)
    y, v = torch.randn_like(engines[1].forward(theta, x)), torch.randn_like(theta)
    for result, expected in zip(*[(e.forward(theta, x), *e.grad(theta, x, y), e.hvp(theta, x, y, v)) for e in engines]):
        # Absolute part: a bias in front of batch norm has gradient zero, of which both sides keep rounding errors.
        assert torch.allclose(result, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FLATTENINGS)
def test_ways_to_flatten(name):
    torch.manual_seed(0)
    expect_same(Wrapped(FLATTENINGS[name]), (1, 2, 2))


def test_tied_parameters_share_a_number_and_unused_ones_keep_their_place():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model.register_parameter("spare", nn.Parameter(torch.zeros(5)))
    made = expect_same(model, (3,))
    assert "linear 0 weight=1 bias=2" in made.text  # 'spare' comes first
    assert "linear 1 weight=1 bias=3" in made.text


def test_frozen_batch_norm_refers_to_the_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    ).double()
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    made = program(model, (1, 5, 5), norm_mode="frozen")
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    theta = ParameterLayout(model).flatten(dict(model.named_parameters()))
    result = interpret(made.text, theta, x, made.gather_buffers(model, theta))
    assert torch.allclose(result, model.eval()(x), rtol=1e-12, atol=1e-12)
    assert made.buffers == ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var")
    assert made.norms == ()


def test_support_mode_is_written():
    assert "mode=support" in program(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), (2,), norm_mode="support").text


class Root(nn.Linear):
    """A subclass of a fused layer is read through its own forward."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).relu()


def test_a_users_subclass_is_traced_into():
    torch.manual_seed(0)
    expect_same(Root(3, 2), (3,))
    expect_same(nn.Sequential(Root(3, 2), nn.Linear(2, 2)), (3,))


class TrainOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        x = self.linear(x)
        return x.tanh() if self.training else x


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, y):
        return self.linear(x) + y


class OldName(nn.Module):
    """Reads a value by its old name after an in-place layer changed it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        h = self.linear(x)
        return F.relu(h, inplace=True) + h


def hooked():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda m, i, o: o * 2)
    return model


image, vector = (2, 6, 6), (2,)
REFUSED = {
    "groups": (nn.Conv2d(2, 2, 3, groups=2), image, "groups=2, only groups=1 is fused"),
    "dilation": (nn.Conv2d(2, 2, 3, dilation=2), image, "dilation=(2, 2), only 1 is fused"),
    "padding mode": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), image, "padding_mode='reflect'"),
    "even same": (nn.Conv2d(2, 2, 2, padding="same"), image, "padding='same' with the even kernel [2, 2]"),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), image, "ceil_mode=True"),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), image, "divisor_override=3"),
    "adaptive": (nn.AdaptiveAvgPool2d(2), image, "pools to 2, only output size 1"),
    "dropout": (nn.Dropout(0.0), image, "(Dropout) is dropout"),
    "conv1d": (nn.Conv1d(2, 2, 1), (2, 6), "layer '1' (Conv1d) is not one of the fused layers"),
    "softplus": (nn.Softplus(), image, "layer '1' (Softplus) is not one of the fused layers"),
    "linear on images": (nn.Linear(6, 6), image, "acts on the last dimension of [2, 6, 6], only flat input is fused"),
    "layer norm of rows": (nn.LayerNorm([6, 6]), image, "normalises only the last of [2, 6, 6]"),
    "partial flatten": (nn.Flatten(2), image, "flattens only dimensions 2 to 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_fused_is_named(name):
    layer, shape, sentence = REFUSED[name]
    with pytest.raises(Unsupported) as caught:
        program(nn.Sequential(nn.Identity(), layer, nn.Linear(1, 1)), shape)
    assert sentence in str(caught.value)
    assert "layer '1'" in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED_FORWARDS = {
    "train and eval": (TrainOnly(), vector, "TrainOnly differs between train() and eval()"),
    "two inputs": (TwoInputs(), vector, "TwoInputs takes a second input 'y'"),
    "in place": (OldName(), vector, "'relu' changes 'linear' in place before it is read again"),
    "hook": (hooked(), vector, "layer '0' (Linear) has a hook"),
    "product": (Wrapped(lambda x: x * x), (1, 2, 2), "'mul' (mul) is not one of the fused layers"),
    "number": (Wrapped(lambda x: x + 1.0), (1, 2, 2), "'add' (add) takes a value that is not computed from the input"),
    "broadcast": (Wrapped(lambda x: x + x.mean((2, 3), keepdim=True)), (1, 2, 2), "adds [3, 2, 2] and [3, 1, 1]"),
    "alpha": (Wrapped(lambda x: torch.add(x, x, alpha=2)), (1, 2, 2), "alpha=2"),
    "functional dropout": (Wrapped(lambda x: F.dropout(x, 0.5)), (1, 2, 2), "(dropout) is dropout"),
    "functional batch norm": (
        Wrapped(lambda x: F.batch_norm(x, None, None, training=True)),
        (1, 2, 2),
        "use nn.BatchNorm2d",
    ),
    "mean of everything": (Wrapped(lambda x: x.mean()), (1, 2, 2), "is not a mean over height and width"),
    "mean of channels": (Wrapped(lambda x: x.mean((1, 2))), (1, 2, 2), "is a mean over [1, 2]"),
    "joins examples": (Wrapped(lambda x: x.flatten()), (1, 2, 2), "flattens the batch dimension"),
    "reshape": (Wrapped(lambda x: x.view(x.shape[0], 4, 3)), (1, 2, 2), "only flattening is fused"),
    "shape": (Wrapped(lambda x: x.view(x.shape[0], x.shape[1] * 4)), (1, 2, 2), "other than the batch size"),
    "indexing": (Wrapped(lambda x: x[:, :, 0, 0]), (1, 2, 2), "indexes a tensor"),
    "branch": (Wrapped(lambda x: x if x.sum() > 0 else -x), (1, 2, 2), "torch.fx cannot trace the forward of Wrapped"),
    "two outputs": (Wrapped(lambda x: (x, x)), (1, 2, 2), "does not return one tensor"),
    "constant": (Wrapped(lambda x: x + torch.ones(2)), (1, 2, 2), "is not one of the model's parameters"),
    "computed weight": (Wrapped(lambda x: F.conv2d(x, x)), (1, 2, 2), "takes a 'weight' that is not a parameter"),
    "statement in place": (Wrapped(lambda x: (x.relu_(), x)[1]), (1, 2, 2), "changes"),
}


@pytest.mark.parametrize("name", REFUSED_FORWARDS)
def test_forwards_that_are_not_fused_say_why(name):
    model, shape, sentence = REFUSED_FORWARDS[name]
    with pytest.raises(Unsupported) as caught:
        program(model, shape)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


MISFITS = {
    "channels": (nn.Conv2d(3, 4, 3), (1, 8, 8), "takes [3, height, width] and gets [1, 8, 8]"),
    "too small": (nn.Conv2d(1, 4, 5), (1, 4, 4), "kernel [5, 5] does not fit into [1, 4, 4]"),
    "features": (nn.Linear(3, 4), (5,), "takes 3 features and gets [5]"),
    "norm": (nn.BatchNorm2d(3), (2, 4, 4), "takes 3 channels and gets [2, 4, 4]"),
    "layer norm": (nn.LayerNorm([4, 4]), (2, 4, 5), "normalises [4, 4] and gets [2, 4, 5]"),
    "group norm": (nn.GroupNorm(2, 4), (3, 4, 4), "with 2 groups does not fit [3, 4, 4]"),
    "pool": (nn.MaxPool2d(2), (3,), "takes [channels, height, width] and gets [3]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_examples_that_do_not_fit_are_a_value_error(name):
    layer, shape, sentence = MISFITS[name]
    with pytest.raises(ValueError, match="layer '0'") as caught:
        program(nn.Sequential(layer, nn.Linear(1, 1)), shape)
    assert sentence in str(caught.value)


def test_cross_entropy_needs_one_row_of_scores():
    with pytest.raises(Unsupported, match=r"the output \[2, 6, 6\] of an example must be one row of scores"):
        program(nn.Sequential(nn.Conv2d(2, 2, 1)), image, "cross_entropy")


def test_reading_a_network_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].eval()
    program(model, vector)
    assert model.training
    assert not model[1].training
    with_constant = Wrapped(lambda x: x + torch.ones(2))
    before = set(vars(with_constant))
    with pytest.raises(Unsupported):
        program(with_constant, (1, 2, 2))
    assert set(vars(with_constant)) == before
