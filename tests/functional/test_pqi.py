"""The measures: values worked out by hand, then the promises of invariance, range and precision."""

import math
import re

import numpy as np
import oracle
import pytest
import torch

import lightning_sap.functional
from lightning_sap import SparsityInformed, gini_index, pq_index, prune_masks
from lightning_sap.functional.pqi import index_of, merge, power_sums

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ORDERS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.4), (0.5, 8.0), (0.05, 0.1), (2.0, 3.0)]


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exactly(value, tolerance=1e-12):
    return pytest.approx(value, abs=tolerance, rel=0)


def test_the_functional_package_exports_the_measures():
    assert lightning_sap.functional.pq_index is pq_index
    assert lightning_sap.functional.gini_index is gini_index


class TestPQIndexByHand:
    @pytest.mark.parametrize(
        ("weights", "p", "q", "index"),
        [
            ((1, 4), 0.5, 1.0, 0.1),  # (1 + 2)² / (2 · 5)
            ((1, -9, 0, 0), 0.5, 1.0, 0.6),  # (1 + 3)² / (4 · 10)
            ((3, -4), 1.0, 2.0, 1 - 7 / (5 * math.sqrt(2))),
            ((1, 1, 0, 0), 1.0, 2.0, 1 - math.sqrt(1 / 2)),
            ((1, 8), 1.0, 3.0, 1 - 4.5 / (513 / 2) ** (1 / 3)),
            ((0, 0, 0, -5), 0.5, 1.0, 0.75),
            ((0, 0, 0, -5), 1.0, 2.0, 0.5),
            ((2, -2, 2), 0.5, 1.0, 0.0),
            ((7,), 0.2, 1.0, 0.0),
        ],
    )
    def test_pq_index_of_small_vectors_by_hand(self, weights, p, q, index):
        assert pq_index(vector(*weights), p, q).item() == exactly(index)

    def test_pq_index_defaults_are_one_half_and_one(self):
        assert pq_index(vector(1, 4)).item() == exactly(0.1)

    @pytest.mark.parametrize(("p", "q"), ORDERS)
    @pytest.mark.parametrize("d", [1, 2, 10, 1000])
    def test_pq_index_of_one_hot_is_the_largest_value(self, p, q, d):
        one_hot = torch.zeros(d)
        one_hot[d // 2] = -0.3
        assert pq_index(one_hot, p, q).item() == exactly(1 - d ** (1 / q - 1 / p))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("p", "q"), ORDERS)
    def test_pq_index_of_a_constant_is_zero(self, p, q, dtype):
        index = pq_index(torch.full((999,), -0.1, dtype=dtype), p, q).item()
        assert 0.0 <= index == exactly(0.0)

    @pytest.mark.parametrize(("p", "q"), ORDERS)
    def test_pq_index_of_k_equal_of_d(self, p, q):
        x = torch.zeros(50)
        x[10:20] = 3.0
        assert pq_index(x, p, q).item() == exactly(1 - (10 / 50) ** (1 / p - 1 / q))

    @pytest.mark.parametrize("measure", [pq_index, gini_index])
    @pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(5), torch.zeros(3, 0), -torch.zeros(2, 2)])
    def test_pq_index_of_nothing_is_zero(self, measure, x):
        assert measure(x).item() == 0.0


