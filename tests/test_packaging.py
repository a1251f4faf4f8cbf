"""What is published: a wheel and a source package that hold all that is used, and nothing else."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vqlm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEWEST = (3, 14)
"""Newest Python that is checked statically (Makefile)."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel, built from the source package, and that."""
    pytest.importorskip("build", reason="needs build, of the extra dev")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "vqlm", source / "vqlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), "."]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "is absent from" not in made.stdout + made.stderr  # a folder that is no package
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_the_wheel_has_all_of_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vqlm").rglob("*") if p.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert {n for n in names if ".dist-info/" not in n} == package
    assert {"vqlm/py.typed", "vqlm/web/play.html", "vqlm/web/report.css"} <= package


def test_the_wheel_says_what_it_is(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[0])
    metadata = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA"))
    assert f"Version: {vqlm.__version__}" in metadata and "Requires-Python: >=3.11" in metadata
    assert set(re.findall(r"Provides-Extra: (\w+)", metadata)) == set(
        PROJECT["optional-dependencies"]
    )
    points = next(wheel.read(n).decode() for n in wheel.namelist() if "entry_points" in n)
    assert "vqlm = vqlm.cli:main" in points
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())


def test_the_source_package_has_what_building_needs(built: tuple[Path, Path]) -> None:
    names = {n.partition("/")[2] for n in tarfile.open(built[1]).getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "vqlm/web/style.css"} <= names


def test_the_library_needs_no_extra() -> None:
    """Every name of the root is there while all that only extras bring cannot be imported."""
    from vqlm.cli import EXTRAS

    blocked = sorted({module for modules in EXTRAS.values() for module in modules})
    program = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import torch, vqlm\n"
        "for name in vqlm.__all__: getattr(vqlm, name)\n"
        "lm = vqlm.LM(vqlm.LMConfig(n_layer=1, d_model=16, n_head=2, n_code=8))\n"
        "assert lm(torch.randint(3, 259, (1, 9))).logits.shape == (1, 9, 259)\n"
        "from vqlm import cli\n"
        "sys.exit(cli.main(['report', 'x']))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "vqlm report: error:" in run.stderr


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    pins = (ROOT / "constraints.txt").read_text()
    extras = PROJECT["optional-dependencies"]
    for name in {*PROJECT["dependencies"], *(p for group in extras.values() for p in group)}:
        bare = re.split(r"[\[>=<]", name)[0]
        assert bare == "vqlm" or re.search(rf"^{re.escape(bare)}==", pins, re.M | re.I), bare


def test_every_python_is_checked() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = [f"3.{minor}" for minor in range(12, NEWEST[1] + 1)]
    assert f"for version in {' '.join(wanted)}; do" in makefile
