"""Random searches: what is handed back is the sparsest sound round, whatever the scores, and the masks hold."""

import copy
import math
import tempfile
import warnings
from pathlib import Path

import pytest
from helpers import Crash, Rounds, Watch, crash, is_masked, same
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from resuming import records_of
from searching import Scored, search

from lightning_sap import FixedFraction, PruningCallback, SAPCallback, Tolerance

SCORE = st.one_of(st.floats(0.5, 0.98), st.sampled_from([0.9, 0.895, 0.885, 0.7]), st.just(math.nan))
OPTIONS = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["global", "layer", "neuron"]),
        "every_n_epochs": st.sampled_from([None, 1, 2]),
        "rewind_weights": st.sampled_from([None, "init"]),
        "reset_optimizer": st.booleans(),
        "min_remaining": st.sampled_from([0.0, 0.1]),
        "lr_schedule": st.sampled_from(["auto", "restart", "keep"]),
    }
)


@st.composite
def pruners(draw):
    tolerance = Tolerance(
        "val_acc", draw(st.sampled_from([0.0, 0.01, 0.1])), reference=draw(st.sampled_from([None, 0.9, 0.99]))
    )
    options = {**draw(OPTIONS), "tolerance": tolerance}
    if draw(st.booleans()):
        return SAPCallback(**options)
    return PruningCallback(FixedFraction(draw(st.sampled_from([0.1, 0.5, 0.9]))), **options)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(pruner=pruners(), scores=st.lists(SCORE, min_size=6, max_size=14))
def test_what_is_handed_back_is_the_sparsest_sound_round(pruner, scores):
    rounds, module = Rounds(pruner), Scored([0.9, 0.9, *scores], period=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search(rounds, scores=module.scores, pruner=pruner, module=module)
    sound = [record for record in pruner.history if record.sound]
    assert all(record.metric >= record.bound - 1e-6 for record in sound)
    unsound = [record for record in pruner.history if record.sound is False and record.bound is not None]
    assert not any(record.metric >= record.bound for record in unsound)
    assert is_masked(module.state_dict(), pruner.masks)
    if sound:
        least = min(record.weights for record in sound)
        held = [record.round for record in sound if record.weights == least]
        assert pruner.session.state.search.best == held[-1]
        assert round(pruner.remaining * 72) == least
        assert same(module.state_dict(), rounds.states[held[-1]])
    for before, after in zip(pruner.history, pruner.history[1:], strict=False):
        assert before.sound is not False or before.taken_back or after.weights == before.weights


def run(pruner, scores, *callbacks, ckpt_path=None):
    module = Scored(scores, period=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search(*callbacks, scores=scores, pruner=pruner, module=module, ckpt_path=ckpt_path)
    return module.state_dict(), records_of(pruner)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(pruner=pruners(), scores=st.lists(SCORE, min_size=6, max_size=10), share=st.floats(0, 1, exclude_max=True))
def test_a_kill_after_any_epoch_changes_nothing(pruner, scores, share):
    epoch, twins = int(share * (len(scores) - 1)), [copy.deepcopy(pruner) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "killed.ckpt")
        ends = Watch(
            on_train_epoch_end=lambda t, _: t.save_checkpoint(file) if t.current_epoch == epoch else None,
            on_train_epoch_start=lambda t, _: crash() if t.current_epoch == epoch + 1 else None,
        )
        weights, records = run(pruner, scores)
        with pytest.raises(Crash):
            run(twins[0], scores, ends)
        again, resumed = run(twins[1], scores, ckpt_path=file)
    assert same(again, weights)
    assert str(resumed) == str(records)  # NaN is not equal to itself
