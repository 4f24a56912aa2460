"""Exactly which weights go, seen through `prune_masks`: never about as many, always the same ones."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sap import FixedFraction, SparsityInformed, prune_masks
from lightning_sap.functional import select
from lightning_sap.functional.pqi import power_sums
from lightning_sap.functional.select import smallest, smallest_of_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCOPES = ["global", "layer", "neuron"]
POLICIES = [
    SparsityInformed(p=0.5, q=1.0, eta_r=0.0, gamma=1.0, beta=0.9),
    SparsityInformed(p=1.0, q=2.0, eta_r=0.0, gamma=2.0, beta=0.5),
    SparsityInformed(p=0.2, q=1.0, eta_r=0.001, gamma=1.2, beta=0.9),
    SparsityInformed(p=0.5, q=8.0, eta_r=1.0, gamma=1.0, beta=0.9),
    FixedFraction(0.2),
    FixedFraction(0.77),
]


def amount(policy):
    """The oracle's count for a policy of the package."""
    if isinstance(policy, FixedFraction):
        return lambda w: oracle.fraction_count(w, policy.fraction)
    return lambda w: oracle.prune_count(w, policy.p, policy.q, policy.eta_r, policy.gamma, policy.beta)


def twin_masks(weights, masks, *, policy, scope, units=None):
    arrays = {name: w.detach().double().numpy() for name, w in weights.items()}
    masks = masks and {name: m.numpy() for name, m in masks.items()}
    return oracle.prune_masks(arrays, masks, amount=amount(policy), scope=scope, units=units)


def assert_same(masks, expected):
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        np.testing.assert_array_equal(mask.numpy(), expected[name], err_msg=name)


def adversarial(kind, n, dtype, rng):
    """`n` weights that tempt a threshold, a sum or a comparison into a mistake."""
    tiny = torch.finfo(dtype).smallest_normal
    values = {
        "gaussian": lambda: rng.standard_normal(n),
        "all equal": lambda: np.full(n, -0.1),
        "two values": lambda: rng.choice([0.1, -0.2], n),
        "mostly zero": lambda: rng.standard_normal(n) * (rng.random(n) < 0.1),
        "all zero": lambda: rng.choice([0.0, -0.0], n),
        "denormal": lambda: tiny * rng.integers(-8, 9, n) / 8,
        "alternating": lambda: np.resize([1.0, -1.0, 0.5, -0.5], n) * (1 + np.arange(n) // 4),
        "ascending": lambda: np.linspace(0.01, 1.0, n),
        "descending": lambda: -np.linspace(1.0, 0.01, n),
        "many scales": lambda: tiny ** rng.uniform(-0.5, 0.9, n) * rng.choice([-1, 1], n),
    }
    return torch.from_numpy(values[kind]()).to(dtype)


KINDS = [
    "gaussian",
    "all equal",
    "two values",
    "mostly zero",
    "all zero",
    "denormal",
    "alternating",
    "ascending",
    "descending",
    "many scales",
]
SHAPES = [(1, 1), (3, 1), (1, 40), (5, 8), (16, 9), (4, 3, 2, 2)]


class TestByHand:
    WEIGHTS = {
        "a": torch.tensor([[5.0, -1.0, 2.0, 3.0], [1.0, 1.0, -1.0, 1.0]]),
        "b": torch.tensor([[-0.5, 4.0], [6.0, 1.0]]),
    }

    @pytest.mark.parametrize(
        ("scope", "a", "b"),
        [
            ("global", [[1, 0, 1, 1], [0, 0, 0, 0]], [[0, 1], [1, 1]]),  # six of twelve: b's one comes too late
            ("layer", [[1, 0, 1, 1], [0, 0, 0, 1]], [[0, 1], [1, 0]]),
            ("neuron", [[1, 0, 0, 1], [0, 0, 1, 1]], [[0, 1], [1, 0]]),
        ],
    )
    def test_prune_masks_takes_half_of_each_group_by_hand(self, scope, a, b):
        masks = prune_masks(self.WEIGHTS, policy=FixedFraction(0.5), scope=scope)
        assert masks["a"].int().tolist() == a
        assert masks["b"].int().tolist() == b

    def test_prune_masks_keeps_pruned_weights_pruned_and_does_not_count_them(self):
        masks = {"a": torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool(), "b": torch.ones(2, 2).bool()}
        masks = prune_masks(self.WEIGHTS, masks, policy=FixedFraction(0.5), scope="layer")
        assert masks["a"].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
        assert masks["b"].int().tolist() == [[0, 1], [1, 0]]

    def test_prune_masks_takes_kept_zeros_first(self):
        weights = {"w": torch.tensor([[0.0, 1e-30, -0.0, 2.0]])}
        assert prune_masks(weights, policy=FixedFraction(0.5), scope="layer")["w"].tolist() == [
            [False, True, False, True]
        ]

    def test_prune_masks_along_units_of_a_transposed_weight(self):
        weights = {"up": torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])}
        by_column = {"up": lambda w: w.T}
        masks = prune_masks(weights, policy=FixedFraction(0.5), scope="neuron", units=by_column)
        assert masks["up"].int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]


