"""Going on from a checkpoint: whether that can be, and putting tensors back where they were."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqlm.checkpoint import load_facts
from vqlm.config import MOST, LMConfig, TrainConfig, from_dict
from vqlm.data import Corpus
from vqlm.model import LMState
from vqlm.optimizers import load_state_tensors
from vqlm.runlog import Progress


def require_same_model(saved: LMConfig, wanted: LMConfig) -> None:
    """Nothing, if they are equal.

    Raises:
        ValueError: they are not; the message has all that differs.
    """
    differ = [
        f"{f.name} is {getattr(saved, f.name)!r} there and {getattr(wanted, f.name)!r} here"
        for f in dataclasses.fields(LMConfig)
        if getattr(saved, f.name) != getattr(wanted, f.name)
    ]
    if differ:
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(differ)}. Resume without overriding "
            "the model, or start a new run with another --out"
        )


def require_same_data(
    folder: Path, info: dict[str, Any], config: TrainConfig, corpus: Corpus
) -> None:
    """Nothing, if the checkpoint in ``folder``, which says ``info``, is of this text and batches.

    Raises:
        ValueError: it is not, or damaged ``info``.
    """
    trained = info["train"]
    if not isinstance(trained, dict):
        raise damaged(folder, ValueError(f"train is a {type(trained).__name__}"))
    if info["fingerprint"] != corpus.fingerprint:
        raise ValueError(
            f"{folder} was trained on other text than {corpus.name} is now; "
            "give --data as it was, or start a new run with another --out"
        )
    for name in ("batch_size", "seq_len", "accumulate"):
        old, new = trained.get(name), getattr(config, name)
        if old != new:
            raise ValueError(
                f"{folder} has its place in the text and its carried states for {name}={old}, "
                f"not {new}; resume without changing it, or start a new run"
            )


def damaged(folder: Path, error: Exception) -> ValueError:
    """What to raise where the trainer's files of a checkpoint do not fit together."""
    return ValueError(
        f"{folder / 'trainer.json'} and trainer.safetensors are damaged or of another "
        f"version: {error}; move {folder} away to resume from the checkpoint before it"
    )


def read_progress(info: dict[str, Any], best: Path) -> Progress:
    """Where a training was, as ``info`` says; the model in ``best`` may be of a later look.

    Raises:
        KeyError, ValueError: damaged ``info``.
    """
    progress = from_dict(Progress, dict(info["progress"]))
    numbers = [x for x in dataclasses.astuple(progress) if x is not None]
    if not all(0 <= x < 2**63 for x in numbers):
        raise ValueError(f"{progress} is not possible")
    return dataclasses.replace(progress, best_nats=_best_nats(best))


def _best_nats(best: Path) -> float | None:
    """Those of the model in ``best``; None if there is none that can be read."""
    try:
        nats = float(load_facts(best)["progress"]["best_nats"])
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return nats if 0 <= nats < math.inf else None


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts the tensors called "optimizer/..." back into ``optimizer``.

    Raises:
        ValueError: they do not fit.
    """
    prefix = "optimizer/"
    mine = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    load_state_tensors(optimizer, mine)


def load_states(
    empty: LMState, n_part: int, tensors: dict[str, Tensor], config: LMConfig
) -> list[LMState]:
    """The carried states "state/PART/..." of every part, of the shapes that ``empty`` has.

    Raises:
        KeyError: a tensor is missing.
        ValueError: one has another shape or type, or codes and counts that a model of ``config``
            cannot have.
    """
    states = []
    for part in range(n_part):
        found = []
        for index, want in enumerate(empty.tensors()):
            got = tensors[f"state/{part}/{index}"]
            # What grows with the text (a softmax mixer's keys) is empty in an empty state.
            fits = all(n in (0, m) for n, m in zip(want.shape, got.shape, strict=False))
            if got.dtype != want.dtype or got.dim() != want.dim() or not fits:
                raise ValueError(
                    f"state/{part}/{index} is {got.dtype} {tuple(got.shape)}, "
                    f"wanted {want.dtype} {tuple(want.shape)}"
                )
            found.append(got.to(want.device))
        states.append(empty.replace_tensors(found))
        _require_possible(states[-1], config)
    return states


def _require_possible(state: LMState, config: LMConfig) -> None:
    """Whole numbers are used as indices, and one out of range would end a process on a GPU."""
    most = {"code": config.n_code - 1, "n_used": config.n_entry}
    named = [pair for mixer in state.layers for pair in mixer._asdict().items()]
    for name, x in [*named, ("length", state.length)]:
        limit = most.get(name, MOST)
        if not x.is_floating_point() and bool(((x < 0) | (x > limit)).any()):
            raise ValueError(f"a state has a {name} that is not from 0 to {limit}")
