"""Models, trainings and texts small enough for a test to train and resume many times over."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig, TrainConfig
from vqlm.data import Batch, Corpus, load_corpus
from vqlm.runlog import StepSums
from vqlm.train import Trainer

WORDS = b"state linear code vector window means query value key time block model".split()

MODEL = LMConfig(
    n_layer=2, d_model=16, n_head=2, d_k=8, d_v=8, d_ff=24, n_code=8, window=8, block=8,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=6, batch_size=4, seq_len=16, warmup_steps=2, log_every=2, eval_every=100, eval_bytes=60,
    save_every=100,
)  # fmt: skip

# Everything at once that could be forgotten in a checkpoint.
ALL_OF_IT = dict(
    accumulate=2, context_len=64, codebook_start="kmeans", revive_below=0.5, commitment=1e-2,
)  # fmt: skip
DROPOUT = dict(
    dropout_embedding=0.1, dropout_sinusoid=0.1, dropout_residual=0.1, dropout_layer=0.1,
)  # fmt: skip


def text(n_word: int, seed: int = 0) -> bytes:
    """Words in an order that looks random and is always the same."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(WORDS), (n_word,), generator=generator)
    return b" ".join(WORDS[i] for i in order.tolist())


def corpus(folder: Path, n_document: int = 9, n_word: int = 8) -> Corpus:
    """A folder of short documents; a training of six steps reads it more than once."""
    folder.mkdir(exist_ok=True)
    for i in range(n_document):
        (folder / f"{i}.txt").write_bytes(text(n_word + i % 3, seed=i))
    return load_corpus(folder)


def trainer(
    data: Corpus, out: Path, model: dict[str, Any] | None = None, **settings: Any
) -> Trainer:
    """A tiny training; ``model`` and ``settings`` are changes to MODEL and TRAIN."""
    model_config = dataclasses.replace(MODEL, **(model or {}))
    return Trainer(model_config, dataclasses.replace(TRAIN, **settings), data, None, out)


def after_step(
    trainer: Trainer, number: int | None = None, act: Callable[[], object] = int
) -> list[StepSums]:
    """A list that ``fit`` will put every step's sums in; does ``act`` after step ``number``."""
    told: list[StepSums] = []
    step = trainer.step

    def stepped(batch: Any) -> StepSums:
        told.append(step(batch))
        if trainer.progress.step == number:
            act()
        return told[-1]

    trainer.step = stepped  # type: ignore[method-assign]
    return told


def fit(trainer: Trainer, stop_after: int | None = None) -> list[float]:
    """Trains, to the end or as far as if Ctrl-C came in step ``stop_after``; the losses."""
    told = after_step(trainer, stop_after, lambda: setattr(trainer, "stop_requested", True))
    trainer.fit()
    return [sums.nats.item() for sums in told]


def spoil(training: Trainer, numbers: set[int], by: float = torch.inf) -> None:
    """Makes the loss of those batches, counted from 1, what it is and ``by`` more per token."""
    forward, batches = training.model.forward, [0]
    next_batch = training.lanes.next_batch

    def counted() -> Batch:
        batches[0] = training.lanes.state_dict()["cursor"] + 1
        return next_batch()

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return _Spoilt(out, by) if training.model.training and batches[0] in numbers else out

    training.lanes.next_batch = counted  # type: ignore[method-assign]
    training.model.forward = spoilt  # type: ignore[method-assign]


class _Spoilt:
    def __init__(self, out: Any, by: float) -> None:
        self._out, self._by = out, by

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def objective(self, weight: float, n_token: int) -> Any:
        loss, nats = self._out.objective(weight, n_token)
        return loss * self._by, nats + self._by * n_token


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All numbers that a training's future depends on."""
    found = {f"model/{name}": x.clone() for name, x in trainer.bare_model.state_dict().items()}
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{index}/{name}": x.clone() for name, x in entry.items()}
    for part, state in enumerate(trainer.states):
        if state is not None:
            found |= {f"state/{part}/{i}": x.clone() for i, x in enumerate(state.tensors())}
    found["random"] = torch.get_rng_state()
    found["cursor"] = torch.tensor(trainer.lanes.state_dict()["cursor"])
    found["counts"] = torch.tensor([trainer.progress.step, trainer.progress.tokens])
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit, names included."""
    assert got.keys() == want.keys()
    differ = [name for name in want if not torch.equal(got[name], want[name])]
    assert differ == []


def assert_same_weights(got: dict[str, Tensor], want: dict[str, Tensor], of: str = "") -> None:
    """Up to float64's rounding, after a training by other processes; names included.

    What is added to all scores of a window its softmax does not notice, and the slowest sinusoids
    add nearly that.  So the gradient of what they are multiplied with is next to nothing but
    rounding, and Adam divides it by its own size, or by 1e-8: 3e-12 after 50 steps.
    """
    assert got.keys() == want.keys()
    for name, x in want.items():
        atol = 1e-11 if name.endswith("position.weight") else 1e-12
        assert_close(got[name], x, atol=atol, rtol=1e-12, msg=f"{of} {name}")
