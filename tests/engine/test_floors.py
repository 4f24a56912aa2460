"""Sets of weights of which some always stay, in every scope, and whatever is asked for."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from lightning_sap import FixedFraction
from lightning_sap.engine.decision import Limits, decide
from lightning_sap.engine.floors import Floor, fewest, largest_of_rows
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.patterns import Pattern, decide_pattern
from lightning_sap.engine.weights import prunable_weights

SCOPES = ["neuron", "layer", "global"]
WEIGHT = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, -6.0], [7.0, -8.0, 9.0]])


def step(tensors, scope="layer", fraction=0.5, limits=None):
    return decide(tensors, policy=FixedFraction(fraction), scope=scope, round=1, limits=limits)


def kept(found, name="w"):
    return found.masks.kept[name].int().tolist()


class TestLargest:
    def test_of_equals_the_last_are_kept(self):
        rows = torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [3.0, 2.0, -3.0]])
        assert largest_of_rows(rows, None, 1).int().tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]
        assert largest_of_rows(rows, None, 2).int().tolist() == [[0, 1, 1], [0, 1, 1], [1, 0, 1]]

    def test_what_is_excluded_is_never_kept(self):
        excluded = torch.tensor([[False, True, True], [True, True, True]])
        assert largest_of_rows(torch.ones(2, 3), excluded, 2).int().tolist() == [[1, 0, 0], [0, 0, 0]]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("count", [1, 2, 5, 9])
    def test_it_is_what_a_stable_sort_leaves(self, dtype, count):
        rows = torch.randint(-3, 4, (300, 7)).to(dtype)
        excluded = torch.rand(rows.shape) < 0.3
        found = largest_of_rows(rows, excluded, count)
        for row, barred, flags in zip(rows.abs().double(), excluded, found, strict=True):
            order = [i for i in np.argsort(row.numpy(), kind="stable") if not barred[i]]
            assert sorted(flags.nonzero().flatten().tolist()) == sorted(order[-count:])

    def test_chunks_make_no_difference(self, monkeypatch):
        rows = torch.randint(-9, 10, (50, 6)).float()
        whole = largest_of_rows(rows, None, 2)
        monkeypatch.setattr("lightning_sap.functional.select.chunk_size", lambda _: 13)
        assert torch.equal(largest_of_rows(rows, None, 2), whole)


class TestDecision:
    def test_the_largest_of_each_row_stays_and_others_go_instead(self):
        """Five smallest of nine, without: 1 to 5 would empty the first row."""
        free = step({"w": PrunableTensor(WEIGHT)}, fraction=5 / 9)
        found = step({"w": PrunableTensor(WEIGHT, floors=(Floor(1),))}, fraction=5 / 9)
        assert kept(free) == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]
        assert kept(found) == [[0, 0, 1], [0, 0, 1], [0, 1, 1]]
        assert (found.count, found.short) == (5, 0)

    def test_the_largest_of_each_column_stays(self):
        found = step({"w": PrunableTensor(WEIGHT.T.contiguous(), floors=(Floor(1, (1,)),))}, fraction=5 / 9)
        assert kept(found) == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]

    def test_what_cannot_go_is_counted(self):
        found = step({"w": PrunableTensor(WEIGHT, floors=(Floor(2),))}, fraction=0.5)
        assert kept(found) == [[0, 1, 1]] * 3
        assert (found.count, found.short) == (3, 1)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_rows_of_one_weight_lose_none(self, scope):
        found = step({"w": PrunableTensor(torch.randn(8, 1), floors=(Floor(1, (0,)),))}, scope, fraction=0.5)
        assert (found.count, found.short) == (0, 0 if scope == "neuron" else 4)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_whole_tensor_keeps_one(self, scope):
        tensors = {"w": PrunableTensor(WEIGHT / 100, floors=(Floor(1, ()),)), "v": PrunableTensor(WEIGHT + 100)}
        found = step(tensors, scope, fraction=0.0, limits=Limits(least=17))
        assert found.masks.survivors["w"] >= 1
        assert found.count == 17

    def test_several_floors_hold_together(self):
        tensors = {"w": PrunableTensor(torch.randn(4, 6, 3), floors=(Floor(1, (2,)), Floor(1, (1,)), Floor(2)))}
        mask = step(tensors, "global", fraction=0.99).masks.kept["w"]
        assert mask.flatten(1).sum(1).min() >= 2
        assert mask.any(2).any(0).all()
        assert mask.any(1).any(0).all()

    def test_sets_that_are_empty_already_stay_empty(self):
        pruned = torch.zeros(3, 3, dtype=torch.bool)
        pruned[0] = True
        found = step({"w": PrunableTensor(WEIGHT, pruned, floors=(Floor(1),))}, fraction=0.9)
        assert kept(found) == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]

    def test_without_floors_nothing_is_looked_at(self, monkeypatch):
        monkeypatch.setattr("lightning_sap.engine.floors.largest_of_rows", None)
        assert step({"w": PrunableTensor(WEIGHT)}).count == 4

    def test_units_of_a_transposed_convolution_keep_one(self):
        layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
        weight = prunable_weights(layer)["weight"]
        values = torch.arange(1.0, 49.0).view(weight.parameter.shape)
        found = step({"w": PrunableTensor(values, None, weight.units, floors=weight.floors(1))}, "layer", 0.85)
        assert weight.units(found.masks.kept["w"]).sum(1).tolist()[:3] == [1, 1, 1]
        assert found.count == 40

    @given(
        st.sampled_from(SCOPES),
        st.floats(0, 0.99),
        st.sampled_from([(0, None), (5, 9), (12, 12), (0, 3)]),
        st.integers(0, 3),
        st.sampled_from([None, (0,), (1,), (2,), (0, 1), (), (0, 1, 2)]),
        st.integers(0, 2**31),
    )
    def test_it_is_what_the_plain_twin_does(self, scope, fraction, limits, least, axes, seed):
        values = np.random.default_rng(seed)
        weights = {"a": values.integers(-4, 5, (3, 2, 4)).astype(np.float64), "b": values.normal(size=(2, 5))}
        masks = {name: values.random(w.shape) < 0.8 for name, w in weights.items()}
        floor = Floor(max(1, least), axes)
        sets = Floor(1, (0,) if axes is None else axes).rows(torch.arange(24).view(3, 2, 4)).tolist()
        tensors = {
            name: PrunableTensor(torch.from_numpy(w), torch.from_numpy(~masks[name]), floors=(floor,) * (name == "a"))
            for name, w in weights.items()
        }
        found = step(tensors, scope, fraction, Limits({"b": 2}, *limits))
        expected = oracle.prune_masks(
            weights, masks, amount=lambda w: oracle.fraction_count(w, fraction), scope=scope, floors={"b": 2},
            least=limits[0], most=limits[1], sets=[[("a", i) for i in of] for of in sets], stay=floor.least,
        )  # fmt: skip
        for name, mask in expected.items():
            assert np.array_equal(found.masks.kept[name].numpy(), mask)


class TestFewest:
    def test_it_is_the_larger_of_the_floors(self):
        pruned = torch.zeros(3, 4, dtype=torch.bool)
        pruned[0, 1:] = True
        weight = torch.ones(3, 4)
        tensors = {
            "one": PrunableTensor(weight, floors=(Floor(1, (1,)), Floor(1))),
            "two": PrunableTensor(weight, pruned, floors=(Floor(2),)),
            "none": PrunableTensor(weight),
        }
        assert fewest(tensors) == {"one": 4, "two": 5, "none": 0}


class Divided(nn.Module):
    """A parametrization by a norm over some axes, as users write it."""

    def __init__(self, dim, eps=0.0):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x):
        return x / (x.square().sum(self.dim, keepdim=True).sqrt() + self.eps)


def divided(layer, *arguments):
    parametrize.register_parametrization(layer, "weight", Divided(*arguments), unsafe=True)
    return layer


class TestNormalised:
    @pytest.mark.parametrize(
        ("build", "axes"),
        [
            (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (0,)),
            (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), (1,)),
            (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=None), ()),
            (lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2), (2,)),
            (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), ()),
            (lambda: spectral_norm(nn.Conv2d(4, 4, 3)), ()),
            (lambda: divided(nn.Conv2d(4, 4, 3), (2, 3)), (0, 1)),
            (lambda: divided(nn.Linear(4, 3), 0), (1,)),
            (lambda: divided(nn.Linear(4, 3), 1, 1e-8), (0,)),  # finite, but its gradient is not
            (lambda: nn.Linear(4, 3), None),
        ],
    )
    def test_axes_of_what_is_divided_by_a_norm(self, build, axes):
        (weight,) = prunable_weights(nn.Sequential(build())).values()
        assert weight.normalised == axes

    @pytest.mark.parametrize("dim", [0, 1, None])
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_axes_of_old_weight_norm(self, dim):
        weights = prunable_weights(nn.utils.weight_norm(nn.Linear(4, 3), dim=dim))
        assert {n: w.normalised for n, w in weights.items()} == {"weight_v": () if dim is None else (dim,)}

    def test_axes_of_a_weight_that_two_layers_normalise_in_two_ways(self):
        rows, columns = nn.Linear(4, 4), nn.Linear(4, 4)
        parametrizations.weight_norm(rows)
        parametrizations.weight_norm(columns, dim=1)
        columns.parametrizations.weight.original1 = rows.parametrizations.weight.original1
        (weight,) = prunable_weights(nn.Sequential(rows, columns)).values()
        assert weight.normalised == (0, 1)

    def test_the_norms_of_thin_layers_are_no_weights(self):
        """Of Linear(1, 8) both parts have the shape of the weight."""
        assert list(prunable_weights(parametrizations.weight_norm(nn.Linear(1, 8)))) == [
            "parametrizations.weight.original1"
        ]


class TestPattern:
    @pytest.mark.parametrize("build", [lambda: nn.Linear(8, 4), lambda: nn.Conv1d(8, 2, 3)])
    @pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 4), Pattern(1, 2)])
    def test_columns_that_are_normalised_keep_one_each(self, build, pattern):
        layer = build()
        with torch.no_grad():
            layer.weight[:, ::2] *= 1e-3  # these columns would be empty
        weight = prunable_weights(parametrizations.weight_norm(layer, dim=1))["parametrizations.weight.original1"]
        assert pattern.fits(weight)
        tensors = {"w": PrunableTensor(weight.parameter.detach(), floors=weight.floors(0))}
        mask = decide_pattern(tensors, pattern, 0.5, 1.0).masks.kept["w"]
        assert (pattern.blocks(mask, 1).sum(1) == pattern.kept).all()
        assert mask.transpose(0, 1).flatten(1).any(1).all()

    def test_the_largest_that_can_comes_in(self):
        values = torch.tensor([[9.0, 8.0, 1.0, 3.0], [9.0, 7.0, 2.0, 1.0]])
        free = decide_pattern({"w": PrunableTensor(values)}, Pattern(2, 4), 0.5, 1.0)
        found = decide_pattern({"w": PrunableTensor(values, floors=(Floor(1, (1,)),))}, Pattern(2, 4), 0.5, 1.0)
        assert kept(free) == [[1, 1, 0, 0], [1, 1, 0, 0]]
        assert kept(found) == [[0, 1, 0, 1], [1, 0, 1, 0]]

    def test_too_few_rows_do_not_fit(self):
        (weight,) = prunable_weights(parametrizations.weight_norm(nn.Linear(8, 1), dim=1)).values()
        assert not Pattern(2, 4).fits(weight)
        assert Pattern(2, 4).fits(prunable_weights(nn.Linear(8, 1))["weight"])

    def test_where_blocks_have_none_to_give_one_stays_more(self):
        pruned = torch.tensor([[True, False, True, True], [True, False, False, True]])
        values = torch.tensor([[9.0, 8.0, 1.0, 3.0], [9.0, 7.0, 2.0, 1.0]])
        found = decide_pattern({"w": PrunableTensor(values, pruned, floors=(Floor(1, (1,)),))}, Pattern(1, 4), 0.5, 1.0)
        assert kept(found) == [[0, 1, 0, 0], [0, 0, 1, 0]]
