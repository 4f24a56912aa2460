"""The round archive: every round's trained model is there, and comes back bit for bit."""

import copy
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import Net, Rounds, Watch, copied, fit, loader, mlp, quiet_trainer, same, seeded
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback, pq_index

pytestmark = pytest.mark.slow  # whole fits, many of them

STATE = "lightning_sap/sap"


class Decaying(Net):
    """With a schedule, and loadable by `load_from_checkpoint`."""

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [CosineAnnealingLR(optimizer, 2)]


def half(**options):
    return PruningCallback(
        FixedFraction(0.5),
        **{"rounds": 2, "every_n_epochs": 2, "lr_schedule": "restart", "save_rounds": True, **options},
    )


def archived(folder, module=None, pruner=None, *callbacks, **options):
    """A fit with three saved rounds: module, pruner, what the rounds were, and the Trainer (which has to be kept)."""
    module, pruner = module or Decaying(), pruner or half()
    rounds = Rounds(pruner)
    trainer = fit(module, pruner, *callbacks, rounds, **{"max_epochs": 6, "default_root_dir": folder, **options})
    return module, pruner, rounds, trainer


def snapshot(module, *pruners):
    """All that must not change where something is refused."""
    return copied(module.state_dict()), [
        (dict(p.masks), p.remaining, p.current_round(), list(p.history)) for p in pruners
    ]