class TestPQIndexPromises:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("p", "q"), ORDERS)
    def test_every_dtype_is_raised_first(self, p, q, dtype):
        x = gaussian(40, 25, dtype=dtype)
        index = pq_index(x, p, q)
        assert index.dtype == torch.float64
        assert index.shape == ()
        assert index.item() == exactly(oracle.pq_index(x.double().numpy(), p, q))

    @pytest.mark.parametrize(("p", "q"), ORDERS)
    def test_scale_and_repetition_change_nothing(self, p, q):
        x = gaussian(333)
        index = pq_index(x, p, q).item()
        assert pq_index(x * -1e-3, p, q).item() == exactly(index)
        assert pq_index(x.repeat(7, 2), p, q).item() == exactly(index)
        assert pq_index(x.flip(0), p, q).item() == exactly(index)

    @pytest.mark.parametrize("value", [math.ldexp(1 - 2**-53, 1024), 2.0**1023, 1e300, 2.3e-308, 1e-310, 5e-324])
    @pytest.mark.parametrize(("p", "q"), [(0.1, 900.0), (0.3, 1.0), (0.5, 900.0), (1.0, 900.0), (899.0, 1000.0)])
    def test_a_constant_of_any_size_has_index_0_and_loses_nothing(self, value, p, q):
        constant = torch.full((1000,), value, dtype=torch.float64)
        assert pq_index(constant, p, q) == 0
        masks = prune_masks({"w": constant}, policy=SparsityInformed(p, q))
        assert masks["w"].all()

    @pytest.mark.parametrize(("p", "q"), [(0.1, 900.0), (0.5, 1.0), (1.0, 900.0)])
    @pytest.mark.parametrize("largest", [math.ldexp(1 - 2**-53, 1024), 5e-320])
    def test_index_at_the_ends_of_float64_equals_the_oracle(self, largest, p, q):
        x = torch.arange(1, 41, dtype=torch.float64) / 40 * largest
        assert float(pq_index(x, p, q)) == exactly(oracle.pq_index(x.numpy(), p, q))

    @pytest.mark.parametrize(("p", "q"), ORDERS)
    @pytest.mark.parametrize(
        ("scale", "dtype"),
        [
            (1e-23, torch.float32),
            (1e20, torch.float32),
            (1e37, torch.float32),
            (1e-44, torch.float32),
            (1e300, torch.float64),
            (1e-300, torch.float64),
            (1e-322, torch.float64),
            (1e4, torch.float16),
            (3e-7, torch.float16),
            (1e38, torch.bfloat16),
            (1e-39, torch.bfloat16),
        ],
    )
    def test_powers_neither_overflow_nor_underflow(self, p, q, scale, dtype):
        x = (gaussian(500).clamp(-3, 3) * scale).to(dtype)
        assert x.any()
        assert pq_index(x, p, q).item() == exactly(oracle.pq_index(x.double().numpy(), p, q))

    @pytest.mark.parametrize(("p", "q"), ORDERS)
    def test_huge_and_tiny_in_one_vector(self, p, q):
        x = torch.cat([gaussian(20) * 1e300, gaussian(20) * 1e-300, vector(5e-324, 1.0)])
        assert pq_index(x, p, q).item() == exactly(oracle.pq_index(x.numpy(), p, q))

    def test_long_vectors(self):
        x = gaussian(3 * 2**20 + 5)
        assert pq_index(x).item() == exactly(oracle.pq_index(x.numpy(), 0.5, 1.0))

    def test_strided_views_and_parameters(self):
        x = gaussian(30, 40)
        expected = oracle.pq_index(x[::3, 1::2].numpy(), 0.5, 1.0)
        assert pq_index(x[::3, 1::2]).item() == exactly(expected)
        assert pq_index(x.t()[1::2, ::3]).item() == exactly(expected)
        assert pq_index(torch.nn.Parameter(x[::3, 1::2])).item() == exactly(expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [None, 1])
    def test_cuda_agrees_with_the_cpu(self, dtype, dim):
        x = gaussian(64, 1000, dtype=dtype)
        on_gpu = pq_index(x.cuda(), dim=dim)
        assert on_gpu.dtype == torch.float64
        torch.testing.assert_close(on_gpu.cpu(), pq_index(x, dim=dim), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("measure", "twin"), [(pq_index, lambda w: oracle.pq_index(w, 0.5, 1.0)), (gini_index, oracle.gini_index)]
)
class TestMaskAndDim:
    def test_a_masked_weight_is_absent(self, measure, twin):
        x, mask = gaussian(20, 30), gaussian(20, 30, seed=1) > 0
        x[~mask] = 1e30
        assert measure(x, mask=mask).item() == exactly(twin(x[mask].numpy()))
        assert measure(x, mask=torch.zeros_like(mask)).item() == 0.0

    def test_a_masked_weight_may_be_nan(self, measure, twin):
        x = vector(1, 4, math.nan, math.inf)
        assert measure(x, mask=torch.tensor([True, True, False, False])).item() == exactly(twin([1, 4]))

    def test_surviving_zeros_count(self, measure, twin):
        mask = torch.tensor([True, True, True, False])
        assert measure(vector(1, 4, 0, 0), mask=mask).item() == exactly(twin([1, 4, 0]))

    @pytest.mark.parametrize("dim", [1, -1])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_value_per_row(self, measure, twin, dim, dtype):
        x, mask = gaussian(6, 50, dtype=dtype), gaussian(6, 50, seed=1) > 0
        x[1], mask[2], mask[3], x[5] = 0, False, True, 0.1
        values = measure(x, mask=mask, dim=dim)
        assert values.dtype == torch.float64
        expected = [twin(row[keep].double().numpy()) for row, keep in zip(x, mask, strict=True)]
        assert values.tolist() == exactly(expected)
        assert values[[1, 2]].tolist() == [0.0, 0.0]

    def test_one_value_per_column(self, measure, twin):
        x = gaussian(50, 6)
        assert measure(x, dim=0).tolist() == exactly([twin(column.numpy()) for column in x.t()])

    def test_rows_keep_their_own_scale(self, measure, twin):
        rows = gaussian(5, 40) * vector(1e300, 1e-300, 1, 1e-320, 1e150)[:, None]
        assert measure(rows, dim=1).tolist() == exactly([twin(row.numpy()) for row in rows])

    def test_several_dims(self, measure, twin):
        x = gaussian(4, 3, 5, 2)
        assert measure(x, dim=(1, 2, 3)).tolist() == exactly([twin(unit.numpy()) for unit in x])
        assert measure(x, dim=(0, -1)).flatten().tolist() == exactly(
            [twin(x[:, i, j].numpy()) for i in range(3) for j in range(5)]
        )

    def test_the_input_is_left_alone(self, measure, twin):
        x, mask = gaussian(10, 10), gaussian(10, 10, seed=1) > 0
        before = x.clone(), mask.clone()
        measure(x, mask=mask)
        measure(x, mask=mask, dim=1)
        assert torch.equal(x, before[0])
        assert torch.equal(mask, before[1])


