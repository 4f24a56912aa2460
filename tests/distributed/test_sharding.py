from types import SimpleNamespace

import pytest
import torch
from distributed import shards
from helpers import is_masked
from launch import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sap.callbacks.pruning.checks import check_strategy
from lightning_sap.sharding import ALONE, check_placements, is_sharded, placed_like, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if torch.__version__ < "2.9":
        pytest.skip("FSDP2 over gloo: PyTorch 2.6 cannot, 2.7 and 2.8 sum the gradients instead of averaging them")
    return run_ranks("distributed.shards:everything", tmp_path_factory.mktemp("shards"))


def same(found, wanted):
    """Bit for bit, and no name missing."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def close(found, wanted):
    """Up to the order in which sums were taken."""
    assert len(found) == len(wanted)
    for record, of_one in zip(found, wanted, strict=True):
        for number, other in zip(record, of_one, strict=True):
            assert number == (None if other is None else pytest.approx(other, rel=1e-12))


@pytest.mark.parametrize("case", shards.RUNS)
def test_a_sharded_run_prunes_as_an_unsharded_one_does(ranks, tmp_path, case):
    alone = shards.fit(tmp_path, False, shards.RUNS[case])
    assert alone["enforced"] > 0
    for found in (rank["fits"][case] for rank in ranks):
        same(found["masks"], alone["masks"])
        same(found["weights"], alone["weights"])
        close(found["history"], alone["history"])
        close(found["monitored"], alone["monitored"])
        assert (found["remaining"], found["total"]) == (alone["remaining"], alone["total"])
        assert (found["revived"], found["enforced"]) == (0, alone["enforced"])


def test_a_sharded_momentum_encoder_shares_the_masks_of_what_it_follows(ranks, tmp_path):
    alone = shards.following(tmp_path, False)
    assert alone["masks"].keys() == {"net.0.weight", "net.4.weight", "net.6.weight", "net.8.weight"}
    copied = {name.replace("net", "momentum"): mask for name, mask in alone["masks"].items()}
    assert all(int(mask.sum()) < mask.numel() / 4 for mask in copied.values())
    assert is_masked(alone["weights"], copied)
    for found in (rank["following"] for rank in ranks):
        same(found["masks"], alone["masks"])
        same(found["weights"], alone["weights"])


def test_a_sharded_average_shares_the_masks_of_what_it_averages(ranks, tmp_path):
    alone = shards.following(tmp_path, False, averages=True)
    copied = {name.replace("net", "average.module"): mask for name, mask in alone["masks"].items()}
    assert all(int(mask.sum()) < mask.numel() / 4 for mask in copied.values())
    assert is_masked(alone["weights"], copied)
    for found in (rank["averaging"] for rank in ranks):
        same(found["masks"], alone["masks"])
        same(found["weights"], alone["weights"])


def test_sharded_clipping_leaves_pruned_weights_out_of_the_norm(ranks, tmp_path):
    alone = shards.fit(tmp_path, False, shards.RESUMED, **shards.CLIPPED)
    assert alone["remaining"] < 0.5
    for found in (rank["clipped"] for rank in ranks):
        same(found["masks"], alone["masks"])
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-5, atol=1e-7)


def test_sharded_target_is_met_exactly(ranks):
    for found in (rank["fits"]["layer"] for rank in ranks):
        alive = sum(int(mask.sum()) for mask in found["masks"].values())
        assert alive == round(shards.RUNS["layer"]["target_remaining"] * found["total"])


def test_sharded_decision_equals_the_one_on_whole_weights(ranks):
    assert [rank["decisions"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("full", [False, True], ids=["distributed checkpoint", "one file"])
class TestResume:
    def test_sharded_resume_equals_unbroken_run(self, ranks, full):
        for found in (rank["resumed"][full] for rank in ranks):
            assert found["through"]["remaining"] < 0.5
            for end in found["ends"]:
                same(end["masks"], found["through"]["masks"])
                same(end["weights"], found["through"]["weights"])
                assert end["history"] == found["through"]["history"]

    def test_sharded_checkpoint_holds_what_an_unsharded_one_does(self, ranks, tmp_path, full):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
        shards.fit(tmp_path, False, shards.RESUMED, [keep])
        wanted = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"]["lightning_sap/sap"]
        for found in (rank["resumed"][full]["saved"] for rank in ranks):
            assert found.keys() == wanted.keys()
            same(found["masks"]["net.4.weight"]["bits"], wanted["masks"]["net.4.weight"]["bits"])
            assert found["masks"].keys() == wanted["masks"].keys()
            same(found["first_weights"], wanted["first_weights"])
            for key in (
                "round",
                "first_epoch",
                "first_step",
                "steps",
                "epoch",
                "epoch_steps",
                "count",
                "plan",
                "schedules",
                "options",
            ):
                assert found[key] == wanted[key]


def test_unsharded_run_resumes_from_a_sharded_checkpoint(ranks, tmp_path):
    (resumed,) = {rank["resumed"][True]["folder"] for rank in ranks}
    end = shards.fit(tmp_path, False, shards.RESUMED, ckpt_path=f"{resumed}/step=3.ckpt")
    same(end["masks"], ranks[0]["resumed"][True]["through"]["masks"])
    same(end["weights"], ranks[0]["resumed"][True]["through"]["weights"])


@pytest.mark.gpu
def test_shards_on_gpus_are_pruned_and_resumed(tmp_path):
    world = min(2, torch.cuda.device_count())
    for found in run_ranks("distributed.shards:on_gpus", tmp_path, world=world, gpu=True):
        through, end = found["through"], found["end"]
        assert 0 < through["remaining"] < 0.5
        assert through["enforced"] > 0
        assert through["revived"] == 0
        assert is_masked(through["weights"], through["masks"])
        same(end["masks"], through["masks"])


def test_sharded_second_fit_keeps_masks(ranks):
    for first, second in (rank["again"] for rank in ranks):
        assert second < first < 1


@pytest.mark.parametrize(
    ("case", "reason"),
    {
        "columns": "Cannot prune 'w', which is placed as (Shard(dim=1),)",
        "replicated": "Cannot prune 'w', which is placed as (Replicate(),)",
        "hybrid": "Cannot prune 'w', which is placed as (Replicate(), Shard(dim=0))",
        "mixed": "The weight 'v' is not sharded, but 'w' is",
        "partly sharded": "The weight 'net.0.weight' is not sharded, but 'net.2.weight' is",
        "transposed": "the output units of ['net.0.weight'] lie on axis 1 and are spread",
        "averaged": "EMAWeightAveraging averages a deep copy of the module, and a module sharded by `fully_shard` "
        "cannot be copied. Use strategy='ddp' to average",
        "gini": "PQIMonitor(gini=True) needs whole weights",
    }.items(),
)
def test_sharded_what_cannot_be_pruned_is_refused_on_all_ranks(ranks, case, reason):
    for rank in ranks:
        assert reason in rank["refusals"][case]


def test_weights_sharded_by_rows_are_not_refused(ranks):
    assert [rank["refusals"]["rows"] for rank in ranks] == [None, None]


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"])
def test_strategies_with_shards_of_their_own_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*`fully_shard`.*ModelParallelStrategy.*strategy='ddp'"):
        check_strategy(SimpleNamespace(strategy=type(name, (), {})()))


def test_plain_tensor_is_its_own_only_shard():
    rows = torch.arange(6).view(3, 2)
    assert not is_sharded(rows)
    assert whole(rows) is rows
    assert [part is rows for part in ALONE.gather(rows)] == [True]
    assert ALONE.sum(rows) is rows
    same(ALONE.own(rows, 3), rows)
    same(placed_like(rows, torch.zeros(3, 2)), rows)
    check_placements({"w": rows})
