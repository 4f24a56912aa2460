"""What a run carries: checkpoints, resumed runs, copies and pickles."""

import copy
import io
import logging
import pickle
import pkgutil
import re
import zipfile

import pytest
import torch
from helpers import (
    BATCHES,
    OPTIMIZERS,
    PRUNABLE,
    Net,
    Watch,
    all_masked_are_zero,
    copied,
    data,
    fit,
    loader,
    mlp,
    parameters,
    quiet_trainer,
    same,
    seeded,
    survivors,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import STEPS_OF_A_PRUNING
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.masks import MaskSet
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan

STATE = "lightning_sap/sap"
KEYS = {
    "masks", "plan", "round", "round_step", "count", "pqi_after_pruning", "first_weights", "history", "metrics",
    "validated", "validation_keys", "folder", "lr", "note", "schedules", "options", "waiting",
}  # fmt: skip


def half(**options):
    return PruningCallback(FixedFraction(0.5), **{"every_n_epochs": 1, **options})


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=6)]


class Killed(Exception):
    """The end of a run that is to be resumed."""


def kill_in(hook, epoch):
    def die(trainer, module):
        if trainer.current_epoch == epoch:
            raise Killed

    return Watch(**{hook: die})


def run(build_module, build_pruner, folder, *, killed=None, ckpt_path=None, validate=False, max_epochs=6):
    """A run that saves every epoch; `killed` ends it after that epoch's file was written."""
    module, pruner, monitor = build_module(), build_pruner(), PQIMonitor(stop_on=None, log_layers=True)
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not validate)
    trainer = quiet_trainer(
        pruner, monitor, saver, *([] if killed is None else [killed]), max_epochs=max_epochs, enable_checkpointing=True,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=ckpt_path)
    return module, pruner, monitor, trainer


def records(pruner):
    """The history without how long things took."""
    return [{**vars(record), "seconds": None} for record in pruner.history]