class TestTies:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scope", ["global", "layer"])
    @pytest.mark.parametrize("fraction", [0.01, 0.37, 0.9])
    def test_ties_go_at_the_lower_position_first_to_the_exact_count(self, dtype, scope, fraction):
        generator = torch.Generator().manual_seed(0)
        weights = {n: (torch.randn(100, 200, generator=generator) * 8).round().div(8).to(dtype) for n in "ab"}
        masks = prune_masks(weights, policy=FixedFraction(fraction), scope=scope)
        for names in ["ab"] if scope == "global" else ["a", "b"]:
            magnitudes = torch.cat([weights[n].flatten() for n in names]).abs()
            gone = ~torch.cat([masks[n].flatten() for n in names])
            count = round(fraction * magnitudes.numel())
            assert gone.sum().item() == count
            threshold = magnitudes[gone].max()
            assert gone[magnitudes < threshold].all()
            tied = gone[magnitudes == threshold]
            assert tied.numel() > 500
            assert tied.tolist() == sorted(tied.tolist(), reverse=True)

    @pytest.mark.parametrize("scope", ["global", "layer"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_ties_among_more_weights_than_float32_counts(self, scope, dtype):
        d = 2**24 + 3
        weights = {"w": torch.full((1, d), 0.25, dtype=dtype)}
        weights["w"][0, -1] = 0.125
        mask = prune_masks(weights, policy=FixedFraction(0.5), scope=scope)["w"][0]
        gone = d // 2
        assert int(mask.sum(dtype=torch.int64)) == d - gone
        assert not mask[: gone - 1].any()
        assert mask[gone - 1 : -1].all()
        assert not mask[-1]

    @pytest.mark.parametrize("k", [1, 3])
    def test_ties_of_zeros_leave_k_weights_kept(self, k):
        w = torch.zeros(1, 2**24 + 3, dtype=torch.bfloat16)
        w[0, :k] = -0.3
        policy = SparsityInformed(p=0.5, q=1.0, eta_r=0.0, gamma=1.0, beta=1 - 2**-40)
        mask = prune_masks({"w": w}, policy=policy, scope="layer")["w"]
        assert mask[0, :k].all()
        assert int(mask.sum(dtype=torch.int64)) == k


class TestAgainstTheOracle:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scope", SCOPES)
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        layers=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(SHAPES)), min_size=1, max_size=3),
        density=st.sampled_from([None, 0.0, 0.1, 0.6, 1.0]),
        policy=st.sampled_from(POLICIES),
        seed=st.integers(0, 2**16),
    )
    def test_prune_masks_equals_the_oracle_bit_for_bit(self, dtype, scope, layers, density, policy, seed):
        rng = np.random.default_rng(seed)
        weights, masks = {}, None if density is None else {}
        for i, (kind, shape) in enumerate(layers):
            weights[f"w{i}"] = adversarial(kind, math.prod(shape), dtype, rng).reshape(shape)
            if density is not None:
                masks[f"w{i}"] = torch.from_numpy(rng.random(shape) < density)
        before = {n: w.clone() for n, w in weights.items()}, masks and {n: m.clone() for n, m in masks.items()}
        result = prune_masks(weights, masks, policy=policy, scope=scope)
        assert_same(result, twin_masks(*before, policy=policy, scope=scope))
        assert all(torch.equal(weights[n], w) for n, w in before[0].items())
        assert masks is None or all(torch.equal(masks[n], m) for n, m in before[1].items())

    @pytest.mark.parametrize("policy", POLICIES, ids=repr)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_prune_masks_equals_the_oracle_along_another_axis(self, dtype, policy):
        weights = {
            n: adversarial("two values", 90, dtype, np.random.default_rng(i)).reshape(6, 5, 3)
            for i, n in enumerate("ab")
        }
        twin = twin_masks(
            weights, None, policy=policy, scope="neuron", units={"b": lambda a: np.moveaxis(a, 1, 0).reshape(5, -1)}
        )
        units = {"a": lambda w: w.flatten(1), "b": lambda w: w.movedim(1, 0).flatten(1)}
        assert_same(prune_masks(weights, policy=policy, scope="neuron", units=units), twin)

    @pytest.mark.parametrize("policy", POLICIES, ids=repr)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_prune_masks_equals_the_oracle_with_mixed_dtypes(self, scope, policy):
        rng = np.random.default_rng(0)
        weights = {
            str(dtype): adversarial(kind, 60, dtype, rng).reshape(6, 10)
            for dtype, kind in zip(DTYPES, ("denormal", "two values", "gaussian", "gaussian"), strict=True)
        }
        weights |= {"tied": weights["torch.bfloat16"].double(), "zeros": torch.zeros(3, 4, dtype=torch.float16)}
        twin = twin_masks(weights, None, policy=policy, scope=scope)
        assert_same(prune_masks(weights, policy=policy, scope=scope), twin)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_prune_masks_equals_the_oracle_with_empty_parameters(self, scope):
        weights = {"a": torch.zeros(0, 3), "b": torch.tensor([[1.0, 2.0], [4.0, 3.0]]), "c": torch.zeros(3, 0)}
        twin = twin_masks(weights, None, policy=FixedFraction(0.5), scope=scope)
        assert_same(prune_masks(weights, policy=FixedFraction(0.5), scope=scope), twin)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_prune_masks_equals_the_oracle_for_three_rounds_on_strided_parameters(self, scope):
        generator = torch.Generator().manual_seed(0)
        weights = {
            "a": torch.nn.Parameter(torch.randn(30, 20, generator=generator).T),
            "b": torch.randn(8, 8, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        }
        masks = None
        for _ in range(3):
            expected = twin_masks(weights, masks, policy=POLICIES[0], scope=scope)
            masks = prune_masks(weights, masks, policy=POLICIES[0], scope=scope)
            assert_same(masks, expected)


class TestManyWeights:
    """So many that the k-th smallest is looked for by a sample, and where ties or chance mislead it, by a histogram."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("density", [None, 0.5])
    def test_smallest_are_the_first_of_a_stable_sort(self, kind, dtype, density):
        rng = np.random.default_rng(0)
        weights = [adversarial(kind, 9000 * n, dtype, rng).reshape(-1, 90) for n in (1, 3)] + [torch.zeros(0, 2)]
        dead = [None if density is None else torch.from_numpy(rng.random(w.shape) > density) for w in weights]
        magnitudes = np.concatenate([w.double().abs().flatten().numpy() for w in weights])
        if density is not None:
            magnitudes[np.concatenate([d.flatten().numpy() for d in dead])] = np.inf
        order, alive = np.argsort(magnitudes, kind="stable"), int(np.isfinite(magnitudes).sum())
        for k in (0, 1, alive // 100, alive // 3, alive - 1, alive):
            picked = np.concatenate([p.flatten().numpy() for p in smallest(weights, dead, k)])
            np.testing.assert_array_equal(np.flatnonzero(picked), np.sort(order[:k]))

    @pytest.mark.parametrize("bracket", [(1, 2), (0, 2**31 - 1), (2**30, 2**31 - 1)], ids=["below", "wide", "above"])
    def test_smallest_are_found_where_the_sample_misleads(self, bracket, monkeypatch):
        monkeypatch.setattr(select, "_bracket", lambda *_: bracket)
        weights = [torch.arange(20_000.0).flip(0)]
        assert smallest(weights, [None], 7)[0].nonzero().flatten().tolist() == list(range(19_993, 20_000))

    def test_smallest_are_found_over_several_chunks(self):
        weights = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).round(decimals=3)
        order = weights.abs().argsort(stable=True)
        for k in (1, 100_000, 299_999):
            flags = smallest([weights[:1], weights[1:]], [None, None], k)
            assert torch.equal(torch.cat(flags).nonzero().flatten(), order[:k].sort().values)

    def test_picking_more_than_are_kept_is_refused(self):
        with pytest.raises(ValueError, match="Cannot pick 3 weights where only 2 may go"):
            smallest([torch.ones(3)], [torch.tensor([True, False, False])], 3)


class TestOtherDevices:
    """What a GPU does, seen on the CPU: it picks the same, and nothing waits for it."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("density", [None, 0.5])
    def test_gpu_picks_as_the_cpu_does(self, kind, dtype, density):
        rng = np.random.default_rng(0)
        rows = adversarial(kind, 600, dtype, rng).reshape(20, 30)
        dead = None if density is None else torch.from_numpy(rng.random(rows.shape) > density)
        alive = rows.numel() if dead is None else rows.numel() - int(dead.sum())
        counts = torch.full((20,), 30) if dead is None else 30 - dead.sum(1)
        for some in (counts, counts // 2, counts * torch.from_numpy(rng.integers(0, 2, 20)), counts * 0):
            found = select._of_rows(select._keys(rows, dead, dtype), some[:, None])
            assert torch.equal(found, smallest_of_rows(rows, dead, some))
            assert torch.equal(found.sum(1), some)
        for k in (1, alive // 3, alive):
            part = select.Part(rows, dead, torch.zeros_like(rows, dtype=torch.bool))
            select._pick_by_histogram([part], k, dtype, select.ALONE)
            assert torch.equal(part.flags, smallest([rows], [dead], k)[0])

    @pytest.mark.skipif(torch.__version__ < "2.9", reason="fake CUDA tensors ask for a driver in older PyTorch")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_measuring_and_picking_never_wait_for_the_device(self, dtype, masked):
        with FakeTensorMode():  # whatever would look at a value raises
            rows = torch.randn(20, 30, device="cuda").to(dtype)
            dead = rows < 0 if masked else None
            sums = power_sums(rows, 0.5, 1.0, mask=dead, dim=1)
            assert sums.sum_p.device.type == "cuda"
            assert smallest([rows], [dead], 7, [7])[0].shape == rows.shape
            assert smallest_of_rows(rows, dead, sums.count // 2).shape == rows.shape


class TestMistakes:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_prune_masks_names_non_finite_weights(self, value, dtype, scope):
        weights = {"good.weight": torch.ones(2, 3, dtype=dtype), "bad.weight": torch.ones(3, 2, dtype=dtype)}
        weights["bad.weight"][1, 1] = value
        with pytest.raises(ValueError, match=r"bad\.weight") as error:
            prune_masks(weights, policy=FixedFraction(0.5), scope=scope)
        assert "good.weight" not in str(error.value)

    def test_prune_masks_refuses_an_unknown_scope(self):
        with pytest.raises(ValueError, match="channel") as error:
            prune_masks({"w": torch.ones(2, 2)}, policy=FixedFraction(0.5), scope="channel")
        assert all(scope in str(error.value) for scope in SCOPES)
