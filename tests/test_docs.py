"""The documentation says what the code does: tables, options, examples and links."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nnunet_ssl.cli.main import COMMANDS
from nnunet_ssl.settings import SemiSupervisedSettings

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def _settings_rows(settings_class: type[SemiSupervisedSettings], inherited: set[str]) -> list[str]:
    rows = []
    for option in dataclasses.fields(settings_class):
        if option.name not in inherited:
            cells = [f"`{option.name}`", f"`{json.dumps(option.default)}`", _allowed(option.metadata)]
            rows.append(f"| {' | '.join([*cells, option.metadata['help']])} |")
    return rows


def _allowed(option: Any) -> str:
    if option["choices"] is not None:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in option["choices"])
    kind = "whole number" if option["integer"] else "number"
    low, high = option["minimum"], option["maximum"]
    if low is not None and high is not None:
        kind += f", {low:g} to {high:g}"
    elif low is not None:
        kind += f", at least {low:g}"
    return kind + (", or `null`" if option["optional"] else "")


def test_the_settings_are_documented() -> None:
    from nnunet_ssl.methods.crossmatch import CrossMatchSettings

    common = {option.name for option in dataclasses.fields(SemiSupervisedSettings)}
    expected = _settings_rows(SemiSupervisedSettings, set()) + _settings_rows(CrossMatchSettings, common)
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == expected, "docs/reference/settings.md should have these rows:\n" + "\n".join(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_documented(command: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"nnunet_ssl.cli.{command}").add_arguments(parser)
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {command}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    documented = {
        option
        for row in section.splitlines()
        if row.startswith("| `")
        for option in re.findall(r"`(--?[\w-]+)", row.split("|")[1])
    }
    assert documented == {option for action in parser._actions for option in action.option_strings}


def test_the_readme_lists_the_trainers() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+Trainer)` \|", readme, re.MULTILINE)) - {"nnUNetTrainer"}
    assert listed == {path.stem for path in (PROJECT / "trainers").glob("*.py")}


def test_the_readme_lists_the_lengths_of_training() -> None:
    from nnunet_ssl.trainer import TRAINING_LENGTHS

    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Trainers\n(.*?)(?=^## )", readme, re.DOTALL | re.MULTILINE)
    assert [int(number) for number in re.findall(r"`_(\d+)epochs?`", section)] == list(TRAINING_LENGTHS)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_file(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    missing = [path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(PROJECT).as_posix() not in readme]
    assert not missing


def test_functions_that_the_explanation_of_crossmatch_names_exist() -> None:
    page = (DOCS / "explanation" / "crossmatch.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:data|losses|networks)/\w+)\.py: (\w+)`", page)
    assert named
    for module, name in named:
        assert hasattr(importlib.import_module(f"nnunet_ssl.{module.replace('/', '.')}"), name), f"{module}: {name}"
    methods = re.findall(r"`(CrossMatchTrainer|SemiSupervisedTrainer)\.(\w+)`", page)
    assert methods
    trainer = importlib.import_module("nnunet_ssl.methods.crossmatch").CrossMatchTrainer
    assert all(hasattr(trainer, name) for _, name in methods)


def test_the_example_of_a_method_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_ssl.trainer import SemiSupervisedTrainer

    page = (DOCS / "how-to" / "write-a-method.md").read_text(encoding="utf-8")
    method, module = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "somewhere.py").write_text(method, encoding="utf-8")
    (tmp_path / "ConsistencyTrainer.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module("ConsistencyTrainer")
    assert issubclass(found.ConsistencyTrainer, SemiSupervisedTrainer)
    assert found.ConsistencyTrainer_5epochs.training_epochs == 5
    hooks = ("unlabeled_views", "streams", "images", "loss_terms", "loss_weights")
    assert all(hook in vars(found.ConsistencyTrainer) for hook in hooks)
    assert found.ConsistencyTrainer.settings_class().weight == 1.0
