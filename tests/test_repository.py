"""House rules that hold for every file git tracks, and proof that each rule catches its offender.

What is forbidden is put together from parts, so that this file itself is read like any other.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_BYTES = 1_000_000
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_PARAMETERS = 8

HOSTS = [
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("download", "pytorch", "org"),
    ("registry", "npmjs", "org"),
    ("crates", "io"),
    ("proxy", "golang", "org"),
    ("deb", "debian", "org"),
]
FORBIDDEN_TEXT = {
    "absolute path": r"(?<![\w.})])/(?:work|root|farm)/" + r"|(?<![\w.})])/home/[\w-]+",
    "hidden library": r"\.lib" + r"rary\b",
    "registry host": "|".join(r"\b" + r"\.".join(parts) + r"\b" for parts in HOSTS),
    "talk of how it was made": r"(?i:\bthis ses" + r"sion\b|\bthe c" + r"eo\b|\bissues? #?\d)",
    "unfinished work": r"\b(?:TO" + "DO|FIX" + "ME|X" + r"XX)\b",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def text_offences(text: str) -> Iterator[str]:
    """Lines holding what no file of the project may hold."""
    for number, line in enumerate(text.splitlines(), start=1):
        for what, pattern in FORBIDDEN_TEXT.items():
            if found := re.search(pattern, line):
                yield f"{number}: {what}: {found[0]}"


def python_offences(source: str) -> Iterator[str]:
    """Rules for every Python file."""
    if (lines := source.count("\n")) > MAX_FILE_LINES:
        yield f"{lines} lines; split it, the most is {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        # An `assert` vanishes under `python -O`, so it is no way to say "never reached".
        if isinstance(node, ast.Assert) and getattr(node.test, "value", None) is False:
            yield f"{node.lineno}: assert of a constant False"


def package_offences(source: str) -> Iterator[str]:
    """Rules for the library's own code."""
    tree = ast.parse(source)
    for node in tree.body:
        public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{node.lineno}: {node.name} has no docstring"
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if shapeless(node):
            yield f"{node.lineno}: {node.name} takes or gives a Tensor of a shape that it hides"
        if silent(node):
            yield f"{node.lineno}: {node.name} raises, but its docstring does not say what"
        if lines > MAX_FUNCTION_LINES:
            yield f"{node.lineno}: {node.name} has {lines} lines, the most is {MAX_FUNCTION_LINES}"
        if node.name == "__init__" and parameters(node) > MAX_CONSTRUCTOR_PARAMETERS:
            yield f"{node.lineno}: a constructor with {parameters(node)} parameters"


