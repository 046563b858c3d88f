# fm.check on every kind of candidate: learners, models and functions. Also the report's sentences about the model itself.
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from unrolled import Residual, cross_entropy, image_batch, mse, regression_batch, small_conv, small_mlp

import fastmaml as fm
from fastmaml.checking import check
from fastmaml.checking.differences import directions, slopes

BATCH = regression_batch(4, 5, 6)
IMAGES = image_batch(3, 6, 5)


def unrolled(steps=2, rate=0.3, loss=mse, create_graph=True):
    def meta_loss(model, batch):
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch):
            phi = {n: p for n, p in model.named_parameters() if p.requires_grad}
            for _ in range(steps):
                value = loss(functional_call(model, phi, (support_x,)), support_y)
                grads = torch.autograd.grad(
                    value, list(phi.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
                )
                phi = {n: p - rate * g for (n, p), g in zip(phi.items(), grads)}
            losses.append(loss(functional_call(model, phi, (query_x,)), query_y))
        return torch.stack(losses).mean()

    return meta_loss


MEANT = {"loss": "mse", "inner_lr": 0.3, "inner_steps": 2, "directions": 1}


def verdicts(report):
    return {row.name: row.verdict for row in report.table}


def exact(report):
    assert report.ok, str(report)
    return report


# ---------------------------------------------------------------- learners and models


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def classes(tasks=3, support=6, query=7):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(tasks, n, 4, generator=g) for n in (support, query)]
    y = [torch.randint(0, 3, (tasks, n), generator=g) for n in (support, query)]
    return fm.TaskBatch(x[0], y[0], x[1], y[1])


RATES = {
    "number": lambda: 0.3,
    "learned number": lambda: nn.Parameter(torch.tensor(0.3)),
    "vector": lambda: torch.linspace(0.05, 0.4, 63),
    "rows": lambda: torch.tensor([[0.3], [0.1]]),
    "learned by name": lambda: {
        name: nn.Parameter(torch.full_like(p, 0.2)) if p.dim() > 1 else 0.1 for name, p in net().named_parameters()
    },
}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
def test_maml_with_every_form_of_rates(rates):
    report = exact(check(fm.MAML(net(), rates(), 2), classes(), directions=1))
    assert report.sentences[0].startswith("Exact: the meta-gradient agrees with unrolled float64 autograd to ")
    learned = [name for name in verdicts(report) if name.startswith("inner_lr")]
    assert bool(learned) == (rates is RATES["learned number"] or rates is RATES["learned by name"])


LEARNERS = {
    "FOMAML": lambda: fm.FOMAML(net(), 0.3, 3),
    "truncated": lambda: fm.MAML(net(), 0.3, 3, truncate=1),
    "support batch norm": lambda: fm.MAML(net(), 0.3, 2, batch_norm="support"),
    "frozen batch norm": lambda: fm.MAML(net(), 0.3, 2, batch_norm="frozen"),
    "label smoothing": lambda: fm.MAML(net(), 0.3, 2, label_smoothing=0.1),
    "own loss": lambda: fm.MAML(net(), 0.3, 2, loss=lambda z, y: nn.functional.cross_entropy(z, y, reduction="none")),
    "momentum": lambda: fm.MAML(net(), inner=fm.inner.SGD(0.1, momentum=0.9, nesterov=True), inner_steps=3),
    "dampening": lambda: fm.MAML(net(), inner=fm.inner.SGD(0.1, momentum=0.9, dampening=0.2), inner_steps=3),
    "clipped": lambda: fm.MAML(net(), inner=fm.inner.SGD(0.3, clip_norm=0.3, weight_decay=0.01), inner_steps=3),
    "clipped by value": lambda: fm.MAML(net(), inner=fm.inner.SGD(0.3, clip_value=0.05), inner_steps=2),
    "Adam": lambda: fm.MAML(net(), inner=fm.inner.Adam(0.1, betas=(0.5, 0.9), eps=1e-3), inner_steps=3),
    "AdamW": lambda: fm.MAML(net(), inner=fm.inner.AdamW(0.1, eps=1e-3), inner_steps=2),
    "ANIL": lambda: fm.ANIL(net(), 0.3, 2),
    "BOIL": lambda: fm.BOIL(net(), 0.3, 2),
    "MetaSGD": lambda: fm.MetaSGD(net(), (0.05, 0.3), 2),
    "MAML++": lambda: fm.MAMLPlusPlus(net(), 0.3, 3),
    "MAML++ with statistics": lambda: fm.MAMLPlusPlus(net(), 0.3, 2, msl_epochs=0, bn_stats="running_per_step"),
}


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS.keys())
def test_learners_against_the_unrolled_oracle(make):
    learner = make()
    before = copy.deepcopy(learner.state_dict())
    report = exact(check(learner, classes(), directions=1))
    assert report.sentences[0].startswith("Exact: the ")
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name])


