"""What PQIMonitor writes through TensorBoard and CSV loggers."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BATCHES, PRUNABLE, Net, Watch, fit, half, loader
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitoring import Expecting, close

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback

STEPS_PER_LOG = {"log_every_n_steps": 1}
SHOWN = [BATCHES * e for e in (1, 2, 3, 4, 4)]  # at each round's end, and when all is over

ARTIFACTS = {"rounds": "png", "layers": "png", "report": "md"}


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    found = accumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


class TestTensorBoard:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("tensorboard")
        logger = TensorBoardLogger(folder, name="", version="")
        monitor, look = PQIMonitor(stop_on=None, log_layers=True, monitor="val_loss"), Expecting(pruner := half())
        look.folder = folder
        trainer = fit(Net(), monitor, pruner, look, val=loader(), logger=logger, **STEPS_PER_LOG)
        look.loss = float(trainer.callback_metrics["val_loss"])
        return events(folder), look

    def test_tensorboard_holds_one_value_of_every_epoch(self, found):
        file, look = found
        for key in look.expected[0]:
            if key != "gini/global":
                scalars = file.Scalars(key)
                assert [s.step for s in scalars] == [BATCHES * e - 1 for e in (1, 2, 3, 4)]
                assert [s.value for s in scalars] == close([values[key] for values in look.expected])
        assert [s.value for s in file.Scalars("sap/remaining")] == [1.0, 0.5, 0.25, 0.125]
        assert [s.value for s in file.Scalars("sap/pruned")] == [0, 36, 18, 9]
        assert len(file.Scalars("pqi/global_pruned")) == 4

    def test_tensorboard_layout_names_curves_that_exist(self, found):
        from tensorboard.plugins.custom_scalar import layout_pb2

        file, _ = found
        layout = layout_pb2.Layout()
        (tensor,) = file.Tensors("custom_scalars__config__")
        layout.ParseFromString(tensor.tensor_proto.string_val[0])
        charts = {c.title: list(c.multiline.tag) for category in layout.category for c in category.chart}
        names = [re.escape(name) for name in PRUNABLE]
        assert {category.title for category in layout.category} == {"lightning-sap"}
        assert charts == {
            "PQ Index": ["pqi/global$", "pqi/layer_mean$", "pqi/global_pruned$"],
            "Remaining weights": ["sap/remaining$"],
            "Learning rate": ["sap/lr$"],
            "val_loss": ["^val_loss$"],
            "PQ Index of the layers": [f"pqi/{name}$" for name in names],
            "Remaining weights of the layers": [f"remaining/{name}$" for name in names],
        }
        tags = file.Tags()["scalars"]
        for pattern in (pattern for chart in charts.values() for pattern in chart):
            assert len([tag for tag in tags if re.match(pattern, tag)]) == 1

    def test_tensorboard_images_hold_the_figure(self, found):
        pytest.importorskip("matplotlib")
        file, _ = found
        for kind in ("rounds", "layers"):
            images = file.Images(f"pqi/{kind}")
            assert [image.step for image in images] == SHOWN
            assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
            assert min(images[-1].width, images[-1].height) > 300

    def test_tensorboard_texts_hold_the_rounds_so_far_at_every_rounds_end(self, found):
        file, _ = found
        texts = file.Tensors("pqi/report/text_summary")
        assert [text.step for text in texts] == SHOWN
        tables = [text.tensor_proto.string_val[0].decode() for text in texts]
        assert [table.count("%") - 1 for table in tables] == [1, 2, 3, 4, 4]

    def test_tensorboard_compares_runs_by_options_and_what_came_of_them(self, found):
        _, look = found
        file = events(look.folder / "pqi")
        plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
        content = file.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        options = plugin.FromString(content).session_start_info.hparams
        assert {key: value.string_value or value.number_value for key, value in options.items()} == {
            "policy": "FixedFraction(fraction=0.5)",
            "policy.fraction": 0.5,
            "scope": "layer",
            "every_n_epochs": 1,
        }
        assert [s.value for s in file.Scalars("final/remaining")] == [0.125]
        assert [s.value for s in file.Scalars("final/val_loss")] == close([look.loss])

    def test_tensorboard_collects_the_columns_of_all_runs(self, found):
        _, look = found
        file = events(look.folder / "pqi")
        assert file.SummaryMetadata("_hparams_/session_end_info")
        with pytest.raises(KeyError):  # the columns of one run, which TensorBoard would take for all
            file.SummaryMetadata("_hparams_/experiment")

    def test_tensorboard_images_hold_no_figure_without_matplotlib(self, tmp_path, monkeypatch):
        import lightning_sap.callbacks.monitor.messages as room

        monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
        fit(
            Net(),
            PQIMonitor(stop_on=None),
            half(),
            logger=TensorBoardLogger(tmp_path, name="", version=""),
            **STEPS_PER_LOG,
        )
        assert events(tmp_path).Tags()["images"] == []


class TestManyRounds:
    def test_figures_of_each_tenth_round_are_drawn_from_the_fiftieth_on(self, tmp_path, monkeypatch):
        figure, drawn = pytest.importorskip("matplotlib.figure").Figure((1, 1)), []

        def plot(monitor, kind):
            drawn.append(monitor.rows()[-1]["round"])
            return figure

        monkeypatch.setattr(PQIMonitor, "plot", plot)
        sap, monitor = PruningCallback(FixedFraction(0.01), every_n_epochs=1), PQIMonitor(stop_on=None, verbose=False)
        fit(Net(), sap, monitor, logger=TensorBoardLogger(tmp_path), max_epochs=74, limit_train_batches=1)
        assert sorted(set(drawn[:-4])) == [*range(50), 50, 60, 70]
        assert drawn[-4:] == [73] * 4  # when all is over: for the logger, and for the folder


class TestOtherLoggers:
    def test_csv_logger_holds_the_values_of_every_epoch(self, tmp_path):
        look = Expecting(pruner := half())
        logger = CSVLogger(tmp_path, name="", version="")
        fit(Net(), pruner, PQIMonitor(stop_on=None, log_layers=True), look, logger=logger, **STEPS_PER_LOG)
        with open(tmp_path / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["pqi/global"]]
        for row, expected in zip(rows, look.expected, strict=True):
            for key in ("pqi/global", "pqi/layer_mean", "pqi/net.0.weight", "remaining/net.3.weight"):
                assert float(row[key]) == close(expected[key])
        assert [float(row["sap/remaining"]) for row in rows] == [1.0, 0.5, 0.25, 0.125]

    def test_two_loggers_at_once_both_hold_the_index(self, tmp_path):
        loggers = [TensorBoardLogger(tmp_path, name="a", version=""), CSVLogger(tmp_path, name="b", version="")]
        fit(Net(), half(), PQIMonitor(stop_on=None), logger=loggers, **STEPS_PER_LOG)
        assert len(events(tmp_path / "a").Scalars("pqi/global")) == 4
        assert "pqi/global" in (tmp_path / "b" / "metrics.csv").read_text()


IN_A_PROCESS = """
import sys
from helpers import Net, fit, half, loader
from lightning.pytorch import loggers
from lightning_sap import PQIMonitor

