"""What PQIMonitor should log, computed from the weights alone."""

import pytest
import torch
from helpers import PRUNABLE, Watch, parameters

from lightning_sap import gini_index, pq_index


def by_hand(module, masks=None, p=0.5, q=1.0):
    """Keys and values of an epoch, from nothing but the weights and `pq_index`."""
    live = {name: parameters(module)[name].detach() for name in PRUNABLE}
    alive = {name: w.flatten() if masks is None else w[masks[name]] for name, w in live.items()}
    layers = {name: float(pq_index(w, p, q)) for name, w in alive.items()}
    everything = torch.cat(list(alive.values()))
    return {
        "pqi/global": float(pq_index(everything, p, q)),
        "pqi/layer_mean": sum(layers.values()) / len(layers),
        "gini/global": float(gini_index(everything)),
        **{f"pqi/{name}": index for name, index in layers.items()},
        **{f"remaining/{name}": len(alive[name]) / w.numel() for name, w in live.items()},
    }


def logged(trainer, prefixes=("pqi/", "remaining/", "gini/")):
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefixes)}


def close(values):
    return pytest.approx(values, rel=1e-6, abs=1e-7)  # Lightning logs in float32


class Expecting(Watch):
    """Compares what is logged at the end of each epoch (and of each validation) with what it should be."""

    def __init__(self, pruner=None, hook="on_train_epoch_end", **options):
        self.seen, self.expected = [], []

        def compare(trainer, module):
            if trainer.sanity_checking:
                return
            self.seen.append(logged(trainer))
            self.expected.append(by_hand(module, None if pruner is None else pruner.masks, **options))

        super().__init__(**{hook: compare})