def unchanged(before, module, *pruners):
    state, others = before
    now, found = snapshot(module, *pruners)
    return same(state, now) and all(same(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(others, found, strict=True))


def average_of(callback):
    """What an averaging callback would put into the module if training ended now."""
    module = Decaying()
    copy.deepcopy(callback).on_train_end(None, module)
    return module.state_dict()


class TestFiles:
    def test_each_round_has_one_that_holds_its_trained_weights_and_masks(self, tmp_path):
        _, pruner, rounds, _ = archived(tmp_path)
        assert [record.path for record in pruner.history] == [
            str(tmp_path / "rounds" / f"sap-round-0{round}.ckpt") for round in range(3)
        ]
        assert sorted(os.listdir(tmp_path / "rounds")) == [f"sap-round-0{round}.ckpt" for round in range(3)]
        for record in pruner.history:
            file = torch.load(record.path, weights_only=True)
            assert same(file["state_dict"], rounds.states[record.round])
            twin = half()
            twin.load_state_dict(file["callbacks"][STATE])
            assert same(twin.masks, rounds.masks[record.round][0])
            assert twin.remaining == record.remaining == 0.5**record.round

    def test_the_rounds_differ(self, tmp_path):
        """The ground of the test above."""
        _, _, rounds, _ = archived(tmp_path)
        assert not any(same(rounds.states[t], rounds.states[t + 1]) for t in range(2))
        assert not any(same(rounds.masks[t][0], rounds.masks[t + 1][0]) for t in range(2))

    def test_they_load_into_the_module_and_into_a_plain_one(self, tmp_path):
        _, pruner, rounds, _ = archived(tmp_path)
        for record in pruner.history:
            loaded = Decaying.load_from_checkpoint(record.path)
            assert same(loaded.state_dict(), rounds.states[record.round])
            plain = nn.ModuleDict({"net": mlp()})
            plain.load_state_dict(torch.load(record.path, weights_only=True)["state_dict"], strict=True)
            assert same(plain.state_dict(), rounds.states[record.round])

    @pytest.mark.parametrize(
        ("save_rounds", "stop_on", "kept"),
        [
            (True, None, [0, 1, 2]), (False, None, []), (None, None, []), (None, "collapse", [0, 1, 2]),
            (1, None, [2]), (2, None, [1, 2]), (2, "collapse", [1, 2]), (9, None, [0, 1, 2]),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("order", [1, -1])
    def test_which_are_kept(self, tmp_path, save_rounds, stop_on, kept, order):
        pruner = half(save_rounds=save_rounds, dirpath=str(tmp_path / "kept"))
        fit(Net(), *[pruner, PQIMonitor(stop_on=stop_on, verbose=False)][::order], max_epochs=6)
        assert [record.round for record in pruner.history if record.path] == kept
        files = sorted(path.name for path in (tmp_path / "kept").glob("*"))
        assert files == [f"sap-round-0{round}.ckpt" for round in kept]

    def test_a_monitor_that_does_not_restore_keeps_none(self, tmp_path):
        pruner = half(save_rounds=None, dirpath=str(tmp_path / "kept"))
        fit(Net(), pruner, PQIMonitor(restore=False, verbose=False), max_epochs=6)
        assert not (tmp_path / "kept").exists()

    def test_a_monitor_that_would_restore_what_is_not_kept_is_refused(self):
        message = (
            "PQIMonitor(restore=True) goes back to a round that was saved, and save_rounds=False saves none; leave "
            "save_rounds out, or give restore=False."
        )
        module = Net()
        before = snapshot(module)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            fit(module, PQIMonitor(), half(save_rounds=False), max_epochs=6)
        assert unchanged(before, module)

    def test_masks_that_are_only_held_have_no_rounds_to_keep(self, tmp_path):
        fit(Net(), PruningCallback(FixedFraction(0.5), rounds=0, save_rounds=True, dirpath=str(tmp_path / "kept")))
        assert not (tmp_path / "kept").exists()

    def test_each_pruner_keeps_its_own_under_its_name(self, tmp_path):
        a, b = half(name="a", include="net.0.*"), half(name="b", include="net.3.*", rounds=1)
        fit(Net(), a, b, max_epochs=6, default_root_dir=tmp_path)
        assert [Path(record.path).name for record in a.history] == [f"a-round-0{t}.ckpt" for t in range(3)]
        assert [Path(record.path).name for record in b.history] == [f"b-round-0{t}.ckpt" for t in range(2)]
        assert all(Path(record.path).is_file() for record in [*a.history, *b.history])
        assert {Path(record.path).parent for record in [*a.history, *b.history]} == {tmp_path / "rounds"}

    def test_the_plan_says_what_is_kept_and_where(self, tmp_path, caplog):
        with caplog.at_level("INFO"):
            archived(tmp_path, Net(), half(save_rounds=2))
        assert f"archive: checkpoints of the latest 2 rounds in {tmp_path / 'rounds'}" in caplog.text
        with caplog.at_level("INFO"):
            archived(tmp_path, Net())
        assert f"archive: 3 checkpoints, one of each round in {tmp_path / 'rounds-v1'}" in caplog.text


class TestFolder:
    def test_one_that_is_not_empty_gets_a_number(self, tmp_path):
        folders = [Path(archived(tmp_path)[1].history[0].path).parent.name for _ in range(3)]
        assert folders == ["rounds", "rounds-v1", "rounds-v2"]

    def test_an_empty_one_is_taken(self, tmp_path):
        (tmp_path / "mine").mkdir()
        _, pruner, _, _ = archived(tmp_path, Net(), half(dirpath=str(tmp_path / "mine")))
        assert Path(pruner.history[0].path).parent == tmp_path / "mine"

    def test_one_that_another_run_has_chosen_gets_a_number_before_there_is_a_round_in_it(self, tmp_path):
        other = half()
        second = Watch(on_train_epoch_start=lambda trainer, _: trainer.current_epoch or archived(tmp_path, None, other))
        module, pruner, rounds, _ = archived(tmp_path, None, None, second)
        folders = [{Path(record.path).parent.name for record in each.history} for each in (pruner, other)]
        assert folders == [{"rounds"}, {"rounds-v1"}]
        pruner.restore_round(0, module)
        assert same(module.state_dict(), rounds.states[0])

    def test_as_a_path(self, tmp_path):
        _, pruner, _, _ = archived(tmp_path, Net(), half(dirpath=tmp_path / "mine"))
        assert Path(pruner.history[0].path).parent == tmp_path / "mine"

    def test_one_that_cannot_be_had_where_a_run_goes_on_is_chosen_anew(self, tmp_path):
        _, pruner, _, _ = archived(tmp_path / "there")
        file = pruner.history[0].path
        checkpoint = torch.load(file, weights_only=True)
        (tmp_path / "no folder").touch()
        checkpoint["callbacks"][STATE]["folder"] = str(tmp_path / "no folder" / "rounds")
        torch.save(checkpoint, tmp_path / "moved.ckpt")
        pruner = half()
        fit(Decaying(), pruner, max_epochs=6, default_root_dir=tmp_path / "here", ckpt_path=tmp_path / "moved.ckpt")
        assert [Path(record.path).parent for record in pruner.history[1:]] == [tmp_path / "here" / "rounds"] * 2

    def test_old_rounds_that_cannot_be_deleted_stay(self, tmp_path):
        _, pruner, _, _ = archived(tmp_path / "there")
        checkpoint = torch.load(pruner.history[1].path, weights_only=True)
        (tmp_path / "no folder").touch()
        state = checkpoint["callbacks"][STATE]
        state["folder"] = str(tmp_path / "no folder" / "rounds")
        state["history"][0]["path"] = state["folder"] + "/sap-round-00.ckpt"
        torch.save(checkpoint, tmp_path / "moved.ckpt")
        pruner, options = half(save_rounds=1), {"default_root_dir": tmp_path / "here"}
        with pytest.warns(UserWarning, match=r"sap-round-00\.ckpt' could not be deleted: "):
            fit(Decaying(), pruner, max_epochs=6, ckpt_path=tmp_path / "moved.ckpt", **options)
        assert os.listdir(tmp_path / "here" / "rounds") == ["sap-round-02.ckpt"]

    def test_one_that_nothing_was_saved_in_is_given_up(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            archived(tmp_path, None, None, Watch(on_train_batch_end=lambda *_: 1 / 0))
        assert not (tmp_path / "rounds").exists()

    def test_a_relative_one_is_noted_in_full(self):
        _, pruner, _, _ = archived(None, Net(), half(dirpath="mine"))
        assert pruner.history[0].path == os.path.abspath("mine/sap-round-00.ckpt")

    def test_beside_a_logger_it_is_in_its_folder(self, tmp_path):
        from lightning.pytorch.loggers import CSVLogger

        _, pruner, _, _ = archived(tmp_path, logger=CSVLogger(tmp_path, "run", "one"))
        assert Path(pruner.history[0].path).parent == tmp_path / "run" / "one" / "rounds"

    def test_one_that_is_not_on_a_disk_is_refused_before_training(self):
        message = (
            "The rounds are saved in a local folder, got 's3://bucket/rounds'; give dirpath='...', or "
            "save_rounds=False (and PQIMonitor(restore=False))."
        )
        module = Net()
        before = snapshot(module)
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(module, half(dirpath="s3://bucket/rounds"), max_epochs=6)
        assert unchanged(before, module)


class TestRestoreRound:
    def test_every_round_comes_back_in_any_order(self, tmp_path):
        module, pruner, rounds, trainer = archived(tmp_path)
        assert {name for name in module.state_dict() if "running" in name or "batches" in name}
        for round in (1, 0, 2, 2, 0, 1):
            record = pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])
            assert same(pruner.masks, rounds.masks[round][0])
            assert pruner.remaining == record.remaining == 0.5**round
            assert pruner.current_round() == record.round == round
            assert record.restored
            assert pruner.history.restored is record
            assert [r.round for r in pruner.history] == [0, 1, 2]
        loss = float(quiet_trainer().validate(module, loader(), verbose=False)[0]["val_loss"])
        restored = Decaying()
        restored.load_state_dict(rounds.states[1])
        assert loss == float(quiet_trainer().validate(restored, loader(), verbose=False)[0]["val_loss"])
        assert trainer.lightning_module is module

    @pytest.mark.parametrize("rewind", ["init", 1])
    def test_rewound_weights_do_not_matter(self, tmp_path, rewind):
        module, pruner, rounds, _trainer = archived(tmp_path, pruner=half(rewind_weights=rewind))
        for round in range(3):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])

    def test_the_latest_by_best(self, tmp_path):
        module, pruner, rounds, _trainer = archived(tmp_path, val=loader(seed=3))
        losses = [record.metrics["val_loss"] for record in pruner.history]
        best = pruner.history.best("val_loss", "min")
        pruner.restore_round(best.round)
        assert losses[best.round] == min(losses)
        assert same(module.state_dict(), rounds.states[best.round])
        found = quiet_trainer().validate(module, loader(seed=3), verbose=False)[0]["val_loss"]
        assert found == pytest.approx(min(losses), rel=1e-6)

    @pytest.mark.parametrize("build", [Decaying, lambda: nn.ModuleDict({"net": mlp()})])
    def test_another_module_than_the_trainers_leaves_that_one_alone(self, tmp_path, build):
        module, pruner, rounds, _trainer = archived(tmp_path)
        other = build()
        pruner.restore_round(0, module=other)
        assert same(other.state_dict(), rounds.states[0])
        assert same(module.state_dict(), rounds.states[2])

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
    def test_a_copied_callback(self, tmp_path, clone):
        """It knows the rounds, and no Trainer."""
        _, pruner, rounds, _trainer = archived(tmp_path)
        twin, module = clone(pruner), Decaying()
        with pytest.raises(ValueError, match=re.escape("The module of the latest fit is gone; give it as `module`.")):
            twin.restore_round(0)
        twin.restore_round(0, module)
        assert same(module.state_dict(), rounds.states[0])
        assert (twin.remaining, pruner.remaining) == (1.0, 0.25)

    def test_a_callback_that_learned_of_the_rounds_from_a_checkpoint(self, tmp_path):
        _, pruner, rounds, _trainer = archived(tmp_path)
        twin, fresh = half(), Decaying()
        twin.load_state_dict(pickle.loads(pickle.dumps(pruner.state_dict())))
        twin.restore_round(1, fresh)
        assert same(fresh.state_dict(), rounds.states[1])

    @pytest.mark.parametrize("order", [1, -1])
    def test_two_pruners_come_back_together(self, tmp_path, order):
        a = half(name="a", include="net.0.*")
        b = PruningCallback(FixedFraction(0.25), every_n_epochs=1, name="b", include="net.3.*")
        module, rounds = Net(), Rounds(a, b)
        trainer = fit(module, *[a, b][::order], rounds, max_epochs=6, default_root_dir=tmp_path)
        for round in (0, 1, 2):
            a.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])
            assert same(a.masks, rounds.masks[round][0])
            assert same(b.masks, rounds.masks[round][1])
        assert b.current_round() == 5
        assert trainer.lightning_module is module
        trainer.save_checkpoint(tmp_path / "back.ckpt")
        before = [len(pruner.history) for pruner in (a, b)]
        a, b = half(name="a", include="net.0.*"), half(name="b", include="net.3.*")
        fit(Net(), *[a, b][::order], max_epochs=7, ckpt_path=tmp_path / "back.ckpt", default_root_dir=tmp_path)
        assert [len(pruner.history) for pruner in (a, b)] == [count + 1 for count in before]

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("validate", [False, True])
    def test_averaged_weights_come_back_as_that_round_had_them(self, tmp_path, order, validate):
        """As `trainer.validate` saw them in that round, and as it sees them afterwards."""
        module, pruner, losses, averages = Decaying(), half(), {}, {}
        average = EMAWeightAveraging(decay=0.5)
        look = Watch(
            on_validation_end=lambda t, m: losses.update(
                {pruner.current_round(): float(t.callback_metrics["val_loss"])}
            ),
            on_train_epoch_end=lambda t, m: averages.update({pruner.current_round(): copied(average_of(average))}),
        )
        val = loader(seed=3) if validate else None
        trainer = fit(
            module, *[pruner, average][::order], look, max_epochs=6, val=val, default_root_dir=tmp_path,
            num_sanity_val_steps=0,
        )  # fmt: skip
        for round in (1, 0, 2):
            pruner.restore_round(round)
            assert same(module.state_dict(), averages[round])
            found = trainer.validate(module, loader(seed=3), verbose=False)[0]["val_loss"]
            if validate:
                assert found == pytest.approx(losses[round], rel=1e-6)
            assert same(module.state_dict(), averages[round])

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["module", "layer"])
    def test_a_compiled_module(self, tmp_path, what):
        network = seeded(mlp)
        if what == "layer":
            network[0] = torch.compile(network[0], backend="eager")
        module = Net(network)
        pruner = half()
        rounds = Rounds(pruner)
        given = torch.compile(module, backend="eager") if what == "module" else module
        trainer = fit(given, pruner, rounds, max_epochs=6, default_root_dir=tmp_path)
        for round in (0, 2, 1):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])
            pruner.restore_round(round, given)
            assert same(module.state_dict(), rounds.states[round])
        plain = Net()
        pruner.restore_round(0, plain)
        assert [torch.equal(a, b) for a, b in zip(plain.state_dict().values(), rounds.states[0].values(), strict=True)]
        assert trainer.lightning_module is not None

    def test_tied_weights_and_buffers_that_are_not_saved(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
                self.second.weight = self.first.weight
                self.last = nn.Linear(6, 3)
                self.register_buffer("passing", torch.ones(1), persistent=False)

            def forward(self, x):
                return self.last(self.second(self.first(x))) * self.passing

        module, pruner, rounds, _trainer = archived(tmp_path, Net(Tied()))
        pruner.restore_round(1)
        assert same(module.state_dict(), rounds.states[1])
        assert module.net.first.weight is module.net.second.weight
        assert module.net.passing.item() == 1


class TestRefusals:
    def refused(self, pruner, held, error, message, **options):
        before = snapshot(held, pruner)
        with pytest.raises(error, match=re.escape(message)):
            pruner.restore_round(**options)
        assert unchanged(before, held, pruner)

    def test_an_unknown_round(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path)
        message = "There is no record of round 3; those that ended are [0, 1, 2]."
        self.refused(pruner, module, ValueError, message, round=3)

    def test_a_round_that_was_not_saved(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path, pruner=half(save_rounds=2))
        message = "Round 0 was not saved: give save_rounds=True (here 2)."
        self.refused(pruner, module, ValueError, message, round=0)
        assert pruner.restore_round(1).round == 1

    def test_a_file_that_is_gone(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path)
        path = tmp_path / "rounds" / "sap-round-01.ckpt"
        path.unlink()
        message = f"The round was saved as {str(path)!r}, which is not there any more."
        self.refused(pruner, module, FileNotFoundError, message, round=1)

    def test_a_module_with_other_layers(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path)
        other = Net(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.refused(pruner, other, ValueError, "The masks do not belong", round=1, module=other)

    def test_a_module_with_more_beside_the_pruned_layers(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path)
        other = Net(nn.Sequential(*mlp(), nn.Linear(3, 3)))
        message = (
            "The saved round does not fit the module: it lacks ['net.4.bias', 'net.4.weight'] and has [] besides. "
            "Give the module that was pruned; if its on_save_checkpoint leaves weights out, set strict_loading = False "
            "on it."
        )
        self.refused(pruner, other, ValueError, message, round=1, module=other)

    def test_a_module_of_another_width(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path, pruner=half(include="net.0.*"))
        other = Net(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))
        message = "Cannot rewind 'net.3.weight': its shape was (3, 8) and is (4, 8) now."
        self.refused(pruner, other, ValueError, message, round=1, module=other)

    def test_before_any_fit(self):
        with pytest.raises(ValueError, match=re.escape("There is no record of round 0; those that ended are [].")):
            half().restore_round(0)

    def test_while_training_goes_on(self, tmp_path):
        pruner, errors = half(), []

        def restore(trainer, module):
            before = snapshot(module, pruner)
            with pytest.raises(RuntimeError, match="restore_round cannot be called while training goes on") as error:
                pruner.restore_round(0)
            errors.append(str(error.value))
            assert unchanged(before, module, pruner)

        look = Watch(on_train_epoch_end=lambda t, m: restore(t, m) if t.current_epoch >= 2 else None)
        fit(Net(), pruner, look, max_epochs=6, default_root_dir=tmp_path)
        assert len(errors) == 4

    def test_a_run_that_was_cut_off_can_be_restored(self, tmp_path):
        pruner, module = half(), Decaying()
        rounds = Rounds(pruner)

        def crash(trainer, module):
            raise KeyError("cut off")

        stop = Watch(on_train_epoch_start=lambda t, m: crash(t, m) if t.current_epoch == 5 else None)
        trainer = quiet_trainer(pruner, rounds, stop, max_epochs=6, default_root_dir=tmp_path)
        with pytest.raises(KeyError):
            trainer.fit(module, loader())
        for round in (1, 0):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])


