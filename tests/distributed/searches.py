"""What each rank does in `test_search.py`."""

import torch
from helpers import loader, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from resuming import plain, records_of
from searching import Scored, searching
from torch.distributed.fsdp import FSDPModule, fully_shard

SCORES = [0.9, 0.9, 0.9, 0.5, 0.885, 0.9, 0.9, 0.5]
KILLED = (2, 3, 5)  # before a round that fails, in it, and after a near miss


class Ranked(Scored):
    """Each rank but the first sees a worse score, and nobody brings them together."""

    def __init__(self, sharded):
        super().__init__(SCORES, period=8)
        self.sharded = sharded

    def configure_model(self):
        if self.sharded and not isinstance(self.net, FSDPModule):
            for part in (self.net[3], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def validation_step(self, batch, batch_idx):
        score = SCORES[self.trainer.current_epoch] - 0.2 * self.global_rank
        self.log("val_acc", torch.tensor(score, dtype=torch.float32), sync_dist=False)


def train(folder, engine, ckpt_path=None):
    """Search on data that are the same on every rank."""
    strategies = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    options = {} if engine == "alone" else {"devices": 2, "strategy": strategies[engine]}
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    module, pruner = Ranked(engine == "fsdp2"), searching()
    trainer = quiet_trainer(
        pruner, saver, max_epochs=len(SCORES), num_sanity_val_steps=0, enable_checkpointing=True,
        use_distributed_sampler=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return {"masks": plain(pruner.masks), "weights": plain(module.state_dict()), "rounds": records_of(pruner)}


def search(rank, folder):
    """By engine the unbroken run, and those resumed from a file of it."""
    found = {}
    for engine in ("ddp", "fsdp2") if torch.__version__ >= "2.9" else ("ddp",):
        found[engine] = train(folder / engine, engine)
        found[f"{engine}, resumed"] = [
            train(folder / f"{engine}-{epoch}", engine, folder / engine / f"epoch={epoch}.ckpt") for epoch in KILLED
        ]
    return found
