"""Runs the example app in one of several processes, as the tests of the examples start them."""

import importlib
import os
import sys
import warnings

import pytest
import yaml
from images import write_cifar10, write_fashion_mnist, write_image_folder
from launch import ROOT

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def write_images(folder):
    """Each kind where `--data.root` looks for it."""
    write_fashion_mnist(folder)
    write_cifar10(folder, pytest.MonkeyPatch())
    write_image_folder(folder, parts=(("train", 10), ("test", 4)))


def shortened(config, folder):
    """The config, with rounds of one epoch, on the small images."""
    content = yaml.safe_load(config.read_text())
    content["trainer"] |= {"max_epochs": 3, "log_every_n_steps": 1}
    options = next(c["init_args"] for c in content["trainer"]["callbacks"] if "every_n_epochs" in c["init_args"])
    options |= {"every_n_epochs": 1, "rounds": 2}
    if "cycles" in options.get("policy", {}).get("init_args", {}):
        options["policy"]["init_args"]["cycles"] = 1
    content["model"]["init_args"]["schedule_epochs"] = 1
    small = {"num_workers": 0, "batch_size": 4}
    root = {} if content["data"]["class_path"] == "digits" else {"root": str(folder)}
    content["data"]["init_args"] = {**content["data"].get("init_args", {}), **(small if root else {}), **root}
    path = folder / f"short_{config.name}"
    path.write_text(yaml.safe_dump(content))
    return path


def run_all(rank, folder):
    """By config, and by `--data`: the advice that was given, the rounds, and every weight under its mask."""
    home, folder = folder, folder / f"of_rank_{rank}"
    folder.mkdir()
    write_images(folder)
    sys.path.insert(0, str(ROOT / "examples"))
    train = importlib.import_module("train")
    ends = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", *QUIET]
    runs = {
        path.stem: ["--config", str(shortened(path, folder))]
        for path in sorted((ROOT / "examples" / "configs").glob("*.yaml"))
    }
    for data in ("digits", "fashion_mnist", "cifar10", "image_folder"):
        small = [] if data == "digits" else [f"--data.root={folder}", "--data.batch_size=4"]
        once = ["--model=mlp", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--trainer.logger=false"]
        runs[data] = [f"--data={data}", *small, *once, "--trainer.enable_checkpointing=false"]
        runs[data] += ["--trainer.callbacks=SAPCallback", "--trainer.callbacks.rounds=2"]
    return {name: run(train, home / name, ["fit", *arguments, *ends]) for name, arguments in runs.items()}


def run(train, folder, arguments):
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app = train.main()
    pruner = next(callback for callback in app.trainer.callbacks if hasattr(callback, "restore_round"))
    weights = dict(app.model.named_parameters())
    return {
        "advice": [str(w.message) for w in caught if is_advice(w)],
        "rounds": [record.round for record in pruner.history],
        "remaining": pruner.remaining,
        "masks": pruner.masks,
        "masked": all(not weights[name][~mask].any() for name, mask in pruner.masks.items()),
        "validated": float(app.trainer.callback_metrics["val_loss"]),
        "samples": len(app.trainer.train_dataloader.sampler),
        "images": len(app.datamodule.train),
    }


def is_advice(warning):
    """Not how libraries call each other, nor what comes of small images: no workers, and few weights."""
    small = ("does not have many workers", "output units of")
    of_libraries = issubclass(warning.category, DeprecationWarning | FutureWarning)
    return not of_libraries and not any(text in str(warning.message) for text in small)
