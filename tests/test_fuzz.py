"""A minute of ``fuzz.py``, the same one every time; and proof that it would notice."""

import faulthandler
import os
import signal
from pathlib import Path

import fuzz
import pytest
import torch


def test_no_reader_fails_on_files_that_are_almost_right() -> None:
    outcomes, failures = fuzz.fuzz(list(fuzz.READERS), seed=1, n_try=12, seconds=300)
    assert failures == []
    assert outcomes.total() == 12 * len(fuzz.READERS)
    kinds = {outcome.split(": ")[0] for outcome in outcomes if not outcome.endswith("read")}
    assert kinds == set(fuzz.READERS)  # every one has refused something


@pytest.mark.parametrize("what", ["other error", "memory", "signal", "written outside"])
def test_what_a_reader_may_not_do_is_noticed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> None:
        (folder / "a").write_bytes(b"content")

    def read(folder: Path) -> None:
        if (folder / "a").read_bytes() == b"content":
            return
        if what == "other error":
            raise IndexError
        if what == "memory":
            torch.zeros(2**29)
        if what == "signal":
            faulthandler.disable()  # its traces would look like a crash of the tests
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "written outside":
            (folder.parent / "bystander" / "y").write_bytes(b"")

    monkeypatch.setitem(fuzz.READERS, "bad", fuzz.Reader(make, read))
    outcomes, failures = fuzz.fuzz(["bad"], seed=0, n_try=3, seconds=60)
    assert failures and outcomes["bad: FAILURE"] == len(failures)
