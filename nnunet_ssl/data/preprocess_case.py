"""One case of imagesUn: read, checked and preprocessed by nnU-Net's own preprocessor, then put in its place.

The record is removed first and written last, so a case that was cut off at any moment is simply done again.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.data.image_checks import (
    BadImageError,
    LabeledImages,
    check_image,
    direction_of,
    direction_warnings,
    read_image,
)
from nnunet_ssl.data.leak_guard import image_signature
from nnunet_ssl.data.raw_cases import RawCase
from nnunet_ssl.data.records import CASE_FILES, PreprocessedFolder, describe_files, source_files
from nnunet_ssl.files import flush_to_disk, replacing
from nnunet_ssl.text import one_line


@dataclass(frozen=True)
class CaseJob:
    """What all cases have in common. It travels to the worker processes, so it is plain data.

    Attributes:
        plans: nnU-Net's.
        configuration: one of their configurations.
        dataset_json: nnU-Net's description of the dataset.
        labeled: what the labeled images are like.
        place: where cases and records go.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    labeled: LabeledImages
    place: PreprocessedFolder


def preprocess_case(job: CaseJob, case: RawCase) -> tuple[dict[str, Any], bool]:
    """Preprocess one case and put it in place. Whatever is wrong with it ends up in its record.

    Returns:
        the record, and whether it was made now.
    """
    earlier = job.place.valid_record(case)
    if earlier is not None:
        # Another run has done it in the meantime.
        return earlier, False
    record_file = job.place.record_file(case.identifier)
    # In the folder's own file system, so that files move at once or not at all.
    options: dict[str, Any] = {
        "prefix": job.place.temporary_prefix,
        "dir": job.place.folder.parent,
        "ignore_cleanup_errors": True,
    }
    try:
        record_file.unlink(missing_ok=True)
        # Taken before reading: a file that changes meanwhile is done again next time.
        sources = describe_files(source_files(case))
        for file in case.images:
            if file.exists() and not file.is_file():
                # Opening a pipe would wait for ever.
                raise OSError(f"{file.name} is not a regular file")
            file.open("rb").close()
        with tempfile.TemporaryDirectory(**options) as folder:
            try:
                record = make_case(job, case, Path(folder))
                for ending in CASE_FILES:
                    Path(folder, case.identifier + ending).replace(job.place.folder / f"{case.identifier}{ending}")
            except BadImageError as problem:
                record = failed_record(str(problem))
                job.place.remove(case.identifier)
            record |= job.place.provenance(sources)
            # On the disk first: after a power cut a record must not be empty, nor stand next to an empty image.
            with replacing(record_file, aside=Path(folder, record_file.name), durable=True) as written:
                written.write_text(json.dumps(record), encoding="utf-8")
    except MemoryError:
        record = failed_record("memory ran out; use fewer processes (-np)")
    except Exception as error:
        # A full disk or missing permissions: nothing is recorded, so the next run tries again.
        record = failed_record(f"could not be read or stored: {one_line(error)}")
    return record, True


def failed_record(reason: str) -> dict[str, Any]:
    """The record of a case that cannot be used."""
    return {"status": "failed", "reason": reason}


def make_case(job: CaseJob, case: RawCase, folder: Path) -> dict[str, Any]:
    """Read, check and preprocess; nnU-Net's files are in the folder afterwards.

    Returns:
        what its record says of it.
    """
    plans_manager = PlansManager(job.plans)
    configuration = plans_manager.get_configuration(job.configuration)
    # nnU-Net's readers and preprocessors print; lines of many processes would tear up the progress bar.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        reader = plans_manager.image_reader_writer_class()
        image, properties = read_image(reader, case.images)
        lines = printed.getvalue().splitlines()
        warnings = [line.removeprefix("WARNING").lstrip("! ") for line in lines if line.startswith("WARNING")]
        spacing = [float(size) for size in properties["spacing"]]
        intensities = check_image(image, spacing, labeled=job.labeled)
        warnings += direction_warnings(direction_of(reader, case.images[0]), job.labeled)
        try:
            image, segmentation, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
                image, None, properties, plans_manager, configuration, job.dataset_json
            )
        except MemoryError:
            raise
        except Exception as error:
            raise BadImageError(f"nnU-Net's preprocessing failed: {one_line(error)}") from error
    image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise BadImageError("the preprocessed image has NaN or infinite voxels")
    _save(folder / case.identifier, image, segmentation.astype(np.int16, copy=False), properties, configuration)
    return {
        "status": "ok",
        "warnings": warnings,
        "spacing": spacing,
        "intensities": intensities,
        "signature": image_signature(image),
    }


def _save(
    target: Path,
    image: np.ndarray,
    segmentation: np.ndarray,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
) -> None:
    patch_size = tuple(configuration.patch_size)
    blocks, chunks = comp_blosc2_params(image.shape, patch_size, image.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(segmentation.shape, patch_size, segmentation.itemsize)
    nnUNetDatasetBlosc2.save_case(
        image,
        segmentation,
        properties,
        str(target),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=chunks_seg,
        blocks_seg=blocks_seg,
    )
    for ending in CASE_FILES:
        flush_to_disk(target.with_name(target.name + ending))
