"""The house rules: which room may import which, and how long a function or a file may grow."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_sap"
NAME = PACKAGE.name

# What each room may import besides the standard library and torch. A room is a file or a folder of that name;
# "functional" alone stands for all rooms in that folder.
INNER = {"sharding", "functional", "sums", "weights", "masks", "pruner", "rewind", "phases", "history", "metric"}
MAY_IMPORT = {
    "sharding": set(),
    "functional": {"functional"},  # its __init__.py gathers the folder
    "functional/scratch": set(),
    "functional/pqi": {"functional/scratch", "numpy"},
    "functional/amount": {"functional/pqi"},
    "functional/select": {"functional/pqi", "functional/scratch", "sharding", "numpy"},
    "sums": {"functional/pqi", "functional/scratch", "sharding"},
    "weights": {"sharding"},
    "masks": {"functional/pqi", "sharding", "sums", "numpy"},
    "pruner": {"functional", "sums", "weights", "masks", "sharding", "history"},
    "rewind": {"sharding", "weights"},
    "phases": {"numpy"},
    "history": {"numpy"},
    "metric": {"functional", "torchmetrics"},
    "callbacks": {"callbacks"},  # its __init__.py gathers the folder
    "callbacks/pruning": {"lightning"} | INNER,
    "callbacks/monitor": {
        "lightning",
        "functional",
        "pruner",
        "sharding",
        "weights",
        "phases",
        "history",
        "plot",
        "report",
    },
    "plot": {"matplotlib", "phases", "history"},
    "report": {"rich", "history"},
    "": INNER | {"callbacks", "plot", "report"},  # lightning_sap/__init__.py
}
FOLDERS_OF_ROOMS = {(room.split("/")[0],) for room in MAY_IMPORT if "/" in room}
# Imports that must stand inside a function: (room, what is imported).
LAZY = {("", "plot"), ("callbacks/monitor", "plot"), ("plot", "matplotlib"), ("report", "rich")}

LONGEST_FUNCTION = 40  # lines of its body without the docstring
LONGEST_FILE = 350
LONGER_FILES = {  # path inside the package -> why it is longer
    "callbacks/pruning/callback.py": "every hook of the callback and every option's description in one place",
}


class Arrow(NamedTuple):
    """One import: where it stands and the dotted name it reaches for."""

    line: int
    target: str
    lazy: bool


def sources(package: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"))


def room_of(parts: tuple[str, ...]) -> str:
    """The room that a module inside the package belongs to, in the table or not."""
    return "/".join(parts[:2] if parts[:1] in FOLDERS_OF_ROOMS else parts[:1])


def module_parts(path: Path) -> tuple[str, ...]:
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def arrows(path: Path, tree: ast.Module, package: Path) -> Iterator[Arrow]:
    """Every import in a file, relative ones resolved, dynamic ones with a literal name included."""
    deferred = {id(inner) for node in ast.walk(tree) if runs_later(node) for inner in ast.walk(node)}
    here = (NAME, *path.parent.parts)
    for node in ast.walk(tree):
        for target in dict.fromkeys(targets(node, here, package)):
            yield Arrow(node.lineno, target, id(node) in deferred)


def runs_later(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def targets(node: ast.AST, here: tuple[str, ...], package: Path) -> list[str]:
    """The dotted names that one node imports, down to the module where that is one of ours."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = here[: len(here) - node.level + 1] if node.level else ()
        base = ".".join([*above, *filter(None, [node.module])])
        return [f"{base}.{alias.name}" if is_module(base, alias.name, package) else base for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called in {"import_module", "__import__"}:
            name = str(node.args[0].value)
            return [".".join(here) + name if name.startswith(".") else name]
    return []


def is_module(base: str, name: str, package: Path) -> bool:
    folder = package.parent.joinpath(*base.split("."), name)
    return folder.with_suffix(".py").is_file() or folder.is_dir()


def forbidden_arrow(room: str, arrow: Arrow) -> str | None:
    """Why a room must not import this, or None where it may."""
    top, *inner = arrow.target.split(".")
    top = "lightning" if top == "pytorch_lightning" else top
    target = room_of(tuple(inner)) if top == NAME else top
    if room not in MAY_IMPORT:
        return f"the room {room!r} has no row in the table"
    allowed = MAY_IMPORT[room]
    if top == NAME:
        known = target == room or target in allowed or target.startswith(tuple(f"{name}/" for name in allowed))
    else:
        known = top in sys.stdlib_module_names or top == "torch" or top in allowed
    if not known:
        return f"{room or '__init__'} must not import {target or 'the package itself'}"
    if (room, target) in LAZY and not arrow.lazy:
        return f"{room or '__init__'} imports {target} inside functions only"
    return None


def private_attributes_of_trainers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every `_name` reached through a trainer, also by way of its loops and connectors, and by `getattr`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=owner, attr=name):
                pass
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[owner, ast.Constant(value=name), *_]
            ):
                pass
            case _:
                continue
        if name.startswith("_") and not name.startswith("__") and reaches_through_trainer(owner):
            yield node.lineno, name


