"""Two processes that prune whole units, beside one process; killed and resumed."""

import pytest
import torch
from distributed import units
from launch import run_ranks
from resuming import equal

pytestmark = pytest.mark.slow
pytest.importorskip("torch_pruning")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("distributed.units:pruning", tmp_path_factory.mktemp("ranks"))


def test_replicas_prune_the_units_that_one_process_prunes(ranks, tmp_path):
    alone = units.fit(tmp_path)
    assert alone["remaining"][-1] < 0.5
    for found in ranks:
        assert equal(found["whole"]["masks"], alone["masks"])
        assert equal(found["whole"]["companions"], alone["companions"])
        torch.testing.assert_close(found["whole"]["weights"], alone["weights"])


def test_a_resumed_run_of_replicas_equals_the_unbroken_one(ranks):
    for found in ranks:
        assert equal(found["resumed"], found["whole"])


def test_the_units_and_biases_of_rank_0_count(ranks):
    for found in ranks:
        assert equal(found["rank 1 decides otherwise"], ranks[0]["whole"])
