"""Schedules of transformers and timm, from the packages themselves."""

import logging

import pytest
from scheduling import BATCHES, E, Recording, fit, pruning, rates, thirds
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

N = E * BATCHES  # steps of a round

TRANSFORMERS = {
    "constant with warm-up": lambda o, n: get_constant_schedule_with_warmup(o, n // 5),
    "linear with warm-up": lambda o, n: get_linear_schedule_with_warmup(o, n // 5, n),
    "cosine with warm-up": lambda o, n: get_cosine_schedule_with_warmup(o, n // 5, n),
    "cosine with restarts": lambda o, n: get_cosine_with_hard_restarts_schedule_with_warmup(o, n // 5, n, num_cycles=2),
    "polynomial with warm-up": lambda o, n: get_polynomial_decay_schedule_with_warmup(o, n // 5, n, power=2.0),
}


class TestTransformers:
    @pytest.mark.parametrize("name", TRANSFORMERS)
    def test_restarted_each_round_is_a_training_of_its_own(self, name):
        def module():
            return Recording(lambda o: TRANSFORMERS[name](o, N), interval="step")

        alone = fit(module(), max_epochs=E)
        assert thirds(fit(module(), pruning("restart"))) == (alone, alone, alone)
        assert len(set(rates(alone))) > 3

    @pytest.mark.parametrize("name", TRANSFORMERS)
    def test_squeezed_each_round_walks_all_of_it(self, name):
        def module():
            return Recording(lambda o: TRANSFORMERS[name](o, 3 * N), interval="step")

        alone = fit(module())
        expected = [alone[round(s * (3 * N - 1) / (N - 1))] for s in range(N)]
        assert fit(module(), pruning("squeeze")) == expected * 3

    def test_auto_squeezes_one_that_was_written_for_all_of_training(self, caplog):
        module = Recording(lambda o: get_linear_schedule_with_warmup(o, 9, 3 * N), interval="step")
        with caplog.at_level(logging.INFO):
            fit(module, pruning("auto"))
        assert "LambdaLR: squeeze (left alone, a round would end" in caplog.text

    def test_a_warm_up_of_one_epoch_per_epoch_trains_in_rounds_of_one_epoch(self):
        module = Recording(lambda o: get_linear_schedule_with_warmup(o, 1, 5))
        trace = fit(module, pruning("auto", rounds=4, every_n_epochs=1), max_epochs=5)
        assert rates(trace) == pytest.approx([0.0, 0.1, 0.075, 0.05, 0.025] * 5)


class Timm(Recording):
    """As timm's documentation steps its schedules."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch + 1)


class TimmBySteps(Recording):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step_update(num_updates=self.global_step)


TIMM = {
    "by epochs": lambda: Timm(lambda o: CosineLRScheduler(o, t_initial=3 * E, warmup_t=2, warmup_lr_init=0.001)),
    "stairs": lambda: Timm(lambda o: StepLRScheduler(o, decay_t=2, decay_rate=0.5)),
    "by steps": lambda: TimmBySteps(
        lambda o: CosineLRScheduler(o, t_initial=3 * N, t_in_epochs=False, warmup_t=5, warmup_lr_init=0.001),
        interval="step",
    ),
}


class TestTimm:
    @pytest.mark.parametrize("lr_schedule", ["auto", "keep"])
    @pytest.mark.parametrize("name", TIMM)
    def test_one_schedule_goes_over_all_rounds(self, name, lr_schedule, caplog):
        alone = fit(TIMM[name]())
        with caplog.at_level(logging.INFO):
            assert fit(TIMM[name](), pruning(lr_schedule)) == alone
        assert len(set(rates(alone))) > 4
        if lr_schedule == "auto":
            assert "Scheduler: keep (the module's lr_scheduler_step sets it by the epoch of training)" in caplog.text

    @pytest.mark.parametrize("lr_schedule", ["restart", "squeeze"])
    @pytest.mark.parametrize("name", TIMM)
    def test_rounds_cannot_replay_it(self, name, lr_schedule):
        module = TIMM[name]()
        with pytest.raises(ValueError, match="cannot be had where the module's lr_scheduler_step sets it by the epoch"):
            fit(module, pruning(lr_schedule))
        assert module.trace == []