class TestResume:
    @pytest.mark.parametrize("epoch", [2, *(pytest.param(other, marks=pytest.mark.slow) for other in (0, 1, 3, 4))])
    @pytest.mark.parametrize("validate", [False, True], ids=["epoch-end file", "validation-end file"])
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_a_killed_run_ends_bit_equal(self, tmp_path, rewind, validate, epoch):
        def pruner():
            return half(every_n_epochs=2, rewind_weights=rewind, reset_optimizer=False)

        module, whole, monitor, trainer = run(Scheduled, pruner, tmp_path / "whole", validate=validate)
        # the savers come last, so the file of the epoch before the next one's first batch is there
        killer = kill_in("on_train_epoch_start", epoch + 1)
        with pytest.raises(Killed):
            run(Scheduled, pruner, tmp_path / "part", killed=killer, validate=validate)
        file = tmp_path / "part" / f"epoch={epoch}.ckpt"
        other, resumed, second, last = run(
            lambda: Scheduled(seeded(mlp, 7)), pruner, tmp_path / "part", ckpt_path=file, validate=validate
        )
        assert same(other.state_dict(), module.state_dict())
        assert same(resumed.masks, whole.masks)
        assert sum(survivors(resumed).values()) == 18
        assert records(resumed) == records(whole)
        assert second.rows() == monitor.rows()
        assert last.global_step == trainer.global_step
        rates = [t.optimizers[0].param_groups[0]["lr"] for t in (trainer, last)]
        assert rates[0] == rates[1]

    @pytest.mark.filterwarnings("ignore:sap. after pruning .* no weights")
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("rewind", ["init", 1])
    def test_with_every_optimizer_and_late_rewinding(self, tmp_path, optimizer, rewind):
        def module():
            return Net(optimizer=OPTIMIZERS[optimizer])

        def pruner():
            return SAPCallback(rounds=2, rewind_weights=rewind, target_remaining=0.3)

        first, whole, *_ = run(module, pruner, tmp_path)
        second, resumed, *_ = run(module, pruner, tmp_path / "again", ckpt_path=tmp_path / "epoch=2.ckpt")
        assert same(first.state_dict(), second.state_dict())
        assert same(whole.masks, resumed.masks)
        assert sum(survivors(resumed).values()) == round(0.3 * 72)

    @pytest.mark.parametrize("step", range(1, 11))
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_from_any_batch_of_an_epoch(self, tmp_path, rewind, step):
        """All batches are alike: a DataLoader does not know where it stopped."""
        alike = DataLoader([data(1)[0]] * 24, 8)

        def part(folder, **options):
            module, pruner = Scheduled(), half(rewind_weights=rewind, every_n_epochs=2)
            saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
            fit(module, pruner, saver, train=alike, enable_checkpointing=True, **options)
            return module, pruner

        first, whole = part(tmp_path)
        second, resumed = part(tmp_path / "again", ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(first.state_dict(), second.state_dict())
        assert same(whole.masks, resumed.masks)

    def test_more_epochs_do_not_move_the_rounds(self, tmp_path):
        _, whole, *_ = run(Net, lambda: half(rounds=2, every_n_epochs=None), tmp_path, max_epochs=6)
        _, resumed, *_ = run(
            Net, lambda: half(rounds=2, every_n_epochs=None), tmp_path / "b", ckpt_path=tmp_path / "epoch=1.ckpt",
            max_epochs=12,
        )  # fmt: skip
        assert [(r.first_epoch, r.last_epoch) for r in resumed.history] == [(0, 1), (2, 3), (4, 11)]
        assert same(resumed.masks, whole.masks)

    def test_a_run_that_was_over_hands_back_its_masks(self, tmp_path):
        module, whole, *_ = run(Net, half, tmp_path, max_epochs=4)
        other, resumed, *_ = run(Net, half, tmp_path / "b", ckpt_path=tmp_path / "epoch=3.ckpt", max_epochs=4)
        assert same(resumed.masks, whole.masks)
        assert same(other.state_dict(), module.state_dict())
        assert resumed.remaining == 0.125

    def test_a_file_from_before_there_was_a_pruner_starts_its_rounds_there(self, tmp_path):
        fit(Net(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), enable_checkpointing=True, max_epochs=2)
        pruner = half(rounds=2, every_n_epochs=None)
        fit(Net(), pruner, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=8)
        assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(2, 3), (4, 5), (6, 7)]

    def test_two_callbacks_take_up_their_own_states(self, tmp_path):
        def both():
            return half(name="a", include="net.0.*"), SAPCallback(name="b", include="net.3.*", rounds=3)

        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        first, second = Net(), Net(seeded(mlp, 7))
        whole, resumed = both(), both()
        fit(first, *whole, saver, enable_checkpointing=True)
        fit(second, *resumed[::-1], ckpt_path=tmp_path / "epoch=1.ckpt")
        assert same(first.state_dict(), second.state_dict())
        assert [same(a.masks, b.masks) for a, b in zip(whole, resumed, strict=True)] == [True, True]

    def test_a_changed_amount_applies_from_the_next_round_and_is_logged(self, tmp_path, caplog):
        run(Net, half, tmp_path, max_epochs=4)
        pruner = PruningCallback(FixedFraction(0.75), every_n_epochs=1, min_remaining=0.1)
        with caplog.at_level(logging.INFO):
            fit(Net(), pruner, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert (
            "sap: changed since the checkpoint, from the next round on: policy=FixedFraction(fraction=0.75) "
            "(was FixedFraction(fraction=0.5)), min_remaining=0.1 (was 0.0)" in caplog.messages
        )
        # 24 and 12 survived the file's one pruning; then 18 of 24 would go, but 5 stay; 9 of 12, and 3 stay
        assert survivors(pruner) == {"net.0.weight": 5, "net.3.weight": 3}

    def test_the_plan_stays_and_that_is_logged(self, tmp_path, caplog):
        run(Net, half, tmp_path, max_epochs=4)
        pruner = half(rounds=1, every_n_epochs=2)
        with caplog.at_level(logging.INFO):
            fit(Net(), pruner, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert "sap: a run that is resumed keeps the checkpoint's rounds=None (not 1), every_n_epochs=1 (not 2)" in (
            caplog.messages
        )
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("old", "new", "epoch", "message"),
        [
            (
                {},
                {"rewind_weights": "init"},
                0,
                "after 0 epochs, and the checkpoint was saved with rewind_weights=None.",
            ),
            ({}, {"rewind_weights": 1}, 2, "after 1 epochs, and the checkpoint was saved with rewind_weights=None."),
            ({"rewind_weights": 1}, {"rewind_weights": "init"}, 2, "after 0 epochs, and the checkpoint was saved with"),
            (
                {},
                {"lr_schedule": "restart"},
                2,
                "lr_schedule='restart' cannot take the place of 'squeeze' in the middle",
            ),
            ({}, {"rewind_weights": 3}, 0, "rewind_weights=3 lies beyond the first round, which has 2 epochs"),
            ({}, {"target_remaining": 0.9}, 2, "that is 65 of 72 weights, and only 36 survive already."),
            ({}, {"target_remaining": 0.1}, 4, "that is 7 of 72 weights, and there are no prunings left."),
        ],
    )
    def test_what_cannot_change_any_more_is_refused(self, tmp_path, old, new, epoch, message):
        run(Scheduled, lambda: half(every_n_epochs=2, **old), tmp_path)
        steps = []
        look = Watch(on_train_batch_start=lambda t, m: steps.append(t.global_step))
        file = tmp_path / f"epoch={epoch}.ckpt"
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(Scheduled(), half(every_n_epochs=2, **new), look, ckpt_path=file, max_epochs=6)
        assert steps == []

    @pytest.mark.parametrize(
        ("old", "new"), [({"rewind_weights": "init"}, {"rewind_weights": 0}), ({}, {"lr_schedule": "squeeze"})]
    )
    def test_other_words_for_the_same_change_nothing(self, tmp_path, old, new):
        whole, *_ = run(Scheduled, lambda: half(every_n_epochs=2, **old), tmp_path)
        module, resumed = Scheduled(), half(every_n_epochs=2, **new)
        fit(module, resumed, PQIMonitor(stop_on=None), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=6)
        assert same(module.state_dict(), whole.state_dict())

    def test_auto_goes_on_with_what_it_chose_before(self, tmp_path, caplog):
        """However long training is now: in mid-run the schedule must not change its course."""
        run(Scheduled, lambda: half(every_n_epochs=2), tmp_path)
        file = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
        (schedule,) = file["callbacks"][STATE]["schedules"]
        assert schedule["mode"] == "squeeze"
        schedule["mode"] = "restart"
        torch.save(file, tmp_path / "other.ckpt")
        with caplog.at_level(logging.INFO):
            fit(Scheduled(), half(every_n_epochs=2), ckpt_path=tmp_path / "other.ckpt", max_epochs=6)
        assert "CosineAnnealingLR: restart (as before the checkpoint)" in caplog.text

    def test_a_run_that_steps_end_keeps_its_plan(self, tmp_path):
        """Lightning alone does not resume such a run bit for bit."""

        def rates(*callbacks, **options):
            seen, pruner = [], half(every_n_epochs=None, rounds=1, lr_schedule="squeeze")
            look = Watch(on_train_epoch_start=lambda t, m: seen.append(t.optimizers[0].param_groups[0]["lr"]))
            fit(Scheduled(), pruner, look, *callbacks, max_epochs=20, max_steps=6 * BATCHES, **options)
            assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(0, 2), (3, 5)]
            return seen

        whole = rates(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), enable_checkpointing=True)
        assert rates(ckpt_path=tmp_path / "epoch=3.ckpt") == whole[4:]
        assert whole[:3] == whole[3:]

    def test_weights_are_not_rewound_where_that_is_not_wanted_any_more(self, tmp_path):
        run(Net, lambda: half(every_n_epochs=2, rewind_weights="init"), tmp_path)
        pruner, states = half(every_n_epochs=2), []
        keep = Watch(
            on_train_epoch_end=lambda t, m: states.append(copied(m.state_dict())),
            on_train_batch_start=lambda t, m: states.append(copied(m.state_dict())),
        )
        module = Net()
        fit(module, pruner, keep, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=6)
        end, start = states[BATCHES], states[BATCHES + 1]  # of the epoch before the pruning, and after it
        assert torch.equal(start["net.0.bias"], end["net.0.bias"])

    def test_unchanged_options_are_not_logged(self, tmp_path, caplog):
        run(Net, half, tmp_path, max_epochs=4)
        with caplog.at_level(logging.INFO):
            fit(Net(), half(), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert "changed since" not in caplog.text

    def test_weights_that_came_dense_are_masked_before_the_first_batch(self, tmp_path):
        """As those of a file whose weights someone averaged."""
        run(Net, half, tmp_path, max_epochs=4)
        module, pruner, clean = Net(), half(), []
        module.on_load_checkpoint = lambda checkpoint: checkpoint["state_dict"]["net.0.weight"].fill_(1.0)
        look = Watch(on_train_start=lambda t, m: clean.append(all_masked_are_zero(t, m)))
        fit(module, pruner, look, ckpt_path=tmp_path / "epoch=2.ckpt")
        assert clean == [True]
        assert int(pruner.masks["net.0.weight"].sum()) == 6


class TestFilesOfAnEnd:
    """Files that are saved when training is over: what goes on from there is as if it had not ended."""

    @pytest.mark.parametrize("schedule", ["restart", "squeeze", "keep"])
    @pytest.mark.parametrize("saved", ["in on_train_end", "after fit"])
    def test_they_are_resumed_bit_for_bit(self, tmp_path, saved, schedule):
        def pruner():
            return half(every_n_epochs=2, rounds=1, lr_schedule=schedule)

        def fits(pruner, *callbacks, **options):
            module = Scheduled()
            return module, fit(module, pruner, PQIMonitor(stop_on=None), *callbacks, max_epochs=6, **options)

        stop = Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", t.current_epoch == 3))
        keep = Watch(on_train_end=lambda t, m: t.save_checkpoint(tmp_path / "in on_train_end"))
        _, trainer = fits(pruner(), stop, keep)
        trainer.save_checkpoint(tmp_path / "after fit")
        whole, resumed = pruner(), pruner()
        (one, _), (other, _) = fits(whole), fits(resumed, ckpt_path=tmp_path / saved)
        assert same(other.state_dict(), one.state_dict())
        assert same(resumed.masks, whole.masks)
        assert records(resumed) == records(whole)
        assert [(r.round, r.first_epoch, r.last_epoch) for r in resumed.history] == [(0, 0, 1), (1, 2, 5)]

    def test_the_round_that_goes_on_is_saved_when_it_ends(self, tmp_path):
        def fits(pruner, folder, **options):
            return fit(Net(), pruner, default_root_dir=folder, **options)

        def pruner():
            return half(every_n_epochs=2, rounds=1, save_rounds=True, dirpath=str(tmp_path / "rounds"))

        fits(pruner(), tmp_path).save_checkpoint(tmp_path / "end.ckpt")
        resumed = pruner()
        trainer = fits(resumed, tmp_path, max_epochs=6, ckpt_path=tmp_path / "end.ckpt")
        assert [record.round for record in resumed.history] == [0, 1]
        file = torch.load(resumed.history[1].path, weights_only=True)
        assert same(file["state_dict"], trainer.lightning_module.state_dict())


class TestRestoredInTraining:
    def test_masks_and_history_are_those_of_the_file_at_once(self, tmp_path):
        """As a callback does that goes back to an earlier file while it trains."""
        module, pruner, seen = Net(), half(), []

        def go_back(trainer, module):
            if trainer.current_epoch == 2 and not seen:
                saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
                module.load_state_dict(saved["state_dict"])
                pruner.load_state_dict(saved["callbacks"][STATE])
                seen.append((pruner.remaining, len(pruner.history), all_masked_are_zero(trainer, module)))

        def save(trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

        fit(module, pruner, Watch(on_train_epoch_end=save, on_train_batch_end=go_back), max_epochs=5)
        assert seen == [(0.5, 1, True)]
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]
        assert pruner.remaining == 0.125
        assert sum(int(mask.sum()) for mask in pruner.masks.values()) == 9
        assert all(not parameters(module)[name][~mask].any() for name, mask in pruner.masks.items())


class TestSelectionOnResume:
    @pytest.fixture
    def file(self, tmp_path):
        run(Net, half, tmp_path, max_epochs=3)
        return tmp_path / "epoch=1.ckpt"

    def refused(self, file, module, pruner, message):
        steps = []
        look = Watch(on_train_batch_start=lambda t, m: steps.append(t.global_step))
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(module, pruner, look, ckpt_path=file)
        assert steps == []

    def test_surplus(self, file):
        message = "missing [], surplus ['net.0.weight'], of another shape []. Give the same model, `include` and"
        self.refused(file, Net(), half(exclude="net.0.*"), message)

    def test_missing(self, file):
        message = "missing ['net.3.bias'], surplus [], of another shape []"
        module = Net()
        module.net[3].bias = nn.Parameter(torch.ones(3, 1))
        module.on_load_checkpoint = lambda checkpoint: checkpoint["state_dict"].update({"net.3.bias": torch.ones(3, 1)})
        self.refused(file, module, half(include=["*weight", "*bias"], exclude=nn.BatchNorm1d), message)

    def test_shape(self, file):
        module = Net(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)))
        module.on_load_checkpoint = lambda checkpoint: checkpoint.update(state_dict=module.state_dict())
        message = "of another shape ['net.0.weight (8, 6) instead of (9, 6)', 'net.3.weight (3, 8) instead of (3, 9)']"
        self.refused(file, module, half(), message)

    def test_a_failed_resume_leaves_nothing_behind(self, file):
        pruner = half(exclude="net.0.*")
        self.refused(file, Net(), pruner, "surplus ['net.0.weight']")
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]


