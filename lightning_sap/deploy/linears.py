"""Linears that skip zeros on the CPU, where a measurement says that this is faster."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sap.engine.tracing import call, copy_of, evaluating

CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}  # largest difference to dense, relative to the largest output
LEAST_ZEROS = 0.5  # with fewer zeros CSR has no chance, and nothing is measured
FASTER = 1.1  # how many times faster than dense a Linear must be to run as CSR
BLOCK = 32  # rows at a time: they stay in the cache while the weights pass by
REPEATS, SECONDS = 7, 0.002  # how often a time is taken, and of how long a run

Module = TypeVar("Module", bound=nn.Module)


class SparseLinear(nn.Linear):
    """A Linear that multiplies by its weights in CSR for the row counts that it was measured with, else densely.

    Weight and bias are those of the Linear that it replaces, under the same names. Where gradients are asked for, or
    the weight has been written to, it is dense.
    """

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias
        self.rows: frozenset[int] = frozenset()
        self.training = dense.training
        self._pack()

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() // max(self.in_features, 1) in self.rows and self._is_packed(input):
            return self.multiply(input)
        return F.linear(input, self.weight, self.bias)

    def multiply(self, input: Tensor) -> Tensor:
        """The product by the weights in CSR."""
        assert self._csr is not None
        flat = input.reshape(-1, self.in_features)
        out = flat.new_empty(len(flat), self.out_features)
        own: Tensor | None = self.bias
        bias = flat.new_zeros(()) if own is None else own
        if len(flat) == 1:
            torch.add(torch.mv(self._csr, flat[0]), bias, out=out[0])
        else:
            products = flat.new_zeros(self.out_features, min(BLOCK, len(flat)))
            for rows, into in zip(torch.split(flat, BLOCK), torch.split(out, BLOCK), strict=True):
                product = products if len(rows) == products.shape[1] else flat.new_zeros(self.out_features, len(rows))
                torch.addmm(product, self._csr, rows.t(), beta=0, out=product)
                torch.add(product.t(), bias, out=into)
        return out.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={sorted(self.rows)}"

    def _pack(self) -> None:
        weight = self.weight.detach()
        self._csr = _as_csr(weight) if weight.device.type == "cpu" and weight.dtype in CLOSE else None
        self._version = self.weight._version

    def _is_packed(self, input: Tensor) -> bool:
        trains = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        known = self._csr is not None and self.weight._version == self._version
        return known and not trains and input.device.type == "cpu" and input.dtype == self.weight.dtype

    def _apply(self, *args: Any, **options: Any) -> SparseLinear:
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_csr"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


@torch.inference_mode(False)
@torch.no_grad()
def sparse_linears(module: Module, example_inputs: Any) -> Module:
    """A copy for inference on the CPU whose Linears skip zeros, each where it measures that this is faster.

    Every Linear that is at least half zeros is timed on the inputs that reach it from the example, dense and as CSR
    (compressed sparse rows). Where CSR is faster it runs as CSR for as many rows as the example has, and densely for
    any other number; where it is not, the Linear stays as it is. Give an example of the size that you will serve, and
    set the number of threads beforehand.

    Names, shapes and ``state_dict`` stay as they are. The parameters of the copy require no gradients. CSR modules
    neither compile nor export.

    Args:
        module: A module on the CPU. It is not changed.
        example_inputs: What the module takes: one tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The copy.

    Raises:
        ValueError: If a Linear is not on the CPU.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(torch.rand(2048, 2048) > 0.98)
        >>> x = torch.randn(16, 2048)
        >>> torch.allclose(sparse_linears(model, x)(x), model(x), atol=1e-6)
        True
    """
    copy = copy_of(module).requires_grad_(False)
    linears = [part for part in copy.modules() if type(part) is nn.Linear and part.weight.numel()]
    for linear in linears:
        if linear.weight.device.type != "cpu":
            raise ValueError(f"sparse_linears is for the CPU, and a Linear is on {linear.weight.device}: module.cpu().")
    with evaluating(copy):
        inputs = _inputs_of(copy, [linear for linear in linears if _may_win(linear)], example_inputs)
        sparse = {linear: _measured(linear, samples) for linear, samples in inputs.items()}
        sparse = {linear: replaced for linear, replaced in sparse.items() if replaced.rows}
        _replace(copy, dict(sparse))
        if sparse:
            dense = copy_of(module)
            with evaluating(dense):
                slower = _speedup(lambda: call(dense, example_inputs), lambda: call(copy, example_inputs)) < 1
            if slower:  # as where a module reads the weights of its Linears, and does not call them
                _replace(copy, {new: old for old, new in sparse.items()})
    return copy


def _may_win(linear: nn.Linear) -> bool:
    weight = linear.weight
    return weight.dtype in CLOSE and int(weight.count_nonzero()) <= (1 - LEAST_ZEROS) * weight.numel()


def _inputs_of(module: nn.Module, linears: list[nn.Linear], example_inputs: Any) -> dict[nn.Linear, dict[int, Tensor]]:
    """By Linear what reaches it from the example, one input for each number of rows."""
    seen: dict[nn.Linear, dict[int, Tensor]] = {linear: {} for linear in linears}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        if inputs and inputs[0].numel():
            seen[linear].setdefault(inputs[0].numel() // linear.in_features, inputs[0])

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        call(module, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _measured(dense: nn.Linear, inputs: dict[int, Tensor]) -> SparseLinear:
    """The same as CSR, for the numbers of rows where that is faster."""
    sparse = SparseLinear(dense)
    rows = {
        count
        for count, sample in inputs.items()
        if sample.dtype == dense.weight.dtype
        and _is_close(sparse.multiply(sample), dense(sample))
        and _speedup(lambda x=sample: dense(x), lambda x=sample: sparse.multiply(x)) >= FASTER  # type: ignore[misc]
    }
    sparse.rows = frozenset(rows)
    return sparse


def _is_close(found: Tensor, expected: Tensor) -> bool:
    allowed = CLOSE[expected.dtype] * max(1.0, float(expected.abs().max()))
    return bool(((found - expected).abs() <= allowed).all())


def _speedup(dense: Callable[[], Any], sparse: Callable[[], Any]) -> float:
    """How many times faster the second is: the best times of either, taken in turns, for neighbours disturb both."""
    start = time.perf_counter()
    dense(), sparse()
    calls = max(1, int(2 * SECONDS / max(time.perf_counter() - start, 1e-9)))
    times = [(_seconds(dense, calls), _seconds(sparse, calls)) for _ in range(REPEATS)]
    return min(first for first, _ in times) / min(second for _, second in times)


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def _replace(module: nn.Module, new: dict[Any, nn.Module]) -> None:
    """Put other parts in the place of parts, wherever these stand."""
    for parent in list(module.modules()):
        for name, part in list(parent._modules.items()):
            if part in new:
                setattr(parent, name, new[part])


def _as_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta|Sparse invariant checks")
        csr = weight.to_sparse_csr()
        places = csr.crow_indices().int(), csr.col_indices().int()  # MKL reads these without a copy
        return torch.sparse_csr_tensor(*places, csr.values(), csr.shape, check_invariants=False)
