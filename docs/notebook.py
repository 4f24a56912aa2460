"""Makes the notebook `examples/tutorial.ipynb` from the page `docs/tutorial.md`: `python docs/notebook.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.ipynb"
CODE = re.compile(r"^```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"\]\((?!https?:|#)")  # the start of a link to another page


def cells(page: str) -> list[dict]:
    """Text and code by turns, as the format of notebooks has them."""
    found = []
    for i, part in enumerate(CODE.split(page)):
        is_code = i % 2 == 1
        text = part if is_code else FILE.sub("](../docs/", part.strip("\n"))
        cell = {"cell_type": "code" if is_code else "markdown", "id": f"cell-{i:02}", "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if is_code else {}
        found.append(cell | {"source": text.splitlines(keepends=True)})
    return found


def notebook() -> str:
    """The whole file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {
        "cells": cells(PAGE.read_text(encoding="utf-8")),
        "metadata": metadata,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
