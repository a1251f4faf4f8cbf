"""Every byte is read once, in order, with the right start flags; errors show a way out."""

import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqlm.data import (
    END,
    N_SPECIAL,
    PAD,
    UNKNOWN,
    VOCAB_SIZE,
    Batch,
    Corpus,
    Lanes,
    Split,
    decode,
    encode,
    evaluation_batches,
    load_corpus,
)

documents_strategy = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus(None)


def splits(corpus: Corpus) -> tuple[Split, Split, Split]:
    return corpus.train, corpus.validation, corpus.test


def documents_of(split: Split) -> list[bytes]:
    """The documents, read from the tokens and offsets without the module's help."""
    spans = zip(split.document_offsets[:-1], split.document_offsets[1:], strict=True)
    tokens = [split.tokens[begin:end].tolist() for begin, end in spans]
    assert all(t[-1] == END and min(t[:-1]) >= N_SPECIAL for t in tokens)
    return [bytes(token - 3 for token in t[:-1]) for t in tokens]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_the_vocabulary_is_three_specials_and_the_bytes() -> None:
    assert (PAD, END, UNKNOWN, VOCAB_SIZE) == (0, 1, 2, 259)
    ids = encode(bytes(range(256)))
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(range(3, 259))


@given(st.binary())
def test_decode_undoes_encode_and_drops_specials(text: bytes) -> None:
    assert decode(encode(text)) == text
    with_specials = [PAD, END, *encode(text).tolist(), UNKNOWN]
    assert decode(with_specials) == text
    assert decode(np.array(with_specials, np.int64)) == text


def test_decode_refuses_ids_of_another_vocabulary() -> None:
    for ids in ([5, VOCAB_SIZE], [-1]):
        with pytest.raises(ValueError, match="wanted 0 to 258"):
            decode(ids)


@given(documents_strategy)
def test_a_split_keeps_its_documents(documents: list[bytes]) -> None:
    split = Split.from_documents(documents)
    assert documents_of(split) == documents
    assert (split.tokens.dtype, split.document_offsets.dtype) == (np.uint16, np.int64)
    assert split.n_documents == len(documents)
    assert split.text() == b"".join(documents)
    assert split.n_bytes == len(split.text())


def test_a_split_refuses_what_it_cannot_hold() -> None:
    for documents, names in ([], None), ([b"a", b""], None), ([b"a"], ["x", "y"]):
        with pytest.raises(ValueError, match="wanted one or more documents, none of them empty"):
            Split.from_documents(documents, names)


def test_the_standard_library_always_splits_alike(stdlib: Corpus) -> None:
    again = load_corpus(None)
    assert again.fingerprint == stdlib.fingerprint
    assert [s.names for s in splits(again)] == [s.names for s in splits(stdlib)]
    names = [name for split in splits(stdlib) for name in split.names]
    assert len(names) == len(set(names))
    assert "json/decoder.py" in names
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any(left_out & set(name.split("/")) for name in names)
    assert all(name.endswith(".py") for name in names)


def test_the_standard_library_is_big_enough_and_cut_90_5_5(stdlib: Corpus) -> None:
    sizes = np.array([split.n_bytes for split in splits(stdlib)])
    assert sizes.sum() > 5_000_000
    # A whole file straddles each cut, and the largest is some 3% of the library.
    assert np.abs(sizes / sizes.sum() - [0.90, 0.05, 0.05]).max() < 0.04
    last = Path(os.__file__).parent / stdlib.test.names[-1]
    assert documents_of(stdlib.test)[-1] == last.read_bytes()
    assert platform.python_version() in stdlib.name


def test_a_file_is_cut_by_bytes_in_order(tmp_path: Path) -> None:
    text = bytes(range(256)) * 3 + b"tail"  # 772 bytes
    path = tmp_path / "text"
    path.write_bytes(text)
    corpus = load_corpus(str(path))
    assert documents_of(corpus.train) == [text[:694]]
    assert documents_of(corpus.validation) == [text[694:733]]
    assert documents_of(corpus.test) == [text[733:]]
    assert corpus.name == "text"


