"""Options: what is out of range is refused with its name, its value and what is allowed; YAML gives the same values."""

import copy
import dataclasses
import inspect
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_sap import (
    FixedFraction,
    PhaseDetector,
    Policy,
    PQIMonitor,
    PQIndex,
    PruningCallback,
    SAPCallback,
    SparsityInformed,
)
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.signatures import takes_options
from lightning_sap.engine.decision import Limits


def pruning(**options):
    return PruningCallback(FixedFraction(0.5), **options)


class TestRanges:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *(
                ({"rounds": value}, f"rounds must be a whole number of at least 0, got {value!r}.")
                for value in (-1, 1.5, True, "3")
            ),
            *(
                ({name: value}, f"{name} must be a whole number of at least 1, got {value!r}.")
                for name in ("every_n_epochs", "every_n_steps")
                for value in (0, -2, 0.5, True)
            ),
            (
                {"every_n_epochs": 2, "every_n_steps": 40},
                "every_n_epochs=2 and every_n_steps=40 both give the length of a round. Give one of them.",
            ),
            *(
                (
                    {"rewind_weights": value},
                    "rewind_weights must be None (keep the weights), 'init' or a number of completed epochs, "
                    f"got {value!r}.",
                )
                for value in (-1, "first", 0.5, True)
            ),
            (
                {"lr_schedule": "cosine"},
                "lr_schedule must be one of ('auto', 'restart', 'squeeze', 'keep'), got 'cosine'.",
            ),
            *(
                ({"target_remaining": value}, f"target_remaining must be None or a fraction in (0, 1], got {value!r}.")
                for value in (0, 0.0, -0.1, 1.1, float("nan"), True)
            ),
            *(
                ({"min_remaining": value}, f"min_remaining must be a fraction in [0, 1), got {value!r}.")
                for value in (-0.1, 1, 1.5, float("nan"), False)
            ),
            (
                {"min_remaining": 0.3, "target_remaining": 0.2},
                "min_remaining=0.3 is above target_remaining=0.2: the target could not be reached. Lower min_remaining "
                "or raise target_remaining.",
            ),
            ({"scope": "channel"}, "Unknown scope 'channel'; it must be one of 'neuron', 'layer' and 'global'."),
            ({"name": ""}, "name must be a non-empty text without '/', got ''."),
            ({"name": "a/b"}, "name must be a non-empty text without '/', got 'a/b'."),
        ],
    )
    @pytest.mark.parametrize("build", [pruning, SAPCallback])
    def test_options_out_of_range_are_refused(self, build, options, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            build(**options)

    @pytest.mark.parametrize(
        "options",
        [
            {"rounds": 0},
            {"every_n_epochs": 1},
            {"every_n_steps": 1},
            {"rewind_weights": 0},
            {"rewind_weights": 12},
            {"target_remaining": 1.0},
            {"target_remaining": 1e-9},
            {"min_remaining": 0.2, "target_remaining": 0.2},
            {"min_remaining": 0.0},
            {"name": "a.b-c d"},
        ],
    )
    def test_options_at_the_ends_of_their_ranges_are_allowed(self, options):
        assert all(getattr(pruning(**options).options, key) == value for key, value in options.items())

    def test_a_folder_may_be_a_path(self):
        options = pruning(dirpath=Path("rounds") / "here").options
        assert options.dirpath == "rounds/here"
        assert options.plain() == pruning(dirpath="rounds/here").options.plain()

    @pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-0.5, 1.0)])
    def test_orders_out_of_range_are_refused(self, p, q):
        message = f"The orders of the PQ Index must satisfy 0 < p < q <= 1000, got p={p} and q={q}; try p=0.5, q=1.0."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SAPCallback(p=p, q=q)

    @pytest.mark.parametrize("wrong", [3, nn.Linear(2, 2), [nn.Linear, 0.5], int, [None]])
    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_include_and_exclude_of_a_wrong_type_are_refused(self, option, wrong):
        message = (
            f"{option} must be one or a list of parameter-name globs such as 'encoder.*', words such as 'output', "
        )
        with pytest.raises(TypeError, match=re.escape(message)):
            SAPCallback(**{option: wrong})

    @pytest.mark.parametrize("option", ["target_remaining", "min_remaining"])
    def test_fractions_that_are_texts_are_refused(self, option):
        with pytest.raises(ValueError, match=f"{option} must be .*a fraction in .*, got '0.1'"):
            SAPCallback(**{option: "0.1"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eta_r": -0.1}, "eta_r must be a number of at least 0, got -0.1."),
            ({"gamma": -1.0}, "gamma must be a number of at least 0, got -1.0."),
            ({"gamma": float("inf")}, "gamma must be a number of at least 0, got inf."),
            ({"gamma": True}, "gamma must be a number of at least 0, got True."),
            *(
                (
                    {"beta": value},
                    f"beta must be in [0, 1), got {value!r}; it is the largest fraction of a group that one pruning "
                    "takes, and 0.9 is the default.",
                )
                for value in (1.0, -0.1, "0.5", False)
            ),
        ],
    )
    def test_policy_options_out_of_range_are_refused(self, options, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SAPCallback(**options)

    @pytest.mark.parametrize("importance", ["magnitudes", None, 1, nn.Linear(2, 2)])
    def test_importance_of_another_type_is_refused(self, importance):
        known = ["fisher", "magnitude", "taylor", "wanda"]
        message = f"importance must be one of {known} or an Importance such as Magnitude(), got {importance!r}."
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
            SAPCallback(importance=importance)

    @pytest.mark.parametrize("policy", [0.2, None, FixedFraction, "sap"])
    def test_policy_of_another_type_is_refused(self, policy):
        message = f"policy must be a Policy such as SparsityInformed() or FixedFraction(0.2), got {policy!r}."
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            PruningCallback(policy)


class TestNumPyNumbers:
    """They are taken as Python's own of the same kind, and stored as these: what is stored is compared as text."""

    @pytest.mark.parametrize(
        ("name", "given", "expected"),
        [
            ("rounds", np.int64(3), 3),
            ("every_n_epochs", np.int32(2), 2),
            ("every_n_steps", np.uint8(40), 40),
            ("rewind_weights", np.int16(0), 0),
            ("save_rounds", np.int64(2), 2),
            ("save_rounds", np.bool_(True), True),
            ("target_remaining", np.float64(0.25), 0.25),
            ("target_remaining", np.float32(0.5), 0.5),
            ("min_remaining", np.float16(0.125), 0.125),
        ],
    )
    def test_of_an_option(self, name, given, expected):
        options = pruning(**{name: given}).options
        assert (type(getattr(options, name)), getattr(options, name)) == (type(expected), expected)
        assert options.plain() == pruning(**{name: expected}).options.plain()

    @pytest.mark.parametrize("name", ["p", "q", "eta_r", "gamma", "beta"])
    def test_of_sap(self, name):
        value = {"p": 0.5, "q": 2.0}.get(name, 0.25)
        policy = SAPCallback(**{name: np.float32(value)}).options.policy
        assert (type(getattr(policy, name)), getattr(policy, name)) == (float, value)
        assert repr(policy) == repr(SparsityInformed(**{name: value}))

    def test_of_a_fixed_fraction(self):
        assert repr(FixedFraction(np.float64(0.25))) == "FixedFraction(fraction=0.25)"

    def test_of_a_monitor(self):
        monitor = PQIMonitor(np.float64(1.0), np.float64(2.0), patience=np.int64(3))
        assert [type(value) for value in (monitor.p, monitor.q, monitor.patience)] == [float, float, int]
        assert (monitor.p, monitor.q, monitor.patience) == (1.0, 2.0, 3)
        assert type(PhaseDetector(patience=np.int64(3)).patience) is int

    def test_of_a_metric(self):
        metric = PQIndex(np.float64(1.0), np.float64(2.0))
        assert [type(value) for value in (metric.p, metric.q)] == [float, float]


class WithMore(SAPCallback):
    """What a user builds on it.

    Args:
        extra: An option of its own.
    """

    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


class TestDeclaredOnce:
    @pytest.mark.parametrize("callback", [PruningCallback, SAPCallback])
    def test_signature_and_docstring_tell_each_option_as_it_is_declared(self, callback):
        declared = inspect.signature(Options, eval_str=True).parameters
        shown, told = inspect.signature(callback).parameters, entries(callback)
        for name in declared.keys() - {"policy"}:
            assert shown[name] == declared[name]
            assert told[name] == entries(Options)[name]
        assert set(shown) == set(told)
        assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in shown.values())

    def test_every_field_has_its_sentence(self):
        names = [field.name for field in dataclasses.fields(Options)]
        assert ["policy", *entries(Options)] == names
        assert entries(Options)["min_remaining"] == "Fraction of its weights that every parameter keeps."

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: SAPCallback(round=3), "SAPCallback has no option 'round'; the closest is 'rounds'."),
            (lambda: SAPCallback(etar=0.1), "SAPCallback has no option 'etar'; the closest is 'eta_r'."),
            (lambda: pruning(every_epochs=3), "PruningCallback has no option 'every_epochs'; the closest is "),
            (
                lambda: pruning(remaining=0.5),
                "PruningCallback has no option 'remaining'; the closest is 'min_remaining'.",
            ),
            (lambda: WithMore(extras=2), "WithMore has no option 'extras'; the closest is 'extra'."),
            (lambda: WithMore(kwargs=2), "WithMore has no option 'kwargs'; the closest is "),
        ],
    )
    def test_an_unknown_option_is_answered_with_the_closest(self, build, message):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            build()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
    @pytest.mark.parametrize("callback", [SAPCallback(rounds=3), WithMore(2, min_remaining=0.1, p=0.7)])
    def test_copies_have_the_same_options(self, callback, copied):
        again = copied(callback)
        assert type(again) is type(callback)
        assert again.options == callback.options

    def test_a_subclass_passes_them_on(self):
        callback = WithMore(extra=2, p=0.7, scope="global")
        assert (callback.extra, callback.options.policy.p, callback.options.scope) == (2, 0.7, "global")

    def test_without_docstrings_the_signature_tells_them(self, monkeypatch):
        """As under `python -OO`."""

        class Bare(PruningCallback):
            def __init__(self, policy, more=1, **options):
                super().__init__(policy, **options)

        monkeypatch.setattr(Options, "__doc__", None)
        names = [field.name for field in dataclasses.fields(Options)]
        assert list(inspect.signature(takes_options(Bare)).parameters) == ["policy", "more", *names[1:]]
        assert Bare.__doc__ is None


