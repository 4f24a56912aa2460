"""A policy that drops and grows, through whole fits."""

import pytest
import torch
from helpers import Net, Scheduled, Watch, fit, same
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import records_of

from lightning_sap import Amounts, Policy, PruningCallback


class HalfAndATenth(Policy):
    """Drops half of what is kept, and lets a tenth of what is pruned come back."""

    regrows = True

    def __call__(self, sums, round, standing):
        return Amounts(sums.count // 2, standing.pruned // 10)


def pruner_of(**options):
    return PruningCallback(HalfAndATenth(), **{"scope": "global", "rounds": 4, **options})


def test_history_counts_what_went_and_what_came_back():
    pruner = pruner_of()
    fit(Net(), pruner, max_epochs=5)
    assert [(record.weights, record.pruned, record.regrown) for record in pruner.history] == [
        (72, 36, 0),
        (36, 18, 3),
        (21, 10, 5),
        (16, 8, 5),
        (13, None, None),
    ]


@pytest.mark.parametrize("rewind", [None, "init"])
@pytest.mark.parametrize("reset", [True, False])
def test_returning_weights_start_at_zero_without_momentum_and_are_trained_then(rewind, reset):
    masks, starts, momenta, trained = {}, {}, {}, {}
    pruner = pruner_of(rewind_weights=rewind, reset_optimizer=reset, scope="layer")

    def start(trainer, module):
        weight = module.net[3].weight  # of the outputs, so that each has a gradient
        state = trainer.optimizers[0].state.get(weight, {})
        round = pruner.current_round()
        if round not in starts:
            masks[round] = pruner.masks["net.3.weight"]
            starts[round] = weight.detach().clone()
            momenta[round] = state.get("momentum_buffer", torch.zeros(3, 8)).clone()

    def end(trainer, module):
        trained.setdefault(pruner.current_round(), module.net[3].weight.detach().clone())

    fit(Net(), pruner, Watch(on_train_batch_start=start, on_train_batch_end=end), max_epochs=5)
    returned = {t: masks[t] & ~masks[t - 1] for t in range(1, 5)}
    assert [int(where.sum()) for where in returned.values()] == [0, 1, 1, 1]
    for t, where in returned.items():
        assert not starts[t][where].any()
        assert not momenta[t][where].any()
    # after one step they are alive; one of them hangs on a unit whose weights are all pruned, and has no gradient
    assert sum(int((trained[t][where] != 0).sum()) for t, where in returned.items()) >= 2


def test_target_is_met_by_the_last_pruning_alone():
    pruner = pruner_of(target_remaining=0.25)
    fit(Net(), pruner, max_epochs=5)
    assert [record.weights for record in pruner.history] == [72, 36, 21, 16, 18]


@pytest.mark.parametrize("epoch", range(4))
@pytest.mark.parametrize("reset", [True, False])
def test_resumed_in_the_middle_it_equals_the_unbroken_run(tmp_path, epoch, reset):
    def trained(**options):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        module, pruner = Scheduled(), pruner_of(reset_optimizer=reset)
        fit(module, pruner, saver, max_epochs=5, enable_checkpointing=True, **options)
        return module, pruner

    whole, pruner = trained()
    again, resumed = trained(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert same(again.state_dict(), whole.state_dict())
    assert same(resumed.masks, pruner.masks)
    assert records_of(resumed) == records_of(pruner)
