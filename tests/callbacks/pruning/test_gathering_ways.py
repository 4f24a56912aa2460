"""The same scores however a module is trained: each way beside a plain loop."""

import pytest
import torch
from helpers import PRUNABLE, Net, Watch, fit, half, loader, mlp, same, seeded
from lightning.pytorch.plugins.precision import MixedPrecision
from optimizers import slow_first
from scoring import Scores, plain_loop, state_of
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

BOTH = pytest.mark.parametrize("importance", ["taylor", "wanda"])
BATCHES = list(loader())


def scores_of(module, importance, *callbacks, **options):
    """Those of the first of two epochs, three batches each."""
    pruner = half(importance=importance, rounds=1)
    fit(module, pruner, scores := Scores(pruner), *callbacks, max_epochs=2, **options)
    return scores.found[0]


def by_hand(importance, steps=None, twin=None, **options):
    twin, steps = twin or Net(), steps or [[batch] for batch in BATCHES]
    return plain_loop(twin, twin.configure_optimizers(), steps, len(steps), PRUNABLE, **options)[importance]


def assert_close(found, wanted, **tolerance):
    torch.testing.assert_close(found, wanted, **(tolerance or {"rtol": 1e-5, "atol": 1e-7}))


@BOTH
def test_accumulated_batches_are_one_step(importance):
    found = scores_of(Net(), importance, accumulate_grad_batches=2)
    assert_close(found, by_hand(importance, [BATCHES[:2], BATCHES[2:]], divide=2))


class ByHand(Net):
    """Two batches a step, and gradients clipped by the module."""

    automatic_optimization = False
    clip = None

    def __init__(self, *arguments, raw=False):
        super().__init__(*arguments)
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.raw:
            loss.backward()
        else:
            self.manual_backward(loss)
        optimizer.step()


@BOTH
@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization(importance, raw):
    assert_close(scores_of(ByHand(raw=raw), importance), by_hand(importance))


def test_gradients_count_as_they_are_clipped():
    found = scores_of(Net(), "taylor", gradient_clip_val=0.05)
    assert_close(found, by_hand("taylor", clip=0.05))


@BOTH
@pytest.mark.parametrize("fused", [False, True])
def test_the_factor_of_a_gradient_scaler_does_not_count(importance, fused):
    """Nor does the first step, whose gradients overflow: the scaler skips it."""

    class Overflows(Net):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.trainer.global_step == 0 and self.first else 1.0)

        def training_step(self, batch, batch_idx):
            self.first = batch_idx == 0 and self.trainer.current_epoch == 0
            return super().training_step(batch, batch_idx)

    def optimizer(parameters):
        return SGD(parameters, lr=0.1, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)
    found = scores_of(Overflows(optimizer=optimizer), importance, plugins=[precision])
    if importance == "taylor":
        twin = Net(optimizer=optimizer)
        with torch.no_grad():
            twin.net(BATCHES[0][0])  # the norm has seen the first batch
        assert_close(found, by_hand("taylor", [[batch] for batch in BATCHES[1:]], twin))
    assert all(score.isfinite().all() for score in found.values())


@BOTH
def test_bfloat16_autocast_changes_a_score_by_its_rounding_alone(importance):
    found = scores_of(Net(), importance, precision="bf16-mixed")
    assert all(score.dtype == torch.float32 for score in found.values())
    assert_close(found, by_hand(importance), rtol=0.1, atol=0.02)


class Checkpointed(Net):
    """Computes its layers a second time on the way back, by either kind of checkpointing."""

    def __init__(self, reentrant):
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Tanh(), nn.Linear(8, 3)))
        torch.manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.reentrant = reentrant

    def loss(self, batch):
        x = batch[0].clone().requires_grad_()
        found = checkpoint(self.net, x, use_reentrant=self.reentrant) if self.reentrant is not None else self.net(x)
        return (found - batch[1]).square().mean()


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_gradient_checkpointing_computes_again_does_not_count(importance, reentrant):
    assert_close(scores_of(Checkpointed(reentrant), importance), by_hand(importance, twin=Checkpointed(None)))


