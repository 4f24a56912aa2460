import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from images import write_cifar10, write_fashion_mnist, write_image_folder
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_sap import GrowAndPrune, PQIMonitor, PruningCallback, SAPCallback, SparsityInformed

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "examples" / "configs").glob("*.yaml"))
SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "image_folder": (3, 16, 16)}
MODELS = ("linear", "mlp", "cnn", "resnet18")


@pytest.fixture(scope="module")
def data(examples):
    return importlib.import_module("data")


@pytest.fixture(scope="module")
def models(examples):
    return importlib.import_module("models")


@pytest.fixture
def cli(examples, monkeypatch):
    """The program as the shell starts it; with `run=False` only what the command line describes."""
    train = importlib.import_module("train")

    def call(*args, run=False):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        return train.main(run=run)

    return call


@pytest.fixture(params=SHAPES)
def module(request, data, tmp_path, monkeypatch):
    """Each data module, by its name on the command line, on files of the real format where it reads any."""
    if request.param == "digits":
        return data.digits(batch_size=4)
    if request.param == "image_folder":
        write_image_folder(tmp_path)
        return data.image_folder(str(tmp_path), image_size=16, batch_size=4)
    if request.param == "fashion_mnist":
        write_fashion_mnist(tmp_path)
    else:
        write_cifar10(tmp_path, monkeypatch)
    return getattr(data, request.param)(str(tmp_path), batch_size=4)


def test_batches_have_the_promised_shape(module):
    promised, classes = module.input_shape, module.num_classes  # before anything is read
    module.prepare_data()
    module.setup("fit")
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == promised == SHAPES[type(module).__name__]
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.max() < classes


def test_a_tenth_is_held_out_and_always_the_same(module):
    module.setup("fit")
    train, val = module.train.images.indices, module.val.images.indices
    count = len(module.read(train=True))
    assert len(val) == round(0.1 * count)
    assert sorted(train + val) == list(range(count))
    module.setup("fit")
    assert module.val.images.indices == val


def test_training_images_alone_are_shuffled(module):
    module.setup("fit")
    samplers = [loader.sampler for loader in (module.train_dataloader(), module.val_dataloader())]
    assert [type(sampler) for sampler in samplers] == [RandomSampler, SequentialSampler]


def test_validation_images_are_not_augmented(module):
    module.setup("fit")
    assert torch.equal(module.val[0][0], module.val[0][0])


def test_cifar10_is_augmented_in_training(data, tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    module = data.CIFAR10Data(str(tmp_path))
    module.setup("fit")
    assert not torch.equal(module.train[0][0], module.train[0][0])


def test_digits_are_normalised(data):
    module = data.DigitsData()
    module.setup("fit")
    images = torch.stack([image for image, _ in module.train])
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    assert (len(module.train), len(module.val), len(module.test)) == (1293, 144, 360)


def test_an_image_folder_may_bring_its_own_validation_images(data, tmp_path):
    write_image_folder(tmp_path, parts=(("train", 5), ("val", 2), ("test", 3)))
    module = data.ImageFolderData(str(tmp_path), augment=True)
    module.setup("fit")
    assert (len(module.train), len(module.val), len(module.test)) == (10, 4, 6)
    assert module.train[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_what_is_missing_is_downloaded_unless_that_is_forbidden(data, name, tmp_path, monkeypatch):
    asked = []
    forbidden = getattr(data, name)(str(tmp_path), download=False)
    monkeypatch.setattr(forbidden.source, "download", lambda self: asked.append(self.root))
    with pytest.raises(RuntimeError, match="not found"):
        getattr(data, name)(str(tmp_path)).prepare_data()
    assert asked == [str(tmp_path)]
    forbidden.prepare_data()
    assert asked == [str(tmp_path)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_one_score_a_class(models, name, shape):
    model = getattr(models, name)(input_shape=shape, num_classes=7)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "count"),
    [("linear", 30_730), ("mlp", 428_938), ("cnn", 1_558_026), ("resnet18", 11_173_962)],
)
def test_number_of_parameters(models, name, count):
    model = getattr(models, name)(input_shape=(3, 32, 32), num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1.0, 0.8535534, 0.5, 0.1464466, 0.0]), ("step", [1.0, 1.0, 0.1, 0.01, 0.01])],
)
def test_schedule_options_build_the_schedule(models, schedule, expected):
    model = models.linear(input_shape=(1, 2, 2), num_classes=2, lr=1.0, schedule=schedule, schedule_epochs=4)
    [optimizer], [scheduler] = model.configure_optimizers()
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates == pytest.approx(expected)


