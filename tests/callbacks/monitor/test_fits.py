"""Real networks pruned far too hard are stopped and handed back as good as they were; sound ones are left alone."""

import functools
import tarfile

import pytest
import torch
from helpers import Rounds, quiet_trainer, same, seeded
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback, SAPCallback

pytest.importorskip("sklearn")

pytestmark = pytest.mark.slow

EPOCHS = 4  # of a round, enough to train a dense network of these to its best accuracy


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn(channels=1, side=8, pool=2):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(pool),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(pool),
        nn.Flatten(),
        nn.Linear(16 * (side // pool**2) ** 2, 10),
    )


class Classifier(LightningModule):
    def __init__(self, net, rate=0.2, epochs=EPOCHS):
        super().__init__()
        self.net, self.rate, self.epochs = net, rate, epochs

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [CosineAnnealingLR(optimizer, self.epochs)]


@functools.cache
def digits():
    """Images to train on and to validate on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))
    return random_split(data, [1397, 400], torch.Generator().manual_seed(0))


def train(folder, net, seed, pruner, monitor, data=None, epochs=EPOCHS, rounds=11, **options):
    """Module, copies of its rounds, the Trainer and what it validates on."""
    torch.manual_seed(seed)
    images, held_out = data or digits()
    module, copies = Classifier(net, epochs=epochs, **options), Rounds(pruner)
    trainer = quiet_trainer(pruner, monitor, copies, max_epochs=epochs * (rounds + 1), default_root_dir=folder)
    val = DataLoader(held_out, len(held_out))
    trainer.fit(module, DataLoader(images, 64, shuffle=True), val)
    return module, copies, trainer, val


def check_stopped(pruner, monitor, module, copies, trainer, val, lost=0.02):
    """That it collapsed, was stopped for it, and is as good as its best round was."""
    scores = [record.metrics["val_acc"] for record in pruner.history]
    verdict, record = monitor.verdict, pruner.history.restored
    assert verdict.phase == "collapse"
    assert trainer.current_epoch < trainer.max_epochs
    assert len(scores) == verdict.round + 1 == len(copies.states)
    assert scores[-1] < 0.7 * max(scores), "the network did not collapse"
    assert record.round == verdict.restore == pruner.current_round() < verdict.round
    assert same(module.state_dict(), copies.states[record.round])
    assert same(pruner.masks, copies.masks[record.round][0])
    assert pruner.remaining == record.remaining
    (found,) = trainer.validate(module, val, verbose=False)
    assert found["val_acc"] == pytest.approx(record.metrics["val_acc"], abs=1e-6)
    assert found["val_acc"] >= max(scores) - lost, f"{scores}, restored {record.round}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", ["val_acc", None])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_a_network_pruned_far_too_hard_is_stopped_and_handed_back(tmp_path, build, metric, seed):
    pruner = PruningCallback(FixedFraction(0.6), rounds=11, every_n_epochs=EPOCHS, lr_schedule="restart")
    monitor = PQIMonitor(monitor=metric, verbose=False)
    check_stopped(pruner, monitor, *train(tmp_path, seeded(build, seed), seed, pruner, monitor))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("metric", ["val_acc", None])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_a_network_pruned_as_far_as_its_index_says_is_left_alone(tmp_path, build, metric, seed):
    pruner = SAPCallback(rounds=9, every_n_epochs=2, lr_schedule="restart")
    monitor = PQIMonitor(monitor=metric, verbose=False)
    module, copies, trainer, _ = train(tmp_path, seeded(build, seed), seed, pruner, monitor, epochs=2, rounds=9)
    scores = [record.metrics["val_acc"] for record in pruner.history]
    assert monitor.verdict is None
    assert trainer.current_epoch == 20
    assert pruner.remaining < 0.6
    assert scores[-1] > max(scores) - 0.03, "the network collapsed"
    assert same(module.state_dict(), copies.states[9])
    assert [record.phase for record in pruner.history][-1] != "collapse"


@functools.cache
def photographs(archive, folder):
    """Some of the images of CIFAR-10, as numbers between -1 and 1."""
    data = pytest.importorskip("examples.data")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (root,) = {path.parent for path in folder.rglob("train") if path.is_dir()}
    images = data.ImageFolderData(str(root))
    images.setup("fit")
    parts = []
    for part, count in ((images.train, 4000), (images.test, 1000)):
        chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count].tolist()
        pixels, labels = zip(*Subset(part, chosen), strict=True)
        parts.append(TensorDataset(torch.stack(pixels), torch.tensor(labels)))
    return parts


@pytest.mark.parametrize("metric", ["val_acc", None])
def test_a_network_for_photographs_is_stopped_and_handed_back(tmp_path, tmp_path_factory, shared, metric):
    archive = shared / "data" / "cifar10-images.tar"
    if not archive.is_file():
        pytest.skip("the images are not beside the repository")
    data = photographs(archive, tmp_path_factory.getbasetemp() / "photographs")
    pruner = PruningCallback(FixedFraction(0.6), rounds=11, every_n_epochs=EPOCHS, lr_schedule="restart")
    monitor = PQIMonitor(monitor=metric, verbose=False)
    net = seeded(lambda: cnn(channels=3, side=32, pool=4))
    check_stopped(pruner, monitor, *train(tmp_path, net, 0, pruner, monitor, data, rate=0.05))
