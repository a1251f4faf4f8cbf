"""Tables of measurements come out of JSON as they went in."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "docs" / "performance.py"
FACTS = {
    "device": "x CPU", "threads": 2, "torch": "2", "date": "2026-01-02", "clock": "wall",
}  # fmt: skip
ROW = {
    "seq_len": 8192, "mixer": "vq", "pass": "forward", "ms_median": 1234.5,
    "ms_spread": [1200.0, 1300.0], "repeats": 5, "tokens_per_s": 6635.9, "share_of_limit": 0.456,
    "peak_mb": None, "ratio_vs": {"sdpa": 3.14159},
}  # fmt: skip


@pytest.fixture
def page() -> Any:
    spec = importlib.util.spec_from_file_location("performance_tables", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_has_the_figures_and_no_empty_column(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    other = {**ROW, "mixer": "sdpa", "ratio_vs": {}}
    limit = {"of": "matrix", "median": 3.5, "spread": [3.0, 4.0]}
    found = {"bench": "attention", **FACTS, "limit": limit, "rows": [ROW, other]}
    path.write_text(f"a line before\n{json.dumps(found)}\n")
    said = page.table(page.result(path)).splitlines()
    assert said[0].startswith("x CPU, 2 threads, torch 2, 2026-01-02; the limit meanwhile (matrix)")
    assert "peak MB" not in said[2] and said[2].count("|") == said[3].count("|")
    assert said[4] == (
        "| 8,192 | vq | forward | 1,234.50 (1,200.00 to 1,300.00; 5) | 6,636 | 46% | 3.14 |"
    )
    assert said[5].endswith("| 46% |  |")


def test_the_limit_has_a_table_of_its_own(page: Any) -> None:
    row = {
        "mixer": "memory copy", "size": 2048, "ms_median": 1.0, "ms_spread": [1.0, 1.0],
        "repeats": 1, "giga_per_s": 4.25,
    }  # fmt: skip
    said = page.table({"bench": "limit", **FACTS, "rows": [row]})
    assert said.endswith("| memory copy | 2,048 | 1.00 (1.00 to 1.00; 1) | 4.2 |")


@pytest.mark.parametrize("content", ["", "words", "[]", '{"rows": []}'])
def test_another_file_is_refused(page: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="does not end in the result"):
        page.result(path)
