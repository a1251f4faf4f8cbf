"""What mkdocs does beside turning Markdown into pages: it reads these functions by their names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

OPTIONAL = {"Hugging Face": "huggingface.md"}
"""Pages that are in the menu only where they exist."""

HELP = "<!-- help of every command -->"
"""Where that goes in a page."""


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
    if HELP in markdown:
        markdown = markdown.replace(HELP, _help())
    depth = page.file.src_uri.count("/")
    outside = r"\[([^\]]+)\]\((?:\.\./){" + str(depth + 1) + r"}[^)]*\)"
    return re.sub(outside, r"\1", markdown)


def _help() -> str:
    """A section for each command, in the order of ``vqlm --help``."""
    os.environ["COLUMNS"] = "96"
    from vqlm.cli import _parser

    parser = _parser()
    (commands,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
    sections = {"vqlm": parser, **{f"vqlm {name}": each for name, each in commands.items()}}
    return "\n".join(f"## {n}\n\n```text\n{p.format_help()}```\n" for n, p in sections.items())
