"""The number of steps of an epoch is never taken as constant."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from scheduling import Recording, Stream, fit, pruning, rates
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset

from lightning_sap.rewind import Moment


def line(steps):
    """From 1 straight down to 0 after so many steps."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


class Changing(Recording):
    """Its dataloader has another length in each epoch."""

    def __init__(self, lengths, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths = lengths

    def train_dataloader(self):
        return DataLoader(torch.randn(self.lengths[self.trainer.current_epoch % len(self.lengths)], 4))


def train(module, *callbacks, max_epochs=8, data=None, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu", max_epochs=max_epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return rates(module.trace)


def halves(lr_schedule="squeeze"):
    return pruning(lr_schedule, rounds=1, every_n_epochs=4)


class TestADataloaderThatTrainingMakesAnew:
    @pytest.mark.parametrize("lengths", [(16, 12, 8, 4), (4, 8, 12, 16)])
    def test_every_round_walks_from_the_first_value_to_the_last(self, lengths):
        module = Changing(lengths, line(80), interval="step")
        seen = train(module, halves(), reload_dataloaders_every_n_epochs=1)
        first, second = seen[:40], seen[40:]
        assert len(seen) == 80
        assert second == first
        assert first == sorted(first, reverse=True)
        assert (first[0], first[-1]) == (0.1, pytest.approx(0.1 / 80))
        assert min(first[:-1]) > 0.1 / 80
        assert len(set(first)) > 30

    def test_the_same_schedule_per_epoch(self):
        module = Changing((4, 8, 12, 16), line(8))
        seen = train(module, halves(), reload_dataloaders_every_n_epochs=1)
        # place e * S + k of 4 * S, for S batches in epoch e
        places = [(e * s + k, 4 * s) for e, s in enumerate((4, 8, 12, 16)) for k in range(s)]
        positions = [round(place * 7 / (n - 1)) for place, n in places]
        assert positions == sorted(positions)
        assert seen == pytest.approx([0.1 * (1 - p / 8) for p in positions] * 2)

    def test_restarted_it_follows_the_steps(self):
        module = Changing((4, 8, 12, 16), line(80), interval="step")
        seen = train(module, halves("restart"), reload_dataloaders_every_n_epochs=1)
        assert seen == pytest.approx([0.1 * (1 - step / 80) for step in range(40)] * 2)

    def test_restarted_at_a_frequency_it_counts_the_batches_of_each_epoch_as_lightning_does(self):
        def module():
            return Changing((3, 5), line(16), interval="step", frequency=2)

        alone = train(module(), max_epochs=4, reload_dataloaders_every_n_epochs=1)
        assert train(module(), halves("restart"), reload_dataloaders_every_n_epochs=1) == alone * 2

    def test_a_cycle_with_an_end_of_its_own_reaches_it(self):
        module = Changing((4, 8, 12, 16), lambda o: OneCycleLR(o, 0.1, total_steps=40), interval="step")
        seen = train(module, halves(), reload_dataloaders_every_n_epochs=1)
        first, second = seen[:40], seen[40:]
        assert second == first
        assert max(first) > 0.099
        assert first[-1] == pytest.approx(4e-7)

    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze"])
    def test_equal_lengths_are_as_without(self, lr_schedule):
        traces = [
            train(Changing((6,), line(48), interval="step"), halves(lr_schedule), reload_dataloaders_every_n_epochs=n)
            for n in (0, 1)
        ]
        assert traces[0] == traces[1]


class TestAnotherBatchSizeAfterAResume:
    @pytest.mark.parametrize(("interval", "ticks"), [("step", 64), ("epoch", 8)])
    @pytest.mark.parametrize("after", [4, 16])  # batches of an epoch, 8 before
    def test_the_round_goes_on_to_its_end(self, tmp_path, after, interval, ticks):
        class Save(Callback):
            def on_train_epoch_end(self, trainer, module):
                if trainer.current_epoch == 4:  # the first of the second round
                    trainer.save_checkpoint(tmp_path / "file.ckpt")

        def module():
            return Recording(line(ticks), interval=interval)

        train(module(), halves(), Save(), max_epochs=8, data=DataLoader(torch.randn(8, 4)))
        resumed = train(module(), halves(), data=DataLoader(torch.randn(after, 4)), ckpt_path=tmp_path / "file.ckpt")
        places = [round((e * after + k) * (ticks - 1) / (4 * after - 1)) for e in (1, 2, 3) for k in range(after)]
        # the last step before the file moved on by the length of its epoch, 8
        places = [max(place, round(8 * (ticks - 1) / 31)) for place in places]
        assert resumed == pytest.approx([0.1 * (1 - place / ticks) for place in places])


class Lying(Dataset):
    """Says that it has 16 samples; a sampler gives fewer."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.ones(4) * index / 16


class ShortSampler:
    def __init__(self, gives):
        self.gives = gives

    def __len__(self):
        return 16

    def __iter__(self):
        return iter(range(self.gives))


class TestALoaderWhoseLengthIsWrong:
    def data(self, gives=12):
        return DataLoader(Lying(), sampler=ShortSampler(gives))

    def test_the_round_ends_at_the_last_value_and_that_is_said_once(self):
        module = Recording(line(128), interval="step")
        with pytest.warns(UserWarning, match="says that an epoch has 16 batches, and gave 12") as caught:
            seen = train(module, halves(), data=self.data())
        assert sum("says that an epoch" in str(each.message) for each in caught) == 1
        first, second = seen[:48], seen[48:]
        assert (first[0], second[0]) == (0.1, 0.1)
        assert (first[-1], second[-1]) == (pytest.approx(0.1 / 128), pytest.approx(0.1 / 128))
        assert second == pytest.approx([0.1 * (1 - round(s * 127 / 47) / 128) for s in range(48)])
        assert first == sorted(first, reverse=True)

    @pytest.mark.parametrize("lr_schedule", ["restart", "keep"])
    def test_where_nothing_is_squeezed_nothing_is_said(self, lr_schedule):
        seen = train(Recording(line(128), interval="step"), halves(lr_schedule), data=self.data())  # no warning
        assert seen[48] == pytest.approx({"restart": 0.1, "keep": 0.1 * 80 / 128}[lr_schedule])

    def test_a_resumed_run_remembers_what_the_epoch_before_gave(self, tmp_path):
        class Save(Callback):
            def on_train_epoch_end(self, trainer, module):
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

        with pytest.warns(UserWarning, match="says that an epoch has 16"):
            whole = train(Recording(line(128), interval="step"), halves(), Save(), data=self.data())
        for epoch in (0, 3, 5):
            module = Recording(line(128), interval="step")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resumed = train(module, halves(), data=self.data(), ckpt_path=tmp_path / f"{epoch}.ckpt")
            assert resumed == whole[12 * (epoch + 1) :]


class Growing(Dataset):
    """Four more samples in each epoch."""

    length = 4

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.ones(4)


class TestOtherLengthsThatAreNotKept:
    def test_a_sampler_that_says_too_few_ends_with_what_it_says(self):
        """Lightning stops there."""
        sampler = ShortSampler(16)
        sampler.__class__ = type("Long", (ShortSampler,), {"__len__": lambda self: 8})
        seen = train(Recording(line(64), interval="step"), halves(), data=DataLoader(Lying(), sampler=sampler))
        assert seen == pytest.approx([0.1 * (1 - round(s * 63 / 31) / 64) for s in range(32)] * 2)

    def test_a_data_set_that_grows_is_as_long_as_when_training_began(self):
        """Unless the dataloader is made anew."""
        data = Growing()

        class Grow(Callback):
            def on_train_epoch_end(self, trainer, module):
                data.length += 4

        seen = train(Recording(line(32), interval="step"), halves(), Grow(), data=DataLoader(data))
        assert seen == pytest.approx([0.1 * (1 - round(s * 31 / 15) / 32) for s in range(16)] * 2)

    @pytest.mark.parametrize(
        ("options", "steps"), [({"limit_train_batches": 0.5}, 20), ({"accumulate_grad_batches": 3}, 15)]
    )
    def test_changing_lengths_that_are_limited_or_accumulated(self, options, steps):
        module = Changing((4, 8, 12, 16), line(2 * steps), interval="step")
        seen = train(module, halves(), reload_dataloaders_every_n_epochs=1, **options)
        first, second = seen[:steps], seen[steps:]
        assert second == first
        assert (first[0], first[-1]) == (0.1, pytest.approx(0.1 / (2 * steps)))
        assert first == sorted(first, reverse=True)


class TestEpochsThatTheModuleCutsShort:
    def test_the_round_reaches_its_end(self):
        class Skips(Recording):
            def on_train_batch_start(self, batch, batch_idx):
                return -1 if batch_idx == 3 else None

        with pytest.warns(UserWarning, match="says that an epoch has 5 batches, and gave 3"):
            seen = train(Skips(line(8)), halves(), data=DataLoader(torch.randn(5, 4)))
        first, second = seen[:12], seen[12:]
        assert second == pytest.approx([0.1 * (1 - round(s * 7 / 11) / 8) for s in range(12)])
        assert first[-1] == pytest.approx(0.1 / 8)


class TestAccumulationThatChanges:
    def test_an_epoch_schedule_is_walked_by_the_steps_that_are_taken(self):
        seen = train(
            Recording(line(8)),
            halves(),
            GradientAccumulationScheduler({0: 1, 2: 3}),
            data=DataLoader(torch.randn(6, 4)),
        )
        steps = [(e, k, 6 if e < 2 else 2) for e in range(4) for k in range(6 if e < 2 else 2)]
        first = [0.1 * (1 - round((e * s + k) * 7 / (4 * s - 1)) / 8) for e, k, s in steps]
        second = [0.1 * (1 - round(s * 7 / 7) / 8) for s in range(8)]
        assert seen == pytest.approx(first + second)


class TestDataWithoutALength:
    def test_a_schedule_per_epoch_is_walked_by_epochs(self):
        trace = fit(Recording(line(9)), pruning("squeeze"), data=DataLoader(Stream()))
        assert rates(trace)[:: Stream.LENGTH] == pytest.approx([0.1, 0.1 * 5 / 9, 0.1 / 9] * 3)

    def test_rounds_of_one_epoch_that_stand_at_the_foot_of_a_warm_up_are_warned_of(self):
        def module():
            return Recording(lambda o: LambdaLR(o, lambda epoch: epoch / 4))

        callback = pruning("squeeze", rounds=4, every_n_epochs=1)
        with pytest.warns(
            UserWarning, match="the learning rate of a round is 0 at most, and the schedule goes up to 0.1"
        ):
            fit(module(), callback, data=DataLoader(Stream()), max_epochs=5)
        kept = fit(module(), pruning("auto", rounds=4, every_n_epochs=1), data=DataLoader(Stream()), max_epochs=5)
        assert kept == fit(module(), data=DataLoader(Stream()), max_epochs=5)


class TestTrainingLimitedBySteps:
    def test_the_last_round_reaches_the_last_value_in_mid_epoch(self):
        module = Recording(line(38), interval="step")
        seen = train(module, pruning("squeeze"), data=DataLoader(torch.randn(5, 4)), max_epochs=9, max_steps=38)
        positions = [round(s * 37 / 14) for s in range(15)] * 2 + [round(s * 37 / 7) for s in range(8)]
        assert seen == pytest.approx([0.1 * (1 - p / 38) for p in positions])


class TestARoundThatBeginsInMidEpoch:
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    def test_it_walks_from_the_first_value_to_the_last(self, tmp_path):
        class Save(Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 7:  # the second of the five steps of epoch 1
                    trainer.save_checkpoint(tmp_path / "dense.ckpt")

        data = DataLoader(torch.randn(5, 4))
        train(Recording(line(25), interval="step"), Save(), max_epochs=2, data=data)
        module, callback = Recording(line(25), interval="step"), pruning("squeeze", rounds=1, every_n_epochs=2)
        seen = train(module, callback, max_epochs=5, data=data, ckpt_path=tmp_path / "dense.ckpt")
        positions = [round(s * 24 / (n - 1)) for n in (8, 10) for s in range(n)]
        assert seen == pytest.approx([0.1 * (1 - p / 25) for p in positions])


class TestMoment:
    def test_of_equal_epochs_is_exact_and_ends_in_the_last_step(self):
        moments = [Moment.of_epochs(s, s // 5, 3, s % 5, 5) for s in range(15)]
        assert [(moment.place, moment.places) for moment in moments] == [(s, 15) for s in range(15)]

    @pytest.mark.parametrize("lengths", [(16, 12, 8, 4), (4, 8, 12, 16), (1, 9, 1, 30), (7, 1, 1, 1)])
    def test_share_never_falls_and_ends_at_one(self, lengths):
        shares = [
            moment.place / (moment.places - 1)
            for epoch, n in enumerate(lengths)
            for step in range(n)
            for moment in [Moment.of_epochs(0, epoch, len(lengths), step, n)]
        ]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0, 1)

    def test_a_round_that_began_in_mid_epoch_starts_with_the_first_place(self):
        moments = [Moment.of_epochs(s, *divmod(s + 2, 5)[:1], 2, (s + 2) % 5, 5, late=2) for s in range(8)]
        assert [(moment.place, moment.places) for moment in moments] == [(s, 8) for s in range(8)]

    @pytest.mark.parametrize(("per_epoch", "epochs"), [(4, [0, 0, 0, 0, 1, 1]), (None, [7, 7, 7, 7, 7, 7])])
    def test_of_steps_counts_epochs_from_its_own_start(self, per_epoch, epochs):
        moments = [Moment.of_steps(s, 7, 6, per_epoch) for s in range(6)]
        assert [moment.epochs for moment in moments] == epochs
        assert [(moment.place, moment.places) for moment in moments] == [(s, 6) for s in range(6)]


def test_a_cosine_of_training_ends_at_its_foot_in_every_round():
    seen = train(
        Changing((3, 9), lambda o: CosineAnnealingLR(o, 48), interval="step"),
        pruning("squeeze", rounds=3, every_n_epochs=2),
        reload_dataloaders_every_n_epochs=1,
    )
    ends = [seen[i] for i in (11, 23, 35, 47)]
    assert ends == [ends[0]] * 4
    assert ends[0] < 0.001
