"""A plain loop under Fabric's DDP and on FSDP2's shards in two processes, beside one process."""

import pytest
import torch
from distributed import loops
from launch import run_ranks
from resuming import equal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("distributed.loops:under_ddp", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    if torch.__version__ < "2.9":
        pytest.skip("FSDP2 on the CPU needs PyTorch 2.9")
    return run_ranks("distributed.loops:under_fsdp2", tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("spread", ["ranks", "shards"])
def test_two_processes_prune_what_one_prunes(request, spread, tmp_path):
    alone = loops.train(loops.launched(devices=1), tmp_path)
    assert alone["whole"]["pruned"][0] > 0
    assert alone["whole"]["steps"] == [1, 3, 5]
    assert alone["clean"] == [True] * 10
    for found in request.getfixturevalue(spread):
        assert found["clean"] == [True] * 10
        assert equal(found["whole"]["masks"], alone["whole"]["masks"])
        assert found["whole"]["pruned"] == alone["whole"]["pruned"]
        torch.testing.assert_close(found["whole"]["weights"], alone["whole"]["weights"])


@pytest.mark.parametrize("spread", ["ranks", "shards"])
def test_a_loop_that_fabric_resumes_equals_the_unbroken_one(request, spread):
    first, second = request.getfixturevalue(spread)
    for found in (first, second):
        assert equal(found["resumed"], found["whole"])
        assert equal(found["whole"], first["whole"])


def test_a_state_that_is_not_loaded_beside_its_weights_is_told(shards):
    (told,), on_rank_1 = (found["told"] for found in shards)
    assert "weights are exactly zero as training starts" in told
    assert told.endswith("a pruner that is to go on has to load its state.")
    assert on_rank_1 == []


def test_a_rank_that_strays_is_named_on_all(ranks):
    for found in ranks:
        assert "weights of '0.weight' differ on ranks [1] from rank 0" in found["strayed"]


def test_the_masks_of_rank_0_count(ranks):
    for found in ranks:
        assert equal(found["rank 1 decides otherwise"], ranks[0]["rank 1 decides otherwise"])