def test_no_schedule_is_built_unless_asked(models):
    model = models.linear(input_shape=(1, 2, 2), num_classes=2, schedule="none")
    assert isinstance(model.configure_optimizers(), torch.optim.SGD)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "image_folder", "imagefolder"])
def test_short_names_of_data(cli, name, tmp_path):
    write_image_folder(tmp_path)
    root = [] if name == "digits" else ["--data.root", tmp_path]
    app = cli("--data", name, *root, "--model", "linear", "--trainer.logger", "false")
    assert type(app.datamodule).__name__ == name
    assert app.model.network[1].in_features == np.prod(app.datamodule.input_shape)
    assert app.model.network[1].out_features == app.datamodule.num_classes


@pytest.mark.parametrize("name", MODELS)
def test_short_names_of_models(cli, name):
    app = cli("--data=digits", f"--model={name}", "--model.lr=0.5", "--trainer.logger=false")
    assert type(app.model).__name__ == name
    assert app.model.sgd["lr"] == 0.5


def pruners(app):
    return [callback for callback in app.trainer.callbacks if isinstance(callback, PruningCallback)]


def from_config(cli, path, tmp_path, *args, run=False):
    """What a config describes, with the folder of images it asks for."""
    write_image_folder(tmp_path)
    root = ["--data.root", tmp_path] if path.stem == "image_folder_cnn" else []
    return cli(*(["fit"] if run else []), "--config", path, *root, *args, run=run)


def test_an_option_goes_to_the_last_callback_of_the_list(cli, examples):
    command = ["--config", examples / "configs" / "digits_mlp.yaml"]
    assert [
        c.patience
        for c in cli(*command, "--trainer.callbacks.patience=3").trainer.callbacks
        if isinstance(c, PQIMonitor)
    ] == [3]
    anew = [
        "--trainer.callbacks=SAPCallback",
        "--trainer.callbacks.rounds=5",
        "--trainer.callbacks+=PQIMonitor",
        "--trainer.callbacks.patience=3",
    ]
    app = cli(*command, *anew)
    assert [pruner.options.rounds for pruner in pruners(app)] == [5]
    assert [c.patience for c in app.trainer.callbacks if isinstance(c, PQIMonitor)] == [3]


@pytest.mark.parametrize("given", ["--trainer.callbacks.rounds=5", "--trainer.callbacks.0.init_args.rounds=5"])
def test_an_option_of_another_callback_of_the_list_is_answered_with_what_to_write(cli, examples, capsys, given):
    with pytest.raises(SystemExit) as end:
        cli("--config", examples / "configs" / "digits_mlp.yaml", given)
    assert end.value.code == 2
    assert "--trainer.callbacks=SAPCallback --trainer.callbacks.rounds=5" in capsys.readouterr().err


def test_another_mistake_is_not_answered_so(cli, capsys):
    with pytest.raises(SystemExit):
        cli("--data=digits", "--model=mlp", "--trainer.max_epochs=many")
    assert "is a list" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["SAPCallback", "PQIMonitor"])
