"""A model may change between two calls: the engine always uses its current parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastmaml as fm
from fastmaml.problem.named_parameters import NamedParameters
from fastmaml.problem.parameters import ParameterLayout


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Identity())
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def replace_parameter(net: Net) -> None:
    net.first.weight = nn.Parameter(net.first.weight.detach() + 1.0)


def replace_parameter_in_the_table(net: Net) -> None:
    net.first._parameters["weight"] = nn.Parameter(net.first.weight.detach() + 1.0)


def replace_the_table(net: Net) -> None:
    net.first._parameters = {n: nn.Parameter(p.detach() + 1.0) for n, p in net.first._parameters.items()}


def replace_module(net: Net) -> None:
    net.body[1] = nn.Linear(4, 4, bias=False)


def replace_the_modules_of_a_module(net: Net) -> None:
    net.body._modules = {**net.body._modules, "1": nn.Linear(4, 4, bias=False)}


def add_parameter(net: Net) -> None:
    net.register_parameter("extra", nn.Parameter(torch.zeros(3)))


def add_parameter_to_a_module_without(net: Net) -> None:
    net.body[2].register_parameter("extra", nn.Parameter(torch.zeros(3)))


def add_module(net: Net) -> None:
    net.body.append(nn.Linear(4, 4))


def add_module_in_a_leaf(net: Net) -> None:
    net.last.inner = nn.Linear(1, 1)


def remove_parameter(net: Net) -> None:
    net.last.bias = None


def remove_module(net: Net) -> None:
    del net.body[1]


def rename_parameter(net: Net) -> None:
    bias = net.first._parameters.pop("bias")
    net.first.register_parameter("offset", bias)


def change_the_order(net: Net) -> None:
    weight = net.first._parameters.pop("weight")
    net.first.register_parameter("weight", weight)


def move_parameter_to_the_next_module(net: Net) -> None:
    net.body[1].bias = net.first._parameters.pop("bias")


def tie_parameters(net: Net) -> None:
    net.first.bias = nn.Parameter(torch.zeros(4))
    net.body[1].bias = net.first.bias


def make_parameters_double(net: Net) -> None:
    """As torch.__future__.set_overwrite_module_params_on_conversion has it: other objects."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


CHANGES = [
    replace_parameter,
    replace_parameter_in_the_table,
    replace_the_table,
    replace_module,
    replace_the_modules_of_a_module,
    add_parameter,
    add_parameter_to_a_module_without,
    add_module,
    add_module_in_a_leaf,
    remove_parameter,
    remove_module,
    rename_parameter,
    change_the_order,
    move_parameter_to_the_next_module,
    tie_parameters,
    make_parameters_double,
]


def places(named) -> list[tuple[str, int]]:
    return [(name, id(parameter)) for name, parameter in named.items()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change):
    net = Net()
    known = NamedParameters(net)
    before = places(known.named())
    change(net)
    assert places(known.named()) == places(dict(net.named_parameters()))
    assert places(known.named()) != before  # what was remembered would be wrong
    assert known.named() is known.named()


def test_an_unchanged_model_is_not_walked_again(monkeypatch):
    net = Net()
    known = NamedParameters(net)
    named = known.named()
    net.load_state_dict(Net().state_dict())
    net.eval().double().first.weight.requires_grad_(False)
    monkeypatch.setattr(known, "_walk", None)
    assert known.named() is named


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda known: pickle.loads(pickle.dumps(known))], ids=["copy", "pickle"]
)
def test_a_copy_follows_its_own_model(copied):
    known = NamedParameters(Net())
    other = copied(known)
    assert places(other.named()) == places(dict(other.model.named_parameters()))
    assert not {id(p) for p in other.named().values()} & {id(p) for p in known.named().values()}
    replace_parameter(other.model)
    assert places(other.named()) == places(dict(other.model.named_parameters()))
    assert places(known.named()) == places(dict(known.model.named_parameters()))


# ---------------------------------------------------------------- the same, seen from a learner


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 5, size, generator=generator).to(dtype) for size in (2, 1, 2, 1))


