"""Images to train on: scikit-learn's digits, FashionMNIST, CIFAR-10, or a folder of your own."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import CIFAR10, FashionMNIST, ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import v2


class Transformed(Dataset[Any]):
    """A dataset of (image, label) seen through a transform, so that training and validation share one copy."""

    def __init__(self, images: Dataset[Any], transform: v2.Transform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.images[index]
        return self.transform(image), label


class ImageData(LightningDataModule):
    """Splits, normalises and loads images. A subclass says how to read them and what they look like.

    The shape and the number of classes are known before anything is downloaded: the model is built from them.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads them in the main process.
        val_fraction: Share of the training images held out for validation, the same ones in every run.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __init__(self, batch_size: int = 128, num_workers: int = 0, val_fraction: float = 0.1) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction

    def read(self, train: bool) -> Dataset[Any]:
        """The training or the test images, with their labels, as they are stored."""
        raise NotImplementedError

    def augmentation(self) -> list[v2.Transform]:
        """What happens to a training image before it is normalised."""
        return []

    def normalisation(self) -> list[v2.Transform]:
        """What happens to every image."""
        to_float = v2.ToDtype(torch.float32, scale=True)
        return [v2.ToImage(), to_float, v2.Normalize(list(self.mean), list(self.std)), v2.ToPureTensor()]

    def split(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """The images to train on and those to validate on."""
        images = self.read(train=True)
        count = len(images)  # type: ignore[arg-type]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        held_out = round(self.val_fraction * count)
        return Subset(images, order[held_out:]), Subset(images, order[:held_out])

    def setup(self, stage: str) -> None:
        """Reads the images of all three parts."""
        train, val = self.split()
        plain = v2.Compose(self.normalisation())
        self.train = Transformed(train, v2.Compose(self.augmentation() + self.normalisation()))
        self.val = Transformed(val, plain)
        self.test = Transformed(self.read(train=False), plain)

    def loader(self, images: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        """Batches of one part."""
        return DataLoader(  # all by name: with several processes Lightning makes it again with a sampler of its own
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.test)


class DigitsData(ImageData):
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; a fifth of them is the test part."""

    input_shape = (1, 8, 8)
    num_classes = 10
    mean = (0.3053,)
    std = (0.3760,)

    def read(self, train: bool) -> Dataset[Any]:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=0, stratify=labels)
        images, targets = (parts[0], parts[2]) if train else (parts[1], parts[3])
        return TensorDataset(torch.tensor(images).view(-1, *self.input_shape), torch.tensor(targets))


class DownloadedData(ImageData):
    """Images that torchvision downloads.

    Args:
        root: Folder where the images are, or are to be put.
        download: Download what is not there.
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads them in the main process.
        val_fraction: Share of the training images held out for validation, the same ones in every run.
    """

    source: type[FashionMNIST] | type[CIFAR10]

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        if self.download:
            self.source(self.root, download=True)

    def read(self, train: bool) -> Dataset[Any]:
        return self.source(self.root, train=train)


class FashionMNISTData(DownloadedData):
    """70,000 grey pictures of clothes, 28 x 28 pixels, ten classes."""

    source = FashionMNIST
    input_shape = (1, 28, 28)
    num_classes = 10
    mean = (0.2860,)
    std = (0.3530,)


class CIFAR10Data(DownloadedData):
    """60,000 colour photographs, 32 x 32 pixels, ten classes; cropped and flipped at random in training."""

    source = CIFAR10
    input_shape = (3, 32, 32)
    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def augmentation(self) -> list[v2.Transform]:
        return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]


class ImageFolderData(ImageData):
    """Colour images of your own: `root/train/<class>/*` and `root/test/<class>/*`, and `root/val/` if there is one.

    Args:
        root: The folder that holds `train/` and `test/`.
        image_size: Width and height that all images are resized to.
        augment: Crop and flip at random in training.
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads them in the main process.
        val_fraction: Share of the training images held out for validation, where there is no `val/`.
    """

    mean = std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        root: str,
        image_size: int = 32,
        augment: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction)
        self.root = Path(root)
        self.augment = augment
        self.input_shape = (3, image_size, image_size)
        self.num_classes = len(find_classes(self.root / "train")[0])

    def read(self, train: bool) -> Dataset[Any]:
        return ImageFolder(self.root / ("train" if train else "test"))

    def split(self) -> tuple[Dataset[Any], Dataset[Any]]:
        if (self.root / "val").is_dir():
            return self.read(train=True), ImageFolder(self.root / "val")
        return super().split()

    def augmentation(self) -> list[v2.Transform]:
        size = self.input_shape[-1]
        crop_and_flip = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
        return [v2.Resize((size, size)), *crop_and_flip] if self.augment else []

    def normalisation(self) -> list[v2.Transform]:
        return [v2.Resize(self.input_shape[1:]), *super().normalisation()]


# `--data` takes the name of a class: these are the short ones.
digits = type("digits", (DigitsData,), {})
fashion_mnist = type("fashion_mnist", (FashionMNISTData,), {})
cifar10 = type("cifar10", (CIFAR10Data,), {})
image_folder = type("image_folder", (ImageFolderData,), {})
imagefolder = type("imagefolder", (ImageFolderData,), {})
