"""A module that changed a little keeps its masks; masks may be given at the start; earlier histories stay."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import N, Net, fit, half, loader, same, seeded, survivors, zeros_of
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sap import PQIMonitor, SAPCallback, save_sparse


def once(**options):
    return half(rounds=1, **options)


class TestChangedModule:
    def test_a_head_that_grew_starts_dense_and_is_named_and_the_rest_keeps_its_masks(self):
        module, pruner = Net(), once()
        fit(module, pruner, max_epochs=2)
        before = pruner.masks["net.0.weight"]
        module.net[3] = nn.Linear(8, 5)
        module.net.append(nn.Linear(5, 3))
        message = (
            "sap: these masks of the fit before are left out, and their weights start dense: net.3.weight (its shape "
            "was (3, 8) and is (5, 8))."
        )
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
            fit(module, pruner, max_epochs=2)
        assert int(before.sum()) == 24
        assert not pruner.masks["net.0.weight"][~before].any()
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 20, "net.4.weight": 8}

    def test_a_new_layer_beside_them_starts_dense_without_a_word(self):
        module, pruner = Net(), once()
        fit(module, pruner, max_epochs=2)
        module.net.append(nn.Linear(3, 3))
        fit(module, pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6, "net.4.weight": 5}

    def test_weights_that_were_written_over_and_layers_that_are_gone_are_named(self):
        module, pruner = Net(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))), once()
        fit(module, pruner, max_epochs=2)
        module.net = nn.Sequential(module.net[0], nn.Linear(6, 6))
        with torch.no_grad():
            module.net[1].weight[:] = 1.0
        module.net.append(nn.Sequential(nn.Linear(6, 3)))
        with pytest.warns(UserWarning, match="masks of the fit before") as caught:
            fit(module, pruner, max_epochs=2)
        (text,) = {str(w.message) for w in caught if "masks of the fit before" in str(w.message)}
        assert text.endswith(
            "net.1.weight (what was pruned is no longer zero), net.2.weight (it is no prunable parameter now)."
        )
        assert survivors(pruner) == {"net.0.weight": 9, "net.1.weight": 18, "net.2.0.weight": 9}

    def test_where_no_mask_holds_it_starts_afresh_and_says_how_to_give_masks(self):
        pruner = once()
        fit(Net(), pruner, max_epochs=2)
        message = "starting afresh. To start it under masks, give them as masks=."
        with pytest.warns(UserWarning, match=re.escape(message)):
            fit(Net(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), 5)), pruner, max_epochs=2)

    def test_histories_of_earlier_fits_stay(self):
        module, pruner, histories = Net(), once(), []
        for _ in range(3):
            fit(module, pruner, max_epochs=2)
            histories.append(pruner.history)
        assert [list(each) for each in (*pruner.earlier, pruner.history)] == [list(each) for each in histories]
        assert [each[-1].remaining for each in histories] == [0.5, 0.25, 0.125]
        assert list(copy.deepcopy(pruner).earlier[0]) == list(histories[0])
        assert SAPCallback().earlier == ()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that saved its rounds, with a checkpoint, a packed file and a file of masks."""
    folder = tmp_path_factory.mktemp("run")
    module, pruner = Net(), once(save_rounds=True, dirpath=folder / "rounds")
    trainer = fit(module, pruner, max_epochs=2)
    trainer.save_checkpoint(folder / "end.ckpt")
    save_sparse(module, folder / "packed.safetensors")
    save_sparse(module, folder / "packed.sap")
    torch.save(pruner.masks, folder / "masks.pt")
    return folder, module, pruner


SOURCES = {
    "a mapping": lambda folder, pruner: pruner.masks,
    "a callback": lambda folder, pruner: pruner,
    "a history": lambda folder, pruner: pruner.history,
    "a record": lambda folder, pruner: pruner.history.of_round(1),
    "a round": lambda folder, pruner: pruner.history.of_round(1).path,
    "a checkpoint": lambda folder, pruner: folder / "end.ckpt",
    "a packed file": lambda folder, pruner: folder / "packed.safetensors",
    "a packed file of another suffix": lambda folder, pruner: folder / "packed.sap",
    "a saved mapping": lambda folder, pruner: str(folder / "masks.pt"),
}


