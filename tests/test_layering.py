"""Imports point only downward, and what is heavy is imported where it is used and nowhere else."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vqlm"

# From the bottom up: a module imports ours from lower rows only. `__init__` is the public face
# of what lies below it, so training is not part of what `import vqlm` loads.
ROWS = [
    {"kept", "untrusted", "fused", "durable"},
    {"reference", "config", "codebook", "vocabulary", "compressors", "sampling"},
    {"sequence_parallel"},
    {"segments"},
    {"figures", "settings", "precision", "sealed", "timing", "loss"},
    {"layers", "data", "vq_schedule", "chunks", "dictionary", "bench_limit", "bench_plot"},
    {"flops", "vq_call"},
    {"vq_kernel", "ovq_kernel", "vq_step"},
    {"vq", "softmax", "ovq", "recurrent", "prepared"},
    {"vq_parallel", "patch_attention"},
    {"outputs"},
    {"stretches"},
    {"model", "pictures", "download", "recall"},
    {"prefix", "sizes"},
    {"evaluate", "sample", "checkpoint", "prepare", "convert", "optimizers", "official_files"},
    {"probe", "sessions"},
    {"runlog", "guard", "saver", "runs", "card", "hf_cache", "hf_tokenizer", "fidelity"},
    {"charts", "attention_layers", "watch", "resume"},
    {"patching"},
    {"patched_files"},
    {"__init__"},
    {"processes", "scaling"},
    {"train", "environment", "play", "report", "hf", "adapt", "bench_attention", "bench_peers"},
    {"presets", "bench_model"},
    {"bench_official", "bench_decode"},
    {"bench"},
    {"demo", "throughput", "harness", "patch_study"},
    {"ablate"},
    {"recall_table"},
    {"contest", "recall_study"},
    {"commands_hf"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
ROW = {module: row for row, modules in enumerate(ROWS) for module in modules}
# Narrower than the rows: `layers` needs only these, and an oracle that the code it judges could
# import would judge nothing.
ONLY_FROM = {"layers": {"config", "segments", "kept", "fused"}, "data": {"vocabulary"}}
ONLY_INTO = {
    "reference": {"bench_attention"},
    "accelerate": {"processes"},
    "matplotlib": {"bench_plot", "ablate", "figures"},
    "jinja2": {"report"},
    "starlette": {"play"},
    "uvicorn": {"play"},
    "yaml": {"settings"},
    "lm_eval": {"harness"},
    "transformers": {
        "attention_layers",
        "hf",
        "hf_cache",
        "hf_tokenizer",
        "patching",
        "patched_files",
        "patch_study",
        "bench_peers",
        "bench_decode",
        "recurrent",
    },
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted name of everything imported; `from vqlm import x` and `from . import x` name x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["vqlm" if node.level else "", node.module]))
            whole = base != "vqlm"
            yield from ([base] if whole else [f"vqlm.{alias.name}" for alias in node.names])


def offences(module: str, source: str) -> list[str]:
    """What `module` imports against the rules above."""
    if module not in ROW:
        return [f"{module} has no row: place it in tests/test_layering.py"]
    tree = ast.parse(source)
    found = []
    for name in imports(tree):
        top, _, rest = name.partition(".")
        ours = top == "vqlm"
        # A public name, such as `from vqlm import LM`, is the package itself.
        target = (rest.split(".")[0] if rest.split(".")[0] in ROW else "__init__") if ours else top
        below = {m for m in ROW if ROW[m] < ROW[module]}
        if ours and target not in ONLY_FROM.get(module, below):
            found.append(f"{module} imports {target}, which is not below it")
        if module not in ONLY_INTO.get(target, {module}):
            found.append(f"{module} imports {target}, which only {ONLY_INTO[target]} may")
    at_import = {name.split(".")[0] for node in top_level(tree) for name in imports(node)}
    return found + [f"{module} imports matplotlib at import time"] * ("matplotlib" in at_import)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The import statements that run when the module is imported, also inside `if` and `try`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_downward(path: Path) -> None:
    assert offences(path.stem, path.read_text(encoding="utf-8")) == []


def test_the_package_is_flat() -> None:
    assert [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("brand_new", ""),
        ("vq", "from vqlm.model import LM"),
        ("vq", "from .softmax import full"),
        ("softmax", "import vqlm.vq as v"),
        ("codebook", "from vqlm import config"),
        ("layers", "from vqlm.data import Batch"),
        ("model", "from vqlm import LM"),
        ("model", "def f():\n    from . import train"),
        ("vq", "from vqlm.reference import vq_attention"),
        ("evaluate", "import accelerate"),
        ("cli", "def f():\n    from accelerate.utils import set_seed"),
        ("train", "def f():\n    import matplotlib.pyplot as plt"),
        ("bench_plot", "try:\n    import matplotlib\nexcept ImportError:\n    pass"),
    ],
)
def test_a_planted_offence_is_caught(module: str, source: str) -> None:
    assert len(offences(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layers", "from vqlm.config import LMConfig\nfrom . import segments"),
        ("bench_attention", "from vqlm import reference"),
        ("bench_plot", "def f():\n    import matplotlib.pyplot"),
        ("processes", "import accelerate\nfrom vqlm.model import LM"),
        ("cli", "from vqlm import __version__, demo"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert offences(module, source) == []


def test_importing_the_package_and_the_command_line_stays_light() -> None:
    heavy = ["transformers", "accelerate", "matplotlib", "tensorboard", "starlette", "yaml"]
    program = (
        "import json, sys, vqlm, vqlm.cli\n"
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []
