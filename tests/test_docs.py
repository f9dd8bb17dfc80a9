"""The documentation says what the code does: tables, options, examples and links."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nnunet_ssl.cli.main import COMMANDS
from nnunet_ssl.networks.streams import StreamOutput
from nnunet_ssl.settings import SemiSupervisedSettings
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch
from nnunet_ssl.trainer.variants import TRAINING_LENGTHS

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
METHODS = sorted(path.stem for path in (PROJECT / "nnunet_ssl" / "methods").glob("[!_]*.py"))


def _method(name: str) -> ModuleType:
    return importlib.import_module(f"nnunet_ssl.methods.{name}")


def _trainer(method: str) -> type[SemiSupervisedTrainer]:
    (found,) = (
        value
        for name, value in vars(_method(method)).items()
        if name.endswith("Trainer") and value is not SemiSupervisedTrainer
    )
    return found


def _settings_rows(settings_class: type[SemiSupervisedSettings]) -> list[str]:
    rows = []
    for option in dataclasses.fields(settings_class):
        cells = [f"`{option.name}`", f"`{json.dumps(option.default)}`", _allowed(option.metadata)]
        rows.append(f"| {' | '.join([*cells, option.metadata['help']])} |")
    return rows


def _own_rows(method: str) -> list[str]:
    """Rows of a method's settings that are not those of every method: new ones, and inherited ones it changes."""
    common = _settings_rows(SemiSupervisedSettings)
    return [row for row in _settings_rows(_trainer(method).settings_class) if row not in common]


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


def _explanation(method: str) -> str:
    return (DOCS / "explanation" / f"{method}.md").read_text(encoding="utf-8")


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
    expected = _settings_rows(SemiSupervisedSettings)
    for method in METHODS:
        expected += _own_rows(method)
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    assert _rows(page) == expected, "docs/reference/settings.md should have these rows:\n" + "\n".join(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_section_of_settings(method: str) -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    (section,) = [part for part in page.split("\n## ") if f"(../explanation/{method}.md" in part]
    assert _rows(section) == _own_rows(method)


@pytest.mark.parametrize("method", [page.stem for page in PAGES if "\n## Settings\n\n–" in page.read_text("utf-8")])
def test_the_explanation_has_the_defaults(method: str) -> None:
    named = [tuple(row.split(" | ")[:2]) for row in _rows(_explanation(method).split("\n## Settings\n")[1])]
    assert named == [tuple(row.split(" | ")[:2]) for row in _own_rows(method)]


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


@pytest.mark.parametrize("method", METHODS)
def test_functions_that_an_explanation_names_exist(method: str) -> None:
    page = _explanation(method)
    functions = re.findall(r"`((?:data|losses|methods|networks)/\w+)\.py: (\w+)`", page)
    assert functions
    for module, name in functions:
        assert hasattr(importlib.import_module(f"nnunet_ssl.{module.replace('/', '.')}"), name), f"{module}: {name}"
    members = re.findall(r"`([A-Z]\w+)\.(\w+)`", page)
    assert members
    for owner, name in members:
        assert hasattr(getattr(_method(method), owner), name), f"{owner}.{name}"


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_terms_are_documented(method: str) -> None:
    page = (DOCS / "reference" / "log-and-checkpoint.md").read_text(encoding="utf-8")
    trainer = object.__new__(_trainer(method))
    trainer.settings = trainer.settings_class()
    assert {term for term in trainer.loss_weights(0.5) if f"`{term}`" not in page} == set()


def test_the_example_of_a_method_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "how-to" / "write-a-method.md").read_text(encoding="utf-8")
    method, module = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "somewhere.py").write_text(method, encoding="utf-8")
    (tmp_path / "ConsistencyTrainer.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module("ConsistencyTrainer")
    assert issubclass(found.ConsistencyTrainer, SemiSupervisedTrainer)
    assert found.ConsistencyTrainer_5epochs.training_epochs == 5

    trainer = object.__new__(found.ConsistencyTrainer)
    trainer.settings = trainer.settings_class()
    trainer.enable_deep_supervision = False
    trainer.label_manager = SimpleNamespace(has_regions=False)
    trainer.loss = torch.nn.CrossEntropyLoss()
    streams, views = trainer.streams(), trainer.unlabeled_views()
    image = torch.randn(2, 1, 4, 4)
    labeled = LabeledBatch(image, torch.randint(0, 3, (2, 4, 4)), ["a", "b"])
    unlabeled = UnlabeledBatch(image, [image] * views.strong, [], torch.tensor([1, 0]), ["c", "d"])
    assert {stream.image for stream in streams.values()} == set(trainer.images(labeled, unlabeled, None))
    outputs = {
        name: StreamOutput(torch.randn(2, 3, 4, 4, requires_grad=stream.gradient)) for name, stream in streams.items()
    }
    terms = {
        name: term for part in trainer.loss_terms(outputs, labeled, unlabeled, None) for name, term in part.items()
    }
    assert set(terms) == set(trainer.loss_weights(0.5))
    torch.stack(list(terms.values())).sum().backward()
    assert all((output.logits.grad is not None) == streams[name].gradient for name, output in outputs.items())
