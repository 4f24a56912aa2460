"""Fits that prune by Taylor, Wanda and Fisher scores: which weights and units go, when they are taken, what is said."""

import copy
import pickle
import signal

import pytest
import torch
from helpers import PRUNABLE, Crash, Net, Watch, crash, crash_in, fit, half, loader, quiet_trainer, same
from scoring import Scores, Sum, hooks_of, plain_loop, still, two_layers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import (
    FixedFraction,
    PQIMonitor,
    PruningCallback,
    SAPCallback,
    Taylor,
    Wanda,
)
from lightning_sap.policies.base import Policy


def kept(pruner):
    return {name: mask.int().tolist() for name, mask in pruner.masks.items()}


class TestWhatGoes:
    """By hand; magnitude takes others."""

    def fit(self, importance, policy=None, scope="global", x=((1.0, 2.0),)):
        pruner = PruningCallback(policy or FixedFraction(0.5), importance=importance, scope=scope, rounds=1)
        data = TensorDataset(torch.tensor(x), torch.zeros(len(x), 1))
        module = Sum(two_layers(), still)
        fit(module, pruner, scores := Scores(pruner), max_epochs=2, train=DataLoader(data, 1))
        return pruner, scores

    def test_taylor_on_two_linear_layers(self):
        """The hidden layer is (5, 1) for the input (1, 2), and the gradients ((2, 4), (-8, -16)) and (5, 1)."""
        pruner, scores = self.fit("taylor")
        assert {n: s.tolist() for n, s in scores.last.items()} == {
            "net.0.weight": [[2.0, 8.0], [24.0, 16.0]],
            "net.1.weight": [[10.0, 8.0]],
        }
        assert kept(pruner) == {"net.0.weight": [[0, 0], [1, 1]], "net.1.weight": [[1, 0]]}
        assert kept(self.fit("magnitude")[0]) == {"net.0.weight": [[0, 0], [1, 0]], "net.1.weight": [[1, 1]]}

    def test_taylor_is_the_mean_of_the_magnitudes_of_the_steps(self):
        """Gradients of the second layer are the hidden layers (5, 1), (-5, -1) and (3, 9), whose mean is (1, 3)."""
        _, scores = self.fit("taylor", x=((1.0, 2.0), (-1.0, -2.0), (3.0, 0.0)))
        assert scores.last["net.1.weight"][0].tolist() == pytest.approx([2 * 13 / 3, 8 * 11 / 3])

    def test_wanda_keeps_the_weights_of_a_loud_channel(self):
        """The input's second channel is a hundred times as loud; magnitude takes the small weights that read it."""
        net = nn.Sequential(nn.Linear(3, 2, bias=False))
        net[0].weight.data = torch.tensor([[3.0, 0.5, 4.0], [-2.0, 0.1, 5.0]])
        data = TensorDataset(torch.tensor([[1.0, 100.0, 1.0], [-1.0, 100.0, 0.0]]), torch.zeros(2))
        found = {}
        for importance in ("wanda", "magnitude"):
            pruner = PruningCallback(FixedFraction(0.5), importance=importance, rounds=1)
            module = Sum(copy.deepcopy(net), still)
            fit(module, pruner, max_epochs=2, train=DataLoader(data, 1))
            found[importance] = kept(pruner)["net.0.weight"]
        assert found == {"wanda": [[0, 1, 0], [0, 1, 1]], "magnitude": [[1, 0, 1], [0, 0, 1]]}

    def test_amounts_are_those_of_the_index_of_the_scores(self):
        policy, seen = FixedFraction(0.5), []

        class Looks(Policy):
            p, q = 1.0, 2.0

            def __call__(self, sums, round):
                seen.append(sums)
                return policy(sums, round)

        self.fit("taylor", Looks())
        (sums,) = seen
        assert (int(sums.count), float(sums.sum_p * 2.0**sums.exponent)) == (6, 2 + 8 + 24 + 16 + 10 + 8)

    def test_effective_model_pruning_is_one_line(self):
        """(Σs)² / Σs² of the scores (2, 8, 24, 16, 10, 8) is 68² / 1064 = 4.3 effective weights: one of six goes."""
        pruner = SAPCallback(p=1, q=2, importance="taylor", rounds=1, scope="global")
        data = TensorDataset(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
        fit(Sum(two_layers(), still), pruner, max_epochs=2, train=DataLoader(data, 1))
        assert kept(pruner) == {"net.0.weight": [[0, 1], [1, 1]], "net.1.weight": [[1, 1]]}


class TestWhen:
    def test_scores_are_of_the_last_epoch_of_a_round(self):
        pruner = half(every_n_epochs=2, importance="taylor")
        counts = {}
        look = Watch(
            on_train_epoch_end=lambda trainer, _: counts.update(
                {trainer.current_epoch: {k: int(s["count"]) for k, s in pruner.session.state.gathered.items()}}
            )
        )
        fit(Net(), pruner, look, max_epochs=7)
        there = dict.fromkeys(PRUNABLE, 3)  # three steps an epoch
        assert counts == {0: {}, 1: there, 2: {}, 3: there, 4: {}, 5: {}, 6: {}}  # none where no pruning follows

    @pytest.mark.parametrize(("length", "counted"), [(5, 1), (6, 2), (10, 2), (11, 3)])
    def test_of_rounds_in_steps_the_last_fifth_counts(self, length, counted):
        found = []
        pruner = PruningCallback(FixedFraction(0.5), every_n_steps=length, rounds=1, importance="wanda")
        gathered = lambda: {k: int(s["count"]) for k, s in pruner.session.state.gathered.items()}  # noqa: E731
        look = Watch(on_train_batch_end=lambda trainer, _: found.append(gathered()))
        data = DataLoader(loader().dataset, 11)  # two batches of as many samples
        fit(Net(), pruner, look, max_epochs=length, train=data)
        there = [seen.get("net.0.weight", 0) for seen in found[:length]]
        assert there == [0] * (length - counted) + [11 * (i + 1) for i in range(counted)]
        assert not any(found[length:])

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_scores_are_those_of_a_plain_loop(self, importance):
        """Over two rounds of two epochs: those of the second, under the masks of the first."""
        module, twin = Net(), Net()
        pruner = half(every_n_epochs=2, importance=importance)
        fit(module, pruner, scores := Scores(pruner), max_epochs=4)
        batches = [[batch] for batch in loader()]
        wanted = plain_loop(twin, twin.configure_optimizers(), 2 * batches, 3, PRUNABLE)[importance]
        assert scores.found.keys() == {1}
        torch.testing.assert_close(scores.found[1], wanted)

    def test_nothing_is_left_on_module_and_optimizer_between_batches(self):
        module, pruner = Net(), half(importance="wanda")
        during, between = [], []
        look = Watch(
            on_before_backward=lambda *_: during.append(hooks_of(module)),
            on_train_batch_end=lambda *_: between.append(hooks_of(module)),
            on_validation_start=lambda *_: between.append(hooks_of(module)),
        )
        fit(module, pruner, look, val=loader(), max_epochs=3)
        assert during == [2] * 6 + [0] * 3  # the last round has no pruning behind it
        assert set(between) == {0}

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_nothing_is_left_after_an_exception(self, importance):
        module, pruner = Net(), half(importance=importance)
        trainer = quiet_trainer(pruner, crash_in("on_before_backward", 1))
        with pytest.raises(Crash):
            trainer.fit(module, loader())
        assert hooks_of(module) == 0
        assert not trainer.optimizers[0]._optimizer_step_pre_hooks

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_hooks_that_another_callback_leaves_behind_are_idle_in_later_fits(self, importance):
        """Its own ``on_exception`` fails, and ours is not called."""
        module, pruner = Net(), half(importance=importance)
        trainer = quiet_trainer(Watch(on_exception=lambda *_: crash()), pruner, crash_in("on_before_backward", 0))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(Crash):
            trainer.fit(module, loader())
        for number, handler in handlers.items():  # Lightning leaves its own
            signal.signal(number, handler)
        assert hooks_of(module) == (0 if importance == "taylor" else 2)
        fit(module, max_epochs=1)
        assert pruner.session.state.gathered == {}
        assert not getattr(pruner.session.gathering._gatherer, "_seen", None)
        pruner.session.gathering.close()
        assert hooks_of(module) == 0

    def test_what_is_gathered_is_freed_after_the_pruning(self):
        pruner, sizes = half(importance="taylor"), []
        look = Watch(on_train_batch_start=lambda *_: sizes.append(len(pruner.session.state.gathered)))
        fit(Net(), pruner, look, max_epochs=2)
        assert sizes == [0, 2, 2, 0, 0, 0]
        assert pruner.session.state.gathered == {}

    def test_validation_and_no_grad_do_not_count(self):
        class Looks(Net):
            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    self.net(1000 * batch[0])
                return super().training_step(batch, batch_idx)

        found = []
        for kind, options in ((Net, {}), (Looks, {"val": loader(seed=7), "val_check_interval": 1})):
            pruner = half(importance="wanda", rounds=1)
            fit(kind(), pruner, scores := Scores(pruner), max_epochs=2, **options)
            found.append(scores.found[0])
        assert same(*found)

    def test_fast_dev_run_and_sanity_check(self):
        pruner = half(importance="wanda")
        fit(Net(), pruner, val=loader(), fast_dev_run=2)
        assert pruner.remaining == 1.0
        pruner = half(importance="wanda", rounds=1)
        fit(Net(), pruner, val=loader(), max_epochs=2, num_sanity_val_steps=2)
        assert pruner.remaining == 0.5

    def test_the_index_that_is_told_is_that_of_the_weights(self):
        pruner, monitor = half(importance="wanda"), PQIMonitor(stop_on=None)
        fit(Net(), pruner, monitor)
        assert [row["pqi"] for row in monitor.rows()] == [record.pqi for record in pruner.history]

    def test_callbacks_are_pickled_and_copied_in_the_middle(self):
        pruner, copies = half(importance=Wanda()), []
        look = Watch(
            on_before_backward=lambda *_: copies.append((pickle.loads(pickle.dumps(pruner)), copy.deepcopy(pruner)))
        )
        fit(Net(), pruner, look, max_epochs=2)
        for twin in copies[1]:
            fit(module := Net(), twin, max_epochs=2)
            assert same(twin.masks, pruner.masks)
            assert hooks_of(module) == 0

    @pytest.mark.parametrize("importance", ["wanda", Taylor()])
    def test_copies_of_the_module_are_not_watched(self, importance):
        """Such as an average that begins in the middle of a batch."""
        twins, counts = [], []

        def copied(trainer, module):
            twins.append(copy.deepcopy(module.net))
            twins[-1](torch.randn(5, 6)).sum().backward()
            twins.append(pickle.loads(pickle.dumps(module.net)))

        pruner = half(importance=importance, rounds=1)
        look = Watch(
            on_before_backward=copied,
            on_train_epoch_end=lambda *_: counts.append(
                [int(sums["count"]) for sums in pruner.session.state.gathered.values()]
            ),
        )
        fit(Net(), pruner, look, max_epochs=2)
        assert counts == [[22, 22] if importance == "wanda" else [3, 3], []]
        hooks = [hook for twin in twins for part in twin for hook in part._forward_hooks.values()]
        assert bool(hooks) == (importance == "wanda")
        assert all(hook._function is None for hook in hooks)

    def test_what_an_interrupted_fit_saw_since_its_last_step_is_forgotten(self):
        module, pruner = Net(), half(importance="wanda", rounds=1)
        with pytest.raises(Crash):
            fit(module, pruner, Watch(on_before_optimizer_step=lambda *_: crash()), max_epochs=2)
        fit(Net(), pruner, scores := Scores(pruner), max_epochs=2)
        fit(Net(), other := half(importance="wanda", rounds=1), wanted := Scores(other), max_epochs=2)
        assert same(scores.found[0], wanted.found[0])

    def test_a_second_fit_gathers_anew(self):
        module, pruner = Net(), half(importance="taylor", rounds=1)
        fit(module, pruner, max_epochs=2)
        fit(module, pruner, max_epochs=2)
        assert pruner.remaining == 0.25
