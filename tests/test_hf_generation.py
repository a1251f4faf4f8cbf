"""What transformers asks of a model that generates: the cases of its own generation tests.

Its test mix-in is in none of its packages, so its cases are written here anew, under its names
where there are such; docs/huggingface.md lists those that don't fit, and why.
"""

import copy
from typing import Any

import pytest
import torch
from test_hf import GREEDY, MIXERS, lm, of, tokens
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")

from transformers import GenerationConfig, GenerationMixin, StoppingCriteria  # noqa: E402
from transformers.generation.utils import (  # noqa: E402
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
)

from vqlm.hf import VqlmCache, VqlmForCausalLM  # noqa: E402
from vqlm.vocabulary import END  # noqa: E402

N_NEW = 7
PROCESSORS: dict[str, Any] = {
    "bad_words_ids": [[17]], "no_repeat_ngram_size": 2, "repetition_penalty": 1.2,
    "remove_invalid_values": True,
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
    "beam": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam_sample": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(params=MIXERS.values(), ids=list(MIXERS))
def model(request: pytest.FixtureRequest) -> VqlmForCausalLM:
    return of(lm(request.param))


def made(model: VqlmForCausalLM, x: torch.Tensor, **settings: Any) -> Any:
    torch.manual_seed(0)
    wanted = {"max_new_tokens": N_NEW, **GREEDY, **settings}
    return model.generate(x, **wanted)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_dict_outputs(model: VqlmForCausalLM, name: str, use_cache: bool) -> None:
    """Every strategy returns the tokens that it returns without the dictionary, a score for each
    of them, and the cache if there is one."""
    x, settings = tokens(2, 11), {**STRATEGIES[name], **PROCESSORS, "use_cache": use_cache}
    plain = made(model, x, **settings)
    out = made(
        model, x, **settings, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    beams, returned = settings.get("num_beams", 1), settings.get("num_return_sequences", 1)
    assert type(out) is (GenerateBeamDecoderOnlyOutput if beams > 1 else GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, plain)
    assert plain.shape == (2 * returned, 11 + N_NEW)
    assert torch.equal(plain[:, :11], x.repeat_interleave(returned, 0))
    assert not (plain[:, 11:] == 17).any()
    assert len(out.scores) == len(out.logits) == N_NEW
    assert all(scores.shape == (2 * beams, 259) for scores in out.scores)
    if beams > 1:
        assert out.sequences_scores.shape == (2 * returned,)
        assert (out.sequences_scores < 0).all()
        assert out.beam_indices.shape[0] == 2 * returned
    assert out.attentions is None and out.hidden_states is None
    assert isinstance(out.cache, VqlmCache) if use_cache else out.cache is None


def test_generate_without_input_ids(model: VqlmForCausalLM) -> None:
    from_start = made(model, torch.tensor([[END]]))
    torch.manual_seed(0)
    assert torch.equal(model.generate(max_new_tokens=N_NEW, **GREEDY), from_start)


def test_generate_continue_from_cache(model: VqlmForCausalLM) -> None:
    """Half, its cache and the rest give what all at once gives: tokens, and the cache after."""
    x = tokens(2, 9)
    whole = made(model, x, return_dict_in_generate=True)
    half = made(model, x, max_new_tokens=3, return_dict_in_generate=True)
    rest = made(
        model, half.sequences, max_new_tokens=N_NEW - 3, cache=half.cache,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(rest.sequences, whole.sequences)
    for a, b in zip(
        rest.cache.whole.state.tensors(), whole.cache.whole.state.tensors(), strict=True
    ):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["greedy", "sample", "beam"])
def test_generate_methods_with_logits_to_keep(model: VqlmForCausalLM, name: str) -> None:
    x = tokens(2, 11)
    few = made(model, x, **STRATEGIES[name], logits_to_keep=1)
    assert torch.equal(few, made(model, x, **STRATEGIES[name]))
    # `generate` asks for one by itself, so only this has all of them.
    assert torch.equal(few, made(model, x, **STRATEGIES[name], logits_to_keep=0))


def test_left_padding_compatibility(model: VqlmForCausalLM) -> None:
    """The next logits of a row don't depend on how far it is padded on the left."""
    x = tokens(2, 11)
    padded = torch.cat([x.new_zeros(2, 32), x], 1)
    mask = (torch.arange(43) >= 32).long().expand(2, 43)
    with torch.no_grad():
        got = model(padded, attention_mask=mask).logits[:, -1]
        assert_close(got, model(x).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_assisted_decoding_sample(model: VqlmForCausalLM) -> None:
    """A draft that is checked by sampling has its own random numbers, so only its form is known."""
    x, assistant = tokens(1, 12), of(lm(("window",)))
    assistant.generation_config.num_assistant_tokens = 3
    out = made(
        model, x, do_sample=True, assistant_model=assistant, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences.shape == (1, 12 + N_NEW) and len(out.scores) == N_NEW
    assert torch.equal(out.sequences[:, :12], x)


def test_prompt_lookup_decoding_stops_at_eos() -> None:
    """An end in the middle of what is looked up ends the text there."""
    model = of(lm())
    first = int(made(model, tokens(1, 12), max_new_tokens=1)[0, -1])
    x = tokens(1, 12)
    out = model.generate(
        x, prompt_lookup_num_tokens=4, max_new_tokens=N_NEW, do_sample=False, eos_token_id=first
    )
    assert out.shape == (1, 13) and int(out[0, -1]) == first


class _After(StoppingCriteria):
    """Ends every row after so many columns."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.n)


def test_rows_end_at_their_own_ends(model: VqlmForCausalLM) -> None:
    """A row that has met its end is padded; the others go on as if they were alone."""
    x = tokens(3, 10)
    free = made(model, x)
    end = int(free[0, 11])
    out = made(model, x, eos_token_id=end, pad_token_id=0)
    for row, want in zip(out[:, 10:].tolist(), free[:, 10:].tolist(), strict=True):
        stop = want.index(end) + 1 if end in want else N_NEW
        assert row[:stop] == want[:stop] and not any(row[stop:])
    cut = made(model, x, stopping_criteria=[_After(13)])
    assert torch.equal(cut, free[:, :13])


def test_inherits_generation_mixin_and_says_what_it_refuses() -> None:
    model = of(lm())
    assert isinstance(model, GenerationMixin) and model.can_generate()
    x = tokens(1, 6)
    cases: list[tuple[str, Any, str]] = [
        ("cache_implementation", "static", "constant size by itself"),
        ("cache_implementation", "quantized", "constant size by itself"),
        ("inputs_embeds", torch.zeros(1, 6, model.config.d_model), "inputs_embeds"),
        ("output_attentions", True, "output_attentions"),
        ("output_hidden_states", True, "output_hidden_states"),
    ]
    for name, value, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            made(model, x, **{name: value}, return_dict_in_generate=True)


def test_a_generation_config_is_kept_and_read(model: VqlmForCausalLM) -> None:
    x = tokens(2, 8)
    twin = copy.deepcopy(model)
    twin.generation_config = GenerationConfig(
        max_new_tokens=N_NEW, num_beams=3, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(twin.generate(x), made(model, x, num_beams=3))
