"""What is copied to go back to: what training changes, and nothing else; and what of it stays."""

import copy
import warnings

import pytest
import torch
from helpers import BATCHES, OPTIMIZERS, Crash, Net, Watch, copied, crash, fit, half, loader, mlp, same, seeded
from resuming import Alike
from searching import Scored, searching
from torch import nn
from torch.utils.data import DataLoader

from lightning_sap import FixedFraction, Pruner


class Distilled(Net):
    """A network, a frozen teacher, a table that no file holds; the optimizer holds all parameters."""

    def __init__(self, teacher=lambda net: seeded(mlp, 5), thaws=None, moves=None):
        super().__init__()
        self.teacher = teacher(self.net).requires_grad_(False)
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.thaws, self.moves = thaws, moves

    def on_train_epoch_start(self):
        if self.current_epoch == self.thaws:
            self.teacher.requires_grad_(True)

    def loss(self, batch):
        return super().loss(batch) + 0.1 * (self.teacher(batch[0]) - batch[1]).square().mean()

    def on_train_batch_end(self, *_):
        self.table += 1
        if self.moves:
            with torch.no_grad():
                for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    mine.lerp_(other, self.moves)


def snapshot(pruner):
    return pruner.session.state.first_weights


def looking(pruner, seen, module_too=True):
    """At the first batch of each epoch: the names of the copies, and the module's values."""

    def look(trainer, module):
        seen.append((set(snapshot(pruner) or ()), copied(module.state_dict())))

    return Watch(on_train_batch_start=lambda t, m: look(t, m) if t.global_step % BATCHES == 0 else None)


MATRICES = {"teacher.0.weight", "teacher.3.weight"}