class TestGiniByHand:
    @pytest.mark.parametrize(
        ("weights", "index"),
        [
            ((1, 2, 3, 4), 0.25),
            ((-4, 2, -1, 3), 0.25),
            ((0, 0, 0, 9), 0.75),
            ((1, 3), 0.25),
            ((5, -5, 5), 0.0),
            ((2,), 0.0),
        ],
    )
    def test_gini_index_of_small_vectors_by_hand(self, weights, index):
        assert gini_index(vector(*weights)).item() == exactly(index)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gini_index_of_every_dtype(self, dtype):
        x = gaussian(777, dtype=dtype)
        assert gini_index(x).dtype == torch.float64
        assert gini_index(x).item() == exactly(oracle.gini_index(x.double().numpy()))

    @pytest.mark.parametrize(
        ("scale", "dtype"),
        [(1e308, torch.float64), (1e-320, torch.float64), (6e4, torch.float16), (1e38, torch.float32)],
    )
    def test_gini_index_at_any_finite_scale(self, scale, dtype):
        x = (torch.linspace(0.1, 1, 1000, dtype=torch.float64) * scale).to(dtype)
        assert gini_index(x).item() == exactly(oracle.gini_index(x.double().numpy()))


class TestMistakes:
    @pytest.mark.parametrize(
        ("p", "q", "named"),
        [
            (1.0, 1.0, "1.0"),
            (1.25, 0.75, "1.25"),
            (0.0, 1.0, "0"),
            (-0.5, 1.0, "-0.5"),
            (0.5, -2.0, "-2.0"),
            (math.nan, 1.0, "nan"),
            (0.5, math.nan, "nan"),
            (0.5, math.inf, "inf"),
            (1.0, 1001.0, "1001"),
        ],
    )
    def test_pq_index_refuses_orders_out_of_range(self, p, q, named):
        with pytest.raises(ValueError, match=re.escape(named)):
            pq_index(torch.ones(3), p, q)

    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
    def test_largest_order_is_nearly_the_maximum(self, scale):
        index = pq_index(scale * torch.tensor([2.0, 1.0, 0.1]), 1.0, 1000.0).item()
        assert index == pytest.approx(1 - 3 ** (1 / 1000 - 1) * 3.1 / 2, rel=1e-6)

    @pytest.mark.parametrize("measure", [pq_index, gini_index])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
    def test_pq_index_refuses_weights_that_are_not_floating(self, measure, dtype):
        with pytest.raises((TypeError, ValueError), match=str(dtype).removeprefix("torch.")):
            measure(torch.ones(3, dtype=dtype))

    @pytest.mark.parametrize("measure", [pq_index, gini_index])
    @pytest.mark.parametrize("x", [[1.0, 2.0], (1.0, 2.0), 1.0, np.ones(2), None])
    def test_pq_index_refuses_what_is_no_tensor(self, measure, x):
        with pytest.raises(
            TypeError, match=rf"^x must be a torch\.Tensor of one of .* got {type(x).__name__}; convert"
        ):
            measure(x)

    @pytest.mark.parametrize("measure", [pq_index, gini_index])
    def test_pq_index_refuses_a_mask_that_is_no_tensor(self, measure):
        with pytest.raises(TypeError, match=r"^The mask of x must be a bool torch\.Tensor or None, got list\.$"):
            measure(torch.ones(2), mask=[True, False])

    @pytest.mark.parametrize("measure", [pq_index, gini_index])
    def test_complex_numbers_are_called_complex(self, measure):
        with pytest.raises(TypeError, match=r"^x is complex \(torch\.complex128\), but must be of one of the dtypes"):
            measure(torch.ones(3, dtype=torch.complex128))

    @pytest.mark.parametrize("measure", [pq_index, gini_index])
    def test_pq_index_refuses_a_mask_of_another_shape(self, measure):
        with pytest.raises(ValueError, match="mask"):
            measure(torch.ones(3, 4), mask=torch.ones(4, 3, dtype=torch.bool))


