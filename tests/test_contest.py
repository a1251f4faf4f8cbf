"""The contest of mixers: equal sizes, one training a cell, and sums that add up."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from vqlm import contest, presets
from vqlm.contest import PATTERNS, cells, judged, summarise
from vqlm.data import END, Split
from vqlm.model import LM
from vqlm.sizes import fitted, n_learned
from vqlm.train import Trainer

BASE = (
    dataclasses.replace(tiny.MODEL, d_ff=96, positions="rotary", n_entry=4, chunk=4),
    tiny.TRAIN,
)
SMALL = (
    "n_layer=2 d_model=16 n_head=2 d_k=8 d_v=8 d_ff=96 n_code=8 n_entry=4 chunk=4 window=8 block=8 "
    "steps=2 batch_size=2 seq_len=16 context_len=32 eval_bytes=60 warmup_steps=1"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "docs"
    tiny.corpus(folder, n_word=30)
    return folder


def arguments(data: Path, out: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    contest.add_arguments(parser)
    options = ["--data", str(data), "--out", str(out), "--length", "50", "--pieces", "2"]
    return parser.parse_args([*options, *SMALL, *words])


def test_the_contest_s_models_have_equal_sizes() -> None:
    base = presets.get("contest")
    target = n_learned(base[0])
    made = cells(PATTERNS, [0], base)
    assert [cell.value for cell in made] == list(PATTERNS)
    for cell in made:
        assert cell.model.mixers == tuple(cell.value.split("+"))
        assert abs(n_learned(cell.model) / target - 1) < 0.005
        kept = dict(mixers=base[0].mixers, d_ff=base[0].d_ff)
        assert dataclasses.replace(cell.model, **kept) == base[0] and cell.train == base[1]


def test_codebooks_count_and_what_cannot_be_made_equal_is_refused() -> None:
    vq = LM(dataclasses.replace(BASE[0], mixers=("vq",)))
    assert n_learned(vq.config) > sum(p.numel() for p in vq.parameters())
    assert fitted(BASE[0], n_learned(BASE[0])).d_ff == 96
    with pytest.raises(ValueError, match=r"mamba2 have at least .* choose a larger d_ff"):
        fitted(dataclasses.replace(BASE[0], mixers=("mamba2",)), 5000)
    with pytest.raises(ValueError, match="layer='gau' has no SwiGLU"):
        cells(["vq"], [0], (dataclasses.replace(BASE[0], layer="gau"), BASE[1]))
    with pytest.raises(ValueError, match="at least one pattern"):
        cells([], [0], BASE)
    with pytest.raises(ValueError, match="did you mean 'window'"):
        cells(["windw"], [0], BASE)


def test_a_piece_is_read_from_its_start_and_its_bits_are_shared_by_its_bytes() -> None:
    split = Split.from_documents([tiny.text(40)[:139], tiny.text(40, seed=1)[:160]])
    torch.manual_seed(0)
    lm = LM(dataclasses.replace(BASE[0], mixers=("window", "softmax"))).eval()
    got = judged(lm, split, 70, 3)
    assert got["first"] == [0, 16, 32, 64] and len(got["by_piece"]) == 3
    starts = [0, 70, int(split.document_offsets[1]), int(split.document_offsets[1]) + 70]
    total, count = 0.0, 0
    for piece, start in zip(got["by_piece"], [starts[i] for i in (0, 1, 3)], strict=True):
        text = torch.from_numpy(split.tokens[start : start + 70].astype(np.int64))[None]
        inputs = torch.cat([torch.full((1, 1), END), text[:, :-1]], 1)
        bits = F.cross_entropy(lm(inputs).logits[0], text[0], reduction="none") / math.log(2)
        total, count = total + bits.sum().item(), count + int((text != END).sum())
        for bin, a, b in zip(piece, [0, 16, 32, 64], [16, 32, 64, 70], strict=True):
            n_byte = (text[0, a:b] != END).sum()
            assert bin == pytest.approx((bits[a:b].sum() / n_byte).item(), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(total / count, rel=1e-5)
    assert got["state_bytes"] == lm(inputs).state.bytes()
    with pytest.raises(ValueError, match=r"no test document has 5000 tokens.*--length"):
        judged(lm, split, 5000, 3)


def result(mixers: str, seed: int, by_piece: list[list[float]], **more: Any) -> dict[str, Any]:
    mean = float(np.mean(np.array(by_piece) @ [16, 4]) / 20)
    facts = dict(parameters=9, state_bytes=2048, minutes=2.0, tokens=1200, first=[0, 16], length=20)
    return dict(mixers=mixers, seed=seed, by_piece=by_piece, bits_per_byte=mean) | facts | more


def test_rows_by_hand() -> None:
    rows = summarise(
        [
            result("window+softmax", 0, [[2.0, 1.0], [3.0, 1.0]]),
            result("window", 0, [[2.2, 1.0], [3.0, 1.0]]),
            result("window", 1, [[9.0, 9.0], [9.0, 9.0]], minutes=4.0),
        ]
    )
    assert [row["mixers"] for row in rows] == ["window+softmax", "window"]
    assert rows[0]["bits_per_byte"] == pytest.approx(2.2)
    assert (rows[0]["difference"], rows[0]["spread"], rows[0]["error"]) == (0, None, 0)
    window = rows[1]
    assert window["by_position"] == [pytest.approx((2.6 + 9) / 2), 5.0]
    # Only the seed that both have; pieces are 7.27 and 0 percent worse.
    assert window["difference"] == pytest.approx((2.28 / 2.2 - 1) * 100)
    assert window["error"] == pytest.approx(np.std([16 / 2.2, 0], ddof=1) / 2**0.5)
    assert window["spread"] == pytest.approx(abs(9 - 2.28) / 2**0.5)
    assert window["tokens_per_second"] == pytest.approx((10 + 5) / 2)
    assert summarise([]) == []


def test_columns_are_bins_the_last_as_long_as_the_text() -> None:
    rows = summarise([result("vq", 0, [[2.0, 1.0]], first=[1024, 8192], length=10_000)])
    head = contest.table(rows, 10_000).splitlines()[0]
    assert "   1024-8191   8192-9999 " in head


def test_two_commands_in_one_folder_end_in_one_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contest.run(arguments(data, tmp_path, "n_layer=4", "--mixers", "window+window+ovq,mamba2"))
    # Are left out below:
    contest.run(arguments(data, tmp_path, "n_layer=4", "steps=1", "--mixers", "window"))
    (tmp_path / "of another study").mkdir()
    (tmp_path / "of another study" / "result.json").write_text("{}")
    more = "window+window+softmax,gated-deltanet"
    got = contest.run(arguments(data, tmp_path, "n_layer=4", "--mixers", more))
    assert "window,seed=0 has other settings" in capsys.readouterr().err
    order = ["window+window+softmax", "window+window+ovq", "gated-deltanet", "mamba2"]
    assert [row["mixers"] for row in got["rows"]] == order
    assert "interrupted" not in got
    written = json.loads((tmp_path / "results.json").read_bytes())
    assert written == json.loads(json.dumps(got))
    assert (tmp_path / "results.png").stat().st_size > 10_000
    states = {row["mixers"]: row["state_bytes"] for row in got["rows"]}
    assert len(set(states.values())) == 4

    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained a finished cell"))
    again = contest.run(arguments(data, tmp_path, "n_layer=4", "--mixers", ",".join(order)))
    assert again["rows"] == got["rows"]


def test_a_stopped_contest_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def stopping(self: Trainer, batch: Any) -> Any:
        self.stop_requested = True
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        got = contest.run(arguments(data, tmp_path, "--mixers", "window,window+vq"))
    assert got["interrupted"] and got["rows"] == []
    got = contest.run(arguments(data, tmp_path, "--mixers", "window,window+vq"))
    assert [row["mixers"] for row in got["rows"]] == ["window", "window+vq"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixers=vq"], "give it with --mixers"),
        (["seed=1"], "give it with --seeds"),
        (["mini", "demo"], "one preset at most"),
        (["stepz=1"], "did you mean 'steps'"),
        (["--length", "100000", "--mixers", "vq"], "no test document has 100000 tokens"),
        (["--length", "0", "--mixers", "vq"], "--length 0"),
        (["--pieces", "0", "--mixers", "vq"], "--pieces 0"),
        (["--length", "100000", "--mixers", "wndow"], "did you mean 'window'"),
        (["n_layer=2", "--mixers", "window+window+vq"], "want 3 layers or more, but n_layer=2"),
    ],
)
def test_mistakes_are_told(data: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contest.run(arguments(data, tmp_path, *words))
    assert list(tmp_path.iterdir()) == []
