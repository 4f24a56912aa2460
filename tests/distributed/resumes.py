"""What each rank does in the tests of resumed runs; it finds in a file what that is."""

import functools
from typing import NamedTuple

import torch
from helpers import crash
from resuming import broken, kill, last_file, run


class Case(NamedTuple):
    """A run that ends and is resumed: how it is trained, where it ends, and on which ranks by what."""

    engine: str
    kind: str
    rewind: str | int | None
    at: str  # a folder of files, or what is going on when the run ends
    when: int  # epoch or step of the file, or that before which, or in which, the run ends
    ranks: tuple[int, ...] = ()
    by: str = "nothing"  # then it is resumed from a file of the run that never stopped

    @property
    def alike(self):
        return self.at in ("step", "batch")

    @property
    def ends_processes(self):
        """Whether nothing more can be done in these processes: the ranks left waiting for those that are gone."""
        return self.by == "SIGKILL" or len(self.ranks) == 1


def die(rank, folder):
    """A run that ends on some of the ranks; the others go on as long as they can."""
    case = torch.load(folder / "case.pt", weights_only=False)
    if rank in case.ranks:
        end = kill if case.by == "SIGKILL" else crash
        broken(folder, case.at, case.when, case.kind, case.rewind, case.engine, end)
    else:
        run(folder, case.kind, case.rewind, case.alike, engine=case.engine)
    raise RuntimeError("this rank ends here")


def resume(rank, folder):
    """For each case the run that never stopped and the resumed one."""
    return [
        outcome(case, folder, number) for number, case in enumerate(torch.load(folder / "cases.pt", weights_only=False))
    ]


@functools.cache
def unbroken(folder, engine, kind, rewind, alike):
    place = folder / f"{engine}-{kind}-{rewind}-{alike}"
    return run(place, kind, rewind, alike, engine=engine), place


def outcome(case, folder, number):
    whole, place = unbroken(folder, case.engine, case.kind, case.rewind, case.alike)
    first = folder / f"first-{number}"
    if case.by == "nothing":
        file = place / case.at / f"{'step' if case.alike else 'epoch'}={case.when}.ckpt"
    elif case.ends_processes:
        file = last_file(first, case.at, case.when)
    else:
        file = broken(first, case.at, case.when, case.kind, case.rewind, case.engine)
    resumed = run(folder / f"second-{number}", case.kind, case.rewind, case.alike, file, engine=case.engine)
    return whole, resumed
