"""PQIMonitor: watches the PQ Index of any training, logs it, and stops when the network collapses."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sap.callbacks.logging import log_epoch, log_now
from lightning_sap.callbacks.monitor import loggers, messages
from lightning_sap.callbacks.monitor.curve import Curve, figure
from lightning_sap.callbacks.monitor.meter import IndexMeter, ends_closed, leader
from lightning_sap.callbacks.monitor.mode import MetricMode
from lightning_sap.callbacks.monitor.schema import SCHEMA
from lightning_sap.callbacks.monitor.stopping import StopOn, StoppingRule, Verdict
from lightning_sap.callbacks.training import is_in_another_fit, of_a_run_in_a_fit
from lightning_sap.functional.scalars import as_plain
from lightning_sap.rounds.history import RoundRecord
from lightning_sap.rounds.phases import Phase, PhaseDetector
from lightning_sap.rounds.protocol import Answer, GoOn, PrunerView, RoundEnd, RoundListener, Stop

PHASES = list(Phase)  # logged as their positions


class PQIMonitor(RoundListener, Callback):
    r"""Log the PQ Index of the weights, tell by it where the network stands, and stop when it collapses.

    .. math:: I_{p,q}(w) = 1 - d^{1/q - 1/p} \frac{\|w\|_p}{\|w\|_q}

    Beside a pruner it measures the weights that survive in what the pruner prunes; without one, the weights that a
    pruner would prune by default, and then it only logs.

    Logs every epoch ``pqi/global`` (all weights as one vector) and ``pqi/layer_mean`` (mean over the parameters);
    beside a pruner ``pqi/phase`` (0 regularization, 1 compression, 2 collapse; told at the end of each round) and,
    where it is the only one and measures in the same orders, ``pqi/global_pruned`` (right after the latest pruning,
    before retraining; in the first round, at its start); where asked for ``gini/global``, and ``pqi/<parameter>`` and
    ``remaining/<parameter>``. With a ``TensorBoardLogger``, charts of these are laid out under Custom Scalars, the
    figures (where matplotlib is installed) are among the images, and the report among the texts.

    Args:
        p: Order of the smaller norm, ``0 < p < q``. None: the pruner's, else 0.5.
        q: Order of the larger norm. None: the pruner's, else 1.0. Give both or neither.
        stop_on: Stop the Trainer, after its ``min_epochs``, at the end of the round in which the network is seen to
            collapse (``"collapse"``) or to compress (``"compression"``), see :class:`PhaseDetector`; None: never.
        monitor: A logged metric to judge by beside the index, such as ``"val_acc"``; it is drawn as well. In a round
            without validation there is none.
        mode: Whether that metric is better when larger (``"max"``) or smaller (``"min"``). None: ``"min"`` where its
            name ends in loss, error, perplexity or the like (``val_loss``, ``val/mae``, ``wer_epoch``), else ``"max"``;
            the log says which.
        patience: Rounds in a row in which a phase must be seen, or the metric not be finite.
        restore: Having stopped, put the last sound round (of a compression, the round it dates from) back into the
            module, its trained weights and its masks. Every round is saved for that, see ``save_rounds`` and
            ``dirpath`` of the pruner.
        verbose: Say so when the phase changes, and print a report at the end of fit.
        gini: Log the Gini index too; it sorts a copy of all weights, and cannot be had of sharded ones.
        log_layers: Which parameters are logged one by one: False none, True all, or globs on their names.
        name: Tells two monitors apart, in checkpoints and as the first part of the keys ``pqi/…``.
        prog_bar: Show ``<name>/global`` on the progress bar.

    Raises:
        ValueError: If not ``0 < p < q``, or another option is out of its range; in training, if ``monitor`` is never
            logged.

    Source: Diao et al., *Pruning Deep Neural Networks from a Sparsity Perspective*, ICLR 2023.

    Example:
        >>> from lightning_sap import PQIMonitor
        >>> monitor = PQIMonitor(monitor="val_acc", log_layers=["encoder.*"])
    """

    def __init__(
        self,
        p: float | None = None,
        q: float | None = None,
        *,
        stop_on: StopOn = "collapse",
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        patience: int = 2,
        restore: bool = True,
        verbose: bool = True,
        gini: bool = False,
        log_layers: bool | Sequence[str] = False,
        name: str = "pqi",
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        if not name or "/" in name:
            raise ValueError(f"name must be a non-empty text without '/', got {name!r}.")
        self.stop_on, self._mode = stop_on, MetricMode(monitor, mode)
        self.monitor, self.mode, self.patience = monitor, self._mode.value, as_plain(patience)
        self.restore, self.verbose, self.name = restore, verbose, name
        self._bar = [f"{name}/global"] if prog_bar else []
        self._meter = IndexMeter(p, q, gini=gini, log_layers=log_layers, name=name)
        self.p, self.q, self.gini, self.log_layers = self._meter.p, self._meter.q, gini, self._meter.log_layers
        self._plan, self._records = "", list[RoundRecord]()  # of the latest fit that came to its end
        self._stage: str | None = None
        self._trainer: Callable[[], Trainer | None] | None = None
        self._begin()

    def _begin(self) -> None:
        """What a run must not lose, at its start."""
        self._curve, self._mode = Curve(self.monitor), MetricMode(self.monitor, self._mode.given)
        self._rule = StoppingRule(self.stop_on, PhaseDetector(self.mode, patience=self.patience))
        self._missed: dict[int, dict[str, Any]] = {}  # phase and reason of rounds that ended before it was there
        self._passed_over: int | None = None  # the latest round that was unsound or taken back

    @property
    def phase(self) -> Phase:
        """Where the network stood at the end of the latest round."""
        return self._rule.phase

    @property
    def reason(self) -> str:
        """Why it is this phase, in one sentence."""
        return self._rule.detector.reason

    @property
    def verdict(self) -> Verdict | None:
        """Why training was stopped; None if it was not, or not by this monitor."""
        return self._rule.verdict

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_in_another_fit(self._trainer, trainer):
            raise RuntimeError(of_a_run_in_a_fit(self.name))
        self._stage = stage
        if stage == "fit":
            self._trainer = weakref.ref(trainer)
            self._plan, self._records = "", []
            self._begin()
            self._meter.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not is_in_another_fit(self._trainer, trainer):
            self._stage = self._trainer = None
            self._curve.metrics.forget_fit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_in_another_fit(self._trainer, trainer):
            self._stage = self._trainer = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if leader(trainer) is not None:
            self._mode.say(self.name)
        elif self.stop_on is not None:
            messages.warn_of_no_pruner(self.name, self.stop_on)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.check(trainer, pl_module)
        if trainer.barebones:
            messages.warn_of_silence(self.name)
        loggers.begin(trainer, self, self._meter.layers(trainer, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_row(trainer)
        self._curve.metrics.begin(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Steps by hand do not move ``trainer.global_step``, and the module may write in its own hook."""
        self._meter.forget()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before an averaging callback puts its copy into the module, in whichever order they stand."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._meter.measure(trainer, pl_module)
            self._curve.metrics.begin_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.forget()  # the module holds its own weights again, and someone may have written them
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._curve.metrics.end_validation(trainer, self._moment(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For callbacks that look at validation end; the loggers get the values at the end of the epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._curve.metrics.validate(self._moment(trainer))
            log_epoch(trainer, pl_module, self._values(trainer, pl_module), logger=False, bar=self._bar)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_row(trainer, pl_module, trainer.current_epoch)
        log_epoch(trainer, pl_module, self._values(trainer, pl_module), logger=True, bar=self._bar)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_row(trainer)
        self._mode.judge(self.name)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what happened; beside a pruner, once it says that the run has ended."""
        if leader(trainer) is None:
            self._show(trainer)
            self._meter.check_ending(stopped=trainer.should_stop)

    def _moment(self, trainer: Trainer) -> int:
        """The round; without a pruner, the epoch."""
        return trainer.current_epoch if (pruner := leader(trainer)) is None else pruner.current_round()

    def _finish_row(self, trainer: Trainer) -> None:
        """Every hook of the epoch before had the time to log."""
        self._curve.finish(trainer)
        if self._curve.rows:
            row = self._curve.rows[-1]
            self._mode.see(self.name, row["round"], row["epoch"], row["metric"])

    def _add_row(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        """Keep what an epoch, or a round inside it, ended with."""
        pruner = leader(trainer)
        sizes = {name: tensor.weight.numel() for name, tensor in self._meter.tensors(trainer, module).items()}
        round = None if pruner is None else pruner.current_round()
        phase = None if pruner is None or pruner.opened() else str(self._phase_now(pruner, trainer, module))
        self._curve.add(epoch, round, phase, self._meter.measure(trainer, module), sizes)

    # -- the verdict --------------------------------------------------------------------------------------------------

    @property
    def may_restore(self) -> bool:  # type: ignore[override]
        """Whether it may ask for a round to be put back."""
        return self.restore and self.stop_on is not None

    @property
    def may_stop(self) -> bool:  # type: ignore[override]
        """Whether it may end training."""
        return self.stop_on is not None

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, event: RoundEnd) -> Answer:
        """Tell the phase at the end of a round, once, and stop if there is a verdict."""
        pruner, rule, record = leader(trainer), self._rule, event.record
        if pruner is None:
            return GoOn()
        judged = event.sound and not event.taken_back and not record.opened
        before, notes = (self.phase, self.verdict), messages.tell_open(self, record)
        self._passed_over = None if judged else record.round
        if judged and rule.detector.round < record.round:
            self._catch_up(pruner, pl_module)
            rule.update(*self._meter.evidence(trainer, pl_module, record.metrics.get(self.monitor or "")), record.round)
            messages.tell_judgement(trainer, self, record.round, before)
        if judged and rule.detector.round == record.round:  # also where an interrupt came between verdict and answer
            notes = {**self._missed, record.round: {"phase": str(self.phase), "reason": self.reason}}
        self._add_row(trainer, pl_module, record.last_epoch)
        if record.unit == "step":
            self._curve.note(record.metrics)
            log_now(trainer, self._values(trainer, pl_module))
        loggers.show_round(trainer, self, [*event.history, replace(event.record, **notes.get(record.round, {}))])
        if self.verdict is None or not judged:
            return GoOn(notes=notes)
        return Stop(self.verdict.restore if self.restore else None, notes)

    def _catch_up(self, pruner: PrunerView, module: LightningModule) -> None:
        """Judge the rounds that ended before the monitor was there, for their records at the next round's end."""
        sizes = {name: tensor.weight.numel() for name, tensor in pruner.tensors(module).items()}
        missed = self._rule.catch_up(pruner.history, pruner.current_round(), sizes, self.monitor)
        self._missed |= {round: {"phase": phase, "reason": reason} for round, (phase, reason) in missed.items()}

    def _phase_now(self, pruner: PrunerView, trainer: Trainer, module: LightningModule) -> Phase:
        """The phase; at the end of a round that is not judged yet, what it is going to be."""
        round = pruner.current_round()
        if self._rule.detector.round >= round or self._passed_over == round or not ends_closed(pruner, trainer):
            return self.phase
        self._catch_up(pruner, module)
        return self._rule.preview(*self._meter.evidence(trainer, module, self._curve.metric(trainer, round)), round)

    def on_run_end(self, trainer: Trainer, pl_module: LightningModule, history: Sequence[RoundRecord]) -> None:
        """Show what happened, now that the module holds what it is going to keep."""
        if (pruner := leader(trainer)) is None:
            return
        self._records, self._plan = list(history), loggers.plan_of(pruner)
        held = next((record for record in history if record.restored), None)
        if held is not None:
            messages.tell_restored(self.name, held)
        elif self.verdict and self.restore and self.verdict.restore is None:
            messages.warn_of_no_sound_round(self.name, history[-1].round)
        self._show(trainer)
        if held is None:
            self._meter.check_ending(stopped=trainer.should_stop and self.verdict is None)

    def _values(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        values, pruner = self._meter.values(trainer, module), leader(trainer)
        phase = None if pruner is None else PHASES.index(self._phase_now(pruner, trainer, module))
        return values if phase is None else {**values, f"{self.name}/phase": float(phase)}

    # -- pictures and report ------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The last epoch of each round (without a pruner, each epoch).

        Keys: epoch, round, pqi, layer_mean, remaining, metric, phase, and by parameter layers (their indices) and
        layers_remaining.
        """
        return copy.deepcopy(self._curve.rows)

    def plot(self, kind: Literal["rounds", "layers"] = "rounds", *, dark: bool = False) -> Any:
        """Matplotlib figure of the rounds so far (no pruner: the epochs).

        Args:
            kind: ``"rounds"``: index, remaining weights and monitored metric, the phases shaded and the stop marked;
                ``"layers"``: index and remaining weights of each parameter as heat maps.
            dark: Light on dark.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed (``pip install matplotlib``).
            ValueError: If no epoch has been seen yet, or the kind is unknown.
        """
        return figure(kind, self.rows(), self._records, self.monitor, self.verdict, dark=dark)

    def report(self) -> str:
        """The rounds of the latest fit as Markdown, why it stopped and what was kept; then the plan of each parameter.

        Raises:
            ValueError: If no fit beside a pruner has come to its end.
        """
        return loggers.report_of(self, self._records) + (f"\n\n{self._plan}" if self._plan else "")

    def _show(self, trainer: Trainer) -> None:
        """Figures and report, to TensorBoard and to the terminal."""
        loggers.end(trainer, self, self._records)
        if self.verbose and self._records and trainer.is_global_zero:
            messages.tell_report(self, self._records)

    # -- checkpoints and copies ---------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name alone: changed options must not lose the state."""
        return f"lightning_sap.monitor/{self.name}"

    def state_dict(self) -> dict[str, Any]:
        own = {"rule": self._rule.state_dict(), "dense": self._mode.state_dict()}
        return {**SCHEMA.stamp, **self._curve.state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a fit; a file that is only validated or tested leaves what is known of this one."""
        if self._stage in ("fit", None):
            state = SCHEMA.read(state_dict)
            self._begin()
            self._curve.load_state_dict(state)
            self._rule.load_state_dict(state["rule"])
            self._mode.load_state_dict(state.get("dense"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the monitored metric of this moment: Lightning does not."""
        self._curve.save_metric(trainer, checkpoint.get("callbacks", {}).get(self.state_key, {}), self._moment(trainer))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the module, which Lightning hangs on every callback as `log`."""
        return {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")} | {"_trainer": None}