def reaches_through_trainer(node: ast.AST) -> bool:
    while True:
        match node:
            case ast.Name(id="trainer") | ast.Attribute(attr="trainer" | "_trainer"):
                return True
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=inner):
                node = inner
            case _:
                return False


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def broken_rules(package: Path) -> list[str]:
    """Every place in the package that breaks a rule of this file, as `path:line: what is wrong`."""
    found = []
    for path, tree in sources(package):
        room = room_of(module_parts(path))
        for arrow in arrows(path, tree, package):
            if reason := forbidden_arrow(room, arrow):
                found.append(f"{path}:{arrow.line}: {reason}")
        for line, name in private_attributes_of_trainers(tree):
            found.append(f"{path}:{line}: {name} is private to Lightning's trainer")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_length(node) > LONGEST_FUNCTION:
                found.append(f"{path}:{node.lineno}: {node.name} has {body_length(node)} lines, {LONGEST_FUNCTION} fit")
        length = len((package / path).read_text(encoding="utf-8").splitlines())
        if length > LONGEST_FILE and path.as_posix() not in LONGER_FILES:
            found.append(f"{path}:1: {length} lines, {LONGEST_FILE} fit")
    return found


def test_the_package_keeps_the_house_rules():
    broken = broken_rules(PACKAGE)
    assert not broken, "\n".join(broken)


def test_no_exception_outlives_its_file():
    long = {p.as_posix() for p, _ in sources(PACKAGE) if len((PACKAGE / p).read_text().splitlines()) > LONGEST_FILE}
    assert set(LONGER_FILES) - long == set()


LONG_BODY = "\n".join(["    x = 0"] * (LONGEST_FUNCTION + 1))

