"""Training is the same mathematics however it is stopped, cut or recomputed, and it learns."""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    ALL_OF_IT,
    DROPOUT,
    TRAIN,
    after_step,
    assert_same,
    everything,
    fit,
    trainer,
)
from torch.testing import assert_close

from vqlm import checkpoint, precision
from vqlm.config import TrainConfig
from vqlm.data import Corpus, Lanes, load_corpus
from vqlm.evaluate import Evaluation
from vqlm.model import Scored
from vqlm.train import Trainer

MIXERS: dict[str, dict[str, Any]] = {
    "vq": dict(mixers=("vq",)),
    "gau": dict(mixers=("vq",), layer="gau", n_head=1),
    "softmax": dict(mixers=("softmax",)),
    "window": dict(mixers=("window",)),
    "ovq": dict(mixers=("ovq",), n_entry=12, chunk=8),
    "mixed": dict(mixers=("window", "vq")),
    "gated-deltanet": dict(mixers=("gated-deltanet",)),
    "mamba2": dict(mixers=("mamba2",)),
}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("mixers", "stop_after"), [*((name, 3) for name in MIXERS), ("vq", 1), ("vq", 4)]
)
def test_stop_and_resume_is_as_if_there_had_been_no_stop(
    mixers: str, stop_after: int, data: Corpus, tmp_path: Path
) -> None:
    model = MIXERS[mixers] | DROPOUT
    whole = trainer(data, tmp_path / "whole", model, **ALL_OF_IT)
    wanted = fit(whole)

    first = trainer(data, tmp_path / "cut", model, **ALL_OF_IT)
    losses = fit(first, stop_after)
    assert len(losses) == stop_after

    second = trainer(data, tmp_path / "cut", model, **ALL_OF_IT)
    torch.manual_seed(12345)
    second.resume()
    assert_same(everything(second), everything(first))
    assert second.progress == first.progress
    assert losses + fit(second) == wanted
    assert_same(everything(second), everything(whole))


def test_a_finished_run_resumes_to_nothing(data: Corpus, tmp_path: Path) -> None:
    done = trainer(data, tmp_path / "run")
    done.fit()
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    stamp = newest.stat().st_ino
    again = trainer(data, tmp_path / "run")
    again.resume()
    assert again.fit() == done.progress
    assert newest.stat().st_ino == stamp  # a valid checkpoint isn't replaced by its own copy


def test_a_resumed_run_can_go_on_for_longer(data: Corpus, tmp_path: Path) -> None:
    trainer(data, tmp_path / "run").fit()
    longer = trainer(data, tmp_path / "run", steps=9, learning_rate=1e-4)
    longer.resume()
    assert longer.fit().step == 9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mixers", ["vq", "mixed", "softmax"])
