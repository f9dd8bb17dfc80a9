"""The queue: unlabeled cases as several models segment them, ranked by how far the models agree.

``nnunet-ssl rank`` writes the folder; whoever trains on the pseudo-labels reads it. Nothing that a file of the folder
says leads outside: case names are checked before they become file names.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nnunet_ssl.data.nnunet_files import read_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import ELSEWHERE, write_text
from nnunet_ssl.text import shorten, some_of

VERSION = 1
QUEUE_FILE = "queue.json"
ROWS_FILE = "cases.csv"
PAGE_FILE = "index.html"

RELIABLE, LOOK, FIRST = "reliable", "look at it", "label this first"
VERDICTS = (FIRST, LOOK, RELIABLE)
"""In the order of the rows."""

_AGAIN = "Make the queue again with nnunet-ssl rank, in another folder."
_TABLE_AGAIN = (
    "Run the same nnunet-ssl rank again: it writes the table again and predicts nothing again. To choose cases "
    "yourself, name them for nnunet-ssl self-train with --cases."
)


@dataclass(frozen=True)
class Model:
    """One of the models that have segmented the cases.

    Attributes:
        trainer: its name.
        plans: their name.
        configuration: such as ``3d_fullres``.
        fold: a number, or "all".
        checkpoint: name of its file in the fold's folder.
        sha256: of that file, in hexadecimal digits.
        trained_on: labeled cases of the fold's train list; with ``dataset``, all whose labels the model has seen,
            itself or through the models that labeled its cases.
        validated_on: labeled cases of the fold's validation list.
        dataset: that it was trained on, if not the queue's: one that self-training has made of it.
    """

    trainer: str
    plans: str
    configuration: str
    fold: int | str
    checkpoint: str
    sha256: str
    trained_on: tuple[str, ...] = ()
    validated_on: tuple[str, ...] = ()
    dataset: str | None = None

    def __str__(self) -> str:
        return f"{self.trainer} fold {self.fold}" + (f" of {self.dataset}" if self.dataset else "")


@dataclass(frozen=True)
class Queue:
    """What was segmented by which models.

    Attributes:
        dataset: full name, such as ``Dataset902_Hippocampus``.
        configuration: of all models.
        plans: name of the plans of all models.
        file_ending: of images and segmentations, such as ``.nii.gz``.
        labels: as dataset.json has them, with background and ignore label.
        regions_class_order: as dataset.json has it; None without regions.
        cases: image files of each case, one per channel, absolute or relative to the dataset's folder in nnUNet_raw.
        models: at least one.
        mirroring: whether the models predicted with nnU-Net's test-time mirroring.
    """

    dataset: str
    configuration: str
    plans: str
    file_ending: str
    labels: Mapping[str, int | Sequence[int]]
    regions_class_order: tuple[int, ...] | None
    cases: Mapping[str, tuple[str, ...]]
    models: tuple[Model, ...]
    mirroring: bool = True

    @property
    def structures(self) -> dict[str, int | Sequence[int]]:
        """Label values by class or region, without background and ignore label."""
        return {name: value for name, value in self.labels.items() if name != "ignore" and value not in (0, [0])}

    @property
    def ignore_label(self) -> int | None:
        """The ignore label, if the dataset has one."""
        value = self.labels.get("ignore")
        return value if isinstance(value, int) else None


@dataclass(frozen=True)
class StructureRow:
    """A class or region in one case. What is not known is nan.

    Attributes:
        dice: mean Dice of all pairs of models.
        volume: of the consensus, in milliliters.
        components: connected components of the consensus.
    """

    dice: float
    volume: float
    components: int


@dataclass(frozen=True)
class Row:
    """A case as ``cases.csv`` has it. What is not known is nan.

    Attributes:
        case: its name.
        verdict: one of :data:`VERDICTS`.
        reason: for the verdict, in words.
        dice: mean of the structures' ``dice``.
        entropy: mean entropy in the foreground, 0 to 1.
        structures: in the order of the dataset's labels.
    """

    case: str
    verdict: str
    reason: str
    dice: float
    entropy: float
    structures: Mapping[str, StructureRow]


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case in the queue's folder; see :func:`case_files`."""

    consensus: Path
    disagreement: Path
    uncertainty: Path
    picture: Path


