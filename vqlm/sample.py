"""Text out of a byte-level model, as it is made."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch

from vqlm.data import END, N_SPECIAL, encode
from vqlm.model import LM


def stream_text(
    model: LM,
    prompt: bytes,
    n_token: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Continues ``prompt`` (which may be empty) by up to ``n_token`` bytes, piece by piece.

    Ends early where the model ends the document.  Bytes that are no UTF-8 become U+FFFD.

    Raises:
        ValueError: a negative ``n_token``, or settings that ``sampling.pick`` refuses.
    """
    if n_token < 0:
        raise ValueError(f"n_token={n_token}, but it must be 0 or more")
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    ids = [END, *encode(prompt).tolist()]
    tokens = model.stream(
        torch.tensor([ids], device=device), n_token,
        temperature=temperature, top_p=top_p, generator=generator,
    )  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token, _ in tokens:
        value = int(token)
        if value == END:
            break
        if value >= N_SPECIAL and (piece := decoder.decode(bytes([value - N_SPECIAL]))):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
