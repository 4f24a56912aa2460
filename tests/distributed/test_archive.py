"""Two processes agree on every round that is saved or put back, replicated and sharded."""

import pytest
from helpers import same
from launch import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ENGINES = ["ddp", "fsdp2"]


def of_ranks(function, folder, limit=150):
    return run_ranks(f"distributed.archives:{function}", folder, limit=limit)


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    return of_ranks("branching", tmp_path_factory.mktemp("branches"))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    return of_ranks("unseen", tmp_path_factory.mktemp("unseen"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return of_ranks("full", tmp_path_factory.mktemp("full"))


def by_engine(found, engine):
    if engine not in found[0]:
        pytest.skip("FSDP2 on the CPU needs PyTorch 2.9")
    return [rank[engine] for rank in found]


@pytest.mark.parametrize("engine", ENGINES)
def test_round_that_one_rank_does_not_see_is_put_back_on_none(unseen, engine):
    found = by_engine(unseen, engine)
    if not all(rank["hidden"] for rank in found):
        pytest.skip("no folder can be hidden from one process here: that needs root")
    for rank in found:
        kind, message = rank["error"]
        assert kind == "FileNotFoundError"
        assert message.startswith("Round 1 is put back on no rank, from ")
        assert message.endswith(": not seen by rank 1.")
        assert rank["unchanged"]


def test_stop_of_two_ranks_that_do_not_see_the_same_rounds_leaves_both_as_they_are(tmp_path):
    first, second = of_ranks("stopping_unseen", tmp_path)
    assert same(first["weights"], second["weights"])
    assert same(first["masks"], second["masks"])
    for rank in (first, second):
        assert rank["round"] == 5
        (text,) = rank["warnings"]
        assert text.startswith("sap: the module stays as it is after round 5. Round 3 is put back on no rank, ")
        assert "not seen by rank 1" in text
        assert "The module holds round 5" in rank["report"]


@pytest.mark.parametrize("engine", ENGINES)
def test_full_disk_of_two_ranks_is_told_and_training_goes_on(full, engine):
    first, second = by_engine(full, engine)
    assert same(first["weights"], second["weights"])
    for rank in (first, second):
        assert rank["paths"] == [True, False, False]
        assert rank["files"] == ["sap-round-000.ckpt"]
    told = [text for text in first["told"] if "is not saved" in text]
    assert len(told) == 2
    assert all("No space left on device" in text for text in told)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_agree_on_the_identity_and_go_on_in_their_files(branches, engine):
    found = by_engine(branches, engine)
    assert found[0]["runs"] == found[1]["runs"]
    for rank in found:
        first, again = rank["runs"]
        assert first == again
        assert len(first) == 1
        assert rank["digests"][0] == rank["digests"][1]
        assert None not in rank["digests"][0]
        assert rank["told"] == []
        assert rank["restored"]


@pytest.mark.parametrize("engine", ENGINES)
def test_branch_of_two_ranks_gets_a_folder_of_its_own(branches, engine):
    found = by_engine(branches, engine)
    assert found[0]["branch"] == found[1]["branch"]
    for rank in found:
        (old, _, _), (new, parent, _), (last, _, folder) = rank["branch"]
        assert old == parent != new == last
        assert folder == "rounds-v1"
        assert rank["own"] == ["sap-round-002.ckpt"]
        assert rank["files"] == [f"sap-round-00{t}.ckpt" for t in range(3)]
        assert rank["kept"]
    assert any("It stays; from now on this is a run of its own" in text for text in found[0]["branch told"])
