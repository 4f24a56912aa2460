"""Two processes that search, each with a score of its own, beside one process; killed and resumed."""

import pytest
import torch
from distributed import searches
from launch import run_ranks
from resuming import equal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("distributed.searches:search", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return searches.train(tmp_path_factory.mktemp("alone"), "alone")


def test_the_score_of_rank_0_counts_on_every_rank(ranks, alone):
    assert [record["taken_back"] for record in alone["rounds"]].count(True) >= 2
    for found in ranks:
        rounds = [(r["weights"], r["sound"], r["metric"], r["taken_back"]) for r in found["ddp"]["rounds"]]
        assert rounds == [(r["weights"], r["sound"], r["metric"], r["taken_back"]) for r in alone["rounds"]]
        assert equal(found["ddp"]["masks"], alone["masks"])
        torch.testing.assert_close(found["ddp"]["weights"], alone["weights"])


def test_shards_go_back_and_are_handed_back_as_one_process(ranks, alone):
    if "fsdp2" not in ranks[0]:
        pytest.skip("FSDP2 under Lightning needs torch 2.9")
    for found in ranks:
        assert [r["weights"] for r in found["fsdp2"]["rounds"]] == [r["weights"] for r in alone["rounds"]]
        assert equal(found["fsdp2"]["masks"], alone["masks"])
        torch.testing.assert_close(found["fsdp2"]["weights"], alone["weights"])


def test_searches_that_are_resumed_equal_those_that_never_stopped(ranks):
    for found in ranks:
        for engine in (name for name in ("ddp", "fsdp2") if name in found):
            for resumed in found[f"{engine}, resumed"]:
                assert equal(resumed["masks"], found[engine]["masks"])
                assert equal(resumed["weights"], found[engine]["weights"])
                assert [{**r, "metrics": {}} for r in resumed["rounds"]] == [
                    {**r, "metrics": {}} for r in found[engine]["rounds"]
                ]
