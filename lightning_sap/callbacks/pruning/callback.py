"""PruningCallback: WHEN a network is pruned while Lightning trains it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.callbacks.logging import log_epoch, log_now
from lightning_sap.callbacks.pruning import (
    archive,
    checks,
    compatibility,
    course,
    inventory,
    messages,
    planning,
    preview,
    progress,
    regrowth,
    restoring,
    tolerance,
    units,
)
from lightning_sap.callbacks.pruning.enforcement import hook_masks
from lightning_sap.callbacks.pruning.fit import Fit
from lightning_sap.callbacks.pruning.given_masks import check_given
from lightning_sap.callbacks.pruning.inventory import Plan
from lightning_sap.callbacks.pruning.lifecycle import Event, Stage
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.schedules import Schedules
from lightning_sap.callbacks.pruning.schema import SCHEMA
from lightning_sap.callbacks.pruning.session import PruningSession
from lightning_sap.callbacks.pruning.signatures import check_names, takes_options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.callbacks.training import of_a_run_in_a_fit
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.policies.base import Policy
from lightning_sap.rewind import fires_hooks, hook_steps, innermost_optimizers
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.protocol import RoundListener
from lightning_sap.sharding import reshard


@takes_options
class PruningCallback(Callback):
    """Prune a network between the rounds of its training, by any policy.

    Training is divided into rounds. Between two rounds the surviving weights are measured, the policy decides how many
    go, exactly that many of the smallest magnitudes are masked, the learning-rate schedule starts anew, and the next
    round trains under the masks. Nothing is pruned after the last epoch.

    Args:
        policy: How many weights a group loses: :class:`SparsityInformed`, :class:`FixedFraction` or your own
            :class:`Policy`.
        **options: All that :class:`Options` declares.

    Logs every epoch ``<name>/round``, ``<name>/remaining`` (fraction), ``<name>/pruned`` (weights that the latest
    pruning took) and ``<name>/lr`` (learning rate of the first parameter group in the latest step).

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If the policy is none, or there is no option of that name.

    Source: Diao et al., ICLR 2023, Algorithm 1; Frankle and Carbin, ICLR 2019 (weight rewinding); Renda et al.,
    ICLR 2020 (learning-rate rewinding).

    Example:
        >>> from lightning_sap import FixedFraction, PruningCallback
        >>> ticket = PruningCallback(FixedFraction(0.2), rounds=10, rewind_weights="init")
        >>> ticket.remaining
        1.0
    """

    def __init__(self, policy: Policy, **options: Any) -> None:
        super().__init__()
        check_names(self, options)
        check_given(options.get("masks"))
        self.options = Options(policy, **options)
        self.session = PruningSession(self.options)
        self._fit = Fit()

    # -- what others may read -----------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """By prunable parameter a bool tensor, sharded as it is, True where a weight survives; empty before any fit."""
        return self.session.state.masks.kept

    @property
    def remaining(self) -> float:
        """Fraction of the prunable weights that survives."""
        return self.session.state.masks.remaining

    @property
    def history(self) -> History:
        """One record for each round that ended."""
        return self.session.state.history

    @property
    def earlier(self) -> tuple[History, ...]:
        """The histories of the fits before the latest one, oldest first; checkpoints do not hold them."""
        return self.session.earlier

    def plan(self, module: nn.Module | None = None) -> Plan:
        """What is pruned of each parameter of a module, and what is left out and why, with both shares.

        Args:
            module: The module, as a fit would start on it; what requires gradients is trained. None: the latest fit's.

        Returns:
            The plan: ``print`` shows it, ``markdown()`` gives it as a table. A fit with a logger writes it into the
            Trainer's ``log_dir`` as ``<name>-plan.md``, at its start and at its end.

        Raises:
            ValueError: If there was no fit and no module is given, or a fit of the module could not start.

        Example:
            >>> from torch import nn
            >>> from lightning_sap import SAPCallback
            >>> print(SAPCallback().plan(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))))
            20 weights are prunable (100.0% remain), 44.4% of the 45 that are trained (100.0% remain)
              0.weight            20  left out: it is an embedding
              1.weight            20  pruned: a group
              1.bias               5  left out: it has fewer than two dimensions
        """
        return preview.plan_for(self.session, module, self._fit)

    def orders(self) -> tuple[float, float]:
        """Orders p and q of the policy's index."""
        return self.options.policy.p, self.options.policy.q

    def tensors(self, module: nn.Module) -> dict[str, PrunableTensor]:
        """The prunable weights, live, with their masks."""
        return self.session.tensors(module)

    def settings(self) -> dict[str, bool | int | float | str | None]:
        """Its options as loggers take them."""
        return self.options.settings()

    def prunes(self) -> bool:
        """Whether it has rounds, or only holds masks."""
        return self.options.rounds != 0

    def current_round(self) -> int:
        """Number of the round that goes on, in this fit."""
        return self.session.state.round

    def opened(self) -> list[str]:
        """Names of the parameters that are open in this round, to be pruned again."""
        return regrowth.opened(self.options, self.session.state)

    def ends_round(self, trainer: Trainer) -> bool:
        """Whether the round ends, as far as is planned, if the epoch ends now; rounds in steps end inside it too."""
        state, completed = self.session.state, trainer.current_epoch + 1
        if state.plan.is_over(state.round, state.elapsed(completed)):
            return True
        return completed == state.plan.end if state.plan.unit == "epoch" else planning.ends_training(trainer)

    def pqi_after_pruning(self) -> float | None:
        """PQ Index of all weights right after the latest pruning, or at the start of training."""
        return self.session.state.pqi_after_pruning

    # -- a fit begins -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._fit.is_of_another(trainer):
            raise RuntimeError(of_a_run_in_a_fit(self.options.name))
        if stage != "fit":
            self._fit.enter(Event.OTHER_IS_SET_UP)
            return
        if pl_module is self._fit.module():  # an exception may have come between a step and our hook
            self._hold_masks(pl_module)
        self._close(Event.RUN_ENDS)
        self.session.forget_fit()
        checks.check_strategy(trainer)
        compatibility.check_callbacks(trainer)
        self._fit = Fit(weakref.ref(trainer), weakref.ref(pl_module), waits=True, schedules_from=trainer.current_epoch)
        self._fit.enter(Event.FIT_IS_SET_UP)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the weights and remember schedules and optimizers, before a checkpoint restores them."""
        self.session.select(trainer, pl_module)
        checks.check_disjoint(self.options, trainer)
        checks.check_tolerance(self.options, trainer)
        if self.options.tolerance is None:
            checks.check_restoring(self.options, self._listeners(trainer))
        self.session.schedules = Schedules(trainer.optimizers, trainer.lr_scheduler_configs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what a checkpoint brought, or begin; then say what is going to happen."""
        fit, session = self._fit, self.session
        reshard(pl_module)
        if fit.pending is None:
            session.begin(trainer, pl_module, fit.schedules_from)
        else:
            session.resume(trainer, pl_module, fit.pending)
        wanted = self.options.lr_schedule if self._leads(trainer) else "keep"
        schedules = session.schedules.choose(trainer, pl_module, session.state.plan, wanted)
        listeners = self._listeners(trainer)
        restores = any(listener.may_restore for listener in listeners) and session.state.search is None
        archives = bool(self.options.save_rounds) or restores  # what a search hands back, it keeps
        archive.open_archive(trainer, session, archives, self._shared_folder(trainer))
        if fit.pending is None and trainer.global_step > 0:
            session.schedules.rewind_()  # where training goes on from a checkpoint that was not pruned
        if session.state.stop is not None and any(listener.may_stop for listener in listeners):
            trainer.should_stop = True  # the run was cut off after that answer
        else:
            session.state.stop = None
        if not any(listener.may_take_back for listener in listeners):
            session.state.kept = None
        fit.pending, fit.waits = None, False
        fit.enter(Event.TRAINING_STARTS)
        session.start_training(trainer, pl_module)
        self._hook(trainer, pl_module)
        if session.state.pqi_after_pruning is None:
            session.state.pqi_after_pruning = session.measure(pl_module).overall
        fit.course = course.begin(session, trainer, pl_module, schedules)

    def _hook(self, trainer: Trainer, module: LightningModule) -> None:
        """At each step of an optimizer: mask, count, and for the first one note the learning rate."""
        fit, session, optimizers = self._fit, self.session, trainer.optimizers

        def ours(function: Callable[..., None]) -> Callable[..., None]:
            """Where another callback's on_exception fails, our hooks stay: they are idle in the fits that follow."""
            return lambda *arguments: function(*arguments) if module.trainer is fit.trainer() else None

        hold, enforce = ours(partial(self._hold_masks, module)), ours(session.enforce)
        fit.hooks += hook_masks(module, optimizers, enforce, ours(session.meet_step), hold)
        fit.hooks += hook_steps(optimizers, ours(session.count_step))
        fit.hooks += hook_steps(optimizers[:1], ours(session.record_lr))
        fit.hooked = all(map(fires_hooks, innermost_optimizers(optimizers)))
        fit.global_step = trainer.global_step

    # -- rounds -------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if a round ended; catch up with the schedules if the last epoch was cut short."""
        self._advance(trainer, pl_module, trainer.current_epoch - 1)
        if self.session.state.search is not None:
            tolerance.check_logged(self.session, trainer)
        self.session.begin_epoch(trainer)
        self.session.schedules.advance_(trainer, self.session.state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Advance here too: after some resumes an epoch starts without its hook, and rounds in steps end in it."""
        if batch_idx == 0:
            self._advance(trainer, pl_module, trainer.current_epoch - 1)
            if self.session.state.epoch != trainer.current_epoch:
                self.session.begin_epoch(trainer)
        elif self.session.state.plan.unit == "step" and self.session.state.is_due(trainer.current_epoch):
            self._advance(trainer, pl_module, trainer.current_epoch)
        self.session.gathering.open(self.session, trainer, pl_module, batch)

    def _advance(self, trainer: Trainer, module: LightningModule, last_epoch: int) -> None:
        """Prune if a round ended since the last call, its last epoch as given."""
        round = self.session.state.round
        self.session.advance(trainer, module, last_epoch, self._listeners(trainer), self._beside(trainer))
        if self.session.state.round > round and self.session.state.plan.unit == "step":
            log_now(trainer, self._values() | self._named(tolerance.values(self.session, trainer)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Pruned weights take no part in gradient clipping."""
        if pl_module.automatic_optimization and (not self._fit.hooked or checks.clips_gradients(trainer, pl_module)):
            self.session.meet_gradients()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization the module clips by itself, at any time after this; else it may in its own hook."""
        if not pl_module.automatic_optimization or checks.overrides(pl_module, "on_after_backward"):
            self.session.meet_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit, session = self._fit, self.session
        session.gathering.close()
        if not fit.hooked:
            session.enforce()
            session.state.steps += trainer.global_step - fit.global_step
            session.state.epoch_steps += trainer.global_step - fit.global_step
            fit.global_step = trainer.global_step
        fit.course.see_batch(session.state)
        session.schedules.advance_(trainer, session.state, batches=batch_idx + 1, epoch_ended=trainer.is_last_batch)

    def _hold_masks(self, module: LightningModule) -> None:
        """Whatever wrote weights since the last step: those that are pruned are zero."""
        if self._fit.stage is Stage.TRAINING:
            self.session.hold(module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module's ``on_validation_start`` may have put other weights in."""
        self._hold_masks(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold_masks(pl_module)
        self.session.metrics.begin_validation(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """And so may its ``on_validation_epoch_start``, and callbacks behind this one."""
        if batch_idx == 0:
            self._hold_masks(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.session.metrics.end_validation(trainer, self.session.state.round)
            tolerance.see_validation(self.session.state)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For callbacks that look at validation end; the loggers get the values at the end of the epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = self._values() | self._named(tolerance.values(self.session, trainer))
            log_epoch(trainer, pl_module, values, logger=False, bar=self._on_bar())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End and save the round that ends with the epoch: from a checkpoint of this hook Lightning resumes."""
        self._hold_masks(pl_module)
        log_epoch(trainer, pl_module, self._values(), logger=True, bar=self._on_bar())
        if self.ends_round(trainer):
            self._fit.course.see_round(self.options, self.session.state)
            if self.session.state.steps > 0:
                self.session.end_round(trainer, pl_module, trainer.current_epoch, self._listeners(trainer))
        log_epoch(trainer, pl_module, self._named(tolerance.values(self.session, trainer)), logger=True)

    def _values(self) -> dict[str, float]:
        state = self.session.state
        rate = {} if state.lr is None else {"lr": float(state.lr)}
        return self._named({"round": state.round, "remaining": self.remaining, "pruned": state.count, **rate})

    def _on_bar(self) -> list[str]:
        return [f"{self.options.name}/remaining"] if self.options.prog_bar else []

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{self.options.name}/{key}": float(value) for key, value in values.items()}

    # -- a fit ends ---------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last round."""
        session = self.session
        session.hold(pl_module)
        if session.state.steps > 0 and session.state.plan.rounds != 0 and not self._goes_back(trainer):
            checks.check_ending(trainer, session.measure(pl_module))
        session.finish(trainer, pl_module, self._listeners(trainer), self._beside(trainer))
        self._fit.course.end(session.state, trainer)
        self._close(Event.TRAINING_ENDS)
        if session.state.search is not None and self.history.restored is not None:
            compatibility.save_last_again(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever another callback put into the module at the end of training: the masks hold."""
        reshard(pl_module)
        for pruner in _pruners(trainer):
            pruner.adopt_finished_run(pl_module)
        # by now Lightning has moved the module back to the CPU
        units.move_masks_(self.session)
        self.session.enforce()
        if leads := self._leads(trainer):
            self._put_back()
        self._fit.course.tell(self.options, self.session.state)
        inventory.tell(self.session, trainer, pl_module, is_over=True)
        if self._fit.waits and self.prunes():
            messages.warn_of_no_training(self.options, trainer)
        if leads:
            for listener in _of_kind(trainer, RoundListener):
                listener.on_run_end(trainer, pl_module, list(self.history))

    def adopt_finished_run(self, module: LightningModule) -> None:
        """Take up the checkpoint of a run that was over: Lightning then trains nothing, and calls no hook of it."""
        trainer, pending = self._fit.trainer(), self._fit.pending
        if pending is not None and trainer is not None:
            self._fit.pending, self._fit.waits = None, False
            self.session.adopt(trainer, module, pending)
            archive.open_archive(trainer, self.session, is_wanted=False, shared=None)  # finds the rounds that are there

    def _put_back(self) -> None:
        """Restore the round that a listener asked for, now that no callback writes any more."""
        stop = self.session.state.stop
        if stop is None or stop.restore is None or self.session.state.search is not None:
            return
        restoring.put_back(self.options.name, stop.restore, list(self.history), self.restore_round)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._fit.is_of_another(trainer):
            return
        with suppress(ValueError):  # of a module that cannot be looked at, which may be the very exception
            self._hold_masks(pl_module)
        if self._fit.stage is Stage.TRAINING:
            progress.tell_interrupted(trainer, self.session, exception)
        self._close(Event.RUN_ENDS)
        archive.release(trainer, self.session)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._fit.is_of_another(trainer):
            return
        if self._fit.stage is Stage.TRAINED:  # callbacks behind this one, and the module, have had their last turn
            self.session.enforce()
        self._close(Event.RUN_ENDS)
        archive.release(trainer, self.session)
        self.session.forget_fit()
        self._fit = Fit(self._fit.trainer, self._fit.module)

    def _close(self, event: Event) -> None:
        """Training is over: keep where the schedules stand, for files that are saved from now on."""
        if self._fit.stage is Stage.TRAINING:
            self.session.state.schedules = self.session.schedules.state()
        self._fit.enter(event)
        self.session.end_training()
        for hook in self._fit.hooks:
            hook.remove()
        self._fit.hooks = []

    def restore_round(self, round: int, module: nn.Module | None = None) -> RoundRecord:
        """Put the trained weights and the masks of a round back, in all copies that other callbacks keep too.

        To be called after training, on every rank.

        Args:
            round: Number of prunings before it; it must have been saved, see ``save_rounds``.
            module: The module; None: that of the latest fit, while it is there.

        Returns:
            The record of the round.

        Raises:
            ValueError: If there is no such round, it was not saved, its file is damaged or another, or the module is
                another one; on all ranks if on one, and nothing is changed then.
            FileNotFoundError: If its checkpoint is not there any more, or not seen by a rank.
            RuntimeError: If training is going on.

        Example:
            >>> from lightning_sap import SAPCallback
            >>> SAPCallback(save_rounds=True).restore_round(2)
            Traceback (most recent call last):
            ValueError: There is no record of round 2; those that ended are [].
        """
        record = self.history.of_round(round)
        if self._fit.stage is Stage.TRAINING:
            raise RuntimeError("restore_round cannot be called while training goes on; call it after fit.")
        if record.path is None:
            raise ValueError(f"Round {round} was not saved: give save_rounds=True (here {self.options.save_rounds}).")
        trainer, fitted = self._fit.trainer(), self._fit.module()
        if module is not None and module is not fitted:
            trainer = None  # the other callbacks of its Trainer are not concerned
        module = fitted if module is None else module
        if module is None:
            raise ValueError("The module of the latest fit is gone; give it as `module`.")
        beside = [] if trainer is None else self._beside(trainer)
        fit = None if trainer is None or fitted is None else (trainer, fitted)
        restoring.restore_(self.session, record, module, beside, fit)
        return self.history.of_round(round)

    # -- other callbacks ----------------------------------------------------------------------------------------------

    def _leads(self, trainer: Trainer) -> bool:
        """Whether the rounds of this callback count: of several that prune, the first's."""
        pruners = _pruners(trainer)
        return next((other for other in pruners if other.prunes()), pruners[0]) is self

    def _listeners(self, trainer: Trainer) -> list[RoundListener]:
        """Those that hear of the rounds of this callback, where they count."""
        others = _of_kind(trainer, RoundListener) if self.prunes() and self._leads(trainer) else []
        return [*tolerance.searcher(self.session), *others]

    def _goes_back(self, trainer: Trainer) -> bool:
        """Whether a listener, or the search of any pruner, may put another network into the module."""
        searches = any(pruner.session.state.search is not None for pruner in _pruners(trainer))
        return searches or bool(_of_kind(trainer, RoundListener))

    def _beside(self, trainer: Trainer) -> list[PruningSession]:
        """The runs of the other callbacks that prune."""
        return [other.session for other in _pruners(trainer) if other is not self]

    def _shared_folder(self, trainer: Trainer) -> str | None:
        """Where the callbacks before this one save their rounds, if they were given the same."""
        before = itertools.takewhile(lambda other: other is not self, _pruners(trainer))
        folders = (other.session.archive for other in before if other.options.dirpath == self.options.dirpath)
        return next(filter(None, folders), None)

    # -- checkpoints and copies ---------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name alone: changed options must not lose the state."""
        return checks.state_key(self.options.name)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on, as plain values and whole tensors; a collective under sharding."""
        if self._fit.pending is not None:  # it has not gone on yet
            return dict(self._fit.pending)
        packed = self.session.packed(training=self._fit.stage is Stage.TRAINING)
        return {**packed, "waiting": self._fit.waits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of training; while it goes on, or outside of a Trainer, take it up at once.

        LearningRateFinder and BatchSizeFinder restore what they saved: before training there is nothing in it.

        Raises:
            ValueError: If it is not the state of a pruning callback, or a newer version wrote it; nothing changes then.
        """
        fit, module = self._fit, self._fit.module()
        if fit.stage is not Stage.LOOKING:
            SCHEMA.read(state_dict)
        if fit.stage is Stage.TRAINING and module is not None:
            self.session.restore_state(module, state_dict)
        elif fit.stage is Stage.TRAINED or (fit.stage is Stage.WAITING and not state_dict.get("waiting")):
            fit.pending = state_dict
        elif fit.stage is Stage.IDLE or (fit.stage is Stage.WAITING and self.session.state.masks.is_dense):
            self.session.state = PruningState.unpack(state_dict)  # unless there are earlier masks

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            checks.check_state_name(self.options.name, trainer, checkpoint)
            checks.check_resumable(self.options.name, checkpoint)
            if self.state_key not in checkpoint.get("callbacks", {}):
                self._fit.schedules_from = 0  # a dense training goes on

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the metrics of this moment: Lightning does not, and a round's record may still need them."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if self._fit.pending is None and saved is not None:
            saved["metrics"] |= self.session.metrics.for_checkpoint(trainer, self.current_round())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a running fit, and the module that Lightning hangs on `log`."""
        own = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**own, "_fit": Fit()}


def _pruners(trainer: Trainer) -> list[PruningCallback]:
    return _of_kind(trainer, PruningCallback)


def _of_kind(trainer: Trainer, kind: type[Any]) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