def gradient(learner: fm.MAML, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    learner.zero_grad()
    learner(*batch(dtype)).loss.backward()
    return [p.grad for p in learner.model.parameters()]


def expected(learner: fm.MAML, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Of a learner that was made after the change."""
    return gradient(fm.MAML(copy.deepcopy(learner.model), 0.1, 2, loss="mse"), dtype)


def same(got: list[Tensor | None], wanted: list[Tensor | None]) -> bool:
    pairs = list(zip(got, wanted, strict=True))
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


@pytest.fixture
def learner() -> fm.MAML:
    torch.manual_seed(0)
    learner = fm.MAML(Net(), 0.1, 2, loss="mse")
    gradient(learner)  # whatever is kept between calls is kept now
    return learner


@pytest.mark.parametrize(
    "change", [replace_parameter, replace_parameter_in_the_table, replace_the_table, replace_module]
)
def test_gradients_are_those_of_replaced_parameters(learner, change):
    change(learner.model)
    assert same(gradient(learner), expected(learner))
    assert all(p.grad is not None for p in learner.parameters())


def test_gradients_are_those_of_a_loaded_state(learner):
    before = gradient(learner)
    learner.load_state_dict(Net().state_dict())
    assert same(gradient(learner), expected(learner))
    assert not same(gradient(learner), before)


def test_gradients_have_the_type_of_a_converted_model(learner):
    learner.double()
    assert all(g.dtype == torch.float64 for g in gradient(learner, torch.float64))
    assert same(gradient(learner, torch.float64), expected(learner, torch.float64))
    learner.float()
    assert same(gradient(learner), expected(learner))


def test_data_that_is_put_into_a_parameter_is_used(learner):
    learner.model.first.weight.data = torch.ones(4, 2)
    assert same(gradient(learner), expected(learner))


def test_requires_grad_flags_count_at_each_call(learner):
    for frozen in (learner.model.first.bias, learner.model.last.weight):
        frozen.requires_grad_(False)
        assert same(gradient(learner), expected(learner))
        assert frozen.grad is None
        frozen.requires_grad_(True)
        assert same(gradient(learner), expected(learner))
        assert frozen.grad is not None


@pytest.mark.parametrize("change", [add_parameter, remove_parameter, add_module, rename_parameter, change_the_order])
def test_a_model_with_other_parameters_is_refused(learner, change):
    change(learner.model)
    with pytest.raises(ValueError, match="do not fit the Engine's model"):
        learner(*batch())


def test_a_learner_lists_its_own_parameters(learner):
    learner.extra = nn.Parameter(torch.zeros(2))
    replace_parameter(learner.model)
    own = [id(p) for p in learner.parameters()]
    assert own == [id(p) for p in nn.Module.parameters(learner)]
    assert id(learner.extra) in own
    assert [id(p) for p in learner.parameters(recurse=False)] == [id(learner.extra)]
    twin = copy.deepcopy(learner)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in nn.Module.parameters(twin)] != own
    shallow = copy.copy(learner)
    shallow._modules = {"model": Net()}
    assert [id(p) for p in shallow.parameters()] == [id(p) for p in nn.Module.parameters(shallow)] != own


def test_the_gradients_of_two_leaves_share_no_memory(learner):
    starts = [g.untyped_storage().data_ptr() for g in gradient(learner)]
    assert len(set(starts)) == len(starts)
    assert learner.engine.flatten().untyped_storage().data_ptr() != learner.model.first.weight.data_ptr()


def test_the_vector_of_a_single_parameter_is_a_copy():
    engine = fm.Engine(nn.Linear(3, 1, bias=False), loss="mse")
    engine.flatten().zero_()
    assert engine.model.weight.count_nonzero() == 3


class Odd(nn.Module):
    """Parameters without dimensions and, where asked for, without entries."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.size, self.rows = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(2, 3))
        if empty:
            self.none = nn.Parameter(torch.zeros(0, 4))


@pytest.mark.parametrize("empty", [False, True])
def test_cutting_a_vector_is_splitting_it(empty):
    layout = ParameterLayout(Odd(empty))
    flat = torch.arange(7.0)
    cut, split = layout.cut(flat), layout.split(flat)
    assert list(split) == list(layout.names)
    assert all(map(torch.equal, cut, split.values()))
    assert len(cut) == len(split)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_parts_are_new_tensors(empty, dtype):
    pytest.importorskip("fastmaml._C")
    layout = ParameterLayout(Odd(empty))
    flat = torch.arange(14.0, dtype=dtype)[::2]
    parts = torch.ops.fastmaml.scaled_parts(flat, torch.tensor(0.5, dtype=dtype), layout.dims)
    assert len(parts) == len(layout.names)
    assert all(map(torch.equal, parts, layout.cut(0.5 * flat)))
    places = [part.untyped_storage().data_ptr() for part in parts if part.numel()]
    assert len(set(places)) == len(places)
    torch.library.opcheck(torch.ops.fastmaml.scaled_parts.default, (flat, torch.tensor(0.5, dtype=dtype), layout.dims))


BAD_PARTS = {
    "too few": (torch.zeros(7), torch.ones(()), [1, 3], "shapes must hold 7 numbers in all"),
    "too many": (torch.zeros(7), torch.ones(()), [1, 8], "shapes must hold 7 numbers in all"),
    "cut off": (torch.zeros(7), torch.ones(()), [2, 7], "shapes end within a shape"),
    "negative": (torch.zeros(7), torch.ones(()), [-1, 7], "shapes end within a shape"),
    "types": (torch.zeros(7), torch.ones(()).double(), [1, 7], "scaled_parts takes a vector and a scale of one type"),
    "no vector": (torch.zeros(7, 1), torch.ones(()), [1, 7], "scaled_parts takes a vector and a scale of one type"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_scaled_parts_that_do_not_fit_are_refused(name):
    pytest.importorskip("fastmaml._C")
    *given, sentence = BAD_PARTS[name]
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        torch.ops.fastmaml.scaled_parts(*given)


def test_a_block_holds_what_was_there_at_its_beginning():
    net = Net()
    parameters = NamedParameters(net)
    replace_module(net)
    with pytest.raises(KeyError), parameters:
        before = parameters.named()
        assert before["body.1.weight"] is net.body[1].weight
        replace_parameter(net)
        assert parameters.named() is before
        raise KeyError
    assert parameters.named()["first.weight"] is net.first.weight
