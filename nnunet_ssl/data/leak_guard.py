"""Unlabeled cases that are validation cases in disguise, and images that are there twice.

A validation image among the unlabeled ones makes the validation score optimistic without a sign. A copy may bear any
name, so preprocessed images are compared. To stay cheap for thousands of cases, a few voxels of each image are compared
first, and whole images only where these agree.
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_ssl.data.raw_cases import IMAGES_FOLDER, LABELED_IMAGES_FOLDER, RawCase
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase, ready_cases
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import some_of

Case = TypeVar("Case")

# Both tolerances are in standard deviations of the image. Two preprocessings of one image differ by rounding, and
# slightly more where normalization uses a mask that the label changes.
_SIGNATURE_TOLERANCE = 0.05
_LEAST_CORRELATION = 0.9999
_CONSTANT = 1e-6
_VOXELS_AT_ONCE = 4_000_000


def image_signature(image: Any) -> dict[str, Any]:
    """Shape and a few voxels of a preprocessed image, standardized so that a linear change of intensity has no effect.

    Args:
        image: (C, X, Y, Z), an array or one that reads from disk when sliced. Eight blocks of 2×2×2 voxels of the
            first channel are read.

    Returns:
        ``shape`` and ``values``, plain numbers for JSON.
    """
    shape = [int(size) for size in image.shape]
    starts = [(size // 3, 2 * size // 3) for size in shape[1:]]
    blocks = []
    for corner in product(*starts):
        block = (slice(0, 1), *(slice(start, start + 2) for start in corner))
        blocks.append(np.asarray(image[block], np.float64).ravel())
    values = _standardize(np.concatenate(blocks))
    return {"shape": shape, "values": [] if values is None else [round(float(value), 3) for value in values]}


def check_leaks(
    *,
    unlabeled: list[UnlabeledCase],
    labeled_folder: Path,
    train: list[str],
    val: list[str],
    allow_transductive: bool,
    log: Callable[[str], None],
) -> None:
    """Refuse unlabeled cases that are validation cases; report other duplicates.

    Two images are the same when they are equal voxel by voxel, up to rounding and a linear change of intensity.

    Args:
        unlabeled: the fold's unlabeled cases.
        labeled_folder: the preprocessed labeled cases.
        train: labeled cases the fold trains on.
        val: its validation cases. Where both lists are the same (fold "all"), there is nothing to leak.
        allow_transductive: report such cases instead of refusing them.
        log: takes one line.

    Raises:
        UserError: unlabeled cases are validation cases, and `allow_transductive` is off.
    """
    images = _Images()
    held_back = set(val) - set(train)
    # Held back first: of an image that is there twice, labeled and held back, the copy that matters must be found.
    labeled = [
        UnlabeledCase(identifier, labeled_folder, LABELED_IMAGES_FOLDER)
        for identifier in [*sorted(held_back), *sorted(train)]
    ]
    signatures = images.signatures([*unlabeled, *labeled])

    twins = copies_of(unlabeled, labeled, signatures, images.open)
    pairs = [(_pair(case, twin), twin.identifier) for case, twin in twins]
    _report_copies(pairs, held_back, allow_transductive=allow_transductive, log=log)
    twice = _duplicates(unlabeled, signatures, images)
    if twice:
        log(f"{len(twice)} unlabeled case(s) have the same image as another one: {some_of(twice)}.")


def check_image_files(
    *,
    unlabeled: Iterable[RawCase],
    labeled: Mapping[str, Path],
    train: list[str],
    val: list[str],
    allow_transductive: bool,
    log: Callable[[str], None],
) -> None:
    """As :func:`check_leaks`, of cases that are not preprocessed yet: only copied files are found.

    Args:
        unlabeled: cases of imagesUn.
        labeled: the first image file of each labeled case; what does not exist is passed over.
        train: as for :func:`check_leaks`, as are the other arguments and errors.
        val: likewise.
        allow_transductive: likewise.
        log: likewise.
    """
    by_size: dict[int, list[str]] = {}
    for name in [*sorted(set(val) - set(train)), *sorted(train)]:
        if name in labeled and labeled[name].is_file():
            by_size.setdefault(labeled[name].stat().st_size, []).append(name)
    pairs = []
    for case in unlabeled:
        image = case.images[0]
        # An empty file is no image. A dangling link is told elsewhere.
        size = image.stat().st_size if image.is_file() else 0
        alike = by_size.get(size, []) if size else []
        twin = next((name for name in alike if filecmp.cmp(image, labeled[name], shallow=False)), None)
        if twin is not None:
            pairs.append((f"{IMAGES_FOLDER}/{case.identifier} = {LABELED_IMAGES_FOLDER}/{twin}", twin))
    _report_copies(pairs, set(val) - set(train), allow_transductive=allow_transductive, log=log)


def _report_copies(
    pairs: Iterable[tuple[str, str]],
    held_back: Collection[str],
    *,
    allow_transductive: bool,
    log: Callable[[str], None],
) -> None:
    """Refuse or report unlabeled cases that have a labeled one's image.

    Args:
        pairs: in words, with the labeled case.
        held_back: labeled cases that validate and do not train.
        allow_transductive: see :func:`check_leaks`, as for what is raised.
        log: see there.
    """
    leaks: list[str] = []
    copies: list[str] = []
    for pair, twin in pairs:
        (leaks if twin in held_back else copies).append(pair)
    if leaks:
        found = (
            f"{len(leaks)} unlabeled case(s) are validation cases of this fold: {some_of(leaks)}. "
            "Training on them makes the validation score optimistic."
        )
        if not allow_transductive:
            raise UserError(
                f"{found} Remove them from {IMAGES_FOLDER} or from the fold's 'unlabeled' list, or set "
                '"semi_supervised": {"allow_transductive": true} for this configuration in the plans.'
            )
        log(f"{found} Allowed by 'allow_transductive'.")
    if copies:
        log(f"{len(copies)} unlabeled case(s) have the same image as a labeled training case: {some_of(copies)}.")


class _Images:
    """Preprocessed images, read with nnU-Net's own dataset classes."""

    def __init__(self) -> None:
        self._datasets: dict[Path, Any] = {}

    def open(self, case: UnlabeledCase) -> Any:
        """(C, X, Y, Z), reads from disk when sliced."""
        if case.folder not in self._datasets:
            folder = str(case.folder)
            self._datasets[case.folder] = infer_dataset_class(folder)(folder, [])
        return self._datasets[case.folder].load_case(case.identifier)[0]

    def signatures(self, cases: Iterable[UnlabeledCase]) -> dict[UnlabeledCase, dict[str, Any]]:
        """Signatures from the records where there are any, from the images elsewhere."""
        records: dict[Path, Mapping[str, Any]] = {}
        found: dict[UnlabeledCase, dict[str, Any]] = {}
        for case in cases:
            record: Mapping[str, Any] = {}
            if case.source == IMAGES_FOLDER:
                if case.folder not in records:
                    records[case.folder] = ready_cases(case.folder.parent, case.folder.name.removesuffix("_unlabeled"))
                record = records[case.folder].get(case.identifier, {})
            found[case] = record["signature"] if "signature" in record else image_signature(self.open(case))
        return found


