"""A plain loop under Fabric's DDP in two processes, beside one process."""

import pytest
import torch
from distributed import loops
from launch import run_ranks
from resuming import equal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("distributed.loops:under_ddp", tmp_path_factory.mktemp("ranks"))


def test_replicas_prune_what_one_process_prunes(ranks, tmp_path):
    alone = loops.train(loops.launched(devices=1), tmp_path)
    assert alone["whole"]["pruned"][0] > 0
    assert alone["whole"]["steps"] == [1, 3, 5]
    assert alone["clean"] == [True] * 10
    for found in ranks:
        assert found["clean"] == [True] * 10
        assert equal(found["whole"]["masks"], alone["whole"]["masks"])
        assert found["whole"]["pruned"] == alone["whole"]["pruned"]
        torch.testing.assert_close(found["whole"]["weights"], alone["whole"]["weights"])


def test_a_loop_that_fabric_resumes_equals_the_unbroken_one(ranks):
    for found in ranks:
        assert equal(found["resumed"], found["whole"])
        assert equal(found["whole"], ranks[0]["whole"])


def test_a_rank_that_strays_is_named_on_all(ranks):
    for found in ranks:
        assert "weights of '0.weight' differ on ranks [1] from rank 0" in found["strayed"]


def test_the_masks_of_rank_0_count(ranks):
    for found in ranks:
        assert equal(found["rank 1 decides otherwise"], ranks[0]["rank 1 decides otherwise"])
