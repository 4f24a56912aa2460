"""What a policy is asked and may answer, and a policy times a scale."""

import copy
import math
import pickle
import re
from dataclasses import dataclass

import pytest
import torch

from lightning_sap import Amounts, FixedFraction, Policy, SparsityInformed, Standing, prune_masks
from lightning_sap.engine.decision import decide
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.functional.pqi import power_sums
from lightning_sap.policies.base import ask

KEPT = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])


def sums(count=10):
    return power_sums(torch.arange(1.0, count + 1), 0.5, 1.0)


def standing(**others):
    return Standing(**{"round": 3, "pruned": torch.tensor(4)} | others)


class OneFewer(Policy):
    """One less than the half of what is kept."""

    def __call__(self, sums, round):
        return sums.count // 2 - 1


class HalfAndOneBack(Policy):
    regrows = True

    def __call__(self, sums, round):
        return Amounts(sums.count // 2, torch.ones_like(sums.count))


class TestStanding:
    def seen(self, take):
        """What `take` returns when it is called as a policy on two layers, by scope."""

        def ask(scope):
            found = []

            class Seeing(Policy):
                __call__ = take(found)

            pieces = {"a": PrunableTensor(KEPT, KEPT < 3), "b": PrunableTensor(KEPT[:1])}
            decide(
                pieces, policy=Seeing(), scope=scope, round=7, history=["dense"], metrics={"val_acc": 0.5},
            )  # fmt: skip
            return found[0]

        return ask

    @pytest.mark.parametrize(
        ("scope", "names", "pruned"),
        [
            ("neuron", (("a",), ("a",), ("b",)), [2, 0, 0]),
            ("layer", (("a",), ("b",)), [2, 0]),
            ("global", (("a", "b"),), [2]),
        ],
    )
    def test_what_it_tells_of_each_group(self, scope, names, pruned):
        def take(found):
            def call(self, sums, round, standing):
                found.append((round, standing))
                return torch.zeros_like(sums.count)

            return call

        round, standing = self.seen(take)(scope)
        assert round == standing.round == 7
        assert standing.names == names
        assert standing.pruned.tolist() == pruned
        assert standing.pruned.dtype == torch.int64
        assert (standing.history, standing.metrics) == (["dense"], {"val_acc": 0.5})

    @pytest.mark.parametrize("form", ["third", "keyword", "default", "by another name"])
    def test_it_is_given_to_whoever_takes_it(self, form):
        def take(found):
            def third(self, sums, round, standing):
                found.append(standing)
                return torch.zeros_like(sums.count)

            def keyword(self, sums, round, *, standing):
                return third(self, sums, round, standing)

            def default(self, sums, round, standing=None):
                return third(self, sums, round, standing)

            def other(self, sums, round, where, /):
                return third(self, sums, round, where)

            return {"third": third, "keyword": keyword, "default": default, "by another name": other}[form]

        assert self.seen(take)("layer").round == 7

    def test_an_option_of_the_policy_is_not_taken_for_it(self):
        class Optional(Policy):
            def __call__(self, sums, round, most=2):
                return torch.full_like(sums.count, most)

        assert ask(Optional(), sums(), standing()).drop.item() == 2

    def test_it_is_empty_by_default(self):
        assert (standing().history, standing().metrics, standing().names) == ((), {}, ())

    def test_the_round_of_a_pure_step_is_told(self):
        class Later(Policy):
            def __call__(self, sums, round):
                return torch.full_like(sums.count, round)

        kept = prune_masks({"w": KEPT}, policy=Later(), round=3)["w"]
        assert kept.int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
        assert int(prune_masks({"w": KEPT}, policy=Later())["w"].sum()) == 7


class TestAnswers:
    def test_a_tensor_alone_lets_nothing_come_back(self):
        drop, grow = ask(OneFewer(), sums(), standing())
        assert (drop.item(), grow.item(), grow.dtype) == (4, 0, torch.int64)

    @pytest.mark.parametrize("grow", [torch.tensor(1.0), torch.tensor(-1), torch.tensor([1]), 1, None])
    def test_growth_that_is_no_count(self, grow):
        class Wrong(HalfAndOneBack):
            def __call__(self, sums, round):
                return Amounts(sums.count // 2, grow)

        with pytest.raises(ValueError, match=r"Wrong\(\) must return how many .* or Amounts\(drop, grow\) of two such"):
            ask(Wrong(), sums(), standing())

    def test_growth_of_a_policy_that_says_it_never_regrows(self):
        class Silent(HalfAndOneBack):
            regrows = False

        message = (
            "Silent() lets 1 pruned weights come back, but its `regrows` is False. Set `regrows = True` in its class, "
            "or return no `grow`."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ask(Silent(), sums(), standing())

    def test_growth_of_nothing_needs_no_leave(self):
        class Nothing(Policy):
            def __call__(self, sums, round):
                return Amounts(sums.count // 2, torch.zeros_like(sums.count))

        assert ask(Nothing(), sums(), standing()).drop.item() == 5

    @pytest.mark.parametrize("policy", [FixedFraction(0.5), SparsityInformed(), OneFewer()])
    def test_policies_never_regrow_unless_they_say_so(self, policy):
        assert policy.regrows is False


class TestScaled:
    @pytest.mark.parametrize("policy", [FixedFraction(0.2), SparsityInformed(), OneFewer(), HalfAndOneBack()])
    def test_one_is_the_policy_itself(self, policy):
        assert policy.scaled(1) is policy
        assert policy.scaled(1.0) is policy

    @pytest.mark.parametrize("policy", [FixedFraction(0.2), SparsityInformed(eta_r=1.0), OneFewer(), HalfAndOneBack()])
    def test_zero_prunes_nothing(self, policy):
        assert ask(policy, sums(), standing()).drop.item() > 0
        assert ask(policy.scaled(0), sums(), standing()).drop.item() == 0

    def test_sparsity_informed_multiplies_gamma(self):
        assert SparsityInformed(1.0, 2.0, 0.1, 0.5, 0.8).scaled(4) == SparsityInformed(1.0, 2.0, 0.1, 2.0, 0.8)

    @pytest.mark.parametrize(
        ("fraction", "scale", "scaled"), [(0.2, 2.0, 0.4), (0.2, 0.5, 0.1), (0.2, 8.0, 0.9), (0.95, 2.0, 0.95)]
    )
    def test_fixed_fraction_multiplies_its_fraction_up_to_nine_tenths(self, fraction, scale, scaled):
        assert FixedFraction(fraction).scaled(scale) == FixedFraction(scaled)

    @pytest.mark.parametrize(("scale", "count"), [(0.5, 2), (0.74, 2), (0.75, 3), (2, 8), (2.25, 9), (100, 9)])
    def test_other_policies_have_their_counts_multiplied_up_to_nine_tenths(self, scale, count):
        assert ask(OneFewer().scaled(scale), sums(), standing()).drop.tolist() == count  # 4 of 10 times the scale

    def test_a_policy_that_takes_more_than_nine_tenths_goes_on_doing_so(self):
        class AllButOne(Policy):
            def __call__(self, sums, round):
                return sums.count - 1

        assert ask(AllButOne().scaled(2), sums(100), standing()).drop.item() == 99
        assert ask(AllButOne().scaled(0.5), sums(100), standing()).drop.item() == 49

    def test_what_grows_is_not_scaled(self):
        scaled = HalfAndOneBack().scaled(0.5)
        drop, grow = ask(scaled, sums(), standing())
        assert (drop.item(), grow.item(), scaled.regrows) == (2, 1, True)

    def test_the_policy_inside_sees_where_it_stands(self):
        class OfMetrics(Policy):
            p, q = 1.0, 2.0

            def __call__(self, sums, round, standing):
                return torch.full_like(sums.count, round + int(standing.metrics["extra"]))

        scaled = OfMetrics().scaled(0.5)
        assert ask(scaled, sums(), standing(metrics={"extra": 3.0})).drop.item() == 3
        assert (scaled.p, scaled.q) == (1.0, 2.0)

    def test_twice_is_once_by_the_product(self):
        assert repr(OneFewer().scaled(3).scaled(0.5)) == "OneFewer().scaled(1.5)"
        policy = OneFewer()
        assert policy.scaled(4).scaled(0.25) is policy

    def test_it_prunes_and_is_copied(self):
        scaled = pickle.loads(pickle.dumps(copy.deepcopy(OneFewer().scaled(2))))
        assert int(prune_masks({"w": KEPT}, policy=scaled)["w"].sum()) == 2  # of eight 3 go, times two

    @pytest.mark.parametrize("policy", [FixedFraction(0.2), SparsityInformed(), OneFewer()])
    @pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
    def test_a_scale_that_is_none(self, policy, scale):
        with pytest.raises(ValueError, match=f"scale must be a number of at least 0, got {scale}"):
            policy.scaled(scale)

    def test_a_dataclass_of_a_users_own(self):
        @dataclass(frozen=True)
        class Exactly(Policy):
            number: int

            def __call__(self, sums, round):
                return torch.full_like(sums.count, self.number)

        assert repr(Exactly(2).scaled(3)) == f"{Exactly(2)!r}.scaled(3)"
        assert ask(Exactly(2).scaled(3), sums(), standing()).drop.item() == 6
