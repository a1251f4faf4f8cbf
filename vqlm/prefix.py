"""The state of a long prompt as a thing: made once, kept in a file, forked into continuations.

    prefix = Prefix.read(model, tokens)          # [1, T], any T
    prefix.save("book.state", model)
    prefix = Prefix.load("book.state", model)    # in another process, another day
    out = model(prefix.start(ids), prefix.state) # goes on with ids

A file is safetensors: the tensors of an ``LMState``, and JSON metadata that say which model they
belong to.  Its size does not depend on how much was read.  Reading one runs no code.

The last token is kept beside the state rather than in it: a model that is to go on needs a token
to read, and a prefix must be able to go on without another word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqlm import sealed
from vqlm.kept import evaluating
from vqlm.model import LM, LMState
from vqlm.untrusted import shapes_in

FORMAT = "vqlm state 1"
_CALL = 4096  # tokens read at a time: memory, never the result


class Prefix(NamedTuple):
    """What a model remembers of the tokens it has read, and the last of them.

    A value: going on from it leaves it as it is, so one prefix serves any number of continuations.
    """

    state: LMState
    """After all tokens but the last."""
    last: Int[Tensor, " B"]
    """The last token of each row, to be read next."""
    n_token: int
    """Tokens read, the last included."""

    @classmethod
    def read(cls, model: LM, tokens: Int[Tensor, "B T"]) -> Prefix:
        """Reads ``tokens`` from an empty state; T at least 1.

        Raises:
            ValueError: no tokens, or a model with a "softmax" mixer, whose state is the text.
        """
        _require_constant(model)
        if tokens.shape[1] == 0:
            raise ValueError("Prefix.read: no tokens; give at least the start symbol (END)")
        return _after(model, model.init_state(len(tokens)), tokens, tokens.shape[1])

    def extended(self, model: LM, tokens: Int[Tensor, "B T"]) -> Prefix:
        """The prefix of everything read so far and then ``tokens``."""
        return _after(model, self.state, self.start(tokens), self.n_token + tokens.shape[1])

    def start(self, tokens: Int[Tensor, "B T"] | None = None) -> Int[Tensor, "B more"]:
        """What a model reads after ``state`` to go on with ``tokens``: ``last``, then those."""
        last = self.last[:, None]
        return last if tokens is None else torch.cat([last, tokens], 1)

    def forked(self, n: int) -> Prefix:
        """Every row ``n`` times, one after another: as many continuations side by side."""
        tensors = [x.repeat_interleave(n, 0) for x in self.state.tensors()]
        state = self.state.replace_tensors(tensors)
        return Prefix(state, self.last.repeat_interleave(n, 0), self.n_token)

    def save(self, path: str | Path, model: LM) -> None:
        """Writes the file in one step; ``model`` is the one that has read.

        Raises:
            OSError: it can't be written; a file that was there before is untouched.
        """
        tensors = {f"state.{i}": x for i, x in enumerate(self.state.tensors())}
        tensors = {
            k: x.detach().cpu().contiguous() for k, x in {**tensors, "last": self.last}.items()
        }
        # As wide after ten tokens as after a billion, so that the file keeps its size.
        facts = {"model": fingerprint(model), "n_token": f"{self.n_token:020d}"}
        metadata = {"format": FORMAT, "vqlm": json.dumps(facts)}
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_bytes(sealed.pack(tensors, metadata))
            os.replace(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path, model: LM) -> Prefix:
        """The prefix in a file that ``save`` wrote for the same model, on the model's device.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, one of another kind, or the state of another model.
        """
        file, facts = Path(path), read_facts(path)
        if facts["model"] != fingerprint(model):
            raise ValueError(
                f"{file} is the state of another model than this one: weights or settings differ. "
                "Load it with the model that made it, or make it anew: vqlm state make"
            )
        try:
            tensors, _ = sealed.unpack(file)
            last = tensors.pop("last")
            wanted = model.init_state(1)
            found = [tensors.pop(f"state.{i}") for i in range(len(wanted.tensors()))]
        except (ValueError, KeyError) as error:
            raise _damaged(file, error) from error
        size = model.config.vocab_size
        if last.dim() != 1 or last.dtype != torch.int64 or not ((0 <= last) & (last < size)).all():
            raise _damaged(file, f"its last tokens are no ids below {size}")
        for got, want in zip(found, wanted.tensors(), strict=True):
            shape = (len(last), *want.shape[1:])
            if got.shape != shape or got.dtype != want.dtype:
                raise _damaged(file, f"a tensor {tuple(got.shape)}, wanted {shape}")
        device = wanted.length.device
        state = wanted.replace_tensors([x.to(device) for x in found])
        return cls(state, last.to(device), int(facts["n_token"]))


@torch.no_grad()
def _after(model: LM, state: LMState, tokens: Int[Tensor, "B T"], n_token: int) -> Prefix:
    with evaluating(model):
        for part in tokens[:, :-1].split(_CALL, 1):
            if part.shape[1]:
                state = model(part, state).state
    return Prefix(state, tokens[:, -1], n_token)


def read_facts(path: str | Path) -> dict[str, Any]:
    """What a state file says of itself: ``model``, a fingerprint, and ``n_token``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another kind.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} is no file; make a state with vqlm state make")
    try:
        shapes_in(file)  # says what is wrong with a file that is none
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise _damaged(file, error) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{file} is a safetensors file, but no {FORMAT!r}: it says "
            f"{metadata.get('format')!r}. Make one with vqlm state make"
        )
    try:
        facts = json.loads(metadata["vqlm"])
        return {"model": str(facts["model"]), "n_token": int(facts["n_token"])}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error


def fingerprint(model: LM) -> str:
    """sha256 (hex) over the settings and weights: which model a state belongs to."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require_constant(model: LM) -> None:
    if "softmax" in model.config.mixers:
        raise ValueError(
            "a softmax mixer remembers every token, so its state is no smaller than the text; "
            "keep the text, or use another mixer"
        )


def _damaged(file: Path, error: object) -> ValueError:
    return ValueError(f"{file} is damaged, or no state file: {error}")
