"""What a training shows and keeps of itself: a progress bar, TensorBoard events, JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqlm.codebook import CodeStats
from vqlm.evaluate import Evaluation


@dataclass
class Progress:
    """Where a training is; all of it is in a checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in ``fit``, over all its runs."""
    best_nats: float | None = None
    """Least nats per token of a look at the validation split so far."""
    skipped: int = 0
    """Batches left out after a divergence; ``step`` and these are all that were read."""


class StepSums(NamedTuple):
    """What one optimizer step tells; tensors stay on the device until a line is written."""

    nats: Tensor
    """Sum of the cross-entropy over the batch."""
    norm: Tensor
    """Global norm of the gradient before clipping."""
    n_bytes: int
    """Bytes of text in the batch."""
    rate: float
    """Learning rate."""
    stats: tuple[CodeStats | None, ...]
    """Codebook statistics of the batch, one a layer."""


class RunLog:
    """Writes ``RUN/metrics.jsonl`` and TensorBoard events, and shows a bar on a terminal.

    Where standard error is no terminal, a plain line stands in for the bar now and then.
    """

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run.mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(run / "events"))
        self._lines = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._bar = tqdm(total=1.0, disable=None, bar_format="{desc} |{bar}| {percentage:3.0f}%")
        self._pending: list[StepSums] = []
        self._last_line = 0.0
        self._tokens_before: tuple[int, float] | None = None

    def add(self, sums: StepSums) -> None:
        """Takes note of a step; nothing is computed yet."""
        self._pending.append(sums)

    def forget(self) -> None:
        """Drops the steps added since the last line: the training has gone back before them."""
        self._pending.clear()
        self._tokens_before = None

    def write(self, progress: Progress, share: float) -> dict[str, float]:
        """Writes the mean of the steps added since the last call, if there are any; returns it."""
        if not self._pending:
            return {}
        nats = torch.stack([sums.nats for sums in self._pending]).sum().item()
        bits = nats / (math.log(2) * max(1, sum(sums.n_bytes for sums in self._pending)))
        last = self._pending[-1]
        tokens, seconds = self._tokens_before or (0, 0.0)
        speed = (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9)
        self._tokens_before = progress.tokens, progress.seconds
        left = progress.seconds * max(0.0, 1 - share) / max(share, 1e-9)
        numbers = {
            "train/bits_per_byte": bits,
            "train/learning_rate": last.rate,
            "train/gradient_norm": last.norm.item(),
            "train/tokens_per_second": speed,
        }
        numbers |= _codebook_numbers("", last.stats)
        self._record(progress, numbers)
        self._pending.clear()
        text = (
            f"step {progress.step}  {bits:.3f} bits/byte  {speed:,.0f} tokens/s  "
            f"{_clock(progress.seconds)} gone, {_clock(left)} left"
        )
        self._bar.n = round(min(share, 1.0), 4)
        self._bar.set_description_str(text)
        if self._bar.disable and time.monotonic() - self._last_line > 15:
            self.note(text)
            self._last_line = time.monotonic()
        return numbers

    def validation(self, progress: Progress, result: Evaluation) -> None:
        """Writes a look at the validation split."""
        numbers = {"validation/bits_per_byte": result.bits_per_byte}
        numbers |= _codebook_numbers("validation_", result.codebooks)
        self._record(progress, numbers)
        self.note(f"step {progress.step}  validation {result.bits_per_byte:.3f} bits/byte")

    def note(self, text: str) -> None:
        """Shows a line above the bar, if standard error takes one: it may be a file, and full."""
        with contextlib.suppress(OSError):
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._bar.close()
        for file in (self._lines, self._events):
            with contextlib.suppress(OSError):  # a full disk, of which `_record` has warned
                file.close()

    def _record(self, progress: Progress, numbers: dict[str, float]) -> None:
        seconds = round(progress.seconds, 2)
        line = {"step": progress.step, "tokens": progress.tokens, "seconds": seconds, **numbers}
        try:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, progress.step)
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        except OSError as error:  # a full disk must not end a training
            self.note(f"warning: cannot write the log ({error.strerror}); training goes on")


class NoLog(RunLog):
    """The log of a process that keeps none, because another one does."""

    def __init__(self) -> None:
        pass

    def add(self, sums: StepSums) -> None:
        """Nothing."""

    def forget(self) -> None:
        """Nothing."""

    def write(self, progress: Progress, share: float) -> dict[str, float]:
        """Nothing; returns no numbers."""
        return {}

    def validation(self, progress: Progress, result: Evaluation) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _codebook_numbers(prefix: str, books: Sequence[CodeStats | None]) -> dict[str, float]:
    """Code use (perplexity), dead codes and error of each layer; code use of each head as well."""
    numbers: dict[str, float] = {}
    for layer, stats in enumerate(books):
        if stats is None:
            continue
        in_use = stats.perplexity().tolist()
        numbers[f"{prefix}codes_in_use/layer{layer}"] = sum(in_use) / len(in_use)
        for head, used in enumerate(in_use):
            numbers[f"{prefix}codes_in_use/layer{layer}/head{head}"] = used
        numbers[f"{prefix}dead_codes/layer{layer}"] = stats.dead().float().mean().item()
        error = stats.relative_error().mean().item()
        numbers[f"{prefix}quantization_error/layer{layer}"] = error
    return numbers


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
