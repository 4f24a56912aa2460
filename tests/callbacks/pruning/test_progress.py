"""What a run says while it goes on: one line for each pruning, where it is resumed, and what an interrupt leaves."""

import logging
import re

import pytest
from helpers import Crash, Net, crash_in, fit, half, loader
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_sap import FixedFraction, PruningCallback, Tolerance
from lightning_sap.callbacks.logging import LINES

# with OnExceptionCheckpoint Lightning looks for a file to resume from, unasked
pytestmark = pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")


def lines(caplog, part):
    return [record.getMessage() for record in caplog.records if record.name == "lightning_sap" and part in record.msg]


class Falling(Net):
    def validation_step(self, batch, batch_idx):
        left = sum(int((p != 0).sum()) for p in self.parameters() if p.dim() > 1)
        self.log("score", float(left > 30))


@pytest.fixture(autouse=True)
def heard(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_sap"):
        yield


class TestPrunings:
    def test_each_has_a_line_with_round_weights_index_rate_and_time(self, caplog):
        pruner = half(scope="global")
        fit(Net(), pruner)
        found = [re.sub(r"\d+ ms$", "N ms", line) for line in lines(caplog, "→")]
        indices = [f"{record.pqi:.3f}" for record in pruner.history]
        assert found == [
            f"sap: round 1 of 3: 72 → 36 weights (50.0%), PQI {indices[0]}, lr 0.1, N ms",
            f"sap: round 2 of 3: 36 → 18 weights (25.0%), PQI {indices[1]}, lr 0.1, N ms",
            f"sap: round 3 of 3: 18 → 9 weights (12.5%), PQI {indices[2]}, lr 0.1, N ms",
        ]

    def test_a_round_that_is_taken_back_is_named(self, caplog):
        search = Tolerance("score", drop=0.5)
        pruner = PruningCallback(FixedFraction(0.5), rounds=5, every_n_epochs=1, tolerance=search)
        fit(Falling(), pruner, val=loader(), max_epochs=6, num_sanity_val_steps=0)
        back = next(record for record in pruner.history if record.taken_back)
        sound = max(record.round for record in pruner.history if record.sound and record.round < back.round)
        after = pruner.history[back.round + 1].weights
        line = f"sap: round {back.round + 1} of 5: round {back.round} is taken back, "
        line += f"{pruner.history[sound].weights} → {after} weights"
        assert lines(caplog, "is taken back, ")[0].startswith(line)

    def test_a_search_that_is_over_before_its_rounds_says_which_is_the_last(self, caplog):
        search = Tolerance("score", drop=0.2)
        pruner = PruningCallback(FixedFraction(0.5), rounds=15, every_n_epochs=1, tolerance=search)
        fit(Falling(), pruner, val=loader(), max_epochs=16, num_sanity_val_steps=0)
        last = pruner.history[-1].round
        assert last < 15
        rounds = [line.partition(": ")[2].partition(":")[0] for line in lines(caplog, "→")]
        before = [f"round {t} of 15" for t in range(1, last)]
        assert rounds == [*before, f"round {last}, the last, as the search is over"]

    def test_the_logger_can_be_silenced(self, capfd):
        LINES.setLevel(logging.WARNING)
        try:
            fit(Net(), half())
        finally:
            LINES.setLevel(logging.INFO)
        assert "sap:" not in capfd.readouterr().err


class TestResume:
    def test_it_says_in_which_round_it_goes_on(self, tmp_path, caplog):
        fit(Net(), half(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), enable_checkpointing=True)
        caplog.clear()
        fit(Net(), half(), ckpt_path=tmp_path / "epoch=2.ckpt")
        assert lines(caplog, "resumed") == ["sap: resumed in round 2, 2 of 3 prunings done, 25.00% of the weights left"]


class TestInterrupts:
    def test_the_table_so_far_and_the_file_to_resume_from_are_left(self, tmp_path, caplog):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        with pytest.raises(Crash):
            fit(Net(), half(), saver, crash_in("on_train_batch_start", 2), enable_checkpointing=True)
        (said,) = lines(caplog, "ended training in")
        first, *table = said.splitlines()
        assert first == (
            "sap: Crash ended training in round 2 of 3. Resume with trainer.fit(..., ckpt_path="
            f"{str(tmp_path / 'epoch=1.ckpt')!r})."
        )
        assert [line.split(" | ")[2] for line in table] == ["weights", "---:", "72", "36"]

    def test_the_file_that_the_exception_writes_is_the_one_to_resume_from(self, tmp_path, caplog):
        with pytest.raises(Crash):
            fit(
                Net(), half(), OnExceptionCheckpoint(tmp_path, "end"), crash_in("on_train_batch_start", 2),
                enable_checkpointing=True,
            )  # fmt: skip
        assert f"ckpt_path={str(tmp_path / 'end.ckpt')!r}" in lines(caplog, "ended training in")[0]
        assert (tmp_path / "end.ckpt").exists()

    @pytest.mark.parametrize(("keep", "offered"), [(True, "sap-round-001.ckpt"), ("weights", None)])
    def test_a_round_is_offered_if_training_goes_on_from_it(self, tmp_path, caplog, keep, offered):
        with pytest.raises(Crash):  # before the round that was saved last has its record
            fit(Net(), half(save_rounds=keep, dirpath=tmp_path), crash_in("on_train_epoch_end", 1))
        (said,) = lines(caplog, "ended training in")
        assert ("No checkpoint was written" in said) == (offered is None)
        assert (offered or "No checkpoint") in said.partition("\n")[0]

    def test_a_run_that_only_holds_masks_names_no_round(self, caplog):
        with pytest.raises(Crash):
            fit(Net(), half(rounds=0, every_n_epochs=None), crash_in("on_train_batch_start", 1))
        assert lines(caplog, "ended training. ")[0].startswith("sap: Crash ended training. No checkpoint was written")

    def test_without_any_file_the_cure_is_told(self, caplog):
        with pytest.raises(Crash):
            fit(Net(), half(), crash_in("on_train_batch_start", 0))
        (said,) = lines(caplog, "ended training in")
        assert said.startswith("sap: Crash ended training in round 0 of 3. No checkpoint was written, so it cannot be")
        assert "\n" not in said
