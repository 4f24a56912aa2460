"""Where a callback stands in the life of a fit."""

from __future__ import annotations

from enum import Enum


class Stage(Enum):
    """What the Trainer does with the callback now."""

    IDLE = "idle"  # no Trainer runs
    WAITING = "waiting"  # a fit is set up and has not begun to train
    TRAINING = "training"
    TRAINED = "trained"  # training is over, the fit is not
    LOOKING = "looking"  # the Trainer validates, tests or predicts


class Event(Enum):
    """What changes the stage."""

    FIT_IS_SET_UP = "fit is set up"
    OTHER_IS_SET_UP = "validate, test or predict is set up"
    TRAINING_STARTS = "training starts"
    TRAINING_ENDS = "training ends"
    RUN_ENDS = "the run ends, by itself or by an exception"


TRANSITIONS = {
    Event.FIT_IS_SET_UP: dict.fromkeys(Stage, Stage.WAITING),  # an exception may skip the hooks that end a run
    Event.OTHER_IS_SET_UP: dict.fromkeys(Stage, Stage.LOOKING),
    Event.TRAINING_STARTS: {Stage.WAITING: Stage.TRAINING},
    Event.TRAINING_ENDS: {Stage.TRAINING: Stage.TRAINED},
    Event.RUN_ENDS: dict.fromkeys(Stage, Stage.IDLE),
}


def after(stage: Stage, event: Event) -> Stage:
    """The stage that follows an event.

    Raises:
        RuntimeError: If the event cannot happen in this stage.

    Example:
        >>> after(Stage.WAITING, Event.TRAINING_STARTS)
        <Stage.TRAINING: 'training'>
        >>> after(Stage.IDLE, Event.TRAINING_STARTS)
        Traceback (most recent call last):
        RuntimeError: The hooks of this callback were called out of order: training starts while it is idle.
    """
    following = TRANSITIONS[event].get(stage)
    if following is None:
        raise RuntimeError(
            f"The hooks of this callback were called out of order: {event.value} while it is {stage.value}."
        )
    return following
