"""Curves written by hand for every phase and witness, and the score on the measured runs."""

import copy
import json
import math
import pickle
import random
import re
import runpy
import sys

import pytest

import lightning_sap
from lightning_sap.rounds import phases
from lightning_sap.rounds.phases import Phase, PhaseDetector

FALLING = [0.20, 0.13, 0.09, 0.07, 0.06, 0.055]
RISING = [0.06, 0.07, 0.08, 0.10, 0.12]
FALLING_AGAIN = [0.11, 0.08, 0.06, 0.04]


def feed(detector, curve, **given):
    """The phase after each round, in words; `given` holds a sequence of `layers` or `metric`, one value a round."""
    rounds = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)] or [{}] * len(
        curve
    )
    return [detector.update(index, **now).value for index, now in zip(curve, rounds, strict=True)]


def changes(phases):
    """The phases in their order, without repetitions."""
    return [phase for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]


def noisy(curve, sigma, seed):
    generator = random.Random(seed)
    return [index * math.exp(generator.gauss(0, sigma)) for index in curve]


class TestTurns:
    def test_a_falling_index_is_regularization(self):
        detector = PhaseDetector()
        assert set(feed(detector, FALLING)) == {"regularization"}
        assert detector.since == 0
        assert detector.reason == "The index has not turned from falling to rising."

    def test_the_first_turn_dates_from_the_lowest_index(self):
        detector = PhaseDetector()
        assert feed(detector, FALLING + RISING) == ["regularization"] * 8 + ["compression"] * 3
        assert detector.since == 5
        assert detector.reason == "Since round 5 the index rises: 0.08 after 0.055 at its lowest."

    def test_the_second_turn_dates_from_the_peak_and_is_final(self):
        detector = PhaseDetector()
        assert feed(detector, FALLING + RISING + FALLING_AGAIN)[-4:] == ["compression"] * 2 + ["collapse"] * 2
        assert detector.since == 10
        assert detector.reason == "Since round 10 the index falls: 0.06 after 0.12 at its peak."
        assert feed(detector, [0.3, 0.4, 0.5]) == ["collapse"] * 3
        assert detector.since == 10

    def test_a_rise_from_the_start_is_no_turn(self):
        """The weights of a young network grow apart by training alone; only what fell can turn."""
        assert set(feed(PhaseDetector(), [0.1, 0.11, 0.13, 0.15, 0.18, 0.16, 0.13, 0.10])) == {"regularization"}

    def test_a_turn_beyond_the_first_value_is_one(self):
        assert feed(PhaseDetector(), [0.2, 0.1, 0.05, 0.3, 0.3])[-1] == "compression"

    def test_a_constant_index_is_no_turn(self):
        for index in (0.0, 0.1):
            assert set(feed(PhaseDetector(), [index] * 10)) == {"regularization"}

    def test_the_overall_index_yields_to_the_mean_of_the_layers(self):
        layers = [{"a": (index, 1000), "b": (index, 1000)} for index in FALLING + RISING]
        detector = PhaseDetector()
        assert feed(detector, [0.1] * 11, layers=layers)[-1] == "compression"
        assert set(feed(PhaseDetector(), FALLING + RISING, layers=[{"a": (0.1, 1000)}] * 11)) == {"regularization"}

    def test_a_layer_that_joins_is_no_turn(self):
        """Its index is that of a dense layer, which lifts the mean for a while."""
        old = [0.2 * 0.8**t for t in range(12)]
        new = [{"a": (index, 9999)} | ({"b": (old[t - 6], 9999)} if t > 5 else {}) for t, index in enumerate(old)]
        assert set(feed(PhaseDetector(), old, layers=new)) == {"regularization"}


