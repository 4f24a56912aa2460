"""GrowAndPrune through whole fits: what is open when, how much is kept, and what it equals."""

import copy
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import Net, Scheduled, Watch, copied, fit, is_masked, loader, same
from lightning.pytorch import Callback, Trainer
from resuming import Remembers, records_of

from lightning_sap import (
    FixedFraction,
    GoOn,
    GrowAndPrune,
    PQIMonitor,
    Pruner,
    PruningCallback,
    RoundListener,
    SparsityInformed,
    Tolerance,
)
from lightning_sap.callbacks.monitor.meter import ends_closed
from lightning_sap.policies import Closing, Turn

TWO = ("net.0.weight", "net.3.weight")  # of 48 and 24 weights


def pruner_of(*policy, **options):
    return PruningCallback(GrowAndPrune(*(policy or (0.25, 2, 2))), **options)


class Looks(Watch):
    """Masks, weights and momenta with which each round begins, and weights after its first step."""

    def __init__(self, pruner):
        self.pruner, self.masks, self.weights, self.momenta, self.stepped = pruner, {}, {}, {}, {}
        super().__init__(on_train_batch_start=self.start, on_train_batch_end=self.end)

    def start(self, trainer, module):
        round = self.pruner.current_round()
        if round not in self.masks:
            state, named = trainer.optimizers[0].state, dict(module.named_parameters())
            self.masks[round], self.weights[round] = self.pruner.masks, copied(module.state_dict())
            self.momenta[round] = {
                name: state.get(named[name], {}).get("momentum_buffer", torch.zeros(())).clone() for name in TWO
            }

    def end(self, trainer, module):
        self.stepped.setdefault(self.pruner.current_round(), copied(module.state_dict()))


@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
def test_every_round_holds_exactly_its_share(scope):
    pruner = pruner_of(0.25, 2, 2, scope=scope)
    looks = Looks(pruner)
    fit(Net(), pruner, looks, max_epochs=6)
    kept = [{name: int(mask.sum()) for name, mask in looks.masks[t].items()} for t in range(5)]
    open_first, open_second = {TWO[0]: 48, TWO[1]: 6}, {TWO[0]: 12, TWO[1]: 24}
    assert kept == [open_first, open_second, open_first, open_second, {TWO[0]: 12, TWO[1]: 6}]
    assert [(r.weights, r.pruned, r.regrown, r.opened) for r in pruner.history] == [
        (54, 36, 18, [TWO[0]]),
        (36, 18, 36, [TWO[1]]),
        (54, 36, 18, [TWO[0]]),
        (36, 18, 0, [TWO[1]]),
        (18, None, None, []),
    ]
    assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 5)]


def test_the_largest_first_weights_are_kept_at_the_start():
    module = Net()
    first = module.net[3].weight.detach().abs().flatten().sort(descending=True).values
    pruner = pruner_of()
    looks = Looks(pruner)
    fit(module, pruner, looks, max_epochs=6)
    kept = looks.weights[0][TWO[1]]
    assert torch.equal(kept.abs().flatten().sort(descending=True).values[:6], first[:6])
    assert int((kept != 0).sum()) == 6


@pytest.mark.parametrize("reset", [True, False])
def test_returning_weights_start_at_zero_without_momentum_and_are_trained_then(reset):
    pruner = pruner_of(reset_optimizer=reset)
    looks = Looks(pruner)
    fit(Net(), pruner, looks, max_epochs=6)
    for t, name in ((1, TWO[1]), (2, TWO[0]), (3, TWO[1])):
        back = looks.masks[t][name] & ~looks.masks[t - 1][name]
        assert int(back.sum()) == (36 if name == TWO[0] else 18)
        assert not looks.weights[t][name][back].any()
        assert not (looks.momenta[t][name].expand_as(back)[back]).any()
        if name == TWO[1]:  # of the outputs, so that most have a gradient
            assert int((looks.stepped[t][name][back] != 0).sum()) >= 12
    assert looks.momenta[1][TWO[0]].any() != reset


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_part_and_one_cycle_is_one_shot_pruning_and_fine_tuning(scope):
    found = []
    for policy, options in ((GrowAndPrune(0.25, 1, 1), {}), (FixedFraction(0.75), {"rounds": 1})):
        module, pruner = Scheduled(), PruningCallback(policy, scope=scope, every_n_epochs=4, **options)
        fit(module, pruner, max_epochs=9)
        found.append((copied(module.state_dict()), pruner.masks, records_of(pruner)))
    (weights, masks, records), (expected_weights, expected_masks, expected) = found
    assert same(weights, expected_weights)
    assert same(masks, expected_masks)
    opened = [record.pop("opened") for record in records]
    assert opened == [list(TWO), []]
    assert records == [{key: value for key, value in each.items() if key != "opened"} for each in expected]
    assert pruner.remaining == 0.25


