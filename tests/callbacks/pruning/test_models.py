"""Models of every kind, in every precision and engine: pruned, masked, and loadable without this package."""

import re
from functools import partial

import helpers
import pytest
import torch
import torch._dynamo.testing
import torchvision
from helpers import Net, all_masked_are_zero, copied, fit, survivors
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, PruningCallback


class Sequences(nn.Module):
    """Tokens in, the last state out, through an LSTM; its head is tied with the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 4, num_layers=2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


class Adapted(nn.Module):
    """A frozen linear layer beside a low-rank adapter."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x))


def images(size):
    return torch.randn(4, 3, size, size)


def with_a_head(network):
    """Torchvision's vision transformers start from a head of zeros, of which an amount has nothing to choose from."""
    nn.init.normal_(network.heads.head.weight)
    return network


def vit():
    return with_a_head(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5))


# name -> the network, its input, and how many of its parameters are prunable
MODELS = {
    "LSTM with a tied embedding": (Sequences, lambda: torch.randint(7, (3, 5)), 5),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda: torch.randn(4, 3, 8), 4),
    "adapter beside a frozen layer": (Adapted, lambda: torch.randn(4, 6), 2),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2)),
        lambda: torch.randn(4, 6),
        2,
    ),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), lambda: images(32), 21),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), lambda: images(32), 54),
    "vision transformer": (vit, lambda: images(32), 10),
}


class Runs(Net):
    """Any network, on one batch a step."""

    def loss(self, batch):
        return self.net(batch[0]).float().square().mean()


def train(network, batch, *callbacks, optimizer=None, **options):
    module = Runs(network, optimizer or (lambda p: SGD([q for q in p if q.requires_grad], lr=0.01, momentum=0.9)))
    data = DataLoader([(batch,)] * 2, batch_size=None)
    return module, fit(module, *callbacks, train=data, max_epochs=3, **options)


def half_twice(**options):
    return helpers.half(rounds=2, every_n_epochs=None, **options)


