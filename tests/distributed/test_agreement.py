import pytest
import torch
from distributed import replicas
from helpers import is_masked
from launch import run_ranks

pytestmark = pytest.mark.slow

SCOPES = ("neuron", "layer", "global")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("distributed.replicas:agreeing", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scope", SCOPES)
def test_two_ranks_prune_as_one_process_does(ranks, tmp_path, scope):
    alone = replicas.fit(tmp_path, scope, devices=1)
    assert 0 < alone["remaining"] < 0.6
    for found in ranks:
        assert found[scope]["history"] == alone["history"]
        assert found[scope]["remaining"] == alone["remaining"]
        torch.testing.assert_close(found[scope]["masks"], alone["masks"], rtol=0, atol=0)
        torch.testing.assert_close(found[scope]["weights"], alone["weights"], rtol=0, atol=0)


def test_rank_0_decides_where_another_rank_decides_otherwise(ranks, tmp_path):
    """Both want half of each layer to go; rank 1 wants the largest weights to go, rank 0 the smallest."""
    alone = replicas.deciding(tmp_path, devices=1)
    first, second = (found["rank 1 decides otherwise"] for found in ranks)
    for name, mask in alone["masks"].items():
        assert torch.equal(first["decided"][name], mask)
        assert not torch.equal(second["decided"][name], mask)
        assert second["decided"][name].sum() == mask.sum()
    for found in (first, second):
        torch.testing.assert_close(found["masks"], alone["masks"], rtol=0, atol=0)
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=0)
        assert found["history"] == alone["history"]
        assert {name: int(mask.sum()) for name, mask in found["masks"].items()} == {
            "net.0.weight": 27, "net.2.weight": 23, "net.4.weight": 5,
        }  # fmt: skip


def test_a_gradient_that_one_rank_has_seen_counts_on_all(ranks):
    for found in ranks:
        assert found["rank 1 misses a gradient"] == {"net.0.weight": 14, "net.2.weight": 12, "net.4.weight": 3}


def test_two_ranks_log_without_advice_on_sync_dist(ranks):
    assert any(found["warnings"] for found in ranks)  # of other matters
    assert [said for found in ranks for said in found["warnings"] if "sync_dist" in said] == []


def test_processes_that_lightning_spawns_prune_as_one_process_does(tmp_path):
    (found,) = run_ranks("distributed.replicas:spawning", tmp_path, world=1, limit=110)
    alone = replicas.fit(tmp_path, "layer", devices=1)
    assert found["started"] == 2
    assert found["remaining"] == alone["remaining"]
    assert found["metrics"]["sap/remaining"] == pytest.approx(alone["remaining"])
    assert 0 < alone["remaining"] < 0.6
    assert found["history"] == alone["history"][:2]  # the file is of the last epoch, before its round ends
    torch.testing.assert_close(found["masks"], alone["masks"], rtol=0, atol=0)
    torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=0)
    assert found["left behind"] == ({}, [])  # as docs/compatibility.md says


@pytest.mark.gpu
def test_ranks_with_a_gpu_each_agree_over_nccl(tmp_path):
    """With one GPU, of one rank, which at least sets NCCL up."""
    ranks = run_ranks("distributed.replicas:on_gpus", tmp_path, world=min(2, torch.cuda.device_count()), gpu=True)
    for found in ranks:
        assert found["backend"] == "nccl"
        assert 0 < found["remaining"] < 0.6
        torch.testing.assert_close(found["masks"], ranks[0]["masks"], rtol=0, atol=0)
        torch.testing.assert_close(found["weights"], ranks[0]["weights"], rtol=0, atol=0)
        assert is_masked(found["weights"], found["masks"])


def test_rank_that_strays_is_named_by_all_and_nothing_is_pruned(ranks):
    for found in ranks:
        assert "weights of 'net.2.weight' differ on ranks [1] from rank 0" in found["error"]
        assert "net.0.weight" not in found["error"]
        assert all(bool(mask.all()) for mask in found["masks after the error"].values())
        assert found["momenta after the error"] > 0
