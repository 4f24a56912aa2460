"""The house rules: which room may import which, and how long a function or a file may grow."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_sap"
NAME = PACKAGE.name

# The rings of the house, innermost first: a file imports from its own ring and from those before it.
RINGS = (
    "version",
    "files",
    "schema",
    "sharding",
    "functional",
    "policies",
    "engine",
    "rounds",
    "rewind",
    "metric",
    "plot",
    "report",
    "deploy",
    "callbacks",
    "pruner",
    "__main__",
    "",
)
# Packages besides the standard library, torch and NumPy that a ring may import.
PACKAGES = {
    "callbacks": {"lightning", "tqdm"},
    "metric": {"torchmetrics"},
    "plot": {"matplotlib"},
    "report": {"rich"},
    "engine": {"torch_pruning"},
    "deploy": {"torch_pruning"},
}
LAZY = {"plot", "pruner", "deploy", "matplotlib", "rich", "torch_pruning"}  # what is imported inside functions only
# What each file imports of the package: exactly these arrows are drawn, and none that nobody uses.
ARROWS: dict[str, set[str]] = {
    "schema": {"schema/kinds", "schema/versioned"},
    "schema/kinds": {"version"},
    "schema/versioned": {"version", "schema/kinds"},
    "functional": {"functional/amount", "functional/pqi", "functional/select"},
    "functional/amount": {"functional/pqi", "functional/scalars"},
    "functional/fingerprint": {"functional/pqi", "functional/scratch"},
    "functional/pqi": {"functional/scalars", "functional/scratch"},
    "functional/select": {"sharding", "functional/pqi", "functional/scratch"},
    "policies": {"policies/amounts", "policies/base", "policies/gathered", "policies/importance", "policies/regrowth"},
    "policies/amounts": {"functional/amount", "functional/pqi", "functional/scalars", "policies/base"},
    "policies/base": {"functional/amount", "functional/pqi"},
    "policies/importance": {"policies/base", "policies/gathered"},
    "engine/copies": {"sharding", "engine/weights"},
    "engine/decision": {
        "sharding",
        "engine/floors",
        "engine/groups",
        "engine/masks",
        "engine/measure",
        "engine/picking",
        "functional/amount",
        "functional/pqi",
        "policies/base",
        "policies/importance",
    },
    "engine/effective": {"sharding", "engine/tracing"},
    "engine/ends": {"sharding", "engine/tracing"},
    "engine/floors": {"sharding", "engine/groups", "functional/select"},
    "engine/groups": {
        "sharding",
        "functional/pqi",
        "policies/base",
        "policies/importance",
        "engine/effective",
        "engine/floors",
        "engine/matrices",
        "engine/weights",
    },
    "engine/hidden": {"engine/weights"},
    "engine/masks": {"schema", "sharding", "functional/fingerprint", "functional/pqi"},
    "engine/measure": {"sharding", "functional/fingerprint", "functional/pqi", "policies/importance", "engine/groups"},
    "engine/normalised": {"engine/effective"},
    "engine/patterns": {
        "sharding",
        "functional/select",
        "engine/decision",
        "engine/groups",
        "engine/masks",
        "engine/measure",
        "engine/weights",
    },
    "engine/roles": {"engine/ends", "engine/matrices"},
    "engine/selection": {"engine/roles"},
    "engine/unit_decision": {
        "functional/amount",
        "functional/pqi",
        "functional/select",
        "policies/base",
        "engine/decision",
        "engine/groups",
        "engine/masks",
        "engine/measure",
        "engine/unit_groups",
    },
    "engine/unit_groups": {"engine/coupling", "engine/tracing", "engine/weights"},
    "engine/used": {"sharding", "engine/effective", "engine/tracing"},
    "engine/weights": {
        "sharding",
        "engine/effective",
        "engine/floors",
        "engine/matrices",
        "engine/normalised",
        "engine/selection",
        "engine/used",
    },
    "rounds/history": {"files"},
    "rounds/phases": {"schema", "functional/scalars"},
    "rounds/protocol": {"engine/groups", "rounds/history"},
    "rounds/search": {"functional/scalars", "rounds/metric_names", "rounds/protocol"},
    "rewind": {
        "rewind/gradients",
        "rewind/kept",
        "rewind/optimizer",
        "rewind/replay",
        "rewind/steps",
        "rewind/ticks",
        "rewind/weights",
    },
    "rewind/optimizer": {"sharding", "engine/masks", "rewind/kept"},
    "rewind/replay": {"rewind/ticks", "rewind/trial"},
    "rewind/steps": {"rewind/kept"},
    "rewind/trial": {"rewind/ticks"},
    "rewind/weights": {"sharding", "engine/weights"},
    "metric": {"schema", "functional/pqi", "functional/scalars"},
    "report": {"rounds/history"},
    "callbacks": {"callbacks/monitor", "callbacks/pruning"},
    "callbacks/monitor": {"callbacks/monitor/callback"},
    "callbacks/monitor/callback": {
        "functional/scalars",
        "rounds/history",
        "rounds/phases",
        "rounds/protocol",
        "callbacks/logging",
        "callbacks/monitor/curve",
        "callbacks/monitor/loggers",
        "callbacks/monitor/messages",
        "callbacks/monitor/meter",
        "callbacks/monitor/mode",
        "callbacks/monitor/schema",
        "callbacks/monitor/stopping",
        "callbacks/training",
    },
    "callbacks/monitor/curve": {
        "engine/measure",
        "rounds/history",
        "plot",
        "report",
        "callbacks/monitor/stopping",
        "callbacks/round_metrics",
    },
    "callbacks/monitor/messages": {
        "rounds/history",
        "rounds/phases",
        "report",
        "callbacks/logging",
        "callbacks/monitor/callback",
        "callbacks/monitor/stopping",
    },
    "callbacks/monitor/meter": {
        "sharding",
        "functional/pqi",
        "functional/scalars",
        "engine/groups",
        "engine/measure",
        "engine/selection",
        "rounds/phases",
        "rounds/protocol",
        "callbacks/training",
    },
    "callbacks/monitor/mode": {"rounds/metric_names", "callbacks/logging"},
    "callbacks/monitor/schema": {"schema", "rounds/phases", "callbacks/monitor/stopping", "callbacks/round_metrics"},
    "callbacks/monitor/stopping": {"rounds/history", "rounds/phases"},
    "callbacks/pruning": {"callbacks/pruning/callback", "callbacks/pruning/sap"},
    "callbacks/pruning/agreement": {
        "sharding",
        "functional/fingerprint",
        "functional/pqi",
        "engine/decision",
        "engine/groups",
        "engine/masks",
    },
    "callbacks/pruning/archive": {
        "rounds/history",
        "callbacks/pruning/agreement",
        "callbacks/pruning/checks",
        "callbacks/pruning/folders",
        "callbacks/pruning/roundfile",
        "callbacks/pruning/session",
    },
    "callbacks/pruning/averages": {
        "sharding",
        "functional/fingerprint",
        "engine/copies",
        "engine/hidden",
        "engine/masks",
        "engine/weights",
        "rounds/protocol",
        "callbacks/pruning/agreement",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/declared",
        "callbacks/pruning/held",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
    },
    "callbacks/pruning/callback": {
        "rewind",
        "sharding",
        "callbacks/logging",
        "callbacks/training",
        "engine/groups",
        "policies/base",
        "rounds/history",
        "rounds/protocol",
        "callbacks/pruning/archive",
        "callbacks/pruning/checks",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/course",
        "callbacks/pruning/enforcement",
        "callbacks/pruning/fit",
        "callbacks/pruning/given_masks",
        "callbacks/pruning/inventory",
        "callbacks/pruning/lifecycle",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/planning",
        "callbacks/pruning/preview",
        "callbacks/pruning/progress",
        "callbacks/pruning/regrowth",
        "callbacks/pruning/restoring",
        "callbacks/pruning/schedules",
        "callbacks/pruning/schema",
        "callbacks/pruning/session",
        "callbacks/pruning/signatures",
        "callbacks/pruning/state",
        "callbacks/pruning/tolerance",
        "callbacks/pruning/units",
    },
    "callbacks/pruning/carrying": {
        "rounds/protocol",
        "callbacks/pruning/averages",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/decided",
        "callbacks/pruning/decisions",
        "callbacks/pruning/emptied",
        "callbacks/pruning/kept",
        "callbacks/pruning/messages",
        "callbacks/pruning/progress",
        "callbacks/pruning/session",
        "callbacks/pruning/tolerance",
        "callbacks/pruning/units",
    },
    "callbacks/pruning/checks": {
        "schema",
        "sharding",
        "callbacks/logging",
        "engine/effective",
        "engine/measure",
        "engine/weights",
        "policies/regrowth",
        "rounds/plan",
        "rounds/protocol",
        "callbacks/pruning/options",
        "callbacks/pruning/schema",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/course": {
        "callbacks/logging",
        "engine/weights",
        "rounds/plan",
        "rounds/protocol",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/inventory",
        "callbacks/pruning/layers",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/regrowth",
        "callbacks/pruning/saving",
        "callbacks/pruning/session",
        "callbacks/pruning/state",
        "callbacks/pruning/tolerance",
    },
    "callbacks/pruning/decided": {"engine/masks", "rounds/history", "callbacks/pruning/kept_round"},
    "callbacks/pruning/decisions": {
        "engine/decision",
        "engine/groups",
        "engine/masks",
        "engine/patterns",
        "engine/unit_decision",
        "rounds/protocol",
        "callbacks/pruning/agreement",
        "callbacks/pruning/checks",
        "callbacks/pruning/held",
        "callbacks/pruning/messages",
        "callbacks/pruning/regrowth",
        "callbacks/pruning/session",
        "callbacks/pruning/tolerance",
    },
    "callbacks/pruning/declared": {"callbacks/pruning/held"},
    "callbacks/pruning/enforcement": {"rewind"},
    "callbacks/pruning/first_masks": {
        "sharding",
        "engine/floors",
        "engine/masks",
        "engine/weights",
        "callbacks/pruning/given_masks",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
    },
    "callbacks/pruning/fit": {"callbacks/pruning/course", "callbacks/pruning/lifecycle", "callbacks/training"},
    "callbacks/pruning/folders": {
        "callbacks/pruning/checks",
        "callbacks/pruning/options",
        "callbacks/pruning/roundfile",
    },
    "callbacks/pruning/given_masks": {
        "deploy/reading",
        "deploy/sparse_file",
        "rounds/history",
        "callbacks/pruning/checks",
        "callbacks/pruning/roundfile",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/inventory": {
        "files",
        "sharding",
        "callbacks/logging",
        "callbacks/training",
        "engine/groups",
        "engine/used",
        "engine/weights",
        "callbacks/pruning/held",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
    },
    "callbacks/pruning/kept": {
        "rewind",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/kept_round",
        "callbacks/pruning/session",
        "callbacks/pruning/snapshots",
    },
    "callbacks/pruning/kept_round": {"sharding", "engine/masks", "engine/weights", "rewind"},
    "callbacks/pruning/messages": {
        "callbacks/logging",
        "engine/decision",
        "engine/weights",
        "rounds/plan",
        "rounds/search",
        "callbacks/pruning/inventory",
        "callbacks/pruning/options",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/options": {
        "engine/decision",
        "engine/groups",
        "engine/patterns",
        "engine/selection",
        "functional/amount",
        "functional/scalars",
        "policies/base",
        "policies/gathered",
        "policies/importance",
        "policies/regrowth",
        "rounds/search",
    },
    "callbacks/pruning/outside": {"rewind"},
    "callbacks/pruning/planning": {
        "policies/regrowth",
        "rounds/cycles",
        "rounds/plan",
        "callbacks/pruning/checks",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/options",
        "callbacks/pruning/schedules",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/replaced": {
        "engine/masks",
        "engine/weights",
        "callbacks/pruning/averages",
        "callbacks/pruning/messages",
        "callbacks/pruning/session",
        "callbacks/pruning/trained",
        "callbacks/pruning/units",
        "callbacks/training",
    },
    "callbacks/pruning/restoring": {
        "engine/weights",
        "rounds/history",
        "rewind",
        "callbacks/pruning/agreement",
        "callbacks/pruning/archive",
        "callbacks/pruning/checks",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/folders",
        "callbacks/pruning/roundfile",
        "callbacks/pruning/session",
        "callbacks/pruning/snapshots",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/roundfile": {"callbacks/pruning/agreement"},
    "callbacks/pruning/sap": {"policies/amounts", "callbacks/pruning/callback", "callbacks/pruning/signatures"},
    "callbacks/pruning/saving": {
        "files",
        "sharding",
        "callbacks/pruning/agreement",
        "callbacks/pruning/archive",
        "callbacks/pruning/checks",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/folders",
        "callbacks/pruning/messages",
        "callbacks/pruning/roundfile",
        "callbacks/pruning/session",
    },
    "callbacks/pruning/schedules": {
        "rounds/plan",
        "rewind",
        "callbacks/logging",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/lengths",
        "callbacks/pruning/options",
        "callbacks/pruning/outside",
        "callbacks/pruning/schema",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/schema": {
        "schema",
        "engine/masks",
        "rounds/history",
        "rounds/plan",
        "rounds/protocol",
        "rounds/search",
        "callbacks/pruning/lengths",
        "callbacks/round_metrics",
    },
    "callbacks/pruning/session": {
        "callbacks/round_metrics",
        "engine/floors",
        "engine/masks",
        "engine/measure",
        "rounds/history",
        "rounds/protocol",
        "callbacks/pruning/averages",
        "callbacks/pruning/carrying",
        "callbacks/pruning/checks",
        "callbacks/pruning/decisions",
        "callbacks/pruning/declared",
        "callbacks/pruning/emptied",
        "callbacks/pruning/first_masks",
        "callbacks/pruning/gathering",
        "callbacks/pruning/held",
        "callbacks/pruning/inventory",
        "callbacks/pruning/kept",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/planning",
        "callbacks/pruning/progress",
        "callbacks/pruning/regrowth",
        "callbacks/pruning/replaced",
        "callbacks/pruning/saving",
        "callbacks/pruning/schedules",
        "callbacks/pruning/schema",
        "callbacks/pruning/snapshots",
        "callbacks/pruning/state",
        "callbacks/pruning/tolerance",
        "callbacks/pruning/trained",
        "callbacks/pruning/units",
    },
    "callbacks/pruning/state": {
        "engine/decision",
        "engine/masks",
        "engine/measure",
        "rounds/history",
        "rounds/plan",
        "rounds/protocol",
        "rounds/search",
        "rewind",
        "callbacks/pruning/decided",
        "callbacks/pruning/kept_round",
        "callbacks/pruning/schema",
        "callbacks/round_metrics",
    },
    "callbacks/pruning/tolerance": {
        "policies/base",
        "engine/decision",
        "rounds/protocol",
        "rounds/search",
        "callbacks/logging",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
        "callbacks/pruning/state",
    },
    "callbacks/pruning/trained": {
        "sharding",
        "engine/unit_groups",
        "engine/weights",
        "callbacks/pruning/agreement",
        "callbacks/pruning/averages",
        "callbacks/pruning/checks",
        "callbacks/pruning/inventory",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
        "callbacks/pruning/units",
        "callbacks/training",
    },
    "callbacks/pruning/units": {
        "sharding",
        "engine/masks",
        "engine/unit_decision",
        "engine/unit_groups",
        "callbacks/logging",
        "callbacks/pruning/held",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/state",
    },
    "callbacks/round_metrics": {"schema"},
    "callbacks/training": {"engine/copies", "engine/weights", "rewind"},
    "deploy": {"deploy/linears", "deploy/quantize", "deploy/shrinking", "deploy/sparse_file"},
    "deploy/container": {"files"},
    "deploy/inspection": {"functional/amount", "functional/pqi", "deploy/quantize", "deploy/reading", "deploy/sources"},
    "deploy/linears": {"engine/tracing"},
    "deploy/output_axes": {"engine/matrices"},
    "deploy/packing": {"deploy/container", "deploy/quantize"},
    "deploy/pruned_units": {"engine/coupling"},
    "deploy/quantize": {"engine/tracing", "deploy/output_axes"},
    "deploy/reading": {"deploy/container", "deploy/packing"},
    "deploy/shrinking": {"engine/tracing", "deploy/pruned_units"},
    "deploy/sources": {"deploy/container", "deploy/output_axes", "deploy/reading"},
    "deploy/sparse_file": {"deploy/container", "deploy/packing", "deploy/reading", "deploy/sources"},
    "__main__": {"files", "version", "deploy/inspection", "deploy/packing", "deploy/sparse_file"},
    "": {
        "deploy",
        "metric",
        "pruner",
        "version",
        "callbacks/monitor",
        "callbacks/pruning",
        "engine/decision",
        "engine/used",
        "functional/amount",
        "functional/pqi",
        "policies/amounts",
        "policies/base",
        "policies/gathered",
        "policies/importance",
        "policies/regrowth",
        "rounds/history",
        "rounds/phases",
        "rounds/protocol",
        "rounds/search",
    },
    "callbacks/pruning/progress": {
        "report",
        "callbacks/logging",
        "callbacks/pruning/compatibility",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
        "callbacks/pruning/state",
    },
    "callbacks/monitor/loggers": {
        "rounds/history",
        "rounds/protocol",
        "report",
        "callbacks/monitor/callback",
        "callbacks/monitor/meter",
        "callbacks/monitor/outputs",
    },
    "callbacks/monitor/outputs": {"files", "rounds/history"},
    "callbacks/pruning/held": {
        "rewind",
        "sharding",
        "engine/groups",
        "engine/masks",
        "engine/measure",
        "engine/weights",
        "policies/importance",
        "callbacks/pruning/averages",
        "callbacks/pruning/first_masks",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/snapshots",
        "callbacks/pruning/state",
        "callbacks/pruning/trained",
        "callbacks/pruning/units",
    },
    "callbacks/pruning/layers": {
        "engine/branches",
        "engine/used",
        "engine/weights",
        "callbacks/logging",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
    },
    "callbacks/pruning/snapshots": {
        "rewind",
        "callbacks/pruning/averages",
        "callbacks/pruning/held",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
    },
    "pruner": {"pruner/pruner"},
    "pruner/inputs": {
        "rewind",
        "sharding",
        "policies/gathered",
        "policies/importance",
        "policies/regrowth",
        "callbacks/pruning/options",
        "callbacks/pruning/signatures",
    },
    "pruner/pruner": {
        "rewind",
        "sharding",
        "callbacks/fabric",
        "callbacks/training",
        "engine/copies",
        "engine/decision",
        "engine/floors",
        "engine/groups",
        "engine/masks",
        "engine/weights",
        "policies/base",
        "pruner/inputs",
        "rounds/history",
        "rounds/plan",
        "rounds/protocol",
        "callbacks/pruning/agreement",
        "callbacks/pruning/averages",
        "callbacks/pruning/checks",
        "callbacks/pruning/decisions",
        "callbacks/pruning/declared",
        "callbacks/pruning/emptied",
        "callbacks/pruning/enforcement",
        "callbacks/pruning/first_masks",
        "callbacks/pruning/given_masks",
        "callbacks/pruning/held",
        "callbacks/pruning/inventory",
        "callbacks/pruning/layers",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/schema",
        "callbacks/pruning/snapshots",
        "callbacks/pruning/state",
        "callbacks/pruning/trained",
        "callbacks/pruning/units",
    },
    "callbacks/pruning/gatherers": {
        "rewind",
        "sharding",
        "engine/inputs",
        "engine/weights",
        "policies/gathered",
        "callbacks/pruning/session",
    },
    "callbacks/pruning/gathering": {
        "callbacks/logging",
        "engine/decision",
        "engine/groups",
        "engine/weights",
        "policies/base",
        "policies/gathered",
        "policies/importance",
        "rounds/plan",
        "callbacks/pruning/gatherers",
        "callbacks/pruning/kept_round",
        "callbacks/pruning/schema",
        "callbacks/pruning/session",
        "callbacks/pruning/state",
        "callbacks/pruning/unit_gatherer",
    },
    "callbacks/pruning/unit_gatherer": {
        "rewind",
        "engine/inputs",
        "engine/unit_groups",
        "engine/weights",
        "policies/gathered",
        "callbacks/pruning/gatherers",
        "callbacks/pruning/session",
    },
    "engine/inputs": {"engine/matrices", "engine/selection", "engine/weights", "functional/pqi"},
    "policies/gathered": {"policies/base"},
    "callbacks/pruning/regrowth": {
        "callbacks/logging",
        "engine/decision",
        "engine/floors",
        "engine/groups",
        "engine/masks",
        "policies/base",
        "policies/importance",
        "policies/regrowth",
        "rounds/protocol",
        "callbacks/pruning/agreement",
        "callbacks/pruning/emptied",
        "callbacks/pruning/held",
        "callbacks/pruning/messages",
        "callbacks/pruning/options",
        "callbacks/pruning/session",
        "callbacks/pruning/state",
    },
    "policies/regrowth": {"functional/amount", "functional/pqi", "functional/scalars", "policies/base"},
    "rounds/cycles": {"rounds/plan"},
    "callbacks/pruning/signatures": {"callbacks/pruning/options"},
    "engine/picking": {"sharding", "engine/groups", "engine/measure", "functional/pqi", "functional/select"},
    "callbacks/pruning/preview": {
        "callbacks/training",
        "policies/regrowth",
        "callbacks/pruning/first_masks",
        "callbacks/pruning/fit",
        "callbacks/pruning/inventory",
        "callbacks/pruning/session",
        "callbacks/pruning/trained",
    },
    "callbacks/fabric": {"engine/weights", "callbacks/pruning/messages", "callbacks/pruning/options"},
    "rewind/gradients": {"sharding"},
    "callbacks/pruning/emptied": {"engine/groups", "engine/masks", "callbacks/pruning/options"},
}

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


def ring_of(file: str) -> str:
    """The ring that a file of the package belongs to; "" is the package itself."""
    return file.split("/", maxsplit=1)[0]


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


def forbidden_arrow(file: str, arrow: Arrow, table: dict[str, set[str]]) -> str | None:
    """Why a file must not import this, or None where it may."""
    top, *inner = arrow.target.split(".")
    top = "lightning" if top == "pytorch_lightning" else top
    target = "/".join(inner) if top == NAME else top
    if ring_of(file) not in RINGS:
        return f"{file!r} belongs to no ring"
    if top == NAME and ring_of(target) not in RINGS:
        return f"{target!r} belongs to no ring"
    if top == NAME and (not target or RINGS.index(ring_of(target)) > RINGS.index(ring_of(file))):
        return f"{file or '__init__'} must not import {target or 'the package itself'}, which lies further out"
    if top == NAME and target not in table.get(file, set()):
        return f"{file or '__init__'} imports {target}, an arrow that is not in the table"
    free = top in sys.stdlib_module_names or top in {NAME, "torch", "numpy"}
    if not free and top not in PACKAGES.get(ring_of(file), set()):
        return f"{file or '__init__'} must not import {target}"
    if target in LAZY and not arrow.lazy:
        return f"{file or '__init__'} imports {target} inside functions only"
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


def drawn(package: Path) -> dict[str, set[str]]:
    """The files of the package that each file imports, where it imports any."""
    found = {}
    for path, tree in sources(package):
        targets_of = [arrow.target.split(".") for arrow in arrows(path, tree, package)]
        inner = {"/".join(parts[1:]) for parts in targets_of if parts[0] == NAME}
        if inner:
            found["/".join(module_parts(path))] = inner
    return found


def broken_rules(package: Path, table: dict[str, set[str]] | None = None) -> list[str]:
    """Every place in the package that breaks a rule of this file, as `path:line: what is wrong`."""
    found = []
    table = drawn(package) if table is None else table
    for path, tree in sources(package):
        file = "/".join(module_parts(path))
        for arrow in arrows(path, tree, package):
            if reason := forbidden_arrow(file, arrow, table):
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
    broken = broken_rules(PACKAGE, ARROWS)
    assert not broken, "\n".join(broken)


def test_the_table_holds_exactly_the_arrows_that_are_drawn():
    assert drawn(PACKAGE) == ARROWS


def test_an_arrow_that_is_not_in_the_table_is_found(tmp_path):
    package = lay_out(tmp_path, "callbacks/pruning/checks.py", "from lightning_sap.callbacks.pruning.state import x")
    (found,) = broken_rules(package, {})
    assert "callbacks/pruning/checks imports callbacks/pruning/state, an arrow that is not in the table" in found


def test_no_exception_outlives_its_file():
    long = {p.as_posix() for p, _ in sources(PACKAGE) if len((PACKAGE / p).read_text().splitlines()) > LONGEST_FILE}
    assert set(LONGER_FILES) - long == set()


LONG_BODY = "\n".join(["    x = 0"] * (LONGEST_FUNCTION + 1))

BROKEN = {
    "upwards": (
        "engine/masks.py",
        "from lightning_sap.rounds.plan import x",
        "engine/masks must not import rounds/plan, which lies further out",
    ),
    "upwards by a relative name": (
        "engine/masks.py",
        "from ..rounds import plan",
        "engine/masks must not import rounds/plan",
    ),
    "upwards under TYPE_CHECKING": (
        "functional/pqi.py",
        "if x:\n    import lightning_sap.engine.masks",
        "functional/pqi must not import engine/masks",
    ),
    "upwards at run time": (
        "functional/pqi.py",
        "import_module('lightning_sap.engine.masks')",
        "functional/pqi must not import engine/masks",
    ),
    "from the package itself": (
        "callbacks/pruning/state.py",
        "from lightning_sap import SAPCallback",
        "must not import the package itself",
    ),
    "the outlet": (
        "rounds/history.py",
        "def f():\n    from lightning_sap.plot import draw",
        "rounds/history must not import plot",
    ),
    "eager outlet": (
        "__init__.py",
        "from lightning_sap.plot import draw",
        "__init__ imports plot inside functions only",
    ),
    "eager matplotlib": ("plot.py", "import matplotlib.pyplot as plt", "plot imports matplotlib inside functions only"),
    "lightning": (
        "rewind/weights.py",
        "def f():\n    from lightning.pytorch import Trainer",
        "rewind/weights must not import lightning",
    ),
    "its other name": ("metric.py", "import pytorch_lightning as pl", "metric must not import lightning"),
    "shards know no room": (
        "sharding.py",
        "from lightning_sap.engine.masks import x",
        "sharding must not import engine/masks",
    ),
    "a stranger": ("engine/weights.py", "import scipy", "engine/weights must not import scipy"),
    "a file without a ring": ("utils.py", "import math", "'utils' belongs to no"),
    "private": ("callbacks/pruning/session.py", "trainer._results", "_results is private"),
    "private, of the module": ("callbacks/pruning/session.py", "self.x.trainer._results", "_results is private"),
    "private, of a loop": ("callbacks/curve.py", "trainer.fit_loop.epochs[0]._batches", "_batches is private"),
    "private, by name": ("callbacks/curve.py", "getattr(trainer, '_results', None)", "_results is private"),
    "a long function": ("engine/weights.py", f"def f():\n    '''Doc.'''\n{LONG_BODY}", "f has 41 lines"),
    "a long file": ("engine/weights.py", "\n" * (LONGEST_FILE + 1), "351 lines"),
}

KEPT = {
    "inwards": ("engine/decision.py", "from lightning_sap.functional.pqi import x\nfrom . import masks, weights"),
    "a ring's own folder": ("rewind/__init__.py", "from .weights import x\nfrom lightning_sap.rewind import weights"),
    "the map": ("__init__.py", "from .callbacks import x\ndef __getattr__(name):\n    from .plot import y"),
    "drawing": ("plot.py", "from .rounds.history import x\ndef f():\n    import matplotlib.pyplot"),
    "types of a drawing": ("plot.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
    "libraries for all": ("functional/select.py", "import heapq\nimport numpy\nimport torch"),
    "public attributes": ("callbacks/pruning/state.py", "trainer.optimizers\nself._trainer\ntrainer.__class__"),
    "a long docstring": ("engine/weights.py", "def f():\n    '''" + "\n" * 99 + "'''\n    return 0"),
}


def lay_out(folder: Path, path: str, text: str) -> Path:
    """A package of empty rooms with one file written."""
    package = folder / NAME
    files = [
        "sharding", "metric", "plot", "functional/pqi", "engine/masks", "engine/weights", "rounds/plan",
        "rounds/history", "rewind/weights", "callbacks/pruning/state",
    ]  # fmt: skip
    for file in [*(f"{file}.py" for file in files), "__init__.py", path]:
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
