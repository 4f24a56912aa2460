"""Networks whose units are coupled in different ways, and how two of them are compared."""

import pytest
import torch
from torch import nn


def assert_equal(found, net, inputs, tolerance=1e-5):
    with torch.no_grad():
        expected = net(inputs)
        assert float((found(inputs) - expected).abs().max()) <= tolerance * max(1, float(expected.abs().max()))


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def mlp(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 12), activation(), nn.Linear(12, 3)).eval()


def lively(net):
    """Norms as after a training, and no parameter that happens to be zero."""
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
    return net.eval()


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.c, self.head = nn.BatchNorm2d(14), nn.Conv2d(14, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x):
        both = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.head(self.c(both).relu().flatten(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def vgg11():
    net = pytest.importorskip("torchvision.models").vgg11(num_classes=10)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Sequential(nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))
    return net


NETWORKS = {
    "mlp": (mlp, (2, 8)),
    "concatenation": (Concatenation, (2, 3, 8, 8)),
    "encoder": (Encoder, (2, 5, 32)),
    "resnet18": ("resnet18", (1, 3, 64, 64)),
    "mobilenet_v3_small": ("mobilenet_v3_small", (1, 3, 64, 64)),
    "vgg11": (vgg11, (1, 3, 32, 32)),
}


def build(name):
    """A network, its norms as after a training, and inputs for it."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    if isinstance(make, str):
        make = getattr(pytest.importorskip("torchvision.models"), make)
    return lively(make()), torch.randn(shape)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(x + self.second(x))
