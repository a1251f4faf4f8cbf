"""What a training on many processes sends and how long its steps take: a model, and its constants.

    torchrun --nproc-per-node 4 -m vqlm.scaling measure             constants here, model and clock
    python -m vqlm.scaling predict --ranks 1,8,64,1024 n_layer=24   the model, for other machines

Bytes are exact, counted as ``sequence_parallel.Cut.sent`` counts them.  Seconds are an estimate:

    a step = operations / speed + messages * latency + bytes / bandwidth ,

with the operations, messages and bytes of the process that has most, computing and sending one
after the other.  OVQ layers wait for the part before: N of them in P parts take the time of
N + P - 1.  Axes: P parts, D rows of parts, B rows of the batch; else as in ``vq`` and ``ovq``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vqlm import timing
from vqlm.config import LMConfig, override
from vqlm.flops import model_flops
from vqlm.model import LM
from vqlm.sequence_parallel import Cut
from vqlm.settings import only_settings

MODEL = LMConfig(n_layer=4, d_model=256, n_head=4, n_code=256, window=64, block=64)
"""What ``measure`` trains, if it is told nothing else."""

LENGTH_BYTES = 8
"""Of an integer: the length of a document."""


@dataclass(frozen=True)
class Machine:
    """Constants of one process and its connection.  The defaults are round numbers for a GPU of
    2024 on a network of 200 Gbit/s, not measured by us; ``measure`` finds those of a machine."""

    speed: float = 2e14
    """Floating-point operations a second, as a training step gets them."""
    latency: float = 2e-5
    """Seconds that a message of no length takes."""
    bandwidth: float = 2.5e10
    """Bytes a second that a process sends."""
    width: int = 4
    """Bytes of a number in states and gradients."""


class Sent(NamedTuple):
    """What is sent in one training step."""

    total: int
    """Bytes, over all parts of a sequence."""
    most: int
    """Bytes of the process that sends most, at the most."""
    messages: int
    """One after another, that a process has to wait for."""


def _scan_rounds(parts: int) -> list[int]:
    """How far each round of ``Cut.scan`` sends."""
    steps, step = [1], 1
    while step < parts - 1:
        steps.append(step)
        step *= 2
    return steps


def _layer(config: LMConfig, index: int, rows: int, parts: int, width: int) -> list[Sent]:
    """What one layer sends in both passes."""
    kind, groups = config.mixer_of(index), rows * config.kv_heads
    k, v, found = config.d_k, config.d_v, []
    for n_token in (config.conv_width - 1, int(config.shifts_keys(index))):
        if past := rows * n_token * config.d_model * width:
            found.append(Sent(2 * (parts - 1) * past, 2 * past, 2))
    if kind == "ovq":
        floats = groups * (config.n_entry * (k + v + 1) + config.chunk * (k + v)) * width
        both = 2 * floats + 2 * rows * LENGTH_BYTES
        found.append(Sent((parts - 1) * both, both, 2))
        return found
    passes = 1 if kind == "vq" and not config.cache_grad else 2
    newest = groups * config.window * (k + v + (kind == "vq")) * width
    calls = 1 if kind == "vq" else 2  # keys and values apart
    found.append(Sent(passes * (parts - 1) * newest, passes * newest, passes * calls))
    if kind == "vq" and config.cache:
        sums = (groups * config.n_code * (v + 1) + rows) * width
        steps = _scan_rounds(parts)
        total = sum(parts - step for step in steps) * sums
        found.append(Sent(passes * total, passes * len(steps) * sums, passes * 2 * len(steps)))
    return found


@functools.cache
def _shapes(config: LMConfig) -> LM:
    """A model without numbers."""
    with torch.device("meta"):
        return LM(config)


def cut_traffic(config: LMConfig, rows: int, parts: int, width: int = 4) -> Sent:
    """What cutting sequences in ``parts`` sends in a step on ``rows`` rows; no length is in it."""
    if parts == 1:
        return Sent(0, 0, 0)
    found = [x for i in range(config.n_layer) for x in _layer(config, i, rows, parts, width)]
    steps = _scan_rounds(parts)
    lengths = 2 * rows * LENGTH_BYTES
    found.append(
        Sent(sum(parts - s for s in steps) * lengths, len(steps) * lengths, 2 * len(steps))
    )
    with torch.device("meta"):
        state = _shapes(config).init_state(rows)
    n_float = sum(x.numel() for x in state.tensors() if x.is_floating_point())
    n_int = sum(x.numel() for x in state.tensors() if not x.is_floating_point())
    last = n_float * width + n_int * LENGTH_BYTES
    found.append(Sent(last, last, len(state.tensors())))
    return Sent(*(sum(x) for x in zip(*found, strict=True)))


def shared_bytes(config: LMConfig, processes: int, width: int = 4, sharded: bool = False) -> int:
    """Bytes that each process sends in a step for gradients, codebook statistics, and parameters
    if these are sharded, when rings of ``processes`` add them up and spread them."""
    model = _shapes(config)
    n_parameter = sum(p.numel() for p in model.parameters())
    books = [b for b in model.codebooks() if b is not None]
    n_stat = sum(b.key_sum.numel() + b.key_count.numel() + 2 * config.kv_heads for b in books)
    # A ring sends all but its own share twice; sharded: gathers for either pass, then adds up.
    times = 3 if sharded else 2
    return (times * n_parameter + 2 * n_stat + 2) * width * (processes - 1) // processes


def step_seconds(
    config: LMConfig, seq_len: int, batch_size: int, parts: int, data: int, machine: Machine
) -> dict[str, float]:
    """Seconds of a step on ``parts`` times ``data`` processes: "compute", "cut", "shared", "step".

    Raises:
        ValueError: rows or tokens that don't divide.
    """
    if min(data, parts) < 1 or batch_size % data or seq_len % parts:
        raise ValueError(
            f"scaling: {batch_size} rows on {data} processes, {seq_len} tokens in {parts} parts; "
            "both must divide"
        )
    rows, processes = batch_size // data, parts * data
    compute = 3 * rows * model_flops(config, seq_len) / parts / machine.speed
    n_ovq = sum(config.mixer_of(i) == "ovq" for i in range(config.n_layer))
    share = n_ovq / config.n_layer
    if n_ovq:
        compute *= 1 - share + share * (config.n_layer + parts - 1) / config.n_layer
    sent = cut_traffic(config, rows, parts, machine.width)
    cut = sent.messages * machine.latency + sent.most / machine.bandwidth
    shared = shared_bytes(config, processes, machine.width) / machine.bandwidth
    shared += 4 * (processes - 1).bit_length() * machine.latency
    return {"compute": compute, "cut": cut, "shared": shared, "step": compute + cut + shared}


def measure(config: LMConfig, seq_len: int, repeats: int = 3) -> dict[str, Any]:
    """Constants of this machine, and steps of one sequence cut over all processes, by the model
    and by the clock; for all processes to call together."""
    group = dist.group.WORLD
    assert group is not None
    cut, config = Cut(group), dataclasses.replace(config)
    torch.manual_seed(0)
    model, length = LM(config), seq_len // cut.count
    tokens = torch.randint(3, config.vocab_size, (1, length + 1))

    def step() -> None:
        out = model(tokens[:, :-1], targets=tokens[:, 1:])
        out.objective(0.0, length).loss.backward()

    tiny, large = torch.zeros(1), torch.zeros(1 << 20)
    latency = _seconds(lambda: cut.exchange(tiny, 1), 50)
    bandwidth = 4 * large.numel() / _seconds(lambda: cut.exchange(large, 1), repeats)
    alone = _seconds(step, repeats)
    speed = 3 * model.flops(length) / alone
    machine = Machine(speed, latency, bandwidth)
    model.cut, before = cut, cut.sent
    step()
    sent = torch.tensor([cut.sent - before])
    dist.all_reduce(sent)
    wanted = cut_traffic(config, 1, cut.count)
    predicted = alone + wanted.messages * latency + wanted.most / bandwidth
    return {
        "processes": cut.count,
        "seq_len": seq_len,
        **dataclasses.asdict(machine),
        "bytes": [wanted.total, int(sent)],
        "seconds": [round(predicted, 5), round(_seconds(step, repeats), 5)],
        "seconds_alone": round(alone, 5),
    }


def _seconds(action: Any, repeats: int) -> float:
    """Median time of ``action``, which all processes begin together; the longest of any."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        action()
        taken = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(taken.item())
    return sorted(times[1:])[repeats // 2]


def table(config: LMConfig, tokens: int, ranks: list[int], machine: Machine) -> str:
    """Markdown: one sequence of ``tokens`` cut over ever more processes."""
    lines = ["| processes | MB sent by one | compute, s | sent, s | efficiency |"]
    lines.append("| --- | --- | --- | --- | --- |")
    alone = step_seconds(config, tokens, 1, 1, 1, machine)["step"]
    for parts in ranks:
        found = step_seconds(config, tokens, 1, parts, 1, machine)
        sent = cut_traffic(config, 1, parts, machine.width).most
        sent += shared_bytes(config, parts, machine.width)
        share = alone / (parts * found["step"])
        rest = found["cut"] + found["shared"]
        lines.append(
            f"| {parts:,} | {sent / 1e6:,.1f} | {found['compute']:.4g} | {rest:.3g} | {share:.0%} |"
        )
    return "\n".join(lines)


_CONSTANTS = {
    "speed": "floating-point operations a second of one process",
    "latency": "seconds that a message of no length takes",
    "bandwidth": "bytes a second that a process sends",
    "width": "bytes of a number in states and gradients",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m vqlm.scaling``; see the top of this file."""
    parser = argparse.ArgumentParser(prog="vqlm.scaling", description="cost of many processes")
    parser.add_argument("action", choices=("measure", "predict"))
    parser.add_argument("what", nargs="*", metavar="key=value", help="settings of the model")
    parser.add_argument(
        "--tokens", type=int, metavar="N",
        help="of the sequence (default: measure 4096, predict 1048576)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=timing.numbers, default="1,2,4,8,16,64,256,1024", metavar="N,N,...",
        help="predict: numbers of processes (default: %(default)s)",
    )  # fmt: skip
    for field in dataclasses.fields(Machine):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default, metavar="N",
            help=f"predict: {_CONSTANTS[field.name]} (default: {field.default:g})",
        )  # fmt: skip
    args = parser.parse_intermixed_args(arguments)  # words may stand anywhere
    try:
        config = override(MODEL, only_settings(args.what))
        if args.action == "predict":
            machine = Machine(args.speed, args.latency, args.bandwidth, args.width)
            print(table(config, args.tokens or 1 << 20, args.ranks, machine))
            return
    except ValueError as error:
        parser.error(str(error))
    dist.init_process_group("gloo")
    found = measure(config, args.tokens or 4096)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