class TestPowerSums:
    """Sums add over the pieces of a vector, whatever the scale of each piece."""

    @pytest.mark.parametrize("scales", [(1, 1, 1), (1e300, 1, 1e-300), (1e-320, 0, 1), (0, 0, 0)])
    @pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.5, 8.0)])
    def test_pieces_give_the_index_of_the_whole(self, scales, p, q):
        pieces = [gaussian(n, seed=n) * scale for n, scale in zip((10, 1000, 1), scales, strict=True)]
        merged = merge([power_sums(piece, p, q) for piece in pieces], p, q)
        assert merged.count.item() == 1011
        assert merged.count.dtype == merged.exponent.dtype == torch.int64
        assert merged.sum_p.dtype == merged.sum_q.dtype == torch.float64
        assert index_of(merged, p, q).item() == exactly(oracle.pq_index(torch.cat(pieces).numpy(), p, q))

    def test_the_sums_are_those_of_the_weights_over_a_power_of_two(self):
        sums = power_sums(vector(1, 4, 0), 0.5, 1.0)
        unit = 2.0 ** sums.exponent.item()
        assert sums.count.item() == 3
        assert sums.sum_p.item() * unit**0.5 == exactly(3.0)
        assert sums.sum_q.item() * unit == exactly(5.0)
