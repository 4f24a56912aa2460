"""Trains and prunes a classifier: `python examples/train.py fit --data digits --model mlp --trainer.max_epochs 60`.

`--config` takes one of `examples/configs/`; `--data` one of digits, fashion_mnist, cifar10, image_folder; `--model`
one of linear, mlp, cnn, resnet18. Unless other callbacks are given, SAPCallback and PQIMonitor are used.
"""

from data import ImageData
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from models import Classifier

CALLBACKS = [{"class_path": "lightning_sap.SAPCallback"}, {"class_path": "lightning_sap.PQIMonitor"}]


class CLI(LightningCLI):
    """LightningCLI that prunes by default and builds the model for the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.callbacks": CALLBACKS})
        for name in ("input_shape", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")


def main(args: ArgsType = None, run: bool = True) -> CLI:
    """Runs the command line, or only builds what it describes."""
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


if __name__ == "__main__":
    main()
