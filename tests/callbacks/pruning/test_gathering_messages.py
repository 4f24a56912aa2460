"""What is said of scores that are gathered: what cannot be had, what was not there, and what decided."""

import re
import warnings

import pytest
import torch
from helpers import Net, fit, half
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from scoring import Scores, Sum, still, two_layers
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FisherRatio, FixedFraction, PruningCallback, SAPCallback, SparsityInformed, Taylor, pq_index

YAML = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: lightning_sap.SAPCallback
      init_args:
        importance: taylor
        name: by_name
    - class_path: lightning_sap.SAPCallback
      init_args:
        structure: unit
        importance:
          class_path: lightning_sap.FisherRatio
          init_args:
            labels: label
        name: as_object
"""


def test_yaml_gives_scores_by_name_and_as_objects(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    args = ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(BoringModel, args=args, run=False, save_config_callback=None, seed_everything_default=False)
    pruners = [callback for callback in cli.trainer.callbacks if isinstance(callback, SAPCallback)]
    assert [pruner.session.gathering.importance for pruner in pruners] == [Taylor(), FisherRatio("label")]


class TestWhatIsSaid:
    def test_weights_that_cannot_be_scored_are_named_before_training(self):
        net = nn.Sequential(nn.Linear(6, 4), nn.Bilinear(4, 4, 3))
        message = (
            "Wanda() cannot score 'net.1.weight': it is 'weight' of Bilinear. Leave them out with "
            "exclude=['net.1.weight'], or give another importance, such as 'taylor' or 'magnitude'."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(Net(net), half(importance="wanda"))

    def test_an_optimizer_that_does_not_tell_of_its_steps_is_named(self):
        class Silent(SGD):
            def __init__(self, parameters):
                super().__init__(parameters, lr=0.1)
                self._optimizer_step_post_hooks = {}  # as older wrappers have it, and which cannot hold a hook

        with pytest.raises(ValueError, match=r"Taylor\(\) cannot score 'net.0.weight': its optimizer does not tell of"):
            fit(Net(optimizer=Silent), half(importance="taylor"))

    def test_a_round_without_scores_is_not_pruned_and_warned_of(self):
        """The last epoch of the round has no batch that takes a step."""

        class Skips(Net):
            def training_step(self, batch, batch_idx):
                return None if self.trainer.current_epoch == 1 else super().training_step(batch, batch_idx)

        pruner = half(importance="taylor", every_n_epochs=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Skips(), pruner, max_epochs=6)
        said = (
            "sap: nothing is pruned after round 0: Taylor() gathers its scores in the last epoch of a round, and no "
            "optimizer step was seen there. Give longer rounds (every_n_epochs), or importance='magnitude'."
        )
        assert said in [str(warning.message) for warning in caught]
        assert [record.pruned for record in pruner.history] == [0, 36, None]

    def test_a_layer_that_was_not_seen_stays_and_is_named(self):
        class Passes(Net):
            """Uses the weight of its last layer, and not the layer."""

            def loss(self, batch):
                hidden = self.net[:3](batch[0])
                return (nn.functional.linear(hidden, self.net[3].weight, self.net[3].bias) - batch[1]).square().mean()

        pruner = half(importance="wanda", rounds=1)
        with pytest.warns(
            UserWarning, match=re.escape("sap: ['net.3.weight'] stay as they are: Wanda() has no scores")
        ):
            fit(Passes(), pruner, max_epochs=2)
        assert {n: int(mask.sum()) for n, mask in pruner.masks.items()} == {"net.0.weight": 24, "net.3.weight": 24}

    def test_targets_are_met_by_the_weights_that_have_scores(self):
        pruner = SAPCallback(importance="taylor", target_remaining=0.25, every_n_epochs=1)
        fit(Net(), pruner)
        assert pruner.remaining == 0.25

    def test_the_index_that_decided_is_told(self, caplog):
        pruner = PruningCallback(SparsityInformed(1.0, 2.0), importance="taylor", rounds=1, scope="global")
        data = TensorDataset(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
        with caplog.at_level("INFO"):
            fit(Sum(two_layers(), still), pruner, max_epochs=2, train=DataLoader(data, 1))
        index = float(pq_index(torch.tensor([2.0, 8.0, 24.0, 16.0, 10.0, 8.0]), 1.0, 2.0))
        assert f"round 0 is pruned by Taylor(): the PQ Index of the scores of 6 weights is {index:.4f}." in caplog.text
        assert "scope global, scored by taylor, weights kept" in caplog.text

    def test_own_terms_by_a_subclass(self):
        class Squared(Taylor):
            def term(self, weight, gradient):
                return (weight * gradient) ** 2

        found = []
        for importance in (Squared(), Taylor()):
            pruner = PruningCallback(FixedFraction(0.5), importance=importance, rounds=1)
            module = Sum(two_layers(), still)
            data = TensorDataset(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))
            fit(module, pruner, scores := Scores(pruner), max_epochs=2, train=DataLoader(data, 1))
            found.append(scores.last["net.1.weight"].tolist())
        assert found == [[[100.0, 64.0]], [[10.0, 8.0]]]
