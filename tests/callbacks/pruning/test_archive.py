"""The round archive: every round's trained model is saved, and where."""

import os
import re
from pathlib import Path

import pytest
import torch
from archiving import Decaying, archived, archiving_half, snapshot, unchanged
from helpers import Crash, Net, Watch, crash_in, fit, mlp, same
from resuming import STATE
from torch import nn

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback

pytestmark = pytest.mark.slow  # whole fits, many of them


class TestFiles:
    def test_saved_round_holds_its_trained_weights_and_masks(self, tmp_path):
        _, pruner, rounds, _ = archived(tmp_path)
        assert [record.path for record in pruner.history] == [
            str(tmp_path / "rounds" / f"sap-round-00{round}.ckpt") for round in range(3)
        ]
        assert sorted(os.listdir(tmp_path / "rounds")) == [f"sap-round-00{round}.ckpt" for round in range(3)]
        for record in pruner.history:
            file = torch.load(record.path, weights_only=True)
            assert same(file["state_dict"], rounds.states[record.round])
            twin = archiving_half()
            twin.load_state_dict(file["callbacks"][STATE])
            assert same(twin.masks, rounds.masks[record.round][0])
            assert twin.remaining == record.remaining == 0.5**record.round

    def test_saved_rounds_differ_from_each_other(self, tmp_path):
        """The ground of the test above."""
        _, _, rounds, _ = archived(tmp_path)
        assert not any(same(rounds.states[t], rounds.states[t + 1]) for t in range(2))
        assert not any(same(rounds.masks[t][0], rounds.masks[t + 1][0]) for t in range(2))

    def test_saved_round_loads_into_the_module_and_into_a_plain_one(self, tmp_path):
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
    def test_save_rounds_decides_which_rounds_are_kept(self, tmp_path, save_rounds, stop_on, kept, order):
        pruner = archiving_half(save_rounds=save_rounds, dirpath=str(tmp_path / "kept"))
        fit(Net(), *[pruner, PQIMonitor(stop_on=stop_on, verbose=False)][::order], max_epochs=6)
        assert [record.round for record in pruner.history if record.path] == kept
        files = sorted(path.name for path in (tmp_path / "kept").glob("*"))
        assert files == [f"sap-round-00{round}.ckpt" for round in kept]

    def test_monitor_without_restore_saves_no_rounds(self, tmp_path):
        pruner = archiving_half(save_rounds=None, dirpath=str(tmp_path / "kept"))
        fit(Net(), pruner, PQIMonitor(restore=False, verbose=False), max_epochs=6)
        assert not (tmp_path / "kept").exists()

    def test_monitor_with_restore_and_no_saved_rounds_is_refused(self):
        message = (
            "PQIMonitor(restore=True) goes back to a round that was saved, and save_rounds=False saves none; leave "
            "save_rounds out, or give restore=False."
        )
        module = Net()
        before = snapshot(module)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            fit(module, PQIMonitor(), archiving_half(save_rounds=False), max_epochs=6)
        assert unchanged(before, module)

    def test_rounds_0_saves_no_rounds(self, tmp_path):
        fit(Net(), PruningCallback(FixedFraction(0.5), rounds=0, save_rounds=True, dirpath=str(tmp_path / "kept")))
        assert not (tmp_path / "kept").exists()

    def test_each_pruner_saves_rounds_under_its_name(self, tmp_path):
        a, b = archiving_half(name="a", include="net.0.*"), archiving_half(name="b", include="net.3.*", rounds=1)
        fit(Net(), a, b, max_epochs=6, default_root_dir=tmp_path)
        assert [Path(record.path).name for record in a.history] == [f"a-round-00{t}.ckpt" for t in range(3)]
        assert [Path(record.path).name for record in b.history] == [f"b-round-00{t}.ckpt" for t in range(2)]
        assert all(Path(record.path).is_file() for record in [*a.history, *b.history])
        assert {Path(record.path).parent for record in [*a.history, *b.history]} == {tmp_path / "rounds"}

    def test_plan_says_which_rounds_are_saved_and_where(self, tmp_path, caplog):
        with caplog.at_level("INFO"):
            archived(tmp_path, Net(), archiving_half(save_rounds=2))
        assert f"archive: checkpoints of the latest 2 rounds in {tmp_path / 'rounds'}" in caplog.text
        with caplog.at_level("INFO"):
            archived(tmp_path, Net())
        where = tmp_path / "rounds-v1"
        size = sum(tensor.nbytes for tensor in Net().state_dict().values()) / 1e6
        told = f"({size:.1f} MB of weights each, {3 * size:.1f} MB in all; what the optimizers keep comes on top)"
        assert f"archive: 3 checkpoints, one of each round in {where} {told}" in caplog.text

    def test_rounds_of_weights_alone_are_put_back_and_hold_nothing_to_resume_from(self, tmp_path):
        module, pruner, rounds, _trainer = archived(
            tmp_path, Decaying(), archiving_half(save_rounds="weights", rewind_weights="init")
        )
        found = [torch.load(record.path, weights_only=True) for record in pruner.history]
        for checkpoint, state in zip(found, rounds.states.values(), strict=True):
            assert same(checkpoint["state_dict"], state)
            assert not checkpoint.keys() & {"optimizer_states", "lr_schedulers", "loops"}
            assert checkpoint["callbacks"][STATE]["first_weights"] is None
        pruner.restore_round(1)
        assert same(module.state_dict(), rounds.states[1])
        assert same(pruner.masks, rounds.masks[1][0])

    def test_training_from_a_round_of_weights_alone_is_refused_with_what_to_do(self, tmp_path):
        _, pruner, rounds, _trainer = archived(tmp_path, Decaying(), archiving_half(save_rounds="weights"))
        path = pruner.history[1].path
        with pytest.raises(ValueError, match=r"save_rounds='weights', and no training goes on from it.*masks=path"):
            fit(Decaying(), archiving_half(save_rounds="weights"), max_epochs=6, ckpt_path=path)
        module, again = Decaying(), archiving_half(rounds=0, masks=path)
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert same(module.state_dict(), rounds.states[1])
        fit(module, again, max_epochs=2)
        assert same(again.masks, rounds.masks[1][0])