def plain_safetensors(path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, 2)}, path)


def dense_packed(path):
    with pytest.warns(UserWarning, match="No tensor has zeros enough to be packed"):
        save_sparse(Net(), path)


BAD_FILES = {  # how it is written, and what is said of it
    "weights": (lambda path: torch.save(Net().state_dict(), path), " holds no masks: "),
    "a list": (lambda path: torch.save([1], path), " is damaged, or no file of masks: "),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), " is damaged, or no file of masks: "),
    "nothing in it": (lambda path: torch.save({}, path), " holds no masks: "),
    "a state of no fit": (
        lambda path: torch.save({"callbacks": {"lightning_sap/sap": SAPCallback().state_dict()}}, path),
        " holds no masks: it was saved before its callback was in a fit. ",
    ),
    "callbacks of no name": (lambda path: torch.save({"callbacks": [1]}, path), " holds no masks: "),
    "text": (lambda path: path.write_text("0.weight"), " is damaged, or no file of masks: "),
    "empty": (Path.touch, " is damaged, or no file of masks: "),
    "a folder": (Path.mkdir, " is a folder and no checkpoint, which would have a meta.pt: "),
    "plain safetensors": (plain_safetensors, ": .* is not a file of save_sparse;"),
    "packed and dense": (dense_packed, " has no zero in any matrix: it was not pruned. "),
}


