"""What the processes of the tests of many processes do; each program is run by ranks.py."""

import dataclasses
import functools
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from vqlm import checkpoint
from vqlm.data import load_corpus
from vqlm.model import LM
from vqlm.processes import Processes, launch
from vqlm.sequence_parallel import Cut
from vqlm.train import Trainer


def train(told: dict[str, Any]) -> dict[str, Any]:
    """A tiny training in float64: losses, codebooks and weights at its end, a last evaluation.

    ``told``: data and out (folders), model, settings; ``stop_after`` and ``resume`` if wanted;
    ``spoil``, the batch whose loss is not a number in the last process alone.
    """
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    data = load_corpus(Path(told["data"]))
    trainer = tiny.trainer(data, Path(told["out"]), told["model"], **told["settings"])
    if told.get("resume"):
        trainer.resume()
    if "spoil" in told and trainer.processes.rank == trainer.processes.count - 1:
        tiny.spoil(trainer, {told["spoil"]}, math.nan)
    steps = tiny.after_step(
        trainer, told.get("stop_after"), lambda: setattr(trainer, "stop_requested", True)
    )
    trainer.fit()
    return {
        "losses": torch.stack([x.nats for x in steps]) if steps else torch.zeros(0),
        "norms": torch.stack([x.norm for x in steps]) if steps else torch.zeros(0),
        "n_bytes": [x.n_bytes for x in steps],
        "samples": [s.sample for x in steps for s in x.stats if s is not None],
        "model": whole(trainer),
        "evaluation": trainer.newest_look and trainer.newest_look[1].summary(),
        "rank": int(os.environ.get("RANK", "0")),
        "progress": dataclasses.asdict(trainer.progress),
        "cursor": trainer.lanes.state_dict(),
    }


def many(told: dict[str, Any]) -> dict[str, Any]:
    """Several trainings one after another, then what the processes say to each other."""
    results: dict[str, Any] = {name: train(one) for name, one in told["trainings"].items()}
    results["talk"] = talk()
    results["stop"] = stop(told["stop"])
    return results


def talk() -> dict[str, Any]:
    """Outcomes of the main process as the others see them."""
    processes = Processes(launch("float32"), tiny.TRAIN)

    def refuse() -> None:
        raise OSError(28, "no space left", "there")

    told: dict[str, Any] = {"given": processes.on_main(lambda: f"from {processes.rank}")}
    try:
        processes.on_main(refuse)
    except OSError as error:
        told["error"] = str(error)
    told["largest"] = processes.largest([processes.rank, -processes.rank])
    try:
        processes.require_same("the answer", 42 + processes.rank)
    except ValueError as error:
        told["differs"] = str(error)
    return told


def stop(told: dict[str, Any]) -> dict[str, Any]:
    """A signal that reaches the last process alone, after its second step."""
    trainer = tiny.trainer(load_corpus(Path(told["data"])), Path(told["out"]), save_every=100)

    def terminate() -> None:
        if trainer.processes.rank == trainer.processes.count - 1:
            signal.raise_signal(signal.SIGTERM)

    tiny.after_step(trainer, 2, terminate)
    trainer.fit()
    return {"step": trainer.progress.step, "signal": trainer.stop_signal}


def fail(told: dict[str, Any]) -> None:
    """An error in the last process alone, in its second step."""
    trainer = tiny.trainer(load_corpus(Path(told["data"])), Path(told["out"]))

    def break_down() -> None:
        if trainer.processes.rank == trainer.processes.count - 1:
            raise RuntimeError("a cable is out")

    tiny.after_step(trainer, 2, break_down)
    trainer.fit()


def trouble(told: dict[str, Any]) -> dict[str, Any]:
    """Trainings that diverge, then some that save in the background, then compiled ones."""
    results: dict[str, Any] = {name: train(one) for name, one in told["diverge"].items()}
    for name, one in told["save"].items():
        results[name] = save_late(one)
    # Of the whole class, and last: nothing here is to be compiled for a CPU unless asked for.
    LM.compile_parts = functools.partialmethod(LM.compile_parts, told["backend"])  # type: ignore
    results |= {name: train(one) for name, one in told["compile"].items()}
    return results | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def save_late(told: dict[str, Any]) -> dict[str, Any]:
    """``train``, where the first save waits until step ``release`` is done; then, if it is told to
    be ``full``, there is no space left for it."""
    gate, write, first = threading.Event(), checkpoint.save_checkpoint, [True]

    def waits(*args: Any, **kwargs: Any) -> Path:
        was_first, first[0] = first[0], False
        if was_first:
            assert gate.wait(60)
            if told.get("full"):
                raise OSError(28, "no space left")
        return write(*args, **kwargs)

    checkpoint.save_checkpoint, step = waits, Trainer.step

    def stepped(self: Trainer, batch: Any) -> Any:
        done = step(self, batch)
        if self.progress.step == told["release"]:
            gate.set()
        return done

    Trainer.step = stepped  # type: ignore[method-assign]
    try:
        return train(told)
    finally:
        checkpoint.save_checkpoint, Trainer.step = write, step  # type: ignore[method-assign]


def whole_or_part(told: dict[str, Any]) -> dict[str, Any]:
    """Two calls over one stream, the state carried: logits, states, statistics, gradients.

    Cut over all processes if there are several; then gradients and statistics are summed.
    """
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    cut = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        assert dist.group.WORLD is not None
        cut = Cut(dist.group.WORLD)
    torch.manual_seed(0)
    model = LM(dataclasses.replace(tiny.MODEL, **told["model"]))
    with torch.no_grad():  # what starts at 0 would hide what it does
        for name, p in model.named_parameters():
            if name.endswith("bias") or name == "position_scale":
                p.normal_(std=0.3)
    model.cut, model.checkpointing = cut, told.get("checkpointing", False)
    n_row, n_token = 3, told["n_token"]
    tokens = torch.randint(3, 259, (2, n_row, n_token + 1))
    starts = torch.rand(2, n_row, n_token) < told["starts"]
    part = slice(None) if cut is None else parts_of(n_token, cut)
    state, logits, loss = None, [], torch.zeros(())
    for index in range(2):
        inputs, targets = tokens[index, :, :-1], tokens[index, :, 1:]
        out = model(inputs[:, part], state, starts=starts[index][:, part])
        state = out.state.detach()
        logits.append(out.logits.detach())
        nats = F.cross_entropy(out.logits.mT, targets[:, part], reduction="sum")
        loss = loss + (nats + 0.1 * out.commitment()) / inputs.numel()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    stats = [
        x.clone(memory_format=torch.contiguous_format) for s in out.stats() if s for x in s[:4]
    ]
    sent = 0 if cut is None else cut.sent
    for x in [*gradients.values(), *stats] if cut is not None else []:
        dist.all_reduce(x)
    return dict(logits=logits, state=state.tensors(), gradients=gradients, stats=stats, sent=sent)


def parts_of(n_token: int, cut: Cut) -> slice:
    """The tokens of this process."""
    length = n_token // cut.count
    return slice(cut.part * length, (cut.part + 1) * length)


def cuts(told: dict[str, Any]) -> dict[str, Any]:
    """Several of ``whole_or_part``, then trainings."""
    found = {name: whole_or_part(one) for name, one in told["cuts"].items()}
    return found | {name: train(one) for name, one in told["trainings"].items()}


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The model's tensors, put together from their shards."""
    found = trainer.bare_model.state_dict()
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in found.items()}
