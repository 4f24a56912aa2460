"""Every Python block of README.md and docs/*.md runs, the blocks of a page one after the other in one namespace.

Blocks find these names, and an empty working directory: `MyModel`, a LightningModule of two linear layers (`net.0`,
`net.2`) that logs `train_loss`, `val_loss` and `val_acc`; `model`, one of them, untrained; `train_loader` and
`val_loader`. A block under an HTML comment `<!-- not run -->` is only compiled; one under `<!-- needs optuna -->` is
run where that package is installed. `test_tutorial.py` runs the tutorial.
"""

import logging
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PruningCallback

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.is_file() and "_build" not in page.parts
]
BLOCK = re.compile(r"^(?:<!-- (not run|needs (\w+)) -->\s*\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class MyModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        scores = self.net(batch[0])
        self.log("val_loss", cross_entropy(scores, batch[1]))
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


@pytest.fixture(autouse=True)
def lines_as_before():
    """A page shows how to silence the package's lines: later tests hear them again."""
    lines = logging.getLogger("lightning_sap")
    level, handlers = lines.level, list(lines.handlers)
    yield
    lines.setLevel(level)
    for handler in set(lines.handlers) - set(handlers):
        lines.removeHandler(handler)
        handler.close()


def loader(size):
    inputs = torch.randn(size, 16)
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 32)


def blocks(page):
    """Each block compiled, line numbers as on the page, and whether it can be run here."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        mark, package, code = match.groups()
        lines_before = text.count("\n", 0, match.start(3))
        is_run = mark is None or (package is not None and find_spec(package) is not None)
        yield compile("\n" * lines_before + code, str(page), "exec"), is_run


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "tutorial.md"], ids=lambda page: page.name)
def test_snippets_run(page):
    names = {"MyModel": MyModel, "model": MyModel(), "train_loader": loader(64), "val_loader": loader(32)}
    for code, is_run in blocks(page):
        if is_run:
            exec(code, names)


def test_the_loop_over_a_file_finds_the_weights_of_a_compiled_network():
    module, pruner = MyModel(), PruningCallback(FixedFraction(0.5))
    module.net = torch.compile(module.net, backend="eager")
    trainer = Trainer(
        max_epochs=4, callbacks=[pruner], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader(64))
    trainer.save_checkpoint("compiled.ckpt")
    names = {"torch": torch, "file": torch.load("compiled.ckpt", weights_only=True)}
    assert "net._orig_mod.0.weight" in names["file"]["state_dict"]
    text = (ROOT / "docs" / "sparse_model.md").read_text(encoding="utf-8")
    (block,) = [match[3] for match in BLOCK.finditer(text) if 'packed["bits"]' in match[3]]
    exec(block, names)
    assert {name: int(mask.sum()) for name, mask in names["masks"].items()} == {"net.0.weight": 64, "net.2.weight": 16}


def test_every_fence_is_found():
    for page in PAGES:
        fences = re.findall(r"^\s*```\s*python", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == len(list(blocks(page))), page.name


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("compatibility", {"callbacks/monitor/test_stop.py", "distributed/test_stop.py", "engine/test_weights.py"}),
        ("reliability", {"callbacks/pruning/test_archive_disks.py", "distributed/test_archive.py"}),
    ],
)
def test_the_tests_named_in_a_table_exist(name, some):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.endswith("` |")]
    named = {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)}
    assert some <= named
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = page.read_text(encoding="utf-8")
    parts = [
        (page.parent / name).read_text(encoding="utf-8") for name in re.findall(r"^```{include} (\S+)$", text, re.M)
    ]
    headings = re.findall(r"^#+ (.+)$", "\n".join([text, *parts]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_the_files_of_the_repository_lead_somewhere():
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    broken, count = [], 0
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            count += 1
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert count > 200
    assert broken == []
