"""Installs vqlm in clean environments and uses it: ``python tests/clean_install.py PYTHON ...``.

For each Python: a wheel is built and installed without extras, and imported; then with extras, and
a model is trained, evaluated, sampled, reported.  It needs the network, minutes and gigabytes, so
it is a command and no test (``make clean-install PYTHON=python3.12``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = "train,plot,play"
LIBRARY = (
    "import torch, vqlm; lm = vqlm.LM(vqlm.LMConfig(n_layer=1, d_model=16, n_head=2, n_code=8)); "
    "print(vqlm.__version__, lm(torch.randint(3, 259, (1, 9))).logits.shape)"
)
TINY = (
    "n_layer=1 d_model=16 n_head=2 d_k=8 d_v=8 d_ff=24 n_code=8 window=8 block=8 batch_size=2 "
    "seq_len=16 context_len=none eval_bytes=64 warmup_steps=2 steps=3 codebook_start=random"
)
COMMANDS = (
    f"train {TINY} --data book.txt --out run",
    "eval run --json",
    "sample run --tokens 20",
    "report run --tokens 20",
    "play --help",
    "env",
)


def check(python: str, folder: Path) -> None:
    """Raises ``CalledProcessError`` at the first step that fails; the steps print what they do."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*words: str | Path) -> None:
        subprocess.run([str(w) for w in words], cwd=folder, env=environment, check=True)

    call(python, "-m", "venv", "clean")
    inner = folder / "clean/bin/python"
    pip = (inner, "-m", "pip", "--disable-pip-version-check")
    call(*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("vqlm-*.whl")
    pins = ROOT / "constraints.txt"
    call(*pip, "install", "-q", "-c", pins, wheel)
    call(inner, "-c", LIBRARY)
    call(*pip, "install", "-q", "-c", pins, f"{wheel}[{EXTRAS}]")
    (folder / "book.txt").write_text("state linear code vector window means query value. " * 100)
    for command in COMMANDS:
        call(folder / "clean/bin/vqlm", *command.split())


def main(pythons: list[str]) -> int:
    """Checks all of them; 0 if every one did."""
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            check(python, Path(folder))
        print(f"{python}: installed clean, imported, trained, evaluated, sampled, reported")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or [sys.executable]))