kind, folder = sys.argv[1:]
logger = {
    "wandb": lambda: loggers.WandbLogger(save_dir=folder, offline=True, project="pruning"),
    "mlflow": lambda: loggers.MLFlowLogger(tracking_uri=f"file:{folder}", run_name="pruned"),
    "comet_ml": lambda: loggers.CometLogger(online=False, offline_directory=folder, api_key="none", project="pruning"),
}[kind]()
fit(Net(), half(), PQIMonitor(stop_on=None, monitor="val_loss"), val=loader(), logger=logger, log_every_n_steps=1)
logger.experiment.finish() if kind == "wandb" else logger.experiment.end() if kind == "comet_ml" else None
"""


class TestOtherServices:
    """With the real packages, where they are installed; without a network, in a process that they may change."""

    @staticmethod
    def fit(kind, folder):
        pytest.importorskip(kind)
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        quiet = {"WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true", "PYTHONPATH": os.pathsep.join(paths)}
        command, merged = [sys.executable, "-c", IN_A_PROCESS, kind, folder], subprocess.STDOUT
        done = subprocess.run(command, env={**os.environ, **quiet}, check=True, stdout=subprocess.PIPE, stderr=merged)
        return done.stdout.decode()

    def test_wandb_holds_figures_and_rounds(self, tmp_path):
        self.fit("wandb", tmp_path)
        (files,) = tmp_path.glob("wandb/offline-run-*/files/media")
        assert len(list(files.glob("images/pqi/rounds_*.png"))) == len(list(files.glob("images/pqi/layers_*.png"))) == 5
        tables = [json.loads(path.read_text()) for path in files.glob("table/pqi/report_*.json")]
        assert sorted(len(table["data"]) for table in tables) == [1, 2, 3, 4, 4]
        assert tables[0]["columns"][:4] == ["round", "epochs", "weights", "remaining"]

    def test_mlflow_holds_figures_report_and_options(self, tmp_path):
        self.fit("mlflow", tmp_path)
        (policy,) = tmp_path.glob("*/*/params/sap/policy")
        assert policy.read_text() == "FixedFraction(fraction=0.5)"
        (remaining,) = tmp_path.glob("*/*/metrics/sap/remaining")
        assert [line.split()[1] for line in remaining.read_text().splitlines()] == ["1.0", "0.5", "0.25", "0.125"]
        left = {path.name for path in tmp_path.glob("*/*/artifacts/pqi/*")}
        assert left == {f"{name}-step-{step}.{end}" for step in SHOWN for name, end in ARTIFACTS.items()}

    def test_comet_takes_figures_report_and_options(self, tmp_path):
        said = self.fit("comet_ml", tmp_path)
        assert "The module holds round 3" in said
        assert "cannot be written" not in said


class TestFailingWriters:
    def test_figures_and_report_that_cannot_be_written_end_no_training(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError("No space left on device")

        for name in ("add_figure", "add_text", "add_custom_scalars"):
            monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{name}", full)
        monitor, pruner = PQIMonitor(stop_on=None, verbose=False), half()
        with pytest.warns(UserWarning, match="cannot be written to TensorBoard: No space left on device") as warned:
            trainer = fit(Net(), monitor, pruner, val=loader(), logger=TensorBoardLogger(tmp_path))
        assert trainer.current_epoch == 4
        told = [str(w.message).partition(" cannot")[0] for w in warned if "TensorBoard" in str(w.message)]
        shown = ["pqi: the figure of the rounds", "pqi: the figure of the layers", "pqi: the report"]
        assert told == ["pqi: the charts", *5 * shown]
        assert "The module holds round 3" in monitor.report()

    def test_report_that_cannot_be_printed_is_kept(self, monkeypatch):
        def closed(*_, **__):
            raise BrokenPipeError("closed")

        monkeypatch.setattr("lightning_sap.callbacks.monitor.messages.show", closed)
        monitor = PQIMonitor(stop_on=None)
        with pytest.warns(
            UserWarning, match=r"pqi: the report cannot be printed: closed\. monitor\.report\(\) has it\."
        ):
            fit(Net(), monitor, half())
        assert "The module holds round 3" in monitor.report()


class TestFolder:
    @pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
    def test_report_rounds_and_figures_are_left_whatever_the_logger_is(self, tmp_path, kind):
        monitor, pruner, logger = PQIMonitor(stop_on=None), half(), kind(tmp_path)
        fit(Net(), monitor, pruner, logger=logger, **STEPS_PER_LOG)
        folder = Path(logger.log_dir)
        assert (folder / "pqi-report.md").read_text(encoding="utf-8") == monitor.report()
        rows = list(csv.DictReader((folder / "pqi-rounds.csv").read_text(encoding="utf-8").splitlines()))
        assert [float(row["remaining"]) for row in rows] == [1.0, 0.5, 0.25, 0.125]
        for figure in ("pqi-rounds.png", "pqi-layers.png"):
            assert (folder / figure).read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True, "max_epochs": None}])
    def test_nothing_is_left_where_nothing_is_logged(self, tmp_path, options):
        fit(Net(), PQIMonitor(stop_on=None), half(), **{"default_root_dir": tmp_path, **options})
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith("pqi")]

    def test_a_folder_that_cannot_be_written_is_a_warning(self, tmp_path):
        in_the_way = Watch(on_train_end=lambda trainer, _: (Path(trainer.log_dir) / "pqi-report.md").mkdir())
        with pytest.warns(UserWarning, match=r"pqi-report\.md' cannot be written"):
            trainer = fit(Net(), PQIMonitor(stop_on=None), half(), in_the_way, logger=CSVLogger(tmp_path))
        assert trainer.current_epoch == 4
        assert (Path(trainer.log_dir) / "pqi-rounds.csv").exists()
