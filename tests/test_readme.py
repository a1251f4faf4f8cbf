"""What README.md says can be done, can be done: its code runs, its commands and links exist."""

import re
import shlex
from pathlib import Path

import pytest

from vqlm import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    """What stands in the fenced blocks of these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", README, re.M | re.S)


def command_lines(first: str) -> list[str]:
    """Lines of the shell blocks that call ``first``, continued lines joined, comments gone."""
    text = "\n".join(blocks("bash", "sh", "console")).replace("\\\n", " ")
    parts = [p.strip() for line in text.splitlines() for p in re.split(r"&&|;|\|", line)]
    commands = [" ".join(shlex.split(p, comments=True)) and p for p in parts]
    return [c for c in commands if c.split()[:1] == [first]]


def local_links() -> list[str]:
    """Targets of links and pictures that are no web addresses, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    return sorted({t.split("#")[0] for t in targets if "://" not in t and t[:1] != "#"})


def test_there_is_something_to_check() -> None:
    assert command_lines("make") and command_lines("vqlm") and blocks("python")


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", command_lines("vqlm"))
def test_commands_are_understood(line: str) -> None:
    """As `main` reads them, up to the point where it would start to work."""
    words = shlex.split(line, comments=True)[1:]
    args, rest = cli._parser().parse_known_args(words)
    assert rest == [] or (hasattr(args, "what") and not any(w[0] == "-" for w in rest))
    if args.command != "train":
        return
    from vqlm import presets
    from vqlm.config import LMConfig, TrainConfig, override_all

    what = args.what + rest
    configs = [presets.get(word) for word in what if "=" not in word] or [presets.get("mini")]
    pairs = dict(word.split("=", 1) for word in what if "=" in word)
    assert len(configs) == 1
    model, train = override_all(pairs, *configs[0])
    assert isinstance(model, LMConfig) and isinstance(train, TrainConfig)


@pytest.mark.parametrize("line", command_lines("make"))
def test_targets_are_in_the_makefile(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [w for w in shlex.split(line, comments=True)[1:] if "=" not in w]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


@pytest.mark.parametrize("target", local_links())
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
