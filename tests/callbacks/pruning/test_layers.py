"""What is said of layers that compute with other weights than those that are pruned."""

import pytest
import torch
from engine.test_used import Partial
from helpers import fit, half
from lightning.pytorch import LightningModule
from timm.layers import StdConv2d
from timm.models.byobnet import MobileOneBlock
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, Pruner

IMAGES = DataLoader(torch.ones(4, 3, 8, 8), 2)


class Images(LightningModule):
    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


def test_standardised_layers_are_left_out_with_a_warning():
    pruner = half()
    with pytest.warns(UserWarning, match=r"^sap: these layers make another weight .*: net\.0\.weight\. Leave them out"):
        fit(Images(StdConv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), pruner, train=IMAGES)
    assert list(pruner.masks) == ["net.1.weight"]


def test_a_network_of_standardised_layers_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"'net\.0\.weight' \(a zero in it is none in the weight that its layer uses\)"
    ):
        fit(Images(StdConv2d(3, 8, 3)), half(), train=IMAGES)


def test_branches_that_are_merged_later_are_said():
    with pytest.warns(
        UserWarning, match=r"^sap: MobileOneBlock adds branches .*, 2 times \(first in 'net\.0'\)\. A merged"
    ):
        fit(Images(MobileOneBlock(3, 16), MobileOneBlock(16, 16)), half(), train=IMAGES)


def test_a_layer_that_cannot_be_asked_is_named(caplog):
    class Masked(Images):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch, batch).square().mean()

    fit(Masked(Partial(3, 8, 3)), half(), train=IMAGES)
    assert "sap: net.0 have a forward of their own that takes other inputs than a tensor" in caplog.text


def test_a_loop_without_a_trainer_hears_the_same():
    with pytest.warns(UserWarning, match=r"^sap: these layers make another weight"):
        Pruner(FixedFraction(0.5)).attach(nn.Sequential(StdConv2d(3, 8, 3), nn.Conv2d(8, 2, 1)))
    with pytest.warns(UserWarning, match=r"^sap: MobileOneBlock adds branches"):
        Pruner(FixedFraction(0.5)).attach(MobileOneBlock(3, 16))
