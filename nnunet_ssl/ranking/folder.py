"""The queue's folder while it is made: a line for each case that is done, so that the next run goes on.

A case is done once its line is written, after its files. Nothing else is looked at to go on: no image, no segmentation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nnunet_ssl.data.queue import QUEUE_FILE, Model, Queue, StructureRow, case_files, read_queue, write_queue
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import ELSEWHERE, cannot_write, list_names, lock, write_text
from nnunet_ssl.ranking.scores import LabeledRange, Scores
from nnunet_ssl.text import some_of

_WORK = "work"
_DONE = "done.jsonl"
_RANGES = "labeled.json"
Stamps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Done:
    """A case that is done: what was measured, and of which image files (size and time)."""

    scores: Scores
    stamps: Stamps


@contextmanager
def open_folder(folder: Path) -> Iterator[Path]:
    """Hold a queue's folder for this run alone; returns where unfinished files go.

    Raises:
        UserError: it holds something else, another run uses it, or it cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"-o {folder} is a file. {ELSEWHERE}")
        foreign = sorted(list_names(folder) - {_WORK})
    except OSError as error:
        raise UserError(f"-o {folder} cannot be used: {error.strerror or error}. {ELSEWHERE}") from None
    if foreign and not (folder / QUEUE_FILE).is_file():
        raise UserError(
            f"-o {folder} is no queue and holds something else already: {some_of(foreign, 5)}. Name a folder that is "
            "empty or does not exist yet."
        )
    with lock(folder / _WORK / "lock", wait=False) as held:
        if not held:
            raise UserError(f"Another nnunet-ssl rank is working in {folder}. Wait for it, or choose another -o.")
        yield folder / _WORK


def agree(folder: Path, wanted: Queue) -> Queue:
    """Make the queue's description, or go on with the one that there is; returns it with today's cases.

    A queue in which no case is done may be made of something else now, since nothing is lost. Else, what models were
    trained on stays as it was noted first: the folds may have got new cases since.

    Raises:
        UserError: the queue was made with other models, or of something else; the text says what differs.
    """
    there = read_queue(folder) if (folder / QUEUE_FILE).is_file() else None
    if there is not None and not (folder / _WORK / _DONE).exists():
        (folder / _WORK / _RANGES).unlink(missing_ok=True)
    elif there is not None:
        if differences := _differences(there, wanted):
            raise UserError(
                f"{folder} was made otherwise: {'; '.join(differences)}. Go on with what it was made with, or choose "
                "another folder with -o."
            )
        wanted = replace(wanted, models=there.models)
        if there == wanted:
            return there
    write_queue(folder, wanted)
    return wanted


def _differences(there: Queue, wanted: Queue) -> list[str]:
    found = []
    for field in ("dataset", "configuration", "plans", "file_ending", "labels", "regions_class_order", "mirroring"):
        before, now = getattr(there, field), getattr(wanted, field)
        if before != now:
            found.append(f"{field} {before} there, {now} now")
    before_models, now_models = _by_name(there.models), _by_name(wanted.models)
    if gone := [name for name in before_models if name not in now_models]:
        found.append(f"also with {some_of(gone)}")
    if new := [name for name in now_models if name not in before_models]:
        found.append(f"without {some_of(new)}")
    changed = [name for name, digest in now_models.items() if before_models.get(name, digest) != digest]
    if changed:
        found.append(f"with an earlier training of {some_of(changed)}: the checkpoint has changed since")
    return found


def _by_name(models: Sequence[Model]) -> dict[str, str]:
    return {f"{model} ({model.checkpoint})": model.sha256 for model in models}


def stamps(files: Sequence[Path]) -> Stamps | None:
    """Size and time of files; None where one is not there."""
    try:
        return tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))
    except OSError:
        return None


def read_done(folder: Path, queue: Queue) -> dict[str, Done]:
    """The cases that earlier runs have done and whose files are there still; a line that was cut off does not count."""
    done: dict[str, Done] = {}
    try:
        lines = (folder / _WORK / _DONE).read_bytes().splitlines()
    except FileNotFoundError:
        return done
    except OSError as error:
        raise UserError(f"{folder / _WORK / _DONE} cannot be read: {error.strerror or error}.") from None
    try:
        there = {name: list_names(folder / name) for name in ("consensus", "disagreement", "uncertainty", "pictures")}
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be listed: {error.strerror or error}. It must be a folder: move it away, and its "
            "files are made again."
        ) from None
    for line in lines:
        try:
            content = json.loads(line)
            case = content["case"]
            structures = {
                name: StructureRow(_number(one["dice"]), float(one["volume"]), int(one["components"]))
                for name, one in content["structures"].items()
            }
            entry = Done(
                Scores(_number(content["entropy"]), structures), tuple((one[0], one[1]) for one in content["files"])
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue
        if case in queue.cases and list(structures) == list(queue.structures):
            files = case_files(folder, case, queue.file_ending)
            of_case = (files.consensus, files.disagreement, files.uncertainty, files.picture)
            if all(file.name in there[file.parent.name] for file in of_case):
                done[case] = entry
    return done


def append_done(folder: Path, case: str, done: Done) -> None:
    """Note a case, after its files are in their places.

    Raises:
        UserError: it cannot be written.
    """
    structures = {name: {**asdict(one), "dice": _or_none(one.dice)} for name, one in done.scores.structures.items()}
    entry = {"case": case, "files": done.stamps, "entropy": _or_none(done.scores.entropy), "structures": structures}
    file = folder / _WORK / _DONE
    try:
        with file.open("a+b") as opened:
            # A run that was killed while it wrote may have left half a line.
            opened.seek(0, 2)
            if opened.tell():
                opened.seek(-1, 2)
            half = opened.read(1) not in (b"", b"\n")
            opened.write(b"\n" * half + json.dumps(entry).encode() + b"\n")
    except OSError as error:
        raise cannot_write(file, error, "Make room there and run this again, which goes on.") from error


def read_ranges(folder: Path) -> dict[str, LabeledRange] | None:
    """What an earlier run has found in the labeled cases; None where there is none."""
    try:
        content = json.loads((folder / _WORK / _RANGES).read_bytes())
        return {name: LabeledRange(float(low), float(high)) for name, (low, high) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write_ranges(folder: Path, ranges: Mapping[str, LabeledRange]) -> None:
    """Keep them for later runs."""
    content = {name: (one.smallest, one.largest) for name, one in ranges.items()}
    write_text(folder / _WORK / _RANGES, json.dumps(content) + "\n", otherwise=ELSEWHERE)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
