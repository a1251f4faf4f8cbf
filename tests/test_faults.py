"""A short part of ``faults/campaign.py``, in a process of its own, since it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_trainings_survive_a_few_of_each_fault() -> None:
    command = [sys.executable, TESTS / "faults/campaign.py", "--kills", "5", "--others", "1"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = json.loads(run.stdout.splitlines()[-1])
    assert counts["kills at any moment"] + counts["kills while saving"] == 5
    assert counts["damaged files noticed"] == counts["ranks killed"] == 1
    assert counts["trainings finished and equal"] >= 4
