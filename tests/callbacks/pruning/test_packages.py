"""Models and averages of the packages that people train with: peft, diffusers, torch_geometric."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from helpers import Net, Watch, all_masked_are_zero, fit, half, is_masked, mlp, quiet_trainer, seeded, survivors
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as GraphLoader
from torch_geometric.nn import GATv2Conv, RGCNConv, global_mean_pool


def adapted():
    return get_peft_model(seeded(mlp), LoraConfig(r=2, target_modules=["0", "3"]))


class TestPeft:
    def test_adapters_are_pruned_and_what_is_frozen_is_not(self):
        module, pruner = Net(adapted()), half(rounds=1)
        with pytest.warns(UserWarning, match="low-rank"):
            fit(module, pruner, max_epochs=2)
        assert {name.removeprefix("net.base_model.model."): count for name, count in survivors(pruner).items()} == {
            "0.lora_A.default.weight": 6,
            "0.lora_B.default.weight": 8,
            "3.lora_A.default.weight": 8,
            "3.lora_B.default.weight": 3,
        }
        assert is_masked(module.state_dict(), pruner.masks)

    def test_adapters_that_start_at_zero_are_trained_under_keep_zeros(self):
        module, pruner = Net(adapted()), half(rounds=0, keep_zeros=True)
        with pytest.warns(UserWarning, match="lora_B"):
            fit(module, pruner, max_epochs=1)
        assert pruner.remaining == 1
        assert all(p.any() for name, p in module.named_parameters() if "lora_B" in name)

    def test_what_is_merged_keeps_the_zeros_of_the_base_where_it_is_masked(self):
        """As the page on adapters has it."""
        base = seeded(mlp)
        with torch.no_grad():
            for layer in (base[0], base[3]):
                layer.weight[layer.weight.abs() < 0.2] = 0
        kept = {name: p != 0 for name, p in base.named_parameters() if p.dim() > 1}
        module = Net(get_peft_model(base, LoraConfig(r=2, target_modules=["0", "3"])))
        fit(module, max_epochs=2)
        merged = module.net.merge_and_unload()
        assert all((merged.get_parameter(name) != 0).all() for name in kept)  # the product fills the zeros
        with torch.no_grad():
            for name, mask in kept.items():
                merged.get_parameter(name).mul_(mask)
        assert all(torch.equal(merged.get_parameter(name) != 0, mask) for name, mask in kept.items())


class Diffusion(LightningModule):
    """A small U-Net of diffusers learns to see the noise, and an average of its weights follows it."""

    def __init__(self):
        super().__init__()
        self.net = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=4,
        )  # fmt: skip
        self.noise = DDPMScheduler(num_train_timesteps=10)
        self.ema = EMAModel(self.net.parameters(), decay=0.9)

    def averaged_weights(self):
        names = [f"net.{name}" for name, _ in self.net.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def training_step(self, batch, batch_idx):
        [images] = batch
        noise, times = torch.randn_like(images), torch.randint(0, 10, images.shape[:1])
        return mse_loss(self.net(self.noise.add_noise(images, noise, times), times).sample, noise)

    def on_train_batch_end(self, *_):
        self.ema.step(self.net.parameters())

    def configure_optimizers(self):
        return AdamW(self.net.parameters(), lr=1e-3)


def test_a_unet_of_diffusers_and_its_average_are_pruned_alike():
    torch.manual_seed(0)
    module, pruner, clean = Diffusion(), half(rounds=2, exclude=["net.conv_in.*", "output"]), []
    look = Watch(
        on_train_epoch_end=lambda trainer, m: clean.append(
            (all_masked_are_zero(trainer, m), is_masked(m.averaged_weights(), pruner.masks))
        )
    )
    fit(module, pruner, look, train=DataLoader(TensorDataset(torch.randn(8, 1, 8, 8)), batch_size=4), max_epochs=3)
    assert clean == [(True, True)] * 3
    assert pruner.remaining == pytest.approx(0.25, abs=1e-3)
    assert not {"net.conv_in.weight", "net.conv_out.weight"} & set(pruner.masks)
    average, [down] = module.averaged_weights(), ["net.down_blocks.0.resnets.0.conv1.weight"]
    assert int((average[down] != 0).sum()) == 144  # a quarter of 576
    assert not torch.equal(average[down], module.get_parameter(down))


class Graphs(LightningModule):
    """Two classes of graphs, whose edges have three kinds."""

    def __init__(self):
        super().__init__()
        self.relations, self.attention = RGCNConv(4, 6, 3), GATv2Conv(6, 4, heads=2)
        self.classes = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        nodes = self.relations(batch.x, batch.edge_index, batch.edge_type).relu()
        nodes = self.attention(nodes, batch.edge_index).relu()
        return nn.functional.cross_entropy(self.classes(global_mean_pool(nodes, batch.batch)), batch.y)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


def graph(label):
    edges = torch.randint(0, 5, (2, 12))
    return Data(x=torch.randn(5, 4) + label, edge_index=edges, edge_type=torch.randint(0, 3, (12,)), y=label)


def test_graph_networks_are_pruned_relation_by_relation():
    torch.manual_seed(0)
    module, pruner, clean = Graphs(), half(rounds=2, exclude="output"), []
    look = Watch(on_train_epoch_end=lambda trainer, m: clean.append(all_masked_are_zero(trainer, m)))
    quiet_trainer(pruner, look, max_epochs=3).fit(module, GraphLoader([graph(i % 2) for i in range(12)], batch_size=4))
    assert clean == [True] * 3
    assert pruner.masks["relations.weight"].sum((1, 2)).tolist() == [6, 6, 6]  # a quarter of each relation's 24
    assert survivors(pruner) == {
        "relations.weight": 18,
        "relations.root": 6,
        "attention.lin_l.weight": 12,
        "attention.lin_r.weight": 12,
    }
