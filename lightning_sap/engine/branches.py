"""BRANCHES: layers whose outputs are added, and that a block merges into one when it is reparameterized."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.conv import _ConvNd

MERGING = ("reparameterize", "switch_to_deploy", "fuse", "fuse_convs", "get_equivalent_kernel_bias")


def merging_blocks(module: nn.Module, weights: Collection[str]) -> dict[str, str]:
    """The blocks of a module that add branches of these weights, and can merge them: by path the kind.

    They are known by the names that packages give to merging, and by convolutions of the same channels: MobileOne,
    RepVGG and their like. After merging a weight is zero where it is in all of the branches.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        ...
        ...     def reparameterize(self): ...
        >>> merging_blocks(nn.Sequential(Block()), ["0.wide.weight", "0.narrow.weight"])
        {'0': 'Block'}
    """
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        if not any(callable(getattr(part, name, None)) for name in MERGING):
            continue
        prefix = f"{path}." if path else ""
        inside = {name: each for name, each in part.named_modules() if isinstance(each, _ConvNd)}
        pruned = [each for name, each in inside.items() if f"{prefix}{name}.weight" in weights]
        channels = {(each.in_channels, each.out_channels, each.groups) for each in pruned}
        if len(pruned) > 1 and len(channels) == 1:
            found[path] = type(part).__name__
    return found