@BOTH
def test_a_second_way_back_through_the_same_forward_does_not_count(importance):
    class Penalized(Net):
        def loss(self, batch):
            x = batch[0].clone().requires_grad_()
            found = self.net(x)
            (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
            return (found - batch[1]).square().mean() + 0.1 * gradient.square().mean()

    assert_close(scores_of(Penalized(), importance), by_hand(importance, twin=Penalized()))


class Chain(nn.Sequential):
    """PyTorch 2.6 compiles no forward of its own in place."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("importance", "inside"),
    [
        ("wanda", False),
        ("taylor", True),
        pytest.param("wanda", True, marks=pytest.mark.full),
        pytest.param("taylor", False, marks=pytest.mark.full),
    ],
)
def test_a_compiled_module(importance, inside):
    """Outside of the batches that count it is compiled as ever."""
    module, compiled = Net(), []

    def backend(graph, _):
        def called(*arguments):
            compiled.append(module.trainer.current_epoch if module.trainer else None)
            return graph(*arguments)

        return called

    if inside:
        module.net = torch.compile(module.net, backend=backend)
    else:
        module.net = Chain(*module.net)
        module.net.compile(backend=backend)
    found = scores_of(module, importance, val=loader())
    found = {name.replace("_orig_mod.", ""): score for name, score in found.items()}
    assert_close(found, by_hand(importance))
    assert {0, 1} <= set(compiled)
    torch._dynamo.reset()


def test_two_pruners_of_a_compiled_module_leave_it_compiled():
    """The one gathers in the first epoch only, the other in all but the last."""
    module, compiled = Net(Chain(*seeded(mlp))), []
    module.net.compile(backend=lambda graph, _: lambda *x: compiled.append(module.trainer.current_epoch) or graph(*x))
    first = half(importance="wanda", rounds=1, name="first", include="net.0.*")
    second = half(importance="wanda", rounds=2, name="second", include="net.3.*")
    fit(module, first, second, max_epochs=3)
    assert set(compiled) == {2}
    assert (first.remaining, second.remaining) == (0.5, 0.25)
    torch._dynamo.reset()


def test_a_step_of_several_closures_is_a_mean_over_its_gradients():
    """LBFGS asks for the gradient several times in a step."""
    twin, terms = Net(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)), []

    def seen():
        weights = {name: twin.get_parameter(name) for name in PRUNABLE}
        terms.append({name: (w * w.grad).abs().detach() for name, w in weights.items()})

    optimizer = twin.configure_optimizers()
    for batch in BATCHES:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = twin.loss(batch)
            loss.backward()
            seen()
            return loss

        optimizer.step(closure)
    assert len(terms) > len(BATCHES)
    mean = {name: torch.stack([term[name] for term in terms]).mean(0) for name in PRUNABLE}
    module = Net(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    assert_close(scores_of(module, "taylor"), mean)


@BOTH
def test_an_optimizer_inside_another_counts_once(importance):
    pruner, states = half(importance=importance, rounds=1), []
    look = Watch(on_train_epoch_end=lambda *_: states.append(state_of(pruner)))
    fit(Net(optimizer=slow_first), pruner, scores := Scores(pruner), look, max_epochs=2)
    counts = {int(sums["count"]) for sums in states[0].values()}
    assert counts == ({3} if importance == "taylor" else {22})  # steps, samples
    assert_close(scores.found[0], by_hand(importance, twin=Net(optimizer=slow_first)))


def test_of_two_optimizers_each_step_counts_for_its_own_weights():
    """The first layer is stepped twice as often as the second."""

    class Two(ByHand):
        def configure_optimizers(self):
            return [SGD(self.net[0].parameters(), lr=0.0), SGD(self.net[3].parameters(), lr=0.0)]

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second) if batch_idx == 0 else (first,):
                self.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    found = scores_of(Two(), "taylor")
    every = by_hand("taylor", twin=Net(optimizer=lambda p: SGD(p, lr=0.0)))
    first = by_hand("taylor", [[BATCHES[0]]], Net(optimizer=lambda p: SGD(p, lr=0.0)))
    assert_close(found, {"net.0.weight": every["net.0.weight"], "net.3.weight": first["net.3.weight"]})


def test_pruned_weights_score_nothing():
    pruner = half(importance="taylor")
    fit(Net(), pruner, scores := Scores(pruner), max_epochs=3)
    pruned = {name: ~mask for name, mask in pruner.masks.items()}
    later = scores.found[1]
    assert all(int((score == 0).sum()) >= 12 for score in later.values())
    assert not same(later, scores.found[0])
    assert all(pruned[name].sum() > 0 for name in later)
