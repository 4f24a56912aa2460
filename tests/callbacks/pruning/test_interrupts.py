"""Interrupts: wherever one comes, the run that goes on from the file of that moment ends as the unbroken one does."""

import signal
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers import Net, Watch, copied, fit, half, is_masked, loader, same, survivors, zeros_of
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from resuming import Alike, records_of
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import lightning_sap
from lightning_sap import FixedFraction, GrowAndPrune, PQIMonitor, PruningCallback, SAPCallback, Tolerance

# with OnExceptionCheckpoint Lightning looks for a file to resume from, unasked
pytestmark = pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")

PACKAGE = Path(lightning_sap.__file__).parent
FILES = [f"callbacks/pruning/{name}" for name in ("carrying", "decisions", "kept", "regrowth", "state")]
FILES += ["callbacks/monitor/callback", "callbacks/monitor/stopping", "rounds/phases"]
PRUNING = {str(PACKAGE / f"{name}.py") for name in FILES}
EVERY = 48  # of the lines of a pruning, in the tests of every day


class Scheduled(Net):
    """Its metric falls when less than half of the weights remain, so that a search goes back."""

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 6)}

    def validation_step(self, batch, batch_idx):
        left = sum(int((p != 0).sum()) for p in self.parameters() if p.dim() > 1)
        self.log("score", float(left > 30))


RUNS = {
    "kept weights": partial(SAPCallback, rounds=2, scope="global", eta_r=0.1),
    "rewound weights": partial(SAPCallback, rounds=2, scope="global", eta_r=0.1, rewind_weights="init"),
    "kept optimizer": partial(SAPCallback, rounds=2, scope="layer", eta_r=0.1, reset_optimizer=False),
    "verdict": partial(PruningCallback, FixedFraction(0.7), rounds=4, every_n_epochs=1),
    "opened parts": partial(PruningCallback, GrowAndPrune(0.25, partitions=2), rounds=2, scope="global"),
    "search": partial(
        PruningCallback, FixedFraction(0.5), rounds=5, every_n_epochs=1, tolerance=Tolerance("score", drop=0.5)
    ),
}


class Interrupt:
    """Raises at the n-th line that the pruning package runs while training goes on; without n it counts them."""

    def __init__(self, n=None):
        self.n, self.seen = n, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in PRUNING or frame.f_code.co_name in ("pack", "unpack", "live"):
            return None
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            self.seen += 1
            if self.seen == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line


def run(name, *callbacks, interrupt=None, ckpt_path=None):
    """The pruner of a run, and the masks and weights with which each round began.

    It is interrupted while epoch 2, 3 or 4 begins or ends.
    """
    module, pruner, began = Scheduled(), RUNS[name](), {}
    monitors = [PQIMonitor(monitor="score", restore=False)] if name == "verdict" else []

    def trace(on):
        return lambda trainer, _: sys.settrace(interrupt if on and trainer.current_epoch in (2, 3, 4) else None)

    def look(trainer, module):
        began.setdefault(pruner.current_round(), (pruner.masks, copied(module.state_dict())))

    armed = Watch(on_train_epoch_start=trace(True), on_train_epoch_end=trace(True))
    disarmed = Watch(on_train_epoch_start=trace(False), on_train_epoch_end=trace(False), on_train_batch_start=look)
    torch.manual_seed(1)
    before = sys.gettrace()
    try:
        fit(
            module, armed, pruner, *monitors, disarmed, *callbacks, max_epochs=6, train=DataLoader(Alike(2), 8),
            val=loader(), ckpt_path=ckpt_path, enable_checkpointing=True, num_sanity_val_steps=0,
        )  # fmt: skip
    finally:
        sys.settrace(before)
    return pruner, began


@cache
def unbroken(name):
    counter = Interrupt()
    pruner, began = run(name, interrupt=counter)
    return records_of(pruner), began, counter.seen


def lines():
    for name in RUNS:
        for n in range(1, 600, 6):
            yield pytest.param(name, n, id=f"{name}-{n}", marks=[] if n % EVERY == 1 else [pytest.mark.full])


