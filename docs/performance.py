"""``python docs/performance.py FILE...``: Markdown tables of what ``vqlm bench --json`` printed.

Each file is the output of one run, or its last line alone.  What a page says of speed is made from
these files, never typed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def result(path: Path) -> dict[str, Any]:
    """The JSON object in the last line of ``path``.

    Raises:
        ValueError: there is none.
    """
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    try:
        found = json.loads(lines[-1])
        assert isinstance(found, dict) and found["rows"]
    except (IndexError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{path} does not end in the result of vqlm bench --json") from error
    return found


def table(found: dict[str, Any]) -> str:
    """A heading with the facts of the run, and a row for each of its rows."""
    if found["bench"] == "limit":
        return "\n".join([_facts(found), "", *_lines(_LIMIT, found["rows"])])
    peers = list(dict.fromkeys(name for row in found["rows"] for name in row["ratio_vs"]))
    columns = dict(_COLUMNS)
    for name in peers:
        columns[f"times as fast as {name}"] = lambda row, name=name: _number(
            row["ratio_vs"].get(name), 2
        )
    there = {title for title, cell in columns.items() if any(map(cell, found["rows"]))}
    columns = {title: cell for title, cell in columns.items() if title in there}
    return "\n".join([_facts(found), "", *_lines(columns, found["rows"])])


def _lines(columns: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
    return lines


def _facts(found: dict[str, Any]) -> str:
    n = found["threads"]
    clock = {"wall": "", "cpu": ", processor time"}[found["clock"]]
    facts = f"{found['device']}, {n} thread{'s' * (n != 1)}{clock}, torch {found['torch']}"
    facts += f", {found['date']}"
    if limit := found.get("limit"):
        low, high = limit["spread"]
        facts += f"; the limit meanwhile ({limit['of']}): {limit['median']} ({low} to {high})"
    return facts + "."


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:,.{digits}f}"


def _ms(row: dict[str, Any]) -> str:
    low, high = row["ms_spread"]
    return f"{row['ms_median']:,.2f} ({low:,.2f} to {high:,.2f}; {row['repeats']})"


def _share(row: dict[str, Any]) -> str:
    share = row["share_of_limit"]
    return "" if share is None else f"{100 * share:.0f}%"


_COLUMNS = {
    "tokens": lambda row: f"{row['seq_len']:,}",
    "mixer": lambda row: row["mixer"],
    "block": lambda row: _number(row.get("block"), 0),
    "pass": lambda row: row["pass"],
    "ms, median (quartiles; repeats)": _ms,
    "tokens/s": lambda row: _number(row["tokens_per_s"], 0),
    "tokens/GFLOP": lambda row: _number(row.get("tokens_per_gflop"), 1),
    "share of limit": _share,
    "peak MB": lambda row: _number(row["peak_mb"], 0),
    "state bytes": lambda row: _number(row.get("state_bytes"), 0),
}
_LIMIT = {
    "what": lambda row: row["mixer"],
    "size": lambda row: f"{row['size']:,}",
    "ms, median (quartiles; repeats)": _ms,
    "10^9 a second": lambda row: _number(row["giga_per_s"], 1),
}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{table(result(Path(name)))}\n")
