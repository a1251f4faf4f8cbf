"""vqlm's attention in models of transformers: exact where it should be, cached, adapted, saved."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import text
from torch import Tensor
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")

import vqlm  # noqa: E402
from vqlm.adapt import AdaptConfig, adapt, matching_loss, nats_per_token, recovered  # noqa: E402
from vqlm.cli import main  # noqa: E402
from vqlm.patched_files import load_patched, save_patched  # noqa: E402
from vqlm.patching import patched_layers, real_tokens  # noqa: E402

transformers.utils.logging.disable_progress_bar()

_SIZES: dict[str, Any] = dict(
    vocab_size=259, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, bos_token_id=1,
    eos_token_id=1, pad_token_id=0, initializer_range=0.3, head_dim=6,
)  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))


def qwen2() -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k != "head_dim"}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=259, n_embd=24, n_layer=2, n_head=4, n_positions=96, bos_token_id=1,
        eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    ))  # fmt: skip


FAMILIES = [llama, qwen2, qwen3, gpt2]
Make = Callable[[], Any]
EXACT = {"n_entry": 64, "chunk": 8, "window": 0}
FEW: dict[str, Any] = {"n_entry": 5, "chunk": 4, "window": 4, "growth": "plateau"}
KINDS = [FEW, {"mixer": "window", "chunk": 4, "window": 5}, {"mixer": "vq", **FEW}]


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().eval()


def tokens(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (n_row, n_token), generator=generator)


@torch.no_grad()
def test_with_an_entry_for_every_token_the_logits_stay(model: Any) -> None:
    x = tokens(2, 61)
    want, names = model(x).logits, set(model.state_dict())
    patched = vqlm.patch(model, **EXACT)
    assert patched is model and set(model.state_dict()) == names
    assert_close(model(x).logits, want, rtol=0, atol=1e-5 * want.abs().max().item())


@torch.no_grad()
def test_in_float64_they_stay_to_rounding(model: Any) -> None:
    model.double()
    x = tokens(2, 61)
    want = model(x).logits
    patched = vqlm.patch(copy.deepcopy(model), n_entry=52, chunk=4, window=8)
    assert_close(patched(x).logits, want)
    one_less = vqlm.patch(copy.deepcopy(model), n_entry=51, chunk=4, window=8)
    assert (one_less(x).logits - want).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pieces_and_padding_change_nothing(model: Any, kind: dict[str, Any]) -> None:
    vqlm.patch(model.double(), **kind)
    x = tokens(2, 40)
    want = model(x).logits
    cache, parts = None, []
    for part in x.split([13, 1, 2, 24], 1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), want)
    sizes = [sum(s.numel() for s in layer.state) for layer in cache.layers]
    model(tokens(2, 30), cache=cache)
    assert sizes == [sum(s.numel() for s in layer.state) for layer in cache.layers]
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), x], 1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
    assert_close(got, want)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_of_left_padded_rows(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    vqlm.patch(model, **FEW)
    rows = [tokens(1, n, seed=n) for n in (13, 5)]
    padded, mask = torch.zeros(2, 13).long(), torch.zeros(2, 13).long()
    for i, row in enumerate(rows):
        padded[i, 13 - row.shape[1] :], mask[i, 13 - row.shape[1] :] = row, 1
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **settings)
    for i, row in enumerate(rows):
        ids = row
        for _ in range(9):  # without any cache
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(together[i, 13:], ids[0, row.shape[1] :])
    beams = model.generate(rows[0], num_beams=3, **settings)
    slow = model.generate(rows[0], num_beams=3, use_cache=False, **settings)
    assert torch.equal(beams, slow)


def test_only_some_layers() -> None:
    torch.manual_seed(0)
    model = vqlm.patch(llama().eval(), layers=[1], **FEW)
    assert [layer.layer_idx for layer in patched_layers(model)] == [1]
    x = tokens(2, 30)
    cache, parts = None, []
    for part in x.split([11, 1, 18], 1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), model(x).logits, rtol=1e-4, atol=1e-4)


def test_mistakes_are_told() -> None:
    for arguments, said in [
        ({"mixer": "ovk"}, "did you mean 'ovq'"),
        ({"n_entries": 3}, "did you mean 'n_entry'"),
        ({"layers": [2]}, "layers 0 to 1"),
        ({"chunk": 8, "window": 12}, "no multiple"),
        ({"n_entry": 0}, "at least 1"),
    ]:
        model = llama()
        with pytest.raises(ValueError, match=said):
            vqlm.patch(model, **arguments)
        assert patched_layers(model) == []
    with pytest.raises(ValueError, match="patched already"):
        vqlm.patch(vqlm.patch(llama()))
    with pytest.raises(ValueError, match="no attention layers"):
        vqlm.patch(torch.nn.Linear(2, 2))
    config = transformers.OPTConfig(
        hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    with pytest.raises(ValueError, match="don't know how to patch OPTAttention"):
        vqlm.patch(transformers.OPTForCausalLM(config))
    sliding = transformers.Qwen2Config(
        **{k: v for k, v in _SIZES.items() if k != "head_dim"}, use_sliding_window=True,
        sliding_window=8, max_window_layers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="window of its own"):
        vqlm.patch(transformers.Qwen2ForCausalLM(sliding))


def test_masks_that_hide_more_than_padding_are_refused() -> None:
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert real_tokens(causal, 4) is None
    packed = causal.clone()
    packed[..., 2:, :2] = False
    with pytest.raises(ValueError, match="packed sequences"):
        real_tokens(packed, 4)
    with pytest.raises(ValueError, match="mask of type"):
        real_tokens({"full": causal}, 4)
    added = torch.zeros(1, 1, 4, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    added[..., 0] = added[..., 0, :] = torch.finfo(torch.float32).min
    found = real_tokens(added, 4)
    assert found is not None and found.tolist() == [[False, True, True, True]]


def test_a_cache_of_the_unpatched_model_is_refused_and_none_is_cut() -> None:
    model = llama().eval()
    cache = model(tokens(1, 5), use_cache=True).cache
    vqlm.patch(model, **FEW)
    with pytest.raises(ValueError, match="filled by an unpatched model"):
        model(tokens(1, 2), cache=cache)
    own = model(tokens(1, 5), use_cache=True).cache
    with pytest.raises(ValueError, match="can't be cut"):
        own.crop(-1)
    with pytest.raises(ValueError, match="cropped"):
        model.generate(tokens(1, 5), assistant_model=llama().eval(), max_new_tokens=3)


def words(n_row: int, n_token: int) -> Callable[[], Tensor]:
    ids = torch.tensor(list(text(3000))) + 3
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        begin = torch.randint(len(ids) - n_token - 1, (n_row, 1), generator=generator)
        return ids[begin + torch.arange(n_token + 1)]

    return draw


def test_matching_compares_the_same_layer_on_the_same_input(model: Any) -> None:
    x = tokens(2, 30)
    exact = vqlm.patch(copy.deepcopy(model), **EXACT)
    assert matching_loss(patched_layers(exact), model, x).item() < 1e-9
    rough = vqlm.patch(copy.deepcopy(model), **FEW)
    assert matching_loss(patched_layers(rough), model, x).item() > 1e-3
    gone = vqlm.patch(copy.deepcopy(model), **EXACT)
    with torch.no_grad():
        for layer in patched_layers(gone):
            getattr(layer, "o_proj", getattr(layer, "c_proj", None)).weight.zero_()
    loss = matching_loss(patched_layers(gone), model, x)
    assert 0.9 < loss.item() < 1.1 or model.config.model_type == "gpt2"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapting_makes_both_losses_smaller(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = llama()
    draw = words(4, 32)
    windows = draw()
    before = nats_per_token(model, windows)
    patched = vqlm.patch(copy.deepcopy(model), **kind)
    layers, x = patched_layers(patched), windows[:, :-1]
    mismatch = matching_loss(layers, model, x).item()
    tick = itertools.count().__next__  # every look at the clock is a second later
    config = AdaptConfig(minutes=0.5, batch_size=4, seq_len=32, matching=1.0, learning_rate=1e-2)
    found = adapt(patched, model, draw, config, clock=lambda: float(tick()))
    assert found["matching"]["steps"] == 29 and found["next_token"]["steps"] == 0
    assert matching_loss(layers, model, x).item() < 0.96 * mismatch
    config = dataclasses.replace(config, matching=0.0)
    adapt(patched, model, draw, config, clock=lambda: float(tick()))
    assert nats_per_token(patched, windows) < before - 0.3
    assert all(not p.requires_grad for p in model.parameters())


def test_recovered_is_a_share_of_the_gap() -> None:
    assert recovered(2.0, 3.0, 2.1) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no patched layer"):
        adapt(llama(), llama(), words(1, 8), AdaptConfig(minutes=0.01))


def test_saved_and_loaded(tmp_path: Path) -> None:
    x = tokens(2, 30)
    for i, kind in enumerate(KINDS):
        torch.manual_seed(i)
        model = vqlm.patch(qwen3().eval(), layers=[1], **kind)
        want = model(x).logits
        save_patched(model, tmp_path / str(i))
        assert torch.equal(load_patched(tmp_path / str(i))(x).logits, want)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    assert patched_layers(plain) == []
    (tmp_path / "0/vqlm_patch.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_patched(tmp_path / "0")
    with pytest.raises(FileNotFoundError, match="vqlm adapt"):
        load_patched(tmp_path)
    with pytest.raises(ValueError, match="0 kinds of patched layers"):
        save_patched(plain, tmp_path / "none")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_bytes(text(3000))
    said = ["adapt", str(tmp_path / "model"), "--data", str(tmp_path / "book.txt")]
    settings = "n_entry=5 chunk=4 window=4 minutes=0.05 seq_len=32 batch_size=4".split()
    assert main([*said, "--out", str(tmp_path / "out"), *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["adapted"] < found["patched"]
    assert load_patched(tmp_path / "out")(tokens(1, 9)).logits.shape == (1, 9, 259)
    for words_, wanted in [
        ([*said, "--out", str(tmp_path / "out")], "not empty"),
        ([*said, "--out", str(tmp_path / "new"), "n_entri=3"], "did you mean 'n_entry'"),
        (["adapt", str(tmp_path), "--data", "x", "--out", str(tmp_path / "new")], "does not exist"),
    ]:
        assert main(words_) == 2
        assert wanted in capsys.readouterr().err
