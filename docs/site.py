"""What mkdocs does beside turning Markdown into pages: it reads these functions by their names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

OPTIONAL = {"Hugging Face": "huggingface.md"}
"""Pages that are in the menu only where they exist."""


def on_config(config: Any) -> Any:
    """Adds the optional pages to the menu, after the how-tos."""
    there = [
        {title: name}
        for title, name in OPTIONAL.items()
        if (Path(config["docs_dir"]) / name).is_file()
    ]
    config["nav"][3:3] = there
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in the help of commands, and unlinks files of the repository that are no page."""
    markdown = re.sub(r"<!-- help: vqlm ?([\w-]*) -->", lambda m: _help(m[1]), markdown)
    depth = page.file.src_uri.count("/")
    outside = r"\[([^\]]+)\]\((?:\.\./){" + str(depth + 1) + r"}[^)]*\)"
    return re.sub(outside, r"\1", markdown)


def _help(command: str) -> str:
    os.environ["COLUMNS"] = "96"
    from vqlm.cli import _parser

    parser = _parser()
    if command:
        actions = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
        parser = actions[0].choices[command]  # type: ignore[index, call-overload]
    return f"```text\n{parser.format_help()}```"
