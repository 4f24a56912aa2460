"""StoppingRule: one verdict, in the phase to stop on, and the round to go back to."""

import json
import re

import pytest

from lightning_sap import Phase, PhaseDetector, RoundRecord
from lightning_sap.callbacks.monitor.stopping import StoppingRule, Verdict

TURNING = [0.20, 0.13, 0.09, 0.07, 0.06, 0.055, 0.06, 0.07, 0.08, 0.10, 0.12]  # seen to turn in round 8
LOSING = [0.90, 0.95, 0.94, 0.60, 0.50, 0.40]


def judged(stop_on, curve=TURNING, metric=None, **options):
    """A judge that was told of all rounds."""
    judge = StoppingRule(stop_on, PhaseDetector(**options))
    for t, index in enumerate(curve):
        judge.update(index, {"w": (index, 1000)}, None if metric is None else metric[t])
    return judge


def record(round, pqi, metric, left=0.5):
    return RoundRecord(round, round, round, left, {"w": left}, pqi, {"w": pqi}, metrics={"val_acc": metric})


class TestVerdict:
    def test_verdict_of_a_compression_restores_the_round_that_the_turn_dates_from(self):
        verdict = judged("compression").verdict
        assert verdict == Verdict("compression", 8, "Since round 5 the index rises: 0.08 after 0.055 at its lowest.", 5)
        assert str(verdict) == (
            "Stopped after round 8: compression. Since round 5 the index rises: 0.08 after 0.055 at its lowest."
        )

    def test_verdict_of_a_collapse_restores_the_last_sound_round(self):
        verdict = judged("collapse", [0.2] * 6, LOSING).verdict
        assert verdict == Verdict("collapse", 4, "Since round 3 the metric is far from its best: 0.5 after 0.95.", 2)

    def test_a_collapse_stops_what_waits_for_a_compression_too(self):
        verdict = judged("compression", [0.2] * 6, LOSING).verdict
        assert (verdict.phase, verdict.round, verdict.restore) == ("collapse", 4, 2)

    def test_verdict_without_a_sound_round_restores_none(self):
        verdict = judged("collapse", [float("nan")]).verdict
        assert verdict == Verdict("collapse", 0, "In round 0 the index of w is nan.", None)

    @pytest.mark.parametrize(
        ("curve", "metric", "phase"),
        [(TURNING, None, "compression"), ([0.2] * 6, LOSING, "collapse"), ([0.2, float("inf")], None, "collapse")],
    )
    def test_no_verdict_without_stop_on(self, curve, metric, phase):
        judge = judged(None, curve, metric)
        assert (judge.phase, judge.verdict) == (phase, None)

    def test_no_verdict_of_a_compression_where_only_a_collapse_stops(self):
        judge = judged("collapse")
        assert (judge.phase, judge.verdict) == (Phase.COMPRESSION, None)

    def test_first_verdict_stands(self):
        """What follows, where `min_epochs` keeps training going, changes neither verdict nor round."""
        metric = [0.9] * 9 + [0.1] * 2
        judge = judged("compression", TURNING, metric)
        assert judge.phase is Phase.COLLAPSE
        assert (judge.verdict.phase, judge.verdict.round, judge.verdict.restore) == ("compression", 8, 5)

    @pytest.mark.parametrize("value", ["Collapse", "regularization", "", 1, True])
    def test_unknown_stop_on_is_refused(self, value):
        message = f"stop_on must be 'collapse', 'compression' or None, got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            StoppingRule(value, PhaseDetector())


class TestCatchUp:
    def test_catch_up_equals_having_seen_the_rounds(self):
        records = [record(t, 0.2, metric) for t, metric in enumerate(LOSING[:4])]
        late, seen = StoppingRule("collapse", PhaseDetector()), StoppingRule("collapse", PhaseDetector())
        late.catch_up(records, 4, {"w": 1000}, "val_acc")
        for metric in LOSING[:4]:
            seen.update(0.2, {"w": (0.2, 500)}, metric)
        assert late.detector == seen.detector
        late.update(0.2, {"w": (0.2, 500)}, 0.5)
        assert (late.verdict.round, late.verdict.restore) == (4, 2)

    def test_catch_up_leaves_out_rounds_already_seen(self):
        records = [record(t, index, 0.9) for t, index in enumerate(TURNING)]
        judge = judged("compression", TURNING[:3])
        judge.catch_up(records, 3, {"w": 1000}, None)
        assert judge.detector.round == 2
        judge.catch_up(records, 8, {"w": 1000}, None)
        assert (judge.detector.round, judge.phase) == (7, Phase.REGULARIZATION)

    def test_catch_up_leaves_out_the_round_that_is_judged_next(self):
        judge = StoppingRule("collapse", PhaseDetector())
        judge.catch_up([record(t, index, 0.9) for t, index in enumerate(TURNING)], 10, {"w": 1000}, "val_acc")
        assert judge.detector.round == 9

    def test_catch_up_comes_to_no_verdict(self):
        """That is for a round that ends, whose phase is then known to be reached."""
        judge = StoppingRule("compression", PhaseDetector())
        judge.catch_up([record(t, index, 0.9) for t, index in enumerate(TURNING)], 11, {"w": 1000}, "val_acc")
        assert (judge.phase, judge.verdict) == (Phase.COMPRESSION, None)

    @pytest.mark.parametrize(("monitor", "phase"), [("val_acc", "collapse"), (None, "regularization")])
    def test_catch_up_reads_only_the_monitored_metric(self, monitor, phase):
        judge = StoppingRule("collapse", PhaseDetector())
        judge.catch_up([record(t, 0.2, metric) for t, metric in enumerate(LOSING)], 6, {"w": 1000}, monitor)
        assert judge.phase == phase

    def test_catch_up_turns_shares_of_weights_into_numbers(self):
        judge = StoppingRule("collapse", PhaseDetector())
        judge.catch_up([record(0, 0.2, 0.9, left=1.0), record(1, 0.2, 0.9, left=0.0)], 2, {"w": 1000}, None)
        assert judge.detector.reason == "In round 1 w lost its last weight."


class TestState:
    @pytest.mark.parametrize("rounds", range(1, 11))
    def test_stopping_rule_restored_from_its_state_goes_on_alike(self, rounds):
        judge, other = judged("compression", TURNING[:rounds]), StoppingRule("compression", PhaseDetector())
        other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
        assert (other.verdict, other.detector) == (judge.verdict, judge.detector)
        for index in TURNING[rounds:]:
            other.update(index, {"w": (index, 1000)}, None)
        assert other.verdict == judged("compression").verdict

    def test_a_verdict_does_not_count_where_nothing_is_to_be_stopped_on_any_more(self):
        state = judged("compression").state_dict()
        assert state["verdict"]["round"] == 8
        other = StoppingRule(None, PhaseDetector())
        other.load_state_dict(state)
        assert (other.phase, other.verdict) == (Phase.COMPRESSION, None)

    def test_changed_stop_on_counts_from_the_next_round(self):
        other = StoppingRule("compression", PhaseDetector())
        other.load_state_dict(judged(None).state_dict())
        assert other.verdict is None
        other.update(0.12, {"w": (0.12, 1000)}, None)
        assert (other.verdict.round, other.verdict.restore) == (11, 5)
