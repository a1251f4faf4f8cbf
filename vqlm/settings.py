"""Settings: words of a command line, or a flat YAML file of the same, which is never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vqlm.config import LMConfig, TrainConfig, override_all, require_known, setting_pairs
from vqlm.untrusted import read_bytes

MOST_BYTES = 1 << 20
"""Bytes of a file of settings."""

ARGUMENTS = ("preset", "data", "out")
"""Keys of a file that are no settings, but what else a training is asked with."""


class Settings(NamedTuple):
    """What a settings file says."""

    arguments: dict[str, str]
    """Those of ``ARGUMENTS`` that it gives."""
    pairs: dict[str, str]
    """Settings as ``override`` takes them, by name."""


def only_settings(words: Iterable[str]) -> dict[str, str]:
    """``setting_pairs`` of a command that takes no other words.

    Raises:
        ValueError: a word without "=".
    """
    words = list(words)
    if stray := [word for word in words if "=" not in word]:
        raise ValueError(f"got {stray[0]!r}; settings are written as key=value")
    return setting_pairs(words)


def read_settings(path: Path) -> Settings:
    """Reads ``{preset: mini, data: book.txt, n_layer: 6, mixers: [window, vq]}`` and the like.

    A preset, data or out that is empty, as in ``out:``, is not given.

    Raises:
        OSError: a file that cannot be read.
        ValueError: no YAML, nested values, an unknown name (with the nearest valid one) or a value
            of another type.
    """
    import yaml

    try:
        found = yaml.safe_load(read_bytes(path, MOST_BYTES).decode("utf-8"))
    # YAML's own constructors raise ValueError for a date that is none, and others.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} is no YAML file of settings: {problem}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted lines such as 'steps: 200', got {type(found).__name__}")
    arguments: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for name, value in found.items():
        if name in ARGUMENTS and value is None:
            continue
        kind = arguments if name in ARGUMENTS else pairs
        kind[str(name)] = _as_text(path, str(name), value)
    names = [*ARGUMENTS, *LMConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__]
    try:
        for name in pairs:
            require_known("setting", name, names)
        override_all(pairs, LMConfig(), TrainConfig())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Settings(arguments, pairs)


def as_yaml(preset: str, *configs: Any) -> str:
    """Every setting of dataclasses ``configs`` that ``preset`` began as, each below what it means;
    ``read_settings`` reads it."""
    import yaml

    parts = [
        f"# For vqlm train --config FILE; null is what the comments call None.\npreset: {preset}\n"
    ]
    for config in configs:
        told = _told(type(config))
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            value = list(value) if isinstance(value, tuple) else value
            comment = textwrap.indent(told.get(field.name, ""), "# ", lambda line: True)
            written = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
            # Unless it is said, it is the text's.
            off = "# " if field.name == "vocab_size" and value == field.default else ""
            parts.append(f"\n{comment}\n{off}{field.name}: {written}\n")
    return "".join(parts)


def _told(config: type) -> dict[str, str]:
    """The docstring below each field, by its name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    told = {}
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
            told[field.target.id] = inspect.cleandoc(str(text.value.value))
    return told


def _as_text(path: Path, name: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, int | float | str):
        return str(value)
    raise ValueError(
        f"{path}: {name} is a {type(value).__name__}, wanted one value or a list of names"
    )
