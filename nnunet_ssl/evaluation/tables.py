"""Tables for terminals, Markdown files and LaTeX documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from nnunet_ssl.evaluation.metrics import CaseResult

Style = Literal["terminal", "markdown", "latex"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, style: Style = "terminal") -> str:
    """Align the columns of a table; columns that hold only numbers are aligned to the right.

    Floats are shown with three decimals, nan and None as a dash. LaTeX tables use the rules of the package booktabs.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(header)} columns, but a row of {len(row)} cells: {row!r}")
    cells = [[_text(cell, style) for cell in line] for line in [header, *rows]]
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
        if style == "latex":
            return f"{' & '.join(padded)} \\\\"
        return f"| {' | '.join(padded)} |" if style == "markdown" else "  ".join(padded).rstrip()

    if style == "latex":
        columns = "".join("r" if right else "l" for right in numeric)
        body = [line(texts) for texts in cells[1:]]
        lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", line(cells[0]), "\\midrule", *body]
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])
    if style == "markdown":
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


def summarize(results: Mapping[str, Sequence[CaseResult]], *, style: Style = "terminal") -> str:
    """Mean and spread over the cases of the metrics in millimeters, one row per structure and name.

    Args:
        results: by name, such as the trainer's; all of the same structures.
        style: see :func:`format_table`.
    """
    structures = list(next(iter(results.values()))[0].metrics)
    metrics = {"Dice": "dice", "Jaccard": "jaccard", "HD95 (mm)": "hd95", "ASD (mm)": "asd", "ASSD (mm)": "assd"}
    rows: list[list[Any]] = []
    for structure in structures:
        for name, cases in results.items():
            found = [case.metrics[structure] for case in cases]
            cells = [
                mean_and_spread([getattr(one, metric) for one in found], digits=2 if "mm" in title else 3)
                for title, metric in metrics.items()
            ]
            rows.append([structure, name, *cells, len(found)])
    header = ["structure", "name", *metrics, "cases"]
    if list(results) == [""]:
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return format_table(header, rows, style=style)


def _is_number(cell: object) -> bool:
    return isinstance(cell, Real) and not isinstance(cell, bool)


def _text(cell: object, style: Style) -> str:
    if cell is None or (isinstance(cell, Real) and math.isnan(cell)):
        return "-"
    text = f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    if style == "markdown":
        return text.replace("|", "\\|").replace("\n", " ")
    if style == "latex":
        return "".join(_LATEX.get(character, character) for character in text)
    return text


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    # In LaTeX's default font encoding these are other characters outside formulas.
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": "$\\pm$",
    "−": "$-$",
    "Δ": "$\\Delta$",
    "\n": " ",
}
