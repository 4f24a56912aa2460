"""Two processes stop together, and hold the same round again, replicated and sharded."""

import pytest
import torch
from helpers import same
from launch import run_ranks
from stopping import LAST, differences, outcome, stopped

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("distributed.stops:stopping", tmp_path_factory.mktemp("stops"), limit=150)


@pytest.fixture
def sharded(ranks):
    """What each rank found where the weights are sharded."""
    if torch.__version__ < "2.9":
        pytest.skip("FSDP2 on the CPU needs PyTorch 2.9")
    return [rank["fsdp2"] for rank in ranks]


@pytest.mark.parametrize("kind", ["collapse", "compression"])
def test_two_ranks_stop_and_go_back_as_one_process_does(ranks, tmp_path, kind):
    alone = outcome(stopped(tmp_path, kind))
    assert alone["verdict"].round == LAST[kind]
    for found in (rank[kind] for rank in ranks):
        assert differences(alone, found["whole"]) == []
        assert same(found["whole"]["weights"], found["states"][alone["verdict"].restore])
        assert found["files"] == [f"sap-round-00{round}.ckpt" for round in range(LAST[kind] + 1)]


def test_sharded_stop_restores_the_shards_of_the_round(sharded):
    for found in sharded:
        whole = found["whole"]
        assert found["sharded"]
        assert all(found["folders"]), "distributed checkpoints"
        assert (whole["verdict"].round, whole["verdict"].restore, whole["round"], whole["epochs"]) == (5, 3, 3, 6)
        assert same(whole["weights"], found["states"][3])
        assert same(whole["masks"], found["masks"][3])
        assert not same(found["states"][3], found["states"][5])
    assert differences(sharded[0]["whole"], sharded[1]["whole"]) == []


def test_sharded_restore_round_brings_back_every_round(sharded):
    for found in sharded:
        assert list(found["restored"]) == [0, 2, 1]
        for round, (state, masks, remaining) in found["restored"].items():
            assert same(state, found["states"][round])
            assert same(masks, found["masks"][round])
            assert remaining == found["remaining"][round]


@pytest.mark.parametrize("kind", ["collapse", "compression"])
def test_resume_of_two_ranks_after_the_verdict_ends_alike(ranks, kind):
    for found in (rank[kind] for rank in ranks):
        assert differences(found["whole"], found["resumed"]) == []


def test_sharded_resume_after_the_verdict_ends_alike(sharded):
    for found in sharded:
        assert differences(found["whole"], found["resumed"]) == []