class TestResume:
    def through(self, folder, **options):
        saver = ModelCheckpoint(folder / "files", "{epoch}", save_top_k=-1)
        found = archived(folder, Decaying(), half(**options), saver, val=loader(seed=3), enable_checkpointing=True)
        return (*found, folder / "files")

    @pytest.mark.parametrize("epoch", range(5))
    def test_it_goes_on_in_the_same_folder(self, tmp_path, epoch):
        _, whole, rounds, _, files = self.through(tmp_path / "whole")
        module, pruner, _, _trainer = archived(
            tmp_path / "other", val=loader(seed=3), ckpt_path=files / f"epoch={epoch}.ckpt"
        )
        assert [record.path for record in pruner.history] == [record.path for record in whole.history]
        assert not (tmp_path / "other" / "rounds").exists()
        assert [Path(r.path).parent for r in pruner.history] == [tmp_path / "whole" / "rounds"] * 3
        for round in range(3):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])

    @pytest.mark.parametrize("round", [0, 1])
    def test_from_an_archived_file_equals_the_run_that_never_stopped(self, tmp_path, round):
        module, whole, _, _, _ = self.through(tmp_path / "whole")
        again, pruner, _, trainer = archived(
            tmp_path / "other", val=loader(seed=3), ckpt_path=whole.history[round].path
        )
        assert trainer.global_step == 18
        assert same(again.state_dict(), module.state_dict())
        assert same(pruner.masks, whole.masks)
        rows, others = ([{**row, "seconds": None} for row in p.history.rows()] for p in (pruner, whole))
        assert rows == others

    def test_from_the_file_of_a_round_after_which_training_was_stopped(self, tmp_path):
        module, whole, _, _, _ = self.through(tmp_path / "whole")
        stop = Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", t.current_epoch == 3))
        _, stopped, _, _ = archived(tmp_path / "stopped", Decaying(), half(), stop, val=loader(seed=3))
        assert [record.round for record in stopped.history] == [0, 1]
        again, pruner, _, _ = archived(tmp_path / "other", val=loader(seed=3), ckpt_path=stopped.history[1].path)
        assert same(again.state_dict(), module.state_dict())
        assert same(pruner.masks, whole.masks)

    def test_they_are_numbered_as_the_files_of_their_last_epoch(self, tmp_path):
        _, pruner, _, _, files = self.through(tmp_path)
        for record in pruner.history:
            ours, theirs = (
                torch.load(path, weights_only=True) for path in (record.path, files / f"epoch={record.last_epoch}.ckpt")
            )
            assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"])
            assert ours["loops"]["fit_loop"]["epoch_progress"] == theirs["loops"]["fit_loop"]["epoch_progress"]

    def test_of_the_last_round_there_is_nothing_left_to_train(self, tmp_path):
        module, whole, _, _, _ = self.through(tmp_path / "whole")
        again, pruner, _, trainer = archived(tmp_path / "other", ckpt_path=whole.history[2].path)
        assert trainer.global_step == 18
        assert same(again.state_dict(), module.state_dict())
        assert same(pruner.masks, whole.masks)

    def test_keeping_none_from_now_on(self, tmp_path):
        _, whole, _, _, files = self.through(tmp_path)
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rounds").iterdir()}
        _, pruner, _, _ = archived(tmp_path, pruner=half(save_rounds=False), ckpt_path=files / "epoch=2.ckpt")
        assert [record.path for record in pruner.history] == [whole.history[0].path, None, None]
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rounds").iterdir()} == before

    def test_another_folder_from_now_on(self, tmp_path):
        _, whole, _, _, files = self.through(tmp_path)
        new = str(tmp_path / "new")
        _, pruner, _, _ = archived(tmp_path, pruner=half(dirpath=new), ckpt_path=files / "epoch=2.ckpt")
        assert [record.path for record in pruner.history] == [
            whole.history[0].path, f"{new}/sap-round-01.ckpt", f"{new}/sap-round-02.ckpt",
        ]  # fmt: skip

    def test_keeping_them_from_now_on(self, tmp_path):
        *_, files = self.through(tmp_path, save_rounds=None)
        _, pruner, _, _ = archived(tmp_path, ckpt_path=files / "epoch=3.ckpt")
        assert [record.path and Path(record.path).name for record in pruner.history] == [
            None, "sap-round-01.ckpt", "sap-round-02.ckpt",
        ]  # fmt: skip


