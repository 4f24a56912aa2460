"""Two processes that gather scores, replicated and sharded, beside one process; and resumed in the midst of it."""

import pytest
import torch
from distributed import scores
from launch import run_ranks
from resuming import equal

pytestmark = pytest.mark.slow

SHORT = [("ddp", "wanda"), ("ddp", "fisher"), ("fsdp2", "taylor"), ("fsdp2", "wanda")]
OLD = "FSDP2 over gloo: PyTorch 2.6 cannot, 2.7 and 2.8 sum the gradients instead of averaging them"
every_way = pytest.mark.parametrize(
    "way", [*SHORT, pytest.param(("ddp", "taylor"), marks=pytest.mark.full)], ids="-".join
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    folder, ways = tmp_path_factory.mktemp("ranks"), [*SHORT]
    if request.config.getoption("--full"):
        ways.append(("ddp", "taylor"))
    if torch.__version__ < "2.9":
        ways = [way for way in ways if way[0] == "ddp"]
    torch.save(ways, folder / "ways.pt")
    return run_ranks("distributed.scores:everything", folder)


def of_way(ranks, way):
    if way not in ranks[0]:
        pytest.skip(OLD)
    return [found[way] for found in ranks]


@every_way
def test_scores_are_of_the_data_of_all_ranks(ranks, way, tmp_path):
    engine, importance = way
    alone = scores.fit(tmp_path, importance)
    both = [through for through, _ in of_way(ranks, way)]
    for name, wanted in alone["scores"].items():
        parts = [found["scores"][name] for found in both]
        if engine == "ddp":
            assert torch.equal(*parts)
        found = torch.cat(parts) if engine == "fsdp2" else parts[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for found in both:
        assert equal(found["masks"], alone["masks"])
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-4, atol=1e-6)


@every_way
def test_runs_resumed_in_the_midst_equal_the_unbroken_ones(ranks, way):
    for through, resumed in of_way(ranks, way):
        assert through["scores"]
        assert equal(resumed, through)
