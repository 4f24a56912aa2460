"""MATRICES: what is a weight: a matrix that acts on an input; and how it lies in its tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
LAYERS = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
INPUTS = ("in_features", "in_channels", "input_size")  # by which other modules say that their weight acts on an input
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # by which a module says how many it holds

EMBEDDING = "it is an embedding"
OF_NORM = "it scales what a norm returns"
NAMELESS = "its own name does not contain 'weight'"
MAGNITUDE = "it holds the norms of weight norm"
VECTOR = "one axis alone is longer than 1: it scales, and acts on no input"
TABLE = "its first axis is 1 long: it is laid over a batch, and acts on no input"


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in its tensor: by default its outputs on axis 0, its inputs on axis 1.

    Attributes:
        stack: How many leading axes tell several matrices apart, such as experts; each ``(out, in)`` or ``(in, out)``.
        inputs_first: The inputs come before the outputs.
        groups: Of inputs that come first without a stack, in how many groups of inputs the outputs lie on axis 1.
    """

    stack: int = 0
    inputs_first: bool = False
    groups: int = 0

    @property
    def input_axis(self) -> int:
        """The axis of the inputs."""
        return self.stack + int(not self.inputs_first)


PLAIN = Layout()


def layout_of(host: nn.Module, own_name: str, parameter: nn.Parameter) -> Layout:
    """How the matrix of a module lies in one of its parameters.

    Example:
        >>> layout_of(nn.ConvTranspose1d(4, 6, 2, groups=2), "weight", nn.Parameter())
        Layout(stack=0, inputs_first=True, groups=2)
    """
    if holds_experts(host, parameter):
        return Layout(stack=1, inputs_first=_inputs_first(host, own_name))
    if _is_relational(host) and own_name in ("weight", "root"):
        return Layout(parameter.dim() - 2, True) if own_name == "weight" else Layout(inputs_first=True, groups=1)
    groups = groups_on_axis_1(host)
    return Layout(inputs_first=True, groups=groups) if groups else PLAIN


def why_no_matrix(host: nn.Module, own_name: str, parameter: nn.Parameter) -> str | None:
    """Why a parameter is no matrix that acts on an input, whatever else stands against it; None if it is one.

    A matrix is what a layer of PyTorch, or a module that names its inputs as these do (``in_features``,
    ``in_channels``), calls a weight; what another module calls a weight, if two of its axes are longer than 1; and
    experts or relations in one tensor. Embeddings, the weights of norms, scales of layers and tables of positions are
    none.

    Args:
        host: The module that uses it.
        own_name: Its name there.
        parameter: The parameter.

    Example:
        >>> import torch
        >>> tasks = nn.Module()
        >>> tasks.task_weights = nn.Parameter(torch.ones(3, 1))
        >>> why_no_matrix(tasks, "task_weights", tasks.task_weights)
        'one axis alone is longer than 1: it scales, and acts on no input'
    """
    if isinstance(host, EMBEDDINGS):
        return EMBEDDING
    if holds_experts(host, parameter) or (_is_relational(host) and own_name == "root"):
        return None
    if "weight" not in own_name:
        return NAMELESS
    if own_name.endswith("_g") and hasattr(host, own_name.removesuffix("_g") + "_v"):  # of torch.nn.utils.weight_norm
        return MAGNITUDE
    if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() < 2:
        return None
    if isinstance(host, NORMS):
        return OF_NORM
    if isinstance(host, LAYERS) or any(hasattr(host, name) for name in INPUTS) or groups_on_axis_1(host):
        return None
    if parameter.is_complex():  # which is told of all the same
        return None
    if sum(length > 1 for length in parameter.shape) < 2:
        return VECTOR
    return TABLE if parameter.dim() > 2 and parameter.shape[0] == 1 else None


def holds_experts(host: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is one matrix for each of the experts of its module.

    So are ``gate_up_proj`` and ``down_proj`` of the mixtures of experts of transformers.
    """
    if isinstance(parameter, nn.UninitializedParameter):
        return False
    return parameter.dim() == 3 and parameter.shape[0] in [getattr(host, name, None) for name in EXPERTS]


def _inputs_first(host: nn.Module, own_name: str) -> bool:
    """Whether experts are ``(in, out)``: as their module says, or where only so their sizes fit together."""
    said = getattr(host, "is_transposed", None)
    if isinstance(said, bool):
        return said
    own = dict(host.named_parameters(recurse=False))
    up, down = own.get("gate_up_proj"), own.get("down_proj")
    if up is None or down is None or own_name not in ("gate_up_proj", "down_proj"):
        return False
    (_, a, b), (_, c, d) = up.shape, down.shape
    return bool((a, b) == (d, 2 * c) and (a, b) != (2 * d, c))


def _is_relational(host: nn.Module) -> bool:
    """Whether it has a matrix for each relation, and one of the same size for the node itself, as ``RGCNConv`` has.

    A relation's matrix may be held by its diagonal blocks, ``(relations, blocks, in, out)``.
    """
    own = dict(host.named_parameters(recurse=False))  # not by getattr, at which a parametrization may count its calls
    weight, root = own.get("weight"), own.get("root")
    if weight is None or root is None or any(isinstance(each, nn.UninitializedParameter) for each in (weight, root)):
        return False
    blocks = weight.shape[1] if weight.dim() == 4 else 1
    return weight.dim() in (3, 4) and root.shape == (blocks * weight.shape[-2], blocks * weight.shape[-1])


def groups_on_axis_1(host: nn.Module) -> int:
    """In how many groups the output units of a module's weight lie on axis 1; 0: they lie on axis 0."""
    if isinstance(host, TRANSPOSED):
        return int(host.groups)
    transformers = sys.modules.get("transformers.pytorch_utils")  # a model with its layers has imported it
    return int(transformers is not None and isinstance(host, transformers.Conv1D))
