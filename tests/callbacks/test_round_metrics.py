"""Which metrics belong to a round, by hand."""

from types import SimpleNamespace

import torch

from lightning_sap.callbacks.round_metrics import RoundMetrics


def trainer(**metrics):
    return SimpleNamespace(callback_metrics={name: torch.tensor(value) for name, value in metrics.items()})


def validated(metrics, now, moment, **logged):
    """A validation in a moment, which logs these."""
    metrics.begin_validation(now)
    now.callback_metrics |= {name: torch.tensor(value) for name, value in logged.items()}
    metrics.end_validation(now, moment)


def test_a_metric_of_validation_belongs_to_the_rounds_in_which_validation_ran():
    metrics, now = RoundMetrics(), trainer(train_loss=3.0)
    metrics.begin(now)
    validated(metrics, now, 0, val_loss=2.0)
    assert metrics.of(now, 0) == {"train_loss": 3.0, "val_loss": 2.0}
    metrics.begin(now)
    assert metrics.of(now, 1) == {"train_loss": 3.0}
    assert metrics.known(now) == {"train_loss", "val_loss"}


def test_a_metric_that_training_logs_too_is_of_the_round_in_which_it_was_logged():
    metrics, now = RoundMetrics(), trainer()
    metrics.begin(now)
    validated(metrics, now, 0, loss=2.0)
    metrics.begin(now)
    now.callback_metrics["loss"] = torch.tensor(1.5)
    assert metrics.of(now, 1) == {"loss": 1.5}


def test_a_resumed_run_knows_the_metrics_of_the_interrupted_round_until_it_ends():
    metrics, now = RoundMetrics(), trainer()
    metrics.load_state_dict({"metrics": {"val_loss": 2.0}, "validated": 3, "validation_keys": ["val_loss"]})
    assert metrics.of(now, 3) == {"val_loss": 2.0}
    metrics.end(trainer())
    assert metrics.of(now, 4) == {}
    assert metrics.state_dict() == {"metrics": {}, "validated": 3, "validation_keys": ["val_loss"], "logged": []}


def test_a_checkpoint_in_an_epoch_leaves_out_what_training_logs_when_it_ends():
    metrics, now = RoundMetrics(), trainer(train_loss=3.0)  # the epoch before's
    metrics.begin(now)
    validated(metrics, now, 1, val_loss=2.0)
    assert metrics.for_checkpoint(now, 1) == {"metrics": {"val_loss": 2.0}, "logged": ["train_loss", "val_loss"]}
    now.callback_metrics["train_loss"] = torch.tensor(1.5)
    assert metrics.for_checkpoint(now, 1)["metrics"] == {"val_loss": 2.0, "train_loss": 1.5}


def test_what_validation_logs_while_it_runs_belongs_to_its_moment():
    metrics, now = RoundMetrics(), trainer()
    metrics.begin(now)
    validated(metrics, now, 0, val_loss=2.0)
    metrics.begin(now)
    metrics.begin_validation(now)
    metrics.validate(1)
    assert metrics.has_validated
    now.callback_metrics["val_loss"] = torch.tensor(2.0)
    assert metrics.of(now, 1) == {"val_loss": 2.0}


def test_what_a_validation_leaves_out_is_not_of_its_moment():
    metrics, now = RoundMetrics(), trainer()
    metrics.begin(now)
    validated(metrics, now, 0, val_loss=2.0, val_acc=0.5)
    metrics.begin(now)
    validated(metrics, now, 1, val_loss=2.0)
    assert metrics.of(now, 1) == {"val_loss": 2.0}


def test_a_round_of_several_epochs_keeps_what_an_earlier_one_of_them_logged():
    metrics, now = RoundMetrics(), trainer()
    metrics.begin(now)
    validated(metrics, now, 1, val_loss=2.0, val_acc=0.5)
    metrics.begin(now)
    validated(metrics, now, 1, val_loss=1.0)
    assert metrics.of(now, 1) == {"val_loss": 1.0, "val_acc": 0.5}
