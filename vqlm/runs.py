"""A run folder as a report reads it: settings, logged lines, and what probes found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqlm import checkpoint, probe
from vqlm.config import LMConfig
from vqlm.data import Split
from vqlm.model import LM

PIECES, LENGTH = 16, 2048
"""Pieces of text that the probes read, and the tokens of each."""

MASS_LENGTH = 1024
"""Tokens whose attention weights are looked at; memory grows with their square."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds, and what was measured for the report."""

    label: str
    """How the report calls it."""
    model: LMConfig
    """The model's settings."""
    facts: dict[str, Any]
    """Of the newest checkpoint: ``train`` (the training's settings), ``progress``, ``data``."""
    lines: list[dict[str, float]]
    """Logged lines of training, by step."""
    looks: list[dict[str, float]]
    """Logged looks at the validation split, by step."""
    parameters: int = 0
    """Of the model, codebooks left out."""
    state_bytes: int = 0
    """Size of the state of one text, in bytes, empty."""
    mass: list[probe.Mass] = field(default_factory=list)
    """One a layer; empty where nothing was measured."""
    position: probe.PositionLoss | None = None
    """None where nothing was measured."""
    growth: list[probe.Growth | None] = field(default_factory=list)
    """One a layer; empty where nothing was measured."""
    sample: str | None = None
    """Text that the model wrote."""

    def series(self, name: str, looks: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokens trained on, and the values logged under ``name``; empty where there are none."""
        found = [
            (self._tokens(line), line[name])
            for line in (self.looks if looks else self.lines)
            if name in line
        ]
        pairs = np.array(found, dtype=float).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _tokens(self, line: dict[str, float]) -> float:
        train = self.facts.get("train", {})
        per_step = train.get("batch_size", 1) * train.get("seq_len", 1)
        return line.get("tokens", line["step"] * per_step)

    def layers_with(self, name: str, looks: bool = False) -> list[int]:
        """Numbers of the layers for which ``name/layerN`` was logged."""
        known = {key for line in (self.looks if looks else self.lines) for key in line}
        return [i for i in range(self.model.n_layer) if f"{name}/layer{i}" in known]


def read_run(folder: Path, label: str) -> Run:
    """Settings and logged lines of a run folder.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: a damaged file.
    """
    model = checkpoint.load_model(folder)
    newest = checkpoint.newest_checkpoint(folder)
    lines, looks = read_log(folder / "metrics.jsonl")
    return Run(
        label, model.config, checkpoint.load_facts(newest) if newest else {}, lines, looks,
        sum(p.numel() for p in model.parameters()), model.state_bytes(),
    )  # fmt: skip


def read_log(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Lines of training, and looks at the validation split; both empty without a file.

    A training that was stopped and resumed logs some steps twice: the later line counts.  A last
    line that a crash cut short is left out.

    Raises:
        ValueError: another line that is no JSON object with a step.
    """
    kinds: tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]] = ({}, {})
    # A line that is no UTF-8 is then no JSON either, and is named.
    texts = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = {name: float(value) for name, value in json.loads(text).items()}
            step = int(line["step"])
        except (
            ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
        ) as error:  # fmt: skip
            if number == len(texts):
                break
            raise ValueError(f"{path}: line {number} is damaged ({error!r}); remove it") from error
        kinds["validation/bits_per_byte" in line][step] = line
    training, looks = ([kind[step] for step in sorted(kind)] for kind in kinds)
    return training, looks


def measure(model: LM, split: Split) -> dict[str, Any]:
    """The fields of ``Run`` that probes find on a text: mass, position and growth.

    What the text is too short for is left out.
    """
    found: dict[str, Any] = {}
    longest = int(np.diff([*split.document_offsets, len(split.tokens)]).max())
    text = probe.pieces(split, min(LENGTH, longest), PIECES)
    if text is None:
        return found
    found["position"] = probe.loss_by_position(model, text)
    row = torch.from_numpy(text[:1]).to(next(model.parameters()).device)
    growth = probe.memory_growth(model, row)
    found["growth"] = growth if any(growth) else []
    try:
        found["mass"] = probe.attention_mass(model, row[:, :MASS_LENGTH])
    except ValueError:  # no query has anything beyond its window
        pass
    return found


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, unlike all others: its last parts, as many as that takes.

    Raises:
        ValueError: a folder that is there twice.
    """
    paths = [folder.resolve() for folder in folders]
    for n in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        names = ["/".join(p.parts[-n:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(
        f"the same run was given twice: {', '.join(map(str, folders))}; give each once"
    )