def test_gradient_accumulation_is_one_batch(mixers: str, data: Corpus, tmp_path: Path) -> None:
    runs = []
    for parts in (1, 4):
        settings = ALL_OF_IT | dict(steps=3, commitment=0.1, accumulate=parts)
        run = trainer(data, tmp_path / str(parts), MIXERS[mixers], **settings)
        told = after_step(run)
        run.fit()
        runs.append(([(sums.nats, sums.norm) for sums in told], run.bare_model.state_dict()))
    assert_close(runs[1], runs[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mixers", ["vq", "mixed"])
def test_recomputing_activations_changes_nothing(mixers: str, data: Corpus, tmp_path: Path) -> None:
    runs = []
    for recompute in (False, True):
        run = trainer(
            data, tmp_path / str(recompute), MIXERS[mixers] | DROPOUT,
            checkpointing=recompute, **ALL_OF_IT,
        )  # fmt: skip
        losses = fit(run)
        assert run.bare_model.checkpointing == recompute
        runs.append({**everything(run), "losses": torch.tensor(losses)})
    assert_same(*runs)


@pytest.mark.usefixtures("float64")
def test_a_step_is_adamw_on_the_documented_loss(data: Corpus, tmp_path: Path) -> None:
    settings = dict(commitment=0.3, weight_decay=0.2, clip_norm=0.05)
    settings |= dict(codebook_decay=0.7, revive_below=0.9)
    run = trainer(data, tmp_path / "run", **settings)
    model, batch = run.bare_model, run.lanes.next_batch()
    out = model(batch.inputs, starts=batch.starts)
    n_token = batch.inputs.numel()
    nats = -out.logits.log_softmax(-1).gather(-1, batch.targets[..., None]).sum()
    loss = (nats + 0.3 * out.commitment()) / n_token
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.update_codebooks_(out.stats(), 0.7, 0.9)

    told = run.step(batch)
    rate = TRAIN.learning_rate / 2  # the first of two steps of warm-up
    assert norm > 0.05
    assert_close((told.nats, told.norm), (nats.detach(), norm), atol=1e-9, rtol=1e-9)
    assert told.rate == pytest.approx(rate)
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        gradient = gradient * 0.05 / (norm + 1e-6)
        decay = 0.2 if p.ndim >= 2 else 0.0
        wanted = before[name] * (1 - rate * decay)
        wanted = wanted - rate * gradient / (gradient.abs() + 1e-8)  # Adam's first step
        assert_close(p.detach(), wanted, atol=1e-8, rtol=1e-8, msg=name)
    assert_close(dict(model.named_buffers()), dict(other.named_buffers()))


def test_only_matrices_decay(data: Corpus, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", dict(absolute_position=True))
    decayed, plain = run.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in run.bare_model.named_parameters()}
    assert not any(group["fixed_decay"] for group in run.optimizer.param_groups)
    inert = {names[id(p)].split(".")[-1] for p in plain["params"]}
    assert inert == {"gain", "bias", "position_scale"}
    assert {p.ndim for p in decayed["params"]} == {2}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def rates(run: Trainer, n_step: int) -> list[float]:
    found = []
    for run.progress.step in range(n_step):
        found.append(run.rate())
    return found


def cosine(share: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * min(share, 1))) / 2


def test_the_rate_warms_up_and_comes_down_to_its_final_share(data: Corpus, tmp_path: Path) -> None:
    settings = dict(steps=10, learning_rate=0.5, warmup_steps=4, final_rate=0.2)
    run = trainer(data, tmp_path / "run", extra_steps=3, **settings)
    want = [0.5 * min(1, (i + 1) / 4) * cosine(i / 10, 0.2) for i in range(13)]
    assert rates(run, 13) == pytest.approx(want)
    assert run.share_done() == pytest.approx(12 / 13)


def test_the_paper_counts_its_schedule_from_the_end_of_the_warm_up(
    data: Corpus, tmp_path: Path
) -> None:
    settings = dict(steps=10, learning_rate=0.5, warmup_steps=4, warmup_apart=True)
    run = trainer(data, tmp_path / "run", extra_steps=2, **settings)
    want = [0.5 * min(1, i / 4) * cosine(max(0, i - 4) / 6, 0.1) for i in range(12)]
    assert rates(run, 12) == pytest.approx(want)
    assert rates(run, 12)[0] == 0


def test_the_commitment_falls_to_its_final_share(
    data: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a constant factor a step, and it is what the objective is given."""
    weights, objective = [], Scored.objective

    def noted(out: Scored, weight: float, n_token: int) -> Any:
        weights.append(weight)
        return objective(out, weight, n_token)

    monkeypatch.setattr(Scored, "objective", noted)
    run = trainer(data, tmp_path / "run", steps=4, commitment=0.1, final_commitment=0.01)
    run.fit()
    assert weights == pytest.approx([0.1 * 0.01 ** (i / 4) for i in range(4)])
    run.progress.step = 9
    assert run.commitment() == pytest.approx(0.001)


def test_extra_steps_are_made(data: Corpus, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", steps=3, extra_steps=2, schedule="linear")
    told = after_step(run)
    assert run.fit().step == 5
    assert [s.rate for s in told[3:]] == pytest.approx([2e-4, 2e-4])


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_other_optimizers_learn_and_resume(name: str, data: Corpus, tmp_path: Path) -> None:
    settings = dict(optimizer=name, learning_rate=1e-3, fixed_decay=True, clip_norm=None)
    whole = trainer(data, tmp_path / "whole", **settings)
    wanted = fit(whole)
    assert wanted[-1] < wanted[0]
    first = trainer(data, tmp_path / "cut", **settings)
    losses = fit(first, 3)
    second = trainer(data, tmp_path / "cut", **settings)
    second.resume()
    assert losses + fit(second) == wanted
    assert_same(everything(second), everything(whole))


def test_steps_over_one_sequence_drop_the_same_layers(data: Corpus, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", dict(dropout_layer=0.5), context_len=32, accumulate=2)
    seeds = []
    run.model.register_forward_pre_hook(
        lambda _, args, kwargs: seeds.extend(kwargs[k] for k in kwargs if k == "dropout_seed"),
        with_kwargs=True,
    )
    fit(run)
    assert seeds == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    endless = trainer(data, tmp_path / "endless", steps=1)
    endless.model.register_forward_pre_hook(
        lambda _, args, kwargs: seeds.extend(kwargs[k] for k in kwargs if k == "dropout_seed"),
        with_kwargs=True,
    )
    fit(endless)
    assert seeds[-1] is None


def test_the_clock_ends_a_training_before_its_steps_do(
    data: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 10))  # every look at the clock is 10 s after the last
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("vqlm.train.time", clock)  # the heartbeat looks at its own
    run = trainer(data, tmp_path / "run", steps=1000, minutes=0.5, warmup_steps=1)
    told = after_step(run)
    progress = run.fit()
    assert (progress.step, progress.seconds) == (3, 30.0)
    want = [TRAIN.learning_rate * cosine(share, 0.1) for share in (0.0, 1 / 3, 2 / 3)]
    assert [sums.rate for sums in told] == pytest.approx(want)


def bits(data: Corpus, out: Path, model: dict[str, Any], **settings: Any) -> tuple[float, float]:
    """Validation bits per byte before and after training."""
    run = trainer(data, out, model, **settings)
    before = run.validate().bits_per_byte
    run.fit()
    return before, run.validate().bits_per_byte


@pytest.mark.parametrize("mixers", MIXERS)
def test_training_learns(mixers: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"the quick brown fox. " * 100)
    settings = dict(
        steps=60, learning_rate=1e-2, warmup_steps=5, context_len=64, codebook_start="kmeans",
    )  # fmt: skip
    model = MIXERS[mixers] | dict(n_layer=2 if mixers == "mixed" else 1)
    before, after = bits(load_corpus(tmp_path / "text"), tmp_path / "run", model, **settings)
    assert before > 6
    assert after < 1.5


def test_what_is_carried_over_between_steps_matters(data: Corpus, tmp_path: Path) -> None:
    """Each batch is seen with what came before it: the loss is that of one long call."""
    settings = dict(learning_rate=1e-12, weight_decay=0.0, codebook_decay=0.999999, steps=3)
    run = trainer(data, tmp_path / "run", dict(n_layer=1), **settings)
    lanes = Lanes(data.train, 4, 16)
    batches = [lanes.next_batch() for _ in range(3)]
    inputs, targets, starts = (torch.cat([b[i] for b in batches], 1) for i in range(3))
    logits = run.bare_model(inputs, starts=starts).logits
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert fit(run) == pytest.approx([x.sum().item() for x in nats.split(16, 1)], rel=1e-5)
    assert not starts[:, 16].all()


def test_context_len_forgets_at_its_multiples(data: Corpus, tmp_path: Path) -> None:
    settings = dict(learning_rate=1e-12, weight_decay=0.0, context_len=32, steps=4)
    run = trainer(data, tmp_path / "run", dict(mixers=("softmax",)), **settings)
    lanes = Lanes(data.train, 4, 16)
    batches = [lanes.next_batch() for _ in range(4)]
    wanted = []
    for pair in (batches[:2], batches[2:]):
        inputs, targets, starts = (torch.cat([b[i] for b in pair], 1) for i in range(3))
        logits = run.bare_model(inputs, starts=starts).logits
        nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        wanted += [x.sum().item() for x in nats.split(16, 1)]
    assert fit(run) == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_learns_and_keeps_its_sums_in_float32(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"the quick brown fox. " * 100)
    data = load_corpus(tmp_path / "text")
    settings = dict(
        precision="bfloat16", steps=40, learning_rate=1e-2, codebook_start="kmeans",
        revive_below=0.1,
    )  # fmt: skip
    run = trainer(data, tmp_path / "run", **settings)
    before = run.validate().bits_per_byte
    told = after_step(run)
    run.fit()
    stats = [x for sums in told for x in sums.stats if x is not None]
    assert run.validate().bits_per_byte < before / 2
    assert {x.dtype for s in stats for x in s} == {torch.float32}
    assert {s.key_count.sum().item() for s in stats} == {2.0 * 4 * 16}
    assert {x.dtype for x in run.bare_model.state_dict().values()} == {torch.float32}
    assert {x.dtype for x in run.states[0].tensors()} <= {torch.float32, torch.int64}


def test_bfloat16_products_are_in_bfloat16(data: Corpus, tmp_path: Path) -> None:
    kinds = set()
    for name in ("bfloat16", "float32"):  # one after the other in one process
        run = trainer(data, tmp_path / name, precision=name)
        layer = run.bare_model.layers[0].ff.input
        layer.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
        run.step(run.lanes.next_batch())
        assert run.config.precision in str(kinds)
        kinds.clear()


@pytest.mark.parametrize("quick", ["bfloat16", "float32"])
def test_automatic_precision_is_what_multiplies_faster(
    data: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: str
) -> None:
    seconds = {torch.bfloat16: 2.0, torch.float32: 2.0, getattr(torch, quick): 1.0}
    monkeypatch.setattr(precision, "_seconds", seconds.__getitem__)
    precision.fastest.cache_clear()
    run = trainer(data, tmp_path, precision="auto")
    precision.fastest.cache_clear()
    assert run.accelerator.mixed_precision == {"bfloat16": "bf16", "float32": "no"}[quick]


def test_products_are_timed_in_both_formats() -> None:
    assert precision._seconds(torch.float32) > 0 < precision._seconds(torch.bfloat16)
    assert precision.fastest("mps") == "float32"


def test_metrics_have_the_documented_names(data: Corpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(data, tmp_path / "run", steps=5, eval_every=4)
    run.fit()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    kinds = ("codes_in_use", "dead_codes", "quantization_error")
    books = {f"{kind}/layer{i}" for kind in kinds for i in (0, 1)}
    books |= {f"codes_in_use/layer{i}/head{h}" for i in (0, 1) for h in (0, 1)}
    training = {"train/bits_per_byte", "train/learning_rate", "train/gradient_norm"}
    training |= {"train/tokens_per_second", *books}
    looks = {"validation/bits_per_byte", *(f"validation_{name}" for name in books)}
    assert [(x["step"], set(x) - {"step", "seconds", "tokens"}) for x in lines] == [
        (2, training), (4, training), (4, looks), (5, training), (5, looks),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run/events")).Reload()
    assert set(events.Tags()["scalars"]) == training | looks
    assert [event.step for event in events.Scalars("train/bits_per_byte")] == [2, 4, 5]
    assert [x["train/learning_rate"] for x in lines if "train/learning_rate" in x] == [
        pytest.approx(TRAIN.learning_rate * cosine(i / 5, 0.1)) for i in (1, 3, 4)
    ]


def test_logged_bits_are_nats_over_bytes(data: Corpus, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", steps=2)
    lanes = Lanes(data.train, 4, 16)
    n_bytes = sum(lanes.next_batch().n_bytes for _ in range(2))
    losses = fit(run)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert line["train/bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / n_bytes)


def test_settings_survive_a_checkpoint(data: Corpus, tmp_path: Path) -> None:
    trainer(data, tmp_path / "run", steps=1, **ALL_OF_IT).fit()
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    info = checkpoint.load_trainer(newest)[1]
    assert TrainConfig(**info["train"]) == dataclasses.replace(TRAIN, steps=1, **ALL_OF_IT)
    assert info["fingerprint"] == data.fingerprint


def test_the_best_model_on_validation_is_kept(data: Corpus, tmp_path: Path) -> None:
    run = trainer(data, tmp_path / "run", steps=6, eval_every=2)
    looks = iter([3.0, 1.0, 2.0])
    fake = functools.partial(Evaluation, n_tokens=1, n_bytes=1, codebooks=())
    run.validate = lambda: fake(next(looks))  # type: ignore[method-assign]
    weights = []
    after_step(run, 4, lambda: weights.append(copy.deepcopy(run.bare_model.state_dict())))
    run.fit()
    assert run.newest_look is not None and run.newest_look[0] == 6
    assert (run.progress.best_nats, run.newest_look[1].nats) == (1.0, 2.0)
    best = checkpoint.load_model(tmp_path / "run/best").state_dict()
    assert all(torch.equal(best[name], x) for name, x in weights[0].items())
    assert checkpoint.load_facts(tmp_path / "run/best")["step"] == 4


def test_the_best_is_remembered_by_a_resumed_run(data: Corpus, tmp_path: Path) -> None:
    first = trainer(data, tmp_path / "run", steps=6, eval_every=2)
    fit(first, 3)
    second = trainer(data, tmp_path / "run", steps=6, eval_every=2)
    second.resume()
    assert second.progress.best_nats == first.progress.best_nats is not None