# Lightning goes on in the next epoch from a file that an exception wrote where an epoch begins
@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step", "ignore:sap. (not all prunings came|the search)"
)
@pytest.mark.parametrize(("name", "n"), list(lines()))
def test_a_pruning_that_is_interrupted_is_finished_and_not_done_twice(tmp_path, name, n):
    records, began, count = unbroken(name)
    if n > count:
        pytest.skip(f"the prunings run {count} lines")
    with pytest.raises(SystemExit):  # so ends Lightning after Ctrl-C
        run(name, OnExceptionCheckpoint(tmp_path, "end"), interrupt=Interrupt(n))
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["lightning_sap/sap"]
    pruner, resumed = run(name, ckpt_path=tmp_path / "end.ckpt")
    first = min(resumed, default=len(records))  # none begins after a verdict
    ended = records[state["round"]]
    if state["round"] < first and 0 < state["steps"] <= ended["last_step"] - ended["first_step"]:
        # the round lost the epoch that was to begin: other weights, as many of them
        assert [record.weights for record in pruner.history] == [record["weights"] for record in records]
        return
    if first == len(records):
        assert same(pruner.masks, began[first - 1][0])
    else:
        assert same(resumed[first][0], began[first][0])
    if first in resumed and (state["round"] < first or state["steps"] == 0):  # else it goes on in mid-round
        assert same(resumed[first][1], began[first][1])
    assert without_logged(records_of(pruner)[:first]) == without_logged(records[:first])


def without_logged(records):
    """Without what the pruner logs itself: where an epoch's end is interrupted, some of that is lost."""
    return [{**each, "metrics": {k: v for k, v in each["metrics"].items() if "/" not in k}} for each in records]


class Broken(Net):
    """Ctrl-C in the first step of epoch 2: after the optimizer has written the weights, before the mask holds."""

    armed, error = True, KeyboardInterrupt

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)

        def interrupt(*_):
            if self.armed and self.trainer.current_epoch == 2:
                with torch.no_grad():
                    for parameter in self.net.parameters():
                        parameter.add_(0.5)
                raise self.error

        optimizer.register_step_post_hook(interrupt)  # before ours
        return optimizer


def fail(*_):
    raise RuntimeError("a notifier without a network")


@pytest.fixture
def signals():
    """The handlers that Lightning leaves where a callback's on_exception fails."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestBetweenTheStepAndTheMask:
    @pytest.mark.parametrize("first", [True, False], ids=["its saver first", "its saver last"])
    def test_module_and_file_are_masked(self, tmp_path, first):
        module, pruner, saver = Broken(), half(), OnExceptionCheckpoint(tmp_path, "end")
        with pytest.raises(SystemExit):
            fit(module, *([saver, pruner] if first else [pruner, saver]), enable_checkpointing=True)
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}
        assert is_masked(copied(module.state_dict()), pruner.masks)
        file = torch.load(tmp_path / "end.ckpt", weights_only=True)
        assert is_masked(file["state_dict"], pruner.masks)

    def test_the_next_fit_goes_on_under_the_masks(self):
        module, pruner = Broken(), half()
        with pytest.raises(SystemExit):
            fit(module, pruner, enable_checkpointing=True)
        assert pruner.current_round() == 2
        masks, module.armed = pruner.masks, False
        fit(module, pruner, max_epochs=2)
        assert [record.remaining for record in pruner.history] == [0.25, 0.125]
        assert is_masked(copied(module.state_dict()), masks)

    @pytest.mark.usefixtures("signals")
    def test_so_it_does_where_another_callback_fails_before_ours_is_told(self):
        module, pruner = Broken(), half()
        module.error = ValueError
        with pytest.raises(RuntimeError, match="a notifier"):
            fit(module, Watch(on_exception=fail), pruner, enable_checkpointing=True)
        masks, module.armed = pruner.masks, False
        assert zeros_of(module) == 0
        fit(module, pruner, max_epochs=2)
        assert [record.remaining for record in pruner.history] == [0.25, 0.125]
        assert is_masked(copied(module.state_dict()), masks)

    @pytest.mark.usefixtures("signals")
    def test_no_hook_of_ours_acts_on_a_later_fit_without_the_pruner(self):
        kept = []

        class Keeps(Broken):
            def configure_optimizers(self):
                kept.append(kept[0] if kept else super().configure_optimizers())
                return kept[0]

        module = Keeps()
        module.error = ValueError
        with pytest.raises(RuntimeError, match="a notifier"):
            fit(module, Watch(on_exception=fail), half(), enable_checkpointing=True)
        module.armed = False
        fit(module, max_epochs=1)
        assert zeros_of(module) == 0