class TestNoise:
    @pytest.mark.parametrize("seed", range(20))
    def test_noise_does_not_turn_a_falling_index(self, seed):
        falling = [0.03 + 0.17 * 0.8**t for t in range(30)]
        assert set(feed(PhaseDetector(), noisy(falling, 0.05, seed))) == {"regularization"}

    def test_more_noise_asks_for_more_of_a_turn(self, monkeypatch):
        """Where the index scatters by a fifth, factors of 1.25 occur by chance all the time."""
        falling = [0.03 + 0.17 * 0.8**t for t in range(30)]

        def misled():
            return sum("collapse" in feed(PhaseDetector(), noisy(falling, 0.2, seed)) for seed in range(100))

        assert misled() <= 10
        monkeypatch.setattr(phases, "SCATTERS", 0)
        assert misled() >= 70

    @pytest.mark.parametrize("seed", range(20))
    def test_the_phases_are_seen_through_noise(self, seed):
        down, up = [0.2 * 0.8**t for t in range(9)], [0.04 * 1.15**t for t in range(10)]
        curve = noisy(down + up + [0.12 * 0.7**t for t in range(8)], 0.05, seed)
        assert changes(feed(PhaseDetector(), curve)) == ["regularization", "compression", "collapse"]

    def test_a_single_high_round_is_outlasted_by_patience(self):
        curve = [*FALLING, 0.09, 0.054, 0.053, 0.052]
        assert set(feed(PhaseDetector(), curve)) == {"regularization"}
        assert "compression" in feed(PhaseDetector(patience=1), curve)

    def test_rise_and_fall_are_the_thresholds(self):
        curve = FALLING + RISING + [0.11, 0.10, 0.10]
        assert feed(PhaseDetector(), curve)[-1] == "compression"
        assert feed(PhaseDetector(fall=0.1), curve)[-1] == "collapse"
        assert feed(PhaseDetector(rise=1.5), curve)[-1] == "regularization"

    def test_scaling_the_index_changes_nothing(self):
        curve = noisy(FALLING + RISING + FALLING_AGAIN, 0.03, 0)
        for scale in (1e-6, 0.5, 3.0):
            assert feed(PhaseDetector(), [scale * index for index in curve]) == feed(PhaseDetector(), curve)


class TestHardFacts:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["index", "layer"])
    def test_collapse_by_an_index_that_is_not_finite(self, value, where):
        detector = PhaseDetector()
        feed(detector, [0.2, 0.1], metric=[0.9, 0.9])
        given = {"index": {"pqi": value}, "layer": {"pqi": 0.1, "layers": {"fc": (value, 7)}}}
        assert detector.update(**given[where]) is Phase.COLLAPSE
        assert detector.since == 2
        name = {"index": "the index", "layer": "the index of fc"}[where]
        assert detector.reason == f"In round 2 {name} is {value}."

    def test_collapse_by_an_index_fallen_to_nothing(self):
        detector = PhaseDetector()
        assert feed(detector, [0.2, 0.1, 0.001]) == ["regularization", "regularization", "collapse"]
        assert (detector.since, detector.reason) == (
            2,
            "In round 2 the index fell to nothing: 0.001 after at most 0.2.",
        )
        assert feed(PhaseDetector(floor=0.001), [0.2, 0.1, 0.001])[-1] == "regularization"

    def test_collapse_by_a_layer_that_lost_its_last_weight(self):
        detector = PhaseDetector()
        layers = [{"a": (0.1, 100), "b": (0.1, left)} for left in (50, 5, 0)]
        assert feed(detector, [0.2, 0.1, 0.1], layers=layers, metric=[0.8, 0.9, 0.9])[1:] == [
            "regularization",
            "collapse",
        ]
        assert (detector.since, detector.reason) == (2, "In round 2 b lost its last weight.")

    def test_no_collapse_by_a_layer_that_never_had_weights(self):
        layers = [{"a": (0.1, 100), "b": (0.0, 0)}] * 4
        assert set(feed(PhaseDetector(), [0.1] * 4, layers=layers)) == {"regularization"}