class NeverOpens(GrowAndPrune):
    """All is one part from which the other policy takes what it says, round by round."""

    def turn(self, sizes, kept, *, round, **_):
        return Turn((Closing(tuple(sizes), 0, sum(kept.values())),) if round else ())


@pytest.mark.filterwarnings("ignore:sap. target_remaining=0.25 is missed")
@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
@pytest.mark.parametrize("policy", [FixedFraction(0.3), SparsityInformed(eta_r=0.2)])
def test_without_opening_it_equals_the_plain_rounds(scope, policy):
    found = []
    for each, options in (
        (NeverOpens(0.25, 2, 2, policy), {}),
        (policy, {"rounds": 4, "every_n_epochs": 1}),
    ):
        module, pruner = Scheduled(), PruningCallback(each, scope=scope, **options)
        fit(module, pruner, max_epochs=6)
        found.append((copied(module.state_dict()), pruner.masks, [(r.pruned, r.weights) for r in pruner.history]))
    (weights, masks, counts), (expected_weights, expected_masks, expected_counts) = found
    assert counts == expected_counts
    assert same(masks, expected_masks)
    assert same(weights, expected_weights)


def test_learning_rate_starts_anew_in_every_round():
    pruner, rates = pruner_of(), {}

    def note(trainer, module):
        rates.setdefault(pruner.current_round(), trainer.optimizers[0].param_groups[0]["lr"])

    fit(Scheduled(), pruner, Watch(on_train_batch_start=note), max_epochs=6)
    assert list(rates) == [0, 1, 2, 3, 4]
    assert set(rates.values()) == {0.1}


def test_another_policy_says_how_many_stay_until_the_last_cycle():
    pruner = pruner_of(0.25, 2, 2, FixedFraction(0.5))
    fit(Net(), pruner, max_epochs=6)
    assert [record.weights for record in pruner.history] == [48 + 6, 24 + 24, 48 + 12, 12 + 24, 18]


def test_a_tenth_remains_exactly_when_the_index_closes():
    pruner = pruner_of(0.1, 2, 2, SparsityInformed())
    fit(Net(), pruner, max_epochs=6)
    assert pruner.history[-1].weights == 7
    assert sum(int(mask.sum()) for mask in pruner.masks.values()) == 7
    for before, after in zip(pruner.history, pruner.history[1:], strict=False):
        assert after.weights == before.weights - before.pruned + before.regrown


def test_floors_hold_for_what_is_closed():
    pruner = pruner_of(0.25, [["*"]], 1, min_remaining=0.25, scope="global")
    fit(Net(), pruner, max_epochs=4)
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == {TWO[0]: 12, TWO[1]: 6}


def test_remaining_goes_down_and_up_in_the_log_and_the_announcement_names_the_parts(caplog):
    logger, pruner = Remembers(), pruner_of()
    with caplog.at_level("INFO"):
        fit(Net(), pruner, logger=logger, log_every_n_steps=1, max_epochs=6)
    seen = [values["sap/remaining"] for _, values in logger.logged if "sap/remaining" in values]
    assert seen == pytest.approx([0.75, 0.5, 0.75, 0.5, 0.25, 0.25])
    assert "part 0, open in one of every 2 rounds: 48 weights in net.0.weight" in caplog.text
    assert "sap: 25.00% of 72 weights remain after 4 prunings; target_remaining=0.25 is met." in caplog.text


def test_rounds_in_steps_open_and_close_inside_an_epoch():
    pruner = pruner_of(0.25, 2, 1, every_n_steps=2)
    fit(Net(), pruner, max_epochs=2)
    assert [(r.first_step, r.last_step, r.weights) for r in pruner.history] == [(0, 1, 54), (2, 3, 36), (4, 5, 18)]