def shapeless(function: Function) -> bool:
    """Whether a public function has a bare ``Tensor``, and no [shape] in its docstring.

    jaxtyping's Float[Tensor, "B T"] says the shape; Float[Tensor, ""] is a number.
    """
    a = function.args
    annotations = [x.annotation for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    bare = [x and ast.unparse(x) in ("Tensor", "Tensor | None") for x in annotations]
    returned = function.returns and ast.unparse(function.returns)
    doc = ast.get_docstring(function)
    if function.name.startswith("_") or doc is None or "[" in doc:
        return False
    return any(bare) or returned in ("Tensor", "tuple[Tensor, Tensor]")


def silent(function: Function) -> bool:
    """Whether a function with a docstring raises something that this does not speak of."""
    doc = ast.get_docstring(function)
    raising = any(isinstance(x, ast.Raise) and x.exc is not None for x in ast.walk(function))
    public = not function.name.startswith("_")
    return public and raising and doc is not None and "raise" not in doc.lower()


def parameters(function: Function) -> int:
    """How many parameters a method takes besides self."""
    a = function.args
    named = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
    return named + (a.vararg is not None) + (a.kwarg is not None) - 1


def offences(path: Path, name: str) -> list[str]:
    """Everything wrong with the file at `path`, which the repository calls `name`."""
    data = path.read_bytes()
    found = []
    if len(data) > MAX_BYTES:
        found.append(f"{len(data):,} bytes, the most is {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return [f"{name}: {offence}" for offence in found]  # a picture, say: size is all there is
    found += text_offences(text)
    if name.endswith(".py"):
        found += python_offences(text)
        found += package_offences(text) if name.startswith("vqlm/") else []
    return [f"{name}: {offence}" for offence in found]


def tracked_files() -> list[str]:
    """What git tracks and is still there; skips where the project is not a git checkout."""
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if run.returncode or not run.stdout:
        pytest.skip("needs a git checkout")
    return [name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_tracked_file_keeps_the_rules() -> None:
    assert [o for name in tracked_files() for o in offences(ROOT / name, name)] == []


BODY = "    x = 1\n"
DEF = 'def f():\n    """Docs."""\n'
OFFENDERS = {
    "path": ("notes.md", "see " + "/".join(["", "work", "main"])),
    "quoted path": ("a.toml", 'p = "' + "/".join(["", "root", "x"]) + '"'),
    "home": ("notes.md", "in " + "/".join(["", "home", "ada", "x"])),
    "farm": ("notes.md", "/".join(["", "farm", "x"])),
    "library": ("notes.md", "see ." + "library for more"),
    "host": ("Makefile", "https://" + ".".join(HOSTS[0]) + "/simple"),
    "file host": ("Makefile", "https://files." + ".".join(HOSTS[1])),
    "time": ("notes.md", "done in This " + "session"),
    "person": ("notes.md", "asked by the C" + "EO"),
    "tracker with hash": ("notes.md", "as issue" + " #2 says"),
    "tracker": ("notes.md", "see Issue" + " 12"),
    "unfinished": ("vqlm/a.py", "# TO" + "DO: later\n"),
    "broken": ("vqlm/a.py", "# FIX" + "ME\n"),
    "long file": ("tests/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    "large file": ("figure.png", b"\xff" * (MAX_BYTES + 1)),
    "never": ("tests/a.py", "assert " + "False, 'no'\n"),
    "long function": ("vqlm/a.py", DEF + BODY * (MAX_FUNCTION_LINES - 1)),
    "no docstring": ("vqlm/a.py", "def f():\n    pass\n"),
    "raises in silence": ("vqlm/a.py", 'def f():\n    "Words."\n    raise ValueError("no")\n'),
    "hidden shape": ("vqlm/a.py", 'def f(x: Tensor) -> None:\n    "Words."\n'),
    "hidden shape of what is given": ("vqlm/a.py", 'def f() -> Tensor:\n    "Words."\n'),
    "class without docstring": ("vqlm/a.py", "class A:\n    pass\n"),
    "constructor": (
        "vqlm/a.py",
        "class _A:\n    def __init__(self, a, b, c, d, *, e, f, g, h, **i):\n        pass\n",
    ),
}


@pytest.mark.parametrize(("name", "content"), OFFENDERS.values(), ids=list(OFFENDERS))
def test_a_planted_offender_is_caught(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = tmp_path / Path(name).name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert len(offences(path, name)) == 1


CLEAN = {
    # In parts, as the offenders are: it looks like a path of some machine.
    "url": (
        "notes.md",
        "https://example.org" + "/" + "work/1, .." + "/" + "work/x, a" + "/" + "root/b, "
        "sessions, an issue",
    ),
    "longest file": ("tests/a.py", "x = 1\n" * MAX_FILE_LINES),
    "longest function": ("vqlm/a.py", DEF + BODY * (MAX_FUNCTION_LINES - 2)),
    "private": ("vqlm/a.py", "def _f():\n    pass\n"),
    "raises and says so": (
        "vqlm/a.py",
        'def f():\n    "Words.  Raises ValueError."\n    raise ValueError("no")\n',
    ),
    "shapes in the docstring": ("vqlm/a.py", 'def f(x: Tensor) -> None:\n    "Of x [B, T]."\n'),
    "shapes in the annotation": (
        "vqlm/a.py",
        "def f(x: Float[Tensor, 'B']) -> Float[Tensor, '']:\n    'Words.'\n",
    ),
    "outside the package": ("tests/a.py", "def f():\n    pass\n"),
    "constructor": (
        "vqlm/a.py",
        "class _A:\n    def __init__(self, a, b, c, d, *, e, f, g, h):\n        pass\n",
    ),
    "picture": ("figure.png", b"\xff" * 10),
}


@pytest.mark.parametrize(("name", "content"), CLEAN.values(), ids=list(CLEAN))
def test_what_keeps_the_rules_passes(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = tmp_path / Path(name).name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert offences(path, name) == []
