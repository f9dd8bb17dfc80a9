"""What a method author imports: every name is documented. Its example runs, as all others of the package do."""

from __future__ import annotations

import doctest
import importlib
import types
from pathlib import Path
from typing import Any

import pytest

import nnunet_ssl
from nnunet_ssl import api

# An alias of types has no docstring of its own.
NAMES = [name for name in api.__all__ if not isinstance(getattr(api, name), types.UnionType)]

HOME = Path(nnunet_ssl.__file__).parent
WITH_EXAMPLES = [
    ".".join(file.relative_to(HOME.parent).with_suffix("").parts)
    for file in sorted(HOME.rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8") and file.stem != "__init__"
]


def _examples(name: str) -> list[doctest.DocTest]:
    found: Any = getattr(api, name)
    return [test for test in doctest.DocTestFinder().find(found, name) if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_an_example_that_runs(name: str) -> None:
    examples = _examples(name)
    assert name in {test.name for test in examples}, "its own docstring has no example"
    report: list[str] = []
    runner = doctest.DocTestRunner()
    for test in examples:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0


def test_the_list_of_names_is_that_of_the_imports() -> None:
    imported = {name for name, value in vars(api).items() if not name.startswith("_") and name != "annotations"}
    assert set(api.__all__) == imported
    assert len(NAMES) >= len(api.__all__) - 1
