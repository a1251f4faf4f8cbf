"""Training in transformers: its Trainer, gradient accumulation, checkpointing; codebooks learn."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL, TRAIN, corpus, text
from torch import Tensor
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")

from vqlm.codebook import merge_layers  # noqa: E402
from vqlm.config import LMConfig  # noqa: E402
from vqlm.data import Corpus, Lanes, load_corpus  # noqa: E402
from vqlm.evaluate import evaluate  # noqa: E402
from vqlm.hf import VqlmConfig, VqlmForCausalLM  # noqa: E402
from vqlm.model import LM  # noqa: E402
from vqlm.train import Trainer  # noqa: E402

RECIPE = {"commitment": 1e-2, "codebook_decay": 0.9, "revive_below": 0.1}


def model(config: LMConfig = MODEL, **recipe: float) -> VqlmForCausalLM:
    torch.manual_seed(0)
    made = VqlmForCausalLM(VqlmConfig(**dataclasses.asdict(config), **(recipe or RECIPE)))
    return made.train()


def batches(n: int, n_row: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 259, (n_row, 24), generator=generator) for _ in range(n)]


def step(m: VqlmForCausalLM, parts: list[Tensor], lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD(m.parameters(), lr=lr)
    n_item = sum(part[:, 1:].numel() for part in parts)
    for part in parts:
        m(part, labels=part, num_items_in_batch=n_item).loss.backward()
    optimizer.step()


def state(m: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in m.state_dict().items()}


def test_loss_is_cross_entropy_of_the_next_token_and_commitment() -> None:
    m, (x,) = model(), batches(1)
    labels = x.clone()
    labels[0, :7] = -100
    out = m(x, labels=labels)
    nats = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    n_target = (labels[:, 1:] != -100).sum()
    commitment = m.lm(x).commitment() / n_target
    assert_close(out.loss, nats + RECIPE["commitment"] * commitment)
    assert_close(m.eval()(x, labels=labels).loss, nats)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert_close(m(x, shift_labels=shifted).loss, nats)


def test_codebooks_learn_once_a_step_from_all_that_was_seen() -> None:
    m, parts = model(), batches(3)
    before = [book.key_sum.clone() for book in m.lm.codebooks() if book is not None]
    seen = None
    with torch.no_grad():
        for part in parts:
            stats = m.lm(part, with_stats=True).stats()
            seen = stats if seen is None else merge_layers(seen, stats)
    assert seen is not None
    for part in parts:
        m(part, labels=part).loss.backward()
    unchanged = [book.key_sum for book in m.lm.codebooks() if book is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, unchanged, strict=True))
    want = LM(MODEL)
    want.load_state_dict(m.lm.state_dict())
    want.update_codebooks_(seen, RECIPE["codebook_decay"], RECIPE["revive_below"])
    torch.optim.SGD(m.parameters(), lr=0.0).step()
    for got, wanted in zip(m.lm.codebooks(), want.codebooks(), strict=True):
        assert got is not None and wanted is not None
        assert_close(got.key_sum, wanted.key_sum)
        assert_close(got.key_count, wanted.key_count)
    after = state(m)
    torch.optim.SGD(m.parameters(), lr=0.0).step()  # nothing has been seen since
    assert all(torch.equal(x, after[name]) for name, x in m.state_dict().items())


def test_only_an_optimizer_of_its_own_parameters_makes_codebooks_learn() -> None:
    m, (x,) = model(), batches(1)
    m(x, labels=x).loss.backward()
    before = state(m)
    stranger = torch.nn.Parameter(torch.ones(1))
    stranger.grad = torch.ones(1)
    torch.optim.SGD([stranger], lr=0.1).step()
    assert all(torch.equal(x, before[name]) for name, x in m.state_dict().items())
    with torch.no_grad():
        m.eval()(x)
    torch.optim.SGD([m.lm.embedding.weight], lr=0.0).step()
    assert not torch.equal(m.lm.layers[0].mixer.codebook.key_sum, before_sum(before))


def before_sum(before: dict[str, Tensor]) -> Tensor:
    return before["lm.layers.0.mixer.codebook.key_sum"]


def test_accumulated_parts_are_one_batch() -> None:
    whole, cut = model(), model()
    (x,) = batches(1)
    step(whole, [x])
    step(cut, list(x.split([1, 3])))
    for name, got in cut.state_dict().items():
        assert_close(got, whole.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_nothing() -> None:
    plain, checkpointed = model(), model()
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing and checkpointed.lm.checkpointing
    (x,) = batches(1)
    for m in (plain, checkpointed):
        step(m, [x])
    for name, got in checkpointed.state_dict().items():
        assert torch.equal(got, plain.state_dict()[name]), name
    checkpointed.activation_checkpointing_disable()
    assert not checkpointed.lm.checkpointing


def _pairs(lanes: Lanes) -> list[tuple[Tensor, Tensor]]:
    batch = lanes.next_batch()
    return list(zip(batch.inputs, batch.targets, strict=True))


class Windows(torch.utils.data.Dataset):
    """The rows of our own loop's batches, in its order."""

    def __init__(self, data: Corpus, n_row: int, n_token: int, n_batch: int) -> None:
        lanes = Lanes(data.train, n_row, n_token)
        self.rows = [row for _ in range(n_batch) for row in _pairs(lanes)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        inputs, targets = self.rows[i]
        return {"input_ids": inputs, "shift_labels": targets}


def trained_by_both(
    data: Corpus, config: LMConfig, folder: Path, **settings: Any
) -> tuple[float, float, LM, LM]:
    """Nats per token on validation after the same training: our loop's, then the Trainer's."""
    train = dataclasses.replace(
        TRAIN, schedule="constant", warmup_steps=1, weight_decay=0.0, beta2=0.999, **RECIPE,
        **settings,
    )  # fmt: skip
    ours = Trainer(config, dataclasses.replace(train, context_len=train.seq_len), data, None,
                   folder / "ours")  # fmt: skip
    start = state(ours.bare_model)
    ours.fit()
    theirs = model(config)
    theirs.lm.load_state_dict(start)
    rows = Windows(data, train.batch_size, train.seq_len, train.steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "theirs"), max_steps=train.steps, learning_rate=train.learning_rate,
        per_device_train_batch_size=train.batch_size // train.accumulate,
        gradient_accumulation_steps=train.accumulate, lr_scheduler_type="constant",
        weight_decay=0.0, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(theirs, arguments, train_dataset=rows).train()
    nats = [
        (found := evaluate(m, data.validation, max_bytes=20_000)).nats / found.n_tokens
        for m in (ours.bare_model, theirs.lm)
    ]
    return nats[0], nats[1], ours.bare_model, theirs.lm


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_does_what_our_loop_does(tmp_path: Path, accumulate: int) -> None:
    # One document: our loop also starts anew inside a row, where the Trainer has no word for it.
    (tmp_path / "book.txt").write_bytes(text(700))
    data = load_corpus(tmp_path / "book.txt")
    nats = trained_by_both(data, MODEL, tmp_path, accumulate=accumulate)
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)
    for (name, a), b in zip(
        nats[2].state_dict().items(), nats[3].state_dict().values(), strict=True
    ):
        assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_200_steps_on_enwik(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data = load_corpus(shared_data("data/enwik_mini"))
    config = dataclasses.replace(MODEL, d_model=32, d_ff=48, n_code=16, window=16, block=16)
    ours, theirs, _, _ = trained_by_both(
        data, config, tmp_path, steps=200, seq_len=32, eval_bytes=1000, save_every=500
    )
    assert ours < 3.2  # it has learned something
    assert theirs == pytest.approx(ours, abs=1e-3)


def test_a_trainer_saves_and_goes_on(tmp_path: Path) -> None:
    data = corpus(tmp_path / "text")
    found = []
    for stop in (None, 3):
        m = model()
        arguments: dict[str, Any] = dict(
            output_dir=str(tmp_path / f"out{stop}"), save_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
            train_sampling_strategy="sequential", lr_scheduler_type="constant",
            logging_strategy="no",
        )  # fmt: skip
        rows = Windows(data, 4, 16, 6)
        for steps, resume in [(6, False)] if stop is None else [(stop, False), (6, True)]:
            options = transformers.TrainingArguments(**arguments, max_steps=steps)
            if resume:
                m = model()
                with torch.no_grad():
                    m.lm.embedding.weight.zero_()  # must come from the checkpoint
            transformers.Trainer(m, options, train_dataset=rows).train(
                resume_from_checkpoint=resume
            )
        found.append(state(m))
    for name, x in found[0].items():
        assert_close(found[1][name], x, rtol=1e-4, atol=1e-6, msg=name)
