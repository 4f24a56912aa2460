"""Hatchling: the README as an index shows it, where no file of the repository lies beside it."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(\]\(|\b(?:src|srcset|href)=\")(?!https?:|#|mailto:)([^)\"]+)")
PICTURES = (".png", ".svg")


def readme(text: str, source: str, version: str) -> str:
    """The text with absolute links to the files of that version, in the repository at `source`."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[2].endswith(PICTURES) else "blob"
        return f"{match[1]}{source}/{kind}/v{version}/{match[2]}"

    return LINK.sub(absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        absolute = readme(text, metadata["urls"]["Source"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute}