class TestGiven:
    @pytest.mark.parametrize("source", SOURCES)
    def test_masks_from_anywhere_hold_from_the_start(self, run, source):
        folder, _, before = run
        pruner, module = (
            SAPCallback(rounds=0, masks=SOURCES[source](folder, before)),
            Net(seeded(lambda: run[1].net, 5)),
        )
        module = Net(copy.deepcopy(module.net))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)  # such as an average of clients
        fit(module, pruner, max_epochs=1)
        assert same(pruner.masks, before.masks)
        assert zeros_of(module) == N // 2

    def test_masks_are_pruned_further(self, run):
        pruner = once(masks=run[2])
        fit(Net(), pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}
        assert all(not (mask & ~run[2].masks[name]).any() for name, mask in pruner.masks.items())

    def test_what_does_not_fit_is_named_and_starts_dense(self, run):
        given = {**run[2].masks, "net.3.weight": torch.ones(4, 8, dtype=torch.bool), "net.9.weight": torch.ones(1) > 0}
        pruner = SAPCallback(rounds=0, masks=given)
        message = (
            "sap: these masks given in masks are left out, and their weights start dense: net.3.weight (its shape was "
            "(4, 8) and is (3, 8)), net.9.weight (it is no prunable parameter now)."
        )
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
            fit(Net(), pruner, max_epochs=1)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 24}

    def test_an_earlier_fit_comes_first_and_else_they_are_taken_again(self, run):
        module, pruner = Net(), once(masks=run[2])
        fit(module, pruner, max_epochs=2)
        fit(module, pruner, max_epochs=2)
        assert pruner.remaining == 0.125
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
        fit(module, pruner, max_epochs=2)
        assert pruner.remaining == 0.25

    def test_a_resumed_run_keeps_its_own(self, run, tmp_path):
        module, pruner = Net(), half(masks=run[2], rounds=2)
        trainer = fit(module, pruner, max_epochs=3)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        resumed = half(masks=run[2], rounds=2)
        fit(Net(), resumed, max_epochs=4, ckpt_path=tmp_path / "end.ckpt")
        assert same(resumed.masks, pruner.masks)

    @pytest.mark.parametrize(
        ("masks", "error", "message"),
        [
            (3, TypeError, "masks must be None, or a mapping from the names of parameters to bool tensors"),
            (
                {"w": torch.ones(2)},
                TypeError,
                "masks['w'] must be a bool tensor, True where a weight is kept, got torch.fl",
            ),
            ({}, ValueError, "masks is empty and names no parameter: give None to start dense, or a mask by its name."),
            ({"w": [True]}, TypeError, "masks['w'] must be a bool tensor, True where a weight is kept, got list."),
            ("nowhere.ckpt", FileNotFoundError, "masks='nowhere.ckpt': there is no such file."),
            (
                {"w": torch.ones(2) > 0},
                ValueError,
                "masks fits no prunable parameter of the module: w (it is no prunable",
            ),
            (SAPCallback(), ValueError, "masks=SAPCallback(…) was not in a fit yet, and has no masks."),
            (
                SAPCallback().history,
                ValueError,
                "masks=History(…) has 0 rounds, and none was saved. Give save_rounds=True",
            ),
        ],
    )
    def test_what_are_no_masks_is_refused(self, masks, error, message):
        with pytest.raises(error, match=re.escape(message)):
            fit(Net(), SAPCallback(rounds=0, masks=masks), max_epochs=1)

    def test_beside_keep_zeros_they_are_refused(self, run):
        with pytest.raises(ValueError, match=r"masks and keep_zeros=True both say what is pruned at the start\."):
            SAPCallback(masks=run[2].masks, keep_zeros=True)

    @pytest.mark.parametrize("kind", BAD_FILES)
    def test_a_file_without_masks_is_refused_by_its_name_and_told_what_is_taken(self, tmp_path, kind):
        write, message = BAD_FILES[kind]
        write(path := tmp_path / "given.pt")
        with pytest.raises(ValueError, match=f"^masks='{re.escape(str(path))}'{message}") as caught:
            fit(Net(), SAPCallback(rounds=0, masks=path), max_epochs=1)
        taken = "give a mapping from the names of parameters to bool tensors, True where a weight is kept; a path to a"
        assert taken in str(caught.value).replace("Give", "give")

    def test_a_checkpoint_whose_state_is_damaged_is_named(self, tmp_path):
        torch.save({"callbacks": {"lightning_sap/sap": {"masks": {"w": 3}}}}, tmp_path / "end.ckpt")
        with pytest.raises(ValueError, match=r"^masks='.*end\.ckpt': The pruning state of the checkpoint"):
            fit(Net(), SAPCallback(rounds=0, masks=tmp_path / "end.ckpt"), max_epochs=1)

    def test_rows_under_a_norm_may_not_be_empty(self):
        module = Net(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3)))
        mask = torch.ones(8, 6, dtype=torch.bool)
        mask[2:4] = False
        pruner = SAPCallback(rounds=0, masks={"net.0.parametrizations.weight.original1": mask})
        with pytest.raises(
            ValueError, match=r"masks leaves 2 rows of 'net\.0\..*' without a weight, and its layer divides"
        ):
            fit(module, pruner, max_epochs=1)


def test_federated_averaging_with_masks():
    """Clients train under the server's masks; their average is as sparse, and the server prunes it further."""
    server, masks = Net(), None
    for fraction in (1.0, 0.5, 0.25):
        clients = []
        for seed in (1, 2):
            client, pruner = (
                copy.deepcopy(server),
                once(masks=masks) if masks is None else SAPCallback(rounds=0, masks=masks),
            )
            fit(client, SAPCallback(rounds=0) if masks is None else pruner, train=loader(seed=seed), max_epochs=1)
            clients.append(client.state_dict())
        mean = {name: sum(state[name] for state in clients) / 2 for name in clients[0]}
        server.load_state_dict(mean)
        assert zeros_of(server) == round((1 - fraction) * N)
        pruner = once(masks=masks)
        fit(server, pruner, PQIMonitor(stop_on=None), max_epochs=2)
        masks = pruner.masks
    assert pruner.remaining == 0.125
