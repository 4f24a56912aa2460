"""The command line: ``python -m lightning_sap inspect|pack|unpack FILE``, also as ``lightning-sap``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_sap.deploy.inspection import Inspection, Orders, inspect
from lightning_sap.deploy.packing import VALUES
from lightning_sap.deploy.sparse_file import load_sparse, save_sparse, unpacked_bytes, write_dense
from lightning_sap.files import replacing
from lightning_sap.version import __version__

PACKED, DENSE = ".sparse.safetensors", ".dense.safetensors"
TAKES = "a checkpoint of Lightning, a state_dict saved by PyTorch, or a .safetensors file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 1 after a message on stderr."""
    options = _parser().parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # weights are read in blocks so small that threads wait for one another, on a busy machine
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            options.run(options)
        sys.stdout.flush()
        for warning in told:
            print(f"lightning-sap: {warning.message}", file=sys.stderr)
    except BrokenPipeError:  # who reads has seen enough, as in `| head`; Python would write what is left at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError) as error:
        print(f"lightning-sap: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-sap", description="Look into files of weights, pack and unpack them.")
    parser.add_argument("--version", action="version", version=f"lightning-sap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="inspect|pack|unpack")
    look = commands.add_parser("inspect", help="zeros, PQ and Gini index of each tensor, and what SAP would prune")
    look.add_argument("file", type=Path, help=TAKES)
    look.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for name, default in (("p", 0.5), ("q", 1.0), ("eta-r", 0.0), ("gamma", 1.0), ("beta", 0.9)):
        help = f"as of SAPCallback (default {default:g})"
        look.add_argument(f"--{name}", type=float, default=default, help=help)
    look.set_defaults(run=_inspect)
    pack = commands.add_parser("pack", help="write a small file: survivors and one bit per weight")
    pack.add_argument("file", type=Path, help=TAKES)
    pack.add_argument("out", type=Path, nargs="?", help=f"default: the file's name with {PACKED}")
    pack.add_argument("--values", choices=VALUES, default="same", help="how survivors are stored (default same)")
    pack.add_argument("--no-compress", action="store_true", help="leave zlib out: larger, and sooner done")
    pack.add_argument("--force", action="store_true", help="replace a file that is there")
    pack.set_defaults(run=_pack)
    unpack = commands.add_parser("unpack", help="write the dense weights of a packed file")
    unpack.add_argument("file", type=Path, help="a file of pack or save_sparse")
    unpack.add_argument(
        "out", type=Path, nargs="?",
        help=f"default: the file's name with {DENSE}, written one tensor at a time; any ending but .safetensors: a "
        "state_dict for torch.load, which is put together in memory",
    )  # fmt: skip
    unpack.add_argument("--force", action="store_true", help="replace a file that is there")
    unpack.set_defaults(run=_unpack)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    orders = Orders(options.p, options.q, options.eta_r, options.gamma, options.beta)
    found = inspect(options.file, orders)
    print(json.dumps(found.as_dict(), indent=2) if options.json else _table(found))


def _pack(options: argparse.Namespace) -> None:
    out = _out(options, PACKED)
    save_sparse(options.file, out, values=options.values, compress=not options.no_compress)
    dense, packed = unpacked_bytes(out), out.stat().st_size
    share = f" ({packed / dense:.3f})" if dense else ""
    print(f"{out}: {packed:,} bytes for {dense:,} bytes of weights{share}")


def _unpack(options: argparse.Namespace) -> None:
    out = _out(options, DENSE)
    if out.suffix == ".safetensors":
        write_dense(options.file, out)
    else:
        state = load_sparse(options.file)
        with replacing(out) as file:
            torch.save(state, file)
    print(f"{out}: {out.stat().st_size:,} bytes")


def _out(options: argparse.Namespace, ending: str) -> Path:
    """The file to write, which must not be there yet."""
    file: Path = options.file
    name = file.name.removesuffix(PACKED) if file.name.endswith(PACKED) else file.stem
    out: Path = options.out or file.with_name(name + ending)
    if out.exists() and not options.force:
        raise FileExistsError(f"{out} exists already; name another file, or give --force to replace it.")
    return out


def _table(found: Inspection) -> str:
    """Columns for people."""
    head = ("tensor", "shape", "dtype", "zeros", "PQ Index", "Gini", "SAP would prune")
    lines: list[tuple[str, ...]] = [head]
    for row in found.rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        numbers = [f"{x:.4f}" if x is not None else "-" for x in (row.pqi, row.gini)]
        prunes = "-" if row.would_prune is None else f"{row.would_prune:,}"
        prunes = prunes if row.tied_to is None else f"tied to {row.tied_to}"
        lines.append((row.name, shape, row.dtype, _share(row.zeros, row.weights), *numbers, prunes))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*text, "", *_summary(found)])


def _summary(found: Inspection) -> list[str]:
    told, orders = found.total, found.orders
    index = "-" if told["pqi"] is None else f"{told['pqi']:.4f}"
    counts = {scope: "-" if count is None else f"{count:,}" for scope, count in told["would_prune"].items()}
    return [
        f"{told['tensors']} tensors, {told['weights']:,} weights, {_share(told['zeros'], told['weights'])} zeros",
        f"prunable by name and shape: {told['prunable']:,} weights, "
        f"{_share(told['prunable_zeros'], told['prunable'])} zeros, PQ Index of the survivors together {index}",
        f"SAP (p={orders.p:g}, q={orders.q:g}, eta_r={orders.eta_r:g}, gamma={orders.gamma:g}, beta={orders.beta:g}) "
        f'would prune {counts["layer"]} next in scope "layer", {counts["global"]} in scope "global"',
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


if __name__ == "__main__":
    sys.exit(main())
