"""Weights written by someone else than the optimizer: masks hold wherever weights are looked at."""

import copy
import io
import pickle
from datetime import timedelta

import pytest
import torch
from helpers import Crash, Net, Watch, crash, fit, loader
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback
from lightning_sap.callbacks.pruning.enforcement import BeforeSaving
from lightning_sap.functional.pqi import pq_index

KEPT = 14  # of 72 weights, a fifth


def matrices(module):
    return {name: p for name, p in module.named_parameters() if p.dim() == 2}


def clamp(module):
    """At least 1e-3, as layers of positive weights have it."""
    for p in matrices(module).values():
        p.clamp_(min=1e-3)


def centre(module):
    for p in matrices(module).values():
        p.sub_(p.mean() + 1e-3)


def noise(module):
    for p in matrices(module).values():
        p.add_(0.01 * torch.randn_like(p))


WRITERS = [clamp, centre, noise]


class Writing(Net):
    """Writes its weights in one of its hooks, and counts what is not zero in every validation."""

    def __init__(self, write, hook):
        super().__init__()
        self.write, self.hook, self.seen, self.after_writing = write, hook, [], []

    def write_in(self, hook):
        if hook == self.hook:
            with torch.no_grad():
                self.write(self)
            self.after_writing.append(nonzero(self))

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self.write_in("optimizer_step")

    def on_train_batch_end(self, *_):
        self.write_in("on_train_batch_end")

    def on_train_epoch_end(self):
        self.write_in("on_train_epoch_end")

    def on_validation_start(self):
        self.write_in("on_validation_start")

    def on_validation_epoch_start(self):
        self.write_in("on_validation_epoch_start")

    def on_train_end(self):
        self.write_in("on_train_end")

    def on_fit_end(self):
        self.write_in("on_fit_end")

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.append(nonzero(self))


HOOKS = [
    "optimizer_step", "on_train_batch_end", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
    "on_train_end", "on_fit_end",
]  # fmt: skip


def nonzero(module):
    return sum(int(p.count_nonzero()) for p in matrices(module).values())


def nonzero_in(state):
    return sum(int(tensor.count_nonzero()) for tensor in state.values() if tensor.dim() == 2)


def pruner(**options):
    given = {"rounds": 1, "every_n_epochs": 1, "scope": "global", "target_remaining": 0.2}
    return PruningCallback(FixedFraction(0.5), **{**given, **options})


def train(module, *callbacks, **options):
    return fit(module, *callbacks, val=loader(seed=3), num_sanity_val_steps=0, **{"max_epochs": 3, **options})


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("write", WRITERS)
def test_masks_hold_in_validation_and_at_the_end(write, hook):
    module, sap = Writing(write, hook), pruner()
    train(module, sap)
    assert sum(int(mask.sum()) for mask in sap.masks.values()) == KEPT
    assert max(module.after_writing) > 60  # so that something is to be masked
    assert max(module.seen[3:]) == KEPT  # three batches of validation an epoch
    assert len(module.seen) == 9
    assert nonzero(module) == KEPT


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start", "on_train_end", "on_fit_end"])
def test_masks_hold_where_a_callback_behind_the_pruner_writes(hook):
    def write(trainer, module):
        with torch.no_grad():
            clamp(module)

    module = Writing(clamp, None)
    train(module, pruner(), Watch(**{hook: write}))
    assert max(module.seen[3:]) == KEPT
    assert nonzero(module) == KEPT


SAVERS = {
    "every epoch": {"save_top_k": -1, "every_n_epochs": 1},
    "after training epochs": {"save_top_k": -1, "save_on_train_epoch_end": True},
    "after validation": {"save_top_k": -1, "save_on_train_epoch_end": False},
    "every step": {"save_top_k": -1, "every_n_train_steps": 1},
    "by time": {"save_top_k": -1, "train_time_interval": timedelta(0)},
    "the best": {"monitor": "val_loss", "mode": "max", "save_top_k": 1},
    "the last": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 1},
    "linked last": {"save_last": "link", "save_top_k": 1},
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("mode", SAVERS)
@pytest.mark.parametrize("hook", HOOKS[:3])
def test_masks_hold_in_files_of_every_mode_of_saving(tmp_path, hook, mode, weights_only):
    module, sap = Writing(clamp, hook), pruner()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_weights_only=weights_only, **SAVERS[mode])
    train(module, sap, saver, enable_checkpointing=True)
    files = {file: torch.load(file, weights_only=True) for file in tmp_path.glob("*.ckpt")}
    late = [nonzero_in(file["state_dict"]) for file in files.values() if file["global_step"] > 3]
    assert set(late) == {KEPT}
    assert len(late) >= (6 if mode in ("every step", "by time") else 1)


