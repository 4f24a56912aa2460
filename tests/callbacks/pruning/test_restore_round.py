"""restore_round puts a saved round back, bit for bit, or refuses and changes nothing."""

import copy
import pickle
import re

import pytest
import torch
from archiving import Decaying, archived, archiving_half, snapshot, unchanged
from helpers import Crash, Net, Rounds, Watch, copied, crash_in, fit, loader, mlp, quiet_trainer, same, seeded
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_sap import FixedFraction, PruningCallback

pytestmark = pytest.mark.slow  # whole fits, many of them


def average_of(callback):
    """What an averaging callback would put into the module if training ended now."""
    module = Decaying()
    copy.deepcopy(callback).on_train_end(None, module)
    return module.state_dict()


class TestRestoreRound:
    def test_restore_round_brings_back_every_round_in_any_order(self, tmp_path):
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
    def test_restore_round_brings_back_trained_weights_under_rewinding(self, tmp_path, rewind):
        module, pruner, rounds, _trainer = archived(tmp_path, pruner=archiving_half(rewind_weights=rewind))
        for round in range(3):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])

    def test_restore_round_of_the_best_round_has_its_loss(self, tmp_path):
        module, pruner, rounds, _trainer = archived(tmp_path, val=loader(seed=3))
        losses = [record.metrics["val_loss"] for record in pruner.history]
        best = pruner.history.best("val_loss", "min")
        pruner.restore_round(best.round)
        assert losses[best.round] == min(losses)
        assert same(module.state_dict(), rounds.states[best.round])
        found = quiet_trainer().validate(module, loader(seed=3), verbose=False)[0]["val_loss"]
        assert found == pytest.approx(min(losses), rel=1e-6)

    @pytest.mark.parametrize("build", [Decaying, lambda: nn.ModuleDict({"net": mlp()})])
    def test_restore_round_into_another_module_leaves_the_trainers_alone(self, tmp_path, build):
        module, pruner, rounds, _trainer = archived(tmp_path)
        other = build()
        pruner.restore_round(0, module=other)
        assert same(other.state_dict(), rounds.states[0])
        assert same(module.state_dict(), rounds.states[2])

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
    def test_restore_round_of_a_copied_callback_needs_the_module(self, tmp_path, clone):
        """It knows the rounds, and no Trainer."""
        _, pruner, rounds, _trainer = archived(tmp_path)
        twin, module = clone(pruner), Decaying()
        with pytest.raises(ValueError, match=re.escape("The module of the latest fit is gone; give it as `module`.")):
            twin.restore_round(0)
        twin.restore_round(0, module)
        assert same(module.state_dict(), rounds.states[0])
        assert (twin.remaining, pruner.remaining) == (1.0, 0.25)

    def test_restore_round_of_a_callback_loaded_from_a_checkpoint(self, tmp_path):
        _, pruner, rounds, _trainer = archived(tmp_path)
        twin, fresh = archiving_half(dirpath=tmp_path / "rounds"), Decaying()
        twin.load_state_dict(pickle.loads(pickle.dumps(pruner.state_dict())))
        twin.restore_round(1, fresh)
        assert same(fresh.state_dict(), rounds.states[1])

    def test_restore_round_of_a_callback_loaded_from_a_checkpoint_needs_the_folder(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path)
        twin, fresh = archiving_half(), Decaying()
        twin.load_state_dict(pruner.state_dict())
        with pytest.raises(FileNotFoundError, match=r"'sap-round-001\.ckpt', and the folder .* give dirpath='\.\.\.'"):
            twin.restore_round(1, fresh)

    @pytest.mark.parametrize("order", [1, -1])
    def test_restore_round_brings_back_both_pruners(self, tmp_path, order):
        a = archiving_half(name="a", include="net.0.*")
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
        a, b = archiving_half(name="a", include="net.0.*"), archiving_half(name="b", include="net.3.*")
        fit(Net(), *[a, b][::order], max_epochs=7, ckpt_path=tmp_path / "back.ckpt", default_root_dir=tmp_path)
        assert [len(pruner.history) for pruner in (a, b)] == [count + 1 for count in before]

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("validate", [False, True])
    def test_restore_round_brings_back_averaged_weights(self, tmp_path, order, validate):
        """As `trainer.validate` saw them in that round, and as it sees them afterwards."""
        module, pruner, losses, averages = Decaying(), archiving_half(), {}, {}
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
    def test_restore_round_of_a_compiled_module(self, tmp_path, what):
        network = seeded(mlp)
        if what == "layer":
            network[0] = torch.compile(network[0], backend="eager")
        module = Net(network)
        pruner = archiving_half()
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

    def test_restore_round_keeps_tied_weights_and_unsaved_buffers(self, tmp_path):
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

    def test_restore_round_refuses_an_unknown_round(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path)
        message = "There is no record of round 3; those that ended are [0, 1, 2]."
        self.refused(pruner, module, ValueError, message, round=3)

    def test_restore_round_refuses_a_round_that_was_not_saved(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path, pruner=archiving_half(save_rounds=2))
        message = "Round 0 was not saved: give save_rounds=True (here 2)."
        self.refused(pruner, module, ValueError, message, round=0)
        assert pruner.restore_round(1).round == 1

    def test_restore_round_refuses_a_missing_file(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path)
        path = tmp_path / "rounds" / "sap-round-001.ckpt"
        path.unlink()
        message = f"The round was saved as {str(path)!r}, which is not there any more."
        self.refused(pruner, module, FileNotFoundError, message, round=1)

    def test_restore_round_refuses_a_module_with_other_layers(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path)
        other = Net(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.refused(pruner, other, ValueError, "The masks do not belong", round=1, module=other)

    def test_restore_round_refuses_a_module_with_more_layers(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path)
        other = Net(nn.Sequential(*mlp(), nn.Linear(3, 3)))
        message = (
            "The saved round does not fit the module: it lacks ['net.4.bias', 'net.4.weight'] and has [] besides. "
            "Give the module that was pruned; if its on_save_checkpoint leaves weights out, set strict_loading = False "
            "on it."
        )
        self.refused(pruner, other, ValueError, message, round=1, module=other)

    def test_restore_round_refuses_a_module_of_another_width(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path, pruner=archiving_half(include="net.0.*"))
        other = Net(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))
        message = "Cannot rewind 'net.3.weight': its shape was (3, 8) and is (4, 8) now."
        self.refused(pruner, other, ValueError, message, round=1, module=other)

    def test_restore_round_before_any_fit_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("There is no record of round 0; those that ended are [].")):
            archiving_half().restore_round(0)

    def test_restore_round_while_training_goes_on_is_refused(self, tmp_path):
        pruner, errors = archiving_half(), []

        def restore(trainer, module):
            before = snapshot(module, pruner)
            with pytest.raises(RuntimeError, match="restore_round cannot be called while training goes on") as error:
                pruner.restore_round(0)
            errors.append(str(error.value))
            assert unchanged(before, module, pruner)

        look = Watch(on_train_epoch_end=lambda t, m: restore(t, m) if t.current_epoch >= 2 else None)
        fit(Net(), pruner, look, max_epochs=6, default_root_dir=tmp_path)
        assert len(errors) == 4

    def test_restore_round_after_a_crash_brings_back_earlier_rounds(self, tmp_path):
        pruner, module = archiving_half(), Decaying()
        rounds = Rounds(pruner)

        stop = crash_in("on_train_epoch_start", 5)
        trainer = quiet_trainer(pruner, rounds, stop, max_epochs=6, default_root_dir=tmp_path)
        with pytest.raises(Crash):
            trainer.fit(module, loader())
        for round in (1, 0):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])


