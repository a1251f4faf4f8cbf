"""Whether two run folders hold the same, but for times."""

from __future__ import annotations

import json
from pathlib import Path

TIMES = ("events", "metrics.jsonl", "heartbeat.json")
"""What has times in it by its nature."""


def files_of(run: Path) -> dict[str, bytes]:
    """All that a run folder holds, but for times and locks."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.relative_to(run).parts[0] not in TIMES and path.name[0] != "."
    }


def newest_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """The run folder's own files and its last checkpoint."""
    last = max(name.rsplit("/", 1)[0] for name in files if name.startswith("checkpoints/"))
    return {k: v for k, v in files.items() if "/" not in k or k.startswith(f"{last}/")}


def without_best(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same without how good the best model is, which is an earlier one if the disk was full
    when a better one was to be saved, and without the digests of files that tell it."""
    found = dict(files)
    for name, content in files.items():
        if name.endswith("/trainer.json"):
            facts = json.loads(content)
            del facts["progress"]["best_nats"]
            found[name] = json.dumps(facts).encode()
        elif name.endswith("/trainer.safetensors"):
            end = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:end])
            del header["__metadata__"]["files"]
            found[name] = json.dumps(header).encode() + content[end:]
    return found


def compare(got: dict[str, bytes], want: dict[str, bytes]) -> None:
    """Asserts that both have the same files, byte for byte."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    differ = [name for name in want if got[name] != want[name]]
    assert not differ, f"other bytes in {differ}"


def compare_logs(run: Path, reference: Path) -> None:
    """Asserts that every line of the log that is there has the reference's numbers."""

    def lines(folder: Path) -> dict[tuple[int, bool], dict[str, float]]:
        found = {}
        for text in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut short by a kill or a full disk
                continue
            kept = {k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k}
            found[line["step"], "validation/bits_per_byte" in line] = kept
        return found

    want = lines(reference)
    for key, line in lines(run).items():
        assert line == want[key], f"step {key[0]} was logged as {line}, not {want[key]}"