class TestExhaustion:
    def test_collapse_by_a_layer_with_nothing_to_spare(self):
        detector = PhaseDetector()
        layers = [{"a": (0.1, 1000), "b": (index, 10)} for index in (0.2, 0.05, 0.002, 0.002, 0.002)]
        assert feed(detector, [0.1] * 5, layers=layers)[2:] == ["regularization", "collapse", "collapse"]
        assert (detector.since, detector.reason) == (
            2,
            "Since round 2 b has nothing to spare: 10 weights of index 0.002.",
        )

    def test_no_collapse_by_a_layer_that_never_had_to_spare(self):
        layers = [{"a": (0.1, 1000), "b": (index, 4)} for index in (0.2, 0.05, 0.002, 0.002)]
        assert set(feed(PhaseDetector(), [0.1] * 4, layers=layers)) == {"regularization"}

    def test_no_collapse_by_exhaustion_once_the_network_compresses(self):
        """There the second turn is the witness: a layer may run dry while the others work."""
        curve = [*FALLING, *RISING, 0.13, 0.14, 0.15]
        layers = [{"a": (index, 1000), "b": (0.012 if t < 9 else 1e-4, 100)} for t, index in enumerate(curve)]
        assert feed(PhaseDetector(), [0.1] * 14, layers=layers)[-5:] == ["compression"] * 5

    def test_no_collapse_by_exhaustion_while_the_metric_is_near_its_best(self):
        layers = [{"a": (0.1, 1000), "b": (index, 10)} for index in (0.2, 0.05, 0.002, 0.002, 0.002)]
        assert feed(PhaseDetector(), [0.1] * 5, layers=layers, metric=[0.9] * 4 + [0.89])[-1] == "regularization"
        assert feed(PhaseDetector(), [0.1] * 5, layers=layers, metric=[0.9] * 2 + [0.8] * 3)[-1] == "collapse"


class TestMetric:
    def test_collapse_by_the_metric_alone(self):
        detector = PhaseDetector()
        assert feed(detector, [0.1] * 6, metric=[0.90, 0.95, 0.90, 0.70, 0.72, 0.60])[3:] == [
            "regularization",
            "collapse",
            "collapse",
        ]
        assert (detector.since, detector.reason) == (
            3,
            "Since round 3 the metric is far from its best: 0.72 after 0.95.",
        )

    def test_no_collapse_by_a_single_bad_round(self):
        assert set(feed(PhaseDetector(), [0.1] * 5, metric=[0.9, 0.1, 0.9, 0.1, 0.9])) == {"regularization"}

    def test_collapse_by_a_metric_in_mode_min(self):
        detector = PhaseDetector(mode="min")
        losses = [0.30, 0.10, 0.30, 0.90, 1.10, 1.20]
        assert feed(detector, [0.1] * 6, metric=losses)[-2:] == ["regularization", "collapse"]
        assert (detector.since, detector.reason) == (4, "Since round 4 the metric is far from its best: 1.2 after 0.1.")
        assert "collapse" not in feed(PhaseDetector(mode="min"), [0.1] * 6, metric=[2.3, 1, 0.5, 0.4, 0.3, 0.3])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_collapse_by_a_metric_that_is_not_finite_in_patience_rounds(self, value, mode):
        detector = PhaseDetector(mode)
        assert feed(detector, [0.1] * 5, metric=[0.9, 0.9, value, None, value])[-2:] == ["regularization", "collapse"]
        assert (detector.since, detector.last_sound) == (2, 1)
        assert detector.reason == f"Since round 2 the metric is {value}."
        assert feed(PhaseDetector(mode, patience=1), [0.1] * 2, metric=[0.9, value])[-1] == "collapse"

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_a_metric_that_is_not_finite_in_single_rounds_changes_nothing_but_that_they_are_not_sound(
        self, value, mode
    ):
        detector = PhaseDetector(mode)
        found = [(detector.update(0.1, metric=m).value, detector.last_sound) for m in (0.9, 0.9, value, 0.9, value)]
        assert found == [("regularization", last) for last in (0, 1, 1, 3, 3)]
        assert detector.update(0.1, metric=0.4 if mode == "max" else 9.5) is Phase.REGULARIZATION  # its best is 0.9

    def test_a_metric_that_is_nan_in_the_first_round_makes_it_not_sound(self):
        detector = PhaseDetector()
        assert [(detector.update(0.1, metric=m).value, detector.last_sound) for m in (math.nan, 0.9)] == [
            ("regularization", None), ("regularization", 1),
        ]  # fmt: skip

    def test_a_nan_between_two_bad_rounds_neither_counts_nor_ends_their_series(self):
        assert feed(PhaseDetector(), [0.1] * 4, metric=[0.9, 0.1, math.nan, 0.9])[-1] == "regularization"
        assert feed(PhaseDetector(), [0.1] * 4, metric=[0.9, 0.1, math.nan, 0.1])[-2:] == ["regularization", "collapse"]

    def test_neither_unit_nor_sign_of_a_metric_matters(self):
        """A score counted in percent, a loss given as a negative score."""
        score, loss = [0.9, 0.95, 0.7, 0.7], [0.2, 0.1, 1.5, 1.5]
        assert feed(PhaseDetector(), [0.1] * 4, metric=[100 * value for value in score])[-1] == "collapse"
        assert feed(PhaseDetector("min"), [0.1] * 4, metric=[100 * value for value in loss])[-1] == "collapse"
        assert feed(PhaseDetector("max"), [0.1] * 4, metric=[-value for value in loss])[-1] == "collapse"
        assert feed(PhaseDetector("max"), [0.1] * 4, metric=[-0.2, -0.1, -0.3, -0.3])[-1] == "regularization"

    def test_a_round_without_metric_changes_nothing(self):
        assert feed(PhaseDetector(), [0.1] * 5, metric=[0.9, 0.5, None, 0.5, None])[-2:] == ["collapse"] * 2

    def test_metric_near_its_best_holds_back_the_second_turn(self):
        curve = FALLING + RISING + FALLING_AGAIN
        good, bad = [0.9] * len(curve), [0.9] * (len(curve) - 3) + [0.8] * 3
        assert feed(PhaseDetector(), curve, metric=good)[-1] == "compression"
        assert feed(PhaseDetector(), curve, metric=bad)[-1] == "collapse"

    def test_metric_distance_of_a_collapse_is_an_option(self):
        score = [0.9, 0.8, 0.8]
        assert feed(PhaseDetector(), [0.1] * 3, metric=score)[-1] == "regularization"
        assert feed(PhaseDetector(metric_change=0.05), [0.1] * 3, metric=score)[-1] == "collapse"


