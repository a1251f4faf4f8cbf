"""vqlm's models in transformers: the same logits, the same tokens, the constant state as cache."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import MODEL, corpus, text, trainer
from torch import Tensor
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from vqlm import checkpoint  # noqa: E402
from vqlm.cli import main  # noqa: E402
from vqlm.config import LMConfig  # noqa: E402
from vqlm.hf import VqlmCache, VqlmConfig, VqlmForCausalLM, load  # noqa: E402
from vqlm.model import LM  # noqa: E402
from vqlm.vocabulary import END  # noqa: E402

transformers.utils.logging.disable_progress_bar()

MIXERS = {"vq": ("vq",), "ovq": ("ovq",), "hybrid": ("window", "vq"), "softmax": ("softmax",)}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def lm(mixers: tuple[str, ...] = ("vq",), **settings: Any) -> LM:
    """A tiny model with weights large enough for greedy choices to differ."""
    torch.manual_seed(1)
    model = LM(dataclasses.replace(MODEL, mixers=mixers, n_entry=5, chunk=4, **settings)).eval()
    with torch.no_grad():
        model.output.weight.mul_(4)
    return model


def run_folder(folder: Path, model: LM) -> Path:
    folder.mkdir(exist_ok=True)
    checkpoint.save_model(model, folder, checkpoint.Medium())
    return folder


def of(model: LM) -> VqlmForCausalLM:
    """The model of transformers with the weights of ``model``."""
    theirs = VqlmForCausalLM(VqlmConfig(**dataclasses.asdict(model.config)))
    theirs.load_state_dict(model.state_dict())  # a run folder's names
    return theirs.eval()


def tokens(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (n_row, n_token), generator=generator)


@pytest.fixture(params=MIXERS.values(), ids=list(MIXERS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LM, VqlmForCausalLM]:
    """A model, and what transformers makes of its run folder."""
    model = lm(request.param)
    return model, AutoModelForCausalLM.from_pretrained(run_folder(tmp_path / "run", model))


Pair = tuple[LM, VqlmForCausalLM]


def test_logits_are_ours_bit_for_bit(pair: Pair) -> None:
    ours, theirs = pair
    x = tokens(2, 37)
    assert torch.equal(theirs(x).logits, ours(x).logits)
    assert not theirs.training


def test_greedy_generation_is_ours_token_for_token(pair: Pair) -> None:
    ours, theirs = pair
    x = tokens(3, 11)
    want = ours.generate(x, 15, temperature=0.0)
    got = theirs.generate(x, max_new_tokens=15, **GREEDY)
    assert torch.equal(got, want)
    assert len(want[:, 11:].unique()) > 5


def test_left_padded_rows_are_as_each_alone(pair: Pair) -> None:
    _, model = pair
    rows = [tokens(1, n, seed=n) for n in (13, 5, 9)]
    padded = torch.zeros(3, 13, dtype=torch.long)
    mask = torch.zeros(3, 13, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 13 - row.shape[1] :], mask[i, 13 - row.shape[1] :] = row, 1
    got = model.generate(padded, attention_mask=mask, max_new_tokens=9, **GREEDY)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=9, **GREEDY)
        assert torch.equal(got[i, 13:], alone[0, row.shape[1] :])


@pytest.mark.parametrize("settings", [
    {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True},
    {"do_sample": True, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
], ids=str)  # fmt: skip
def test_every_strategy_gives_the_same_with_and_without_cache(settings: dict[str, Any]) -> None:
    model = of(lm(("ovq", "vq")))
    x = tokens(2, 9)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        made = model.generate(
            x, max_new_tokens=9, **{**GREEDY, **settings}, use_cache=use_cache,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append(made)
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-4)


def test_cache_has_constant_size_and_goes_on_warm(pair: Pair) -> None:
    ours, model = pair
    x = tokens(2, 40)
    want = ours(x).logits
    cache, parts, sizes = None, [], []
    for part in x.split([17, 1, 2, 20], 1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
        sizes.append(cache.state.bytes())
    assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 40
    assert "softmax" in ours.config.mixers or len(set(sizes)) == 1


def test_generation_goes_on_from_a_cache_with_more_than_one_token(pair: Pair) -> None:
    _, model = pair
    x, more = tokens(2, 15), tokens(2, 6, seed=5)
    both = torch.cat([x, more], 1)
    want = model.generate(both, max_new_tokens=8, **GREEDY)
    cache = model(x, use_cache=True).cache
    kept = copy.deepcopy(cache)
    whole = model.generate(both, cache=cache, max_new_tokens=8, **GREEDY)
    assert torch.equal(whole, want)
    mask = torch.ones_like(both)
    only_new = model.generate(more, attention_mask=mask, cache=kept, max_new_tokens=8, **GREEDY)
    assert torch.equal(only_new[:, 6:], want[:, 21:])


def test_prefill_in_pieces(pair: Pair) -> None:
    _, model = pair
    x = tokens(2, 23)
    want = model.generate(x, max_new_tokens=8, **GREEDY)
    assert torch.equal(model.generate(x, max_new_tokens=8, prefill_chunk_size=7, **GREEDY), want)


@pytest.mark.parametrize("mixers", [("window", "vq"), ("ovq",)], ids=str)
def test_assisted_generation_gives_the_same_tokens(mixers: tuple[str, ...]) -> None:
    model, stranger = of(lm(mixers)), of(lm(("window",)))
    x = tokens(1, 12)
    want = model.generate(x, max_new_tokens=11, **GREEDY)
    # A stranger's draft, which is mostly rejected, and the model's own, which is mostly taken.
    for assistant in (stranger, copy.deepcopy(model)):
        got = model.generate(x, assistant_model=assistant, max_new_tokens=11, **GREEDY)
        assert torch.equal(got, want)
    looked_up = model.generate(x, prompt_lookup_num_tokens=3, max_new_tokens=11, **GREEDY)
    assert torch.equal(looked_up, want)


class _Words(BaseStreamer):
    def __init__(self) -> None:
        self.put_so_far: list[int] = []

    def put(self, value: Tensor) -> None:
        self.put_so_far += value.flatten().tolist()

    def end(self) -> None:
        self.put_so_far.append(-1)


def test_tokens_are_streamed() -> None:
    model = of(lm())
    x, streamer = tokens(1, 4), _Words()
    made = model.generate(x, max_new_tokens=6, streamer=streamer, **GREEDY)
    assert streamer.put_so_far == [*made[0].tolist(), -1]


def test_what_was_recorded_can_be_cropped_and_nothing_else() -> None:
    ours = lm(("window", "vq"))
    model = of(ours)
    x = tokens(2, 30)
    cache = VqlmCache()
    assert not cache.is_croppable
    model(x[:, :10], cache=cache)
    with pytest.raises(ValueError, match="constant size can't be cut"):
        cache.crop(-1)
    cache.activate_past_recording()
    assert cache.is_croppable
    model(x[:, 10:17], cache=cache)
    model(x[:, 17:18], cache=cache)
    cache.crop(-3)  # the one, and two of the seven
    assert cache.get_seq_length() == 15
    got = model(x[:, 15:], cache=cache).logits
    assert_close(got, ours(x).logits[:, 15:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="taken back"):
        cache.crop(-16)
    with pytest.raises(ValueError, match="taken back"):
        cache.crop(5)


def test_rows_of_a_cache_are_chosen_repeated_and_forgotten() -> None:
    ours = lm()
    model = of(ours)
    x, more = tokens(3, 20), tokens(1, 4, seed=9)
    after = [ours(more, ours(x[i : i + 1]).state).logits[0] for i in range(3)]

    def rows(cache: VqlmCache, order: list[int]) -> None:
        got = model(more.expand(len(order), -1), cache=cache).logits
        for i, row in enumerate(order):
            assert_close(got[i], after[row], rtol=1e-4, atol=1e-5)

    cache = model(x, use_cache=True).cache
    assert cache.batch_size == 3
    for act, order in [
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ]:
        changed = copy.deepcopy(cache)
        act(changed)
        rows(changed, order)
    rows(cache, [0, 1, 2])
    cache.reset()
    assert cache.state is None and cache.get_seq_length() == 0


def test_what_it_cannot_do_is_said() -> None:
    model = of(lm())
    x = tokens(1, 4)
    for arguments, said in [
        ({"output_attentions": True}, "no output_attentions"),
        ({"position_ids": torch.arange(4)[None]}, "counted by the state"),
        ({"cache": transformers.DynamicCache()}, "got a DynamicCache"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    ]:
        with pytest.raises(ValueError, match=said):
            model(x, **arguments)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="constant size by itself"):
        model.generate(x, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="did you mean 'window'"):
        VqlmConfig(mixers=("windw",))


def test_saved_in_parts_and_read_by_both(tmp_path: Path) -> None:
    ours = lm(("window", "ovq"), tie_embedding=False, absolute_position=True)
    model = AutoModelForCausalLM.from_pretrained(run_folder(tmp_path / "run", ours))
    out = tmp_path / "out"
    model.save_pretrained(out, max_shard_size="4KB")
    assert len(list(out.glob("model-0*.safetensors"))) > 2
    x = tokens(2, 19)
    want = ours(x).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(x).logits, want)
    assert torch.equal(checkpoint.load_model(out)(x).logits, want)
    assert AutoConfig.from_pretrained(out).lm_config() == ours.config
    (out / "model-00001-of-00009.safetensors").unlink(missing_ok=True)
    for part in list(out.glob("model-0*.safetensors"))[:1]:
        part.unlink()
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load_model(out)


def test_a_config_by_the_names_of_transformers() -> None:
    config = VqlmConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, window=9)
    assert config.lm_config() == LMConfig(d_model=32, n_layer=3, n_head=2, window=9)
    assert (config.d_model, config.hidden_size, config.eos_token_id) == (32, 32, END)


def test_fresh_weights_are_as_lm_draws_them() -> None:
    torch.manual_seed(0)
    ours = LM(MODEL)
    torch.manual_seed(0)
    theirs = VqlmForCausalLM(VqlmConfig(**dataclasses.asdict(MODEL)))
    for name, x in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[f"lm.{name}"], x) or "codebook" in name


def test_tokenizer_of_bytes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", lm())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = "Hé </s>\n\0 \U0001f600"
    ids = tokenizer(said).input_ids
    assert ids == [END, *(b + 3 for b in said.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == said
    assert tokenizer(said, add_special_tokens=False).input_ids == ids[1:]
    both = tokenizer(["a", "abc"], padding=True)
    assert both.input_ids == [[0, 0, END, 100], [END, 100, 101, 102]]
    assert both.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(said).input_ids == ids and len(again) == 259


def test_tokenizer_of_word_pieces(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    from vqlm.vocabulary import train_sentencepiece

    vocabulary = train_sentencepiece([text(400).decode()] * 3, 300)
    medium = checkpoint.Medium(vocabulary=vocabulary)
    checkpoint.save_model(lm(vocab_size=300), tmp_path, medium)
    _, tokenizer = load(tmp_path)
    said = "state code  window é\n </s> model"
    ids = tokenizer(said).input_ids
    assert ids == [END, *vocabulary.encode(said.encode()).tolist()]
    assert len(ids) < len(said) and tokenizer.decode(ids[1:]) == said
    assert len(tokenizer.get_vocab()) == 300
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(said).input_ids == ids


def test_pictures_have_no_tokenizer(tmp_path: Path) -> None:
    checkpoint.save_model(lm(), tmp_path, checkpoint.Medium("image", (2, 2, 3)))
    assert load(tmp_path)[1] is None
    with pytest.raises(ValueError, match="model of pictures"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_exported_with_a_card_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ours = trainer(corpus(tmp_path / "text"), run, steps=3, eval_every=3)
    ours.fit()
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "| steps | 3 |" in card and "| tokens | 192 |" in card
    assert f"{ours.progress.best_nats:.4f} nats" in card
    assert f"{sum(p.numel() for p in ours.bare_model.parameters()):,} parameters" in card
    x = tokens(1, 9)
    model, tokenizer = load(out)
    assert tokenizer is not None
    assert torch.equal(model(x).logits, checkpoint.load_model(run)(x).logits)
    assert main(["export", str(run), str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["sample", str(out), "--tokens", "3"]) == 0


def test_pushing_uploads_what_saving_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a hub of our own, which is only as good as what it imitates."""
    from huggingface_hub import HfApi

    sent: dict[str, list[str]] = {}

    class Repo:
        repo_id = "me/mine"

    def create_commit(self: HfApi, **kwargs: Any) -> str:
        sent[kwargs["repo_id"]] = sorted(o.path_in_repo for o in kwargs["operations"])
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repo())
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model = AutoModelForCausalLM.from_pretrained(run_folder(tmp_path / "run", lm()))
    model.push_to_hub("mine")
    assert sent == {
        "me/mine": ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    }