def entries(kind):
    """By name what is said under "Args:", in one line each."""
    block = inspect.cleandoc(kind.__doc__).partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\S+): (.*(?:\n     .*)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


class TestLimits:
    SIZES = {"a": 100, "b": 7}

    @pytest.mark.parametrize(("least", "floors"), [(0.0, (0, 0)), (0.1, (10, 1)), (0.5, (50, 4)), (1 / 7, (15, 1))])
    def test_floors_are_rounded_up(self, least, floors):
        limits = pruning(min_remaining=least).options.limits(self.SIZES, 107, 3)
        assert (limits.floors["a"], limits.floors["b"]) == floors

    @pytest.mark.parametrize("n", [10**9, 2 * 10**9, 4 * 10**12])
    def test_floors_of_whole_numbers_stay_exact_however_large(self, n):
        limits = pruning(min_remaining=0.5, target_remaining=0.5).options.limits({"a": n}, n, 1)
        assert limits == Limits({"a": n // 2}, n // 2, n // 2)

    def test_limits_without_a_target_hold_floors_only(self):
        assert pruning().options.limits(self.SIZES, 107, 3) == Limits({"a": 0, "b": 0})

    @pytest.mark.parametrize(
        ("alive", "left", "least", "most"),
        [
            (100, 3, 51, 88),  # to 12 of 100: each time by the factor 0.493, at the second by 0.490 if one more went
            (50, 2, 26, 38),
            (25, 1, 13, 13),
            (13, 1, 1, 1),
            (12, 1, 0, 0),
            (12, 3, 0, 0),
            (5, 2, 0, 0),  # fewer than the target from the start: they stay
            (100, 0, 88, 88),
        ],
    )
    def test_limits_of_a_target_are_the_geometric_share_left(self, alive, left, least, most):
        options = pruning(target_remaining=0.125).options
        assert options.limits({"a": 100}, alive, left) == Limits({"a": 0}, least, most)

    def test_limits_of_a_target_without_a_number_of_prunings(self):
        options = pruning(target_remaining=0.125).options
        assert options.limits({"a": 100}, 100, None) == Limits({"a": 0})

    def test_limits_where_no_weight_is_kept(self):
        assert pruning(target_remaining=0.5).options.limits({"a": 4}, 0, 2) == Limits({"a": 0})


YAML = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: lightning_sap.SAPCallback
      init_args:
        p: 0.7
        q: 1.5
        eta_r: 0.1
        gamma: 0.8
        beta: 0.5
        scope: global
        structure: weight
        importance: wanda
        rounds: 5
        every_n_epochs: 2
        rewind_weights: init
        lr_schedule: squeeze
        reset_optimizer: false
        target_remaining: 0.2
        min_remaining: 0.05
        min_per_unit: 1
        include: "net.0.*"
        exclude: ["*.bias", "net.3.*"]
        keep_zeros: true
        save_rounds: 3
        dirpath: rounds/here
        name: first
        prog_bar: false
    - class_path: lightning_sap.PruningCallback
      init_args:
        policy:
          class_path: lightning_sap.FixedFraction
          init_args:
            fraction: 0.3
        scope: neuron
        rewind_weights: 2
        lr_schedule: keep
        every_n_steps: 40
        include: ["net.3.*"]
        exclude: "*.bias"
        name: second
    - class_path: lightning_sap.PruningCallback
      init_args:
        policy:
          class_path: lightning_sap.SparsityInformed
          init_args:
            p: 0.2
            q: 0.9
        structure: "2:4"
        rewind_weights: null
        name: third
    - class_path: lightning_sap.PQIMonitor
      init_args:
        p: 1.0
        q: 2.0
        monitor: val_acc
        mode: max
        gini: true
        log_layers: ["net.*"]
"""
OF_CLASSES = """
    - class_path: lightning_sap.SAPCallback
      init_args:
        importance:
          class_path: lightning_sap.Taylor
        tolerance:
          class_path: lightning_sap.Tolerance
          init_args: {monitor: val_acc, drop: 0.02, reference: 0.9}
        masks: rounds/sap-round-003.ckpt
        exclude: [output, torch.nn.Embedding, "net.4.*"]
        save_rounds: weights
        name: fourth
    - class_path: lightning_sap.PruningCallback
      init_args:
        policy:
          class_path: lightning_sap.GrowAndPrune
          init_args:
            remaining: 0.2
            partitions: [["net.0.*"], ["net.3.*", "net.4.*"]]
            close: {class_path: lightning_sap.SparsityInformed, init_args: {p: 1.0, q: 2.0}}
        name: fifth
"""


class TestYAML:
    @pytest.fixture
    def callbacks(self, tmp_path):
        (tmp_path / "config.yaml").write_text(YAML)
        return self.built(["--config", str(tmp_path / "config.yaml")])

    def cli(self, args):
        return LightningCLI(BoringModel, args=args, run=False, save_config_callback=None, seed_everything_default=False)

    def of(self, cli):
        return [c for c in cli.trainer.callbacks if isinstance(c, PruningCallback | PQIMonitor)]

    def built(self, args):
        return self.of(self.cli(args))

    def test_yaml_gives_every_option_of_sap(self, callbacks):
        assert type(callbacks[0]) is SAPCallback
        assert vars(callbacks[0].options) == {
            "policy": SparsityInformed(p=0.7, q=1.5, eta_r=0.1, gamma=0.8, beta=0.5),
            "scope": "global",
            "structure": "weight",
            "example_inputs": None,
            "importance": "wanda",
            "tolerance": None,
            "rounds": 5,
            "every_n_epochs": 2,
            "every_n_steps": None,
            "rewind_weights": "init",
            "lr_schedule": "squeeze",
            "reset_optimizer": False,
            "target_remaining": 0.2,
            "target_of": "prunable",
            "min_remaining": 0.05,
            "min_per_unit": 1,
            "include": "net.0.*",
            "exclude": ["*.bias", "net.3.*"],
            "keep_zeros": True,
            "masks": None,
            "save_rounds": 3,
            "dirpath": "rounds/here",
            "name": "first",
            "prog_bar": False,
        }

    def test_the_config_that_a_run_saves_gives_the_same_options(self, callbacks, tmp_path):
        """LightningCLI writes ``config.yaml`` beside each run's logs."""
        (tmp_path / "config.yaml").write_text(YAML + OF_CLASSES)
        cli = self.cli(["--config", str(tmp_path / "config.yaml")])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as an error one would make jsonargparse try another way
            (tmp_path / "saved.yaml").write_text(cli.parser.dump(cli.config))
        before, after = self.of(cli), self.built(["--config", str(tmp_path / "saved.yaml")])
        pruners = [callback for callback in before if isinstance(callback, PruningCallback)]
        assert len(pruners) == 5
        assert [p.options.plain() for p in pruners] == [p.options.plain() for p in after[:3] + after[4:]]
        assert before[3].log_layers == after[3].log_layers == ["net.*"]

    def test_yaml_gives_a_policy_by_its_class_path(self, callbacks):
        options = callbacks[1].options
        assert type(callbacks[1]) is PruningCallback
        assert options.policy == FixedFraction(0.3)
        assert (options.scope, options.rewind_weights, options.lr_schedule) == ("neuron", 2, "keep")
        assert (options.every_n_steps, options.every_n_epochs) == (40, None)
        assert (options.include, options.exclude) == (["net.3.*"], "*.bias")
        assert callbacks[2].options.policy == SparsityInformed(0.2, 0.9)
        assert callbacks[2].options.rewind_weights is None
        assert callbacks[2].options.structure == "2:4"

    def test_yaml_gives_the_monitor(self, callbacks):
        monitor = callbacks[3]
        assert (monitor.p, monitor.q, monitor.monitor, monitor.mode) == (1.0, 2.0, "val_acc", "max")
        assert (monitor.gini, monitor.log_layers) == (True, ["net.*"])

    def test_command_line_gives_options_of_sap(self):
        (callback,) = self.built(
            [
                "--trainer.logger=false",
                "--trainer.accelerator=cpu",
                "--trainer.callbacks=lightning_sap.SAPCallback",
                "--trainer.callbacks.p=0.7",
                "--trainer.callbacks.rewind_weights=init",
                "--trainer.callbacks.include=net.0.*",
                "--trainer.callbacks.lr_schedule=restart",
            ]
        )
        options = callback.options
        assert options.policy == SparsityInformed(p=0.7)
        assert (options.rewind_weights, options.include, options.lr_schedule) == ("init", "net.0.*", "restart")

    @pytest.mark.parametrize("callback", ["SAPCallback", "PruningCallback", f"{__name__}.WithMore"])
    def test_help_tells_each_option_with_its_sentence_type_and_default(self, callback, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            self.built([f"--trainer.callbacks.help={callback}"])
        told = " ".join(capsys.readouterr().out.split())
        for name, sentence in entries(Options).items():
            assert f"--trainer.callbacks.{name} " in told
            assert f"{sentence} (type: " in told
        assert "Fraction of its weights that every parameter keeps. (type: float, default: 0.0)" in told

    def test_a_config_is_printed_with_every_default(self, capsys):
        with pytest.raises(SystemExit):
            self.built(["--trainer.callbacks=lightning_sap.SAPCallback", "--print_config"])
        callback = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
        defaults = {name: parameter.default for name, parameter in inspect.signature(SAPCallback).parameters.items()}
        assert callback == {"class_path": "lightning_sap.SAPCallback", "init_args": defaults}

    def test_an_option_in_a_file_is_overridden_on_the_command_line(self, tmp_path):
        (tmp_path / "config.yaml").write_text(YAML)
        override = ["--trainer.callbacks.patience=5"]  # of the last callback of the list
        callbacks = self.built(["--config", str(tmp_path / "config.yaml"), *override])
        assert [callback.patience for callback in callbacks if isinstance(callback, PQIMonitor)] == [5]

    @pytest.mark.parametrize("value", ["first", "1.5"])
    def test_yaml_with_a_wrong_value_is_refused(self, value, capsys):
        with pytest.raises(SystemExit):
            self.built(
                [
                    "--trainer.accelerator=cpu",
                    "--trainer.callbacks=lightning_sap.SAPCallback",
                    f"--trainer.callbacks.rewind_weights={value}",
                ]
            )
        assert "rewind_weights" in capsys.readouterr().err


class Nothing(Policy):
    """No dataclass: its text is that of every policy."""

    def __call__(self, sums, round):
        return torch.zeros_like(sums.count)


class TestTexts:
    def test_option_texts_hold_no_addresses(self):
        """Every process has other ones, and a resumed run would say that options changed."""
        texts = PruningCallback(Nothing(), include=lambda *_: True, exclude=[str.isalpha]).options.plain()
        assert texts["policy"] == "Nothing()"
        assert texts["include"] == "<function TestTexts.test_option_texts_hold_no_addresses.<locals>.<lambda>>"
        assert not any("0x" in text for text in texts.values())

    def test_option_texts_tell_a_change(self):
        options = pruning(include=["*.weight", nn.Linear], rewind_weights=2, target_remaining=0.5).options
        stored = options.plain()
        assert {type(value) for value in stored.values()} == {str}
        assert not any(options.changed(key, stored) for key in stored)
        other = pruning(include=["*.weight", nn.Linear], rewind_weights="init", target_remaining=0.5).options
        assert [key for key in stored if other.changed(key, stored)] == ["rewind_weights"]
        assert not other.changed("rewind_weights", {})
