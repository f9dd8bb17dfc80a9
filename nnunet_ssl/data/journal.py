"""A change of a dataset that happens as a whole or not at all, and that can be taken back.

New files are first written aside, in a hidden folder of each of the dataset's folders, and what is removed goes there
too. The change itself is then a list of renames, which take no space on the disk. The list is on the disk before the
first of them, so that whoever comes after a kill goes on with it::

    nnUNet_raw/DATASET/.nnunet_ssl_accept/3/new/labelsTr/CASE.nii.gz    written aside, until it is renamed
    nnUNet_raw/DATASET/.nnunet_ssl_accept/3/old/dataset.json            as it was before
    nnUNet_preprocessed/DATASET/.nnunet_ssl_accept/3/accepting.json     the list

The name of the list is the state of the change: ``accepting.json``, ``accepted.json`` or ``undoing.json``. Without a
list nothing has been renamed yet, and the folder is left over from a run that was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from nnunet_ssl.data.nnunet_files import read_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import flush_to_disk, list_names, replacing
from nnunet_ssl.text import some_of

FOLDER = ".nnunet_ssl_accept"
ROOTS = {"raw": "nnUNet_raw", "preprocessed": "nnUNet_preprocessed", "results": "nnUNet_results"}
"""The dataset's folders, and the variables that lead to them."""

_ACCEPTING, _ACCEPTED, _UNDOING = "accepting.json", "accepted.json", "undoing.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Step:
    """One rename within one of the dataset's folders.

    Attributes:
        root: a key of ``ROOTS``.
        source: path in it, with slashes.
        target: likewise; replaced if ``before`` is there, and else it must not exist.
        before: a copy of the target as it was, if there was one.
        size: of the file, in bytes.
        mtime_ns: of the file. Size and time tell whether somebody has changed it since.
    """

    root: str
    source: str
    target: str
    before: str | None
    size: int
    mtime_ns: int