def case_files(folder: Path, case: str, file_ending: str) -> CaseFiles:
    """The files of a case.

    Args:
        folder: of the queue.
        case: its name.
        file_ending: the dataset's.

    Returns:
        ``consensus``: label map; ``disagreement``: 1 where the models' label maps are not all equal; ``uncertainty``:
        entropy of the mean prediction; ``picture``: for the page. All but the picture are in the labels' geometry.
    """
    return CaseFiles(
        folder / "consensus" / f"{case}{file_ending}",
        folder / "disagreement" / f"{case}{file_ending}",
        folder / "uncertainty" / f"{case}.nii.gz",
        folder / "pictures" / f"{case}.png",
    )


# queue.json


def read_queue(folder: Path) -> Queue:
    """Read a queue's ``queue.json``.

    Raises:
        UserError: there is none, it is of another version, or something in it is not as :class:`Queue` has it.
    """
    file = folder / QUEUE_FILE
    if not file.is_file():
        raise UserError(f"{folder} is no queue: there is no {QUEUE_FILE}. nnunet-ssl rank makes one.")
    content = read_json(file, otherwise=_AGAIN)
    if content.get("version") != VERSION:
        raise UserError(
            f"{file} has version {shorten(content.get('version'))}; this nnunet-ssl reads {VERSION}. {_AGAIN}"
        )
    try:
        order = content["regions_class_order"]
        queue = Queue(
            dataset=_name(content["dataset"], "dataset"),
            configuration=_name(content["configuration"], "configuration"),
            plans=_name(content["plans"], "plans"),
            file_ending=content["file_ending"],
            labels=_labels(content["labels"]),
            regions_class_order=None if order is None else tuple(_list_of(int, order, "regions_class_order")),
            cases={case: _images(case, one) for case, one in _table(content["cases"], "cases").items()},
            models=tuple(_model(one) for one in _list_of(dict, content["models"], "models")),
            mirroring=_is(bool, content["mirroring"], "mirroring"),
        )
        check_queue(queue)
    except KeyError as error:
        raise UserError(f"{file} has no entry {error}. {_AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{file} is broken: {error}. {_AGAIN}") from None
    return queue


def write_queue(folder: Path, queue: Queue) -> None:
    """Write ``queue.json``, whole or not at all; the folder is made.

    Raises:
        UserError: it cannot be written.
        ValueError: see :func:`check_queue`.
    """
    check_queue(queue)
    content = {"version": VERSION, **asdict(queue)}
    # Of nearly all queues, no model comes from elsewhere.
    content["models"] = [{k: v for k, v in asdict(one).items() if v is not None} for one in queue.models]
    content["cases"] = {case: {"images": list(images)} for case, images in queue.cases.items()}
    write_text(folder / QUEUE_FILE, json.dumps(content, indent=1) + "\n", otherwise=ELSEWHERE)


def check_queue(queue: Queue) -> None:
    """Whether all names can become file names, and the rest is as it should be.

    Raises:
        ValueError: with what is wrong.
    """
    if not re.fullmatch(r"Dataset\d{3}_[^/\\]+", queue.dataset):
        raise ValueError(f"{shorten(queue.dataset)} is no name of a dataset")
    if not (isinstance(queue.file_ending, str) and re.fullmatch(r"\.[A-Za-z0-9.]+", queue.file_ending)):
        raise ValueError(f"{shorten(queue.file_ending)} is no file ending")
    if not queue.models:
        raise ValueError("it names no model")
    if wrong := [case for case in queue.cases if not is_case_name(case)]:
        raise ValueError(f"no case names: {some_of(map(shorten, wrong), 3)}")
    if not queue.structures:
        raise ValueError("its labels name no structure")


def is_case_name(name: object) -> bool:
    """Whether a name of a case is one for files in a folder too, on every system: no path, not hidden, printable."""
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith(".")
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def _model(content: dict[str, Any]) -> Model:
    fold = content["fold"]
    if not (fold == "all" or (type(fold) is int and fold >= 0)):
        raise ValueError(f"a fold is a number or 'all', not {shorten(fold)}")
    digest = _is(str, content["sha256"], "sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{shorten(digest)} is no sha256")
    names = {key: _name(content[key], key) for key in ("trainer", "plans", "configuration", "checkpoint")}
    return Model(
        **names,
        fold=fold,
        sha256=digest,
        trained_on=tuple(_list_of(str, content["trained_on"], "trained_on")),
        validated_on=tuple(_list_of(str, content["validated_on"], "validated_on")),
        dataset=None if content.get("dataset") is None else _name(content["dataset"], "dataset"),
    )


