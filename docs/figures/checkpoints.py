"""Prints what ModelCheckpoint keeps and where EarlyStopping stops in a pruned training on scikit-learn's digits.

`python docs/figures/checkpoints.py` in the root of the repository; needs scikit-learn, takes half a minute on one core.
"""

import sys
import tempfile

import torch
from digits import fit
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_sap import SAPCallback

ROUNDS, EPOCHS = 5, 8


def say(text):
    sys.stdout.write(text + "\n")


def main():
    with tempfile.TemporaryDirectory() as folder:
        savers = {
            'monitor="val_acc", mode="max"': ModelCheckpoint(f"{folder}/a", monitor="val_acc", mode="max"),
            'monitor="sap/remaining"': ModelCheckpoint(f"{folder}/b", monitor="sap/remaining"),
            "no monitor": ModelCheckpoint(f"{folder}/c"),
        }
        fit([SAPCallback(rounds=ROUNDS), *savers.values()], ROUNDS, EPOCHS)
        for title, saver in savers.items():
            file = torch.load(saver.best_model_path, weights_only=True)
            weights = [weight for name, weight in file["state_dict"].items() if name.endswith("weight")]
            share = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
            say(f"{title}: epoch {file['epoch']}, {share:.1%} of the weights")
    for patience in (3, 8, 16):
        sap = SAPCallback(rounds=ROUNDS)
        trainer = fit([sap, EarlyStopping("val_acc", mode="max", patience=patience)], ROUNDS, EPOCHS)
        say(f"patience {patience}: {trainer.current_epoch} epochs, {sap.remaining:.1%} of the weights")


if __name__ == "__main__":
    main()