def test_a_second_fit_opens_the_first_part_again_and_says_so(caplog):
    module, pruner, said = Net(), pruner_of(0.25, 2, 1), "sap: 36 pruned weights come back as zeros, in net.0.weight: "
    with caplog.at_level("INFO"):
        fit(module, pruner, max_epochs=4)
        assert "come back as" not in caplog.text
        first, looks = pruner.masks, Looks(pruner)
        fit(module, pruner, looks, max_epochs=4)
    assert said in caplog.text
    assert [record.weights for record in pruner.history] == [54, 36, 18]
    assert torch.equal(looks.masks[0][TWO[1]], first[TWO[1]])
    assert not looks.weights[0][TWO[0]][~first[TWO[0]]].any()


def test_copies_prune_alike():
    first = pruner_of(0.25, 2, 1)
    found = []
    for pruner in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        module = Net()
        fit(module, pruner, max_epochs=4)
        found.append((copied(module.state_dict()), pruner.masks))
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


class Unfreezes(Watch):
    """The first layer is frozen for two epochs."""

    def __init__(self):
        super().__init__(on_fit_start=self.freeze, on_train_epoch_start=self.free)

    def freeze(self, trainer, module):
        module.net[0].requires_grad_(False)

    def free(self, trainer, module):
        module.net[0].requires_grad_(trainer.current_epoch >= 2)


def test_a_layer_that_is_trained_later_is_closed_in_the_end():
    """It joins dense at the end of the first round, in which it was trained."""
    pruner = pruner_of(0.25, [["net.*"]], 1)
    fit(Net(), Unfreezes(), pruner, max_epochs=8)
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == {TWO[0]: 12, TWO[1]: 6}


def test_what_has_no_gradient_stays_closed_and_its_part_is_exact_without_it():
    module = Net()
    module.extra = torch.nn.Linear(8, 2)  # closed at the start, and never used
    pruner = pruner_of(0.25, [["net.0.*"], ["net.3.*", "extra.*"]], 1)
    fit(module, pruner, max_epochs=4)
    assert pruner.history[1].opened == [TWO[1]]
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert kept == {TWO[0]: 12, TWO[1]: 6, "extra.weight": 4}


class TestMonitor:
    @pytest.mark.parametrize(("opened", "ends"), [([], True), ([], False), (["a"], True)])
    def test_a_phase_is_foretold_only_where_a_closed_round_ends(self, opened, ends):
        pruner = SimpleNamespace(opened=lambda: opened, ends_round=lambda trainer: ends)
        assert ends_closed(pruner, None) == (ends and not opened)

    def test_only_the_closed_round_is_judged_and_it_says_so(self, caplog):
        pruner, monitor = pruner_of(save_rounds=False), PQIMonitor(restore=False, log_layers=True, verbose=False)
        with caplog.at_level("INFO"):
            fit(Net(), pruner, monitor, val=loader(), max_epochs=6)
        assert "Only rounds in which all is pruned are judged" in caplog.text
        assert caplog.text.count("a part of the network is open in this round (net.0.weight)") == 1
        assert [record.phase for record in pruner.history] == [None] * 4 + ["regularization"]
        assert [row["phase"] for row in monitor.rows()] == [None] * 4 + ["regularization"]
        assert pruner.history[1].reason.startswith("Not judged: net.3.weight was open")
        assert [row["layers_remaining"][TWO[0]] for row in monitor.rows()] == [1.0, 0.25, 1.0, 0.25, 0.25]
        figure = monitor.plot("layers")
        drawn = figure.axes[1].collections[0].get_array()
        assert drawn[0].tolist() == [100, 25, 100, 25, 25]
        assert drawn[1].tolist() == [25, 100, 25, 100, 25]
        assert "| 0 | 0–0 | 54 | 75.00% |" in monitor.report()
        assert "| 36 | 18 | net.0 | – |" in monitor.report()
        assert pruner.history.rows()[1]["opened"] == TWO[1]

    def test_a_monitor_that_came_late_judges_no_open_round(self):
        monitor, pruner = PQIMonitor(stop_on=None), pruner_of()
        fit(Net(), pruner, max_epochs=6)
        told = monitor._rule.catch_up(pruner.history, 5, {TWO[0]: 48, TWO[1]: 24}, None)
        assert list(told) == [4]


