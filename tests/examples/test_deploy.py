"""The example of a small file: what it prints, and what it leaves."""

import importlib
import re

import pytest
import torch


@pytest.fixture
def deploy(examples):
    """The example, which trains on one thread."""
    threads = torch.get_num_threads()
    yield importlib.import_module("deploy")
    torch.set_num_threads(threads)


def tensors_in(path):
    """Bytes of a `.safetensors` file behind its header, which says in its first 8 bytes how long it is."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_the_example_leaves_a_smaller_and_faster_network_within_a_point_and_a_half(deploy, capsys):
    pytest.importorskip("torch_pruning")
    deploy.main()
    printed = capsys.readouterr().out
    remaining = float(re.search(r"([\d.]+)% of the weights remain", printed)[1])
    dense, pruned = (float(found) for found in re.findall(r"([\d.]+)%", printed.partition("test accuracy")[2]))
    sizes = {name: float(size) for name, size in re.findall(r"^(\S+)\s+([\d.]+) kB", printed, re.MULTILINE)}
    times = dict(re.findall(r"^(\S+) .* in ([\d.]+) ms", printed, re.MULTILINE))
    assert remaining < 25
    assert pruned >= dense - 1.5  # on other images than those it was searched by
    assert sizes["packed.safetensors"] < 0.3 * sizes["dense.pt"]
    eight_bits, packed = (tensors_in(deploy.FOLDER / f"{name}.safetensors") for name in ("int8", "packed"))
    assert eight_bits < 0.5 * packed
    assert float(times["small.pt"]) < 0.6 * float(times["dense.pt"])
    assert {path.name for path in deploy.FOLDER.iterdir()} == set(sizes)
