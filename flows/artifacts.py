"""What a flow leaves on Prefect's page: tables, text, and links to the pages that it made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

PAGES = "SMEARLINE_PAGES"
"""Where `flows serve` shows the workspace's pages over HTTP; without it a link names the file."""


def table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    plain = [{name: "" if value is None else value for name, value in row.items()} for row in rows]
    create_table_artifact(table=plain, key=key, description=description)


def text(key: str, markdown: str, description: str) -> None:
    create_markdown_artifact(markdown=markdown, key=key, description=description)


def link(key: str, page: Path, words: str) -> None:
    """A link to a page of the workspace; nothing where the page was not made."""
    if page.is_file():
        create_link_artifact(link=address(page), link_text=f"{words} ({page})", key=key, description=words)


def address(page: Path) -> str:
    """The URL of a page, given relative to the workspace."""
    base = os.environ.get(PAGES)
    return f"{base}/{page.as_posix()}" if base else page.resolve().as_uri()