class TestLastSound:
    """The round worth going back to, after each round."""

    def sound(self, detector, curve, **given):
        rounds = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        found = []
        for index, now in zip(curve, rounds or [{}] * len(curve), strict=True):
            detector.update(index, **now)
            found.append(detector.last_sound)
        return found

    def test_last_sound_round_before_any_round_is_none(self):
        assert PhaseDetector().last_sound is None

    def test_last_sound_round_by_a_score_is_within_two_hundredths_of_the_best(self):
        score = [0.50, 0.90, 0.883, 0.881, 1.00, 0.99, 0.97, 0.985]
        assert self.sound(PhaseDetector(), [0.1] * 8, metric=score) == [0, 1, 2, 2, 4, 5, 5, 7]

    def test_last_sound_round_by_a_loss_is_within_a_twentieth_of_the_best(self):
        loss = [2.0, 1.0, 1.04, 1.06, 0.5, 0.52, 0.53]
        assert self.sound(PhaseDetector("min"), [0.1] * 7, metric=loss) == [0, 1, 2, 2, 4, 5, 5]

    def test_last_sound_round_takes_a_score_below_zero_as_a_loss(self):
        score = [-2.0, -1.0, -1.04, -1.06]
        assert self.sound(PhaseDetector("max"), [0.1] * 4, metric=score) == [0, 1, 2, 2]

    @pytest.mark.parametrize(("tolerance", "last"), [(0.005, 1), (0.03, 2), (0.2, 3)])
    def test_last_sound_round_tolerance_is_an_option(self, tolerance, last):
        score = [0.50, 1.00, 0.98, 0.85]
        assert self.sound(PhaseDetector(tolerance=tolerance), [0.1] * 4, metric=score)[-1] == last

    def test_last_sound_round_is_before_the_collapse(self):
        detector, score = PhaseDetector(), [0.90, 0.89, 0.60, 0.50, 0.90]
        assert self.sound(detector, [0.1] * 5, metric=score) == [0, 1, 1, 1, 1]
        assert (detector.phase, detector.since) == ("collapse", 2)

    def test_last_sound_round_has_the_metric_once_there_was_one(self):
        assert self.sound(PhaseDetector(), [0.1] * 4, metric=[0.9, None, None, 0.9]) == [0, 0, 0, 3]

    def test_last_sound_round_before_the_first_metric_goes_by_the_layers(self):
        layers = [{"a": (0.1, left)} for left in (1000, 500, 20, 10)]
        assert self.sound(PhaseDetector(), [0.1] * 4, layers=layers, metric=[None] * 4) == [0, 1, 1, 1]
        assert self.sound(PhaseDetector(), [0.1] * 4, layers=layers, metric=[None, None, 0.9, 0.9]) == [0, 1, 2, 3]

    def test_last_sound_round_by_the_layers_spares_a_twentieth_of_the_most(self):
        """Index times surviving weights: of a 100, 120, 40, 6, 5; of b always 10."""
        a = [(0.1, 1000), (0.2, 600), (0.1, 400), (0.1, 61), (0.1, 59)]
        layers = [{"a": values, "b": (0.1, 100)} for values in a]
        assert self.sound(PhaseDetector(), [0.1] * 5, layers=layers) == [0, 1, 2, 3, 3]
        assert self.sound(PhaseDetector(reserve=0.2), [0.1] * 5, layers=layers) == [0, 1, 2, 2, 2]

    def test_last_sound_round_is_before_one_layer_is_exhausted(self):
        layers = [{"a": (0.1, 1000), "b": (0.1, left)} for left in (1000, 500, 10)]
        assert self.sound(PhaseDetector(), [0.1] * 3, layers=layers) == [0, 1, 1]

    def test_last_sound_round_measures_a_layer_that_joins_by_itself(self):
        layers = [{"a": (0.1, 1000)}, {"a": (0.1, 800), "b": (0.1, 10)}, {"a": (0.1, 600), "b": (0.1, 8)}]
        assert self.sound(PhaseDetector(), [0.1] * 3, layers=layers) == [0, 1, 2]

    def test_last_sound_round_by_the_overall_index_is_before_the_collapse(self):
        assert self.sound(PhaseDetector(), [0.2, 0.1, 0.05, 0.0]) == [0, 1, 2, 2]

    def test_last_sound_round_is_finite(self):
        assert self.sound(PhaseDetector(), [math.nan]) == [None]
        assert self.sound(PhaseDetector(), [0.1, math.inf]) == [0, 0]
        assert self.sound(PhaseDetector(), [0.1, 0.1], metric=[0.9, math.nan]) == [0, 0]

    def test_last_sound_round_is_none_where_the_first_is_lost(self):
        detector = PhaseDetector(patience=1)
        assert self.sound(detector, [0.1], layers=[{"a": (math.nan, 100)}]) == [None]
        assert detector.phase == "collapse"


