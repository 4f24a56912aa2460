"""Networks to prune, each a LightningModule that trains with SGD: linear, MLP, CNN and ResNet-18."""

from math import prod
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import resnet18 as torchvision_resnet18


class Classifier(LightningModule):
    """Trains a network to tell classes apart.

    Args:
        network: Images to one score a class.
        num_classes: How many classes there are.
        lr: Learning rate of the first step.
        momentum: Momentum of SGD.
        nesterov: Nesterov's momentum.
        weight_decay: Weight decay of SGD.
        schedule: How the learning rate falls: along a cosine to 0, by a tenth after a half and again after three
            quarters, or not at all.
        schedule_epochs: Epochs the schedule is written for: the length of a round. None: the whole of training.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        schedule: Literal["cosine", "step", "none"] = "cosine",
        schedule_epochs: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.sgd: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        self.schedule = schedule
        self.schedule_epochs = schedule_epochs
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate("test", self.test_acc, batch)

    def evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        """Logs loss and accuracy of a batch that is not trained on."""
        images, labels = batch
        scores = self(images)
        accuracy(scores, labels)
        self.log(f"{stage}_loss", cross_entropy(scores, labels), prog_bar=True, sync_dist=True)
        self.log(f"{stage}_acc", accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), **self.sgd)
        if self.schedule == "none":
            return optimizer
        epochs = self.schedule_epochs or self.trainer.max_epochs
        scheduler: LRScheduler = (
            CosineAnnealingLR(optimizer, epochs)
            if self.schedule == "cosine"
            else MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
        )
        return [optimizer], [scheduler]


class Linear(Classifier):
    """One linear layer on the pixels."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, **training: Any) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), num_classes))
        super().__init__(network, num_classes, **training)


class MLP(Classifier):
    """Linear layers with ReLU between them.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: How many classes there are.
        hidden: Width of each hidden layer; the default is the paper's.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, hidden: tuple[int, ...] = (128, 256), **training: Any
    ) -> None:
        widths = (prod(input_shape), *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip(widths, hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(widths[-1], num_classes)), num_classes, **training)


class CNN(Classifier):
    """3 x 3 convolutions, each with BatchNorm and ReLU, halving the image between them; then a mean and a linear layer.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: How many classes there are.
        hidden: Channels of each convolution; the default is the paper's.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        hidden: tuple[int, ...] = (64, 128, 256, 512),
        **training: Any,
    ) -> None:
        channels = (input_shape[0], *hidden)
        layers: list[nn.Module] = []
        for before, after in zip(channels, hidden, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes)]
        super().__init__(nn.Sequential(*layers[:-1], *head), num_classes, **training)


class ResNet18(Classifier):
    """torchvision's ResNet-18 for small images: a 3 x 3 first convolution of stride 1 and no pooling after it."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, **training: Any) -> None:
        network = torchvision_resnet18(num_classes=num_classes)
        network.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        super().__init__(network, num_classes, **training)


# `--model` takes the name of a class: these are the short ones.
linear = type("linear", (Linear,), {})
mlp = type("mlp", (MLP,), {})
cnn = type("cnn", (CNN,), {})
resnet18 = type("resnet18", (ResNet18,), {})
