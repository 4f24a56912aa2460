"""Whole units by how well they tell classes apart, and by Taylor and Wanda scores."""

import copy
import re

import pytest
import torch
from helpers import Net, Watch, fit
from scoring import Scores, hooks_of, still
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FisherRatio, FixedFraction, PruningCallback

pytest.importorskip("torch_pruning")

# Units of tests read one input each, so that it is known what they tell apart.
pytestmark = pytest.mark.filterwarnings("ignore:.* are exactly zero as training starts")


class Classes(Net):
    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def two_classes():
    """Four hidden units: the third alone tells the classes apart, and has the smallest weights."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    net[0].weight.data = torch.diag(torch.tensor([3.0, 2.0, 0.1, 4.0]))
    torch.manual_seed(0)
    classes = torch.arange(40) % 2
    x = torch.rand(40, 4)
    x[:, 2] = classes + 0.1 * torch.rand(40)
    return Classes(net, still), DataLoader(TensorDataset(x, classes), 8)


class TestUnits:
    """By classes: which units go."""

    def fit(self, importance, **options):
        module, data = two_classes()
        how = {"structure": "unit", "rounds": 1, **options}
        pruner = PruningCallback(FixedFraction(0.75), importance=importance, **how)
        fit(module, pruner, scores := Scores(pruner), max_epochs=2, train=data)
        return pruner, scores

    def test_fisher_keeps_the_unit_that_tells_the_classes_apart(self):
        pruner, scores = self.fit("fisher")
        assert pruner.masks["net.0.weight"].any(1).tolist() == [False, False, True, False]
        assert pruner.masks["net.2.weight"].any(0).tolist() == [False, False, True, False]
        by_size, _ = self.fit("magnitude")
        assert by_size.masks["net.0.weight"].any(1).tolist() == [False, False, False, True]
        of_units = scores.last["net.0.weight"][:, 0]
        assert float(of_units[2]) > 100 * float(of_units[[0, 1, 3]].max())

    def test_scores_are_those_of_what_the_next_layer_reads(self):
        _, scores = self.fit(FisherRatio())
        module, data = two_classes()
        x, classes = data.dataset.tensors
        seen = module.net[:2](x).detach().double()
        sums = torch.stack([seen[classes == c].sum(0) for c in (0, 1)])
        wanted = FisherRatio().ratio({"count": classes.bincount(), "sum": sums, "square": seen.square().sum(0)})
        torch.testing.assert_close(scores.last["net.0.weight"], wanted.unsqueeze(1).expand(4, 4))

    def test_a_dead_unit_scores_nothing_whatever_its_layer_computes(self):
        module, data = two_classes()
        module.net[0].weight.data[2] *= -1  # it tells the classes apart in front of the ReLU
        pruner = PruningCallback(FixedFraction(0.75), importance="fisher", structure="unit", rounds=1)
        fit(module, pruner, scores := Scores(pruner), max_epochs=2, train=data)
        assert scores.last["net.0.weight"][2].tolist() == [0.0] * 4
        assert not pruner.masks["net.0.weight"][2].any()

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_other_scores_prune_units_by_their_norm(self, importance):
        pruner, scores = self.fit(importance)
        norms = scores.last["net.0.weight"].norm(dim=1)
        assert pruner.masks["net.0.weight"].any(1).nonzero().flatten().tolist() == [int(norms.argmax())]

    def test_batches_without_classes_are_refused_at_the_first_one(self):
        pruner = PruningCallback(FixedFraction(0.5), importance="fisher", structure="unit", every_n_epochs=2)
        epochs = Watch(on_train_batch_end=lambda trainer, _: pytest.fail("a batch was trained on"))
        with pytest.raises(ValueError, match=re.escape("FisherRatio(labels=1) must give one class for each sample")):
            fit(Net(), pruner, epochs)

    def test_units_of_other_samples_than_the_classes_are_refused(self):
        module, data = two_classes()
        pruner = PruningCallback(
            FixedFraction(0.5), importance=FisherRatio(lambda batch: batch[1][:3]), structure="unit", every_n_epochs=1
        )
        message = "the layer of 'net.2.weight' reads an input of shape (8, 4), and the batch has 3 classes"
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(module, pruner, train=data)
        assert hooks_of(module) == 0

    def test_samples_of_no_class_are_passed_over_and_so_are_batches_of_them_alone(self):
        """The first batch has no class at all, and the others each a sample of none."""

        class Ignoring(Classes):
            def loss(self, batch):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1], ignore_index=-100, reduction="sum")

        module, data = two_classes()
        x, classes = (tensor.clone() for tensor in data.dataset.tensors)
        classes[:8], classes[8::8] = -100, -100
        pruner = PruningCallback(FixedFraction(0.75), importance="fisher", structure="unit", rounds=1)
        data = DataLoader(TensorDataset(x, classes), 8)
        fit(Ignoring(copy.deepcopy(module.net), still), pruner, scores := Scores(pruner), max_epochs=2, train=data)
        seen, classes = module.net[:2](x[classes >= 0]).detach().double(), classes[classes >= 0]
        sums = torch.stack([seen[classes == c].sum(0) for c in (0, 1)])
        wanted = FisherRatio().ratio({"count": classes.bincount(), "sum": sums, "square": seen.square().sum(0)})
        torch.testing.assert_close(scores.found[0]["net.0.weight"][:, 0], wanted)

    def test_images_are_averaged_over_positions_and_flattened_units_found(self):
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2))
        x, classes = torch.randn(12, 1, 4, 4), torch.arange(12) % 2
        pruner = PruningCallback(FixedFraction(0.5), importance="fisher", structure="unit", every_n_epochs=1)
        module = Classes(copy.deepcopy(net), still)
        fit(module, pruner, scores := Scores(pruner), max_epochs=2, train=DataLoader(TensorDataset(x, classes), 12))
        seen = net[:2](x).detach().mean((2, 3)).double()
        sums = torch.stack([seen[classes == c].sum(0) for c in (0, 1)])
        wanted = FisherRatio().ratio({"count": classes.bincount(), "sum": sums, "square": seen.square().sum(0)})
        torch.testing.assert_close(scores.found[0]["net.0.weight"][:, 0, 0, 0], wanted, rtol=1e-5, atol=0)


class Added(Classes):
    """Two layers whose outputs are added: their units go together. Two layers read the sum."""

    example_input_array = torch.zeros(1, 4)

    def __init__(self):
        torch.manual_seed(1)
        sizes = {"left": (4, 5), "right": (4, 5), "one": (5, 2), "two": (5, 2)}
        super().__init__(nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}), still)

    def hidden(self, x):
        return (self.net["left"](x) + self.net["right"](x)).relu()

    def forward(self, x):
        return self.net["one"](self.hidden(x)) + self.net["two"](2 * self.hidden(x) ** 2)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_coupled_units_have_the_sum_of_what_their_readers_see():
    x, classes = torch.randn(12, 4), torch.arange(12) % 2
    pruner = PruningCallback(FixedFraction(0.4), importance="fisher", structure="unit", rounds=1)
    module, twin = Added(), Added()
    fit(module, pruner, scores := Scores(pruner), max_epochs=2, train=DataLoader(TensorDataset(x, classes), 6))
    hidden, wanted = twin.hidden(x).detach().double(), 0
    for seen in (hidden, 2 * hidden**2):
        sums = torch.stack([seen[classes == c].sum(0) for c in (0, 1)])
        wanted += FisherRatio().ratio({"count": classes.bincount(), "sum": sums, "square": seen.square().sum(0)})
    for layer in ("left", "right"):  # each has its share
        torch.testing.assert_close(scores.last[f"net.{layer}.weight"][:, 0], wanted / 2, rtol=1e-5, atol=0)
        kept = pruner.masks[f"net.{layer}.weight"].any(1)
        assert sorted(kept.nonzero().flatten().tolist()) == sorted(wanted.argsort()[2:].tolist())
