"""Small images in the formats that the example app reads."""

import hashlib
import pickle
import struct

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10


def pixels(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_fashion_mnist(root):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        images = struct.pack(">4i", 0x803, count, 28, 28) + pixels(count, 28, 28).tobytes()
        labels = struct.pack(">2i", 0x801, count) + bytes(i % 10 for i in range(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def write_cifar10(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw, usedforsecurity=False).hexdigest()

    def batch(name):
        return [name, write(name, {"data": pixels(4, 3072), "labels": [0, 3, 6, 9]})]

    # torchvision compares the files with the checksums of the real ones
    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    md5 = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})


def write_image_folder(root, parts=(("train", 10), ("test", 3))):
    for part, count in parts:
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i, image in enumerate(pixels(count, 20, 24, 3)):
                Image.fromarray(image).save(folder / f"{i}.png")
