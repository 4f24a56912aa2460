"""A run that searches: what it does after each round, what it hands back, and what it says."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
from helpers import Rounds, Watch, copied, is_masked, loader, quiet_trainer, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from resuming import records_of
from searching import Scored, search, searching

from lightning_sap import GoOn, PQIMonitor, RoundListener, SAPCallback, Stop, Tolerance

# Of 72 weights a quarter goes after the dense round, then twice that share; round 2 is not sound.
TWO_SOUND = [0.9, 0.9, 0.9, 0.5, 0.9, 0.9]  # the dense round takes the first two epochs


def lefts(pruner):
    return [record.weights for record in pruner.history]


def backs(pruner):
    return [record.round for record in pruner.history if record.taken_back]


class TestRounds:
    def test_sound_rounds_are_pruned_further_and_unsound_ones_taken_back(self):
        _, pruner, _ = search(scores=TWO_SOUND, pruner=searching(every_n_epochs=1))
        # 72; a quarter of each layer goes: 54; half: 27; taken back to 54, and of the 27 that went a quarter goes again
        assert lefts(pruner)[:4] == [72, 54, 27, 48]
        assert backs(pruner) == [2]
        assert [record.sound for record in pruner.history] == [True, True, False, True, True]

    def test_the_dense_round_takes_a_quarter(self):
        _, pruner, _ = search(scores=[0.9] * 8)
        assert [(r.first_epoch, r.last_epoch) for r in pruner.history][:3] == [(0, 1), (2, 2), (3, 3)]

    def test_going_back_restores_weights_buffers_and_masks_and_starts_the_rest_anew(self):
        module, pruner = Scored(TWO_SOUND, period=6), searching(reset_optimizer=True)
        rounds, starts, rates = Rounds(pruner), {}, {}
        states = {}

        def start(trainer, module):
            starts.setdefault(pruner.current_round(), copied(module.state_dict()))
            states.setdefault(pruner.current_round(), len(trainer.optimizers[0].state))
            rates.setdefault(pruner.current_round(), trainer.optimizers[0].param_groups[0]["lr"])

        search(Watch(on_train_batch_start=start), rounds, scores=TWO_SOUND, pruner=pruner, module=module)
        kept, masks = rounds.states[1], starts[3]
        for name, tensor in masks.items():
            mask = rounds.masks[3][0].get(name)
            expected = kept[name] if mask is None else kept[name] * mask
            assert torch.equal(tensor, expected), name
        assert all(
            (before | ~after).all()
            for before, after in zip(rounds.masks[1][0].values(), rounds.masks[3][0].values(), strict=True)
        )
        assert (states[3], rates[3]) == (0, rates[0])

    def test_a_near_miss_trains_on_under_the_same_masks(self):
        _, pruner, _ = search(scores=[0.9, 0.9, 0.885, 0.892, 0.9, 0.9])
        assert lefts(pruner)[:3] == [72, 54, 54]
        assert [record.sound for record in pruner.history][:3] == [True, False, True]
        assert backs(pruner) == []

    def test_a_round_that_is_nan_is_taken_back(self):
        _, pruner, _ = search(scores=[0.9, 0.9, math.nan, 0.9, 0.9, 0.9])
        assert backs(pruner) == [1]
        assert pruner.history[1].sound is False
        assert pruner.history[-1].sound is True

    def test_weights_that_are_not_finite_are_taken_back(self):
        module = Scored([0.9, 0.9, math.nan, 0.9, 0.9, 0.9])

        def ruin(trainer, module):
            if trainer.current_epoch == 2:
                module.net[0].bias.data.fill_(math.nan)
                module.net[0].weight.data[module.net[0].weight != 0] = math.nan

        module, pruner, _ = search(Watch(on_train_batch_end=ruin), scores=module.scores, module=module)
        assert backs(pruner) == [1]
        assert all(parameter.isfinite().all() for parameter in module.parameters())

    @pytest.mark.parametrize("end", [4, 5, 6])
    def test_the_sparsest_sound_round_is_handed_back(self, end):
        scores = [0.9, 0.9, 0.9, 0.5, 0.9, 0.5][:end]
        pruner = searching()
        rounds = Rounds(pruner)
        module, _, _ = search(rounds, scores=scores, pruner=pruner)
        sound = [record for record in pruner.history if record.sound]
        best = min(sound, key=lambda record: record.weights)
        assert same(module.state_dict(), rounds.states[best.round])
        assert same(pruner.masks, rounds.masks[best.round][0])
        assert pruner.remaining == best.remaining
        if pruner.history[-1].sound is False:
            assert pruner.history.restored == best
            assert pruner.history[-1].taken_back

    def test_a_search_that_is_over_trains_the_sparsest_network_for_what_is_left(self):
        # 72, 54, 27, and what follows fails: each time a quarter of the step goes, until that is not worth a round
        _, pruner, _ = search(scores=[0.9] * 6 + [0.5] * 3 + [0.9] * 5)
        last = pruner.history[-1]
        assert last.last_epoch - last.first_epoch > 1
        assert (last.pruned, last.sound, last.taken_back) == (None, True, False)
        assert pruner.remaining == min(record.remaining for record in pruner.history if record.sound)


class TestMetrics:
    def test_a_metric_that_is_never_logged_is_named_after_the_first_epoch(self):
        ended = []
        with pytest.raises(
            ValueError, match=r"Tolerance\(monitor='f1'\): no such metric is logged; those logged are \["
        ):
            search(
                Watch(on_train_epoch_end=lambda t, _: ended.append(t.current_epoch)),
                pruner=searching(Tolerance("f1")),
                scores=[0.9] * 8,
            )
        assert ended == [0]

    def test_a_metric_of_every_second_epoch_is_waited_for(self):
        with pytest.warns(UserWarning, match="in round 1 'val_acc' was not logged, so that it cannot be judged"):
            _, pruner, _ = search(scores=[0.9] * 8, check_val_every_n_epoch=2)
        assert [record.metric is None for record in pruner.history] == [False, True, False, True, False, True, False]
        assert [record.sound for record in pruner.history if record.metric is None] == [None, None, None]
        lefts_of = lefts(pruner)
        assert lefts_of[1] == lefts_of[2]
        assert pruner.history[-1].sound is True

    def test_a_validation_that_leaves_the_metric_out_is_not_judged_by_an_old_value(self):
        with pytest.warns(UserWarning, match="in round 2 'val_acc' was not logged"):
            _, pruner, _ = search(scores=[0.9, 0.9, 0.9, None, 0.5, 0.9, 0.9, 0.9])
        assert [record.metric is None for record in pruner.history] == [False, False, True, False, False, False, False]
        assert backs(pruner) == [3]

    def test_rounds_of_a_free_length_have_a_validation(self):
        _, pruner, _ = search(scores=[0.9] * 40, check_val_every_n_epoch=5, pruner=searching(every_n_epochs=None))
        assert all(record.metric is not None for record in pruner.history)
        assert [(r.first_epoch, r.last_epoch) for r in pruner.history][:2] == [(0, 9), (10, 14)]

    def test_a_validation_before_the_last_steps_of_a_round_is_told(self):
        with pytest.warns(UserWarning, match="judged by a 'val_acc' that was measured before its last steps"):
            search(scores=[0.9] * 8, pruner=searching(every_n_steps=4))  # epochs of three steps

    @pytest.mark.filterwarnings("ignore:sap. no network that was pruned further")
    def test_dense_rounds_without_a_known_end_are_told(self):
        tolerance = Tolerance("val_acc", reference=0.99)
        pruner = searching(tolerance, every_n_steps=3)
        with pytest.warns(UserWarning, match="after 8 dense rounds 'val_acc' is 0.9 at best, not within 0.01 of the"):
            search(
                Watch(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == 9)),
                scores=[0.9] * 10,
                pruner=pruner,
                max_epochs=-1,
            )
        assert lefts(pruner) == [72] * 10

    def test_a_reference_that_is_reached_late(self):
        tolerance = Tolerance("val_acc", reference=0.95)
        _, pruner, _ = search(scores=[0.9, 0.9, 0.92, 0.94, 0.94, 0.94, 0.94, 0.94], pruner=searching(tolerance))
        assert lefts(pruner)[:4] == [72, 72, 72, 54]
        assert [record.sound for record in pruner.history][:4] == [False, False, True, True]

    def test_a_reference_that_is_not_reached_is_given_up_at_half_of_the_training(self):
        tolerance = Tolerance("val_acc", reference=0.99)
        half = "half of the training is over, and 'val_acc' of the dense network is 0.92 at best"
        end = "the reference was given up, and what is handed back is 0.075 worse than its 0.99"
        with pytest.warns(UserWarning, match=end), pytest.warns(UserWarning, match=half):
            _, pruner, _ = search(scores=[0.9, 0.9, 0.91, 0.92, *[0.915] * 4], pruner=searching(tolerance))
        assert lefts(pruner)[:4] == [72, 72, 72, 54]
        assert pruner.history[2].yardstick == pytest.approx(0.92)


class TestWhatIsLogged:
    def test_scale_soundness_and_the_best_are_logged_every_epoch(self):
        seen = []
        look = Watch(
            on_train_epoch_end=lambda t, _: seen.append(
                {key: float(t.callback_metrics[f"sap/{key}"]) for key in ("scale", "sound", "best_remaining")}
            )
        )
        search(look, scores=TWO_SOUND)
        assert [values["sound"] for values in seen] == [1, 1, 1, 0, 1, 1]
        bests = [round(72 * values["best_remaining"]) for values in seen]
        assert bests == [72, 72, 54, 54, 48, 36]  # of the rounds that have ended
        assert seen[3]["scale"] == 0.5  # after the failure a quarter of 2

    def test_the_last_line_says_what_was_found(self, caplog):
        with caplog.at_level("INFO"):
            search(scores=TWO_SOUND)
        (line,) = [r.getMessage() for r in caplog.records if "remain at val_acc" in r.getMessage()]
        assert "as good as the best sound round (0.9; drop=0.01); 1 of 5 rounds taken back." in line

    def test_the_first_line_says_what_is_searched_for(self, caplog):
        with caplog.at_level("INFO"):
            search(pruner=searching(Tolerance("val_acc", 0.02, reference=0.9)))
        assert any(
            "tolerance: val_acc, better when larger, at most 0.02 below the reference 0.9" in r.getMessage()
            for r in caplog.records
        )

    def test_no_sound_pruned_network_is_a_warning(self):
        with pytest.warns(UserWarning, match="no network that was pruned further kept the tolerance, and the first"):
            _, pruner, _ = search(scores=[0.9, 0.5, 0.5, 0.5])
        assert pruner.remaining == 1.0

    def test_validation_gives_the_metric_of_the_record(self):
        module, pruner = Scored(TWO_SOUND), searching()
        _, _, trainer = search(scores=TWO_SOUND, pruner=pruner, module=module)
        (found,) = trainer.validate(module, dataloaders=trainer.val_dataloaders, verbose=False)
        assert found["val_acc"] == pytest.approx(pruner.history[-1].metric)


class TestBesideIt:
    def test_a_target_ends_the_search(self):
        _, pruner, _ = search(scores=[0.9] * 8, pruner=searching(target_remaining=0.5))
        assert pruner.remaining == 0.5
        assert lefts(pruner)[-1] == 36

    def test_a_target_that_is_not_sound_is_a_warning(self):
        with pytest.warns(UserWarning, match=r"target_remaining=0.5 is missed: 75.00% of 72 weights remain"):
            _, pruner, _ = search(
                scores=[0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5], pruner=searching(target_remaining=0.5)
            )
        assert pruner.remaining >= 0.5

    def test_min_remaining_holds_in_each_layer(self):
        _, pruner, _ = search(scores=[0.9] * 12, pruner=searching(min_remaining=0.25))
        assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == {"net.0.weight": 12, "net.3.weight": 6}

    def test_rewound_weights_start_each_pruned_round_and_a_near_miss_trains_on(self):
        pruner = searching(rewind_weights="init")
        first, starts, rounds = {}, {}, Rounds(pruner)

        def start(trainer, module):
            first.update(first or copied(module.state_dict()))
            starts.setdefault(pruner.current_round(), copied(module.state_dict()))

        scores = [0.9, 0.9, 0.885, 0.9, 0.9, 0.9]
        search(Watch(on_train_batch_start=start), rounds, scores=scores, pruner=pruner)
        mask = rounds.masks[1][0]["net.0.weight"]
        assert torch.equal(starts[1]["net.0.weight"], first["net.0.weight"] * mask)
        assert torch.equal(starts[2]["net.0.weight"], rounds.states[1]["net.0.weight"])

    def test_rounds_in_steps(self):
        pruner = searching(every_n_steps=2)
        search(scores=[0.9] * 8, pruner=pruner, val_check_interval=1)
        assert pruner.history[0].last_step == 5  # a quarter of 24 steps
        assert [record.unit for record in pruner.history] == ["step"] * len(pruner.history)
        assert pruner.history[-1].sound is True

    def test_saved_rounds_can_be_restored(self, tmp_path):
        pruner = searching(save_rounds=True, dirpath=tmp_path / "rounds")
        _, _, trainer = search(scores=TWO_SOUND, pruner=pruner, default_root_dir=tmp_path)
        assert trainer.current_epoch == 6
        assert pruner.restore_round(2).taken_back
        assert pruner.remaining == 27 / 72

    def test_the_monitor_judges_sound_rounds_only(self):
        pruner, monitor = searching(), PQIMonitor(monitor="val_acc", patience=1, verbose=False)
        _, _, trainer = search(monitor, scores=TWO_SOUND, pruner=pruner, enable_checkpointing=True)
        assert trainer.current_epoch == 6
        assert [record.phase is None for record in pruner.history] == [
            record.sound is False for record in pruner.history
        ]

    def test_early_stopping_leaves_the_sparsest_sound_network(self):
        pruner = searching()
        rounds = Rounds(pruner)
        stop = EarlyStopping("val_acc", mode="max", patience=1, stopping_threshold=None)
        with pytest.warns(UserWarning, match="the search was cut off: .* since EarlyStopping"):
            module, _, trainer = search(rounds, stop, scores=[0.9, 0.91, 0.905, 0.5, 0.5, 0.5], pruner=pruner)
        assert trainer.current_epoch < 6
        assert is_masked(module.state_dict(), pruner.masks)
        best = min((r for r in pruner.history if r.sound), key=lambda r: r.weights)
        assert same(module.state_dict(), rounds.states[best.round])

    @pytest.mark.parametrize("order", [1, -1])
    def test_averages_are_handed_back(self, order):
        pruner, averages = searching(), {}

        def look(trainer, module):  # before the average is taken out again
            averages[pruner.current_round()] = copied(module.state_dict())

        module, callbacks = Scored([0.9, 0.9, 0.9, 0.5]), [pruner, EMAWeightAveraging(decay=0.5)][::order]
        trainer = quiet_trainer(Watch(on_validation_epoch_end=look), *callbacks, max_epochs=4, num_sanity_val_steps=0)
        trainer.fit(module, loader(), loader())
        best = pruner.history.restored
        assert (best.round, pruner.history[-1].taken_back) == (2, True)
        assert same(module.state_dict(), averages[2])
        assert is_masked(module.state_dict(), pruner.masks)

    def test_manual_optimization(self):
        class Manual(Scored):
            automatic_optimization = False

            def __init__(self, scores):
                super().__init__(scores)
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        _, pruner, _ = search(scores=TWO_SOUND, module=Manual(TWO_SOUND))
        assert lefts(pruner)[:4] == [72, 54, 27, 48]

    @pytest.mark.parametrize("round", [2, 3])
    def test_training_that_goes_on_after_a_stop_searches_on(self, round):
        class StopsAt(RoundListener, Callback):
            def on_round_end(self, trainer, pl_module, event):
                return Stop() if event.record.round == round else GoOn()

        scores = [0.9, 0.9, 0.9, None, 0.5, 0.5, 0.5]  # round 2 is not judged, and the next one not sound
        with pytest.warns(UserWarning, match="in round 2 'val_acc' was not logged"):
            alone, pruner, _ = search(scores=scores)
        with pytest.warns(UserWarning, match="in round 2 'val_acc' was not logged"):
            module, stopped, trainer = search(StopsAt(), scores=scores, min_epochs=7)
        assert trainer.current_epoch == 7
        assert lefts(stopped) == lefts(pruner)
        assert same(module.state_dict(), alone.state_dict())


class TestAsACallback:
    @pytest.mark.parametrize("copy_of", [deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
    def test_copies_search_as_the_original(self, copy_of):
        first = searching()
        second = copy_of(first)
        a, _, _ = search(scores=TWO_SOUND, pruner=first)
        b, _, _ = search(scores=TWO_SOUND, pruner=second)
        assert same(a.state_dict(), b.state_dict())
        assert records_of(first) == records_of(second)

    def test_a_second_fit_searches_from_the_network_handed_back(self):
        module, pruner = Scored(TWO_SOUND), searching()
        search(scores=TWO_SOUND, pruner=pruner, module=module)
        left = pruner.history[-1].weights
        search(scores=[0.9] * 4, pruner=pruner, module=module)
        assert pruner.history[0].weights == left
        assert pruner.history[-1].weights < left

    def test_fast_dev_run_prunes_nothing(self):
        _, pruner, _ = search(scores=[0.9], fast_dev_run=True)
        assert pruner.remaining == 1.0

    def test_wrong_tolerances_are_refused(self):
        with pytest.raises(
            TypeError, match=r"tolerance must be None or a Tolerance such as Tolerance\('val_acc'\), got 0.01"
        ):
            SAPCallback(tolerance=0.01)
        with pytest.raises(ValueError, match="rounds=0 only holds masks, and a tolerance searches"):
            SAPCallback(tolerance=Tolerance("val_acc"), rounds=0)


class TestResume:
    SCORES = [0.9, 0.9, 0.9, 0.5, 0.885, 0.9, 0.5, 0.9, 0.5]

    def trained(self, folder, hook, **options):
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=hook == "train epoch end")
        pruner = searching(rewind_weights=options.pop("rewind_weights", None))
        module = Scored(self.SCORES, period=9)
        search(saver, scores=self.SCORES, pruner=pruner, module=module, enable_checkpointing=True, **options)
        return module, pruner

    @pytest.mark.parametrize("hook", ["validation end", "train epoch end"])
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_a_search_killed_at_any_epoch_and_resumed_equals_the_unbroken_one(self, tmp_path, hook, rewind):
        whole, pruner = self.trained(tmp_path / "whole", hook, rewind_weights=rewind)
        assert len(backs(pruner)) >= 2
        for epoch in range(8):
            file = tmp_path / "whole" / f"epoch={epoch}.ckpt"
            again, resumed = self.trained(tmp_path / f"{epoch}", hook, ckpt_path=file, rewind_weights=rewind)
            assert same(again.state_dict(), whole.state_dict()), epoch
            assert same(resumed.masks, pruner.masks), epoch
            assert records_of(resumed) == records_of(pruner), epoch

    def test_a_tolerance_may_be_added_to_a_run_that_goes_on(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        plain = SAPCallback(every_n_epochs=1, scope="layer")
        search(saver, scores=[0.9] * 6, pruner=plain, enable_checkpointing=True)
        _, pruner, _ = search(scores=[0.9] * 6, pruner=searching(), ckpt_path=tmp_path / "epoch=2.ckpt")
        assert [record.sound for record in pruner.history][:2] == [None, None]
        assert pruner.history[-1].sound is True
