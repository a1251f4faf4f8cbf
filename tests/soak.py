"""Long runs, watched: does memory stay flat, and the number of files and threads the same?

    python tests/soak.py train --minutes 120 --run RUN
    python tests/soak.py generate --tokens 100000
    python tests/soak.py play --minutes 10 --clients 32

Prints a line now and then, and at last one JSON object with the verdict; exit code 1: not flat.
Linux only, as it reads /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ALLOWED = 0.02
"""How far apart the least and the most memory may be, once warm."""

WARM_UP = 0.1
"""The share of a run that is left out: the first of everything is allocated there."""


STREAM_TOKENS = 100
"""Tokens of a playground's stream."""


class Reading(NamedTuple):
    """What a process holds at a moment."""

    seconds: float
    own: int
    """Its own memory in bytes, swapped out or not.  What is resident has pages of files too, which
    the system takes back when others need memory, and gives again."""
    files: int
    threads: int


def read(seconds: float, pid: int | str = "self") -> Reading:
    """What a process holds now."""
    folder = Path("/proc") / str(pid)
    fields = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    files = len(os.listdir(folder / "fd")) - (pid == "self")  # not the listing's own
    own = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024
    return Reading(seconds, own, files, int(fields["Threads"]))


def verdict(readings: list[Reading]) -> dict[str, Any]:
    """Whether what was read after the warm-up is flat, and the figures.

    Raises:
        ValueError: too few readings to tell.
    """
    end = readings[-1].seconds if readings else 0.0
    warm = [x for x in readings if x.seconds >= WARM_UP * end]
    if len(warm) < 10:
        raise ValueError(f"{len(warm)} readings after the warm-up, but 10 are wanted; run longer")
    own = [x.own for x in warm]
    quarter = max(1, len(own) // 4)
    early, late = statistics.median(own[:quarter]), statistics.median(own[-quarter:])
    spread = max(own) / min(own) - 1
    files, threads = sorted({x.files for x in warm}), sorted({x.threads for x in warm})
    return {
        "flat": spread <= ALLOWED and len(files) == len(threads) == 1,
        "minutes": round(end / 60, 1),
        "readings": len(warm),
        "megabytes": [round(min(own) / 2**20, 1), round(max(own) / 2**20, 1)],
        "spread": round(spread, 4),
        "growth": round(late / early - 1, 4),
        "files": files,
        "threads": threads,
    }


class Watch:
    """Takes readings, ``every`` so many seconds, wherever it is called."""

    def __init__(self, every: float, pid: int | str = "self") -> None:
        self.every, self.pid, self.began = every, pid, time.monotonic()
        self.readings: list[Reading] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def __call__(self, note: Callable[[], str] = str) -> None:
        seconds = self.seconds
        if self.readings and seconds < self.readings[-1].seconds + self.every:
            return
        self.readings.append(read(seconds, self.pid))
        if len(self.readings) % 10 == 1:
            print(json.dumps({**self.readings[-1]._asdict(), "note": note()}), flush=True)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """A small training that logs, looks at the validation split and saves all the time."""
    from vqlm import presets
    from vqlm.data import load_corpus
    from vqlm.train import Trainer

    model, config = presets.get("mini")
    model = dataclasses.replace(model, n_layer=2, d_model=128, n_code=64, d_ff=256)
    config = dataclasses.replace(
        config, steps=10**9, batch_size=4, seq_len=256, context_len=2048, log_every=10,
        eval_every=50, save_every=25, eval_bytes=16_384, background_saves=True,
        on_divergence="roll_back",
    )  # fmt: skip
    corpus = load_corpus(args.data)
    trainer = Trainer(model, config, corpus, None, args.run)
    watch, step = Watch(args.every), trainer.step

    def watched(batch: Any) -> Any:
        sums = step(batch)
        watch(lambda: f"step {trainer.progress.step}")
        trainer.stop_requested = watch.seconds > 60 * args.minutes
        return sums

    trainer.step = watched  # type: ignore[method-assign]
    trainer.fit()
    return {"steps": trainer.progress.step, **verdict(watch.readings)}


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """One text of many tokens, its end symbol ignored."""
    import torch

    from vqlm import presets
    from vqlm.checkpoint import load_model
    from vqlm.model import LM

    torch.manual_seed(0)
    config = dataclasses.replace(presets.get("mini")[0], n_layer=2, d_model=128, d_ff=256)
    model = load_model(args.run) if args.run else LM(config).eval()
    watch = Watch(args.every)
    generator = torch.Generator().manual_seed(0)
    stream = model.stream(torch.tensor([[0]]), args.tokens, generator=generator)
    made = 0
    for made, _ in enumerate(stream, 1):
        watch(lambda: f"{made} tokens")  # noqa: B023  (called at once)
    return {"tokens": made, **verdict(watch.readings)}


class Client(threading.Thread):
    """Opens text after text over one connection, and compares each stream with what is due."""

    def __init__(self, port: int, wanted: dict[tuple[str, int], str], end: float) -> None:
        super().__init__()
        self.line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.wanted, self.end = wanted, end
        self.streams, self.tokens, self.wrong = 0, 0, list[str]()

    def run(self) -> None:
        while time.monotonic() < self.end:
            for (prompt, seed), text in self.wanted.items():
                if time.monotonic() >= self.end:
                    break
                try:
                    self.stream(prompt, seed, text)
                except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                    self.wrong.append(f"lost: {error!r}")
                    self.line.close()
        self.line.close()

    def ask(self, method: str, path: str, body: bytes = b"") -> http.client.HTTPResponse:
        self.line.request(method, path, body)
        answer = self.line.getresponse()
        if answer.status >= 300:
            raise ValueError(f"{method} {path}: {answer.status} {answer.read()!r}")
        return answer

    def stream(self, prompt: str, seed: int, wanted: str) -> None:
        text = "/api/texts/" + json.loads(self.ask("POST", "/api/texts").read())["text"]
        self.ask("POST", text + "/read", prompt.encode()).read()
        wish = json.dumps({"n_token": STREAM_TOKENS, "seed": seed}).encode()
        events = [
            json.loads(line.removeprefix(b"data: "))
            for line in self.ask("POST", text + "/write", wish)
            if line.startswith(b"data: ")
        ]
        got = "".join(event.get("delta", "") for event in events)
        if got != wanted or events[-1]["written"] != STREAM_TOKENS:
            self.wrong.append(f"mixed: {prompt!r}, seed {seed}: {got[:80]!r}, not {wanted[:80]!r}")
        self.ask("DELETE", text).read()
        self.streams += 1
        self.tokens += STREAM_TOKENS


def expected(model: Any, prompt: str, seed: int) -> str:
    """What one user alone would be written."""
    from vqlm.sessions import Session, Wish

    session = Session(model)
    for _ in session.read(session.tokens_of(prompt.encode())):
        pass
    return "".join(piece.text for piece in session.write(Wish(STREAM_TOKENS, seed=seed)))


def play(args: argparse.Namespace) -> dict[str, Any]:
    """The playground, in a process of its own, and many clients that stream at the same time."""
    import torch

    from vqlm import checkpoint, presets
    from vqlm.model import LM

    with tempfile.TemporaryDirectory() as place:
        folder = args.run or Path(place)
        if args.run is None:
            torch.manual_seed(0)
            config = dataclasses.replace(presets.get("mini")[0], n_layer=1, d_model=64, d_ff=64)
            checkpoint.save_model(LM(config), folder, checkpoint.Medium())
        model = checkpoint.load_model(folder)
        jobs = [
            {(f"user {i} has text {j}: ", 100 * i + j): "" for j in range(3)}
            for i in range(args.clients)
        ]
        wanted = [{key: expected(model, *key) for key in job} for job in jobs]
        command = [sys.executable, "-m", "vqlm", "play", str(folder), "--port", "0"]
        command += ["--max-streams", str(args.clients + 8)]  # one may end after its client saw it
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(re.search(r":(\d+)/", server.stdout.readline())[1])  # type: ignore[index]
            end = time.monotonic() + 60 * args.minutes
            clients = [Client(port, job, end) for job in wanted]
            for client in clients:
                client.start()
            watch = Watch(args.every, server.pid)
            while any(client.is_alive() for client in clients):
                if time.monotonic() < end:
                    watch(lambda: f"{sum(client.streams for client in clients)} streams")
                time.sleep(0.2)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    wrong = [text for client in clients for text in client.wrong]
    print("\n".join(wrong[:10]))
    found = verdict(watch.readings)
    return {
        "streams": sum(client.streams for client in clients),
        "least_of_a_client": min(client.streams for client in clients),
        "lost": sum(text.startswith("lost") for text in wrong),
        "mixed": sum(text.startswith("mixed") for text in wrong),
        **found,
        "flat": found["flat"] and not wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("train", "generate", "play"))
    parser.add_argument("--minutes", type=float, default=120, help="train, play: how long")
    parser.add_argument("--clients", type=int, default=32, help="play: at the same time")
    parser.add_argument("--tokens", type=int, default=100_000, help="generate: how many")
    parser.add_argument("--run", type=Path, help="run folder: train's to write, others' to read")
    parser.add_argument("--data", type=Path, help="text; default: Python's own library")
    parser.add_argument("--every", type=float, default=5, help="seconds between readings")
    args = parser.parse_args()
    if args.what == "train" and args.run is None:
        parser.error("train wants a new --run folder")
    result = {"train": train, "generate": generate, "play": play}[args.what](args)
    print(json.dumps({"soak": args.what, **result}))
    return 0 if result["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
