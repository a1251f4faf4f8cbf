"""Tensor files that tell when they were damaged: safetensors with a SHA-256 of all they hold.

safetensors itself notices a file that was cut short, but not a bit that has flipped.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, uint8

from vqlm.untrusted import read_bytes, shapes_in

SEAL = "sha256"
"""Where the digest stands in a file's metadata."""


def pack(tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    """What a file with these tensors, on the CPU and contiguous, and these ``facts`` holds."""
    facts = {"format": "pt", **(facts or {})}
    content = safetensors.torch.save(tensors, {**facts, SEAL: digest(tensors, facts)})
    # safetensors writes the facts in another order each time; the same tensors and facts are to
    # give the same bytes.
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(ordered) <= length
    return b"".join((content[:8], ordered.ljust(length), memoryview(content)[8 + length :]))


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file; one without a seal, that others wrote, is taken as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, one that is not as it was written, or a link that
            leads out of its folder.
    """
    shapes_in(path)
    content = read_bytes(path)
    try:
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        facts = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    seal = facts.pop(SEAL, None)
    if seal is not None and seal != digest(tensors, facts):
        raise ValueError(f"{path} is damaged: it does not hold what was written to it")
    return tensors, facts


def digest(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and values, and of the facts, whatever their order."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        total.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        # One element may claim any stride, and is contiguous all the same.
        flat = x.reshape(-1).as_strided((x.numel(),), (1,))
        total.update(flat.view(uint8).numpy().data)
    return total.hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a link that leads out of its folder, a pipe or a device.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()
