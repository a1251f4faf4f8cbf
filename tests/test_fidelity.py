"""Operator fidelity: the streams are what they claim, and the rules are as near as they were."""

import dataclasses
import json

import pytest
import torch

from vqlm import cli, fidelity
from vqlm.fidelity import SIZES, Stream, draw, error, state_bytes, table
from vqlm.ovq import initial_state


def test_the_paper_s_rules_and_merging_are_as_near_as_they_were() -> None:
    assert error(SIZES) <= 0.26
    merging = dataclasses.replace(SIZES, growth="eager", filing="merge")
    assert error(merging) <= 0.16
    assert state_bytes(merging) == state_bytes(SIZES)


def test_an_entry_for_every_token_is_full_attention() -> None:
    config = dataclasses.replace(SIZES, n_entry=512, growth="eager", chunk=32)
    assert error(config, Stream(n_token=300)) < 1e-5


def test_state_bytes_are_those_of_a_state() -> None:
    state = initial_state(SIZES, 1, torch.zeros(1))
    floats = sum(4 * x.numel() for x in state if x.is_floating_point())
    assert SIZES.n_head * state_bytes(SIZES) == floats


def test_streams_follow_zipf_s_law_around_their_centres() -> None:
    stream = Stream(n_token=20_000, n_centre=5, noise=0.0, value_noise=0.0)
    query, key, value = draw(stream, 2, 8, 0)
    for row in range(2):
        centres, index, count = key[0, row].unique(dim=0, return_inverse=True, return_counts=True)
        share = count.sort(descending=True).values / 20_000
        want = 1 / torch.arange(1, 6)
        assert (share - want / want.sum()).abs().max() < 0.02
        assert torch.isin(query[0, row], centres).all()
        for i in range(5):
            assert value[0, row][index == i].unique(dim=0).shape[0] == 1
    assert (key.norm(dim=-1) - 1).abs().max() < 1e-5
    assert not torch.equal(draw(stream, 2, 8, 1)[1], key)


def test_the_command_prints_and_returns_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fidelity, "error", lambda config, seed: config.n_entry / 1000 + seed)
    assert cli.main(["bench", "fidelity", "--rules", "n_entry=64", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = json.loads(out[-1])["rows"]
    assert [row["error"] for row in rows] == pytest.approx([1.256, 1.064])
    assert rows[1]["spread"] == pytest.approx(1) and "1.064" in out[-2]


def test_settings_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "fidelity", "--rules", "groth=eager"]) == 2
    assert "did you mean 'growth'" in capsys.readouterr().err
    for settings in ("d_v=64", "n_kv_head=2", "d_k=64"):
        with pytest.raises(ValueError, match="values as wide as keys, and as many"):
            table({"x": settings})
    with pytest.raises(ValueError, match="key=value"):
        table({"x": "growth"})
    with pytest.raises(ValueError, match="seed"):
        table({}, seeds=[])
