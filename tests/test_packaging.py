"""What a user installs: the wheel's contents and metadata, and nnU-Net finding the trainers in it from any folder."""

from __future__ import annotations

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nnunet_ssl

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "nnunet_ssl", "trainers", "tests")

OTHER_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class SomeoneElsesTrainer(nnUNetTrainer):
    pass
"""


def _run(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built in a copy: setuptools packs whatever an earlier build left in ``build/``."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    # With the environment's setuptools, since an isolated build would have to download it.
    options = ("--no-deps", "--no-build-isolation", "--quiet")
    _run("-m", "pip", "wheel", ".", *options, "-w", str(folder / "dist"), cwd=copy)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the wheel installed in it, and nothing of the checkout."""
    target = tmp_path_factory.mktemp("installed")
    _run("-m", "pip", "install", str(wheel), "--no-deps", "--quiet", "--target", str(target), cwd=target)
    return target


def test_the_wheel_holds_the_package_and_the_trainers_and_nothing_else(wheel: Path) -> None:
    packaged = {f"nnunet_ssl/{path.relative_to(PROJECT / 'nnunet_ssl').as_posix()}"
                for path in (PROJECT / "nnunet_ssl").rglob("*.py")}  # fmt: skip
    trainers = {f"nnunet_ssl/trainers/{path.name}" for path in (PROJECT / "trainers").glob("*.py")}
    assert "nnunet_ssl/trainers/CrossMatchTrainer.py" in trainers
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == packaged | trainers | {"nnunet_ssl/py.typed", "nnunet_ssl/costs.json", "nnunet_ssl/gains.json"}


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        fields = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert fields["Name"] == "nnunet-ssl"
    assert fields["Version"] == nnunet_ssl.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.10"
    run_time = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("nnunetv2>=2.8.1") for line in run_time)
    assert not any(line.startswith(("pytest", "ruff", "mypy")) for line in run_time)
    assert "nnunet-ssl = nnunet_ssl.cli.main:main" in entry_points


def test_every_library_that_is_imported_is_declared_and_no_other(wheel: Path) -> None:
    imported = set()
    for path in (PROJECT / "nnunet_ssl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    imported -= {*sys.stdlib_module_names, "nnunet_ssl"}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        fields = email.message_from_bytes(archive.read(name))
    tools = ('extra == "docs"', 'extra == "test"')
    needed = [line for line in fields.get_all("Requires-Dist", []) if not line.endswith(tools)]
    declared = {line.split(">")[0] for line in needed}
    named_otherwise = {"cc3d": "connected-components-3d"}
    assert {named_otherwise.get(name, name.replace("_", "-")) for name in imported} == declared


def test_the_same_versions_of_python_everywhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    versions = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", metadata, re.MULTILINE)
    assert f"Requires-Python: >={versions[0]}\n" in metadata
    workflow = (PROJECT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert f"python: [{', '.join(map(json.dumps, versions))}]" in workflow
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {versions[0]} to {versions[-1]}" in (PROJECT / page).read_text(encoding="utf-8")


def test_the_citation_file_has_this_version_and_every_paper() -> None:
    citation = (PROJECT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {nnunet_ssl.__version__}\n" in citation
    references = {name: reference for reference in citation.split("\n  - type: ")[1:]
                  for name in re.findall(r"^    notes: (\w+Trainer)$", reference, re.MULTILINE)}  # fmt: skip
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    linked = dict(re.findall(r"^\| `(\w+Trainer)` \| \[[^]]+\]\(([^)]+)\)", readme, re.MULTILINE))
    assert references.keys() == linked.keys() == {path.stem for path in (PROJECT / "trainers").glob("*.py")}
    for name, link in linked.items():
        assert link.removeprefix("https://doi.org/") in references[name]
    assert "doi: 10.1038/s41592-020-01008-z" in citation, "nnU-Net's"


def test_the_installed_command_prints_the_installed_folder(installed: Path, tmp_path: Path) -> None:
    out = _run("-m", "nnunet_ssl.cli.main", "trainers", cwd=tmp_path, PYTHONPATH=str(installed))
    assert out == f"{(installed / 'nnunet_ssl' / 'trainers').resolve()}\n"


@pytest.mark.parametrize("ours_first", [True, False])
def test_nnunet_finds_the_trainers_beside_another_folder(installed: Path, tmp_path: Path, ours_first: bool) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "SomeoneElsesTrainer.py").write_text(OTHER_TRAINER)
    ours = installed / "nnunet_ssl" / "trainers"
    folders = [str(ours), str(other)] if ours_first else [str(other), str(ours)]
    names = ["CrossMatchTrainer", "CrossMatchTrainer_5epochs", "SomeoneElsesTrainer"]
    code = f"""
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
import nnunet_ssl
print("package:", nnunet_ssl.__file__)
for name in {names!r}:
    print("found:", find(name).__name__)
"""
    out = _run(
        "-W", "ignore", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed), nnUNet_extTrainer=os.pathsep.join(folders)
    )  # fmt: skip
    assert f"package: {installed}" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("found:")] == names