class TestState:
    def middle(self):
        detector = PhaseDetector()
        layers = [{"a": (index, 1000), "b": (index, 30)} for index in FALLING + RISING]
        feed(detector, FALLING + RISING, layers=layers, metric=[0.9] * 11)
        return detector

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
    def test_copied_phase_detector_goes_on_alike(self, clone):
        detector = self.middle()
        other = clone(detector)
        assert feed(other, FALLING_AGAIN) == feed(detector, FALLING_AGAIN)
        assert other == detector

    def test_phase_detector_state_is_plain_and_travels(self):
        detector = self.middle()
        state = json.loads(json.dumps(detector.state_dict()))
        other = PhaseDetector()
        other.load_state_dict(state)
        assert other == detector
        before = copy.deepcopy(state)
        assert feed(other, FALLING_AGAIN) == feed(detector, FALLING_AGAIN)
        assert state == before
        assert (other.since, other.reason) == (detector.since, detector.reason)

    def test_phase_detector_restored_after_any_round_goes_on_alike(self):
        curve = noisy(FALLING + RISING + FALLING_AGAIN, 0.05, 1)
        through = feed(whole := PhaseDetector(), curve)
        for stop in range(len(curve)):
            first, second = PhaseDetector(), PhaseDetector()
            before = feed(first, curve[:stop])
            second.load_state_dict(first.state_dict())
            assert before + feed(second, curve[stop:]) == through
            assert (second.since, second.reason) == (whole.since, whole.reason)

    def test_phase_detector_state_holds_only_plain_types(self):
        numpy = pytest.importorskip("numpy")
        detector = PhaseDetector()
        for index in FALLING + RISING:
            layers = {"a": (numpy.float32(index), numpy.int64(9))}
            detector.update(numpy.float64(index), layers=layers, metric=numpy.float32(0.9))

        def plain(value):
            if type(value) is dict:
                return all(type(key) is str and plain(v) for key, v in value.items())
            return all(map(plain, value)) if type(value) is list else type(value) in (int, float, str, bool, type(None))

        assert plain(detector.state_dict())

    def test_phase_detector_state_of_an_older_version_keeps_defaults(self):
        detector = PhaseDetector()
        detector.load_state_dict({"phase": "compression", "since": 3, "unknown": 1})
        assert (detector.update(0.1), detector.since) == (Phase.COMPRESSION, 3)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "best"}, "mode must be 'max' or 'min', got 'best'"),
            ({"rise": 0}, "rise must be above 0"),
            ({"fall": 1.0}, "fall must be above 0 and below 1"),
            ({"patience": 0}, "patience must be above 0"),
            ({"spare": math.nan}, "spare must be above 0"),
            ({"floor": -0.1}, "floor must be above 0 and below 1"),
            ({"metric_change": math.inf}, "metric_change must be above 0"),
            ({"tolerance": 0}, "tolerance must be above 0"),
            ({"reserve": 1.0}, "reserve must be above 0 and below 1"),
        ],
    )
    def test_phase_detector_refuses_options_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            PhaseDetector(**options)

    def test_phases_are_words(self):
        assert [str(phase) for phase in Phase] == ["regularization", "compression", "collapse"]
        assert Phase.COLLAPSE == "collapse"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the tool leaves that to the interpreter
