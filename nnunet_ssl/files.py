"""Files that are whole or not there, what a folder holds, and locks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_ssl.errors import UserError

ELSEWHERE = "Choose another place with -o."
"""What to do where a command's output cannot be written."""

AGAIN = "Check free space and permissions there and run the command again."
"""What to do where the place cannot be chosen."""

# Far longer than a case takes.
_ABANDONED_SECONDS = 24 * 3600.0


@contextmanager
def replacing(file: Path, *, aside: Path | None = None, durable: bool = False) -> Iterator[Path]:
    """Write a file aside and rename it at the end, so that a kill leaves the old file or the new one, whole.

    The block writes the yielded path. If it raises anything, that path is removed and ``file`` stays as it was.

    Args:
        file: replaced if it exists; a link of this name is replaced, not followed.
        aside: where to write first, in the same file system. By default a hidden file next to ``file``, whose name has
            the process's number, so that several processes can write the same file.
        durable: get the content to the disk before the rename, so that a power cut does not leave an empty file.

    Raises:
        OSError: it cannot be written.
    """
    aside = aside or file.with_name(f".{file.name}.{os.getpid()}")
    # A link of this name, in a folder from elsewhere, would be written through.
    aside.unlink(missing_ok=True)
    try:
        yield aside
        if durable:
            flush_to_disk(aside)
        aside.replace(file)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def flush_to_disk(file: Path) -> None:
    """Get a file's content to the disk."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def sha256_of(file: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None
    return digest.hexdigest()


def list_names(folder: Path) -> set[str]:
    """Names in a folder, none if it does not exist."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove folders in the making that killed runs have left.

    Args:
        folder: that holds them.
        prefix: of their names.
    """
    for name in list_names(folder):
        if name.startswith(prefix):
            left = folder / name
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(left)


def write_text(file: Path, text: str, *, otherwise: str = AGAIN) -> None:
    """Write a file (UTF-8) as :func:`replacing` does; its folder is made.

    Args:
        file: to write.
        text: its content.
        otherwise: what to do where it cannot be written.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(file, error, otherwise) from error


def cannot_write(file: Path, error: OSError, otherwise: str) -> UserError:
    """What to raise where a file cannot be written."""
    return UserError(f"{file} cannot be written: {error.strerror or error}. {otherwise}")


@contextmanager
def lock(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among processes, on one machine or on a shared file system; the system drops it when one ends.

    Args:
        file: made, with its folder, and left there, empty.
        wait: for the process that holds it.

    Returns:
        whether it is held; never False with ``wait``.

    Raises:
        UserError: the file cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(file, error, AGAIN) from error
    with opened:
        held = _acquire(opened.fileno(), wait)
        try:
            yield held
        finally:
            if held:
                _release(opened.fileno())


if sys.platform == "win32":
    import msvcrt

    def _acquire(number: int, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.1)

    def _release(number: int) -> None:
        msvcrt.locking(number, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _acquire(number: int, wait: bool) -> bool:
        # Not flock: forked workers would inherit that lock, and hold it beyond the death of the process.
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _release(number: int) -> None:
        fcntl.lockf(number, fcntl.LOCK_UN)