def copies_of(
    cases: Sequence[Case],
    others: Sequence[Case],
    signatures: Mapping[Case, dict[str, Any]],
    read: Callable[[Case], Any],
) -> list[tuple[Case, Case]]:
    """Each case with the first of the others that is the same image.

    Args:
        cases: to look for.
        others: to compare them with.
        signatures: of all of them, see :func:`image_signature`.
        read: an image; only called where signatures agree.
    """
    by_shape: dict[tuple[int, ...], list[Case]] = {}
    for other in others:
        by_shape.setdefault(_kind(signatures[other]), []).append(other)
    values = {kind: np.array([signatures[one]["values"] for one in group]) for kind, group in by_shape.items()}
    pairs = []
    for case in cases:
        kind = _kind(signatures[case])
        if kind not in by_shape:
            continue
        distance = np.abs(values[kind] - np.array(signatures[case]["values"])).max(axis=1, initial=0.0)
        for index in np.flatnonzero(distance <= _SIGNATURE_TOLERANCE):
            other = by_shape[kind][index]
            if case == other or same_image(read(case), read(other)):
                pairs.append((case, other))
                break
    return pairs


def _duplicates(
    cases: list[UnlabeledCase], signatures: Mapping[UnlabeledCase, dict[str, Any]], images: _Images
) -> list[str]:
    """Unlabeled cases that repeat an earlier one. Reported only, so signatures have to agree to the last digit."""
    first: dict[tuple[Any, ...], UnlabeledCase] = {}
    repeated = []
    for case in cases:
        earlier = first.setdefault((_kind(signatures[case]), *signatures[case]["values"]), case)
        if earlier is not case and same_image(images.open(case), images.open(earlier)):
            repeated.append(_pair(case, earlier))
    return repeated


def _kind(signature: Mapping[str, Any]) -> tuple[int, ...]:
    """Signatures are compared within one kind: the same shape and as many values."""
    return (*signature["shape"], len(signature["values"]))


def _pair(case: UnlabeledCase, other: UnlabeledCase) -> str:
    name = f"{case.source}/{case.identifier}"
    return name if case == other else f"{name} = {other.source}/{other.identifier}"


def same_image(one: Any, other: Any) -> bool:
    """Whether two preprocessed images are equal up to rounding and a linear change of intensity.

    Args:
        one: (C, X, Y, Z), an array or one that reads from disk when sliced. It is read in slabs.
        other: likewise.
    """
    if tuple(one.shape) != tuple(other.shape):
        return False
    channels, *spatial = (int(size) for size in one.shape)
    axis = int(np.argmax(spatial))
    step = max(1, _VOXELS_AT_ONCE * spatial[axis] // int(np.prod(spatial)))
    for channel, start in product(range(channels), range(0, spatial[axis], step)):
        slab = (slice(channel, channel + 1), *[slice(None)] * axis, slice(start, start + step))
        a = _standardize(np.asarray(one[slab], np.float64).ravel())
        b = _standardize(np.asarray(other[slab], np.float64).ravel())
        if a is None and b is None:
            continue
        if a is None or b is None or np.dot(a, b) / a.size < _LEAST_CORRELATION:
            return False
    return True


def _standardize(values: np.ndarray) -> np.ndarray | None:
    """Mean 0 and standard deviation 1; None if the values are all the same."""
    centered = values - values.mean()
    deviation = centered.std()
    return None if deviation <= _CONSTANT * (1 + np.abs(values).max()) else centered / deviation
