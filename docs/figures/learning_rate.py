"""Draws `learning_rate_*.svg`: the learning rate of three rounds under restart, squeeze and keep, from real fits.

`python docs/figures/learning_rate.py` in the root of the repository; needs matplotlib, takes a few seconds.
"""

import logging
import warnings
from pathlib import Path

import matplotlib.style
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import SAPCallback

EPOCHS, BATCHES = 30, 4
PANELS = {  # in the light and in the dark: Okabe and Ito's palette, and lighter ones
    "restart": (("#0072B2", "#56B4E9"), "each round starts the schedule anew; the later part of it is never reached"),
    "squeeze": (("#D55E00", "#E69F00"), "each round replays the whole of the schedule"),
    "keep": (("#009E73", "#2CC9A0"), "one schedule over all rounds"),
}


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.rates = []  # with which each step is taken

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rates(schedule):
    torch.manual_seed(0)
    model = Linear()
    Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SAPCallback(rounds=2, lr_schedule=schedule)],
    ).fit(model, DataLoader(TensorDataset(torch.randn(BATCHES * 4, 8)), 4))
    return model.rates


def draw(rates, theme):
    colors = "default" if theme == "light" else "dark_background"
    own = {"svg.hashsalt": "lightning-sap", "svg.fonttype": "path", "font.size": 10}
    if theme == "dark":  # as the other figures in the dark
        own |= {"figure.facecolor": "#161616", "axes.facecolor": "#161616", "savefig.facecolor": "#161616"}
    with matplotlib.style.context([colors, own]):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        panels = figure.subplots(len(PANELS), 1, sharex=True, sharey=True)
        ink = matplotlib.rcParams["text.color"]
        for panel, (schedule, (color, title)) in zip(panels, PANELS.items(), strict=True):
            taken = rates[schedule]
            epochs = [step / BATCHES for step in range(len(taken))]
            panel.plot(epochs, taken, color=color[theme == "dark"], linewidth=1.5, drawstyle="steps-post")
            panel.set_title(f'"{schedule}": {title}', loc="left", fontsize=10)
            panel.set(ylabel="learning rate", xlim=(0, EPOCHS), ylim=(0, 0.112))
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            for pruning in (EPOCHS / 3, EPOCHS * 2 / 3):
                panel.axvline(pruning, color=ink, linestyle="--", linewidth=1)
        for round in range(3):
            panels[0].text(EPOCHS * (round + 0.5) / 3, 0.02, f"round {round}", ha="center")
        panels[-1].set_xlabel("epochs completed (dashed: a pruning)")
        figure.savefig(Path(__file__).with_name(f"learning_rate_{theme}.svg"), metadata={"Date": None})


def main():
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    rates = {schedule: learning_rates(schedule) for schedule in PANELS}
    for theme in ("light", "dark"):
        draw(rates, theme)


if __name__ == "__main__":
    main()
