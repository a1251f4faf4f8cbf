"""Tasks of lm-evaluation-harness, through its own adapter for models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from vqlm import hf

MAX_LENGTH = 65_536
"""Tokens of one request: what fits into memory at once, not what the model can remember."""


class VqlmHarness(HFLM):  # type: ignore[misc]
    """The adapter, with one correction: the start symbol is not a token to be predicted.

    For whole texts (perplexity tasks) the harness itself puts a start symbol before the tokens, so
    that the tokenizer's own would be the second one and count as text.
    """

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each request's text in nats."""
        adapter: Any = self
        before, adapter.add_bos_token = adapter.add_bos_token, False
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm))
        finally:
            adapter.add_bos_token = before


def evaluate_tasks(
    folder: Path,
    tasks: list[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    max_length: int = MAX_LENGTH,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task for the model in ``folder``, a run folder or an exported one.

    Args:
        include: a folder of task files of your own; they need no network.
        limit: examples of each task; None: all.
        num_fewshot: examples shown before each question; None: what the task says.

    Raises:
        ValueError: a task that is not there, or a model of pictures.
    """
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"no task {unknown[0]!r}; lm-eval ls tasks lists the harness's own, --include names a "
            "folder of yours"
        )
    model, tokenizer = hf.load(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} makes pictures; the harness's tasks are of text")
    adapter = VqlmHarness(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        max_length=max_length,
    )  # fmt: skip
    found = simple_evaluate(
        model=adapter, tasks=tasks, limit=limit, num_fewshot=num_fewshot, task_manager=manager,
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    assert found is not None
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metric name to number: "acc,none" is the accuracy without a filter."""
    numbers = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if filtered and not metric.endswith("_stderr"):
            numbers[metric if filtered == "none" else name] = value
    return numbers
