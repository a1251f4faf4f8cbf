"""Whole models beside their peers: of equal size, of equal function where they claim it."""

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

from vqlm import bench_decode, bench_model, bench_peers, timing
from vqlm.bench_model import Training, model_rows
from vqlm.bench_peers import HF, SDPAAttention, hf_model, n_parameter, own_model
from vqlm.cli import main
from vqlm.config import LMConfig
from vqlm.segments import Segments

TINY = LMConfig(
    vocab_size=31, n_layer=2, d_model=64, n_head=2, d_k=32, d_v=32, n_code=8, window=8, block=8,
    n_entry=8, chunk=8,
)  # fmt: skip
PLAN = timing.Plan("model", lambda clock: 1e9, memory=False)
# What transformers says of its own: that faster kernels are not installed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_the_sdpa_model_is_the_softmax_model_without_positions() -> None:
    assert bench_model.check_equivalence() < 1e-9


def test_a_wrong_sdpa_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_peers.causal
    monkeypatch.setattr(bench_peers, "causal", lambda *a, **k: right(*a, **k) * (1 + 1e-6))
    monkeypatch.setattr(timing.Plan, "rows", lambda *_: pytest.fail("timed a wrong model"))
    with pytest.raises(RuntimeError, match="differs from its twin"):
        model_rows(PLAN, TINY, [8], ["sdpa"])


@pytest.mark.parametrize("widths", [(8, 8), (8, 24)], ids=["heads", "the paper's"])
def test_causal_attention_of_wide_values(widths: tuple[int, int]) -> None:
    query, key = torch.randn(2, 1, 1, 13, widths[0], dtype=torch.double)
    value = torch.randn(1, 1, 13, widths[1], dtype=torch.double)
    scores = (query @ key.mT).masked_fill(torch.ones(13, 13).triu(1) == 1, -torch.inf)
    assert_close(bench_peers.causal(query, key, value), scores.softmax(-1) @ value)
    all_of_it = (query @ key.mT).softmax(-1) @ value
    assert_close(bench_peers.causal(query, key, value, is_causal=False), all_of_it)


def test_the_sdpa_mixer_decodes_and_refuses_what_it_can_t_do() -> None:
    mixer = SDPAAttention(TINY).double()
    x = torch.randn(2, 5, 64, dtype=torch.double)
    want, _, _ = mixer(x)
    begin, state, _ = mixer(x[:, :4])
    last, state, _ = mixer(x[:, 4:], state)
    assert_close(torch.cat([begin, last], 1), want)
    assert state.length.tolist() == [5, 5] and state.key.shape[2] == 5
    with pytest.raises(ValueError, match="2 tokens after 5"):
        mixer(x[:, :2], state)
    with pytest.raises(ValueError, match="without documents"):
        mixer(x, segments=Segments.of(starts=torch.ones(2, 5, dtype=torch.bool)))


@pytest.mark.parametrize("name", HF)
def test_peers_have_equal_parameters_and_learn(name: str) -> None:
    pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, n_layer=6) if name == "mamba2" else TINY
    want = n_parameter(own_model("vq", config))
    model = hf_model(name, config)
    # Mamba-2 has no width to choose, only a number of layers.
    assert n_parameter(model) == pytest.approx(want, rel=0.06 if name == "mamba2" else 0.004)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if name == "llama":
        assert model.config._attn_implementation == "sdpa"
    training = Training(name, config, 24, "float32")
    before, _ = training.loss(training.tokens)
    for _ in range(6):
        training.optimizer.param_groups[0]["lr"] = 1e-2
        training.step()
    assert training.loss(training.tokens)[0] < before - 0.1
    assert training.flops(name, config) > 0


def test_a_peer_that_can_t_be_so_small_is_refused() -> None:
    pytest.importorskip("transformers")
    small = dataclasses.replace(TINY, d_ff=1, n_head=1, d_k=2, d_v=2)
    with pytest.raises(ValueError, match="choose a larger one"):
        hf_model("gated-deltanet", small)


@pytest.mark.parametrize("name", ["vq", "sdpa"])
def test_a_step_is_a_training_step_codebooks_included(name: str) -> None:
    training = Training(name, TINY, 24, "float32")
    before = {k: x.clone() for k, x in training.model.state_dict().items()}
    training.step()
    after = training.model.state_dict()
    assert all(not torch.equal(before[k], x) for k, x in after.items() if "weight" in k)
    books = [k for k in after if "codebook" in k]
    assert bool(books) == (name == "vq")
    assert all(not torch.equal(before[k], after[k]) for k in books)
    assert all(p.grad is None for p in training.model.parameters())
    assert training.optimizer.state


