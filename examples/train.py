"""Trains and prunes a classifier: `python examples/train.py fit --data digits --model mlp --trainer.max_epochs 60`.

`--config` takes one of `examples/configs/`; `--data` one of digits, fashion_mnist, cifar10, image_folder; `--model`
one of linear, mlp, cnn, resnet18. Unless other callbacks are given, SAPCallback and PQIMonitor are used.
"""

import sys
from typing import Any

from data import ImageData
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from models import Classifier

CALLBACKS = [
    {"class_path": "lightning_sap.SAPCallback"},
    {"class_path": "lightning_sap.PQIMonitor", "init_args": {"monitor": "val_acc"}},
]
LIST = """
`trainer.callbacks` is a list: on the command line an option goes to the callback that stands last in it. Write the list
anew, each callback followed by its options, as in
  --trainer.callbacks=SAPCallback --trainer.callbacks.rounds=5
  --trainer.callbacks+=PQIMonitor --trainer.callbacks.patience=3
or set the option in the YAML file, under `init_args` of its callback."""
NAMES = """Two callbacks have the same name, under which a checkpoint keeps their state. Give the second one another:
in YAML `name: second` under its `init_args`, on the command line --trainer.callbacks.name=second right behind it; and
let each prune its own part of the model, by `include` or `exclude`."""


class CLI(LightningCLI):
    """LightningCLI that prunes by default and builds the model for the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.callbacks": CALLBACKS})
        for name in ("input_shape", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if any(f"`{name}`" in str(error) for name in ("SAPCallback", "PruningCallback", "PQIMonitor")):
                raise SystemExit(NAMES) from error
            raise


def main(args: ArgsType = None, run: bool = True) -> CLI:
    """Runs the command line, or only builds what it describes."""
    try:
        return CLI(
            Classifier,
            ImageData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )
    except SystemExit as end:
        if end.code == 2 and any(str(word).startswith("--trainer.callbacks") for word in args or sys.argv):
            print(LIST, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