class TestAfterwards:
    def test_restore_round_restores_the_module_of_the_fit_after_validating_another(self, tmp_path):
        module, pruner, rounds, trainer = archived(tmp_path)
        other = Decaying()
        before = copied(other.state_dict())
        trainer.validate(other, loader(), verbose=False)
        pruner.restore_round(1)
        assert same(other.state_dict(), before)
        assert same(module.state_dict(), rounds.states[1])

    def test_resume_of_a_restored_round_only_holds_its_masks(self, tmp_path):
        _, pruner, _, trainer = archived(tmp_path)
        pruner.restore_round(1)
        trainer.save_checkpoint(tmp_path / "back.ckpt")
        resumed = archiving_half()
        fit(Decaying(), resumed, max_epochs=12, ckpt_path=tmp_path / "back.ckpt", default_root_dir=tmp_path)
        assert resumed.remaining == 0.5
        assert [record.round for record in resumed.history[:3]] == [0, 1, 2]
        assert same(resumed.masks, pruner.masks)

    def test_restore_round_of_a_module_that_leaves_weights_out_needs_strict_loading_false(self, tmp_path):
        class Filtering(Decaying):
            def on_save_checkpoint(self, checkpoint):
                del checkpoint["state_dict"]["net.3.bias"]

        module, pruner, _, _trainer = archived(tmp_path, module=Filtering())
        with pytest.raises(ValueError, match=r"lacks \['net\.3\.bias'\].*strict_loading = False"):
            pruner.restore_round(1)
        module.strict_loading = False
        assert pruner.restore_round(1).round == 1

    def test_round_whose_file_cannot_be_written_is_not_recorded(self, tmp_path, monkeypatch):
        pruner = archiving_half()

        def full(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", full)
        with pytest.warns(UserWarning, match="disk full") as warned:
            archived(tmp_path, pruner=pruner)
        assert [str(w.message) for w in warned if "round" in str(w.message)] == [
            f"sap: round {t} is not saved, and cannot be restored: disk full. Training goes on." for t in range(3)
        ]
        assert [(record.round, record.path, record.sha256) for record in pruner.history] == [
            (0, None, None), (1, None, None), (2, None, None),
        ]  # fmt: skip
