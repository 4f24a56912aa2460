"""What goes to loggers beside the scalars: charts, figures, texts, and a run's options beside what came of them."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_sap.callbacks.monitor import outputs
from lightning_sap.callbacks.monitor.meter import leader
from lightning_sap.report import markdown, table
from lightning_sap.rounds.history import RoundRecord
from lightning_sap.rounds.protocol import PrunerView

if TYPE_CHECKING:
    from lightning_sap.callbacks.monitor.callback import PQIMonitor

CHART = "lightning-sap"
CURVES = 8  # of a chart: more cannot be told apart
DRAWN = 50  # rounds of which each is drawn


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """What writes to TensorBoard in this process, whichever logger has it."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if isinstance(experiment, SummaryWriter)]


def layout(
    monitor: str, layers: Iterable[str], pruner: str | None = None, metric: str | None = None
) -> dict[str, dict[str, list[Any]]]:
    """Charts of the index, of what remains, of the metric and the learning rate; of the layers eight to a chart.

    TensorBoard takes tags as regexes.
    """
    own, names = re.escape(monitor), [re.escape(name) for name in layers]
    charts = {"PQ Index": ["Multiline", [f"{own}/{key}$" for key in ("global", "layer_mean", "global_pruned")]]}
    if pruner is not None:
        charts["Remaining weights"] = ["Multiline", [f"{re.escape(pruner)}/remaining$"]]
        charts["Learning rate"] = ["Multiline", [f"{re.escape(pruner)}/lr$"]]
    if metric is not None:
        charts[metric] = ["Multiline", [f"^{re.escape(metric)}$"]]
    for first in range(0, len(names), CURVES):
        part = names[first : first + CURVES]
        of = "" if len(names) <= CURVES else f" {first + 1} to {first + len(part)}"
        charts[f"PQ Index of the layers{of}"] = ["Multiline", [f"{own}/{name}$" for name in part]]
        charts[f"Remaining weights of the layers{of}"] = ["Multiline", [f"remaining/{name}$" for name in part]]
    return {CHART: charts}


def begin(trainer: Trainer, monitor: PQIMonitor, layers: Iterable[str]) -> None:
    """Put the charts under Custom Scalars, and the pruner's options among the hyperparameters of other loggers."""
    pruner = leader(trainer)
    settings = {} if pruner is None else pruner.settings()
    name = None if pruner is None else str(settings["name"])
    for writer in writers(trainer):
        charts = layout(monitor.name, layers, name, monitor.monitor)
        _try(f"{monitor.name}: the charts", "TensorBoard", partial(writer.add_custom_scalars, charts))
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if settings and isinstance(logger, WandbLogger | MLFlowLogger | CometLogger):
            options = {f"{name}/{key}": value for key, value in settings.items()}
            _try(f"{monitor.name}: the options", type(logger).__name__, partial(logger.log_hyperparams, options))


def show_round(trainer: Trainer, monitor: PQIMonitor, records: Sequence[RoundRecord]) -> None:
    """Show the rounds so far at the end of one; of a run of very many, of each tenth, for figures take time to draw."""
    if records[-1].round < DRAWN or records[-1].round % 10 == 0:
        _show(trainer, monitor, records)


def _show(trainer: Trainer, monitor: PQIMonitor, records: Sequence[RoundRecord]) -> None:
    """Add the figures (where matplotlib is installed) and the rounds so far, as they are at this step."""
    if not trainer.is_global_zero:
        return
    drawn = monitor.rows() and importlib.util.find_spec("matplotlib") is not None
    for where, add_figure, add_rounds in _places(trainer):
        for kind in ("rounds", "layers") if drawn else ():
            draw = partial(_draw, monitor.plot, kind, partial(add_figure, f"{monitor.name}/{kind}"))
            _try(f"{monitor.name}: the figure of the {kind}", where, draw)
        if records:
            add = partial(
                add_rounds, f"{monitor.name}/report", report_of(monitor, records), table(records, monitor.monitor)
            )
            _try(f"{monitor.name}: the report", where, add)