class TestRecords:
    @pytest.mark.parametrize("interval", ["step", "epoch"])
    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze", "keep"])
    def test_the_learning_rate_is_that_of_the_last_step(self, lr_schedule, interval):
        class Stepped(Net):
            def configure_optimizers(self):
                optimizer = SGD(self.parameters(), lr=0.1)
                return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.9), "interval": interval}]

        pruner, rates = half(lr_schedule=lr_schedule, save_rounds=False), {}
        look = Watch(
            on_before_optimizer_step=lambda t, _: rates.update(
                {pruner.current_round(): t.optimizers[0].param_groups[0]["lr"]}
            )
        )
        fit(Stepped(), pruner, look, max_epochs=6)
        assert [record.lr for record in pruner.history] == [rates[round] for round in range(3)]

    def test_a_learning_rate_that_is_a_tensor(self):
        class Changing(Net):
            def on_train_epoch_end(self):
                self.trainer.optimizers[0].param_groups[0]["lr"].mul_(0.5)

        pruner = half(save_rounds=False)
        fit(Changing(optimizer=lambda p: SGD(p, lr=torch.tensor(0.5))), pruner, max_epochs=6)
        assert [record.lr for record in pruner.history] == [0.25, 0.0625, 0.015625]
        assert type(pruner.history[0].lr) is type(pruner.state_dict()["lr"]) is float

    def test_the_index_of_each_parameter_right_after_the_pruning(self):
        pruner, found = half(save_rounds=False), {}

        def look(trainer, module):
            if trainer.current_epoch in (2, 4):
                live, masks = dict(module.named_parameters()), pruner.masks
                found[pruner.current_round() - 1] = {n: float(pq_index(live[n].detach()[m])) for n, m in masks.items()}

        fit(
            Net(),
            pruner,
            Watch(on_train_batch_start=lambda t, m: look(t, m) if t.global_step % 3 == 0 else None),
            max_epochs=6,
        )
        for record in pruner.history[:2]:
            assert record.layers_pqi_pruned == pytest.approx(found[record.round], rel=1e-6)
        assert pruner.history[2].layers_pqi_pruned == {}

    def test_phase_reason_and_number_of_weights(self):
        pruner, monitor = half(save_rounds=None), PQIMonitor(verbose=False)
        fit(Net(), pruner, monitor, max_epochs=6)
        assert [(r.phase, r.reason) for r in pruner.history] == [
            ("regularization", "The index has not turned from falling to rising.")
        ] * 3
        assert [r.weights for r in pruner.history] == [72, 36, 18]

    def test_without_a_monitor_the_phase_is_not_known(self):
        pruner = SAPCallback(rounds=1)
        fit(Net(), pruner, max_epochs=2)
        assert [(r.phase, r.reason, r.path) for r in pruner.history] == [(None, None, None)] * 2