class TestFolder:
    def test_folder_of_rounds_that_is_not_empty_gets_a_number(self, tmp_path):
        folders = [Path(archived(tmp_path)[1].history[0].path).parent.name for _ in range(3)]
        assert folders == ["rounds", "rounds-v1", "rounds-v2"]

    def test_folder_of_rounds_that_is_empty_is_taken(self, tmp_path):
        (tmp_path / "mine").mkdir()
        _, pruner, _, _ = archived(tmp_path, Net(), archiving_half(dirpath=str(tmp_path / "mine")))
        assert Path(pruner.history[0].path).parent == tmp_path / "mine"

    def test_folder_of_rounds_that_another_run_chose_gets_a_number(self, tmp_path):
        other = archiving_half()
        second = Watch(on_train_epoch_start=lambda trainer, _: trainer.current_epoch or archived(tmp_path, None, other))
        module, pruner, rounds, _ = archived(tmp_path, None, None, second)
        folders = [{Path(record.path).parent.name for record in each.history} for each in (pruner, other)]
        assert folders == [{"rounds"}, {"rounds-v1"}]
        pruner.restore_round(0, module)
        assert same(module.state_dict(), rounds.states[0])

    def test_folder_of_rounds_may_be_a_path(self, tmp_path):
        _, pruner, _, _ = archived(tmp_path, Net(), archiving_half(dirpath=tmp_path / "mine"))
        assert Path(pruner.history[0].path).parent == tmp_path / "mine"

    def test_folder_of_rounds_that_cannot_be_had_on_resume_is_chosen_anew(self, tmp_path):
        _, pruner, _, _ = archived(tmp_path / "there")
        file = pruner.history[0].path
        checkpoint = torch.load(file, weights_only=True)
        (tmp_path / "no folder").touch()
        checkpoint["callbacks"][STATE]["folder"] = str(tmp_path / "no folder" / "rounds")
        torch.save(checkpoint, tmp_path / "moved.ckpt")
        pruner = archiving_half()
        fit(Decaying(), pruner, max_epochs=6, default_root_dir=tmp_path / "here", ckpt_path=tmp_path / "moved.ckpt")
        assert [Path(record.path).parent for record in pruner.history[1:]] == [tmp_path / "here" / "rounds"] * 2

    def test_old_rounds_that_cannot_be_deleted_stay_with_a_warning(self, tmp_path, monkeypatch):
        unlink = Path.unlink

        def fixed(path, *arguments, **options):
            if path.name == "sap-round-000.ckpt":
                raise PermissionError("not permitted")
            unlink(path, *arguments, **options)

        monkeypatch.setattr(Path, "unlink", fixed)
        with pytest.warns(UserWarning, match=r"sap-round-000\.ckpt' could not be deleted: not permitted"):
            archived(tmp_path, pruner=archiving_half(save_rounds=1))
        assert sorted(os.listdir(tmp_path / "rounds")) == ["sap-round-000.ckpt", "sap-round-002.ckpt"]

    def test_folder_of_rounds_without_a_file_is_removed(self, tmp_path):
        with pytest.raises(Crash):
            archived(tmp_path, None, None, crash_in("on_train_batch_end", 0))
        assert not (tmp_path / "rounds").exists()

    def test_folder_of_rounds_that_is_relative_is_recorded_in_full(self):
        _, pruner, _, _ = archived(None, Net(), archiving_half(dirpath="mine"))
        assert pruner.history[0].path == os.path.abspath("mine/sap-round-000.ckpt")

    def test_folder_of_rounds_is_inside_the_loggers(self, tmp_path):
        from lightning.pytorch.loggers import CSVLogger

        _, pruner, _, _ = archived(tmp_path, logger=CSVLogger(tmp_path, "run", "one"))
        assert Path(pruner.history[0].path).parent == tmp_path / "run" / "one" / "rounds"

    def test_folder_of_rounds_that_is_remote_is_refused_before_training(self):
        message = (
            "The rounds are saved in a local folder, got 's3://bucket/rounds'; give dirpath='...', or "
            "save_rounds=False (and PQIMonitor(restore=False))."
        )
        module = Net()
        before = snapshot(module)
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(module, archiving_half(dirpath="s3://bucket/rounds"), max_epochs=6)
        assert unchanged(before, module)
