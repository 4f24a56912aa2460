"""Lines of a run that goes on: each pruning, where a resumed run goes on, and what an interrupted one leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.compatibility import of_kind
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.report import markdown

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


def tell_pruning(options: Options, before: PruningState, after: PruningState, rate: float | None) -> None:
    """Say what a pruning did, once the next round begins.

    Args:
        options: Those of the run.
        before: Its state in the round that ended.
        after: Its state in the round that begins.
        rate: Learning rate of its first step.
    """
    record, total = after.history[-1], after.masks.total
    kept = [sum(state.masks.survivors.values()) for state in (before, after)]
    parts = [f"{kept[0]:,} → {kept[1]:,} weights ({kept[1] / max(1, total):.1%})", f"PQI {record.pqi:.3f}"]
    if kept[0] == kept[1] and not record.regrown:
        parts.insert(1, "nothing is pruned")
    if record.taken_back:
        parts.insert(0, f"round {record.round} is taken back")
    if record.regrown:
        parts.append(f"{record.regrown:,} came back")
    if rate is not None:
        parts.append(f"lr {'' if before.lr is None or rate == float(before.lr) else 'back to '}{rate:.3g}")
    if record.seconds is not None:
        parts.append(f"{1000 * record.seconds:,.0f} ms")
    cut = before.plan.rounds != after.plan.rounds  # by a search that is over
    where = f"round {after.round}, the last, as the search is over" if cut else _round(after)
    log_line(f"{options.name}: {where}: {', '.join(parts)}")


def tell_resumed(options: Options, state: PruningState) -> None:
    """Say where a resumed run goes on."""
    rounds = state.plan.rounds
    if rounds == 0:
        return
    of = "" if rounds is None else f" of {rounds}"
    done = f"{state.round}{of} {'pruning' if rounds == 1 else 'prunings'} done"
    log_line(f"{options.name}: resumed in round {state.round}, {done}, {state.masks.remaining:.2%} of the weights left")


def tell_interrupted(trainer: Trainer, session: PruningSession, exception: BaseException) -> None:
    """Say how far a run came that an exception ends, and which file it can be resumed from."""
    options, state = session.options, session.state
    where = "" if state.plan.rounds == 0 else f" in {_round(state)}"
    lines = [f"{options.name}: {type(exception).__name__} ended training{where}. {_resume(trainer, options, state)}"]
    if state.history:
        lines.append(markdown(list(state.history)).partition("\n\n")[0])
    log_line("\n".join(lines))


def _round(state: PruningState) -> str:
    rounds = state.plan.rounds
    return f"round {state.round}" + ("" if rounds is None else f" of {rounds}")


def _resume(trainer: Trainer, options: Options, state: PruningState) -> str:
    """What to call to go on."""
    writes = [str(callback.ckpt_path) for callback in of_kind(trainer, "OnExceptionCheckpoint")]
    rounds = (
        [] if options.save_rounds == "weights" else [*(record.path for record in state.history), state.note.get("path")]
    )
    there = sorted(_files(trainer, rounds), key=os.path.getmtime)
    if not writes and not there:
        return (
            "No checkpoint was written, so it cannot be resumed; give Trainer(callbacks=[ModelCheckpoint("
            "save_last=True)]) for the next time."
        )
    return f"Resume with trainer.fit(..., ckpt_path={(writes or there)[-1]!r})."


def _files(trainer: Trainer, saved: list[str | None]) -> Iterator[str]:
    """Checkpoints of this run that are there, those of rounds and of ModelCheckpoint."""
    paths = list(saved)
    for saver in (each for each in of_kind(trainer, "ModelCheckpoint") if not each.save_weights_only):
        paths += [saver.last_model_path, saver.best_model_path, *saver.best_k_models]
    yield from (str(path) for path in paths if path and os.path.exists(path))
