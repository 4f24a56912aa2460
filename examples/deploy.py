"""From training to a small file: the demo's network loses whole units, is packed, read back, made smaller, and timed.

Nothing is downloaded. Run it with ``python examples/deploy.py``; it takes about half a minute.
"""

import logging
import os
import time
import warnings
from pathlib import Path

import digits
import torch
from torch import Tensor, nn

from lightning_sap import SAPCallback, Tolerance, load_sparse, quantize_survivors, save_sparse, shrink

FOLDER = Path("outputs/deploy")


def milliseconds(network: nn.Module, rows: Tensor) -> float:
    """The best of 50 calls."""
    times = []
    with torch.inference_mode():
        for _ in range(50):
            start = time.perf_counter()
            network(rows)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


def read_back(path: Path) -> nn.Module:
    """A dense network with the weights of a packed file."""
    network = digits.Net().net
    network.load_state_dict(load_sparse(path))
    return network


def main() -> None:
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers|.*LeafSpec|.*exists and is not")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "Tip:" not in r.getMessage())
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dense, model = digits.Net(), digits.Net()
    before = digits.train("dense", [], model=dense)

    # as few neurons as can be, at most one point worse than the dense network
    tolerance = Tolerance("val_acc", digits.DROP, reference=before["val_acc"])
    sap = SAPCallback(structure="unit", tolerance=tolerance)
    after = digits.train("units", [sap], model=model)

    rows = torch.rand(256, 64)
    small = shrink(model.net.eval(), rows)  # the neurons that were pruned are taken out
    torch.save(dense.net.state_dict(), FOLDER / "dense.pt")
    save_sparse(model.net, FOLDER / "packed.safetensors")  # loads into the dense network
    torch.save(small, FOLDER / "small.pt")  # the smaller network, pickled: for your own use
    save_sparse(quantize_survivors(model.net), FOLDER / "int8.safetensors", values="int8")

    packed = read_back(FOLDER / "packed.safetensors")
    with torch.inference_mode():
        assert torch.equal(packed(rows), model.net(rows))
        assert torch.allclose(small(rows), model.net(rows), atol=1e-5)
    networks = {"dense.pt": dense.net, "packed.safetensors": packed, "small.pt": small}
    networks["int8.safetensors"] = read_back(FOLDER / "int8.safetensors")
    widths = ", ".join(str(layer.out_features) for layer in small if isinstance(layer, nn.Linear))
    print(f"\n{sap.remaining:.1%} of the weights remain; layers of {widths} units in place of 128, 256, 10")
    print(f"test accuracy  dense {before['test_acc']:.1%}   pruned {after['test_acc']:.1%}")
    for name, network in networks.items():
        size = os.path.getsize(FOLDER / name) / 1000
        print(f"{name:20} {size:6.1f} kB   256 rows in {milliseconds(network, rows):.3f} ms")


if __name__ == "__main__":
    main()