class TestAfterwards:
    def test_the_module_of_the_fit_comes_back_though_another_was_validated_since(self, tmp_path):
        module, pruner, rounds, trainer = archived(tmp_path)
        other = Decaying()
        before = copied(other.state_dict())
        trainer.validate(other, loader(), verbose=False)
        pruner.restore_round(1)
        assert same(other.state_dict(), before)
        assert same(module.state_dict(), rounds.states[1])

    def test_what_was_put_back_only_holds_its_masks_when_a_file_of_it_is_resumed(self, tmp_path):
        _, pruner, _, trainer = archived(tmp_path)
        pruner.restore_round(1)
        trainer.save_checkpoint(tmp_path / "back.ckpt")
        resumed = half()
        fit(Decaying(), resumed, max_epochs=12, ckpt_path=tmp_path / "back.ckpt", default_root_dir=tmp_path)
        assert resumed.remaining == 0.5
        assert [record.round for record in resumed.history[:3]] == [0, 1, 2]
        assert same(resumed.masks, pruner.masks)

    def test_a_module_that_leaves_weights_out_of_its_checkpoints_says_so(self, tmp_path):
        class Filtering(Decaying):
            def on_save_checkpoint(self, checkpoint):
                del checkpoint["state_dict"]["net.3.bias"]

        module, pruner, _, _trainer = archived(tmp_path, module=Filtering())
        with pytest.raises(ValueError, match=r"lacks \['net\.3\.bias'\].*strict_loading = False"):
            pruner.restore_round(1)
        module.strict_loading = False
        assert pruner.restore_round(1).round == 1

    def test_a_file_that_cannot_be_written_is_not_in_the_record(self, tmp_path, monkeypatch):
        pruner = half()

        def full(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", full)
        with pytest.raises(OSError, match="disk full"):
            archived(tmp_path, pruner=pruner)
        assert pruner._session.state.note == {}
        assert len(pruner.history) == 0
