"""The arrows of the architecture, held by import-linter's contracts in setup.cfg, and the checks of ruff and mypy."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ssl.cli.main import COMMANDS, module_of

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "nnunet_ssl"
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def _lint_imports(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        encoding="utf-8",
    )


def test_contracts_are_kept() -> None:
    result = _lint_imports(PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("losses/dice.py", "import nnunet_ssl.trainer", "layers"),
        ("networks/__init__.py", "import nnunet_ssl.methods.crossmatch", "layers"),
        ("data/__init__.py", "import nnunet_ssl.losses.dice", "layers"),
        ("trainer/__init__.py", "import nnunet_ssl.cli.main", "layers"),
        ("errors.py", "import nnunet_ssl.settings", "layers"),
        ("data/__init__.py", "import nnunet_ssl.settings", "settings"),
        ("trainer/base.py", "import nnunet_ssl.losses.dice", "trainer"),
        ("trainer/gradients.py", "import nnunet_ssl.trainer.base", "inside trainer"),
        ("networks/__init__.py", "import nnunet_ssl.data.cutmix", "data"),
        ("cli/doctor.py", "import nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnU-Net"),
        ("evaluation/__init__.py", "import batchgenerators", "nnU-Net"),
        ("errors.py", "import torch", "light"),
        ("cli/extend.py", "from nnunet_ssl.cli.doctor import check_paths", "commands"),
        ("files.py", "import numpy", "light"),
        ("text.py", "import nnunet_ssl.errors", "layers"),
        ("new.py", "import nnunet_ssl.errors", "layers"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, module: str, statement: str, contract: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "nnunet_ssl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "setup.cfg", tmp_path)
    offender = tmp_path / "nnunet_ssl" / module
    text = offender.read_text(encoding="utf-8") if offender.exists() else ""
    offender.write_text(f"{text}\n\n{statement}\n", encoding="utf-8")
    result = _lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [line for line in result.stdout.splitlines() if line.rstrip().endswith("BROKEN")]
    assert contract in [line.split(":")[0] for line in broken]


def test_the_contract_of_the_commands_names_them_all() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(PROJECT / "setup.cfg")
    modules = contracts["importlinter:contract:commands"]["modules"].split()
    assert modules == [module_of(name) for name in COMMANDS]


def test_the_package_never_imports_the_trainers_folder() -> None:
    """nnU-Net drops the folder's modules from memory after a look-up, so a class kept there would exist twice."""
    forbidden = {"trainers"} | {path.stem for path in (PROJECT / "trainers").glob("*.py")}
    assert "CrossMatchTrainer" in forbidden
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                assert module.split(".")[0] not in forbidden, f"{path}: {module}"
                assert not module.startswith("nnunet_ssl.trainers"), f"{path}: {module}"


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_static_checks(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=PROJECT, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
