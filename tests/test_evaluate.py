"""Evaluation is a plain loop over documents, whatever the sizes it is done in."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL, text
from torch import Tensor

from vqlm.codebook import CodeStats, nearest_code
from vqlm.data import END, Split
from vqlm.evaluate import Evaluation, evaluate
from vqlm.fused import normalised
from vqlm.model import LM

SIZES = [(50, 1), (1, 1000), (2, 7), (3, 16)]
MIXERS: dict[str, dict[str, Any]] = {
    "vq": {},
    "gau": dict(layer="gau", n_head=1, n_layer=1, absolute_position=True),
    "mixed": dict(mixers=("window", "vq")),
    "softmax": dict(mixers=("softmax",), n_layer=1),
    "recurrent": dict(mixers=("gated-deltanet", "mamba2")),
}


def lm(**changes: Any) -> LM:
    """A model in float64 that is sure of itself, and whose dropout must not be seen."""
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL, output_scale=3.0, dropout_residual=0.5, **changes)
    return LM(config).double()


@pytest.fixture(scope="module")
def split() -> Split:
    """Documents shorter and longer than a window, a block, and each other."""
    documents = [text(n, seed=n)[:length] for n, length in [(9, 37), (3, 1), (12, 50), (2, 8)]]
    return Split.from_documents([*documents, b"\x00\xff", documents[0]])


def documents_of(split: Split) -> list[list[int]]:
    offsets = split.document_offsets.tolist()
    return [split.tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def plain_nats(model: LM, documents: list[list[int]]) -> float:
    """One document at a time, in one call, without states, masks or batches."""
    model.eval()
    total = 0.0
    for targets in documents:
        inputs = torch.tensor([[END, *targets[:-1]]])
        rows = model(inputs).logits[0].log_softmax(-1).tolist()
        total -= math.fsum(row[target] for row, target in zip(rows, targets, strict=True))
    return total


@pytest.mark.parametrize("mixers", MIXERS)
def test_it_is_a_plain_loop_over_documents(mixers: str, split: Split) -> None:
    model = lm(**MIXERS[mixers])
    wanted = plain_nats(model, documents_of(split))
    for batch_size, seq_len in SIZES:
        got = evaluate(model, split, batch_size=batch_size, seq_len=seq_len)
        assert got.nats == pytest.approx(wanted, rel=1e-9, abs=0), (batch_size, seq_len)
        assert (got.n_tokens, got.n_bytes) == (len(split.tokens), split.n_bytes)


@pytest.mark.parametrize(
    ("mixers", "context_len"),
    [*(("vq", n) for n in (6, 16, 1000)), *((mixers, 16) for mixers in MIXERS)],
)
def test_context_len_is_the_pieces_alone(mixers: str, context_len: int, split: Split) -> None:
    model = lm(**MIXERS[mixers])
    pieces = [
        document[i : i + context_len]
        for document in documents_of(split)
        for i in range(0, len(document), context_len)
    ]
    wanted = plain_nats(model, pieces)
    for batch_size, seq_len in [(2, 6), (50, 16)]:
        got = evaluate(
            model, split, batch_size=batch_size, seq_len=seq_len, context_len=context_len
        )
        assert got.nats == pytest.approx(wanted, rel=1e-9, abs=0), (batch_size, seq_len)
        assert (got.n_tokens, got.n_bytes) == (len(split.tokens), split.n_bytes)


@pytest.mark.parametrize("max_bytes", [1, 20, 37, 38, 60, 10_000])
def test_a_look_is_the_first_bytes_of_the_first_documents(max_bytes: int, split: Split) -> None:
    model = lm()
    documents, left = [], max_bytes
    for document in documents_of(split):
        if left > 0:
            documents.append(document if len(document) - 1 <= left else document[:left])
        left -= len(document) - 1
    got = evaluate(model, split, batch_size=3, seq_len=9, max_bytes=max_bytes)
    assert got.nats == pytest.approx(plain_nats(model, documents), rel=1e-9)
    assert got.n_bytes == min(max_bytes, split.n_bytes)
    assert got.n_tokens == sum(map(len, documents))


def test_code_statistics_count_every_real_token_once(split: Split) -> None:
    """Against the keys of each document alone, read off the model as it runs."""
    model = lm(mixers=("window", "vq"), n_layer=4)
    book = model.codebooks()[1]
    assert book is not None
    keys: list[Tensor] = []
    hook = book.register_forward_pre_hook(
        lambda module, inputs: keys.append(normalised(inputs[0], inputs[4]))
    )
    plain_nats(model, documents_of(split))
    hook.remove()
    together = torch.cat(keys, 2)
    codes = nearest_code(together, book.codes())
    counts = torch.stack([c.bincount(minlength=MODEL.n_code) for c in codes[0]]).double()
    share = counts / counts.sum(-1, keepdim=True)
    perplexity = (-(share * share.clamp(min=1e-300).log()).sum(-1)).exp()
    for batch_size, seq_len in SIZES:
        got = evaluate(model, split, batch_size=batch_size, seq_len=seq_len)
        window, first, other_window, second = got.codebooks
        assert window is None and other_window is None
        assert first is not None and second is not None
        assert torch.equal(first.key_count, counts)
        assert torch.allclose(first.energy, together.square().sum((0, 2, 3)))
        assert second.key_count.sum(-1).tolist() == [len(split.tokens)] * 2
        assert got.codes_in_use()[0] == pytest.approx(perplexity.mean().item())
        assert got.summary()["dead_codes"][0] == int((counts == 0).sum())  # type: ignore[index]


def test_the_arithmetic_by_hand() -> None:
    stats = CodeStats(
        torch.tensor([[2.0, 2.0, 0.0, 0.0]]), torch.zeros(1, 4, 1), torch.tensor([3.0]),
        torch.tensor([12.0]), torch.zeros(1, 0, 1),
    )  # fmt: skip
    nats = 8 * math.log(2) * 5
    result = Evaluation(nats, n_tokens=20, n_bytes=16, codebooks=(stats,), n_words=4)
    assert result.bits_per_byte == pytest.approx(2.5)
    assert result.summary() == {
        "bits_per_byte": pytest.approx(2.5),
        "nats_per_token": pytest.approx(2 * math.log(2)),
        "token_perplexity": pytest.approx(4),
        "word_perplexity": pytest.approx(math.exp(nats / 4)),
        "n_tokens": 20,
        "n_bytes": 16,
        "n_words": 4,
        "codes_in_use": [2.0],
        "dead_codes": [2],
        "quantization_error": [0.25],
    }
    assert json.loads(json.dumps(result.summary())) == result.summary()


def test_an_untrained_uniform_model_costs_log2_of_the_vocabulary(split: Split) -> None:
    model = lm()
    with torch.no_grad():
        model.output.weight.zero_()
    got = evaluate(model, split)
    assert got.nats == pytest.approx(math.log(259) * len(split.tokens))
    assert got.bits_per_byte == pytest.approx(math.log2(259) * len(split.tokens) / split.n_bytes)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_model_as_it_was(training: bool, split: Split) -> None:
    model = lm().train(training)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random = torch.get_rng_state()
    evaluate(model, split, batch_size=2, seq_len=8)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, split, batch_size=0)
    assert model.training == training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_float32_agrees_with_float64(split: Split) -> None:
    wanted = evaluate(lm(), split).nats
    assert evaluate(lm().float(), split).nats == pytest.approx(wanted, rel=1e-5)


MEMORY = """
import resource, sys
import torch
from vqlm import LM, LMConfig
from vqlm.data import Split
from vqlm.evaluate import evaluate

torch.set_num_threads(1)
model = LM(LMConfig(n_layer=1, d_model=16, n_head=1, d_k=8, d_v=8, n_code=8, window=64, block=256))
peaks = []
for n_bytes in (15_000, 150_000):
    split = Split.from_documents([bytes(range(97, 117)) * (n_bytes // 20)])
    evaluate(model, split, seq_len=1024)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the Unix module resource")
def test_ten_times_the_text_needs_no_more_memory() -> None:
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    unit = 1024 if sys.platform != "darwin" else 1
    # The logits of the calls in between would be 140 MB; the text itself is 0.6 MB.
    assert int(done.stdout) * unit < 4e6
