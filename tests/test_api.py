"""What a method author imports: every name is documented, and its example runs."""

from __future__ import annotations

import doctest
import types
from typing import Any

import pytest

from nnunet_ssl import api

# An alias of types has no docstring of its own.
NAMES = [name for name in api.__all__ if not isinstance(getattr(api, name), types.UnionType)]


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


def test_the_list_of_names_is_that_of_the_imports() -> None:
    imported = {name for name, value in vars(api).items() if not name.startswith("_") and name != "annotations"}
    assert set(api.__all__) == imported
    assert len(NAMES) >= len(api.__all__) - 1
