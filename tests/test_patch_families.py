"""``vqlm.patch`` and other families, hybrids, static caches; folders of patched models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import text
from torch import Tensor
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")

import tokenizers  # noqa: E402

import vqlm  # noqa: E402
from vqlm.cli import main  # noqa: E402
from vqlm.patched_files import load_original, load_patched, save_patched  # noqa: E402
from vqlm.patching import patched_layers  # noqa: E402

_SIZES: dict[str, Any] = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, bos_token_id=1,
    eos_token_id=1, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
EXACT = {"n_entry": 64, "chunk": 8, "window": 0}
FEW: dict[str, Any] = {"n_entry": 5, "chunk": 4, "window": 4, "growth": "plateau"}
FULL = ["full_attention"] * 2


def family(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(n_row: int, n_token: int) -> Tensor:
    return torch.randint(3, 259, (n_row, n_token), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Mistral", {"sliding_window": None}), ("Gemma", {"head_dim": 8}), ("Olmo", {}),
        ("Granite", {"attention_multiplier": 0.1}), ("Cohere", {}), ("Starcoder2", {}),
        ("Glm", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_families_that_stay_exact(name: str, more: dict[str, Any]) -> None:
    model, x = family(name, **more), tokens(1, 61)
    want = model(x).logits
    got = vqlm.patch(model, **EXACT)(x).logits
    assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("SmolLM3", {"no_rope_layers": [0, 1]}, "SmolLM3Attention, gives other outputs"),
        ("Cohere2", {"layer_types": FULL}, "Cohere2Attention, gives other outputs"),
        ("Olmo2", {}, "Olmo2Attention, fails when it is patched"),
        ("Olmo", {"clip_qkv": 30.0}, "clip_qkv=30.0"),
        ("Gemma2", {"head_dim": 8, "layer_types": FULL}, "attn_logit_softcapping=50.0"),
        ("Mistral", {"sliding_window": 64}, r"window of its own \(64\)"),
    ],
)
def test_families_that_would_not_are_refused_and_left_alone(
    name: str, more: dict[str, Any], said: str
) -> None:
    model = family(name, **more)
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=said):
        vqlm.patch(model, **FEW)
    assert patched_layers(model) == []
    assert [module.training for module in model.modules()] == modes


def test_weights_of_half_precision_are_compared_as_exactly() -> None:
    """Their own rounding would hide what is left out in a model that is not trained yet."""
    sizes = {"no_rope_layers": [0, 1], "initializer_range": 0.02}
    with pytest.raises(ValueError, match="gives other outputs"):
        vqlm.patch(family("SmolLM3", **sizes).bfloat16(), **FEW)
    model = vqlm.patch(family("Llama", initializer_range=0.02).bfloat16(), **FEW)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_cannot_be_run_here_is_patched_with_a_warning() -> None:
    model = family("Llama")
    model.model.layers[1].train()
    model.forward = None  # as if a kernel of its were not there
    with pytest.warns(UserWarning, match="can't compare layers"):
        vqlm.patch(model, **FEW)
    assert len(patched_layers(model)) == 2
    assert [layer.training for layer in patched_layers(model)] == [False, True]
    plain = torch.nn.ModuleList(family("Llama").model.layers)  # no model of transformers
    assert len(patched_layers(vqlm.patch(plain, **FEW))) == 2


def test_nothing_is_computed_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))
    assert len(patched_layers(vqlm.patch(model))) == 2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_and_padding(attention: str) -> None:
    """The masks of a ``StaticCache`` have columns for tokens that are still to come."""
    model = family("Llama")
    model.set_attn_implementation(attention)
    vqlm.patch(model, **FEW)
    x, mask = tokens(2, 13), torch.ones(2, 13).long()
    mask[1, :6] = 0
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    want = model.generate(x, attention_mask=mask, **settings)
    got = model.generate(x, attention_mask=mask, cache_implementation="static", **settings)
    assert torch.equal(got, want)


def test_a_hybrid_is_saved_and_loaded_in_its_own_layers(tmp_path: Path) -> None:
    """Attention is in layers 1 and 3; ``layers`` counts layers of attention alone."""
    model = family(
        "GraniteMoeHybrid", num_hidden_layers=4, num_local_experts=0, shared_intermediate_size=48,
        layer_types=["mamba", "attention", "mamba", "attention"], mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_n_groups=1, mamba_expand=2,
    )  # fmt: skip
    vqlm.patch(model, layers=[0], **FEW)
    assert [layer.layer_idx for layer in patched_layers(model)] == [1]
    want = model(tokens(2, 30)).logits
    save_patched(model, tmp_path)
    again = load_patched(tmp_path)
    assert [layer.layer_idx for layer in patched_layers(again)] == [1]
    assert_close(again(tokens(2, 30)).logits, want)


def test_a_model_that_learns_positions_is_not_read_beyond_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=24, n_layer=1, n_head=2, n_positions=40, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    (tmp_path / "book.txt").write_bytes(text(3000))
    said = ["adapt", str(tmp_path / "plain"), "--data", str(tmp_path / "book.txt"), "--out"]
    assert main([*said, str(tmp_path / "out"), "seq_len=41", "minutes=0.01"]) == 2
    assert "reads 40 tokens at most" in capsys.readouterr().err


def test_adapting_keeps_the_tokenizer_and_starts_from_what_was_not_patched(
    tmp_path: Path,
) -> None:
    plain, adapted, book = (str(tmp_path / name) for name in ("plain", "adapted", "book.txt"))
    family("Llama").save_pretrained(plain)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "an": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    whole.save_pretrained(plain)
    Path(book).write_bytes(text(3000))
    settings = "n_entry=5 chunk=4 window=4 minutes=0.02 batch_size=4".split()
    said = ["adapt", plain, "--data", book, "--out", adapted, *settings]
    assert main([*said, "seq_len=100"]) == 0  # more than the config says: positions are turned
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapted)
    assert tokenizer("an an").input_ids == [3, 3]
    with pytest.raises(ValueError, match="holds a patched model"):
        load_original(adapted)
    assert json.loads((tmp_path / "adapted/vqlm_patch.json").read_bytes())["layers"] == [0, 1]
