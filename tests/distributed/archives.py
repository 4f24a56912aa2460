"""What each rank does in the tests of rounds that two processes save and restore."""

import ctypes
import errno
import os
import subprocess
import warnings

import pytest
import torch
from archiving import Decaying, archiving_half
from distributed.stops import Sharded
from helpers import Rounds, Watch, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from resuming import plain
from stopping import outcome, run

from lightning_sap.callbacks.pruning import roundfile

CLONE_NEWNS = 0x20000
FULL = "No space left on device"


def engine(name):
    """Options of the Trainer, and a module."""
    if name == "ddp":
        return {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}, Decaying
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}, Sharded


def engines():
    return ("ddp", "fsdp2") if torch.__version__ >= "2.9" else ("ddp",)


def trained(folder, name, pruner, *callbacks, **more):
    """Module, pruner, rounds, the Trainer, and what was warned of."""
    options, build = engine(name)
    module, rounds = build(), Rounds(pruner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            module, pruner, rounds, *callbacks, val=loader(seed=3),
            **{"max_epochs": 6, "default_root_dir": folder, "num_sanity_val_steps": 0, **options, **more},
        )  # fmt: skip
    return module, pruner, rounds, trainer, [str(w.message) for w in caught if "sap:" in str(w.message)]


def hidden(folder):
    """Put an empty folder over one, for this process alone; False if that is not allowed here."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        return False
    commands = (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "tmpfs", str(folder)])
    return all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)


def error_of(act):
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def unseen(rank, folder):
    """By engine what comes of restoring a round that rank 1 does not see, and of one that it sees damaged."""
    return {name: _unseen(rank, folder / name, name) for name in engines()}


def _unseen(rank, folder, name):
    module, pruner, _, trainer, _ = trained(folder, name, archiving_half())
    before, masks = plain(module.state_dict()), plain(pruner.masks)
    if rank == 1 and name == "ddp":
        os.environ["HIDDEN"] = str(int(hidden(folder / "rounds")))
    trainer.strategy.barrier()
    found = {"hidden": os.environ.get("HIDDEN") != "0" if rank == 1 else True}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and name == "fsdp2":
            patch.setattr(os.path, "exists", lambda path: "round-" not in str(path) and os.access(path, os.F_OK))
        found["error"] = error_of(lambda: pruner.restore_round(1))
    found["unchanged"] = _same(plain(module.state_dict()), before) and _same(plain(pruner.masks), masks)
    return found


def _same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def stopping_unseen(rank, folder):
    """A run that is stopped, whose rounds rank 1 cannot read when it goes back."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 1:
            patch.setattr(os.path, "exists", lambda path: "round-" not in str(path) and os.access(path, os.F_OK))
        found = run(folder, devices=2, strategy="ddp", use_distributed_sampler=False)
    texts = [str(w.message) for w in caught if "stays as it is" in str(w.message)]
    return {**outcome(found), "warnings": texts, "report": found.monitor.report()}


def full(rank, folder):
    """By engine a run whose disk is full while the second round is saved, and one that is cut off by that."""
    return {name: _full(rank, folder / name, name) for name in engines()}


def _full(rank, folder, name):
    calls = []

    def stop(*arguments, **options):
        calls.append(None)
        if len(calls) >= 2:
            raise OSError(errno.ENOSPC, FULL)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        if name == "ddp":
            original = roundfile.write
            patch.setattr(roundfile, "write", stop)
        elif rank == 0:
            import lightning.pytorch.strategies.model_parallel as inside

            original = inside.torch.save
            patch.setattr(
                inside.torch, "save", lambda o, f, *a, **k: (stop if "meta.pt" in str(f) else original)(o, f, *a, **k)
            )
        module, pruner, _, _trainer, told = trained(folder, name, archiving_half())
    files = sorted(os.listdir(folder / "rounds"))
    return {
        "paths": [r.path is not None for r in pruner.history],
        "files": files,
        "told": told,
        "weights": plain(module.state_dict()),
    }


def branching(rank, folder):
    """By engine a run, the same resumed, and one that branches off."""
    return {name: _branching(folder / name, name) for name in engines()}


def _branching(folder, name):
    saver = ModelCheckpoint(folder / "files", "{epoch}", save_top_k=-1)
    module, first, rounds, _keep, _ = trained(folder, name, archiving_half(), saver, enable_checkpointing=True)
    first.restore_round(1)
    found = {"restored": _same(plain(module.state_dict()), plain(rounds.states[1]))}
    file = folder / "files" / "epoch=2.ckpt"
    _, again, _, _keep2, told = trained(folder, name, archiving_half(), ckpt_path=file)
    found |= {"runs": [{r.run for r in first.history}, {r.run for r in again.history}], "told": told}
    found["digests"] = [r.sha256 for r in first.history], [r.sha256 for r in again.history]
    faster = Watch(on_train_start=double)
    _, branch, _, _keep3, told = trained(folder, name, archiving_half(save_rounds=1), faster, ckpt_path=file)
    found |= {
        "branch": [(r.run, r.parent, r.path and os.path.basename(os.path.dirname(r.path))) for r in branch.history]
    }
    found |= {
        "branch told": told,
        "files": sorted(os.listdir(folder / "rounds")),
        "own": os.listdir(folder / "rounds-v1"),
    }
    first.restore_round(2)
    found["kept"] = _same(plain(module.state_dict()), plain(rounds.states[2]))
    return found


def double(trainer, module):
    """The learning rate."""
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= 2
