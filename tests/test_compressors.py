"""The closing table's reference figures, against hand counts and the tools' own round trips."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqlm.compressors import gzip_bits_per_byte, order_n_bits_per_byte, xz_bits_per_byte
from vqlm.data import load_corpus


def order_n_oracle(train: bytes, test: bytes, order: int) -> float:
    """Add-one smoothed frequencies, one byte at a time."""
    pairs: Counter[tuple[bytes, int]] = Counter()
    contexts: Counter[bytes] = Counter()
    padded = bytes(order) + train
    for i, byte in enumerate(train):
        context = padded[i : i + order]
        pairs[context, byte] += 1
        contexts[context] += 1
    padded, bits = bytes(order) + test, 0.0
    for i, byte in enumerate(test):
        context = padded[i : i + order]
        bits -= math.log2((pairs[context, byte] + 1) / (contexts[context] + 256))
    return bits / len(test)


@given(
    st.text("ab\0é", min_size=1, max_size=60), st.binary(min_size=1, max_size=40), st.integers(0, 7)
)
def test_order_n_matches_counting_by_hand(text: str, noise: bytes, order: int) -> None:
    train = text.encode() * 2 + b"\xff" * 3
    for test in (text.encode(), noise, b"\xff" * 5, text.encode() + noise):
        want = order_n_oracle(train, test, order)
        assert order_n_bits_per_byte(train, test, order) == pytest.approx(want, rel=1e-12)


def test_order_three_is_the_default() -> None:
    text = b"a byte-frequency model of the third order" * 3
    assert order_n_bits_per_byte(text, text) == order_n_bits_per_byte(text, text, order=3)
    assert order_n_bits_per_byte(text, text) != order_n_bits_per_byte(text, text, order=2)


def test_unseen_contexts_cost_a_byte_each_never_infinity() -> None:
    assert order_n_bits_per_byte(b"aaaa", b"\xfe" * 9 + b"\xfd", order=3) == pytest.approx(
        (math.log2(257) + 9 * 8) / 10, abs=1e-12
    )


def test_compressors_know_noise_from_repetition() -> None:
    noise = random.Random(0).randbytes(20_000)
    for bits_per_byte in (gzip_bits_per_byte, xz_bits_per_byte):
        assert 8 < bits_per_byte(noise) < 8.1
        assert bits_per_byte(b"abcdefgh" * 10_000) < 0.1
    # Only a window longer than gzip's 32 KiB finds the second copy.
    twice = random.Random(1).randbytes(50_000) * 2
    assert gzip_bits_per_byte(twice) > 8 > 4.1 > xz_bits_per_byte(twice)


@pytest.mark.parametrize("bits_per_byte", [gzip_bits_per_byte, xz_bits_per_byte])
def test_nothing_cannot_be_compressed(bits_per_byte: Callable[[bytes], float]) -> None:
    with pytest.raises(ValueError, match="got an empty data, wanted at least one byte"):
        bits_per_byte(b"")


def test_order_n_refuses_empty_texts_and_orders_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="empty train"):
        order_n_bits_per_byte(b"", b"x")
    with pytest.raises(ValueError, match="empty test"):
        order_n_bits_per_byte(b"x", b"")
    for order in (-1, 8):
        with pytest.raises(ValueError, match=f"got order={order}, wanted 0 to 7"):
            order_n_bits_per_byte(b"x", b"x", order)


def test_the_standard_library_gives_figures_in_the_known_order() -> None:
    corpus = load_corpus(None)
    train, test = corpus.train.text(), corpus.test.text()
    begin = time.perf_counter()
    order_3 = order_n_bits_per_byte(train, test)
    assert time.perf_counter() - begin < 30
    assert 1.0 < xz_bits_per_byte(test) < gzip_bits_per_byte(test) < 2.5
    assert 1.5 < order_3 < order_n_bits_per_byte(train, test, order=0) < 5.5
