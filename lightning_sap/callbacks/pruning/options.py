"""What a user may ask of a pruning callback: declared here, once, and checked at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from lightning_sap.engine.decision import Limits
from lightning_sap.engine.groups import Scope, check_scope
from lightning_sap.engine.patterns import Pattern
from lightning_sap.engine.selection import Selection, check_selection
from lightning_sap.functional.amount import ceil, floor
from lightning_sap.functional.scalars import is_real, is_whole, make_plain_
from lightning_sap.policies.base import Importance, Policy, check_policy
from lightning_sap.policies.gathered import needs_units
from lightning_sap.policies.importance import check_importance
from lightning_sap.policies.regrowth import GrowAndPrune
from lightning_sap.rounds.search import Tolerance

Schedule: TypeAlias = Literal["auto", "restart", "squeeze", "keep"]
RewindWeights: TypeAlias = Literal["init"] | int | None

SAME = {"init": "0"}  # as `rewind_weights`
TOLD = ("policy", "scope", "name")  # to loggers, always
MADE = ("policy", "importance", "tolerance")  # of options of their own, which loggers are told one by one
SIMPLE = (bool, int, float, str, type(None))  # types that loggers take
LONGEST_NAME = 150  # bytes: file systems take 255, and a file that is not whole yet has a run's identity behind it
OF_THE_PLAN = ("rounds", "every_n_epochs", "every_n_steps", "keep_zeros", "masks")  # what counts where a run begins


@dataclass(frozen=True)
class Options:
    """The policy of a pruning callback, and its options.

    Each option is declared here alone, its type and default as a field, its sentence below. ``takes_options`` gives
    them to the signatures and docstrings of the callbacks.

    Args:
        scope: What forms a group: ``"neuron"`` each output unit, ``"layer"`` each parameter, ``"global"`` all weights.
            None: ``"layer"``, and beside a ``tolerance`` ``"global"``.
        structure: What goes as one: ``"weight"`` single weights; ``"unit"`` whole output units, which :func:`shrink`
            can take out; ``"n:m"``, such as ``"2:4"`` (in YAML with the quotes): one pruning keeps exactly n of every m
            consecutive weights along the inputs.
        example_inputs: For ``structure="unit"``, what the module takes: a tensor, a tuple of arguments or a mapping of
            keyword arguments. None: its ``example_input_array``; a single chain of layers needs none.
        importance: By which score weights are compared: ``"magnitude"``, ``"taylor"`` (weight times gradient),
            ``"wanda"`` (weight times inputs), for whole units ``"fisher"`` (how well each tells classes apart), or an
            :class:`Importance`.
        tolerance: Search for the sparsest network whose metric is at most so much worse than its yardstick: a
            :class:`Tolerance`, such as ``Tolerance("val_acc", drop=0.01)``. Rounds that are worse are taken back, and
            after fit the module holds the sparsest sound one. None: every round is pruned as the policy says.
        rounds: How many prunings. None: as many as ``every_n_epochs`` or ``every_n_steps`` allows, or 4 to 15 by the
            number of epochs; 0 only holds masks.
        every_n_epochs: Length of a round, in epochs; the last one takes what is left over. None: as long as fits.
        every_n_steps: Length of a round, in optimizer steps; give it or ``every_n_epochs``, or neither. None: rounds
            are counted in epochs.
        rewind_weights: After a pruning the surviving weights go on as they are (None), or back to the first ones
            (``"init"``), or to those after that many completed epochs. Buffers go with them.
        lr_schedule: Every round starts the schedule anew (``"restart"``), or replays the whole of a schedule written
            for all of training (``"squeeze"``), or one schedule goes over all rounds (``"keep"``); ``"auto"`` chooses
            between the first two.
        reset_optimizer: Forget momenta and other optimizer state at each pruning.
        target_remaining: Fraction of the prunable weights that survives at the end, met exactly; None: no target.
        target_of: Of what it is a fraction: ``"prunable"`` of the prunable weights; ``"model"`` of all that are
            trained, those included that are left out and all stay.
        min_remaining: Fraction of its weights that every parameter keeps.
        min_per_unit: Number of weights that every output unit keeps, whatever the scope; one that has fewer keeps all.
            A row that its layer divides by its norm, as weight norm does, always keeps one.
        include: Parameter-name globs, module types (in YAML by their dotted paths, such as ``torch.nn.Linear``) or
            predicates ``(name, module, parameter) -> bool``: only what they match is prunable. None: the trained
            weights of two or more dimensions without embeddings. Trained is what an optimizer holds and has gradients.
        exclude: The same; what they match is not prunable.
        keep_zeros: Weights that are exactly zero when fit starts count as pruned; a parameter of zeros alone, such as a
            head that starts at zero, is dense.
        masks: Masks to start under: a mapping from names to bool tensors, True where a weight is kept; a path to a
            checkpoint, a round, a file of :func:`save_sparse` or a saved mapping; a history whose rounds were saved; or
            another callback. Weights without one start dense. Masks of an earlier fit of the callback that still hold
            come first. None: all start dense.
        save_rounds: Which rounds' trained models are kept, each as a checkpoint of the Trainer: every one (True), the
            latest so many (a number), or none (False). ``"weights"``: every one, with weights and masks alone, which
            :meth:`restore_round` takes and no run resumes from. None: every one if a :class:`PQIMonitor` may restore
            it, otherwise none.
        dirpath: Folder for them. None: ``rounds`` in the Trainer's ``log_dir``. One that is not empty gets a number.
        name: Tells two callbacks apart, in checkpoints and in log keys: two in one Trainer need two names.
        prog_bar: Show ``<name>/remaining`` on the progress bar.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If the policy is none, or the importance.
    """

    policy: Policy
    _: KW_ONLY
    scope: Scope | None = None
    structure: str = "weight"
    example_inputs: Any = field(default=None, compare=False)
    importance: Importance | str = "magnitude"
    tolerance: Tolerance | None = None
    rounds: int | None = None
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    rewind_weights: RewindWeights = None
    lr_schedule: Schedule = "auto"
    reset_optimizer: bool = True
    target_remaining: float | None = None
    target_of: Literal["prunable", "model"] = "prunable"
    min_remaining: float = 0.0
    min_per_unit: int = 0
    include: Selection = None
    exclude: Selection = None
    keep_zeros: bool = False
    masks: Any = field(default=None, compare=False)
    save_rounds: bool | int | Literal["weights"] | None = None
    dirpath: str | Path | None = None
    name: str = "sap"
    prog_bar: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        make_plain_(self)
        if self.dirpath is not None:
            object.__setattr__(self, "dirpath", str(self.dirpath))
        check_policy(self.policy)
        self._check_structure()
        if self.pattern is not None:
            object.__setattr__(self, "rounds", 1 if self.rounds is None else self.rounds)
        elif self.scope is None:
            object.__setattr__(self, "scope", "layer" if self.tolerance is None else "global")
        check_scope(self.group)
        if needs_units(check_importance(self.importance)) and self.structure != "unit":
            raise ValueError(
                f"importance={self.importance!r} scores whole units, and structure={self.structure!r} prunes none: "
                "give structure='unit'."
            )
        check_selection("include", self.include)
        check_selection("exclude", self.exclude)
        if self.masks is not None and self.keep_zeros:
            raise ValueError("masks and keep_zeros=True both say what is pruned at the start. Give one of them.")
        self._check_tolerance()
        self._check_regrowth()
        self._check_rounds()
        self._check_remaining()
        rewind, save = self.rewind_weights, self.save_rounds
        fits = rewind is None or rewind == "init" or is_whole(rewind, 0)
        _check(fits, "rewind_weights", rewind, "None (keep the weights), 'init' or a number of completed epochs")
        schedules = ("auto", "restart", "squeeze", "keep")
        _check(self.lr_schedule in schedules, "lr_schedule", self.lr_schedule, f"one of {schedules}")
        fits = save in (None, "weights") or isinstance(save, bool) or is_whole(save, 1)
        _check(fits, "save_rounds", save, "None, True, False, 'weights' or a whole number of at least 1")
        _check(bool(self.name) and "/" not in self.name, "name", self.name, "a non-empty text without '/'")
        fits = "\0" not in self.name and len(self.name.encode(errors="replace")) <= LONGEST_NAME
        _check(
            fits, "name", self.name, f"a text of at most {LONGEST_NAME} bytes without NUL, as files are named after it"
        )
        _check(isinstance(self.prog_bar, bool), "prog_bar", self.prog_bar, "True or False")
        _check("\0" not in str(self.dirpath or ""), "dirpath", self.dirpath, "a path without NUL")

    def _check_structure(self) -> None:
        """Raise unless it is known, and if another option contradicts it."""
        pattern = self.pattern
        fits = pattern is not None or self.structure in ("weight", "unit")
        allowed = "'weight', 'unit', or 'n:m' of whole numbers 0 < n < m such as '2:4'"
        _check(fits, "structure", self.structure, allowed)
        if self.example_inputs is not None and self.structure != "unit":
            raise ValueError(
                f"example_inputs are for structure='unit', and structure={self.structure!r} needs none. Leave one out."
            )
        if self.structure == "unit":
            self._check_units()
        if pattern is None:
            return
        contradictions = {
            "scope": self.scope is not None,
            "tolerance": self.tolerance is not None,
            "rounds": self.rounds not in (None, 0, 1),
            "target_remaining": self.target_remaining not in (None, pattern.remaining),
            "min_remaining": is_real(self.min_remaining) and self.min_remaining > pattern.remaining,
            "min_per_unit": is_whole(self.min_per_unit, 0) and self.min_per_unit > pattern.kept,
            "policy": self.policy.regrows,
        }
        for name in (name for name, holds in contradictions.items() if holds):
            raise ValueError(
                f"structure={self.structure!r} contradicts {name}={getattr(self, name)!r}: one pruning leaves exactly "
                f"{pattern.kept} of every {pattern.of} weights, {pattern.remaining:g} of them. Leave {name} out, or "
                "give structure='weight'."
            )

    def _check_units(self) -> None:
        if self.scope == "neuron":
            raise ValueError(
                "structure='unit' contradicts scope='neuron', in which a unit alone is measured. Give scope='layer' "
                "(the units of a layer are one vector), 'global', or structure='weight'."
            )
        if self.min_per_unit:
            raise ValueError(
                f"structure='unit' contradicts min_per_unit={self.min_per_unit!r}: whole units go. Leave it out, or "
                "give structure='weight'."
            )
        if self.policy.regrows:
            raise ValueError(
                f"structure='unit' contradicts {self.policy!r}, whose weights come back: units do not. Give another "
                "policy or structure='weight'."
            )

    def _check_tolerance(self) -> None:
        given = self.tolerance
        if given is not None and not isinstance(given, Tolerance):
            raise TypeError(f"tolerance must be None or a Tolerance such as Tolerance('val_acc'), got {given!r}.")
        if given is not None and self.rounds == 0:
            raise ValueError("rounds=0 only holds masks, and a tolerance searches. Leave one of them out.")

    def _check_regrowth(self) -> None:
        """Take the target from a policy that has one of its own; raise if another option contradicts it."""
        policy, target = self.policy, self.target_remaining
        if not isinstance(policy, GrowAndPrune) or self.rounds == 0:
            return
        if self.tolerance is not None:
            raise ValueError(
                f"tolerance={self.tolerance!r} contradicts {policy!r}, whose rounds are not sparser one after the "
                "other, so that none can be searched for. Leave the tolerance out, or give another policy."
            )
        first = [
            name for name in ("masks", "keep_zeros", "min_per_unit") if getattr(self, name) not in (None, False, 0)
        ]
        if first:
            raise ValueError(
                f"{first[0]} contradicts {policy!r}, which opens every weight of a part and keeps exact shares. Leave "
                f"{first[0]} out, or give another policy."
            )
        if target not in (None, policy.remaining):
            raise ValueError(
                f"target_remaining={target!r} contradicts {policy!r}, at whose end exactly {policy.remaining:g} of the "
                "weights are kept. Leave target_remaining out, or give the same fraction twice."
            )
        object.__setattr__(self, "target_remaining", policy.remaining)

    def _check_rounds(self) -> None:
        for name, least in {"rounds": 0, "every_n_epochs": 1, "every_n_steps": 1}.items():
            value = getattr(self, name)
            _check(value is None or is_whole(value, least), name, value, f"a whole number of at least {least}")
        if self.every_n_epochs is not None and self.every_n_steps is not None:
            raise ValueError(
                f"every_n_epochs={self.every_n_epochs} and every_n_steps={self.every_n_steps} both give the length of "
                "a round. Give one of them."
            )

    def _check_remaining(self) -> None:
        target, least = self.target_remaining, self.min_remaining
        fits = target is None or (is_real(target) and 0 < target <= 1)
        _check(fits, "target_remaining", target, "None or a fraction in (0, 1]")
        _check(is_real(least) and 0 <= least < 1, "min_remaining", least, "a fraction in [0, 1)")
        _check(is_whole(self.min_per_unit, 0), "min_per_unit", self.min_per_unit, "a whole number of at least 0")
        _check(self.target_of in ("prunable", "model"), "target_of", self.target_of, "'prunable' or 'model'")
        if target is not None and self.target_of == "prunable" and least > target:
            raise ValueError(
                f"min_remaining={least} is above target_remaining={target}: the target could not be reached. Lower "
                "min_remaining or raise target_remaining."
            )

    @property
    def group(self) -> Scope:
        """What forms a group."""
        return self.scope or "layer"

    @property
    def pattern(self) -> Pattern | None:
        """What is kept of every so many weights, where ``structure`` says so."""
        return Pattern.named(self.structure)

    @property
    def snapshot_epoch(self) -> int | None:
        """After how many completed epochs the weights to rewind to are taken; None: never."""
        return 0 if self.rewind_weights == "init" else self.rewind_weights

    def plain(self) -> dict[str, str]:
        """The options as texts, to be stored and compared; without addresses, which every process has anew."""
        given = {name: type(getattr(self, name)).__name__ for name in ("example_inputs", "masks")}  # else all numbers
        plain = {**vars(self), **given}
        del plain["prog_bar"]  # which changes nothing of a run
        texts = {key: value if isinstance(value, str) else repr(value) for key, value in plain.items()}
        return {key: re.sub(r" at 0x[0-9a-fA-F]+", "", text) for key, text in texts.items()}

    def settings(self) -> dict[str, bool | int | float | str | None]:
        """Policy, scope, name and what else differs from the defaults, as values that loggers take.

        What is made of options has them one by one beside it, such as ``policy.p``, to compare runs by.
        """
        defaults = {field.name: field.default for field in fields(self)}
        texts = {key: text for key, text in self.plain().items() if key in TOLD or vars(self)[key] != defaults[key]}
        made = {key: getattr(self, key) for key in MADE if key in texts and is_dataclass(getattr(self, key))}
        parts = {
            f"{key}.{part.name}": getattr(own, part.name, None) for key, own in made.items() for part in fields(own)
        }
        told = {key: own if isinstance(own := getattr(self, key), SIMPLE) else text for key, text in texts.items()}
        return told | {key: part for key, part in parts.items() if isinstance(part, SIMPLE)}

    def changed(self, key: str, stored: Mapping[str, str]) -> bool:
        """Whether an option differs from the one stored; what was not stored did not change."""
        now = self.plain()[key]
        return SAME.get(stored.get(key, now), stored.get(key, now)) != SAME.get(now, now)

    def floors(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Fewest weights that must survive in each parameter."""
        return {name: int(ceil(_exact(self.min_remaining * n))) for name, n in sizes.items()}

    def target(self, sizes: Mapping[str, int], others: int = 0) -> int:
        """How many weights of these sizes survive at the end, where there is a target; others are trained and stay."""
        others = others if self.target_of == "model" else 0
        return round((self.target_remaining or 0.0) * (sum(sizes.values()) + others)) - others

    def limits(self, sizes: dict[str, int], kept: int, prunings_left: int | None, target: int | None = None) -> Limits:
        """What the next pruning must keep to, from the sizes of the parameters, their survivors and prunings left.

        Args: ``target``: how many survive at the end; None: that fraction of the sizes.
        """
        floors = self.floors(sizes)
        if self.tolerance is not None:
            return Limits(floors)
        if self.target_remaining is None or prunings_left is None or kept == 0:
            return Limits(floors)
        target = self.target(sizes) if target is None else target
        if self.policy.regrows:  # between the first and the last pruning its weights come and go
            return Limits(floors, kept - target, kept - target) if prunings_left == 1 else Limits(floors)
        target = min(kept, target)
        share = (target / kept) ** (1 / max(1, prunings_left))
        most_kept = max(target, int(floor(_exact(kept * share))))
        return Limits(floors, least=kept - most_kept, most=kept - target)


def _exact(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _check(fits: bool, name: str, value: Any, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
