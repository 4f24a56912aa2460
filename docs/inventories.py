"""Where Python, PyTorch, Lightning and torchmetrics describe what our pages name: links need no network to build.

A class may have several names, of which annotations use any. `make links` asks whether each page is still there.
"""

import zlib
from pathlib import Path

SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "torchmetrics": "https://lightning.ai/docs/torchmetrics/stable/",
}
MODULE, PARAMETER = "torch.nn.Module", "torch.nn.parameter.Parameter"
CLASSES = {
    "python": {
        "collections.abc.Callable": "library/collections.abc.html#collections.abc.Callable",
        "collections.abc.Mapping": "library/collections.abc.html#collections.abc.Mapping",
        "collections.abc.Sequence": "library/collections.abc.html#collections.abc.Sequence",
        "pathlib.Path": "library/pathlib.html#pathlib.Path",
    },
    "torch": {
        "torch.Tensor": "tensors.html#torch.Tensor",
        "torch.dtype": "tensor_attributes.html#torch.dtype",
        "torch.device": "tensor_attributes.html#torch.device",
        MODULE: f"generated/{MODULE}.html#{MODULE}",
        "torch.nn.modules.module.Module": f"generated/{MODULE}.html#{MODULE}",
        "torch.nn.Parameter": f"generated/{PARAMETER}.html#{PARAMETER}",
        PARAMETER: f"generated/{PARAMETER}.html#{PARAMETER}",
        "torch.optim.Optimizer": "optim.html#torch.optim.Optimizer",
    },
    "lightning": {
        f"lightning.pytorch.{name}": f"api/lightning.pytorch.{page}.html#lightning.pytorch.{page}"
        for name, page in {
            "callbacks.Callback": "callbacks.Callback",
            "callbacks.callback.Callback": "callbacks.Callback",
            "core.module.LightningModule": "core.LightningModule",
            "Trainer": "trainer.trainer.Trainer",
            "trainer.trainer.Trainer": "trainer.trainer.Trainer",
        }.items()
    },
    "torchmetrics": {
        "torchmetrics.Metric": "references/metric.html#torchmetrics.Metric",
        "torchmetrics.metric.Metric": "references/metric.html#torchmetrics.Metric",
    },
}


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes an inventory for each site, in Sphinx's own format, and returns what `intersphinx_mapping` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for site, classes in CLASSES.items():
        head = f"# Sphinx inventory version 2\n# Project: {site}\n# Version: stable\n"
        head += "# The remainder of this file is compressed using zlib.\n"
        lines = "".join(f"{name} py:class 1 {place} -\n" for name, place in classes.items())
        (folder / f"{site}.inv").write_bytes(head.encode() + zlib.compress(lines.encode()))
    return {site: (address, str(folder / f"{site}.inv")) for site, address in SITES.items()}
