"""Names, values and errors, shortened for a message."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


def some_of(names: Iterable[str], limit: int = 10) -> str:
    """The first names, no more than ``limit``, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def closest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The known name that somebody who wrote another one may have meant.

    >>> closest("ramp_lenght", ["seed", "ramp_length"]), closest("x", ["seed", "ramp_length"])
    ('ramp_length', None)
    """
    by_letters = {one.casefold(): one for one in known}
    found = get_close_matches(name.casefold(), by_letters, n=1, cutoff=cutoff)
    return by_letters[found[0]] if found else None


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """A question to go on with after a message on unknown names, with a space before it; empty where none is alike.

    >>> did_you_mean(["doctr", "zzz"], ["doctor", "demo"])
    ' Did you mean doctor?'
    """
    known = list(known)
    meant = [found for name in names if (found := closest(name, known))]
    return f" Did you mean {', '.join(meant)}?" if meant else ""


def dataset_number(dataset: str) -> str:
    """A dataset's number, given its number or its name: nnU-Net's planning and preprocessing take no name after -d.

    >>> dataset_number("Dataset007_Heart"), dataset_number("901")
    ('7', '901')
    """
    return str(int(dataset[7:10])) if re.match(r"Dataset\d{3}_", dataset) else dataset


def planning_command(dataset: str) -> str:
    """nnU-Net's command that plans and preprocesses a dataset, given its number or its name.

    >>> planning_command("Dataset007_Heart")
    'nnUNetv2_plan_and_preprocess -d 7'
    """
    return f"nnUNetv2_plan_and_preprocess -d {dataset_number(dataset)}"


def shorten(value: object, limit: int = 80) -> str:
    """A value as Python writes it, cut after ``limit`` characters."""
    return _cut(repr(value), limit)


def by_axis(values: Iterable[float]) -> str:
    """Sizes or spacings, such as ``512 x 512 x 96``."""
    return " x ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)


def unwrap(text: object, limit: int | None = None) -> str:
    """A text of several lines in one, cut after ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if limit is None else _cut(line, limit)


def one_line(error: BaseException) -> str:
    """An exception in one line; of a library's long report, the last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, (RuntimeError, OSError)) else f"{type(error).__name__}: {lines[-1]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