BROKEN = {
    "upwards": ("masks.py", "from lightning_sap.pruner import Pruner", "masks must not import pruner"),
    "upwards by a relative name": ("masks.py", "from . import pruner", "masks must not import pruner"),
    "upwards from a folder": ("rewind/weights.py", "from ..masks import MaskSet", "rewind must not import masks"),
    "upwards under TYPE_CHECKING": (
        "weights.py",
        "if x:\n    import lightning_sap.masks",
        "weights must not import masks",
    ),
    "upwards at run time": ("masks.py", "import_module('lightning_sap.pruner')", "masks must not import pruner"),
    "from the package itself": (
        "pruner.py",
        "from lightning_sap import SAPCallback",
        "must not import the package itself",
    ),
    "between measures": ("functional/pqi.py", "from .amount import floor", "must not import functional/amount"),
    "between callbacks": ("callbacks/monitor.py", "from .pruning import x", "must not import callbacks/pruning"),
    "monitor to masks": ("callbacks/monitor.py", "from lightning_sap.masks import x", "must not import masks"),
    "the outlet": ("history.py", "def f():\n    from lightning_sap.plot import draw", "history must not import plot"),
    "eager outlet": (
        "__init__.py",
        "from lightning_sap.plot import draw",
        "__init__ imports plot inside functions only",
    ),
    "eager matplotlib": ("plot.py", "import matplotlib.pyplot as plt", "plot imports matplotlib inside functions only"),
    "lightning": (
        "rewind.py",
        "def f():\n    from lightning.pytorch import Trainer",
        "rewind must not import lightning",
    ),
    "its other name": ("metric.py", "import pytorch_lightning as pl", "metric must not import lightning"),
    "functional to the rooms": (
        "functional/pqi.py",
        "from lightning_sap.sharding import x",
        "must not import sharding",
    ),
    "shards know no room": ("sharding.py", "from lightning_sap.masks import x", "sharding must not import masks"),
    "a stranger": ("weights.py", "import numpy as np", "weights must not import numpy"),
    "a room without a row": ("utils.py", "import math", "the room 'utils' has no row"),
    "a stray file between the callbacks": (
        "callbacks/tools.py",
        "import math",
        "the room 'callbacks/tools' has no row",
    ),
    "private": ("callbacks/pruning.py", "trainer._results", "_results is private"),
    "private, of the module": ("callbacks/pruning.py", "self.x.trainer._results", "_results is private"),
    "private, of a loop": ("callbacks/pruning.py", "trainer.fit_loop.epochs[0]._batches", "_batches is private"),
    "private, by name": ("callbacks/pruning.py", "getattr(trainer, '_results', None)", "_results is private"),
    "a long function": ("weights.py", f"def f():\n    '''Doc.'''\n{LONG_BODY}", "f has 41 lines"),
    "a long file": ("weights.py", "\n" * (LONGEST_FILE + 1), "351 lines"),
}

KEPT = {
    "pruner": ("pruner.py", "from lightning_sap.functional.pqi import x\nfrom . import masks, weights"),
    "a room's own folder": ("rewind/__init__.py", "from .weights import x\nfrom lightning_sap.rewind import weights"),
    "a callback's own folder": ("callbacks/pruning/__init__.py", "from .rounds import x\nimport lightning.pytorch"),
    "functional gathers": ("functional/__init__.py", "from .amount import x\nfrom .pqi import y"),
    "callbacks gather": (
        "callbacks/__init__.py",
        "from .monitor import x\nfrom lightning_sap.callbacks.pruning import y",
    ),
    "the map": ("__init__.py", "from .callbacks import x\ndef __getattr__(name):\n    from .plot import y"),
    "drawing": ("plot.py", "from .history import x\ndef f():\n    import matplotlib.pyplot"),
    "types of a drawing": ("plot.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
    "select": (
        "functional/select.py",
        "import heapq\nimport numpy\nimport torch\nfrom lightning_sap.sharding import x",
    ),
    "public attributes": ("callbacks/pruning.py", "trainer.optimizers\nself._trainer\ntrainer.__class__"),
    "a long docstring": ("weights.py", "def f():\n    '''" + "\n" * 99 + "'''\n    return 0"),
}


def lay_out(folder: Path, path: str, text: str) -> Path:
    """A package of empty rooms with one file written."""
    package = folder / NAME
    rooms = [
        "sharding",
        "weights",
        "masks",
        "pruner",
        "phases",
        "history",
        "metric",
        "plot",
        "callbacks/pruning",
        "callbacks/monitor",
    ]
    for file in [*(f"{room}.py" for room in rooms if not path.startswith(f"{room}/")), "__init__.py", path]:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).touch()
    (package / path).write_text(text)
    return package


@pytest.mark.parametrize(("path", "text", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_found(tmp_path, path, text, reason):
    (found,) = broken_rules(lay_out(tmp_path, path, text))
    assert reason in found
    assert found.startswith(f"{path}:")


@pytest.mark.parametrize(("path", "text"), KEPT.values(), ids=KEPT)
def test_what_the_table_allows_passes(tmp_path, path, text):
    assert broken_rules(lay_out(tmp_path, path, text)) == []