# with OnExceptionCheckpoint Lightning looks for a file to resume from, unasked
@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
def test_masks_hold_in_what_is_saved_by_an_exception(tmp_path):
    module, sap = Writing(clamp, "on_train_batch_end"), pruner()

    def fail(trainer, module):
        if trainer.global_step == 8:  # right after the module has written, within an epoch
            crash()

    with pytest.raises(Crash):
        train(module, sap, OnExceptionCheckpoint(tmp_path), Watch(on_train_batch_start=fail), enable_checkpointing=True)
    assert module.after_writing[-1] > 60
    (file,) = tmp_path.glob("*.ckpt")
    assert nonzero_in(torch.load(file, weights_only=True)["state_dict"]) == KEPT
    assert nonzero(module) == KEPT


@pytest.mark.parametrize("first", [True, False])
def test_masks_hold_in_what_other_callbacks_and_users_take(tmp_path, first):
    """Also before the pruning callback has had its turn in that hook, and through copies and pickles of the module."""
    taken = []

    def take(trainer, module):
        if trainer.current_epoch == 2:
            taken.append(nonzero_in(module.state_dict()))
            trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
            taken.append(nonzero_in(torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]))
            file = io.BytesIO()
            torch.save(copy.deepcopy(module.net), file)
            taken.append(nonzero(torch.load(io.BytesIO(file.getvalue()), weights_only=False)))

    def write(trainer, module):
        with torch.no_grad():
            clamp(module)

    writer, watch = Watch(on_train_epoch_end=write), Watch(on_train_epoch_end=take)
    train(Net(), *((pruner(), writer, watch) if first else (writer, watch, pruner())))
    assert taken == [KEPT, KEPT, KEPT]


def test_copies_of_the_module_are_not_masked_by_the_callback():
    """A copy that someone makes in mid-fit is his own: its state is what it holds."""
    copies = []

    def take(trainer, module):
        if trainer.current_epoch == 2:
            own, module.trainer = module.trainer, None
            copies.append(copy.deepcopy(module))
            module.trainer = own

    module = Net()
    train(module, pruner(), Watch(on_train_epoch_end=take))
    with torch.no_grad():
        clamp(copies[0])
    assert nonzero_in(copies[0].state_dict()) == 72
    assert nonzero(module) == KEPT


def test_copies_and_pickles_of_the_hook_do_nothing():
    def fail():
        raise AssertionError

    hook = BeforeSaving(fail)  # a function that cannot be pickled
    with pytest.raises(AssertionError):
        hook()
    assert copy.deepcopy(hook)() is None
    assert pickle.loads(pickle.dumps(hook))() is None


@pytest.mark.parametrize("failing", [True, False])
def test_no_hook_is_left_on_the_module_after_fit(failing):
    module = Net()
    fail = Watch(on_train_epoch_end=lambda *_: crash()) if failing else Watch()
    if failing:
        with pytest.raises(Crash):
            train(module, pruner(), fail)
    else:
        train(module, pruner(), fail)
    with torch.no_grad():
        clamp(module)
    assert nonzero_in(module.state_dict()) == 72


def test_the_index_is_measured_of_the_kept_weights():
    """What a constraint put at pruned places is not counted, neither by the pruner nor by a monitor before it."""
    module, sap = Writing(clamp, "on_train_batch_end"), pruner(scope="layer")
    monitor = PQIMonitor(stop_on=None)
    train(module, monitor, sap)
    kept = torch.cat([matrices(module)[name].detach()[mask] for name, mask in sap.masks.items()])
    assert sap.history[-1].weights == KEPT
    assert sap.history[-1].pqi == pytest.approx(float(pq_index(kept, *sap.orders())), abs=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_averages_of_written_weights_are_as_sparse(tmp_path, first):
    module, sap = Writing(clamp, "on_train_batch_end"), pruner()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    average = EMAWeightAveraging(decay=0.9)
    train(module, *((sap, average) if first else (average, sap)), saver, enable_checkpointing=True)
    assert max(module.seen[3:]) == KEPT
    assert nonzero_in(torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]) == KEPT
    assert nonzero(module) == KEPT


def test_what_is_not_pruned_stays_as_it_was_written():
    module, sap = Writing(clamp, "on_train_batch_end"), pruner()
    train(module, sap)
    assert all((matrices(module)[name][mask] >= 1e-3).all() for name, mask in sap.masks.items())
