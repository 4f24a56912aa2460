"""PruningCallback: WHEN a network is pruned while Lightning trains it."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning import archive, checks, compatibility, messages
from lightning_sap.callbacks.pruning.fit import Fit
from lightning_sap.callbacks.pruning.options import Options, check_names, takes_options
from lightning_sap.callbacks.pruning.schedules import Schedules
from lightning_sap.callbacks.pruning.session import PruningSession
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.weights import low_rank_adapters
from lightning_sap.policies.base import Policy
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan
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

    Logs every epoch ``<name>/round``, ``<name>/remaining`` (fraction) and ``<name>/pruned`` (weights that the latest
    pruning took).

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
        self.options = Options(policy, **options)
        self._session = PruningSession(self.options)
        self._fit = Fit()

    @property
    def masks(self) -> dict[str, Tensor]:
        """By prunable parameter a bool tensor, sharded as it is, True where a weight survives; empty before any fit."""
        return self._session.state.masks.kept

    @property
    def remaining(self) -> float:
        """Fraction of the prunable weights that survives."""
        return self._session.state.masks.remaining

    @property
    def history(self) -> History:
        """One record for each round that ended."""
        return self._session.state.history

    def orders(self) -> tuple[float, float]:
        """Orders p and q of the policy's index."""
        return self.options.policy.p, self.options.policy.q

    def pieces(self, module: nn.Module) -> dict[str, PrunableTensor]:
        """The prunable weights, live, with their masks."""
        return self._session.pieces(module)

    def prunes(self) -> bool:
        """Whether it has rounds, or only holds masks."""
        return self.options.rounds != 0

    def current_round(self) -> int:
        """Number of prunings so far in this fit."""
        return self._session.state.round

    def ends_round(self, epoch: int) -> bool:
        """Whether that epoch is planned to be the last of a round."""
        return self._session.state.plan.ends_round(epoch)

    def pqi_after_pruning(self) -> float | None:
        """PQ Index of all weights right after the latest pruning, or at the start of training."""
        return self._session.state.pqi_after_pruning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._fit.stage = stage
            return
        self._session.forget_weights()
        checks.check_strategy(trainer)
        compatibility.check_callbacks(trainer)
        self._fit = Fit(
            stage, weakref.ref(trainer), weakref.ref(pl_module), waits=True, schedules_from=trainer.current_epoch,
            archives=bool(self.options.save_rounds),
        )  # fmt: skip

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the weights and remember schedules and optimizers, before a checkpoint restores them."""
        self._session.weights = self._session.select(pl_module)
        checks.check_disjoint(self.options, trainer, pl_module)
        self._fit.schedules = Schedules(trainer.optimizers, trainer.lr_scheduler_configs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what a checkpoint brought, or begin; then say what is going to happen."""
        fit, run = self._fit, self._session
        reshard(pl_module)
        if fit.pending is None:
            run.begin(trainer, pl_module, fit.schedules_from)
        else:
            run.resume(trainer, pl_module, fit.pending)
            fit.schedules.load(run.state.schedules)
        wanted = self.options.lr_schedule if self._leads(trainer) else "keep"
        schedules = fit.schedules.choose(trainer, pl_module, run.state.plan, wanted)
        run.open_archive(trainer, fit.archives, self._shared_folder(trainer))
        if fit.pending is None and trainer.global_step > 0:
            fit.schedules.rewind_()  # where training goes on from a checkpoint that was not pruned
        fit.stage, fit.pending, fit.waits = "train", None, False
        run.state.masks.apply_(run.live())
        self._remove_hooks()
        optimizers = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "register_step_post_hook")]
        fit.hooks = [optimizer.register_step_post_hook(run.enforce) for optimizer in optimizers]
        fit.hooks += [optimizer.register_step_post_hook(run.record_lr) for optimizer in optimizers[:1]]
        fit.hooked = len(optimizers) == len(trainer.optimizers)
        if run.state.pqi_after_pruning is None:
            run.state.pqi_after_pruning = run.measure(pl_module).overall
        rank_zero_info(messages.announcement(self.options, run.state, schedules))
        if run.state.plan.rounds != 0:
            messages.warn_of_adapters(self.options, low_rank_adapters(pl_module, run.weights))
        if trainer.barebones:
            messages.warn_of_silence(self.options)

    def _leads(self, trainer: Trainer) -> bool:
        """Whether the schedules follow these rounds: of several callbacks that prune, those of the first."""
        return next((other for other in _pruners(trainer) if other.prunes()), self) is self

    def _shared_folder(self, trainer: Trainer) -> str | None:
        """Where the callbacks before this one save their rounds, if they were given the same."""
        before = itertools.takewhile(lambda other: other is not self, _pruners(trainer))
        folders = (other._session.state.folder for other in before if other.options.dirpath == self.options.dirpath)
        return next(filter(None, folders), None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last round and say what was reached."""
        if trainer.global_step > self._session.state.round_step:
            measure = self._session.measure(pl_module)
            if self._session.state.plan.rounds != 0 and not _of_kind(trainer, RoundListener):  # which may go back
                checks.check_ending(trainer, measure)
            self._session.save_round(trainer)  # where it was shorter than planned
            self._session.state.history.append(self._session.record(trainer, measure))
        rank_zero_info(messages.farewell(self.options, self._session.state, stopped=trainer.should_stop))
        self._close("trained")

    def adopt_finished_run(self, module: LightningModule) -> None:
        """Take up the checkpoint of a run that was over: Lightning then trains nothing, and calls no hook of it."""
        trainer, pending = self._fit.trainer(), self._fit.pending
        if pending is None or trainer is None:
            return
        self._session.restore_state(module, pending)
        state, self._fit.pending = self._session.state, None
        if trainer.global_step > state.round_step and state.round not in [record.round for record in state.history]:
            state.history.append(self._session.record(trainer, self._session.measure(module)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever another callback put into the module at the end of training: the masks hold."""
        reshard(pl_module)
        self.adopt_finished_run(pl_module)
        # by now Lightning has moved the module back to the CPU
        self._session.state.masks = self._session.state.masks.moved(self._session.live())
        self._session.state.masks.apply_(self._session.live())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(None)
        if self._session.state.folder is not None:
            archive.release(trainer, self._session.state.folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(None)
        self._session.forget_weights()
        self._fit = Fit(None, self._fit.trainer, self._fit.module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if a round ended; catch up with the schedules if the last epoch was cut short."""
        self._advance(trainer, pl_module)
        self._session.note_epoch(trainer)
        self._fit.schedules.advance_(trainer, pl_module, self._session.state, epoch_ended=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Advance here too: after some resumes an epoch starts without its hook."""
        if batch_idx == 0:
            self._advance(trainer, pl_module)

    def _advance(self, trainer: Trainer, module: LightningModule) -> None:
        """Prune if a round ended since the last call."""
        self._session.advance(trainer, module, self._fit.schedules, [other._session for other in _pruners(trainer)])

    def archive_rounds(self) -> None:
        """Save each round of the coming training; to be called before it starts.

        Raises:
            ValueError: If the options say that none is saved.
        """
        if self.options.save_rounds is False:
            raise ValueError(
                "PQIMonitor(restore=True) goes back to a round that was saved, and save_rounds=False saves none; leave "
                "save_rounds out, or give restore=False."
            )
        self._fit.archives = True

    def note_phase(self, round: int, phase: str, reason: str) -> None:
        """Take into the history how the round that just ended was judged."""
        if round == self._session.state.round and round not in [record.round for record in self.history]:
            self._session.state.note = {**self._session.state.note, "phase": phase, "reason": reason}
        else:
            self._session.state.history.note(round, phase=phase, reason=reason)

    def restore_round(self, round: int, module: nn.Module | None = None) -> RoundRecord:
        """Put the trained weights and the masks of a round back, in all copies that other callbacks keep too.

        To be called after training, on every rank.

        Args:
            round: Number of prunings before it; it must have been saved, see ``save_rounds``.
            module: The module; None: that of the latest fit, while it is there.

        Returns:
            The record of the round.

        Raises:
            ValueError: If there is no such round, it was not saved, or the module is another one.
            FileNotFoundError: If its checkpoint is not there any more.
            RuntimeError: If training is going on.

        Example:
            >>> from lightning_sap import SAPCallback
            >>> SAPCallback(save_rounds=True).restore_round(2)
            Traceback (most recent call last):
            ValueError: There is no record of round 2; those that ended are [].
        """
        record = self.history.of_round(round)
        if self._fit.stage == "train":
            raise RuntimeError("restore_round cannot be called while training goes on; call it after fit.")
        if record.path is None:
            raise ValueError(f"Round {round} was not saved: give save_rounds=True (here {self.options.save_rounds}).")
        trainer, fitted = self._fit.trainer(), self._fit.module()
        if module is not None and module is not fitted:
            trainer = None  # the other callbacks of its Trainer are not concerned
        module = fitted if module is None else module
        if module is None:
            raise ValueError("The module of the latest fit is gone; give it as `module`.")
        checkpoint, pruners = archive.read_round(record.path, module), [self] if trainer is None else _pruners(trainer)
        states = [archive.state_in(checkpoint, pruner.state_key, module) for pruner in pruners]
        archive.restore_model_(module, checkpoint)
        if trainer is not None and fitted is not None:
            compatibility.in_averages_(trainer, fitted, partial(archive.restore_model_, fitted, checkpoint))
        for pruner, state in zip(pruners, states, strict=True):  # from now on they only hold the masks
            history = pruner.history
            pruner._session.state = replace(state, plan=RoundPlan(0, 1), note={}, first_weights=None, history=history)
            history.mark_restored(state.round)
        return self.history.of_round(round)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Pruned weights take no part in gradient clipping."""
        if pl_module.automatic_optimization and checks.clips_gradients(trainer, pl_module):
            self._session.mask_gradients()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization the module clips by itself, at any time after this; else it may in its own hook."""
        if not pl_module.automatic_optimization or checks.overrides(pl_module, "on_after_backward"):
            self._session.mask_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._fit.hooked:
            self._session.enforce()
        self._fit.schedules.advance_(trainer, pl_module, self._session.state, epoch_ended=trainer.is_last_batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning keeps old metrics: what is new afterwards was logged by validation."""
        self._fit.before_validation = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._session.note_validation(self._fit.before_validation, trainer.callback_metrics)
        self._fit.before_validation = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For callbacks that look at validation end; the loggers get the values at the end of the epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer, pl_module, logger=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the round that ends: from a checkpoint of this hook Lightning resumes."""
        self._log(trainer, pl_module, logger=True)
        if self._session.state.plan.ends_round(trainer.current_epoch):
            for witness in _of_kind(trainer, RoundListener):
                witness.see_epoch(trainer, pl_module)
            self._session.save_round(trainer)

    def _log(self, trainer: Trainer, module: LightningModule, *, logger: bool) -> None:
        if not trainer.barebones:
            to = None if logger else False  # True would warn where there is no logger
            state, name = self._session.state, self.options.name
            values = {"round": state.round, "remaining": self.remaining, "pruned": state.count}
            named = {f"{name}/{key}": float(value) for key, value in values.items()}
            # all ranks have the same numbers, and the most of equal numbers is exactly each of them
            module.log_dict(named, on_step=False, on_epoch=True, logger=to, sync_dist=True, reduce_fx="max")

    @property
    def state_key(self) -> str:
        """The name alone: changed options must not lose the state."""
        return checks.state_key(self.options.name)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on, as plain values and whole tensors; a collective under sharding."""
        if self._fit.pending is not None:  # it has not gone on yet
            return dict(self._fit.pending)
        if self._fit.stage == "train":
            self._session.state.schedules = self._fit.schedules.state()
        self._session.state.options = self.options.plain()
        return {**self._session.state.pack(), "waiting": self._fit.waits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of training; while it goes on, or outside of a Trainer, take it up at once.

        LearningRateFinder and BatchSizeFinder restore what they saved: before training there is nothing in it.
        """
        fit, module = self._fit, self._fit.module()
        if fit.stage == "train" and module is not None:
            self._session.restore_state(module, state_dict)
            fit.schedules.load(self._session.state.schedules)
        elif fit.stage == "trained" or (fit.stage == "fit" and not state_dict.get("waiting")):
            fit.pending = state_dict
        elif fit.stage is None or (
            fit.stage == "fit" and self._session.state.masks.is_dense
        ):  # there may be earlier masks
            self._session.state = PruningState.unpack(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            checks.check_state_name(self.options.name, trainer, checkpoint)
            if self.state_key not in checkpoint.get("callbacks", {}):
                self._fit.schedules_from = 0  # a dense training goes on

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the metrics of this moment: Lightning does not, and a round's record may still need them."""
        if self._fit.pending is None:
            checkpoint.get("callbacks", {}).get(self.state_key, {})["metrics"] = self._session.metrics(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a running fit, and the module that Lightning hangs on `log`."""
        own = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**own, "_fit": Fit()}

    def _close(self, stage: str | None) -> None:
        """Training is over: keep where the schedules stand, for files that are saved from now on."""
        if self._fit.stage == "train":
            self._session.state.schedules = self._fit.schedules.state()
        self._fit.stage = stage
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._fit.hooks:
            hook.remove()
        self._fit.hooks = []


def _pruners(trainer: Trainer) -> list[PruningCallback]:
    return _of_kind(trainer, PruningCallback)


def _of_kind(trainer: Trainer, kind: type[Any]) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
