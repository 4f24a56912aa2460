"""How cycles of opening and closing fit into training."""

import re

import pytest

from lightning_sap.rounds.cycles import CLOSING, plan_cycles


@pytest.mark.parametrize("limit", [2, 3, 5, 7, 14, 20, 24, 60, 80, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_the_last_round_has_its_share_and_each_cycle_all_parts(limit, parts, unit):
    if parts > limit - -(-limit * CLOSING // 100):
        with pytest.raises(ValueError, match=f"partitions={parts}, cycles=None"):
            plan_cycles(limit, parts=parts, unit=unit)
        return
    plan = plan_cycles(limit, parts=parts, unit=unit, first=0)
    assert plan.rounds % parts == 0
    assert plan.length >= 1
    assert 100 * (limit - plan.rounds * plan.length) >= CLOSING * limit
    assert plan.rounds > parts or parts == 1 or 2 * parts > limit - limit * CLOSING / 100  # two cycles where they fit
    assert (plan.unit, plan.end) == (unit, limit)


@pytest.mark.parametrize(
    ("wanted", "rounds", "length"),
    [
        ({"parts": 2}, 4, 17),
        ({"parts": 4}, 8, 8),
        ({"parts": 4, "cycles": 2}, 8, 8),
        ({"parts": 4, "every": 5}, 12, 5),
        ({"parts": 4, "every": 5, "cycles": 1}, 4, 5),
        ({"parts": 4, "rounds": 8}, 8, 8),
        ({"parts": 4, "rounds": 8, "cycles": 2, "every": 3}, 8, 3),
        ({"parts": 2, "first": 40}, 4, 8),
        ({"parts": 4, "shortest": 12}, 4, 17),
        ({"parts": 4, "rounds": 0}, 0, 16),
    ],
)
def test_what_is_asked_for_fits_into_80_epochs(wanted, rounds, length):
    plan = plan_cycles(80, **wanted)
    assert (plan.rounds, plan.length) == (rounds, length if rounds else plan.length)


def test_without_a_known_end_there_are_two_cycles_of_the_given_length():
    plan = plan_cycles(None, every=100, unit="step", parts=3)
    assert (plan.rounds, plan.length, plan.end) == (6, 100, None)
    with pytest.raises(ValueError, match="The rounds have no length"):
        plan_cycles(-1, parts=3)


MISFITS = [
    (
        dict(limit=4, parts=4),
        "partitions=4, cycles=None, every_n_epochs=None with 4 epochs of training: 4 rounds of at least 1 and a last "
        "one of 15% of training take 5 epochs. Give max_epochs=5 or more or partitions=3 or fewer.",
    ),
    (
        dict(limit=20, parts=4, cycles=5),
        "20 rounds of at least 1 and a last one of 15% of training take 24 epochs. Give max_epochs=24 or more, "
        "cycles=4 or fewer or partitions=3 or fewer.",
    ),
    (
        dict(limit=20, parts=4, cycles=2, every=3),
        "take 29 epochs. Give max_epochs=29 or more, cycles=1 or fewer, partitions=2 or fewer or every_n_epochs=2 or "
        "fewer.",
    ),
    (
        dict(limit=100, parts=4, unit="step", shortest=50),
        "take 236 steps. Give max_steps=236 or more, partitions=1 or fewer or every_n_steps=21 for rounds shorter than "
        "an epoch.",
    ),
    (dict(limit=80, parts=4, rounds=6), "rounds=6 contradicts partitions=4: each cycle has one pruning for each part"),
    (dict(limit=80, parts=4, rounds=8, cycles=3), "contradicts partitions=4, cycles=3: each cycle"),
]


@pytest.mark.parametrize(("wanted", "words"), MISFITS)
def test_a_misfit_says_what_would_fit(wanted, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        plan_cycles(**wanted)


@pytest.mark.parametrize(("wanted", "words"), MISFITS[:4])
def test_what_is_advised_fits(wanted, words):
    with pytest.raises(ValueError, match="Give") as error:
        plan_cycles(**wanted)
    cures = dict(
        re.findall(
            r"(max_epochs|max_steps|cycles|partitions|every_n_epochs|every_n_steps)=(\d+) (?:or|for)", str(error.value)
        )
    )
    keys = {"max_epochs": "limit", "max_steps": "limit", "partitions": "parts"}
    assert cures
    for key, value in cures.items():
        name = "every" if key.startswith("every") else keys.get(key, key)
        plan = plan_cycles(**{**wanted, name: int(value)})
        assert plan.rounds >= 1
    least = {"limit": int(cures.get("max_epochs", cures.get("max_steps"))) - 1}
    with pytest.raises(ValueError, match="take"):
        plan_cycles(**{**wanted, **least})
