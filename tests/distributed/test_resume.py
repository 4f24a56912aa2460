"""Two processes killed and resumed, compared bit for bit with the two that never stopped."""

import pytest
import torch
from distributed.resumes import Case
from launch import run_ranks
from resuming import FILES, GROWS, KINDS, STEPS_OF_A_PRUNING, differences, without_validation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # seconds; with --full, all runs are in the first test

SGD, ADAMW = "SGD-cosine", "AdamW-OneCycle"
BOTH = (0, 1)

SHORT = [
    Case("ddp", SGD, None, "validation-end", 1),
    Case("ddp", ADAMW, "init", "train-epoch-end", 3),
    Case("ddp", SGD, 1, "step", 7),
    Case("ddp", SGD, 1, "step", 12),  # an epoch's last batch, and a round's
    Case("ddp", SGD, None, "mask", 2, BOTH, "exception"),
    Case("ddp", ADAMW, "init", "rewind weights", 4, (1,), "SIGKILL"),
    Case("ddp", "steps-SGD-cosine", None, "step", 5),  # in the middle of a round of two steps
    Case("ddp", "steps-AdamW-linear", "init", "step", 8),  # at a round's last step
    Case("ddp", GROWS + SGD, None, "step", 7),
    Case("ddp", GROWS + SGD, "init", "mask", 2, BOTH, "exception"),
    Case("fsdp2", GROWS + SGD, None, "step", 7),
    Case("fsdp2", GROWS + SGD, None, "rewind schedules", 4, BOTH, "exception"),
    Case("fsdp2", "steps-SGD-cosine", "init", "step", 7),
    Case("fsdp2", "steps-AdamW-linear", None, "step", 10),
    Case("fsdp2", ADAMW, 1, "validation-end", 3),
    Case("fsdp2", SGD, "init", "train-epoch-end", 1),
    Case("fsdp2", ADAMW, None, "step", 8),
    Case("fsdp2", ADAMW, None, "step", 6),
    Case("fsdp2", SGD, "init", "rewind schedules", 4, BOTH, "exception"),
    Case("fsdp2", ADAMW, 1, "validation", 3, BOTH, "SIGKILL"),
]


def full():
    """Every file of every kind; of the sharded ones a third, so that still each value meets each other."""
    for engine, every in (("ddp", 1), ("fsdp2", 3)):
        for i, file in enumerate(FILES):
            at, _, number = file.partition("/")
            when = int(number.partition("=")[2])
            yield from (Case(engine, *kind, at, when) for j, kind in enumerate(KINDS) if (i + j) % every == 0)
        for step, kind in zip(STEPS_OF_A_PRUNING, KINDS, strict=True):
            yield from (Case(engine, *kind, step, when, BOTH, "exception") for when in (2, 4))
        yield from (Case(engine, *kind, "validation", 2, BOTH, "exception") for kind in KINDS)
    for i, (step, kind) in enumerate(zip(STEPS_OF_A_PRUNING, KINDS, strict=True)):
        yield Case("ddp", *kind, step, 2, (i % 2,), "exception")
    yield Case("ddp", SGD, "init", "batch", 10, BOTH, "SIGKILL")
    yield Case("ddp", ADAMW, None, "batch", 9, (0,), "SIGKILL")


FULL = [*SHORT, *(case for case in full() if case not in SHORT)]


def named(case):
    return pytest.param(case, id="-".join(map(str, case)), marks=() if case in SHORT else pytest.mark.full)


def runs_here(case):
    return case.engine == "ddp" or torch.__version__ >= "2.9"


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """By case, for each rank the run that never stopped and the resumed one; all of them in one pair of processes."""
    cases = [case for case in (FULL if request.config.getoption("--full") else SHORT) if runs_here(case)]
    folder = tmp_path_factory.mktemp("resumes")
    for number, case in enumerate(cases):
        if case.ends_processes:
            end_processes(case, folder / f"first-{number}")
    torch.save(cases, folder / "cases.pt")
    by_rank = run_ranks("distributed.resumes:resume", folder, limit=60 + 5 * len(cases))
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


def end_processes(case, folder):
    folder.mkdir()
    torch.save(case, folder / "case.pt")
    with pytest.raises(AssertionError) as ended:
        run_ranks("distributed.resumes:die", folder)
    codes = str(ended.value).rpartition("exit codes by rank")[2]
    assert ("-9" in codes) == (case.by == "SIGKILL"), ended.value


@pytest.mark.parametrize("case", [named(case) for case in FULL])
def test_resume_of_two_ranks_equals_unbroken_run(outcomes, case):
    if not runs_here(case):
        pytest.skip("FSDP2 on the CPU needs PyTorch 2.9")
    for whole, resumed in outcomes[case]:
        assert resumed["rates"].keys() != whole["rates"].keys(), "nothing was left out"
        assert differences(whole, resumed, without_validation(f"{case.at}/step={case.when}")) == []
    (_, first), (_, second) = outcomes[case]
    assert differences(first, second) == [], "the ranks differ"
