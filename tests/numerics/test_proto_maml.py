# ProtoMAML against unrolled float64 autograd that builds the head from the support set inside the graph.
from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from compare import expect_close
from torch import nn
from torch.func import functional_call

import fastmaml as fm
from fastmaml.algorithms.proto_maml import ProtoMAML

RTOL = 1e-9
TASKS, CLASSES = 3, 3


class Classifier(nn.Module):
    """A head that is neither the last parameter nor at the top of the tree; the body has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.top = nn.ModuleDict({"head": nn.Linear(5, CLASSES)})
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        self.body = nn.Linear(3, 5)

    def forward(self, x):
        return self.top["head"](torch.tanh(self.body(x + self.shift)))


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    elif name == "own":
        model = Classifier()
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)
        )
    return model.double()


@cache
def batch(name: str) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    shape = (2, 4, 4) if name == "conv" else (3,)
    labels = torch.tensor([[0, 1, 2, 2, 1, 0], [1, 1, 0, 2, 0, 0], [2, 0, 1, 1, 1, 1]])  # uneven on purpose

    def x(n):
        return 0.7 * torch.randn(TASKS, n, *shape, generator=g, dtype=torch.float64)

    return x(6), labels, x(4), torch.randint(0, CLASSES, (TASKS, 4), generator=g)


HEADS = {"mlp": "4", "own": "top.head", "conv": "4"}


def embed(name, params, x, model):
    """The body in plain torch."""
    if name == "own":
        return torch.tanh(nn.functional.linear(x + params["shift"], params["body.weight"], params["body.bias"]))
    own = {n: p for n, p in params.items() if not n.startswith("4.")}
    body = model[:-1]
    return functional_call(body, {**own, **{n: b.clone() for n, b in body.named_buffers()}}, (x,))


def unrolled(name, rate, steps, order=None, weights=None, adapted=None):
    """(losses [T], {name: gradient}, gradient of the rate)."""
    model, head = network(name), HEADS[name]
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    rate = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    losses = []
    for sx, sy, qx, qy in zip(*batch(name)):

        def loss(phi, x, y):
            own = {n: b.clone() for n, b in model.named_buffers()}
            return nn.functional.cross_entropy(functional_call(model, {**phi, **own}, (x,)), y)

        e = embed(name, theta, sx, model)
        c = torch.stack([e[sy == n].mean(0) for n in range(CLASSES)])
        # clones: the inner gradient by the body must not go through the head that came from it
        start = {**{n: p.clone() for n, p in theta.items()}, f"{head}.weight": 2 * c, f"{head}.bias": -(c * c).sum(1)}
        phi = dict(start)
        for k in range(steps):
            if order and k == steps - order:
                phi = {n: p.detach() + (start[n] - start[n].detach()) for n, p in phi.items()}
            grads = torch.autograd.grad(loss(phi, sx, sy), list(phi.values()), create_graph=True)
            grads = [g.detach() for g in grads] if order == 0 else grads
            moved = [n for n in phi if adapted is None or n.startswith(adapted)]
            phi = {n: p - rate * g if n in moved else p for (n, p), g in zip(phi.items(), grads)}
        losses.append(loss(phi, qx, qy))
    of_task = torch.full((TASKS,), 1 / TASKS, dtype=torch.float64) if weights is None else weights
    grads = torch.autograd.grad(
        torch.stack(losses) @ of_task, [*theta.values(), rate], allow_unused=True, materialize_grads=True
    )
    return torch.stack(losses).detach(), dict(zip(theta, grads)), grads[-1]


def compare(name, backend, steps, weights=None, oracle=None, **options):
    rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    learner = ProtoMAML(network(name), rate, steps, head=HEADS[name], backend=backend, **options)
    out = learner(*batch(name), task_weights=weights)
    out.loss.backward()
    losses, expected, rate_grad = unrolled(name, 0.3, steps, weights=weights, **(oracle or {}))
    expect_close(out.task_losses, losses, RTOL, "losses")
    for parameter, p in learner.model.named_parameters():
        expect_close(p.grad, expected[parameter], RTOL, parameter, atol=1e-14)
        assert bool((p.grad == 0).all()) == parameter.startswith(HEADS[name]) or parameter == "0.bias"
    if steps:
        expect_close(rate.grad, rate_grad, RTOL, "rate")
    return learner


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_the_start_is_differentiated_too(name, steps, backend):
    compare(name, backend.name, steps)


def test_a_head_deep_in_a_model_of_ones_own():
    learner = compare("own", "autodiff", 2)
    assert learner.head == "top.head"


def test_first_order_keeps_the_derivative_of_the_start():
    compare("mlp", "cpu", 3, first_order=True, oracle={"order": 0})


@pytest.mark.parametrize("last", [1, 2])
def test_truncation_keeps_the_derivative_of_the_start(last):
    rate = 0.3
    learner = ProtoMAML(network("mlp"), rate, 3, truncate=last)
    learner(*batch("mlp")).loss.backward()
    _, expected, _ = unrolled("mlp", rate, 3, order=last)
    for name, p in learner.model.named_parameters():
        expect_close(p.grad, expected[name], RTOL, name)


def test_task_weights():
    compare("mlp", "cpu", 2, weights=torch.tensor([0.2, 0.0, 1.7], dtype=torch.float64))


def test_only_the_head_adapts():
    compare("mlp", "cpu", 2, adapted="4.*", oracle={"adapted": "4."})


def test_the_scores_at_the_start_are_distances_to_prototypes(backend):
    learner = ProtoMAML(network("mlp"), 0.3, 0, backend=backend.name)
    sx, sy, qx, _ = batch("mlp")
    scores = learner.adapt(sx, sy).predict(qx)
    for task in range(TASKS):
        e, q = (learner.model[:-1](x[task]).detach() for x in (sx, qx))
        c = torch.stack([e[sy[task] == n].mean(0) for n in range(CLASSES)])
        expected = -(torch.cdist(q, c) ** 2) + (q * q).sum(1, keepdim=True)
        expect_close(scores[task], expected, 1e-12, f"task {task}")


def test_the_heads_own_values_do_not_count():
    one, two = (ProtoMAML(network("mlp"), 0.3, 2) for _ in range(2))
    with torch.no_grad():
        two.model[4].weight.mul_(7.0)
    assert torch.equal(one(*batch("mlp")).loss, two(*batch("mlp")).loss)


def test_the_body_shares_what_the_model_has():
    """Running statistics that change later are those of the embeddings."""
    learner = ProtoMAML(network("conv"), 0.3, 1, batch_norm="frozen")
    before = learner(*batch("conv")).task_losses
    learner.model[1].running_mean += 0.7
    learner.double()
    with torch.no_grad():
        learner.model[0].weight.mul_(1.5)
    after = learner(*batch("conv"))
    assert not torch.allclose(before, after.task_losses)
    fresh = ProtoMAML(copy.deepcopy(learner.model), 0.3, 1, batch_norm="frozen")
    assert torch.equal(fresh(*batch("conv")).task_losses, after.task_losses)


@pytest.mark.parametrize("mode", ["transductive", "support", "frozen"])
def test_batch_norm_modes_against_finite_differences(mode):
    learner = ProtoMAML(network("conv"), 0.3, 2, batch_norm=mode, backend="autodiff")
    learner(*batch("conv")).loss.backward()
    weight = learner.model[0].weight
    g = torch.Generator().manual_seed(3)
    d = torch.randn(weight.shape, generator=g, dtype=torch.float64)
    values, h = [], 1e-4
    with torch.no_grad():
        for step in (h, -h, 2 * h, -2 * h):
            weight += step * d
            values.append(float(learner(*batch("conv")).loss))
            weight -= step * d
    slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
    expect_close((weight.grad * d).sum(), torch.tensor(slope, dtype=torch.float64), 1e-8, mode)  # of order h^4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_body(copied):
    learner = ProtoMAML(network("mlp"), 0.3, 2)
    other = copied(learner)
    expected = learner(*batch("mlp")).loss.detach().clone()
    with torch.no_grad():
        learner.model[0].weight.mul_(2.0)
    assert torch.equal(other(*batch("mlp")).loss, expected)
    with torch.no_grad():
        other.model[0].weight.mul_(2.0)
    assert torch.equal(other(*batch("mlp")).loss, learner(*batch("mlp")).loss)


def test_the_state_dict_is_the_models():
    learner = ProtoMAML(network("conv"), 0.3, 2)
    assert list(learner.state_dict()) == list(network("conv").state_dict())
    assert len(list(learner.parameters())) == len(list(learner.model.parameters()))


def test_dropout_masks_of_the_embeddings_are_those_of_their_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    learner = ProtoMAML(model, 0.1, 0)
    states = []
    forward, vjp = learner._body.forward, learner._body.vjp
    learner._body.forward = lambda *given: (states.append(torch.get_rng_state()), forward(*given))[1]
    learner._body.vjp = lambda *given: (states.append(torch.get_rng_state()), vjp(*given))[1]
    learner(*batch("mlp")).loss.backward()
    assert len(states) == 2 and torch.equal(*states)


# ---------------------------------------------------------------- what it refuses


def test_a_class_without_support_example():
    sx, sy, qx, qy = batch("mlp")
    sy = sy.clone()
    sy[1] = torch.tensor([0, 0, 0, 2, 2, 2])
    with pytest.raises(ValueError, match="task 1 has no support example of class 1, one of 3: no prototype for it"):
        ProtoMAML(network("mlp"), 0.3)(sx, sy, qx, qy)


def test_labels_out_of_range():
    sx, sy, qx, qy = batch("mlp")
    with pytest.raises(ValueError, match=r"support_y holds labels from 0 to 3, but the network has 3 outputs"):
        ProtoMAML(network("mlp"), 0.3).adapt(sx, torch.where(sy == 2, 3, sy))
    with pytest.raises(ValueError, match=r"support_y \[3, 5\] does not give one label to each example of support_x"):
        ProtoMAML(network("mlp"), 0.3)(sx, sy[:, :5], qx, qy)
    with pytest.raises(TypeError, match="takes integer labels"):
        ProtoMAML(network("mlp"), 0.3)(sx, sy.double(), qx, qy)


@pytest.mark.parametrize(
    "model, head, sentence",
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False)), None, "the layer named '1' is a Linear"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), None, "the layer named '1' is a LayerNorm"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), "classifier", "the layer named 'classifier' is none"),
        (nn.Linear(3, 3), None, "behind a body"),
        (nn.Sequential(nn.Linear(3, 3)), None, "has no parameters but its head's"),
    ],
    ids=["no bias", "no linear", "no such name", "the head alone", "no body"],
)
def test_heads_that_do_not_fit(model, head, sentence):
    with pytest.raises(ValueError, match=sentence):
        ProtoMAML(model, 0.3, head=head)


def test_a_head_in_the_middle_a_scaled_output_and_a_frozen_head():
    sx, sy, qx, qy = batch("mlp")
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match="head '0' must be the model's last layer"):
        ProtoMAML(model, 0.3, head="0")(sx, sy, qx, qy)
    scaled = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh()).double()
    with pytest.raises(ValueError, match="head '2' must be the model's last layer"):
        ProtoMAML(scaled, 0.3)(sx, sy, qx, qy)
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="head '2' is frozen"):
        ProtoMAML(model, 0.3)(sx, sy, qx, qy)
    with pytest.raises(ValueError, match=r"without its head '0' returns \[3, 6, 2\], not the 4 features"):
        odd = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
        ProtoMAML(odd, 0.3, head="0").adapt(torch.randn(3, 6, 4).double(), sy % 2)


def test_it_learns():
    torch.manual_seed(0)
    learner = ProtoMAML(network("mlp"), 0.1, 2)
    optimizer, losses = torch.optim.Adam(learner.parameters(), 1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        out = learner(*batch("mlp"))
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert isinstance(fm.ProtoMAML, type)
