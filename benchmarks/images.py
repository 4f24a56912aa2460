"""The images that benchmarks train on."""

import tarfile
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits of 8 x 8 in a fixed order, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def colour_images(path: str) -> list[Tensor]:
    """Images and labels of ``train/<class>/`` and ``test/<class>/`` in a folder, or in a tar of it, as 32 x 32."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(path)
        if root.is_file():
            with tarfile.open(root) as archive:
                archive.extractall(folder, filter="data")
            root = next(inner for inner in Path(folder).iterdir() if inner.is_dir())
        transform = v2.Compose([v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])
        parts = []
        for part in ("train", "test"):
            found, labels = zip(*ImageFolder(root / part, transform), strict=True)
            parts += [torch.stack(found).sub_(0.5).div_(0.25), torch.tensor(labels)]
        return parts