def test_imaml_is_compared_at_the_inner_minimum():
    report = exact(
        check(
            fm.IMAML(net(), 0.05, 5, lam=4.0, cg_steps=3, learn_lam=True, batch_norm="frozen"), classes(), directions=1
        )
    )
    assert report.sentences[0].startswith("Exact as far as finite differences can tell: along ")
    assert "With the learner's own 5 and 3 its gradient is " in report.sentences[1]
    assert verdicts(report)["lam"] == "agrees"


def balanced():
    batch = classes()
    return batch._replace(support_y=torch.arange(3).repeat(3, 2))


def sines():
    return [t.float() for t in BATCH]


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: fm.MetaCurvature(net(), 0.3, 2), classes),
        (lambda: fm.ProtoMAML(net(), 0.1, 2, batch_norm="frozen"), balanced),
        (lambda: fm.CAVIA(fm.models.context_mlp([1, 5, 1], 2, activation="tanh"), 0.5, 2, "mse"), sines),
    ],
    ids=["MetaCurvature", "ProtoMAML", "CAVIA"],
)
def test_learners_against_finite_differences(make, batch):
    report = exact(check(make(), batch(), directions=1))
    assert report.sentences[0].startswith("Exact as far as finite differences can tell: along ")
    assert " defines its own gradient." in report.sentences[1]


def test_a_learner_of_ones_own_is_compared_with_finite_differences():
    class Halved(fm.MAML):
        def meta_step(self, batch, task_weights):
            step = super().meta_step(batch, task_weights)
            return step._replace(grad=self.factor * step.grad)

    learner = Halved(net(), 0.3, 2)
    learner.factor = 1.0
    report = exact(check(learner, classes(), directions=1))
    assert "The oracle cannot unroll this learner: Halved defines its own gradient." in report.sentences
    learner.factor = 0.5
    report = check(learner, classes(), directions=1)
    assert not report.ok
    assert report.sentences[0].startswith(
        "Wrong: finite differences of its loss differ from the gradient along 6 of 7 directions, by up to "
    )
    assert verdicts(report)["3.weight"] == "wrong"


@pytest.mark.parametrize("learner", [lambda: fm.Reptile(net()), lambda: fm.FOML(net())])
def test_learners_without_a_loss_are_refused(learner):
    with pytest.raises(
        ValueError, match="moves the start towards the adapted parameters; this is not the gradient of a loss"
    ):
        check(learner(), classes())


def test_a_model_means_the_gradient_of_fastmaml():
    report = exact(check(net(), classes(), inner_lr=0.3, inner_steps=2, directions=1))
    assert report.subject.startswith("MAML, 2 inner steps of SGD at rate 0.3 (backend ")
    assert report.subject.endswith(", 3 tasks, 6 support and 7 query examples each)")
    assert check(small_mlp(), BATCH, backend="autodiff", **MEANT).ok


# ---------------------------------------------------------------- any model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, left, right):
        return torch.tanh(self.a(left)) * self.b(right)


@pytest.mark.parametrize("model", [Attention, Recurrent], ids=["transformer", "LSTM"])
def test_models_that_no_kernel_runs(model):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, n, 3, 8, generator=g) for n in (4, 5)]
    batch = (x[0], x[0].sum((2, 3))[..., None], x[1], x[1].sum((2, 3))[..., None])
    assert check(model(), batch, loss="mse", inner_lr=0.05, inner_steps=2, directions=1).ok


def test_models_with_several_inputs():
    g = torch.Generator().manual_seed(0)
    x = [(torch.randn(2, n, 3, generator=g), torch.randn(2, n, 2, generator=g)) for n in (4, 5)]
    y = [torch.randn(2, n, 1, generator=g) for n in (4, 5)]
    assert check(TwoInputs(), (x[0], y[0], x[1], y[1]), loss="mse", inner_lr=0.1, inner_steps=2, directions=1).ok


# ---------------------------------------------------------------- functions of all sorts


def test_a_function_that_calls_backward_itself():
    def meta_loss(model, batch):
        for task in zip(*batch):
            (unrolled()(model, [part[None] for part in task]) / 4).backward()

    report = exact(check(meta_loss, BATCH, model=small_mlp(), **MEANT))
    assert any(s.startswith("Finite differences of the oracle's meta-loss agree") for s in report.sentences)


