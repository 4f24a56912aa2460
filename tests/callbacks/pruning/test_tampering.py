"""A changed state is an error that names the key, and nothing that lives is touched by it."""

import re
from dataclasses import asdict
from fnmatch import fnmatch

import pytest
import torch
from helpers import Net, Watch, copied, fit, half, loader, quiet_trainer, same
from resuming import STATE, run_saving_epochs
from searching import Scored, searching
from tampering import ANY_NUMBER, FAULTS, MISSING, SURPLUS, taken

from lightning_sap import PQIMonitor
from lightning_sap.callbacks.pruning.lengths import EpochLengths
from lightning_sap.callbacks.pruning.schema import SCHEMA
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.version import __version__

# What is right all the same, by place: a smaller share, another text, a metric of any size, a name that is left out.
RIGHT = {
    "writer": {"text"},
    "plan.rounds": {"None"},
    "plan.end": {"None"},
    "plan.dense": {"None"},
    "trained.0": {"text"},
    "first_bits.*": {"negative", MISSING},
    "pqi_after_pruning": {"fraction", "NaN", "None"},
    "first_weights": {"None"},
    "first_weights.*": {MISSING},
    "kept": {"None"},
    "kept.weights.*": {MISSING},
    "search": {"None"},
    "search.yardstick": {"negative", "fraction", "None"},
    "search.metric": {"negative", "fraction", "None"},
    "search.best": {"None"},
    "search.scale": {"fraction"},
    "search.failed": {"None"},
    "search.validated": {"None"},
    "answer": {"None"},
    "answer.scale": {"fraction"},
    "answer.most": {"None"},
    "undone": {"None"},
    "pruning": {"None"},
    "stop": {"None"},
    "run": {"text"},
    "parent": {"text", "None"},
    "history.0.remaining": {"fraction"},
    "history.0.layers_remaining.*": {"fraction", MISSING},
    "history.0.pqi": {"fraction", "NaN"},
    "history.0.layers_pqi.*": {"fraction", "NaN", MISSING},
    "history.0.pqi_pruned": {"fraction", "NaN", "None"},
    "history.0.layers_pqi_pruned.*": {"fraction", "NaN", MISSING},
    "history.0.seconds": {"fraction", "None"},
    "history.0.metrics.*": ANY_NUMBER | {MISSING},
    "lr": ANY_NUMBER | {"None"},
    **{f"history.0.{key}": ANY_NUMBER | {"None"} for key in ("lr", "metric", "yardstick", "bound")},
    **{f"note.{key}": ANY_NUMBER | {"None", MISSING} for key in ("metric", "yardstick", "bound")},
    **{f"history.0.{key}": {"None"} for key in ("pruned", "weights", "first_step", "last_step", "regrown", "sound")},
    **{f"history.0.{key}": {"text", "None"} for key in ("phase", "reason", "path", "run", "parent", "sha256")},
    "history.0.size": {"None"},
    "note.phase": {"text", "None", MISSING},
    "note.reason": {"text", "None", MISSING},
    "note.sound": {"None", MISSING},
    "metrics.validated": {"None"},
    "metrics.validation_keys.0": {"text"},
    "metrics.logged.0": {"text"},
    "metrics.metrics.*": ANY_NUMBER | {MISSING},
    "folder": {"text", "None"},
    "options.*": {"text", MISSING},
    "schedules.0.first": {"object", SURPLUS},
    "schedules.0.groups.0": {"object", SURPLUS},
    "schedules.0.groups.0.foreach": {*FAULTS, MISSING},  # None where it lives: it may be anything
    "schedules.0.groups.0.fused": {*FAULTS, MISSING},
    "schedules.0.first.*": {"fraction", MISSING},
    "schedules.0.groups.0.*": {"fraction", MISSING},
    "schedules.0.lengths.planned": {"None"},
    "schedules.0.lengths.mean": {"fraction", "None"},
    "schedules.0.lengths.said": {"None"},
    "schedules.0.lengths.wrong": {"None"},
}  # fmt: skip

SCHEDULE = {"first": {}, "groups": [], "calls": 0, "mode": "keep", "lengths": asdict(EpochLengths())}


def pruner_and_state(change=None):
    """A search that rewinds weights under a schedule, and its state in the middle of its fourth epoch.

    `change` is called there, with pruner, state and module.
    """
    pruner, module, found = searching(rewind_weights="init"), Scored([0.9, 0.9, 0.5, 0.9, 0.9], period=6), []
    monitor = PQIMonitor(monitor="val_acc", stop_on=None)

    def look(trainer, module):
        if trainer.current_epoch == 3 and not found:
            found.append(pruner.state_dict())
            if change is not None:
                change(pruner, found[0], module)

    trainer = quiet_trainer(
        pruner, monitor, Watch(on_train_batch_end=look), max_epochs=5, num_sanity_val_steps=0, check_val_every_n_epoch=1
    )
    trainer.fit(module, loader(), loader())
    return pruner, found[0]