def _images(case: str, content: Any) -> tuple[str, ...]:
    images = _list_of(str, _table(content, f"case {shorten(case)}")["images"], "images")
    if not images:
        raise ValueError(f"case {shorten(case)} has no image")
    if wrong := [image for image in images if ".." in Path(image).parts]:
        raise ValueError(f"an image of case {shorten(case)} leads elsewhere: {shorten(wrong[0])}")
    return tuple(images)


def _labels(content: Any) -> dict[str, int | list[int]]:
    labels = _table(content, "labels")
    for name, value in labels.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"label {shorten(name)} has the value {shorten(value)}")
    return labels


def _name(content: Any, what: str) -> str:
    if not is_case_name(content):
        raise ValueError(f"{what} is {shorten(content)}")
    return str(content)


def _table(content: Any, what: str) -> dict[str, Any]:
    return _is(dict, content, what)


def _list_of(kind: type, content: Any, what: str) -> list[Any]:
    if not isinstance(content, list) or not all(type(one) is kind for one in content):
        raise ValueError(f"{what} is {shorten(content)}")
    return content


def _is(kind: type, content: Any, what: str) -> Any:
    if type(content) is not kind:
        raise ValueError(f"{what} is {shorten(content)}")
    return content


# cases.csv


def write_rows(folder: Path, queue: Queue, rows: Sequence[Row]) -> None:
    """Write ``cases.csv``, whole or not at all, in the order of the rows.

    Raises:
        UserError: it cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_header(queue))
    for row in rows:
        cells = [row.case, row.verdict, row.reason, _cell(row.dice), _cell(row.entropy)]
        for name in queue.structures:
            one = row.structures[name]
            cells += [_cell(one.dice), _cell(one.volume), str(one.components)]
        table.writerow(cells)
    write_text(folder / ROWS_FILE, text.getvalue(), otherwise=ELSEWHERE)


def read_rows(folder: Path, queue: Queue) -> list[Row]:
    """Read ``cases.csv``; a case that is not (yet) in it has no segmentation either. Editors may add a byte-order mark.

    Raises:
        UserError: there is none, or it is not of this queue: other columns, a case twice or one that the queue lacks.
    """
    file = folder / ROWS_FILE
    try:
        lines = list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig")), strict=True))
    except FileNotFoundError:
        raise UserError(f"There is no {file} yet: run nnunet-ssl rank again, which goes on.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} is no table: {error}. {_TABLE_AGAIN}") from None
    expected = _header(queue)
    if not lines or lines[0] != expected:
        found = shorten(", ".join(lines[0]) if lines else "")
        raise UserError(f"{file} should have the columns {', '.join(expected)}; found {found}. {_TABLE_AGAIN}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        try:
            rows.append(_row(line, queue))
        except ValueError as error:
            raise UserError(f"Line {number} of {file} is broken: {error}. {_TABLE_AGAIN}") from None
    if twice := sorted(case for case, count in Counter(row.case for row in rows).items() if count > 1):
        raise UserError(f"{file} has {some_of(twice)} more than once. {_TABLE_AGAIN}")
    return rows


def _header(queue: Queue) -> list[str]:
    columns = ["case", "verdict", "reason", "dice", "entropy"]
    for name in queue.structures:
        columns += [f"dice {name}", f"volume {name} (ml)", f"components {name}"]
    return columns


def _row(cells: Sequence[str], queue: Queue) -> Row:
    if len(cells) != 5 + 3 * len(queue.structures):
        raise ValueError(f"it has {len(cells)} columns")
    case, verdict, reason = cells[:3]
    if case not in queue.cases:
        raise ValueError(f"{QUEUE_FILE} has no case {shorten(case)}")
    if verdict not in VERDICTS:
        raise ValueError(f"{shorten(verdict)} is no verdict ({', '.join(VERDICTS)})")
    structures = {}
    for index, name in enumerate(queue.structures):
        dice, volume, components = cells[5 + 3 * index : 8 + 3 * index]
        structures[name] = StructureRow(_number(dice), _number(volume), int(components))
    return Row(case, verdict, reason, _number(cells[3]), _number(cells[4]), structures)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan
