"""After training: packed files, smaller networks, faster linears; plain modules, without a Trainer."""

from lightning_sap.deploy.linears import sparse_linears
from lightning_sap.deploy.quantize import quantize_survivors
from lightning_sap.deploy.shrinking import shrink
from lightning_sap.deploy.sparse_file import load_sparse, save_sparse

__all__ = ["load_sparse", "quantize_survivors", "save_sparse", "shrink", "sparse_linears"]