class TestMistakes:
    def test_a_target_must_be_the_same_fraction(self):
        assert pruner_of(0.25, 2, target_remaining=0.25).options.target_remaining == 0.25
        assert pruner_of(0.25, 2).options.target_remaining == 0.25
        with pytest.raises(ValueError, match=r"target_remaining=0\.2 contradicts GrowAndPrune") as error:
            pruner_of(0.25, 2, target_remaining=0.2)
        assert "exactly 0.25 of the weights are kept. Leave target_remaining out" in str(error.value)

    def test_a_tolerance_is_refused(self):
        with pytest.raises(ValueError, match=r"tolerance=Tolerance\(.*contradicts GrowAndPrune.*Leave the tolerance"):
            pruner_of(tolerance=Tolerance("val_loss"))

    @pytest.mark.parametrize(
        "options", [{"masks": {"w": torch.tensor([True])}}, {"keep_zeros": True}, {"min_per_unit": 1}], ids=str
    )
    def test_what_an_open_part_would_leave_is_refused(self, options):
        (name,) = options
        with pytest.raises(ValueError, match=rf"^{name} contradicts GrowAndPrune.* Leave {name} out"):
            pruner_of(**options)

    @pytest.mark.parametrize("structure", ["unit", "2:4"])
    def test_whole_units_and_patterns_are_refused(self, structure):
        with pytest.raises(ValueError, match=r"contradicts .*GrowAndPrune"):
            pruner_of(structure=structure)

    def test_a_floor_above_the_share_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("min_remaining=0.5 is above target_remaining=0.25")):
            pruner_of(min_remaining=0.5)

    @pytest.mark.parametrize(
        ("partitions", "words"),
        [
            (3, "partitions=3 has nothing to open: the prunable parameters are net.0.weight, net.3.weight"),
            ([["*"], ["net.3.*"]], "part 1 of partitions, ('net.3.*',), has nothing to open"),
            ([["net.0.*"]], "opens none of net.3.weight, which no glob of partitions matches"),
        ],
    )
    def test_parts_that_do_not_fit_the_network_are_refused(self, partitions, words):
        with pytest.raises(ValueError, match=re.escape(words)):
            fit(Net(), pruner_of(0.25, partitions, 1), max_epochs=6)

    def test_a_plan_that_does_not_fit_says_what_would(self):
        with pytest.raises(ValueError, match=r"2 rounds of at least 1 .* take 3 epochs\. Give max_epochs=3 or more"):
            fit(Net(), pruner_of(0.25, 2), max_epochs=2)
        with pytest.raises(ValueError, match="rounds=3 contradicts partitions=2, cycles=2"):
            fit(Net(), pruner_of(rounds=3), max_epochs=9)

    def test_a_run_that_is_cut_off_says_that_its_target_is_missed(self):
        stop = Watch(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch >= 2))
        pruner = pruner_of()
        with pytest.warns(UserWarning, match="target_remaining=0.25 is missed: 75.00% of 72 weights remain after 2 of"):
            fit(Net(), pruner, stop, max_epochs=6)

    def test_only_holding_masks_opens_nothing(self):
        module, pruner = Net(), pruner_of(rounds=0, keep_zeros=True)
        with torch.no_grad():
            module.net[0].weight[:4] = 0
        fit(module, pruner, max_epochs=2)
        assert pruner.remaining == 48 / 72
        assert pruner.opened() == []
        assert is_masked(module.state_dict(), pruner.masks)

    def test_fast_dev_run_prunes_nothing(self):
        pruner = pruner_of()
        trainer = Trainer(fast_dev_run=True, callbacks=[pruner], accelerator="cpu", enable_progress_bar=False)
        trainer.fit(Net(), loader())
        assert pruner.remaining == 1.0

    def test_a_listener_may_not_limit_what_is_pruned(self):
        class AtMost(RoundListener, Callback):
            def on_round_end(self, trainer, pl_module, event):
                return GoOn(most=3)

        with pytest.raises(ValueError, match=r"most=3.*says how many weights are kept. Let it answer GoOn\(\)"):
            fit(Net(), pruner_of(), AtMost(), max_epochs=6)

    def test_a_loop_without_a_trainer_is_refused(self):
        with pytest.raises(ValueError, match=r"Pruner does not run GrowAndPrune.*Use PruningCallback"):
            Pruner(GrowAndPrune(0.25, 2))
