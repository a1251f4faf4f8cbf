"""Commands over prepared data, pictures, word pieces and official checkpoints, end to end."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODEL, text
from torch.testing import assert_close

from vqlm.checkpoint import Medium, load_medium, load_model, save_model
from vqlm.cli import main
from vqlm.convert import config_from_official, to_official
from vqlm.data import END
from vqlm.model import LM
from vqlm.prepared import open_corpus

TINY = (
    "n_layer=1 d_model=16 n_head=2 d_k=8 d_v=8 d_ff=24 n_code=8 window=8 block=8 "
    "batch_size=2 seq_len=16 context_len=none eval_bytes=64 warmup_steps=2 steps=3"
).split()
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(capsys: Captured, *words: str) -> dict[str, Any]:
    """What a command that succeeds says in JSON."""
    code = main([*words, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out.splitlines()[-1])


def pictures(folder: Path, n: int, size: int) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(n):
        image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )


def test_bytes_prepared_trained_evaluated(folder: Path, capsys: Captured) -> None:
    (folder / "book.txt").write_bytes(text(200))
    told = ask(capsys, "data", "prepare", "enwik8", "--source", "book.txt", "--out", "book")
    assert told["splits"]["train"]["n_bytes"] == len(text(200)) * 90 // 100
    assert main(["data", "verify", "book"]) == 0
    ask(capsys, "train", *TINY, "--data", "book", "--out", "run")
    told = ask(capsys, "eval", "run")
    assert told["n_bytes"] == told["n_tokens"] and told["n_words"] is None
    assert told["bits_per_byte"] == pytest.approx(told["nats_per_token"] / np.log(2))
    best = ask(capsys, "eval", "run/best")
    assert best["data"] == "book.txt" and best["step"] == 3
    (folder / "book/test.tokens.bin").write_bytes(b"\4\0" * told["n_tokens"])
    assert main(["data", "verify", "book"]) == 2
    assert "test.tokens.bin is damaged" in capsys.readouterr().err


def test_books_in_word_pieces(folder: Path, capsys: Captured) -> None:
    pytest.importorskip("sentencepiece")
    for i, split in enumerate(["train"] * 4 + ["validation", "test"]):
        (folder / "books" / split).mkdir(parents=True, exist_ok=True)
        (folder / "books" / split / f"{i}.txt").write_bytes(text(300, seed=i))
    (folder / "books/metadata.csv").write_text("".join(f"{i},T,1900,u\n" for i in range(6)))
    source = ["--source", "books", "--out", "prepared"]
    ask(capsys, "data", "prepare", "pg19", *source, "vocab_size=300")
    ask(capsys, "train", *TINY, "--data", "prepared", "--out", "run")
    assert load_model("run").config.vocab_size == 300
    told = ask(capsys, "eval", "run")
    assert told["n_words"] == 300 and told["n_tokens"] < told["n_bytes"]
    nats = told["bits_per_byte"] * told["n_bytes"] * np.log(2)
    assert told["word_perplexity"] == pytest.approx(np.exp(nats / 300))
    for place in ("run", "run/best", "run/checkpoints/step-00000003"):
        medium = load_medium(place)
        assert medium.vocabulary.decode(medium.vocabulary.encode(b"state vector")) == (
            b"state vector"
        )
    told = ask(capsys, "sample", "run", "--prompt", "state", "--tokens", "30", "--seed", "1")
    again = ask(capsys, "sample", "run", "--prompt", "state", "--tokens", "30", "--seed", "1")
    assert told == again and len(told["text"]) > 0
    told = ask(capsys, "sample", "run", "--count", "3", "--tokens", "9", "--seed", "1")
    assert len(set(told["texts"])) == 3


def test_pictures_trained_made_and_completed(folder: Path, capsys: Captured) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures(folder / "photos", 40, 6)
    prepare = ["data", "prepare", "pictures", "--source", "photos", "--out", "prepared"]
    ask(capsys, *prepare, "size=4")
    words = [*TINY, "absolute_position=true", "context_len=48"]
    ask(capsys, "train", *words, "--data", "prepared", "--out", "run")
    told = ask(capsys, "eval", "run")
    assert told["n_tokens"] == told["n_bytes"] and told["n_bytes"] % 48 == 0
    ask(capsys, "export", "run", "exported")
    assert load_medium("exported")[:2] == ("image", (4, 4, 3))
    (folder / "book.txt").write_bytes(text(200))
    assert main(["eval", "exported", "--data", "book.txt"]) == 2
    assert "book.txt is text, and exported is a model of pictures" in capsys.readouterr().err
    told = ask(capsys, "sample", "run", "--count", "5", "--seed", "0")
    grid = np.array(image.open(told["png"]))
    assert grid.shape == (12, 8, 3)  # two columns of three
    assert len(np.unique(grid[:8])) > 20

    told = ask(capsys, "sample", "run", "--complete", "--count", "2", "--png", "half.png")
    grid = np.array(image.open("half.png"))
    assert grid.shape == (12, 8, 3)
    given, made, original = grid[:4], grid[4:8], grid[8:]
    assert (given[2:] == 0).all()
    assert np.array_equal(given[:2], original[:2]) and np.array_equal(made[:2], original[:2])
    assert not np.array_equal(made[2:], original[2:])
    test = open_corpus("prepared").test
    assert np.array_equal(original[:, :4].ravel() + 3, test.tokens[:48])


def test_a_model_of_pictures_never_draws_a_special_id(folder: Path, capsys: Captured) -> None:
    from vqlm.sample import sample_pictures

    lm = LM(config_from_official(OFFICIAL | dict(n_vocab=259)))
    with torch.no_grad():
        lm.output.bias[END] = 50.0
    made = sample_pictures(lm, (2, 2, 3), 3, seed=0)
    assert made.shape == (3, 2, 2, 3)
    known = np.arange(15, dtype=np.uint8).reshape(3, 5)
    made = sample_pictures(lm, (2, 2, 3), 3, known, seed=0)
    assert np.array_equal(made.reshape(3, 12)[:, :5], known)
    with pytest.raises(ValueError, match="fewer than the 12 bytes"):
        sample_pictures(lm, (2, 2, 3), 1, np.zeros((1, 12), np.uint8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample run --png no/x.png", "no/x.png: no is no folder; make it, or choose another"),
        ("sample run --png run", "run is a folder; give the name of a file in it"),
        ("sample run --count -1", "--count -1, but it must be 1 or more"),
        ("sample run --complete --count 0", "--count 0, but it must be 1 or more"),
        ("sample run --prompt The", "run makes pictures; --prompt is for text"),
        ("state make book.txt --model run", "run makes pictures; a state is of text"),
        ("eval run --data book.txt", "book.txt is text, and run is a model of pictures"),
    ],
)
def test_what_a_model_of_pictures_refuses_before_it_paints(
    words: str, message: str, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "run").mkdir()
    (folder / "book.txt").write_bytes(text(200))
    save_model(LM(MODEL), folder / "run", Medium("image", (2, 2, 3)))
    monkeypatch.setattr(LM, "stream", lambda *_, **__: pytest.fail("painted"))
    before = sorted(folder.rglob("*"))
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_model_of_text_refuses_pictures(folder: Path, capsys: Captured) -> None:
    pictures(folder / "photos", 5, 2)
    ask(capsys, "data", "prepare", "pictures", "--source", "photos", "--out", "grid", "size=2")
    assert main(["data", "prepare", "pictures", "--source", "photos", "--out", "b", "size=2"]) == 0
    told = capsys.readouterr().out
    assert "3 documents  " in told and "1 document   " in told
    (folder / "run").mkdir()
    save_model(LM(MODEL), folder / "run", Medium())
    assert main(["eval", "run", "--data", "grid"]) == 2
    assert "photos is pictures, and run is a model of text" in capsys.readouterr().err


def test_a_state_goes_on_in_its_own_file_and_is_not_made_twice(
    folder: Path, capsys: Captured
) -> None:
    (folder / "run").mkdir()
    save_model(LM(MODEL), folder / "run", Medium())
    (folder / "book.txt").write_bytes(b"state")
    made = ask(capsys, "state", "make", "book.txt", "--model", "run", "--out", "a.kept")
    assert main(["state", "make", "book.txt", "--model", "run", "--out", "a.kept"]) == 2
    assert "a.kept is there already; give another --out" in capsys.readouterr().err
    told = ask(capsys, "state", "extend", "a.kept", "--text", "book.txt", "--model", "run")
    assert told["state"] == "a.kept" and told["n_token"] == made["n_token"] + 5
    assert not (folder / "a.state").exists()


def test_a_padded_model_writes_nothing_that_its_vocabulary_does_not_have() -> None:
    from vqlm.sample import sample_pictures, sample_texts, stream_text

    torch.manual_seed(0)
    lm = LM(dataclasses.replace(MODEL, vocab_size=300)).eval()
    with torch.no_grad():
        lm.output.bias[259:] = 50.0
    for seed in range(3):
        assert len("".join(stream_text(lm, b"a", 30, seed=seed))) > 0
        assert all(sample_texts(lm, b"a", 30, 2, seed=seed))
    made = sample_pictures(lm, (4, 4, 3), 2, seed=0)
    assert len(np.unique(made)) > 50


def test_a_tokenizer_beside_a_padded_model() -> None:
    pytest.importorskip("transformers")
    from vqlm.hf_tokenizer import VqlmTokenizer

    tokenizer = VqlmTokenizer()
    assert tokenizer.convert_ids_to_tokens([299, 100]) == ["<unk>", "a"]
    assert tokenizer.decode([100, 299]) == "a<unk>"
    found = tokenizer("ab", return_special_tokens_mask=True)
    assert found["input_ids"] == [END, 100, 101] and found["special_tokens_mask"] == [1, 0, 0]
    both = tokenizer("a", "b", return_special_tokens_mask=True)
    assert len(both["input_ids"]) == 4 and both["special_tokens_mask"] == [1, 0, 1, 0]
    assert tokenizer.get_special_tokens_mask([END, 100], None, True) == [1, 0]


OFFICIAL: dict[str, Any] = dict(
    n_layer=1, n_vocab=17, d_model=8, d_k=4, d_v=6, n_head=2, n_code=5, block_len=4, mem_len=6,
    agg_cache=True, grad_thru_cache=True, pe_abs=False, pe_lam=1e4, e_tie=False, e_preln=True,
    e_scale=0.5,
)  # fmt: skip


def test_an_official_checkpoint_becomes_a_run_folder(folder: Path, capsys: Captured) -> None:
    lm = LM(config_from_official(OFFICIAL)).eval()
    np.savez("official.npz", **{f"param/{k}": x for k, x in to_official(lm).items()})
    untold = ["block_len=4", "mem_len=6", "agg_cache=true", "grad_thru_cache=true", "pe_lam=1e4"]
    told = ask(capsys, "import-official", "official.npz", "a", *untold, "e_scale=0.5")
    tokens = torch.randint(17, (2, 30))
    with torch.no_grad():
        assert_close(load_model("a")(tokens).logits, lm(tokens).logits, atol=0, rtol=0)
    assert told["parameters"] == sum(p.numel() for p in lm.parameters())

    (folder / "settings.json").write_text(json.dumps(OFFICIAL | dict(lr_max=1)))
    ask(capsys, "import-official", "official.npz", "b", "--config", "settings.json")
    assert load_model("b").config == lm.config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["c"], "the official configuration has no 'mem_len'"),
        (["c", "--config", "settings.json", "n_code=7"], "n_code=7 was given, but the param"),
        (["full", "--config", "settings.json"], "full is not empty"),
        (["c", "--config", "list.json"], "holds a JSON list, wanted an object"),
    ],
)
def test_imports_that_do_not_fit(
    words: list[str], message: str, folder: Path, capsys: Captured
) -> None:
    np.savez("official.npz", **to_official(LM(config_from_official(OFFICIAL))))
    (folder / "settings.json").write_text(json.dumps(OFFICIAL))
    (folder / "list.json").write_text("[]")
    (folder / "full").mkdir()
    (folder / "full/x").touch()
    assert main(["import-official", "official.npz", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "c").exists()


def test_the_first_key_that_does_not_fit_is_named(folder: Path, capsys: Captured) -> None:
    params = to_official(LM(config_from_official(OFFICIAL)))
    (folder / "settings.json").write_text(json.dumps(OFFICIAL))
    del params["transformer_layers_0/scanned_attn2/u"]
    np.savez("official.npz", **params)
    assert main(["import-official", "official.npz", "c", "--config", "settings.json"]) == 2
    assert "transformer_layers_0/scanned_attn2/u is missing" in capsys.readouterr().err
