"""A new dataset that is there as a whole or not at all.

It is built in hidden folders, which nnU-Net does not look into::

    nnUNet_raw/.nnunet_ssl_new/DATASET             becomes nnUNet_raw/DATASET
    nnUNet_preprocessed/.nnunet_ssl_new/DATASET    becomes nnUNet_preprocessed/DATASET

Two renames make it, the one in nnUNet_raw last. What a kill leaves, be it between the two, the next run removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import AGAIN, list_names, lock

FOLDER = ".nnunet_ssl_new"


@dataclass(frozen=True)
class NewDataset:
    """A dataset in the making.

    Attributes:
        raw: its folder in nnUNet_raw, for now.
        preprocessed: its folder in nnUNet_preprocessed, for now.
    """

    raw: Path
    preprocessed: Path


@contextmanager
def new_dataset(raw: Path, preprocessed: Path, results: Path | None, name: str, *, record: str) -> Iterator[NewDataset]:
    """Make a dataset: the block fills its folders, which get their names when it ends.

    If the block raises anything, nothing is left.

    Args:
        raw: nnUNet_raw.
        preprocessed: nnUNet_preprocessed.
        results: nnUNet_results, if it is known.
        name: ``DatasetXXX_Name``, with a number that no dataset has.
        record: a file that the block writes into both folders, alike, and that no other dataset has so. By it a dataset
            is known of which a kill has left one half.

    Raises:
        UserError: another run makes a dataset here, the number is taken, or something cannot be written.
    """
    with lock(preprocessed / f"{FOLDER}.lock", wait=False) as held:
        if not held:
            raise UserError(
                f"Another command is making a dataset in {preprocessed} right now. Run this again when it has ended."
            )
        _clear_up(raw, preprocessed, record)
        start = name[: len("Dataset000")]
        for root in filter(None, (raw, preprocessed, results)):
            if taken := sorted(one for one in list_names(root) if one.startswith(start)):
                raise UserError(f"There is {root / taken[0]} already. Choose another number for the new dataset.")
        made = NewDataset(raw / FOLDER / name, preprocessed / FOLDER / name)
        try:
            made.raw.mkdir(parents=True)
            made.preprocessed.mkdir(parents=True)
            yield made
            _commit(made, raw / name, preprocessed / name)
        except OSError as error:
            file = error.filename2 or error.filename or "a file"
            raise UserError(f"Nothing was made, because of {file}: {error.strerror or error}. {AGAIN}") from error
        finally:
            for root in (raw, preprocessed):
                shutil.rmtree(root / FOLDER, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """Both renames go through this function."""
    source.rename(target)


def _commit(made: NewDataset, raw: Path, preprocessed: Path) -> None:
    rename(made.preprocessed, preprocessed)
    try:
        rename(made.raw, raw)
    except BaseException:
        if not raw.exists():
            rename(preprocessed, made.preprocessed)
        raise


def _clear_up(raw: Path, preprocessed: Path, record: str) -> None:
    """Remove what a killed run has left.

    Raises:
        UserError: a folder is a link.
    """
    for root in (raw, preprocessed):
        if (root / FOLDER).is_symlink():
            raise UserError(f"{root / FOLDER} is a link, and files would be removed where it leads. Remove the link.")
    for name in list_names(raw / FOLDER):
        half = preprocessed / name
        if not (raw / name).exists() and _same(raw / FOLDER / name / record, half / record):
            # A kill must not leave a half of this half that cannot be known any more.
            (preprocessed / FOLDER).mkdir(exist_ok=True)
            half.rename(preprocessed / FOLDER / name)
    for root in (raw, preprocessed):
        shutil.rmtree(root / FOLDER, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.read_bytes() == other.read_bytes()
    return False