def test_a_function_that_holds_its_own_model_and_a_float32_one_at_that():
    model = small_mlp().float()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[0].weight.grad = torch.ones_like(model[0].weight)

    def meta_loss(_, batch):
        return unrolled()(model, batch)

    report = exact(check(meta_loss, BATCH, model=model, **MEANT))
    assert max(row.relative_error for row in report.table) < 1e-12  # it ran in float64
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, start[name])
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[2].weight.grad is None


def in_float32(create_graph=True):
    def meta_loss(model, batch):
        one = torch.ones((), dtype=torch.float32)
        assert all(p.dtype == one.dtype for p in model.parameters()), "this code knows float32 only"
        return unrolled(create_graph=create_graph)(model, [t.float() for t in batch])

    return meta_loss


def test_a_function_that_runs_in_float32_only():
    report = exact(check(in_float32(), BATCH, model=small_mlp().float(), **MEANT))
    said = "The function does not run in float64 (the meta-loss raised AssertionError: this code knows float32 only), so it was "
    assert any(s.startswith(said + "checked in float32. The tolerance is ") for s in report.sentences)
    assert 1e-9 < max(row.relative_error for row in report.table) < 1e-5
    report = check(in_float32(create_graph=False), BATCH, model=small_mlp().float(), **MEANT)
    assert not report.ok and report.sentences[0].startswith("First order only: ")


def test_a_function_that_returns_a_learners_output():
    model = small_mlp()
    assert check(lambda m, batch: fm.MAML(m, 0.3, 2, loss="mse")(*batch), BATCH, model=model, **MEANT).ok


def test_an_inner_loop_that_changes_the_weights_themselves():
    def meta_loss(model, batch):
        for support_x, support_y, query_x, query_y in zip(*batch):
            for _ in range(2):
                grads = torch.autograd.grad(mse(model(support_x), support_y), list(model.parameters()))
                for p, g in zip(model.parameters(), grads):
                    p.data -= 0.3 * g
            (mse(model(query_x), query_y) / 4).backward()

    model = small_mlp()
    start = copy.deepcopy(model.state_dict())
    report = check(meta_loss, BATCH, model=model, **MEANT)
    assert not report.ok
    assert (
        "A call changes the model's own weights (p.data, copy_() or optimizer.step()), so the next task or call "
        "starts from the changed weights. The check restored them after each call."
    ) in report.sentences
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- what is said of the model


