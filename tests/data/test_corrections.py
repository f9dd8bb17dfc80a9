"""Segmentations as people's viewers write them."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from small_disk import can_limit_files, small_disk

from nnunet_ssl.data.corrections import Correction, LabelValues, find_corrections, read_correction, write_labels
from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.data.raw_cases import RawCase
from nnunet_ssl.data.splits import add_labeled

SHAPE = (4, 5, 6)
SPACING, ORIGIN = (0.8, 0.9, 2.5), (-12.25, 30.5, 7.0)
TURNED = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
VALUES = LabelValues({"organ": 1, "tumor": 2}, {0, 1, 2}, None)
LABELS = (np.arange(120) % 3).reshape(SHAPE)


def itk_image(array: np.ndarray, *, vector: bool = False) -> sitk.Image:
    image = sitk.GetImageFromArray(array, isVector=vector)
    if image.GetDimension() == 3:
        image.SetSpacing(SPACING)
        image.SetOrigin(ORIGIN)
        image.SetDirection(TURNED)
    return image


@pytest.fixture
def case(tmp_path) -> RawCase:
    file = tmp_path / "case_0000.nii.gz"
    sitk.WriteImage(itk_image(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)), str(file))
    return RawCase("case", (file,))


def read(case: RawCase, file: Path, values: LabelValues = VALUES, *, reader=None, allow_empty: bool = False):
    return read_correction(reader or SimpleITKIO(), Correction(case, file), values, allow_empty=allow_empty)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_voxel_types_and_formats(case, tmp_path, ending, kind) -> None:
    file = tmp_path / f"corrected{ending}"
    sitk.WriteImage(itk_image(LABELS.astype(kind)), str(file))
    labels, image, properties = read(case, file)
    assert (labels == LABELS).all() and image.shape == (1, *SHAPE)
    stored = tmp_path / "stored.nii.gz"
    assert write_labels(SimpleITKIO(), labels, stored, properties) == [stored]
    written, like = sitk.ReadImage(str(stored)), sitk.ReadImage(str(case.images[0]))
    assert (sitk.GetArrayFromImage(written) == LABELS).all() and written.GetPixelID() == sitk.sitkUInt8
    for what in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, what)() == getattr(like, what)()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_is_what_is_stored(case, tmp_path, data) -> None:
    """Whatever labels, type and format, and however header values were rounded."""
    most = data.draw(st.sampled_from([2, 255, 40000]))
    seed = data.draw(st.integers(0, 1000))
    labels = np.random.default_rng(seed).integers(0, most + 1, SHAPE)
    labels[0, 0, 0] = most
    kind = data.draw(st.sampled_from([np.uint16, np.int32, np.float64]))
    ending = data.draw(st.sampled_from([".nii.gz", ".nrrd", ".mha"]))
    written = itk_image(labels.astype(kind))
    rounded = st.floats(-5e-4, 5e-4)
    written.SetSpacing([value + data.draw(rounded) * min(SPACING) for value in SPACING])
    written.SetOrigin([value + data.draw(rounded) for value in ORIGIN])
    sitk.WriteImage(written, str(tmp_path / f"drawn{ending}"))
    values = LabelValues({"many": list(range(1, most + 1))}, range(most + 1), None)
    found, _, properties = read(case, tmp_path / f"drawn{ending}", values)
    assert (found == labels).all()
    write_labels(SimpleITKIO(), found, tmp_path / "stored.nii.gz", properties)
    assert (SimpleITKIO().read_seg(str(tmp_path / "stored.nii.gz"))[0][0] == labels).all()


def moved(image: sitk.Image, *, spacing=SPACING, origin=ORIGIN, direction=TURNED) -> sitk.Image:
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def overlapping(file: Path) -> None:
    sitk.WriteImage(itk_image(np.stack([LABELS == 1, LABELS == 2], axis=-1).astype(np.uint8), vector=True), str(file))


def of_four_dimensions(times: int) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        array = np.stack([LABELS.T] * times, axis=-1).astype(np.uint8)
        affine = np.diag([*SPACING, 1.0])
        nibabel.save(nibabel.Nifti1Image(array, affine), file)

    return write


def with_voxels_elsewhere(text: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        (file.parent / "secret.raw").write_bytes(LABELS.astype(np.uint8).tobytes())
        file.write_text(text)

    return write


def cut_off(file: Path) -> None:
    sitk.WriteImage(itk_image(LABELS.astype(np.uint8)), str(file))
    file.write_bytes(file.read_bytes()[:-20])


def slicer(names: dict[str, int]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        image = itk_image(LABELS.astype(np.uint8))
        for number, (name, value) in enumerate(names.items()):
            image.SetMetaData(f"Segment{number}_Name", name)
            image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        sitk.WriteImage(image, str(file))

    return write


def plain(array: np.ndarray, **changes) -> Callable[[Path], None]:
    return lambda file: sitk.WriteImage(moved(itk_image(array), **changes), str(file))


NRRD = (
    "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 6 5 4\nencoding: raw\nspace: left-posterior-superior\n"
    "space directions: (0.8,0,0) (0,0.9,0) (0,0,2.5)\nspace origin: (0,0,0)\ndata file: secret.raw\n"
)
MHA = (
    "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n"
    "ElementDataFile = secret.raw\n"
)
UINT8 = LABELS.astype(np.uint8)
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cropped": (".nii.gz", plain(UINT8[1:]), r"is not on the grid of its image: size \(3, 5, 6\) is not \(4, 5, 6\)"),
    "spacing": (".nii.gz", plain(UINT8, spacing=(0.8, 0.9, 2.6)), "spacing"),
    "origin": (".nii.gz", plain(UINT8, origin=(-12.25, 30.5, 7.1)), "origin"),
    "flipped": (".mha", plain(UINT8, direction=(0, -1, 0, -1, 0, 0, 0, 0, 1)), "direction"),
    "value": (".nii.gz", plain(UINT8 + (UINT8 == 2) * np.uint8(5)), r"the value\(s\) 7, .*\(organ 1, tumor 2\)"),
    "negative": (".nii.gz", plain(LABELS.astype(np.int16) - 1), r"the value\(s\) -1"),
    "half": (".nii.gz", plain(LABELS / 2.0), "not whole numbers"),
    "nan": (".nii.gz", plain(np.where(LABELS, LABELS, np.nan)), "NaN"),
    "nan_nrrd": (".nrrd", plain(np.where(LABELS, LABELS, np.nan)), "not whole numbers"),
    "empty": (".nii.gz", plain(UINT8 * 0), "--allow-empty"),
    "overlapping": (".seg.nrrd", overlapping, "2 values each"),
    "vectors": (".nii.gz", overlapping, "2 values each"),
    "four_dimensions": (".nii.gz", of_four_dimensions(2), "2 values for each voxel"),
    "nrrd_elsewhere": (".nrrd", with_voxels_elsewhere(NRRD), "says that its voxels are in another file"),
    "mha_elsewhere": (".mha", with_voxels_elsewhere(MHA), "says that its voxels are in another file"),
    "no_image": (".nii.gz", lambda file: file.write_text("not an image"), "cannot be read|damaged"),
    "zipped_text": (".nii.gz", lambda file: file.write_bytes(gzip.compress(b"text")), "cannot be read|damaged"),
    "cut_off": (".nii.gz", cut_off, "damaged or incomplete"),
    "folder": (".nii.gz", lambda file: file.mkdir(), "is not a regular file"),
    "names": (".seg.nrrd", slicer({"Tumor": 1, "Organ": 2}), "has the value 1 for Tumor, which is 2 in dataset.json"),
}


@pytest.mark.parametrize(("ending", "write", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(case, tmp_path, ending, write, reason) -> None:
    file = tmp_path / f"corrected{ending}"
    write(file)
    with pytest.raises(BadImageError, match=reason):
        read(case, file)


def test_slicers_names_with_the_right_numbers(case, tmp_path) -> None:
    slicer({"organ": 1, "Tumor": 2, "unheard of": 3})(tmp_path / "corrected.seg.nrrd")
    assert (read(case, tmp_path / "corrected.seg.nrrd")[0] == LABELS).all()


def test_regions_and_the_ignore_label(case, tmp_path) -> None:
    values = LabelValues({"whole": [1, 2], "core": [2]}, {0, 1, 2, 3}, 3)
    file = tmp_path / "corrected.nii.gz"
    plain(np.where(LABELS == 1, 3, LABELS).astype(np.uint8))(file)
    assert set(np.unique(read(case, file, values)[0])) == {0, 2, 3}
    plain(UINT8 * 0 + 3)(file)
    with pytest.raises(BadImageError, match="contains no structure"):
        read(case, file, values)
    assert read(case, file, values, allow_empty=True)[0].min() == 3


def test_other_readers(tmp_path) -> None:
    affine = np.diag([*SPACING, 1.0])
    image = RawCase("case", (tmp_path / "image_0000.nii.gz",))
    nibabel.save(nibabel.Nifti1Image(LABELS.T * 1.5, affine), image.images[0])
    nibabel.save(nibabel.Nifti1Image(UINT8.T, affine + 1e-6), tmp_path / "case.nii.gz")
    labels, _, properties = read(image, tmp_path / "case.nii.gz", reader=NibabelIO())
    write_labels(NibabelIO(), labels, tmp_path / "stored.nii.gz", properties)
    assert (nibabel.load(tmp_path / "stored.nii.gz").get_fdata() == LABELS.T).all()
    of_four_dimensions(1)(tmp_path / "case.nii.gz")
    with pytest.raises(BadImageError, match="only 3d images"):
        read(image, tmp_path / "case.nii.gz", reader=NibabelIO())


def test_png_and_tiff_have_no_place(tmp_path) -> None:
    for reader, ending, labels in ((NaturalImage2DIO(), ".png", UINT8[:1]), (Tiff3DIO(), ".tif", UINT8)):
        spacing = {"spacing": (2.5, 0.9, 0.8)}
        reader.write_seg(labels + 1, str(tmp_path / f"image_0000{ending}"), spacing)
        if ending == ".tif":
            (tmp_path / "image_0000.json").rename(tmp_path / "image.json")
        reader.write_seg(labels, str(tmp_path / f"case{ending}"), {"spacing": (1, 1, 1)})
        (tmp_path / "case.json").unlink(missing_ok=True)
        case = RawCase("case", (tmp_path / f"image_0000{ending}",))
        found, _, properties = read(case, tmp_path / f"case{ending}", reader=reader)
        assert (found == labels).all()
        files = write_labels(reader, found, tmp_path / f"stored{ending}", properties)
        assert [file.name for file in files] == ([f"stored{ending}"] + ["stored.json"] * (ending == ".tif"))
        assert list(reader.read_seg(str(files[0]))[1]["spacing"]) == list(properties["spacing"])


# Which files a folder has


def found_in(folder: Path, *asked: str, cases=("a", "a.b", "c"), ending=".nii.gz", reader=None):
    known = [RawCase(name, (folder / f"{name}_0000{ending}",)) for name in cases]
    corrections, problems = find_corrections(folder, known, asked, reader or SimpleITKIO(), ending)
    return (
        {one.case.identifier: one.file.name for one in corrections},
        {problem.identifier: problem.reason for problem in problems},
    )


@can_limit_files
def test_a_disk_on_which_the_last_background_does_not_fit(tmp_path) -> None:
    """ITK neither tells that it could not write, nor, when it reads background instead, that a file was cut off."""
    image = sitk.GetImageFromArray(np.zeros((1, 1000, 1000), np.float32))
    sitk.WriteImage(image, str(tmp_path / "image.nii.gz"))
    _, properties = SimpleITKIO().read_images([str(tmp_path / "image.nii.gz")])
    labels = np.zeros((1, 1000, 1000), np.uint8)
    labels[0, 0, 0] = 1
    whole = tmp_path / "whole.nii.gz"
    write_labels(SimpleITKIO(), labels, whole, properties)
    with small_disk(whole.stat().st_size - 200), pytest.raises(BadImageError, match=r"Is the disk full\?"):
        write_labels(SimpleITKIO(), labels, tmp_path / "cut.nii.gz", properties)


def test_files_are_found_by_the_cases_names(tmp_path) -> None:
    for name in ("a.nii.gz", "a.b.seg.nrrd", "dataset.json", "plans.json", "c.npz", "c.pkl", ".c.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert found_in(tmp_path) == ({"a": "a.nii.gz", "a.b": "a.b.seg.nrrd"}, {})
    assert found_in(tmp_path, "a") == ({"a": "a.nii.gz"}, {})
    assert found_in(tmp_path, "a", "c") == ({"a": "a.nii.gz"}, {"c": f"there is no c.nii.gz in {tmp_path}"})


def test_files_of_no_case_are_named(tmp_path) -> None:
    for name in ("a.nii.gz", "a.nrrd", "a_0000.nii.gz", "c.mitk", "d.mha"):
        (tmp_path / name).touch()
    found, problems = found_in(tmp_path)
    assert found == {} and sorted(problems) == ["a", "a_0000", "c", "d"]
    assert problems["a"] == "it has several files: a.nii.gz, a.nrrd"
    assert problems["c"] == "c.mitk cannot be read here; save it as c.nii.gz"
    assert "imagesUn has no such case" in problems["d"] and "without _0000" in problems["a_0000"]


def test_a_reader_that_reads_nifti_alone(tmp_path) -> None:
    (tmp_path / "c.nrrd").touch()
    assert found_in(tmp_path, reader=NibabelIO())[1] == {"c": "c.nrrd cannot be read here; save it as c.nii.gz"}


# Folds

names = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(train=names, val=names, unlabeled=st.none() | names, cases=names.filter(bool))
def test_no_case_is_added_to_a_validation_list_and_none_is_lost(train, val, unlabeled, cases) -> None:
    fold = {"train": train, "val": val, "more": 1} | ({} if unlabeled is None else {"unlabeled": unlabeled})
    after = add_labeled(fold, cases)
    assert after["val"] == val and after["more"] == 1
    assert after["train"][: len(train)] == train and len(set(after["train"])) == len(after["train"])
    listed = after["train"] + after.get("unlabeled", [])
    assert set(cases) <= {*listed, *val}
    assert set(after.get("unlabeled", [])) >= set(unlabeled or []) - set(cases)
    assert not {*after["train"][len(train) :]} & {*val, *after.get("unlabeled", [])}
    if not set(unlabeled or []) - set(cases):
        assert {*cases} - {*val} <= {*after["train"]} and not after.get("unlabeled")
