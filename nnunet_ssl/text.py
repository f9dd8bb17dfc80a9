"""Names, values and errors, shortened for a message."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(names: Iterable[str], limit: int = 10) -> str:
    """The first names, no more than ``limit``, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


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