class TestWhatIsCopied:
    def test_a_teacher_and_what_no_file_holds_are_not_copied(self):
        module, pruner, seen = Distilled(), half(rewind_weights="init"), []
        first = copied(module.state_dict())
        fit(module, pruner, looking(pruner, seen))
        assert seen[0][0] == set(first) - MATRICES
        assert same({n: module.state_dict()[n] for n in MATRICES}, {n: first[n] for n in MATRICES})
        assert module.table.tolist() == [12.0] * 3  # not rewound, as no file would

    def test_the_state_of_a_checkpoint_has_no_teacher(self, tmp_path):
        module, pruner = Distilled(), half(rewind_weights="init")
        fit(
            module,
            pruner,
            Watch(on_train_epoch_end=lambda t, m: t.save_checkpoint(tmp_path / f"{t.current_epoch}.ckpt")),
        )
        saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["callbacks"]["lightning_sap/sap"]["first_weights"]
        assert set(saved) == set(module.state_dict()) - MATRICES

    def test_a_search_keeps_no_teacher_either(self):
        class Both(Scored, Distilled):
            def __init__(self, scores):
                super().__init__(scores)
                self.teacher = seeded(mlp, 5).requires_grad_(False)

        module, pruner, seen = Both([0.9, 0.9, 0.5, 0.9]), searching(), []
        look = Watch(on_train_batch_start=lambda t, m: seen.append(pruner.session.state.kept))
        fit(module, pruner, look, val=loader(), num_sanity_val_steps=0)
        kept = [each.weights for each in seen if each is not None]
        assert kept
        assert all(set(weights) == set(module.state_dict()) - MATRICES for weights in kept)

    def test_a_momentum_encoder_is_copied_and_goes_back(self):
        module, pruner, seen = Distilled(copy.deepcopy, moves=0.5), half(rewind_weights="init", rounds=2), []
        first = copied(module.state_dict())
        fit(module, pruner, looking(pruner, seen))
        names, second = seen[1]
        assert names == set(first)
        kept = pruner.masks["net.0.weight"]
        assert not torch.equal(module.teacher[0].weight, first["teacher.0.weight"])
        assert torch.equal(second["teacher.0.weight"][kept], first["teacher.0.weight"][kept])
        assert torch.equal(second["teacher.0.bias"], first["teacher.0.bias"])

    @pytest.mark.parametrize("optimizer", ["SGD with momentum", "Adam"])
    def test_what_is_trained_later_is_copied_before_its_first_step_and_goes_back(self, optimizer):
        module = Distilled(thaws=1)
        module.optimizer = OPTIMIZERS[optimizer]
        pruner, seen, ends = half(rewind_weights="init", every_n_epochs=2, rounds=2), [], []
        first = copied(module.state_dict())
        keep = Watch(on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())))
        fit(module, pruner, looking(pruner, seen), keep, max_epochs=6)
        assert seen[1][0] == set(first) - MATRICES
        assert seen[2][0] == set(first)
        for name in MATRICES:
            assert not torch.equal(ends[1][name], first[name])
            mask = pruner.masks[name]
            assert torch.equal(seen[2][1][name][mask], first[name][mask])

    def test_what_is_trained_after_a_resume_goes_back_too(self, tmp_path):
        def run(*callbacks, **options):
            module, pruner = Distilled(thaws=1), half(rewind_weights="init", every_n_epochs=2, rounds=2)
            fit(module, pruner, *callbacks, max_epochs=6, train=DataLoader(Alike(2), 8), **options)
            return module.state_dict()

        def kill(trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                crash()

        whole = run()
        with pytest.raises(Crash):
            run(Watch(on_train_epoch_end=kill))
        assert same(run(ckpt_path=tmp_path / "killed.ckpt"), whole)

    @pytest.mark.filterwarnings("ignore:sap. these weights change without a gradient")
    def test_frozen_weights_that_move_by_hand_are_said(self):
        module = Distilled(moves=0.5)  # it begins with other values than the network
        with pytest.warns(
            UserWarning, match=r"^sap: these are frozen, .* changed all the same: teacher\.0\.weight, teacher\.3"
        ):
            fit(module, half(rewind_weights="init"))


class Observed(nn.Module):
    """A linear layer with an observer for each output unit, as of quantization-aware training; empty at first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("largest", torch.tensor([]))

    def forward(self, inputs):
        now = self.linear.weight.detach().abs().amax(1)
        self.largest = now if not self.largest.numel() else torch.maximum(self.largest, now)
        return self.linear(inputs)


class TestBuffers:
    def test_an_observer_that_was_empty_stays_and_is_said_once(self):
        module, pruner, largest = Net(Observed()), half(rewind_weights="init"), []
        first = copied(module.state_dict())
        keep = Watch(on_train_epoch_start=lambda t, m: largest.append(copied(m.state_dict())))
        with pytest.warns(UserWarning, match=r"^sap: these buffers changed their shape .*: net\.largest\.") as caught:
            fit(module, pruner, keep)
        assert sum("changed their shape" in str(each.message) for each in caught) == 1
        for state in largest[1:]:
            assert (state["net.largest"] > 0).all()
            kept = state["net.linear.weight"] != 0
            assert torch.equal(state["net.linear.weight"][kept], first["net.linear.weight"][kept])
        assert pruner.remaining == 3 / 18

    @pytest.mark.filterwarnings("ignore:sap. these buffers changed their shape")
    def test_a_run_with_an_observer_is_resumed_from_where_it_was_killed(self, tmp_path):
        def run(*callbacks, **options):
            module = Net(seeded(Observed))
            fit(module, half(rewind_weights="init"), *callbacks, train=DataLoader(Alike(2), 8), **options)
            return copied(module.state_dict())

        def kill(trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                crash()

        whole = run()
        with pytest.raises(Crash):
            run(Watch(on_train_epoch_end=kill))
        saved = torch.load(tmp_path / "killed.ckpt", weights_only=True)

        def grown(trainer, module):  # as observers of PyTorch do when a file is loaded
            module.net.largest = torch.zeros(3)

        module = Net(seeded(Observed))
        module.on_load_checkpoint = lambda checkpoint: grown(None, module)
        fit(module, half(rewind_weights="init"), train=DataLoader(Alike(2), 8), ckpt_path=tmp_path / "killed.ckpt")
        assert saved["callbacks"]["lightning_sap/sap"]["first_weights"]["net.largest"].numel() == 0
        assert same(copied(module.state_dict()), whole)

    def test_quantization_aware_training_per_channel_is_rewound(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that this is to move elsewhere
            from torch.ao.quantization import get_default_qat_qconfig_mapping
            from torch.ao.quantization.quantize_fx import prepare_qat_fx

            network = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
            network = prepare_qat_fx(network.train(), get_default_qat_qconfig_mapping("fbgemm"), torch.zeros(2, 6))
        module, pruner, seen = Net(network), half(rewind_weights="init", lr_schedule="keep"), []
        first = copied(dict(module.named_parameters()))
        with pytest.warns(UserWarning, match=r"^sap: these buffers changed their shape"):
            fit(
                module, pruner, Watch(on_train_epoch_start=lambda t, m: seen.append(copied(dict(m.named_parameters()))))
            )
        assert pruner.remaining < 0.2
        for name, mask in pruner.masks.items():
            assert torch.equal(seen[-1][name][mask], first[name][mask])


def test_a_pruner_without_a_trainer_copies_no_teacher():
    module = nn.ModuleDict({"net": seeded(mlp), "teacher": seeded(mlp, 5).requires_grad_(False)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    pruner = Pruner(FixedFraction(0.5), rewind_weights="init").attach(module, optimizer)
    assert set(pruner.state_dict()["first_weights"]) == set(module.state_dict()) - MATRICES
    module["teacher"].requires_grad_(True)
    first = module["teacher"][0].weight.detach().clone()
    (module["net"](torch.ones(4, 6)) - module["teacher"](torch.ones(4, 6))).square().sum().backward()
    optimizer.step()
    pruner.prune()
    assert torch.equal(module["teacher"][0].weight, first)
