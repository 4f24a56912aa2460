"""A resumed run equals the unbroken one, bit for bit."""

import pytest
from helpers import (
    BATCHES,
    OPTIMIZERS,
    Crash,
    Net,
    Scheduled,
    Watch,
    all_masked_are_zero,
    crash_in,
    data,
    fit,
    half,
    mlp,
    same,
    seeded,
    survivors,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import records_of, run_saving_epochs
from torch.utils.data import DataLoader

from lightning_sap import SAPCallback


class TestResume:
    @pytest.mark.parametrize("epoch", [2, *(pytest.param(other, marks=pytest.mark.slow) for other in (0, 1, 3, 4))])
    @pytest.mark.parametrize("validate", [False, True], ids=["epoch-end file", "validation-end file"])
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_resume_after_a_crash_equals_unbroken_run(self, tmp_path, rewind, validate, epoch):
        def pruner():
            return half(every_n_epochs=2, rewind_weights=rewind, reset_optimizer=False)

        module, whole, monitor, trainer = run_saving_epochs(Scheduled, pruner, tmp_path / "whole", validate=validate)
        # the savers come last, so the file of the epoch before the next one's first batch is there
        killer = crash_in("on_train_epoch_start", epoch + 1)
        with pytest.raises(Crash):
            run_saving_epochs(Scheduled, pruner, tmp_path / "part", killed=killer, validate=validate)
        file = tmp_path / "part" / f"epoch={epoch}.ckpt"
        other, resumed, second, last = run_saving_epochs(
            lambda: Scheduled(seeded(mlp, 7)), pruner, tmp_path / "part", ckpt_path=file, validate=validate
        )
        assert same(other.state_dict(), module.state_dict())
        assert same(resumed.masks, whole.masks)
        assert sum(survivors(resumed).values()) == 18
        assert records_of(resumed) == records_of(whole)
        assert second.rows() == monitor.rows()
        assert last.global_step == trainer.global_step
        rates = [t.optimizers[0].param_groups[0]["lr"] for t in (trainer, last)]
        assert rates[0] == rates[1]

    @pytest.mark.filterwarnings("ignore:sap. after pruning .* no weights")
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("rewind", ["init", 1])
    def test_resume_with_every_optimizer_equals_unbroken_run(self, tmp_path, optimizer, rewind):
        def module():
            return Net(optimizer=OPTIMIZERS[optimizer])

        def pruner():
            return SAPCallback(rounds=2, rewind_weights=rewind, target_remaining=0.3)

        first, whole, *_ = run_saving_epochs(module, pruner, tmp_path)
        second, resumed, *_ = run_saving_epochs(module, pruner, tmp_path / "again", ckpt_path=tmp_path / "epoch=2.ckpt")
        assert same(first.state_dict(), second.state_dict())
        assert same(whole.masks, resumed.masks)
        assert sum(survivors(resumed).values()) == round(0.3 * 72)

    @pytest.mark.parametrize("step", range(1, 11))
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_resume_from_any_batch_equals_unbroken_run(self, tmp_path, rewind, step):
        """All batches are alike: a DataLoader does not know where it stopped."""
        alike = DataLoader([data(1)[0]] * 24, 8)

        def part(folder, **options):
            module, pruner = Scheduled(), half(rewind_weights=rewind, every_n_epochs=2)
            saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
            fit(module, pruner, saver, train=alike, enable_checkpointing=True, **options)
            return module, pruner

        first, whole = part(tmp_path)
        second, resumed = part(tmp_path / "again", ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(first.state_dict(), second.state_dict())
        assert same(whole.masks, resumed.masks)

    def test_resume_with_more_epochs_keeps_the_rounds(self, tmp_path):
        _, whole, *_ = run_saving_epochs(Net, lambda: half(rounds=2, every_n_epochs=None), tmp_path, max_epochs=6)
        _, resumed, *_ = run_saving_epochs(
            Net, lambda: half(rounds=2, every_n_epochs=None), tmp_path / "b", ckpt_path=tmp_path / "epoch=1.ckpt",
            max_epochs=12,
        )  # fmt: skip
        assert [(r.first_epoch, r.last_epoch) for r in resumed.history] == [(0, 1), (2, 3), (4, 11)]
        assert same(resumed.masks, whole.masks)

    def test_resume_of_a_finished_run_hands_back_its_masks(self, tmp_path):
        module, whole, *_ = run_saving_epochs(Net, half, tmp_path, max_epochs=4)
        other, resumed, *_ = run_saving_epochs(
            Net, half, tmp_path / "b", ckpt_path=tmp_path / "epoch=3.ckpt", max_epochs=4
        )
        assert same(resumed.masks, whole.masks)
        assert same(other.state_dict(), module.state_dict())
        assert resumed.remaining == 0.125

    def test_resume_from_a_file_without_a_pruner_starts_rounds_there(self, tmp_path):
        fit(Net(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), enable_checkpointing=True, max_epochs=2)
        pruner = half(rounds=2, every_n_epochs=None)
        fit(Net(), pruner, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=8)
        assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(2, 3), (4, 5), (6, 7)]

    def test_resume_gives_two_callbacks_their_own_states(self, tmp_path):
        def both():
            return half(name="a", include="net.0.*"), SAPCallback(name="b", include="net.3.*", rounds=3)

        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        first, second = Net(), Net(seeded(mlp, 7))
        whole, resumed = both(), both()
        fit(first, *whole, saver, enable_checkpointing=True)
        fit(second, *resumed[::-1], ckpt_path=tmp_path / "epoch=1.ckpt")
        assert same(first.state_dict(), second.state_dict())
        assert [same(a.masks, b.masks) for a, b in zip(whole, resumed, strict=True)] == [True, True]

    def test_resume_of_a_run_limited_by_steps_keeps_its_plan(self, tmp_path):
        """Lightning alone does not resume such a run bit for bit."""

        def rates(*callbacks, **options):
            seen, pruner = [], half(every_n_epochs=None, rounds=1, lr_schedule="squeeze")
            look = Watch(on_train_epoch_start=lambda t, m: seen.append(t.optimizers[0].param_groups[0]["lr"]))
            fit(Scheduled(), pruner, look, *callbacks, max_epochs=20, max_steps=6 * BATCHES, **options)
            assert [(r.first_epoch, r.last_epoch) for r in pruner.history] == [(0, 2), (3, 5)]
            return seen

        whole = rates(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), enable_checkpointing=True)
        assert rates(ckpt_path=tmp_path / "epoch=3.ckpt") == whole[4:]
        assert whole[:3] == whole[3:]

    def test_resume_masks_weights_that_came_dense_before_the_first_batch(self, tmp_path):
        """As those of a file whose weights someone averaged."""
        run_saving_epochs(Net, half, tmp_path, max_epochs=4)
        module, pruner, clean = Net(), half(), []
        module.on_load_checkpoint = lambda checkpoint: checkpoint["state_dict"]["net.0.weight"].fill_(1.0)
        look = Watch(on_train_start=lambda t, m: clean.append(all_masked_are_zero(t, m)))
        fit(module, pruner, look, ckpt_path=tmp_path / "epoch=2.ckpt")
        assert clean == [True]
        assert int(pruner.masks["net.0.weight"].sum()) == 6
