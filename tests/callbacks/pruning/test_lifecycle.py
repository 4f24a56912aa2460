"""The stages of a fit, and which event leads from which to which."""

import pytest

from lightning_sap.callbacks.pruning.lifecycle import TRANSITIONS, Event, Stage, after


def test_a_fit_goes_through_its_stages_in_order():
    stage, seen = Stage.IDLE, []
    for event in (Event.FIT_IS_SET_UP, Event.TRAINING_STARTS, Event.TRAINING_ENDS, Event.RUN_ENDS):
        stage = after(stage, event)
        seen.append(stage)
    assert seen == [Stage.WAITING, Stage.TRAINING, Stage.TRAINED, Stage.IDLE]


@pytest.mark.parametrize("stage", Stage)
def test_a_run_can_be_set_up_and_end_in_every_stage(stage):
    """An exception may skip the hooks in between."""
    assert after(stage, Event.FIT_IS_SET_UP) is Stage.WAITING
    assert after(stage, Event.OTHER_IS_SET_UP) is Stage.LOOKING
    assert after(stage, Event.RUN_ENDS) is Stage.IDLE


@pytest.mark.parametrize("stage", [Stage.IDLE, Stage.TRAINING, Stage.TRAINED, Stage.LOOKING])
def test_training_starts_in_a_fit_that_waits_only(stage):
    with pytest.raises(RuntimeError, match=f"out of order: training starts while it is {stage.value}"):
        after(stage, Event.TRAINING_STARTS)


@pytest.mark.parametrize("stage", [Stage.IDLE, Stage.WAITING, Stage.TRAINED, Stage.LOOKING])
def test_training_ends_in_a_fit_that_trains_only(stage):
    with pytest.raises(RuntimeError, match=f"out of order: training ends while it is {stage.value}"):
        after(stage, Event.TRAINING_ENDS)


def test_the_table_knows_every_event():
    assert set(TRANSITIONS) == set(Event)
