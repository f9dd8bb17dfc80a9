"""The example of docs/how-to/write-a-method.md as someone else's package: it conforms, and nnU-Net trains it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.testing import check_method

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "write-a-method.md"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The page's class in a folder of modules and its thin modules in a folder of trainers; their names."""
    method, thin, short = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    ((module, trainer),) = re.findall(r"^from (\w+) import (\w+Trainer)$", thin, re.MULTILINE)
    for folder in ("modules", "thin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "modules" / f"{module}.py").write_text(method)
    (tmp_path / "thin" / f"{trainer}.py").write_text(thin)
    (tmp_path / "thin" / "Short.py").write_text(short)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield module, trainer
    sys.modules.pop(module, None)


def test_the_class_is_written_of_the_api_alone_and_conforms(package, tmp_path) -> None:
    module, trainer = package
    for file in tmp_path.glob("*/*.py"):
        imported = re.findall(r"^\s*(?:from|import) (nnunet_ssl[\w.]*)", file.read_text(), re.MULTILINE)
        assert set(imported) == ({"nnunet_ssl.api"} if file.name != "Short.py" else set()), file.name
    check_method(getattr(importlib.import_module(module), trainer))


@pytest.mark.slow
def test_nnunet_finds_and_trains_it(package, planned_2d, tmp_path) -> None:
    _, trainer = package
    environment = {
        "nnUNet_extTrainer": os.pathsep.join([str(trainers_folder()), str(tmp_path / "thin")]),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "modules"), planned_2d.environment["PYTHONPATH"]]),
    }
    command = ("nnUNetv2_train", planned_2d.dataset_id, "tiny", 0, "-device", "cpu", "-tr")
    planned_2d.run(*command, f"{trainer}_short", **environment)
    results = planned_2d.results(f"{trainer}_short")
    assert (results / "checkpoint_final.pth").is_file() and (results / "validation" / "summary.json").is_file()
    # The variants of other lengths are there too, as nnU-Net names its own.
    done = planned_2d.run("nnunet-ssl", "doctor", "-tr", f"{trainer}_50epochs", check=False, **environment)
    assert f"nnU-Net finds {trainer}_50epochs" in done.stdout