def test_operations_of_a_peer_are_linear_but_for_attention() -> None:
    pytest.importorskip("transformers")
    found = {}
    for n in (2048, 4096):
        training = Training("llama", TINY, n, "float32")
        found[n] = training.flops("llama", TINY)
    attention = {n: 3 * 2 * (2 * 64) * n * (n + 1) // 2 * 2 for n in found}
    rest = [found[n] - attention[n] for n in found]
    assert rest[1] == pytest.approx(2 * rest[0], rel=1e-3)


def test_bfloat16_is_used_where_it_is_asked_for() -> None:
    training = Training("vq", TINY, 16, "bfloat16")
    seen = []
    layer = training.model.layers[0].ff.output
    layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    training.step()
    assert seen == [torch.bfloat16]


def test_stretches_are_asked_for_with_checkpointing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["bench", "model", "--stretch", "16", "--lengths", "32", "--no-memory"]
    assert main(shown) == 2
    assert "give both" in capsys.readouterr().err
    sizes = ["n_layer=1", "d_model=8", "n_head=2", "d_k=4", "d_v=4", "n_code=4", "block=8"]
    shown += [
        *sizes,
        "window=8",
        "--checkpointing",
        "--against",
        "softmax",
        "--repeats",
        "1",
        "--json",
    ]
    assert main(shown) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["mixer"]: row.get("stretch") for row in rows} == {"vq": 16, "softmax": None}


@pytest.mark.parametrize("name", ["vq", "sdpa", "llama"])
def test_checkpointing_computes_layers_again_and_the_same(name: str) -> None:
    pytest.importorskip("transformers")
    runs = {}
    for checkpointing in (False, True):
        training = Training(name, TINY, 24, checkpointing=checkpointing)
        module = training.model.layers if name != "llama" else training.model.model.layers
        calls = []
        module[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        linear = next(m for m in module[0].modules() if isinstance(m, torch.nn.Linear))
        linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        training.step()
        runs[checkpointing] = (len(calls), training.loss(training.tokens)[0])
    assert runs[True][0] > runs[False][0]
    assert_close(runs[True][1], runs[False][1])


def test_rows_of_models() -> None:
    config = dataclasses.replace(TINY, n_layer=1)
    rows, _ = model_rows(
        PLAN, config, [8, 16], ["vq", "ovq", "sdpa"], repeats=(2, 1), max_quadratic=8
    )
    want = [(8, "vq"), (8, "ovq"), (8, "sdpa"), (16, "vq"), (16, "ovq")]
    assert [(r.seq_len, r.mixer) for r in rows] == want
    for row in rows:
        assert row.pass_ == "training step" and row.share_of_limit is not None
        assert row.facts["precision"] == "float32" and row.facts["parameters"] > 10_000


@pytest.mark.parametrize("mixer", bench_decode.OURS)
def test_decoding_is_held_to_all_at_once(mixer: str) -> None:
    assert bench_decode.check_equivalence(mixer) < 1e-9


def test_a_wrong_decoder_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = bench_peers.LM.forward

    def wrong(self: bench_peers.LM, tokens: torch.Tensor, *args: object, **kwargs: object):
        out = forward(self, tokens, *args, **kwargs)
        factor = 1 + 1e-6 * (tokens.shape[1] == 1)
        return out._replace(logits=out.logits * factor)

    monkeypatch.setattr(bench_peers.LM, "forward", wrong)
    with pytest.raises(RuntimeError, match="decodes logits that differ"):
        bench_decode.decode_rows(PLAN, TINY, [8], ["vq"])


def test_state_bytes_are_constant_for_ours_and_grow_for_a_cache() -> None:
    pytest.importorskip("transformers")
    rows, _ = bench_decode.decode_rows(
        PLAN, TINY, [20, 40], ["vq", "llama", "llama-static"], repeats=2, batch=2, n_token=3
    )
    state = {(r.mixer, r.seq_len): r.facts["state_bytes"] for r in rows}
    assert state["vq", 20] == state["vq", 40]
    # Keys and values, 2 layers, 2 rows, as many numbers as the model is wide.
    assert state["llama", 40] == state["llama-static", 40] == 2 * 2 * 2 * 40 * 64 * 4
    assert [r.pass_ for r in rows] == ["token"] * 6
    for row in rows:
        assert row.tokens_per_s == pytest.approx(2 * 1e3 / row.ms_median, rel=0.01)


@pytest.mark.parametrize("name", bench_decode.PEERS)
def test_a_cache_forgets_between_repetitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    crop, asked = cache_utils.Cache.crop, []

    def noted(self: object, change: int) -> None:
        asked.append(change)
        crop(self, change)

    monkeypatch.setattr(cache_utils.Cache, "crop", noted)
    built = bench_decode.build(name, dataclasses.asdict(TINY), 10, 1, 3)
    for _ in range(3):
        assert list(built.run()) == ["token"]
    assert asked == [0, -3, -3]