class Journal:
    """One change. Files are prepared, then :meth:`commit` makes it; :meth:`undo` takes it back.

    Args:
        roots: the dataset's folders by the keys of ``ROOTS``; ``preprocessed`` keeps the list.
        number: of the change, which names its folder.
        cases: that it is about.

    Attributes:
        number: see above.
        cases: see above.
        steps: the renames, in order.
    """

    def __init__(self, roots: Mapping[str, Path], number: int, cases: Sequence[str] = ()) -> None:
        self._roots = roots
        self.number = number
        self.cases = list(cases)
        self.steps: list[Step] = []

    # Preparing

    def aside(self, root: str, place: str) -> Path:
        """Where to write a new file; ``place`` is where it will be, a path in the dataset's folder."""
        file = self._folder(root) / "new" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def put(self, root: str, place: str) -> None:
        """Let what was written :meth:`aside` take its place, and that of the file that is there."""
        new, there = self.aside(root, place), self._roots[root] / place
        flush_to_disk(new)
        before = None
        if os.path.lexists(there):
            before = self._old(root, place)
            shutil.copy2(there, self._roots[root] / before, follow_symlinks=False)
        self._add(root, self._inside(new, root), place, before)

    def move(self, root: str, source: str, target: str) -> None:
        """Rename a file; links are renamed, not followed."""
        self._add(root, source, target, None)

    def take_away(self, root: str, place: str) -> None:
        """Remove a file from its place; it is kept for :meth:`undo`."""
        self._add(root, place, self._old(root, place), None)

    def _add(self, root: str, source: str, target: str, before: str | None) -> None:
        stat = (self._roots[root] / source).lstat()
        self.steps.append(Step(root, source, target, before, stat.st_size, stat.st_mtime_ns))

    def _old(self, root: str, place: str) -> str:
        old = self._folder(root) / "old" / place
        old.parent.mkdir(parents=True, exist_ok=True)
        return self._inside(old, root)

    def _inside(self, file: Path, root: str) -> str:
        return file.relative_to(self._roots[root]).as_posix()

    def discard(self) -> None:
        """Remove what is kept aside, the list first: without it, the rest is nothing but left over."""
        for state in (_ACCEPTED, _UNDOING):
            (self._folder("preprocessed") / state).unlink(missing_ok=True)
        for root, place in self._roots.items():
            shutil.rmtree(self._folder(root), ignore_errors=True)
            with suppress(OSError):  # others may be in it, or it may not be there
                (place / FOLDER).rmdir()

    # Changing

    def commit(self) -> None:
        """Make the change. From the moment that the list is written it is made, whoever completes it.

        Raises:
            OSError: a file cannot be renamed; the change was taken back.
        """
        steps = [asdict(step) for step in self.steps]
        content = {"format_version": _FORMAT_VERSION, "cases": self.cases, "steps": steps}
        file = self._folder("preprocessed") / _ACCEPTING
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, durable=True) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        self.complete()

    def complete(self) -> None:
        """Do what is left of the change; errors as for :meth:`commit`."""
        try:
            for step in self.steps:
                source, target = self._place(step, step.source), self._place(step, step.target)
                if os.path.lexists(source):
                    if step.before is None and os.path.lexists(target):
                        raise FileExistsError(0, "another file has been put there in the meantime", str(target))
                    rename(source, target)
            self._now(_ACCEPTING, _ACCEPTED)
        except OSError:
            self._now(_ACCEPTING, _UNDOING)
            self.take_back()
            raise
        self.discard_earlier()

    def discard_earlier(self) -> None:
        """Remove what earlier changes keep aside; they cannot be undone any more."""
        for number in _numbers(self._roots):
            if number < self.number:
                Journal(self._roots, number).discard()

    def on_other_file_systems(self) -> list[str]:
        """Files that cannot be renamed to where they should go, as paths."""
        found = []
        for step in self.steps:
            source, target = self._place(step, step.source), self._place(step, step.target)
            if source.parent.stat().st_dev != target.parent.stat().st_dev:
                found.append(f"{source} -> {target.parent}")
        return found

    def changed_since(self) -> list[str]:
        """Files that are not as the change left them, as paths; then it cannot be undone."""
        return [str(self._place(step, step.target)) for step in self.steps if not self._is_as_left(step)]

    def _is_as_left(self, step: Step) -> bool:
        if os.path.lexists(self._place(step, step.source)):
            return False
        if step.before is not None and not os.path.lexists(self._place(step, step.before)):
            return False
        try:
            stat = self._place(step, step.target).lstat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (step.size, step.mtime_ns)

    def undo(self) -> None:
        """Take back a change that was made; errors as for :meth:`take_back`."""
        self._now(_ACCEPTED, _UNDOING)
        self.take_back()

    def take_back(self) -> None:
        """Do what is left of taking back.

        Raises:
            OSError: a file cannot be renamed; the next run goes on.
        """
        for step in reversed(self.steps):
            source, target = self._place(step, step.source), self._place(step, step.target)
            if step.before is not None:
                before = self._place(step, step.before)
                if os.path.lexists(before):
                    rename(before, target)
            elif os.path.lexists(target) and not os.path.lexists(source):
                rename(target, source)
        self.discard()

    def _place(self, step: Step, path: str) -> Path:
        return self._roots[step.root] / path

    def _folder(self, root: str) -> Path:
        return self._roots[root] / FOLDER / str(self.number)

    def _now(self, before: str, after: str) -> None:
        folder = self._folder("preprocessed")
        rename(folder / before, folder / after)


def rename(source: Path, target: Path) -> None:
    """Every change of a dataset and of a list's state goes through this function, after the list is written."""
    source.replace(target)


def new_journal(roots: Mapping[str, Path], cases: Sequence[str]) -> Journal:
    """A change after all those that there are.

    Raises:
        UserError: its folder is a link.
    """
    return Journal(roots, max(_numbers(roots), default=0) + 1, cases)


def last_accepted(roots: Mapping[str, Path]) -> Journal | None:
    """The last change that was made, if it was not taken back; to be called after :func:`recover`.

    Raises:
        UserError: the list cannot be read.
    """
    return next((journal for state, journal in _journals(roots) if state == _ACCEPTED), None)


