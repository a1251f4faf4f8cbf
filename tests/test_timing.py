"""What benchmarks share: who runs when, what a row says, and peak memory in a fresh process."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vqlm import timing
from vqlm.timing import Built, Plan, Row, Side

MB = 1_000_000
TESTS = "test_timing"
"""This file, as a fresh process imports it: pytest has put its folder on the path."""

log: list[str] = []


class Clock:
    """Time passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


def build(name: str, seconds: list[float]) -> Built:
    """A side that takes ``seconds``, one a run, for the first pass and twice that for both."""
    rest = iter(seconds)

    def run() -> Iterator[str]:
        log.append(name)
        took = next(rest)
        clock.now += took
        yield "forward"
        clock.now += took
        yield "forward+backward"

    return Built(run, {"forward": 30.0}, {"parameters": 7})


def limit(_: Callable[[], float]) -> float:
    log.append("limit")
    return 10.0


def side(name: str, seconds: list[float], **more: Any) -> Side:
    settings = {"name": name, "seconds": seconds}
    return Side(name, f"{TESTS}:build", settings, **more)


def rows_of(*sides: Side, seq_len: int = 10_000, steps: int = 1) -> dict[tuple[str, str], Row]:
    log.clear()
    told: list[Row] = []
    plan = Plan("tried", limit, clock, memory=False, report=told.append)
    # One module, under whatever name pytest imported it.
    sys.modules[TESTS] = sys.modules[__name__]
    rows, rates = plan.rows(sides, seq_len, 1000, steps=steps)
    assert told == rows and set(rates) == {10.0}
    return {(row.mixer, row.pass_): row for row in rows}


def test_sides_run_in_turn_and_some_less_often() -> None:
    rows = rows_of(side("a", [1.0, 2.0, 6.0], repeats=3), side("b", [8.0], repeats=1))
    assert log == ["limit", "a", "b", "limit", "a", "limit", "a", "limit"]
    a, b = rows["a", "forward"], rows["b", "forward"]
    assert (a.repeats, b.repeats) == (3, 1)
    assert a.ms_median == 2000 and a.ms_spread == (1500, 4000)
    assert b.ms_median == 8000 and b.ms_spread == (8000, 8000)
    assert a.tokens_per_s == 500
    assert rows["a", "forward+backward"].ms_median == 4000


def test_ratio_is_of_medians_and_above_one_where_this_side_is_faster() -> None:
    rows = rows_of(side("a", [1.0, 2.0], repeats=2), side("b", [3.0, 9.0], repeats=2))
    assert rows["a", "forward"].ratio_vs == {"b": 4.0}
    assert rows["b", "forward+backward"].ratio_vs == {"a": 0.25}


def test_share_of_limit_is_of_the_passes_that_have_work() -> None:
    rows = rows_of(side("a", [6.0], repeats=1))
    assert rows["a", "forward"].share_of_limit == 0.5  # 30 in 6 s, of 10 a second
    assert rows["a", "forward+backward"].share_of_limit is None


def test_steps_divide_times_and_not_rates() -> None:
    row = rows_of(side("a", [6.0], repeats=1), steps=4)["a", "forward"]
    assert row.ms_median == 1500 and row.tokens_per_s == pytest.approx(1000 / 6, abs=0.1)
    assert row.share_of_limit == 0.5


def test_short_sequences_are_warmed_up() -> None:
    rows = rows_of(side("a", [9.0, 1.0], repeats=1), seq_len=timing.WARM_UP)
    assert log == ["a", "limit", "a", "limit"]
    assert rows["a", "forward"].ms_median == 1000


def test_a_label_tells_sides_of_one_name_apart() -> None:
    a = side("vq", [1.0], repeats=1, label="vq block=4", facts={"block": 4})
    rows = rows_of(a, side("sdpa", [2.0], repeats=1))
    assert rows["sdpa", "forward"].ratio_vs == {"vq block=4": 0.5}
    row = rows["vq", "forward"]
    json.dumps(row.json())
    assert row.json()["block"] == 4 and row.json()["parameters"] == 7
    assert row.json()["pass"] == "forward" and "facts" not in row.json()
    fields = (
        "what mixer seq_len pass ms_median ms_spread tokens_per_s peak_mb ratio_vs share_of_limit"
    )
    assert set(fields.split()) <= row.json().keys()
    assert "block=4" in timing.line(row) and "2.00x sdpa" in timing.line(row, "sdpa")
    assert "sdpa" not in timing.line(row, "llama")


def build_tensors(before: int, forward: int, both: int) -> Built:
    """A side that has ``before`` bytes at hand, and needs so many for its passes."""
    held = torch.ones(before, dtype=torch.uint8)

    def run() -> Iterator[str]:
        x = torch.ones(forward, dtype=torch.uint8)
        yield "forward"
        y = torch.ones(both - forward, dtype=torch.uint8)
        yield "forward+backward"
        assert held[0] + x[0] + y[0] == 3

    return Built(run, {})


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    here = torch.ones(300 * MB, dtype=torch.uint8)  # which must not count there
    sizes = {"before": 50 * MB, "forward": 20 * MB, "both": 90 * MB}
    peaks = timing.peak_bytes(Side("x", f"{TESTS}:build_tensors", sizes))
    assert here[0] == 1 and list(peaks) == ["forward", "forward+backward"]
    (forward, _), (both, in_all) = peaks.values()
    assert abs(forward - 20 * MB) < 4 * MB and abs(both - 90 * MB) < 4 * MB
    assert in_all > both + 50 * MB
    plan = Plan("tried", limit)
    rows, _ = plan.rows([Side("x", f"{TESTS}:build_tensors", sizes, repeats=1)], 10, 10)
    assert abs(rows[1].peak_mb - 90) < 4  # type: ignore[operator]
    assert rows[1].json()["process_mb"] > 140


def build_broken() -> Built:
    """A side that can't be."""
    raise MemoryError("no room")


def test_a_failing_process_costs_its_figure_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert timing.peak_bytes(Side("x", f"{TESTS}:build_broken", {})) == {}
    assert "no peak memory of x" in (said := capsys.readouterr().err) and "no room" in said


def test_quartiles_by_hand() -> None:
    assert timing.quartiles([4.0]) == (4, 4, 4)
    assert timing.quartiles([3.0, 1.0, 2.0]) == (1.5, 2, 2.5)


def test_machine_says_what_a_time_depends_on() -> None:
    facts = timing.machine()
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert {"device", "date"} <= facts.keys()
