"""From training to a small file: size, latency and accuracy of the demo's network after each step.

``python benchmarks/small_file.py`` takes about three minutes; ``--quick`` takes a tenth of the epochs and one seed.
ONNX is measured where ``onnx``, ``onnxscript`` and ``onnxruntime`` are installed.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import digits  # the demo itself, with its options

from lightning_sap import SAPCallback, Tolerance, load_sparse, quantize_survivors, save_sparse, shrink, sparse_linears

ROWS = 256
TITLE = """Scikit-learn's digits, the demo's MLP, {epochs} epochs for each of three trainings: a dense one, and two that search with a
tolerance of one point of validation accuracy below it. Median of {seeds} seeds. Latency: {rows} rows, one thread, wall time,
best of 100 calls. Accuracy on 300 test images that no step has seen.
"""  # noqa: E501


def test_images() -> tuple[Tensor, Tensor]:
    """The part of the digits that the demo tests on."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[-300:]
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


def milliseconds(call: Callable[[Tensor], object], rows: Tensor) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(100):
            start = time.perf_counter()
            call(rows)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


def trained(name: str, seed: int, callbacks: list) -> tuple[nn.Module, float]:
    """A trained network and its accuracy in validation."""
    torch.manual_seed(seed)
    model = digits.Net()
    scores = digits.train(name, callbacks, seed, model)
    return model.net.eval(), scores["val_acc"]


def read_back(path: str) -> nn.Module:
    network = digits.Net().net
    network.load_state_dict(load_sparse(path))
    return network


def exported(network: nn.Module, rows: Tensor, path: str) -> Callable[[Tensor], Tensor]:
    """A file of torch.export, read back."""
    batch = torch.export.Dim("batch", min=2)
    torch.export.save(torch.export.export(network, (rows,), dynamic_shapes=({0: batch},)), path)
    return torch.export.load(path).module()


def as_onnx(network: nn.Module, rows: Tensor, path: str) -> Callable[[Tensor], Tensor]:
    """A file of ONNX, run by ONNX Runtime on one thread."""
    import onnxruntime

    program = torch.onnx.export(network, (rows,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def steps(seed: int) -> list[tuple[str, float, float, float]]:
    """Each step: what it is, bytes, milliseconds and accuracy."""
    images, labels = test_images()
    rows, found = torch.rand(ROWS, 64), []

    def measure(step: str, path: str, call: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode():
            correct = (call(images).argmax(1) == labels).float().mean().item()
        found.append((step, os.path.getsize(path), milliseconds(call, rows), 100 * correct))

    dense, reference = trained("dense", seed, [])
    tolerance = Tolerance("val_acc", digits.DROP, reference=reference)
    torch.save(dense.state_dict(), "dense.pt")
    measure("dense, `torch.save` of its `state_dict`", "dense.pt", dense)
    measure("dense, `torch.export`", "dense.pt2", exported(dense, rows, "dense.pt2"))
    weights, _ = trained("weights", seed, [SAPCallback(tolerance=tolerance)])
    save_sparse(weights, "weights.st")
    measure("single weights pruned, `save_sparse`", "weights.st", read_back("weights.st"))
    measure("the same, run by `sparse_linears`", "weights.st", sparse_linears(read_back("weights.st"), rows))
    save_sparse(quantize_survivors(weights), "weights8.st", values="int8")
    measure("the same, `quantize_survivors`", "weights8.st", read_back("weights8.st"))
    units, _ = trained("units", seed, [SAPCallback(structure="unit", tolerance=tolerance)])
    save_sparse(units, "units.st")
    measure("whole units pruned, `save_sparse`", "units.st", read_back("units.st"))
    small = shrink(units, rows)
    torch.save(small.state_dict(), "small.pt")
    measure("the same, `shrink`, `torch.save` of its `state_dict`", "small.pt", small)
    save_sparse(quantize_survivors(small), "small8.st", values="int8")
    eight = quantize_survivors(small)
    measure("the same, `quantize_survivors`, `save_sparse`", "small8.st", eight)
    measure("shrunk, `torch.export`", "small.pt2", exported(small, rows, "small.pt2"))
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        measure("dense, ONNX", "dense.onnx", as_onnx(dense, rows, "dense.onnx"))
        measure("shrunk, ONNX", "small.onnx", as_onnx(small, rows, "small.onnx"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    digits.EPOCHS = 12 if arguments.quick else digits.EPOCHS
    common.hush()
    with tempfile.TemporaryDirectory() as folder:
        digits.FOLDER = folder
        home = os.getcwd()
        os.chdir(folder)
        runs = [steps(seed) for seed in range(seeds)]
        os.chdir(home)
    table = []
    for of_step in zip(*runs, strict=True):
        size, latency, accuracy = (statistics.median(column) for column in list(zip(*of_step, strict=True))[1:])
        table.append((of_step[0][0], f"{size / 1000:.1f}", f"{latency:.3f}", f"{accuracy:.1f}"))
    head = ("step", "file, kB", "latency, ms", "test accuracy, %")
    text = TITLE.format(epochs=digits.EPOCHS, seeds=seeds, rows=ROWS)
    if not any("ONNX" in row[0] for row in table):
        text += "ONNX was not measured: `onnx`, `onnxscript` and `onnxruntime` are not installed there.\n"
    common.publish("small_file", f"{text}\n{common.table(head, table)}", keep=not arguments.quick)


if __name__ == "__main__":
    main()
