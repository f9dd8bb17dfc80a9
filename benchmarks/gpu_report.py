"""The tables of benchmarks/gpu.py, made of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from common import where
from gpu_rows import SUPERVISED, Row

from nnunet_ssl.evaluation.tables import format_table

FIRST_SCALE = 2.0**16  # of a new gradient scaler

Table = tuple[list[str], list[list[Any]]]


def header(command: str, date: datetime) -> str:
    """Where and when it ran."""
    lines = [where()]
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        cudnn = torch.backends.cudnn.version()
        lines.append(f"{found.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    return "\n\n".join(["# Benchmarks on one GPU", f"{date:%Y-%m-%d %H:%M}", f"    {command}", *lines]) + "\n"


def one_line(row: Row) -> str:
    """What a row says, for who watches."""
    parts = [row["question"], row["plan"], _step(row)]
    for name in ("seconds", "kernel", "line", "times", "modes", "skipped", "command", "note"):
        if row.get(name) or row.get(name) == 0:
            value = row[name]
            parts.append(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(part for part in parts if part)


def report(rows: list[Row], folder: Path) -> str:
    """All tables that there are rows for."""
    text = []
    for title, question, table in _TABLES:
        own = [row for row in rows if row["question"] == question]
        if own:
            head, lines = table(rows)
            text += [f"\n## {title}\n", format_table(head, lines, style="markdown"), ""]
            if not title.startswith("b"):
                text += [f"- {row['plan']}, {_step(row)}: {row['note']}" for row in own if "note" in row]
    for row in rows:
        if row["question"] == "h":
            text += ["\n## h. Accuracy\n", *(f"    {row[name]}\n" for name in ("command",) if name in row), row["note"]]
            file = folder / "accuracy" / "report.md"
            text += [_below(file.read_text(encoding="utf-8"))] if file.is_file() else []
    return "\n".join(text) + "\n"


def _below(text: str) -> str:
    """Of another report, with its headings below those here."""
    return "".join(f"##{line}" if line.startswith("#") else line for line in text.splitlines(keepends=True))


def _step(row: Row) -> str:
    """Such as ``CrossMatchTrainer, split``."""
    parts = [row["trainer"], row["mode"], "compiled" if row["compiled"] else ""]
    parts += [f"memory ends at {row['limit']:.0%}"] if row["limit"] is not None else []
    return ", ".join(part for part in parts if part)


def _ratio(value: float | None, of: float | None) -> str | None:
    return None if value is None or not of else f"{value / of:.2f}"


def _gigabytes(value: int | None) -> str | None:
    return None if value is None else f"{value / 1e9:#.3g}"


def _timed(rows: list[Row], question: str) -> list[Row]:
    return [row for row in rows if row["question"] == question and "seconds" in row]


def _find(rows: Iterable[Row], **wanted: Any) -> Row:
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), {})


def _step_times(rows: list[Row]) -> Table:
    timed, lines = _timed(rows, "a"), []
    for row in sorted(timed, key=lambda row: (row["plan"] == "dataset", row["compiled"], row["trainer"] != SUPERVISED)):
        plan, compiled = row["plan"], row["compiled"]
        supervised = _find(timed, plan=plan, compiled=compiled, trainer=SUPERVISED)
        eager = _find(timed, plan=plan, compiled=False, trainer=row["trainer"], mode=row["mode"])
        own = [one for one in timed if (one["plan"], one["trainer"]) == (plan, row["trainer"])]
        passes = min((one["seconds"] for one in own if "passes" in one), default=None)
        lines.append(
            [
                f"{plan} {'x'.join(map(str, row['patch']))}",
                f"{row['trainer']}, {row['passes']}" if "passes" in row else _step(row),
                f"{1000 * row['seconds']:.1f}",
                _ratio(row["seconds"], supervised.get("seconds")),
                _ratio(row["seconds"], passes),
                _ratio(eager.get("seconds"), row["seconds"]) if compiled else None,
                f"{row['first']:.2f}",
                row.get("graphs"),
                row.get("breaks"),
                round(math.log2(FIRST_SCALE / row["scale"])) if "scale" in row else None,
            ]
        )
    ratios = ["x nnUNetTrainer", "x bare passes", "faster by compiling"]
    return ["plan", "step", "ms", *ratios, "first steps, s", "graphs", "breaks", "skipped"], lines


def _memory(rows: list[Row]) -> Table:
    timed, lines = [row for row in _timed(rows, "a") if "passes" not in row], []
    for row in sorted(timed, key=lambda row: (row["plan"] == "dataset", row["compiled"], row["trainer"] != SUPERVISED)):
        plan = row["plan"]
        eager = _find(timed, plan=plan, compiled=False, trainer=row["trainer"], mode=row["mode"])
        supervised = _find(timed, plan=plan, compiled=row["compiled"], trainer=SUPERVISED)
        computed = eager.get("computed")
        lines.append(
            [
                plan,
                _step(row),
                _gigabytes(computed),
                _gigabytes(row["allocated"]),
                _gigabytes(row["reserved"]),
                _ratio(row["allocated"], supervised.get("allocated")),
                _ratio(row["allocated"], computed),
                _ratio(row["reserved"], computed),
            ]
        )
    sizes = ["computed GB", "allocated GB", "reserved GB"]
    return ["plan", "step", *sizes, "x nnUNetTrainer", "allocated / computed", "reserved / computed"], lines


def _fall_back(rows: list[Row]) -> Table:
    lines = [
        [
            _step(row),
            *(_gigabytes(row[name]) for name in ("split", "stacked", "bytes")),
            ", ".join(row["modes"]),
            "yes" if row["finite"] else "no",
        ]
        for row in rows
        if "modes" in row
    ]
    return ["step", "split GB", "stacked GB", "limit GB", "mode after each step", "finite"], lines


def _kernels(rows: list[Row]) -> Table:
    lines = [
        [row["kernel"][:120], f"{1000 * row['seconds']:.2f}", f"{row['part']:.1%}", row["calls"]]
        for row in rows
        if "kernel" in row
    ]
    return ["kernel", "ms", "share", "calls"], lines


def _synchronizations(rows: list[Row]) -> Table:
    return ["step", "times", "line"], [[_step(row), row["times"], row["line"]] for row in rows if "times" in row]


def _layouts(rows: list[Row]) -> Table:
    lines = []
    for row in _timed(rows, "f"):
        off = _find(_timed(rows, "a"), plan=row["plan"], trainer=row["trainer"], mode=row["mode"], compiled=True)
        without = off.get("seconds")
        milliseconds = None if without is None else f"{1000 * without:.1f}"
        lines.append([_step(row), milliseconds, f"{1000 * row['seconds']:.1f}", _ratio(row["seconds"], without)])
    return ["step", "off, ms", "on, ms", "on / off"], lines


def _scaler(rows: list[Row]) -> Table:
    lines = [
        [
            _step(row),
            row["steps"],
            row["finite"],
            len(row["skipped"]),
            ", ".join(map(str, row["skipped"])),
            f"{row['scale']:.0f}",
            " to ".join(f"{loss:.3f}" for loss in row["loss"]),
        ]
        for row in rows
        if "skipped" in row
    ]
    return ["step", "steps", "finite losses", "skipped", "which", "scale at the end", "loss"], lines


_TABLES: tuple[tuple[str, str, Callable[[list[Row]], Table]], ...] = (
    ("a. Step time", "a", _step_times),
    ("b. Memory", "a", _memory),
    ("c. From stacked to split when the memory ends", "c", _fall_back),
    ("d. Kernels of one step", "d", _kernels),
    ("e. Synchronizations of one step", "e", _synchronizations),
    ("f. force_layout_optimization of the inductor", "f", _layouts),
    ("g. Mixed precision", "g", _scaler),
)
