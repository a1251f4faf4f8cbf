"""Installs vqlm in clean environments and uses it: ``python tests/clean_install.py PYTHON ...``.

For each Python: a source package is built, and a wheel from it.  That is installed without extras,
and imported; then with extras, and a model is trained, evaluated, sampled, reported, exported.  It
needs the network, minutes and gigabytes, so it is a command and no test
(``make clean-install PYTHON=python3.12``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = "train,plot,play,hf"
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
    "state make book.txt --model run",
    "sample run --state book.state --tokens 20",
    "report run --tokens 20",
    "export run exported",
    "play --help",
    "env",
)


def check(python: str, folder: Path) -> None:
    """Raises ``CalledProcessError`` at the first step that fails; the steps print what they do."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*words: str | Path) -> None:
        subprocess.run([str(w) for w in words], cwd=folder, env=environment, check=True)

    def installed(name: str, *packages: str | Path) -> Path:
        """The Python of an environment of that name with these packages."""
        inner = folder / name / "bin/python"
        if not inner.exists():
            call(python, "-m", "venv", name)
        call(inner, "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages)
        return inner

    pins = ("-c", ROOT / "constraints.txt")
    call(installed("builder", "build", *pins), "-m", "build", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("vqlm-*.whl")
    inner = installed("clean", wheel, *pins)
    call(inner, "-c", LIBRARY)
    installed("clean", f"{wheel}[{EXTRAS}]", *pins)
    (folder / "book.txt").write_text("state linear code vector window means query value. " * 100)
    for command in COMMANDS:
        call(inner.with_name("vqlm"), *command.split())


def main(pythons: list[str]) -> int:
    """Checks all of them; 0 if every one did."""
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            check(python, Path(folder))
        print(
            f"{python}: installed clean, imported, trained, evaluated, sampled, reported, exported"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or [sys.executable]))