def end(trainer: Trainer, monitor: PQIMonitor, records: Sequence[RoundRecord]) -> None:
    """Show what is final, write it to the run's folder, and the options beside it to compare runs by; a collective."""
    _show(trainer, monitor, records)
    report = monitor.report() if records else None
    outputs.write(trainer, monitor.name, monitor.plot if monitor.rows() else None, report, records)
    pruner, held = leader(trainer), next((r for r in records if r.restored), records[-1] if records else None)
    if pruner is None or held is None:
        return
    found = {"final/remaining": held.remaining, "final/pqi": held.pqi}
    if monitor.monitor in held.metrics:
        found[f"final/{monitor.monitor}"] = held.metrics[monitor.monitor]
    settings = {key: value for key, value in pruner.settings().items() if key != "name" and value is not None}
    for writer in writers(trainer):
        add = partial(_add_options, writer, monitor.name, settings, found, trainer.global_step)
        _try(f"{monitor.name}: the options", "TensorBoard", add)


def _add_options(writer: SummaryWriter, run: str, settings: dict[str, Any], found: dict[str, float], step: int) -> None:
    """What ``add_hparams`` does, without its list of columns: TensorBoard takes the list of one run for all of them.

    Where no run has one it collects the columns from every run.
    """
    _, start, end = hparams(settings, found)  # type: ignore[no-untyped-call]
    with SummaryWriter(os.path.join(writer.log_dir, run)) as own:
        for summary in (start, end):
            own.file_writer.add_summary(summary, step)
        for tag, value in found.items():
            own.add_scalar(tag, value, step)


def plan_of(pruner: PrunerView) -> str:
    """What a pruner prunes of each parameter and leaves out, as Markdown; nothing where it does not say so."""
    plan = getattr(pruner, "plan", None)
    return str(plan().markdown()) if callable(plan) else ""


def report_of(monitor: PQIMonitor, records: Sequence[RoundRecord]) -> str:
    """The rounds as Markdown, and why training stopped."""
    return markdown(records, metric=monitor.monitor, verdict=str(monitor.verdict or ""))


Place = tuple[str, Callable[[str, Any], Any], Callable[[str, str, list[list[str]]], Any]]


def _places(trainer: Trainer) -> list[Place]:
    """The loggers that take figures and texts: their names, how they take a figure, and how the rounds.

    The rounds come as Markdown and as a table, the header first.
    """
    step = trainer.global_step
    found = [_place(logger, step) for logger in trainer.loggers]
    return [_tensorboard(writer, step) for writer in writers(trainer)] + [place for place in found if place is not None]


def _tensorboard(writer: SummaryWriter, step: int) -> Place:
    return (
        "TensorBoard",
        lambda tag, figure: writer.add_figure(tag, figure, global_step=step),
        lambda tag, text, _: writer.add_text(tag, text, global_step=step),
    )


def _place(logger: Logger, step: int) -> Place | None:
    name = type(logger).__name__
    if isinstance(logger, WandbLogger):
        return (
            name,
            lambda tag, figure: logger.log_image(tag, [figure]),
            lambda tag, _, rows: logger.log_table(tag, columns=rows[0], data=rows[1:]),
        )
    if isinstance(logger, MLFlowLogger):
        client, run = logger.experiment, str(logger.run_id)
        return (
            name,
            lambda tag, figure: client.log_figure(run, figure, f"{tag}-step-{step}.png"),
            lambda tag, text, _: client.log_text(run, text, f"{tag}-step-{step}.md"),
        )
    if isinstance(logger, CometLogger):
        experiment = logger.experiment
        return (
            name,
            lambda tag, figure: experiment.log_figure(tag, figure, step=step),
            lambda tag, text, _: experiment.log_text(text, step=step, metadata={"name": tag}),
        )
    return None


def _draw(plot: Callable[[Any], Any], kind: str, add: Callable[[Any], Any]) -> None:
    add(plot(kind))


def _try(what: str, where: str, write: Callable[[], Any]) -> None:
    """Write something that a run can do without: what goes wrong is a warning."""
    try:
        write()
    except Exception as error:  # figures, disks and servers fail in many ways
        rank_zero_warn(f"{what} cannot be written to {where}: {error}")
