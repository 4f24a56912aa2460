"""Killed before or after the verdict and resumed: the same verdict, the same round back, bit for bit."""

import re

import pytest
import torch
from helpers import Crash, Watch, crash, same
from launch import run_ranks
from resuming import savers
from stopping import KINDS, LAST, differences, outcome, pruner_of, run, stopped

from lightning_sap import PQIMonitor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By kind and order the run that never was cut off, and its folder."""
    found = {}

    def of(kind, order):
        if (kind, order) not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[kind, order] = outcome(stopped(folder, kind, order=order)), folder
        return found[kind, order]

    return of


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("hook", ["validation-end", "train-epoch-end"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_from_every_file_reaches_the_same_verdict(tmp_path, whole, kind, hook, order):
    """The last of them were written after the verdict, or right before it."""
    through, folder = whole(kind, order)
    assert through["verdict"].round == LAST[kind]
    assert through["round"] == through["verdict"].restore < LAST[kind]
    for epoch in range(LAST[kind] + 1):
        resumed = stopped(tmp_path, kind, order=order, ckpt_path=folder / hook / f"epoch={epoch}.ckpt")
        assert differences(through, outcome(resumed)) == [], f"from epoch {epoch}"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_from_every_saved_round_reaches_the_same_verdict(tmp_path, whole, kind, order):
    """The last of them is the round with the verdict."""
    through, folder = whole(kind, order)
    for round in range(LAST[kind] + 1):
        resumed = stopped(tmp_path, kind, order=order, ckpt_path=folder / "rounds" / f"sap-round-00{round}.ckpt")
        assert differences(through, outcome(resumed)) == [], f"from round {round}"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("hook", "epoch"),
    [
        ("on_train_batch_start", 5),  # in the round of the verdict, before it
        ("on_validation_start", 5),
        ("on_train_end", 6),  # after the verdict, before the last round is recorded
        ("on_fit_end", 6),  # after that, before it is restored
    ],
)
def test_resume_after_a_crash_reaches_the_same_verdict(tmp_path, whole, hook, epoch, order):
    through, _ = whole("collapse", order)
    die = Watch(**{hook: lambda t, m: crash() if t.current_epoch == epoch else None})
    folder = tmp_path / "first"
    with pytest.raises(Crash):
        stopped(folder, "collapse", die, order=order)
    resumed = stopped(folder, "collapse", order=order, ckpt_path=folder / "train-epoch-end" / "last.ckpt")
    assert differences(through, outcome(resumed)) == []


def test_resume_after_sigkill_reaches_the_same_verdict(tmp_path, whole):
    through, _ = whole("collapse", 1)
    with pytest.raises(AssertionError, match=re.escape("exit codes by rank, within 90 s: [-9]")):
        run_ranks("distributed.stops:killed", tmp_path, world=1)
    resumed = stopped(tmp_path, "collapse", ckpt_path=tmp_path / "train-epoch-end" / "last.ckpt")
    assert differences(through, outcome(resumed)) == []
    assert [record.path for record in resumed.pruner.history] == [
        str(tmp_path / "rounds" / f"sap-round-00{round}.ckpt") for round in range(6)
    ]


def test_resume_without_stop_on_trains_to_the_end(tmp_path, whole):
    _, folder = whole("collapse", 1)
    file = folder / "train-epoch-end" / "epoch=5.ckpt"
    monitor = PQIMonitor(monitor="val_acc", stop_on=None, verbose=False)
    with pytest.warns(UserWarning, match="training now ends before 3 of the 10 prunings planned"):
        found = run(tmp_path, monitor=monitor, ckpt_path=file)
    assert found.monitor.verdict is None
    assert found.trainer.current_epoch == 8
    assert [record.phase for record in found.pruner.history] == ["regularization"] * 5 + ["collapse"] * 3


def test_resume_with_stop_on_stops_after_the_next_round(tmp_path):
    logging = PQIMonitor(monitor="val_acc", stop_on=None, verbose=False)
    whole = run(
        tmp_path, *savers(tmp_path, alike=False), monitor=logging, pruner=pruner_of(save_rounds=True),
        enable_checkpointing=True,
    )  # fmt: skip
    assert whole.trainer.current_epoch == 8
    found = run(tmp_path, ckpt_path=tmp_path / "train-epoch-end" / "epoch=5.ckpt")
    assert (found.monitor.verdict.round, found.monitor.verdict.restore) == (6, 3)
    assert same(found.module.state_dict(), whole.rounds.states[3])


def test_checkpoint_of_a_stopped_run_loads_with_weights_only(whole):
    _, folder = whole("collapse", 1)
    state = torch.load(folder / "train-epoch-end" / "epoch=5.ckpt", weights_only=True)["callbacks"]
    assert state["lightning_sap.monitor/pqi"]["rule"]["verdict"]["restore"] == 3
