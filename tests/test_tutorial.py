"""The tutorial: its notebook is its page, and runs from top to bottom, with fewer images and epochs unless `--full`."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
AS_WRITTEN, SMALL = "EPOCHS, IMAGES = 20, 1797", "EPOCHS, IMAGES = 6, 240"


def run(sizes):
    """The names that the code of the notebook leaves."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert AS_WRITTEN in code[0]
    names = {}
    for number, text in enumerate(code):
        exec(compile(text.replace(AS_WRITTEN, sizes), f"cell {number}", "exec"), names)
    return names


def test_the_notebook_is_made_of_the_page():
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert NOTEBOOK.read_text(encoding="utf-8") == module.notebook(), "python docs/notebook.py makes it anew"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [SMALL, pytest.param(AS_WRITTEN, marks=[pytest.mark.full, pytest.mark.timeout(1500)])]
)
def test_from_dense_to_packed(sizes, capsys):
    left = run(sizes)
    printed = capsys.readouterr().out
    remaining = float(re.search(r"([\d.]+)% of 11,172,032 weights remain", printed)[1]) / 100
    assert remaining == pytest.approx(left["sap"].remaining, abs=1e-4)
    assert remaining < 0.5
    assert len(re.findall(r"^round +\d+: ", printed, re.MULTILINE)) == len(left["sap"].history) > 2
    dense, packed = (float(size) for size in re.findall(r"([\d.]+) MB", printed))
    assert dense == pytest.approx(44.8, abs=0.3)  # four bytes for each of the weights
    assert packed < (remaining + 1 / 32) * dense + 0.3  # the kept ones, a bit for each, and norms
    assert Path("rounds.png").stat().st_size > 10_000
    if sizes == AS_WRITTEN:
        before, after = re.search(r"test accuracy: dense ([\d.]+)%, pruned ([\d.]+)%", printed).groups()
        assert float(before) > 92
        assert float(after) > float(before) - 4