@pytest.mark.filterwarnings("ignore:sap. these look like low-rank adapters")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_many_kinds_are_pruned_and_masked(name):
    build, batch, prunable = MODELS[name]
    pruner, network = half_twice(rewind_weights="init"), build()
    module, trainer = train(network, batch(), pruner)
    assert len(pruner.masks) == prunable
    assert all_masked_are_zero(trainer, module)
    sizes = {key: mask.numel() for key, mask in pruner.masks.items()}
    assert survivors(pruner) == {key: n - n // 2 - (n - n // 2) // 2 for key, n in sizes.items()}
    plain = build()
    plain.load_state_dict(copied(network.state_dict()), strict=True)
    plain.eval(), network.eval()
    x = batch()
    assert torch.equal(plain(x), network(x))


def channels_last(network):
    return network.to(memory_format=torch.channels_last)


def test_channels_last_is_pruned_as_channels_first_is():
    build, batch, _ = MODELS["resnet18"]
    pruners, networks = [half_twice(), half_twice()], [helpers.seeded(build), channels_last(helpers.seeded(build))]
    x = batch()
    for pruner, network in zip(pruners, networks, strict=True):
        module, trainer = train(network, x, pruner, optimizer=lambda p: SGD(p, lr=0.0))
        assert all_masked_are_zero(trainer, module)
    assert networks[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert helpers.same(pruners[0].masks, pruners[1].masks)


class TestAdapters:
    def test_adapters_are_warned_of_by_name(self):
        message = (
            "sap: these look like low-rank adapters of frozen weights: net.lora_a.weight, net.lora_b.weight. Pruning "
            "them saves little: they are small, and their product, and so the merged weight, stays dense. Leave them "
            "out with exclude='*lora_*', or merge them first and prune the merged model."
        )
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
            train(Adapted(), torch.randn(4, 6), half_twice())

    def test_adapters_left_out_as_advised_train_densely_without_a_warning(self):
        pruner, network = half_twice(exclude="*lora_*"), nn.Sequential(Adapted(), nn.Linear(6, 4))
        train(network, torch.randn(4, 6), pruner)
        assert survivors(pruner) == {"net.1.weight": 6}
        assert bool(network[0].lora_a.weight.all())

    def test_adapters_are_not_warned_of_where_nothing_is_pruned(self):
        train(Adapted(), torch.randn(4, 6), PruningCallback(FixedFraction(0.5), rounds=0))


class GAN(LightningModule):
    """A generator against a discriminator, each with its own optimizer; after each step it counts the zeros of both."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.zeros = []

    def training_step(self, batch, batch_idx):
        (real,), (g, d) = batch, self.optimizers()
        noise = torch.randn(len(real), 4)
        self.descend(
            d, real_or_fake(self.discriminator(real), 1) + real_or_fake(self.discriminator(self.generator(noise)), 0)
        )
        self.descend(g, real_or_fake(self.discriminator(self.generator(noise)), 1))

    def descend(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.zeros.append(
            [int((net[i].weight == 0).sum()) for net in (self.generator, self.discriminator) for i in (0, 2)]
        )

    def configure_optimizers(self):
        return [Adam(net.parameters(), lr=0.01) for net in (self.generator, self.discriminator)]


def real_or_fake(scores, label):
    return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, label))


GAN_SIZES = {
    "generator.0.weight": 32,
    "generator.2.weight": 48,
    "discriminator.0.weight": 48,
    "discriminator.2.weight": 8,
}


class TestGAN:
    """Two steps an epoch, each of two optimizers: four looks an epoch."""

    @staticmethod
    def fit(*callbacks):
        module = GAN()
        trainer = helpers.fit(
            module, *callbacks, train=DataLoader([(torch.randn(5, 6),)] * 2, batch_size=None), max_epochs=3
        )
        assert trainer.global_step == 3 * 2 * 2
        return module, trainer

    def looks(self, *prunings):
        """Zeros of the four weights after each step; an epoch for each of these fractions of the two networks."""
        return [
            [int(n * f) for n, f in zip(GAN_SIZES.values(), (g, g, d, d), strict=True)]
            for g, d in prunings
            for _ in range(4)
        ]

    def test_gan_is_pruned_as_a_whole_by_one_callback(self):
        pruner = half_twice(reset_optimizer=False)
        module, _ = self.fit(pruner)
        assert list(pruner.masks) == list(GAN_SIZES)
        assert module.zeros == self.looks((0, 0), (1 / 2, 1 / 2), (3 / 4, 3 / 4))

    @pytest.mark.parametrize("selection", [{"include": "generator.*"}, {"exclude": "discriminator.*"}])
    def test_gan_generator_is_pruned_alone(self, selection):
        pruner = half_twice(reset_optimizer=False, **selection)
        module, _ = self.fit(pruner)
        assert survivors(pruner) == {"generator.0.weight": 8, "generator.2.weight": 12}
        assert module.zeros == self.looks((0, 0), (1 / 2, 0), (3 / 4, 0))

    @pytest.mark.parametrize("order", [1, -1])
    def test_gan_is_pruned_by_a_callback_for_each_network(self, order):
        g = half_twice(name="g", include="generator.*", rewind_weights="init", reset_optimizer=False)
        d = PruningCallback(FixedFraction(0.75), rounds=1, name="d", include="discriminator.*")
        module, trainer = self.fit(*[g, d][::order])
        assert module.zeros == self.looks((0, 0), (1 / 2, 3 / 4), (3 / 4, 3 / 4))
        assert (g.remaining, d.remaining) == (0.25, 0.25)
        assert {key for key in trainer.callback_metrics if "remaining" in key} == {"g/remaining", "d/remaining"}


@pytest.mark.slow
def test_vit_b_16_is_pruned_and_masked():
    pruner = half_twice(scope="global")
    slow = partial(SGD, lr=1e-4)  # else it diverges, and that is an error
    network = with_a_head(torchvision.models.vit_b_16(num_classes=5))
    module, trainer = train(network, images(224)[:1], pruner, optimizer=slow)
    assert all_masked_are_zero(trainer, module)
    n = sum(mask.numel() for mask in pruner.masks.values())
    assert sum(survivors(pruner).values()) == n - n // 2 - (n - n // 2) // 2


@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_masks_hold_in_every_precision(precision, scope):
    pruner = half_twice(scope=scope)
    x = torch.randn(4, 6).to({"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32))
    module, trainer = train(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), x, pruner, precision=precision)
    assert all_masked_are_zero(trainer, module)
    rows = {"net.0.weight": 8 * 2, "net.2.weight": 2 * 2}  # of 6 weights 3 and then 1 go, of 8 weights 4 and 2
    layers = {"net.0.weight": 12, "net.2.weight": 4}
    assert (
        sum(survivors(pruner).values()) == 16
        if scope == "global"
        else survivors(pruner) == (rows if scope == "neuron" else layers)
    )
    assert 0 < pruner.history[-1].pqi < 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:sap. no weights are left in .'net.2.weight'")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
def test_masks_hold_on_a_gpu_in_every_precision(precision, scope):
    pruner, zeros = half_twice(scope=scope, rewind_weights="init"), []
    look = helpers.Watch(on_before_zero_grad=lambda t, m: zeros.append((t.global_step, all_masked_are_zero(t, m))))
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    options = {"precision": precision, "accelerator": "gpu", "gradient_clip_val": 0.5}
    module, trainer = train(network, torch.randn(4, 6), pruner, look, **options)
    assert trainer.strategy.root_device.type == "cuda"
    assert all(clean for _, clean in zeros)
    assert zeros[-1][0] > 0
    assert {mask.device for mask in pruner.masks.values()} == {
        module.net[0].weight.device
    }  # back where Lightning puts it
    assert all_masked_are_zero(trainer, module)
    assert sum(survivors(pruner).values()) == {"neuron": 20, "layer": 16, "global": 16}[scope]
    train(network, torch.randn(4, 6), pruner, accelerator="gpu")  # a second fit keeps the masks
    assert sum(survivors(pruner).values()) < 16


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_masks_hold_with_fused_foreach_and_plain_optimizers(kind, options, accelerator):
    pruner = half_twice()
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = partial(kind, lr=0.01, **options)
    module, trainer = train(network, torch.randn(4, 6), pruner, optimizer=optimizer, accelerator=accelerator)
    assert all_masked_are_zero(trainer, module)
    assert sum(survivors(pruner).values()) == 16


class Layer(nn.Linear):
    """A layer of the user's: PyTorch 2.6 does not compile its own ones alone."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_torch_compile_compiles_once_for_all_rounds(whole):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    network = nn.Sequential(Layer(6, 8), nn.ReLU(), nn.Linear(8, 2))
    if whole:
        compiled = torch.compile(network, backend=counter)
    else:
        compiled = network
        network[0].compile(backend=counter)
    pruner = half_twice(rewind_weights="init")
    module, trainer = train(compiled, torch.randn(4, 6), pruner)
    assert counter.frame_count == 1
    assert all_masked_are_zero(trainer, module)
    assert sum(survivors(pruner).values()) == 16
