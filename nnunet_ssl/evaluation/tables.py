"""Tables for terminals and for Markdown files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from nnunet_ssl.evaluation.metrics import CaseResult


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, markdown: bool = False) -> str:
    """Align the columns of a table; columns that hold only numbers are aligned to the right.

    Floats are shown with three decimals, nan and None as a dash.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(header)} columns, but a row of {len(row)} cells: {row!r}")
    cells = [[_text(cell, markdown) for cell in line] for line in [header, *rows]]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]
    numeric = [
        bool(rows) and all(row[column] is None or _is_number(row[column]) for row in rows)
        for column in range(len(header))
    ]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = line(
            [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
        )
    else:
        rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *(line(texts) for texts in cells[1:])])


def mean_and_spread(values: Sequence[float], *, digits: int = 3) -> str:
    """Such as ``0.912 ± 0.034``: mean and sample standard deviation; values that are nan are counted as missing."""
    present = [value for value in values if not math.isnan(value)]
    missing = len(values) - len(present)
    text = "-"
    if present:
        text = f"{statistics.fmean(present):.{digits}f}"
    if len(present) > 1:
        text += f" ± {statistics.stdev(present):.{digits}f}"
    return text + (f" ({missing} missing)" if missing else "")


def summarize(results: Mapping[str, Sequence[CaseResult]], *, markdown: bool = False) -> str:
    """Dice and HD95 over the cases, one row per structure and trainer.

    Args:
        results: each trainer's results, of the same structures.
        markdown: for a Markdown file rather than a terminal.
    """
    structures = list(next(iter(results.values()))[0].metrics)
    rows: list[list[Any]] = []
    for structure in structures:
        for trainer, cases in results.items():
            metrics = [case.metrics[structure] for case in cases]
            rows.append(
                [
                    structure,
                    trainer,
                    mean_and_spread([one.dice for one in metrics]),
                    mean_and_spread([one.hd95 for one in metrics], digits=2),
                    len(metrics),
                ]
            )
    return format_table(["structure", "trainer", "Dice", "HD95 (mm)", "cases"], rows, markdown=markdown)


def _is_number(cell: object) -> bool:
    return isinstance(cell, Real) and not isinstance(cell, bool)


def _text(cell: object, markdown: bool) -> str:
    if cell is None or (isinstance(cell, Real) and math.isnan(cell)):
        return "-"
    text = f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ") if markdown else text
