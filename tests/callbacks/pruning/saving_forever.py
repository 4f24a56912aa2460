"""A process that saves a round in every epoch of one step, and a checkpoint, until it is killed."""

import sys
from pathlib import Path

from archiving import archiving_half, wide
from helpers import Watch, fit
from lightning.pytorch.callbacks import ModelCheckpoint

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    fit(
        wide(),
        archiving_half(rounds=99, every_n_epochs=1),
        ModelCheckpoint(folder / "files", "{epoch}", save_top_k=-1),
        Watch(on_train_epoch_start=lambda t, m: t.current_epoch == 1 and sys.stdout.writelines(["saving\n"])),
        Watch(on_train_batch_start=lambda t, m: sys.stdout.flush()),
        max_epochs=100,
        limit_train_batches=1,
        default_root_dir=folder,
        enable_checkpointing=True,
    )