class Peculiar(nn.Module):
    """A tied, an unused and a frozen parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.spare = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_tied_frozen_and_unused_parameters_are_named():
    report = exact(check(unrolled(), BATCH, model=Peculiar().double(), **MEANT))
    assert verdicts(report) == {
        "first.weight": "exact", "first.bias": "exact", "second.bias": "frozen", "spare.weight": "unused", "spare.bias": "unused",
    }  # fmt: skip
    assert {
        "Tied: 'first.weight', 'second.weight' are one parameter; its gradient is the sum over its uses.",
        "Frozen (requires_grad=False), neither adapted nor trained: 'second.bias'.",
        "Unused: the loss does not depend on 'spare.weight', 'spare.bias'.",
    } <= set(report.sentences)


def test_gradients_where_there_should_be_none():
    def meta_loss(model, batch):
        loss = unrolled()(model, batch)
        loss.backward()
        model.spare.weight.grad = torch.ones(1, 1, dtype=torch.float64)
        return loss.detach()

    report = check(meta_loss, BATCH, model=Peculiar().double(), **MEANT)
    assert not report.ok and verdicts(report)["spare.weight"] == "unused, but has a gradient"


def test_stateful_layers_are_named():
    model = small_conv()
    report = exact(
        check(
            unrolled(loss=cross_entropy),
            IMAGES,
            model=model,
            loss="cross_entropy",
            inner_lr=0.3,
            inner_steps=2,
            directions=0,
        )
    )
    assert (
        "Stateful layer '1' (BatchNorm2d): a call changes its running_mean, running_var, num_batches_tracked. Results in "
        "eval mode depend on earlier batches."
    ) in report.sentences
    assert int(model[1].num_batches_tracked) == 0 and not model[1].running_mean.any()


def test_dropout_is_switched_off_and_said():
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    report = exact(check(unrolled(), BATCH, model=model, **MEANT))
    assert (
        "Random layers: two calls differ by the dropout in '2', so the check switched dropout off." in report.sentences
    )
    assert model[2].p == 0.5
    assert check(fm.MAML(model, 0.3, 2, loss="mse"), BATCH).ok


def test_a_random_function_cannot_be_compared():
    def meta_loss(model, batch):
        return unrolled()(model, (batch[0] + torch.randn_like(batch[0]), *batch[1:]))

    report = check(meta_loss, BATCH, model=small_mlp(), **MEANT)
    assert not report.ok and not report.table
    assert report.sentences[0].startswith("Random: two calls with the same weights and batch differ by ")


def test_kinks_are_no_mistakes():
    def loss():
        return float(weight.detach().abs().sum())

    weight = nn.Parameter(torch.tensor([1e-7, 1.0], dtype=torch.float64))
    grad = {"w": torch.ones(2, dtype=torch.float64)}
    (slope,) = slopes(loss, {"w": weight}, directions(grad, 1, seed=0, most=1))
    assert slope.at_kink(grad)
    weight.data[0] = 0.5
    (slope,) = slopes(loss, {"w": weight}, directions(grad, 1, seed=0, most=1))
    assert not slope.at_kink(grad) and slope.fits(grad, grad)


def test_a_gradient_without_curvature_cannot_be_told_from_first_order():
    linear = lambda output, y: (output * y).mean()  # noqa: E731
    report = check(
        unrolled(loss=linear),
        BATCH,
        model=nn.Linear(1, 1).double(),
        loss=linear,
        inner_lr=0.3,
        inner_steps=1,
        directions=0,
    )
    assert not report.ok or "this check cannot tell exact from first order" in report.sentences[1]


def test_a_loop_that_diverges_is_said():
    report = check(unrolled(5, 1e200), BATCH, model=small_mlp(), loss="mse", inner_lr=1e200, inner_steps=5)
    assert report.sentences == [
        "The exact meta-gradient is not finite: the inner loop diverges. Lower inner_lr or inner_steps."
    ]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch": None}, "batch must be (support_x, support_y, query_x, query_y), each a tensor [tasks, examples, ...]"),
        ({"batch": BATCH[:3]}, "batch must be"),
        ({"batch": (BATCH[0], BATCH[1], BATCH[2][:2], BATCH[3])},
         "query_x [2, 6, 1] and query_y [4, 6, 1] hold different numbers of tasks or examples"),
        ({"batch": (*BATCH[:2], BATCH[2][:2], BATCH[3][:2])}, "support_y [4, 5, 1] and query_y [2, 6, 1] hold different numbers of tasks"),
        ({"batch": (BATCH[0][:0], BATCH[1][:0], *BATCH[2:])}, "support_x [0, 5, 1] must be [tasks, examples, ...] with at least one of each"),
        ({"model": None}, "a function is called as function(model, batch): give the model with model="),
        ({"inner_lr": None}, "give either inner_lr (plain gradient descent) or inner (an optimizer with its lr), not both"),
        ({"inner_lr": torch.ones(3)}, "inner_lr [3] must be one rate"),
        ({"inner_steps": 1.5}, "inner_steps must be a whole number, not 1.5"),
        ({"loss": "hinge"}, "loss 'hinge' is not one of"),
        ({"batch_norm": "own"}, "batch_norm 'own' is not one of"),
        ({"reduction": "max"}, "reduction 'max' is neither 'mean' nor 'sum'"),
        ({"adapted": "head.*"}, "'head.*' fits no parameter"),
        ({"subject": lambda model, batch: 1 / 0}, "the meta-loss raised ZeroDivisionError: division by zero"),
        ({"subject": lambda model, batch: batch[0]}, "the meta-loss returned a tensor [4, 5, 1]; it must return one scalar loss"),
        ({"subject": lambda model, batch: "0.5"}, "the meta-loss returned str; it must return a scalar loss"),
        ({"batch": [t[..., [0, 0]] for t in BATCH]}, "the meta-loss raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)  # fmt: skip
def test_bad_input_costs_one_sentence(arguments, sentence):
    given = {"subject": unrolled(), "batch": BATCH, "model": small_mlp(), **MEANT} | arguments
    with pytest.raises((ValueError, TypeError)) as error:
        check(given.pop("subject"), given.pop("batch"), **given)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_a_learner_needs_nothing_but_the_batch():
    with pytest.raises(TypeError, match="a learner knows what it computes; leave out loss, inner_lr"):
        check(fm.MAML(small_mlp(), 0.3, loss="mse"), BATCH, loss="mse", inner_lr=0.3)
    with pytest.raises(ValueError, match="reduction='sum' belongs to a function"):
        check(fm.MAML(small_mlp(), 0.3, loss="mse"), BATCH, reduction="sum")
    with pytest.raises(TypeError, match="subject must be a learner, a module or a function, not str"):
        check("maml", BATCH)


def test_the_residual_network_is_exact_too():
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(3, n, 6, dtype=torch.float64, generator=g) for n in (5, 6)]
    y = [torch.randint(0, 3, (3, n), generator=g) for n in (5, 6)]
    assert check(Residual(), (x[0], y[0], x[1], y[1]), inner_lr=0.2, inner_steps=2).ok