def test_enwik_mini_is_cut_as_enwik8_is(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("data/enwik_mini")
    corpus = load_corpus(path)
    assert [split.n_bytes for split in splits(corpus)] == [5_480_771, 304_487, 304_488]
    assert b"".join(split.text() for split in splits(corpus)) == path.read_bytes()


def test_a_folder_gives_its_text_files_and_nothing_else(tmp_path: Path) -> None:
    files = {f"books/{i}.txt": b"x" * (i + 1) for i in range(40)}
    outside = write_files(tmp_path / "outside", {"far.txt": b"far"})
    root = write_files(
        tmp_path / "root",
        files
        | {".hidden": b"hidden", ".git/config": b"hidden", "empty": b""}
        | {"picture": b"a" * 8191 + b"\0", "late_nul": b"a" * 8192 + b"\0"},
    )
    (root / "link.txt").symlink_to(outside / "far.txt")
    (root / "link").symlink_to(outside)
    (root / "copy.txt").symlink_to(root / "books" / "0.txt")
    os.mkfifo(root / "pipe")
    corpus = load_corpus(root)
    got = {
        name: document
        for split in splits(corpus)
        for name, document in zip(split.names, documents_of(split), strict=True)
    }
    assert got == files | {"late_nul": b"a" * 8192 + b"\0"}
    assert sum(split.n_documents for split in splits(corpus)) == len(got)
    assert corpus.name == "root"


def test_a_file_goes_where_its_middle_falls_in_the_order_of_hashed_names(tmp_path: Path) -> None:
    # The sha256 of these names begin 18, 25, 2e, 3e, 3f, ca.
    sizes = {"d": 60, "f": 30, "c": 2, "b": 3, "e": 3, "a": 2}
    root = write_files(tmp_path, {name: b"x" * size for name, size in sizes.items()})
    names = [split.names for split in splits(load_corpus(root))]
    assert names == [("d", "f"), ("c", "b"), ("e", "a")]


@pytest.mark.parametrize("big", ["0", "1", "2", None])
def test_three_files_are_enough(tmp_path: Path, big: str | None) -> None:
    root = write_files(tmp_path, {f: b"x" * (10_000 if f == big else 7) for f in "012"})
    assert [split.n_documents for split in splits(load_corpus(root))] == [1, 1, 1]


def test_the_fingerprint_sees_contents_names_and_borders_but_not_the_place(tmp_path: Path) -> None:
    files = {name: b"x" * 9 for name in "dfcbea"}  # in the order of the splits
    variants = [
        files,
        files | {"a": b"y" * 9},
        {name.replace("a", "g"): text for name, text in files.items()},  # the order stays
        files | {"d": b"x" * 10, "f": b"x" * 8},  # all the text together stays
    ]
    first, second = (
        [
            load_corpus(write_files(tmp_path / f"{c}{i}", v)).fingerprint
            for i, v in enumerate(variants)
        ]
        for c in "ab"
    )
    assert first == second
    assert len(set(first)) == len(variants)


def test_a_path_to_no_text_names_what_is_near(tmp_path: Path) -> None:
    write_files(tmp_path, {"enwik_mini": b"x"})
    with pytest.raises(
        FileNotFoundError, match="enwik-mini does not exist.*has 'enwik_mini'.*no --data"
    ):
        load_corpus(tmp_path / "enwik-mini")
    with pytest.raises(FileNotFoundError, match=f"nearest folder that does is {tmp_path}\\."):
        load_corpus(tmp_path / "zzz" / "yyy")
    with pytest.raises(FileNotFoundError, match="has 'enwik_mini'"):
        load_corpus(tmp_path / "enwik_mini" / "train")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a regular file nor a folder"):
        load_corpus(tmp_path / "pipe")


@pytest.mark.parametrize("n", [0, 19])
def test_a_file_too_small_to_cut(tmp_path: Path, n: int) -> None:
    write_files(tmp_path, {"small": b"x" * n, "enough": b"x" * 20})
    with pytest.raises(ValueError, match=f"has {n} bytes, wanted at least 20.*give a longer file"):
        load_corpus(tmp_path / "small")
    assert [s.n_bytes for s in splits(load_corpus(tmp_path / "enough"))] == [18, 1, 1]


def test_a_folder_with_too_few_files(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"a", "b": b"b", "empty": b""})
    with pytest.raises(ValueError, match="has 2 text files, wanted at least 3.*give a single file"):
        load_corpus(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a": b"a" * 30, "b": b"b", "c/d": b"c"})

    def deny(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # file modes do not stop root
        patch.setattr(np, "fromfile", deny)
        for source in (tmp_path, tmp_path / "a"):
            with pytest.raises(ValueError, match=r"cannot read .*/[abd] \(Permission denied\)"):
                load_corpus(source)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: deny(p) if Path(p).name == "c" else scandir(p))
    with pytest.raises(ValueError, match=r"cannot read .*/c \(Permission denied\)"):
        load_corpus(tmp_path)


def lane_oracle(split: Split, batch_size: int, position: int, row: int) -> tuple[int, int, bool]:
    """Input, target and start flag at one position of one lane, token by token."""
    length = len(split.tokens) // batch_size
    index = row * length + position % length
    before = END if index == 0 else int(split.tokens[index - 1])
    return before, int(split.tokens[index]), position % length == 0 or before == END


@given(documents_strategy, st.integers(1, 5), st.integers(1, 9), st.integers(0, 20))
def test_lanes_match_a_token_by_token_reading(
    documents: list[bytes], batch_size: int, seq_len: int, cursor: int
) -> None:
    split = Split.from_documents([*documents, b"z" * 45])
    lanes = Lanes(split, batch_size, seq_len, cursor)
    for step in range(cursor, cursor + 4):
        batch = lanes.next_batch()
        assert batch.inputs.shape == (batch_size, seq_len)
        assert (batch.inputs.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        assert (batch.starts.dtype, batch.mask.dtype) == (torch.bool, torch.bool)
        assert batch.mask.all()
        for row in range(batch_size):
            want = [lane_oracle(split, batch_size, step * seq_len + t, row) for t in range(seq_len)]
            got = zip(*(tensor[row].tolist() for tensor in batch[:3]), strict=True)
            assert list(got) == want
        assert batch.n_bytes == sum(token >= N_SPECIAL for token in batch.targets.flatten())


def test_a_lane_goes_round_in_the_middle_of_a_batch() -> None:
    split = Split.from_documents([b"abcdefghi"])  # 10 tokens: two lanes of 5
    lanes = Lanes(split, batch_size=2, seq_len=3)
    first, second = lanes.next_batch(), lanes.next_batch()
    assert [decode(row.numpy()) for row in first.targets] == [b"abc", b"fgh"]
    assert second.targets.tolist() == [
        encode(b"dea").tolist(),
        [*encode(b"i").tolist(), END, *encode(b"f").tolist()],
    ]
    assert first.starts.tolist() == [[True, False, False]] * 2
    assert second.starts.tolist() == [[False, False, True]] * 2
    assert second.inputs[:, 2].tolist() == [END, *encode(b"e").tolist()]
    assert (first.n_bytes, second.n_bytes) == (6, 5)


def test_lanes_resume_from_a_cursor() -> None:
    split = Split.from_documents([bytes(range(200)), b"more", b"text" * 20])
    lanes = Lanes(split, batch_size=3, seq_len=7)
    for _ in range(11):
        lanes.next_batch()
    state = lanes.state_dict()
    assert state == {"cursor": 11}
    want = [lanes.next_batch() for _ in range(40)]
    by_state = Lanes(split, 3, 7, cursor=2)
    by_state.load_state_dict(state)
    for resumed in (by_state, Lanes(split, 3, 7, cursor=11)):
        for batch in want:
            got = resumed.next_batch()
            assert all(torch.equal(a, b) for a, b in zip(got[:4], batch[:4], strict=True))
            assert got.n_bytes == batch.n_bytes
        assert resumed.state_dict() == {"cursor": 51}


def test_lanes_refuse_what_does_not_fit() -> None:
    split = Split.from_documents([b"x" * 99])  # 100 tokens
    Lanes(split, batch_size=4, seq_len=25).next_batch()
    pattern = (
        "got 100 tokens, wanted at least 104 for batch_size=4 lanes of seq_len=26; "
        "the largest batch_size at this seq_len is 3, the largest seq_len at this batch_size is 25"
    )
    with pytest.raises(ValueError, match=pattern):
        Lanes(split, batch_size=4, seq_len=26)
    Lanes(split, batch_size=3, seq_len=26)
    for sizes in ({"batch_size": 0, "seq_len": 1}, {"batch_size": 1, "seq_len": 0}):
        with pytest.raises(ValueError, match="=0, wanted at least 1"):
            Lanes(split, **sizes)
    with pytest.raises(ValueError, match="got state .*-1.*number of batches"):
        Lanes(split, 1, 1, cursor=-1)
    with pytest.raises(ValueError, match="number of batches"):
        Lanes(split, 1, 1).load_state_dict({})


def contexts_and_targets(
    split: Split, batch_size: int, seq_len: int, max_bytes: int | None = None
) -> Counter[tuple[tuple[int, ...], int]]:
    """Each target with the inputs that a model carrying its state over the batches has seen."""
    seen: dict[int, list[int]] = {}
    pairs: Counter[tuple[tuple[int, ...], int]] = Counter()
    n_rows = None
    for batch in evaluation_batches(split, batch_size, seq_len, max_bytes):
        n_rows = n_rows or batch.inputs.shape[0]
        assert batch.inputs.shape[0] == n_rows <= batch_size
        assert 1 <= batch.inputs.shape[1] <= seq_len
        assert batch.mask.any(dim=0).all()  # no column is padding in every row
        assert batch.n_bytes == int((batch.mask & (batch.targets != END)).sum())
        assert not batch.inputs[~batch.mask].any() and not batch.targets[~batch.mask].any()
        assert not batch.starts[~batch.mask].any()
        for row, t in batch.mask.nonzero().tolist():
            context = seen.setdefault(row, [])
            if batch.starts[row, t]:
                context.clear()
            context.append(int(batch.inputs[row, t]))
            pairs[tuple(context), int(batch.targets[row, t])] += 1
    return pairs


def pairs_of(documents: list[bytes], last_is_cut: bool = False) -> Counter:
    """The same, straight from the definition."""
    pairs: Counter[tuple[tuple[int, ...], int]] = Counter()
    for i, document in enumerate(documents):
        cut = last_is_cut and i == len(documents) - 1
        targets = [byte + 3 for byte in document] + ([] if cut else [END])
        for t, target in enumerate(targets):
            pairs[(END, *targets[:t]), target] += 1
    return pairs


@given(documents_strategy, st.integers(1, 15), st.integers(1, 50))
def test_every_target_is_evaluated_once_with_its_whole_document_before_it(
    documents: list[bytes], batch_size: int, seq_len: int
) -> None:
    split = Split.from_documents(documents)
    assert contexts_and_targets(split, batch_size, seq_len) == pairs_of(documents)


@given(documents_strategy, st.integers(1, 5), st.integers(1, 9), st.integers(1, 300))
def test_max_bytes_takes_the_first_documents_and_cuts_the_last(
    documents: list[bytes], batch_size: int, seq_len: int, max_bytes: int
) -> None:
    taken: list[bytes] = []
    n_left, cut = max_bytes, False
    for document in documents:
        if n_left:
            taken.append(document[:n_left])
            cut = len(document) > n_left
            n_left -= len(taken[-1])
    split = Split.from_documents(documents)
    got = contexts_and_targets(split, batch_size, seq_len, max_bytes)
    assert got == pairs_of(taken, last_is_cut=cut)
    n_bytes = sum(b.n_bytes for b in evaluation_batches(split, batch_size, seq_len, max_bytes))
    assert n_bytes == min(max_bytes, split.n_bytes)


def test_documents_are_dealt_longest_first_to_the_shortest_row() -> None:
    split = Split.from_documents([b"aa", b"bbbbbb", b"cccc", b"d", b"ee"])
    batches = list(evaluation_batches(split, batch_size=2, seq_len=4))
    rows = torch.cat([batch.targets for batch in batches], dim=1).numpy()
    assert [decode(row) for row in rows] == [b"bbbbbbee", b"ccccaad"]
    assert [batch.targets.shape[1] for batch in batches] == [4, 4, 2]
    alone = evaluation_batches(Split.from_documents([b"x" * 30]), batch_size=8, seq_len=20)
    assert [tuple(batch.targets.shape) for batch in alone] == [(1, 20), (1, 11)]


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "max_bytes"])
def test_evaluation_refuses_numbers_below_one_at_once(name: str) -> None:
    numbers = {"batch_size": 2, "seq_len": 2, "max_bytes": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"evaluation_batches: got {name}=0, wanted at least 1"):
        evaluation_batches(Split.from_documents([b"abc"]), **numbers)


def test_a_batch_moves_as_a_whole() -> None:
    batch = Lanes(Split.from_documents([b"abcdef"]), 2, 3).next_batch()
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and all(tensor.is_meta for tensor in moved[:4])
    assert moved.n_bytes == batch.n_bytes == 6
    assert torch.equal(batch.to("cpu").starts, batch.starts)