def test_a_run_folder_is_not_saved_into(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(corpus(tmp_path / "text"), run, steps=2).fit()
    model = AutoModelForCausalLM.from_pretrained(run)
    with pytest.raises(ValueError, match="is the run folder of a training"):
        model.save_pretrained(run)
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None
    checkpoint.load_trainer(newest)


def test_a_new_model_s_card_speaks_of_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer(corpus(tmp_path / "text"), run, steps=2).fit()
    monkeypatch.chdir(run)
    of(lm()).save_pretrained(tmp_path / "new")
    card = (tmp_path / "new/README.md").read_text()
    assert "# vqlm\n" in card and "Training" not in card


def test_a_tensor_that_is_missing_is_told(tmp_path: Path) -> None:
    run_folder(tmp_path, lm())
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["norm.weight" if "norm.weight" in tensors else sorted(tensors)[-1]]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="is missing"):
        load(tmp_path)


def test_token_ids_are_as_many_as_they_are() -> None:
    model = of(lm())
    assert model.resize_token_embeddings(model.config.vocab_size) is model.lm.embedding
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(270\)"):
        model.resize_token_embeddings(270)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(320\)"):
        model.resize_token_embeddings(None, pad_to_multiple_of=64)
    assert model.config.vocab_size == 259


@torch.no_grad()
def test_logits_of_chosen_positions() -> None:
    model, x = of(lm()), tokens(2, 9)
    whole = model(x).logits
    for kept, want in [(0, whole), (2, whole[:, -2:]), (torch.tensor([1, 4]), whole[:, [1, 4]])]:
        assert torch.equal(model(x, logits_to_keep=kept).logits, want)


@torch.no_grad()
def test_loaded_in_half_precision(tmp_path: Path) -> None:
    run_folder(tmp_path, lm())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    x = tokens(2, 30)
    want, got = lm()(x).logits, model(x).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.1 * want.norm()
    assert model.generate(x, max_new_tokens=5, **GREEDY).shape == (2, 35)