def recover(roots: Mapping[str, Path], log: Callable[[str], None] = print) -> None:
    """After a kill: complete a change, or taking one back, where it had begun; remove what was prepared for one.

    Args:
        roots: see :class:`Journal`.
        log: takes a line for each thing that was done.

    Raises:
        UserError: a list cannot be read, or a file cannot be renamed.
    """
    known = set()
    for state, journal in _journals(roots):
        known.add(journal.number)
        try:
            if state == _ACCEPTING:
                journal.complete()
                log(f"An earlier acceptance of {some_of(journal.cases)} was interrupted; it is completed now.")
            elif state == _UNDOING:
                journal.take_back()
                log(f"--undo of {some_of(journal.cases)} was interrupted; it is completed now.")
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be renamed: {error.strerror or error}. Check permissions there and run the "
                "command again; it continues where it stopped."
            ) from error
    for number in set(_numbers(roots)) - known:
        Journal(roots, number).discard()
        log("Temporary files of an interrupted run of this command are removed.")
    if (last := last_accepted(roots)) is not None:
        last.discard_earlier()


def refuse_unfinished(preprocessed: Path) -> None:
    """For all others that use the dataset.

    Raises:
        UserError: a change was cut off halfway.
    """
    folder = preprocessed / FOLDER
    for name in list_names(folder):
        if list_names(folder / name) & {_ACCEPTING, _UNDOING}:
            raise UserError(
                f"{preprocessed} is in the middle of a change: nnunet-ssl accept is running, or was interrupted. If "
                f"it is not running any more, nnunet-ssl accept -d {preprocessed.name} completes the change."
            )


def _numbers(roots: Mapping[str, Path]) -> list[int]:
    """Of all changes that have a folder, the last one first."""
    found = set()
    for root in roots.values():
        if (root / FOLDER).is_symlink():
            raise UserError(f"{root / FOLDER} is a link, and files would be moved to its target. Remove the link.")
        found |= {int(name) for name in list_names(root / FOLDER) if name.isascii() and name.isdigit()}
    return sorted(found, reverse=True)


def _journals(roots: Mapping[str, Path]) -> Iterator[tuple[str, Journal]]:
    """Changes that have a list, with their states, the last one first."""
    for number in _numbers(roots):
        folder = roots["preprocessed"] / FOLDER / str(number)
        state = next((name for name in (_ACCEPTING, _UNDOING, _ACCEPTED) if (folder / name).is_file()), None)
        if state is not None:
            yield state, _read(roots, number, folder / state)


def _read(roots: Mapping[str, Path], number: int, file: Path) -> Journal:
    otherwise = "It is not a list of nnunet-ssl accept: move it away if you know where it comes from."
    content = read_json(file, otherwise=otherwise, entries={"cases": list, "steps": list})
    if content.get("format_version") != _FORMAT_VERSION:
        raise UserError(f"{file} was written by another version of nnunet-ssl. Use that version to complete it.")
    journal = Journal(roots, number, [str(case) for case in content["cases"]])
    try:
        journal.steps = [Step(**step) for step in content["steps"]]
        paths = [path for one in journal.steps for path in (one.source, one.target)]
        paths += [one.before for one in journal.steps if one.before is not None]
        if not all(map(_leads_nowhere_else, paths)) or {step.root for step in journal.steps} - set(ROOTS):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{file} names files outside of the dataset, or is damaged. {otherwise}") from None
    if missing := sorted({ROOTS[step.root] for step in journal.steps if step.root not in roots}):
        raise UserError(f"{file} is about files in {', '.join(missing)}, which is not set. Set it and try again.")
    return journal


def _leads_nowhere_else(path: Any) -> bool:
    if not isinstance(path, str) or "\0" in path:
        return False
    parts = PurePath(path)
    return bool(parts.parts) and not parts.is_absolute() and not parts.drive and ".." not in parts.parts
