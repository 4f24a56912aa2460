"""Power sums that are not taken twice: remembered while weight, mask and orders are the same, and only then."""

import pytest
import torch
from helpers import Net, fit

from lightning_sap import PQIMonitor, SAPCallback
from lightning_sap.engine import measure
from lightning_sap.engine.groups import Memory, PrunableTensor
from lightning_sap.engine.measure import sums_of
from lightning_sap.functional.fingerprint import fingerprints

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def taken(monkeypatch):
    """How many weights were measured."""
    sizes, power_sums = [], measure.power_sums

    def counted(weight, *arguments, **options):
        sizes.append(weight.numel())
        return power_sums(weight, *arguments, **options)

    monkeypatch.setattr(measure, "power_sums", counted)
    return sizes


class TestMemory:
    def piece(self, pruned=None):
        return {"w": PrunableTensor(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), pruned, None, Memory())}

    def test_same_weights_are_measured_once(self, taken):
        pieces = self.piece()
        first, second = sums_of(pieces, 0.5, 1.0), sums_of(pieces, 0.5, 1.0)
        assert first["w"].sum_q.tolist() == second["w"].sum_q.tolist() == [10.0]
        assert len(taken) == 1

    def test_weight_that_was_written_to_is_measured_anew(self, taken):
        pieces = self.piece()
        sums_of(pieces, 0.5, 1.0)
        pieces["w"].weight.data[1, 0] = 5.0  # which the tensor's version does not tell
        assert sums_of(pieces, 0.5, 1.0)["w"].sum_q.tolist() == [12.0]
        assert len(taken) == 2

    def test_other_orders_other_masks_and_units_are_measured_anew(self, taken):
        pieces = self.piece()
        sums_of(pieces, 0.5, 1.0)
        assert sums_of(pieces, 1.0, 2.0)["w"].sum_q.tolist() == [30.0]
        masked = {"w": pieces["w"]._replace(pruned=torch.tensor([[True, False], [False, True]]))}
        assert sums_of(masked, 1.0, 2.0)["w"].sum_p.tolist() == [5.0]
        assert sums_of(masked, 1.0, 2.0, scope="neuron")["w"].sum_p.tolist() == [2.0, 3.0]
        assert len(taken) == 4

    def test_every_weight_is_measured_without_a_memory(self, taken):
        pieces = {"w": self.piece()["w"]._replace(memory=None)}
        sums_of(pieces, 0.5, 1.0)
        sums_of(pieces, 0.5, 1.0)
        assert len(taken) == 2


class TestBits:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("length", [1, 3, 8, 17])
    def test_fingerprint_counts_every_entry_wherever_it_lies(self, dtype, length):
        weight = torch.randn(length + 1, generator=torch.Generator().manual_seed(0)).to(dtype)[1:]
        (bits,) = fingerprints([weight])
        for i in range(length):
            other = weight.clone()
            other[i] = -other[i]
            assert fingerprints([other]) != [bits]
        assert fingerprints([weight.clone()]) == [bits]

    def test_fingerprint_of_strided_tensors(self):
        weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        assert fingerprints([weight.T]) == fingerprints([weight.T.contiguous()])


def test_what_the_monitor_measured_the_pruner_does_not_measure_again(taken):
    def measured(*callbacks):
        taken.clear()
        fit(Net(), *callbacks, max_epochs=2)
        return len(taken)

    alone = measured(SAPCallback(rounds=1, every_n_epochs=1))
    assert alone == 2 * 4  # of both layers: dense, at the end of the first round, after the pruning, at the end
    assert measured(SAPCallback(rounds=1, every_n_epochs=1), PQIMonitor(stop_on=None)) == alone


def test_fingerprint_sees_changes_that_cancel_in_a_plain_sum():
    weight = torch.full((64,), 0.6)
    other = weight.clone()
    bits = other.view(torch.int32)
    bits[4] += 3
    bits[16] -= 3
    assert int(weight.view(torch.int32).sum()) == int(bits.sum())
    assert fingerprints([weight]) != fingerprints([other])


def doubled(x):
    return 2 * x


def some_signs_flipped(x):
    """Of as many odd places as make the sum of their multiples a power of two."""
    y = x.clone()
    y.view(-1)[1::2][:8].neg_()
    return y


@pytest.mark.parametrize("change", [doubled, torch.neg, lambda x: 0.5 * x, some_signs_flipped, lambda x: x.flip(0)])
@pytest.mark.parametrize("shape", [(64, 64), (1024, 1024), (2048, 2048)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fingerprint_sees_the_same_change_of_many_weights(change, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fingerprints([change(weight)]) != fingerprints([weight])


@pytest.mark.parametrize("byte", range(8))
def test_fingerprint_tells_masks_with_equal_words_in_other_places(byte):
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    for mask, words in zip(masks, ([0, 7], [1, 6], [3, 4]), strict=True):
        mask[words, byte] = True
    assert len(set(fingerprints(list(masks)))) == 3


@pytest.mark.parametrize("column", [0, 7])
def test_fingerprint_tells_masks_of_one_weight_by_its_place(column):
    masks = torch.zeros(64, 64, 1024, dtype=torch.bool)
    masks[range(64), range(64), column] = True
    assert len(set(fingerprints(list(masks)))) == 64


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_fingerprint_sees_every_bit_and_every_place(dtype):
    numbers = torch.arange(300_000).remainder(2 if dtype == torch.bool else 250).to(dtype).view(3, -1)
    moved, changed = numbers.view(-1).roll(1).view(3, -1), numbers.clone()
    changed[2, -1] = 0 if numbers[2, -1] else 1
    assert fingerprints([numbers]) == fingerprints([numbers.clone()])
    assert len(set(fingerprints([numbers, moved, changed]))) == 3


def test_a_fingerprint_tells_zeros_by_their_sign_and_reads_what_is_not_finite():
    assert fingerprints([torch.tensor([0.0])]) != fingerprints([torch.tensor([-0.0])])
    assert fingerprints([torch.full((2,), float("nan"))]) == fingerprints([torch.full((2,), float("nan"))])
    assert fingerprints([torch.zeros(0)]) == [0]