def test_a_second_callback_of_a_kind_is_asked_for_a_name(cli, examples, kind):
    command = ["--config", examples / "configs" / "digits_mlp.yaml", f"--trainer.callbacks+={kind}"]
    with pytest.raises(SystemExit, match="Give the second one another:\nin YAML `name: second`"):
        cli(*command)
    app = cli(*command, "--trainer.callbacks.name=second")
    assert [c.state_key.split("/")[1] for c in app.trainer.callbacks if type(c).__name__ == kind][1:] == ["second"]


def test_it_prunes_unless_told_otherwise(cli):
    command = ["--data", "digits", "--model", "mlp", "--trainer.logger", "false"]
    assert {SAPCallback, PQIMonitor} <= {type(callback) for callback in cli(*command).trainer.callbacks}
    assert pruners(cli(*command, "--trainer.callbacks", "null")) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_run(cli, path, tmp_path):
    app = from_config(cli, path, tmp_path)
    [pruner] = pruners(app)
    [_] = [callback for callback in app.trainer.callbacks if isinstance(callback, PQIMonitor)]
    assert isinstance(app.trainer.logger, TensorBoardLogger)
    assert app.trainer.logger.name == path.stem

    options = next(c["init_args"] for c in app.config["trainer"]["callbacks"] if "every_n_epochs" in c["init_args"])
    length = options["every_n_epochs"]
    uneven = pruner.options.tolerance is not None or path.stem == "digits_grow_and_prune"  # its rounds are
    assert app.model.schedule_epochs == (app.trainer.max_epochs if uneven else length)
    assert app.trainer.max_epochs % length == 0
    assert options["rounds"] in (None, app.trainer.max_epochs // length - 1)
    assert isinstance(pruner, SAPCallback) != (path.stem in ("digits_lottery_ticket", "digits_grow_and_prune"))


def test_parts_and_what_closes_them_come_from_a_config(cli, examples, tmp_path):
    path = examples / "configs" / "digits_grow_and_prune.yaml"
    [pruner] = pruners(from_config(cli, path, tmp_path))
    assert pruner.options.policy == GrowAndPrune(0.1, partitions=2, cycles=2)
    text = (
        path.read_text()
        .replace("partitions: 2", "partitions: [['net.0.*'], ['net.*']]")
        .replace("cycles: 2", "close: {class_path: lightning_sap.SparsityInformed, init_args: {p: 1.0, q: 2.0}}")
    )
    (tmp_path / "other.yaml").write_text(text)
    [pruner] = pruners(from_config(cli, tmp_path / "other.yaml", tmp_path / "other"))
    assert pruner.options.policy == GrowAndPrune(0.1, [["net.0.*"], ["net.*"]], close=SparsityInformed(1.0, 2.0))


def test_the_papers_recipe(cli, examples, tmp_path):
    app = from_config(cli, examples / "configs" / "cifar10_resnet18_paper.yaml", tmp_path)
    assert type(app.datamodule).__name__ == "cifar10"
    assert type(app.model).__name__ == "resnet18"
    assert app.datamodule.batch_size == 250
    assert app.model.sgd == {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    assert (app.model.schedule, app.model.schedule_epochs, app.trainer.max_epochs) == ("cosine", 200, 16 * 200)
    options = app.config["trainer"]["callbacks"][0]["init_args"]
    asked = {"p": 0.5, "q": 1.0, "rounds": 15, "every_n_epochs": 200, "rewind_weights": "init"}
    assert {name: options[name] for name in asked} == asked


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")
def test_a_config_trains_and_prunes(cli, examples, tmp_path):
    path = examples / "configs" / "digits_mlp.yaml"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    app = from_config(cli, path, tmp_path, "--trainer.max_epochs=10", *quiet, run=True)
    [pruner] = pruners(app)
    weights = dict(app.model.named_parameters())
    assert pruner.remaining < 1
    assert all((weights[name][~mask] == 0).all() for name, mask in pruner.masks.items())
    assert app.trainer.callback_metrics["val_acc"] > 0.8
    assert list(Path("outputs", "digits_mlp").rglob("*.ckpt"))
