"""MaskSet: validated, applied, counted, packed."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_sap.engine.masks as masks_module
from lightning_sap.engine.masks import MaskSet

A = torch.tensor([[True, False, True], [False, False, True]])
B = torch.tensor([False, False])


def masks():
    return MaskSet({"a": A.clone(), "b": B.clone()})


class TestCounts:
    def test_mask_counts_of_two_tensors(self):
        m = masks()
        assert m.total == 8
        assert m.survivors == {"a": 3, "b": 2}
        assert m.remaining == 5 / 8
        assert not m.is_dense
        assert torch.equal(m.kept["a"], ~A)
        assert torch.equal(m.kept["b"], ~B)

    def test_mask_counts_of_nothing(self):
        empty = MaskSet({})
        assert (empty.total, empty.survivors, empty.remaining, empty.is_dense) == (0, {}, 1.0, True)

    def test_mask_counts_of_dense_weights(self):
        dense = MaskSet.dense({"w": torch.zeros(2, 3, dtype=torch.float16)})
        assert dense.is_dense
        assert dense.survivors == {"w": 6}

    def test_mask_counts_from_zeros(self):
        found = MaskSet.from_zeros({"w": torch.tensor([0.0, -0.0, 1e-45, 2.0, float("nan")])})
        assert found.pruned["w"].tolist() == [True, True, False, False, False]

    def test_mask_counts_above_what_float32_counts(self):
        count = 2**24 + 3
        assert MaskSet.dense({"w": torch.zeros(1).expand(count)}).survivors == {"w": count}

    def test_masks_handed_out_are_new(self):
        m = masks()
        m.kept["a"].fill_(False)
        assert m.survivors == {"a": 3, "b": 2}
        assert torch.equal(m.kept["a"], ~A)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
    def test_masks_that_are_not_bool_are_refused(self, dtype):
        message = f"The mask of 'w' must be a bool tensor, got {dtype}."
        with pytest.raises(TypeError, match=re.escape(message)):
            MaskSet({"ok": A, "w": torch.ones(2, dtype=dtype)})


class TestApply:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_apply_zeroes_in_place_even_where_weights_are_not_finite(self, dtype):
        weight = torch.tensor([[float("nan"), 1.0, float("inf")], [2.0, -3.0, 7.0]], dtype=dtype)
        address = weight.data_ptr()
        masks().apply_({"a": weight})
        assert weight.tolist() == [[0.0, 1.0, 0.0], [2.0, -3.0, 0.0]]
        assert weight.data_ptr() == address

    def test_apply_leaves_parameters_leaves_that_need_a_gradient(self):
        weight = torch.nn.Parameter(torch.ones(2, 3))
        masks().apply_({"a": weight})
        assert weight.requires_grad
        assert weight.is_leaf
        assert weight.grad_fn is None

    def test_apply_leaves_dense_and_unknown_parameters_alone(self):
        dense, unknown = torch.full((2,), float("nan")), torch.ones(4)
        versions = dense._version, unknown._version
        masks().apply_({"b": dense, "else": unknown})
        assert (dense._version, unknown._version) == versions

    def test_apply_zeroes_a_tensor_that_is_not_contiguous(self):
        weight = torch.ones(3, 2).t()
        masks().apply_({"a": weight})
        assert torch.equal(weight, (~A).float())

    @pytest.mark.parametrize("mask_too", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_apply_zeroes_a_channels_last_tensor(self, dtype, mask_too):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(96, 64, 5, 5, generator=generator).to(dtype).to(memory_format=torch.channels_last)
        pruned = torch.rand(weight.shape, generator=generator) > 0.5
        expected, mask = weight.masked_fill(pruned, 0.0), pruned
        if mask_too:
            mask = torch.empty_like(weight, dtype=torch.bool).copy_(pruned)
        MaskSet({"w": mask}).apply_({"w": weight})
        assert torch.equal(weight, expected)
        assert weight.is_contiguous(memory_format=torch.channels_last)

    def test_apply_zeroes_a_sparse_gradient(self):
        rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
        gradient = torch.sparse_coo_tensor([[1, 0, 1]], rows, (2, 3), check_invariants=True)
        expected = gradient.to_dense().masked_fill(A, 0.0)
        masks().apply_({"a": gradient})
        assert torch.equal(gradient.to_dense(), expected)
        assert expected.count_nonzero() == (~A).sum()


class TestMoved:
    def test_masks_move_only_with_the_tensors_named(self):
        moved = masks().moved({"b": torch.zeros(2, dtype=torch.float64), "else": torch.ones(4)})
        assert moved.pruned.keys() == masks().pruned.keys()
        assert all(torch.equal(mask, masks().pruned[name]) for name, mask in moved.pruned.items())


class TestGrownSince:
    def test_where_weights_are_kept_that_older_masks_prune(self):
        newer = MaskSet({"a": torch.tensor([[True, True, False], [False, False, True]]), "b": ~B})
        grown = dict(newer.grown_since(masks()))
        assert grown.keys() == {"a"}  # of b nothing was pruned
        assert grown["a"].int().tolist() == [[0, 0, 1], [0, 0, 0]]

    def test_what_came_back_is_set_to_zero(self):
        older, newer = (
            MaskSet({"w": torch.tensor([True, True, False])}),
            MaskSet({"w": torch.tensor([True, False, True])}),
        )
        weight = torch.tensor([1.0, 2.0, 3.0])
        MaskSet(dict(newer.grown_since(older))).apply_({"w": weight})
        assert weight.tolist() == [1.0, 0.0, 3.0]

    def test_names_of_one_side_only(self):
        older = MaskSet({"a": A, "lost": ~B})
        assert dict(MaskSet({"new": ~B, "a": A}).grown_since(older))["a"].any().item() is False
        assert list(dict(MaskSet({"new": ~B}).grown_since(older))) == []

    def test_one_mask_is_made_at_a_time(self):
        made = MaskSet({"a": ~A, "b": B}).grown_since(MaskSet({"a": A, "b": ~B}))
        assert next(made)[0] == "a"
        assert next(made)[1].tolist() == [True, True]

    def test_neither_set_is_written_to(self):
        older, newer = masks(), MaskSet({"a": ~A, "b": B})
        dict(newer.grown_since(older))
        assert torch.equal(older.pruned["a"], A)
        assert torch.equal(newer.pruned["a"], ~A)


class TestHoldsFor:
    def test_masks_hold_for_zeros_where_they_prune(self):
        assert masks().holds_for({"a": (~A).float(), "b": torch.zeros(2)})

    def test_masks_do_not_hold_for_one_pruned_weight_that_is_not_zero(self):
        weight = (~A).float()
        weight[0, 0] = 1e-30
        assert not masks().holds_for({"a": weight, "b": torch.zeros(2)})

    def test_masks_do_not_hold_for_other_names_and_shapes(self):
        assert not masks().holds_for({"a": (~A).float()})
        assert not masks().holds_for({"a": (~A).float(), "b": torch.zeros(3)})
        assert not masks().holds_for({"a": (~A).float(), "c": torch.zeros(2)})

    def test_masks_hold_for_weights_that_joined_since(self):
        assert masks().holds_for({"a": (~A).float(), "b": torch.zeros(2), "c": torch.ones(5)})


class TestExtended:
    def test_extended_masks_are_dense_for_new_names(self):
        grown = masks().extended({"b": torch.ones(2), "a": torch.ones(2, 3), "c": torch.ones(4)})
        assert torch.equal(grown.pruned["a"], A)
        assert grown.survivors == {"a": 3, "b": 2, "c": 4}

    def test_extended_masks_are_the_same_without_new_names(self):
        m = masks()
        assert m.extended({"a": torch.ones(2, 3)}) is m


class TestLike:
    def test_masks_like_weights_are_in_their_order(self):
        ordered = masks().like({"b": torch.ones(2), "a": torch.ones(2, 3)})
        assert list(ordered.pruned) == ["b", "a"]
        assert torch.equal(ordered.pruned["a"], A)

    def test_masks_unlike_weights_are_refused_with_every_difference(self):
        message = (
            "The masks do not belong to the prunable weights of this model: missing ['c'], surplus ['b'], of another "
            "shape ['a (2, 3) instead of (3, 2)']. Give the same model, `include` and `exclude` as when the masks were "
            "made."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            masks().like({"a": torch.ones(3, 2), "c": torch.ones(2)})


class TestSmallTensors:
    """Those are masked all at once."""

    VALUES = (-1.5, math.nan, -math.inf, math.inf, -0.0, 0.0, 2.5, -math.nan)

    def tensors(self, dtype=torch.float32, shape=(3, 8), number=5):
        return {str(i): torch.tensor(self.VALUES * 3, dtype=dtype).roll(i).view(shape) for i in range(number)}

    def masks(self, number=5, shape=(3, 8)):
        random = np.random.default_rng(0)
        return MaskSet({str(i): torch.from_numpy(random.random(shape) < 0.5) for i in range(number)})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_pruned_are_plus_0_and_the_others_keep_every_bit(self, dtype, transposed):
        tensors, masks = self.tensors(dtype), self.masks()
        if transposed:
            tensors = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        masks.apply_(tensors)
        for name, tensor in tensors.items():
            expected = torch.where(masks.pruned[name], torch.zeros((), dtype=bits), before[name].view(bits))
            assert torch.equal(tensor.view(bits), expected)

    def test_small_ones_take_one_call_and_large_ones_one_each(self, monkeypatch):
        calls, mul_, zero_ = [], torch._foreach_mul_, masks_module.zero_
        monkeypatch.setattr(torch, "_foreach_mul_", lambda a, b: (calls.append(len(a)), mul_(a, b)))
        monkeypatch.setattr(masks_module, "zero_", lambda *of: (calls.append("large"), zero_(*of)))
        large, small = {"large": torch.ones(40, 40)}, self.tensors()
        masks = MaskSet({**self.masks().pruned, "large": torch.ones(40, 40, dtype=torch.bool)})
        for _ in range(2):
            masks.apply_({**small, **large})
        assert calls == ["large", 5] * 2
        assert not large["large"].any()

    def test_another_dtype_and_a_sparse_gradient_are_masked_too(self):
        masks = MaskSet({"w": torch.tensor([[True, False], [False, True]])})
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
            weight = torch.ones(2, 2, dtype=dtype)
            masks.apply_({"w": weight})
            assert weight.tolist() == [[0.0, 1.0], [1.0, 0.0]]
        gradient = torch.sparse_coo_tensor([[1]], [[3.0, 4.0]], (2, 2), check_invariants=True)
        masks.apply_({"w": gradient})
        assert gradient.to_dense().tolist() == [[0.0, 0.0], [3.0, 0.0]]

    def test_copies_do_not_carry_what_is_made_anew(self):
        masks = self.masks()
        fresh = len(pickle.dumps(masks))
        masks.apply_(self.tensors())
        assert len(pickle.dumps(masks)) == fresh
        copied = copy.deepcopy(masks)
        tensors = self.tensors()
        copied.apply_(tensors)
        assert all(not tensors[name][mask].any() for name, mask in masks.pruned.items())


class TestPacking:
    @given(st.lists(st.integers(0, 9), min_size=0, max_size=4), st.integers(0, 2**32 - 1))
    def test_masks_packed_and_unpacked_are_the_same(self, shape, seed):
        mask = torch.from_numpy(np.asarray(np.random.default_rng(seed).random(shape) < 0.5))
        packed = MaskSet({"w": mask}).pack()
        assert packed["w"]["bits"].dtype == torch.uint8
        assert packed["w"]["bits"].numel() == -(-mask.numel() // 8)
        assert torch.equal(MaskSet.unpack(packed).pruned["w"], mask)

    def test_mask_that_is_not_contiguous_is_packed(self):
        packed = MaskSet({"w": A.t()}).pack()
        assert torch.equal(MaskSet.unpack(packed).pruned["w"], A.t())

    def test_packed_masks_load_with_weights_only(self, tmp_path):
        torch.save(masks().pack(), tmp_path / "masks.pt")
        again = MaskSet.unpack(torch.load(tmp_path / "masks.pt", weights_only=True))
        assert {n: m.tolist() for n, m in again.pruned.items()} == {"a": A.tolist(), "b": B.tolist()}

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"shape": [2, 5], "bits": torch.zeros(1, dtype=torch.uint8)}, "['w'].bits must be 2 bytes"),
            ({"shape": [2, 5], "bits": torch.zeros(3, dtype=torch.uint8)}, "['w'].bits must be 2 bytes"),
            ({"shape": [2, 5], "bits": torch.zeros(2)}, "['w'].bits must be 2 bytes (torch.uint8)"),
            ({"shape": [2, -5], "bits": torch.zeros(2, dtype=torch.uint8)}, "['w'].shape[1] must be a whole number"),
            ({"shape": [80], "bits": torch.zeros(1, dtype=torch.uint8).expand(10)}, "['w'].bits must be 10 bytes"),
            ({"shape": [10**400], "bits": torch.zeros(2, dtype=torch.uint8)}, "got a whole number of 1329 bits"),
            ({"bits": torch.zeros(2, dtype=torch.uint8)}, "['w'].shape is missing"),
            (None, "['w'] must be a dictionary"),
        ],
    )
    def test_what_is_no_packed_mask_is_refused(self, entry, message):
        with pytest.raises(ValueError, match=rf"^These are no packed masks: masks.*{re.escape(message)}"):
            MaskSet.unpack({"v": MaskSet({"v": A}).pack()["v"], "w": entry})
