"""lr_schedule='squeeze' fits the whole schedule into each round; 'auto' chooses."""

import logging

import pytest
from scheduling import BATCHES, E, Recording, Stream, fit, per_epoch, pruning, rates
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    StepLR,
)
from torch.utils.data import DataLoader

pytestmark = pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch'")


class TestSqueeze:
    def squeezed(self, values, n):
        """What a round of n ticks shows of a schedule that, left alone, takes these values."""
        if n == 1:
            return values[:1]
        return [values[round(s * (len(values) - 1) / (n - 1))] for s in range(n)]

    @pytest.mark.parametrize("frequency", [1, 2])
    @pytest.mark.parametrize(
        ("max_epochs", "every_n_epochs", "lengths"),
        [
            (9, 3, [3, 3, 3]),
            (12, 4, [4, 4, 4]),
            (11, 3, [3, 3, 5]),  # a longer last round
            (4, 1, [1, 1, 2]),  # rounds of one epoch
            (3, 1, [1, 1, 1]),
        ],
    )
    def test_an_epoch_schedule_is_walked_by_steps(self, max_epochs, every_n_epochs, lengths, frequency):
        def module():
            return Recording(lambda o: CosineAnnealingLR(o, T_max=max_epochs), frequency=frequency)

        values = per_epoch(fit(module(), max_epochs=max_epochs))
        trace = fit(module(), pruning("squeeze", every_n_epochs=every_n_epochs), max_epochs=max_epochs)
        assert rates(trace) == [value for n in lengths for value in self.squeezed(values, n * BATCHES)]

    @pytest.mark.parametrize(("frequency", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
    @pytest.mark.parametrize("max_epochs", [9, 11])
    def test_squeeze_by_steps_samples_the_whole_schedule(self, max_epochs, frequency, accumulate):
        steps = -(-BATCHES // accumulate)

        def module():
            cycle = {"max_lr": 0.3, "total_steps": max_epochs * steps}
            return Recording(lambda o: OneCycleLR(o, **cycle), interval="step", frequency=frequency)

        options = {"max_epochs": max_epochs, "accumulate_grad_batches": accumulate}
        values = fit(module(), **options)
        trace = fit(module(), pruning("squeeze"), **options)
        lengths = [E * steps, E * steps, (max_epochs - 2 * E) * steps]
        expected = [value for n in lengths for value in self.squeezed(values, n)]
        assert trace == expected
        assert [trace[0], trace[lengths[0]]] == [values[0]] * 2
        assert [trace[lengths[0] - 1], trace[-1]] == [values[-1]] * 2

    def test_squeeze_gives_rates_computed_by_hand(self):
        trace = fit(Recording(lambda o: LambdaLR(o, lambda epoch: 9 - epoch)), pruning("squeeze"), max_epochs=9)
        positions = [0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8]  # round(s * 8 / 14) for the 15 steps of a round
        assert rates(trace) == pytest.approx([0.1 * (9 - p) for p in positions] * 3)

    def test_squeeze_counts_limited_batches(self):
        module = Recording(lambda o: LambdaLR(o, lambda step: 18 - step), interval="step")
        trace = fit(module, pruning("squeeze"), limit_train_batches=2)
        positions = [round(s * 17 / 5) for s in range(6)]
        assert rates(trace) == pytest.approx([0.1 * (18 - p) for p in positions] * 3)

    def test_squeeze_in_a_training_limited_by_steps(self):
        module = Recording(lambda o: LambdaLR(o, lambda step: 40 - step), interval="step")
        trace = fit(module, pruning("squeeze"), max_steps=40)
        whole, last = ([round(s * 39 / (n - 1)) for s in range(n)] for n in (15, 10))  # the last round is cut short
        assert rates(trace) == pytest.approx([0.1 * (40 - p) for p in whole * 2 + last])

    def test_squeeze_of_a_shorter_cycle_goes_to_its_own_end(self):
        def module():
            return Recording(lambda o: OneCycleLR(o, max_lr=0.3, total_steps=20), interval="step")

        values = fit(module(), max_epochs=4)
        assert fit(module(), pruning("squeeze")) == self.squeezed(values, 15) * 3

    def test_squeeze_of_steps_with_data_of_unknown_length_is_refused(self):
        module = Recording(lambda o: StepLR(o, 1), interval="step")
        with pytest.raises(ValueError, match="lr_schedule='squeeze' needs to know how many optimizer steps"):
            fit(module, pruning("squeeze"), data=DataLoader(Stream()))
        assert module.trace == []


class TestAuto:
    @pytest.mark.parametrize(
        ("name", "interval", "written_for", "mode"),
        [
            ("CosineAnnealingLR", "epoch", "training", "squeeze"),
            ("CosineAnnealingLR", "epoch", "round", "restart"),
            ("CosineAnnealingLR", "step", "training", "squeeze"),
            ("CosineAnnealingLR", "step", "round", "restart"),
            ("OneCycleLR", "epoch", "training", "squeeze"),
            ("OneCycleLR", "epoch", "round", "restart"),
            ("OneCycleLR", "step", "training", "squeeze"),
            ("OneCycleLR", "step", "round", "restart"),
        ],
    )
    def test_auto_says_what_it_chooses_and_does_it(self, name, interval, written_for, mode, caplog):
        ticks = (1 if interval == "epoch" else BATCHES) * (3 * E if written_for == "training" else E)

        def module():
            kinds = {
                "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=ticks),
                "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=ticks),
            }
            return Recording(kinds[name], interval=interval)

        with caplog.at_level(logging.INFO):
            trace = fit(module(), pruning("auto"))
        lines = [line.strip() for record in caplog.records for line in record.getMessage().splitlines()]
        said = [line for line in lines if line.startswith("learning rate:")]
        assert len(said) == 1
        assert said[0].startswith(f"learning rate: {name}: {mode} (left alone, a round would end ")
        assert trace == fit(module(), pruning(mode))
        if written_for == "training":
            assert trace != fit(module(), pruning("restart"))

    def test_auto_names_each_schedule_with_its_reason(self, caplog):
        class Two(Recording):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                return [optimizer], [CosineAnnealingLR(optimizer, 9), LambdaLR(optimizer, lambda epoch: 1.0)]

        with caplog.at_level(logging.INFO):
            fit(Two(None), pruning("auto"))
        assert "learning rate: CosineAnnealingLR: squeeze (left alone, a round would end" in caplog.text
        assert "learning rate: LambdaLR: restart (it is constant)" in caplog.text
