"""How many cycles of opening one part after the other fit into a training, and how long their rounds are."""

from __future__ import annotations

from lightning_sap.rounds.plan import WORDS, RoundPlan, Unit, plan_rounds

CLOSING = 15  # percent of training that the last round takes at least, in which everything is pruned
CYCLES = 2  # where nothing says how many and they fit; more do worse in short trainings, see benchmarks/algorithms.py


def plan_cycles(
    limit: int | None,
    rounds: int | None = None,
    every: int | None = None,
    first: int = 0,
    unit: Unit = "epoch",
    *,
    parts: int,
    cycles: int | None = None,
    shortest: int = 1,
) -> RoundPlan:
    """Fit cycles into training: in each every part is open for one round, and the last round takes 15 % or more.

    Args:
        limit: Epochs or steps of training, counted from 0; None or -1: not known.
        rounds: How many prunings; None: as many as the cycles need.
        every: Length of a round; None: as long as fits.
        first: The epoch or step that training starts with.
        unit: What is counted.
        parts: How many parts the network has.
        cycles: How often each is opened; None: as often as ``rounds`` or ``every`` allows, else twice, or once.
        shortest: The least length of a round where ``every`` is None.

    Raises:
        ValueError: If what was asked for does not fit; it says what would.

    Example:
        >>> plan_cycles(80, parts=4)
        RoundPlan(rounds=8, length=8, first=0, end=80, unit='epoch')
        >>> plan_cycles(20, parts=1)
        RoundPlan(rounds=1, length=17, first=0, end=20, unit='epoch')
    """
    if rounds == 0:
        return plan_rounds(limit, 0, every, first, unit)
    if rounds is not None:
        near = parts * (cycles or max(1, rounds // parts))
        if rounds != near:
            raise ValueError(
                f"rounds={rounds} contradicts partitions={parts}{'' if cycles is None else f', cycles={cycles}'}: each "
                f"cycle has one pruning for each part. Give rounds={near}, or leave rounds out."
            )
        cycles = rounds // parts
    cycles = 1 if parts == 1 else cycles
    if limit is None or limit < 0:
        return plan_rounds(limit, parts * (cycles or CYCLES), every, first, unit)
    left = limit - first
    room = left - -(-left * CLOSING // 100)
    length, number = _fitted(room, parts, cycles, every, shortest)
    if length < (every or shortest) or number < 1:
        raise ValueError(_misfit(left, first, parts, cycles, every, shortest, unit))
    return RoundPlan(parts * number, length, first, limit, unit)


def _fitted(room: int, parts: int, cycles: int | None, every: int | None, shortest: int) -> tuple[int, int]:
    """Length and number of cycles; a length below what it must be at least where they do not fit."""
    if every is not None:
        fit = room // (parts * every)
        return (every, fit if cycles is None else cycles) if (cycles or 1) <= fit else (0, 0)
    number = cycles or max(1, min(CYCLES, room // (parts * shortest)))
    return room // (parts * number), number


def _misfit(left: int, first: int, parts: int, cycles: int | None, every: int | None, shortest: int, unit: Unit) -> str:
    """What was asked for, what it needs, and what would fit."""
    many, limit, length = WORDS[unit]
    each, number = every or shortest, cycles or 1
    needed = -(-parts * number * each * 100 // (100 - CLOSING))
    room = left - -(-left * CLOSING // 100)
    cures = [f"{limit}={first + needed} or more"]
    cures += [f"cycles={room // (parts * each)} or fewer"] if number > 1 and room >= parts * each else []
    cures += [f"partitions={room // (number * each)} or fewer"] if room >= number * each else []
    cures += [f"{length}={room // (parts * number)} or fewer"] if each > 1 and room >= parts * number else []
    if unit == "step" and every is None and room >= parts * number:  # unasked, none is shorter than an epoch
        cures[-1] = f"every_n_steps={room // (parts * number)} for rounds shorter than an epoch"
    asked = f"partitions={parts}, cycles={cycles}, {length}={every} with {left} {many} of training"
    return (
        f"{asked}: {parts * number} rounds of at least {each} and a last one of {CLOSING}% of training take {needed} "
        f"{many}. Give {', '.join(cures[:-1])}{' or ' if cures[1:] else ''}{cures[-1]}."
    )