class TestFile:
    def test_it_loads_with_weights_only(self, tmp_path):
        run(Scheduled, lambda: half(rewind_weights="init"), tmp_path, validate=True)
        file = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)
        state = file["callbacks"][STATE]
        assert set(state) == KEYS
        assert state["round"] == 4
        plan = {"rounds": 5, "epochs": 1, "first_epoch": 0, "last_epoch": 6, "schedules_from": 0}
        assert state["plan"] == plan
        assert same(state["first_weights"], copied(Net().state_dict()))
        assert [record["remaining"] for record in state["history"]] == [1.0, 0.5, 0.25, 0.125]
        assert {type(key) for key in state} == {str}

    def test_no_first_weights_after_the_last_pruning(self, tmp_path):
        run(Net, lambda: half(rewind_weights="init"), tmp_path)
        state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["callbacks"][STATE]
        assert state["round"] == 5
        assert state["first_weights"] is None

    def test_no_first_weights_unless_they_are_rewound_to(self, tmp_path):
        run(Net, half, tmp_path)
        file = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
        assert file["callbacks"][STATE]["first_weights"] is None

    def test_masks_take_one_bit_per_weight(self, tmp_path):
        module = Net(nn.Sequential(nn.Linear(6, 101, bias=False), nn.Linear(101, 3, bias=False)))
        pruner = half()
        trainer = fit(module, pruner, max_epochs=2)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        masks = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][STATE]["masks"]
        for name, size in {"net.0.weight": 606, "net.1.weight": 303}.items():
            bits = masks[name]["bits"]
            assert (bits.dtype, bits.numel()) == (torch.uint8, -(-size // 8))
            assert bits.untyped_storage().nbytes() == -(-size // 8)
            assert masks[name]["shape"] == list(module.state_dict()[name].shape)

    def test_the_whole_file_is_hardly_larger_than_the_dense_one(self, tmp_path):
        sizes = []
        for pruner in ([], [half()]):
            module = Net(nn.Sequential(nn.Linear(6, 4000, bias=False), nn.Linear(4000, 3, bias=False)))
            trainer = fit(module, *pruner, max_epochs=2, train=loader(8))
            trainer.save_checkpoint(tmp_path / "end.ckpt")
            with zipfile.ZipFile(tmp_path / "end.ckpt") as file:
                sizes.append(sum(entry.file_size for entry in file.infolist()))
        assert sizes[1] - sizes[0] < 36000 / 8 + 4000  # a bit per weight, and what is not masks

    def test_it_can_be_taken_up_outside_a_trainer(self, tmp_path):
        _, pruner, *_ = run(Net, half, tmp_path)
        file = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
        fresh = half()
        fresh.load_state_dict(file["callbacks"][STATE])
        assert same(fresh.masks, pruner.masks)
        assert fresh.remaining == pruner.remaining == 3 / 72
        assert [record.round for record in fresh.history] == [0, 1, 2, 3, 4]

    def test_saving_changes_nothing(self, tmp_path):
        module, pruner = Net(), half(rewind_weights="init")
        trainer = fit(module, pruner)
        before, masks = copied(module.state_dict()), pruner.masks
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        trainer.save_checkpoint(tmp_path / "b.ckpt")
        assert same(module.state_dict(), before)
        assert same(pruner.masks, masks)


def through_pickle(callback):
    return pickle.loads(pickle.dumps(callback))


def through_torch(callback):
    buffer = io.BytesIO()
    torch.save(callback, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch])
class TestCopies:
    def options(self):
        return {"rewind_weights": "init", "include": ["*weight", nn.Linear], "exclude": ["net.1.*", "*bias"]}

    def test_before_fit(self, copy_of):
        original = half(**self.options())
        twin = copy_of(original)
        assert twin.options == original.options
        fit(Net(), twin)
        assert survivors(twin) == {"net.0.weight": 6, "net.3.weight": 3}
        assert original.masks == {}

    def test_during_fit(self, copy_of):
        twins, pruner, module = [], half(**self.options()), Net()
        look = Watch(on_train_batch_end=lambda t, m: twins.append((pruner.masks, copy_of(pruner))))
        fit(module, pruner, look)
        assert len(twins) == 4 * BATCHES
        for masks, twin in twins:
            assert same(twin.masks, masks)
        fit(module, twins[-1][1], max_epochs=2)  # it belongs to the same module: masks are kept
        assert sum(survivors(twins[-1][1]).values()) == 5
        assert sum(survivors(pruner).values()) == 9

    def test_after_fit(self, copy_of):
        module, pruner = Net(), half(**self.options())
        fit(module, pruner)
        twin = copy_of(pruner)
        assert same(twin.masks, pruner.masks)
        assert records(twin) == records(pruner)
        assert twin.state_dict().keys() == KEYS
        first = []
        fit(module, twin, Watch(on_train_epoch_end=lambda t, m: first.append(twin.masks)), max_epochs=2)
        assert same(first[0], pruner.masks)
        assert sum(survivors(twin).values()) == 5

    def test_it_does_not_carry_the_module(self, copy_of):
        module, pruner = Net(), half()
        module.lock = object()
        fit(module, pruner)
        twin = copy_of(pruner)
        assert "log" not in vars(twin)
        assert "log_dict" not in vars(twin)


HOOKS = [
    "setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end",
    "on_train_end", "on_fit_end", "teardown",
]  # fmt: skip


# but "mask", which is also the moment between an optimizer's step and the masking
@pytest.mark.parametrize("moment", [*HOOKS, *sorted(STEPS_OF_A_PRUNING.keys() - {"mask"})])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle])
def test_copies_at_any_moment_are_of_that_moment_and_go_on_by_themselves(monkeypatch, copy_of, moment):
    takes, pruner, module = [], half(rewind_weights="init"), Scheduled(optimizer=SGD)

    def take(*_):
        takes.append((copied(module.state_dict()), pruner.masks, copy_of(pruner), copy_of(module)))

    if moment in STEPS_OF_A_PRUNING:
        owner, _, name = STEPS_OF_A_PRUNING[moment].rpartition(".")
        step = getattr(pkgutil.resolve_name(owner), name)
        monkeypatch.setattr(STEPS_OF_A_PRUNING[moment], lambda *args, **options: (take(), step(*args, **options))[1])
    fit(module, Watch(**({moment: take} if moment in HOOKS else {})), pruner, val=loader())
    monkeypatch.undo()
    assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}
    assert takes
    for state, masks, twin, other in takes:
        assert same(other.state_dict(), state)
        assert same(twin.masks, masks)
    (_, masks, twin, other), before = takes[len(takes) // 2], (copied(module.state_dict()), pruner.masks)
    fit(other.train(), twin, max_epochs=2)
    alive = {name: int(masks[name].sum()) if masks else size for name, size in PRUNABLE.items()}
    assert survivors(twin) == {name: n - n // 2 for name, n in alive.items()}
    assert all_masked_are_zero(quiet_trainer(twin), other)
    assert same(module.state_dict(), before[0])
    assert same(pruner.masks, before[1])


class TestOneCallbackAfterAnother:
    def test_in_a_second_trainer(self):
        pruner = half()
        fit(first := Net(), pruner)
        before = copied(first.state_dict())
        trainer = quiet_trainer(pruner, max_epochs=2)
        with pytest.warns(UserWarning, match="starting afresh"):
            trainer.fit(Net(seeded(mlp, 3)), loader())
        assert pruner.remaining == 0.5
        assert same(first.state_dict(), before)

    def test_after_a_run_that_failed(self, tmp_path):
        pruner, module = half(), Net()
        with pytest.raises(Killed):
            fit(module, pruner, kill_in("on_train_batch_end", 2))
        assert pruner.remaining == 0.25
        fit(module, pruner, max_epochs=2)
        assert pruner.remaining == pytest.approx(9 / 72)
        assert all_masked_are_zero(quiet_trainer(pruner), module)

    def test_a_failure_before_anything_changes_leaves_everything_as_it_was(self):
        module, pruner = Net(), half(rewind_weights="init")
        before, policy = [], pruner.options.policy

        class Fails(type(policy)):
            def __call__(self, sums, round):
                if round == 2:
                    before.append((copied(module.state_dict()), pruner.masks, len(module.trainer.optimizers[0].state)))
                    raise Killed
                return super().__call__(sums, round)

        failing = PruningCallback(Fails(0.5), every_n_epochs=1, rewind_weights="init")
        pruner = failing
        with pytest.raises(Killed):
            fit(module, failing)
        ((state, masks, moments),) = before
        assert same(module.state_dict(), state)
        assert same(failing.masks, masks)
        assert moments == 6 == len(module.optimizers(use_pl_optimizer=False).state)
        assert len(failing.history) == 1


class TestRunState:
    def state(self):
        pruned = {"w": torch.tensor([[True, False, True], [False, False, True]])}
        record = RoundRecord(0, 0, 1, 1.0, {"w": 1.0}, 0.25, {"w": 0.25}, 3, 0.5, 0.1, 0.01, {"val_acc": 0.5})
        return PruningState(
            MaskSet(pruned),
            RoundPlan(3, 2, 1, 9),
            1,
            12,
            3,
            0.5,
            {"w": torch.ones(2, 3)},
            History([record]),
            lr=0.25,
            metrics={"a": 1.0},
        )

    def test_packing_and_unpacking_gives_it_back(self):
        state = self.state()
        twin = PruningState.unpack(state.pack())
        assert same(dict(twin.masks.pruned), dict(state.masks.pruned))
        assert same(twin.first_weights, state.first_weights)
        assert list(twin.history) == list(state.history)
        for key in ("plan", "round", "round_step", "count", "pqi_after_pruning", "lr", "metrics"):
            assert getattr(twin, key) == getattr(state, key)

    def test_what_an_older_version_did_not_store_keeps_its_default(self):
        packed = self.state().pack()
        del packed["metrics"], packed["pqi_after_pruning"]
        twin = PruningState.unpack({**packed, "not_known_yet": 1})
        assert (twin.metrics, twin.pqi_after_pruning) == ({}, None)

    def test_a_pruning_is_due_once_a_round_was_trained(self):
        state = self.state()  # rounds of two epochs from epoch 1; one pruning so far, at step 12
        assert [state.is_due(epoch, 20) for epoch in range(3, 10)] == [False, False, True, True, True, True, True]
        assert not state.is_due(5, 12)
        assert state.prunings_left() == 2

    def test_no_end_of_rounds(self):
        assert PruningState(plan=RoundPlan(None, 2)).prunings_left() is None


class TestRunsThatAreOver:
    def test_the_last_round_is_recorded_when_a_file_of_the_last_epoch_is_resumed(self, tmp_path):
        def run(**options):
            pruner, saver = (
                half(every_n_epochs=2),
                ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True),
            )
            module = Net()
            fit(module, pruner, saver, max_epochs=6, val=loader(), enable_checkpointing=True, **options)
            return module, pruner

        whole, pruner = run()
        again, resumed = run(ckpt_path=tmp_path / "last.ckpt")
        assert [record.round for record in pruner.history] == [0, 1, 2]
        assert records(resumed) == records(pruner)
        assert same(resumed.masks, pruner.masks)
        assert same(again.state_dict(), whole.state_dict())

    def test_a_longer_last_round_ends_where_training_does(self, tmp_path):
        pruner, saver = half(rounds=1, every_n_epochs=2), ModelCheckpoint(tmp_path, save_last=True)
        fit(Net(), pruner, saver, max_epochs=4, enable_checkpointing=True)
        resumed = half(rounds=1, every_n_epochs=2, save_rounds=True)
        trainer = fit(Net(), resumed, max_epochs=6, ckpt_path=tmp_path / "last.ckpt", default_root_dir=tmp_path)
        assert [(r.first_epoch, r.last_epoch) for r in resumed.history] == [(0, 1), (2, 5)]
        saved = torch.load(resumed.history[1].path, weights_only=True)
        assert saved["epoch"] == trainer.current_epoch - 1 == 5


def test_a_round_without_validation_knows_no_metric_of_validation():
    pruner = half(every_n_epochs=2)
    fit(Net(), pruner, max_epochs=8, val=loader(), check_val_every_n_epoch=3)  # after epochs 2 and 5: rounds 1 and 2
    assert ["val_loss" in record.metrics for record in pruner.history] == [False, True, True, False]
    assert all("train_loss" in record.metrics for record in pruner.history)
    assert pruner.history.best("val_loss", "min").round in (1, 2)
    assert [record.metrics["sap/remaining"] for record in pruner.history] == [1.0, 0.5, 0.25, 0.125]