def test_every_fault_is_a_clear_error_at_once_and_touches_nothing():
    """In training, where a state is taken up at once; what is right all the same is listed above."""
    seen = []

    def tamper(pruner, state, module):
        def load(twin):
            try:
                pruner.load_state_dict(twin)
            except ValueError:
                assert pruner.session.state is live[0]
                raise
            pruner.session.state = live[0]
            pruner.session.schedules.load(state["schedules"])

        live = [pruner.session.state]
        before = copied(module.state_dict()), copied(dict(pruner.masks)), pruner.state_dict()
        seen.append(taken(load, state))
        assert same(before[0], module.state_dict())
        assert same(before[1], pruner.masks)
        assert str(before[2]) == str(pruner.state_dict())

    pruner_and_state(tamper)
    expected = {}
    for path in seen[0]:
        expected[path] = next((right for pattern, right in RIGHT.items() if fnmatch(path, pattern)), set())
    assert {path: faults for path, faults in seen[0].items() if not faults <= expected[path]} == {}


def saved(folder, change):
    """A checkpoint in the middle of a run whose pruning state was changed."""
    run_saving_epochs(Net, half, folder, max_epochs=4)
    file = torch.load(folder / "epoch=2.ckpt", weights_only=True)
    change(file["callbacks"][STATE])
    torch.save(file, folder / "changed.ckpt")
    return folder / "changed.ckpt"


FILES = {
    "a round is missing": (lambda state: state.pop("round"), "round is missing; it must be a whole number"),
    "a plan is missing": (lambda state: state.pop("plan"), "plan is missing; it must be a dictionary"),
    "a round again": (lambda state: state.update(round=0), "round must be at least 1, by the number of rounds"),
    "a round ahead": (lambda state: state.update(round=4), "round must be at most 2, the number of rounds"),
    "a round twice": (lambda state: state["history"][1].update(round=0), "history[1].round must be 1, its place"),
    "no length": (lambda state: state["plan"].update(length=0), "plan.length must be a whole number of at least 1"),
    "fewer calls than none": (
        lambda state: state.update(schedules=[{**SCHEDULE, "calls": -(10**9)}]),
        "schedules[0].calls must be a whole number of at least 0, got -1000000000",
    ),
    "masks cut short": (
        lambda state: state["masks"]["net.0.weight"].update(bits=torch.zeros(2, dtype=torch.uint8)),
        "masks['net.0.weight'].bits must be 6 bytes (torch.uint8), a bit for each weight of shape [8, 6], got a tensor",
    ),
    "a mask of 40 GB": (
        lambda state: state["masks"]["net.0.weight"].update(
            shape=[40 * 2**30], bits=torch.zeros(1, dtype=torch.uint8).expand(5 * 2**30)
        ),
        "masks['net.0.weight'].bits must be 5368709120 bytes",
    ),
    "a mask of another shape": (
        lambda state: state["masks"]["net.0.weight"].update(shape=[6, 8]),
        "of another shape ['net.0.weight (6, 8) instead of (8, 6)']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_resume_from_a_changed_file_is_refused_before_a_step(tmp_path, what):
    change, message = FILES[what]
    path, module, pruner, steps = saved(tmp_path, change), Net(), half(), []
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(module, pruner, Watch(on_train_batch_start=lambda t, m: steps.append(1)), ckpt_path=path, max_epochs=4)
    assert steps == []
    assert pruner.remaining == 1.0


def test_state_of_a_newer_version_says_who_wrote_it(tmp_path):
    path = saved(tmp_path, lambda state: state.update(version=SCHEMA.version + 1, writer="9.8.7", more=[1]))
    text = (
        "was written by lightning-sap 9.8.7 (its version is 2), and this is lightning-sap "
        f"{__version__}, which reads versions up to 1. Install the newer lightning-sap from where you have this one."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(Net(), half(), ckpt_path=path, max_epochs=4)


@pytest.mark.parametrize("key", ["version", "writer"])
def test_half_a_stamp_is_refused(key):
    state = half().state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        half().load_state_dict(state)


def test_state_of_an_older_version_reads_on(tmp_path):
    """Without a version, without the keys that came later, with one that went: the run ends as it would have."""

    def age(state):
        for key in ("version", "writer", "waiting", "replaced", "first_bits", "copies", "search", "answer", "metrics"):
            del state[key]
        for key in ("regrown", "taken_back", "sound", "metric", "yardstick", "bound"):
            del state["history"][0][key]
        state["gone_since"] = 1

    path, module, pruner = saved(tmp_path, age), Net(), half()
    fit(module, pruner, ckpt_path=path, max_epochs=4, default_root_dir=tmp_path)
    _, whole, *_ = run_saving_epochs(Net, half, tmp_path / "whole", max_epochs=4)
    assert same(pruner.masks, whole.masks)
    assert [record.remaining for record in pruner.history] == [record.remaining for record in whole.history]


def test_tensors_of_another_form_than_the_modules_are_refused():
    pruner, module = half(rewind_weights="init"), Net()
    found = []
    fit(module, pruner, Watch(on_train_batch_end=lambda t, m: found.append(pruner.state_dict())), max_epochs=4)
    for wrong in (torch.ones(6, 8), torch.ones(8, 6, dtype=torch.int64)):
        state = {**found[0], "first_weights": {**found[0]["first_weights"], "net.0.weight": wrong}}
        with pytest.raises(ValueError, match=re.escape("first_weights['net.0.weight'] must be a tensor like that")):
            PruningState.live(state, module)