class TestMeasuredRuns:
    """The 72 runs on digits: by the index and the surviving weights of the layers, and by a metric beside them."""

    def score(self, shared, monkeypatch, capsys, *arguments):
        tool, curves = shared / "tools" / "score_stops.py", shared / "reference" / "pqi_curves.json"
        if not tool.is_file() or not curves.is_file():
            pytest.skip("the measured runs are not beside the repository")
        monkeypatch.setattr(lightning_sap, "PhaseDetector", PhaseDetector, raising=False)
        monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
        runpy.run_path(str(tool))
        words = "caught|missed|false stops|median delay|worst|found|without a turn|from"
        return {name: float(n) for name, n in re.findall(rf"({words}) ([\d.]+)", capsys.readouterr().out)}

    def test_measured_run_collapses_by_the_index(self, shared, monkeypatch, capsys):
        score = self.score(shared, monkeypatch, capsys)
        assert score["caught"] >= 18
        assert score["false stops"] == 0
        assert score["median delay"] == 0

    @pytest.mark.parametrize("metric", ["val_acc", "val_loss"])
    def test_measured_run_collapses_by_a_metric_too(self, shared, monkeypatch, capsys, metric):
        score = self.score(shared, monkeypatch, capsys, "--metric", metric)
        assert score["missed"] == score["false stops"] == 0
        assert score["worst"] <= 1

    def test_measured_run_compresses(self, shared, monkeypatch, capsys):
        score = self.score(shared, monkeypatch, capsys, "--phase", "compression")
        assert score["found"] >= 16
        assert score["without a turn"] <= 5
        assert score["from"] <= 0.01


def test_a_best_loss_of_nothing_makes_no_change_far():
    detector = PhaseDetector("min")
    phases = [detector.update(0.2, metric=loss) for loss in (0.02, 0.0, 0.001, 0.001, 0.002)]
    assert set(phases) == {Phase.REGULARIZATION}
    assert detector.last_sound == 1


@pytest.mark.parametrize("patience", [0.5, 1.5])
def test_patience_is_a_number_of_rounds(patience):
    with pytest.raises(ValueError, match=f"patience must be a whole number of rounds, got {patience}"):
        PhaseDetector(patience=patience)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"round": -2}, "round must be a whole number of at least -1, got -2"),
        ({"phase": "sleep"}, "phase must be one of"),
        ({"_curve": [0.1, "a"], "_rounds": [0, 1]}, r"_curve\[1\] must be a number of at least 0, got 'a'"),
        ({"_curve": [0.1], "_rounds": []}, r"_rounds must be a list of 1 rounds, one for each index in _curve"),
        ({"_curve": [math.nan], "_rounds": [0], "round": 0}, "_curve must be a list of finite numbers"),
        ({"_series": {"rise": [1]}}, r"_series\['rise'\] must be a list of 2 entries"),
    ],
)
def test_state_that_no_detector_has_is_refused(state, message):
    detector = PhaseDetector()
    detector.update(0.3)
    before = detector.state_dict()
    with pytest.raises(ValueError, match=f"^This is no state of a PhaseDetector: {message}"):
        detector.load_state_dict(state)
    assert detector.state_dict() == before
