"""Trainers of tiny plans."""

from __future__ import annotations

import pytest

from nnunet_ssl.testing import tiny_trainers


@pytest.fixture
def made():
    """Trainers of the tiny plans in 2D."""
    opened = []

    def factory(method, **options):
        context = tiny_trainers(method, **({"dim": 2} | options))
        opened.append(context)
        return context.__enter__()()

    yield factory
    for context in opened:
        context.__exit__(None, None, None)
