"""Memory for one chunk is kept by each thread."""

import threading

import torch

from lightning_sap import SparsityInformed, prune_masks
from lightning_sap.functional.scratch import SIZE, scratch


def address(size):
    return scratch(size).data_ptr()


def test_next_scratch_gets_the_same_memory():
    assert scratch(10).numel() == 10
    assert address(10) == address(SIZE)


def test_scratch_larger_than_is_kept_is_memory_of_its_own():
    large = scratch(SIZE + 1)
    assert large.numel() == SIZE + 1
    assert not address(1) <= large.data_ptr() < address(1) + SIZE


def test_each_thread_has_its_own_scratch():
    found = []
    thread = threading.Thread(target=lambda: found.append(address(10)))
    thread.start()
    thread.join()
    assert found != [address(10)]


def test_scratch_made_in_inference_mode_serves_outside_of_it():
    weights, found = {"w": torch.randn(300, 300)}, []
    for_both = {"policy": SparsityInformed(), "scope": "layer"}

    def prune():  # a thread that has no memory yet
        with torch.inference_mode():
            inside = prune_masks(weights, **for_both)["w"]
        found.append(torch.equal(inside, prune_masks(weights, **for_both)["w"]))

    thread = threading.Thread(target=prune)
    thread.start()
    thread.join()
    assert found == [True]


def test_scratch_is_on_the_cpu_whatever_the_default_device():
    found = []

    def ask():
        with torch.device("meta"):
            found.append(scratch(10).device.type)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == ["cpu"]
