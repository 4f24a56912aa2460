"""`PQIndex`: batches, ranks and copies agree with the index of the whole vector."""

import copy
import math
import pickle
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_sap import PQIndex, pq_index

ORDERS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0)]


def pieces(scales=(1.0, 1.0, 1.0)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (40, 5), (3, 2, 2)]
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def whole(parts, p, q):
    return pq_index(torch.cat([part.flatten() for part in parts]), p, q).item()


def updated(parts, p=0.5, q=1.0):
    metric = PQIndex(p, q)
    for part in parts:
        metric.update(part)
    return metric


def exactly(value):
    return pytest.approx(value, abs=1e-12, rel=0)


@pytest.mark.parametrize(("p", "q"), ORDERS)
class TestSums:
    SCALES = pytest.mark.parametrize("scales", [(1, 1, 1), (1e300, 1, 1e-300), (0, 1e-320, 0), (0, 0, 0)])

    @SCALES
    def test_metric_of_batches_equals_the_whole(self, p, q, scales):
        parts = pieces(scales)
        value = updated(parts, p, q).compute()
        assert value.dtype == torch.float64
        assert value.item() == exactly(whole(parts, p, q))

    @SCALES
    def test_metric_of_merged_states_equals_the_whole(self, p, q, scales):
        parts = pieces(scales)
        metric = updated(parts[:1], p, q)
        metric.merge_state(updated(parts[1:], p, q))
        assert metric.compute().item() == exactly(whole(parts, p, q))

    @SCALES
    def test_metric_forward_returns_the_batch_and_keeps_the_whole(self, p, q, scales):
        parts, metric = pieces(scales), PQIndex(p, q)
        assert [metric(part).item() for part in parts] == exactly([whole([part], p, q) for part in parts])
        assert metric.compute().item() == exactly(whole(parts, p, q))


class TestLife:
    def test_metric_pickled_copied_and_cloned_goes_on_from_the_same_state(self):
        first, *rest = pieces()
        metric = updated([first])
        for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
            for part in rest:
                twin.update(part)
            assert twin.compute().item() == exactly(whole([first, *rest], 0.5, 1.0))
        assert metric.compute().item() == exactly(whole([first], 0.5, 1.0))

    def test_metric_reset_forgets(self):
        first, second, _ = pieces()
        metric = updated([first])
        metric.reset()
        metric.update(second)
        assert metric.compute().item() == exactly(whole([second], 0.5, 1.0))

    def test_metric_leaves_masked_weights_out(self):
        parts, metric = pieces(), PQIndex(0.5, 1.0)
        masks = [part > 0 for part in parts]
        for part, mask in zip(parts, masks, strict=True):
            metric.update(part, mask)
        survivors = [part[mask] for part, mask in zip(parts, masks, strict=True)]
        assert metric.compute().item() == exactly(whole(survivors, 0.5, 1.0))

    def test_an_empty_batch_changes_nothing(self):
        parts = pieces()
        assert updated([*parts, torch.zeros(0)]).compute().item() == exactly(whole(parts, 0.5, 1.0))

    @pytest.mark.parametrize("wrap", [lambda metric: metric, lambda metric: torch.nn.ModuleList([metric])])
    @pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
    def test_casting_the_module_costs_no_digits(self, wrap, cast):
        parts, metric = pieces(), PQIndex(0.5, 1.0)
        metric.update(parts[0])
        getattr(wrap(metric), cast)()
        for part in parts[1:]:
            metric.update(part)
        assert metric.compute().item() == exactly(whole(parts, 0.5, 1.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_metric_takes_weights_of_any_dtype(self, dtype):
        parts = [part.to(dtype) for part in pieces()]
        assert updated(parts).compute().item() == exactly(whole([part.double() for part in parts], 0.5, 1.0))

    @pytest.mark.parametrize(("p", "q", "named"), [(1.25, 0.75, "1.25"), (-0.5, 1.0, "-0.5")])
    def test_metric_refuses_orders_out_of_range(self, p, q, named):
        with pytest.raises(ValueError, match=named):
            PQIndex(p, q)


def test_the_sums_stay_exact_in_a_module_that_changes_its_dtype():
    module = torch.nn.Module()
    module.metric = updated([torch.linspace(-1, 1, 100_001)])
    before = module.metric.compute()
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        change(module)
        module.metric._computed = None
        assert module.metric.sums.dtype == torch.float64
        assert module.metric.compute() == before


def test_metric_plot_draws_the_value_on_a_given_axis():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = pieces()
    figure, axis = plt.subplots()
    drawn_figure, drawn_axis = updated(parts).plot(ax=axis)
    heights = [float(y) for line in axis.lines for y in line.get_ydata()]
    plt.close("all")
    assert drawn_axis is axis
    assert drawn_figure in (None, figure)
    assert heights == exactly([whole(parts, 0.5, 1.0)])


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parts = pieces((1e300, 1.0, 1e-300))
    metric = updated(parts[:1] if rank == 0 else parts[1:])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_metric_of_two_processes_equals_the_whole(tmp_path):
    context = mp.spawn(_rank, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 170  # on a busy machine the imports alone take a minute
    try:
        while not context.join(timeout=1):  # True once both ranks are done; raises what a rank raised
            assert time.monotonic() < deadline, "the ranks did not finish in time"
    finally:
        for process in context.processes:
            process.kill()
    values = [torch.load(tmp_path / f"{rank}.pt").item() for rank in range(2)]
    assert values[0] == values[1] == exactly(whole(pieces((1e300, 1.0, 1e-300)), 0.5, 1.0))


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ([1.0, 0.0, 0.5], r"must be a tensor of torch.float64 and shape \(4,\), got a tensor of .* shape \(3,\)"),
        ([-1.0, 0.0, 0.5, 0.5], r"\[0\] of a PQIndex must be a whole number of at least 0, got -1"),
        ([0.5, 0.0, 0.5, 0.5], r"\[0\] of a PQIndex must be a whole number"),
        ([math.nan, 0.0, 0.5, 0.5], r"\[0\] of a PQIndex must be a whole number"),
        ([1.0, 1e9, 0.5, 0.5], r"\[1\] of a PQIndex must be a whole number .* and at most"),
        ([1.0, 0.0, -0.5, 0.5], r"\[2\] of a PQIndex must be a number of at least 0, got -0.5"),
    ],
)
def test_state_that_no_weights_have_is_refused(sums, message):
    metric, good = PQIndex(), PQIndex()
    for each in (metric, good):
        each.persistent(True)
        each.update(torch.tensor([1.0, 2.0]))
    before = metric.compute()
    with pytest.raises(ValueError, match=rf"^sums.*{message}"):
        metric.load_state_dict({"sums": torch.tensor(sums, dtype=torch.float64)})
    assert metric.compute() == before
    metric.load_state_dict(good.state_dict())


def test_state_of_weights_that_are_not_finite_loads():
    metric, other = PQIndex(), PQIndex()
    for each in (metric, other):
        each.persistent(True)
    metric.update(torch.tensor([1.0, math.inf]))
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.sums, metric.sums)
