"""Whatever a user may put there: good cases go through, bad ones are named with the reason, and nothing ends there.

Single kinds of damage have their tests beside what they test; here are many at random, through the command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from method_steps import TRAINERS
from own_process import exit_code
from tiny_dataset import PLANS, TinyDataset, read_preprocessed, voxels

from nnunet_ssl.cli.main import main
from nnunet_ssl.data import preprocessing
from nnunet_ssl.data.unlabeled_cases import ready_cases
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods.crossmatch import CrossMatchSettings
from nnunet_ssl.settings import PLANS_KEY

IDENTIFIER = "nnUNetPlans_3d_fullres"
MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@contextlib.contextmanager
def folders_of(dataset: TinyDataset) -> Iterator[None]:
    """Within, the dataset is what nnU-Net's environment variables lead to."""
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(dataset.plans))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(dataset.raw.parent))
        patch.setenv("nnUNet_preprocessed", str(dataset.preprocessed.parent))
        patch.setenv("nnUNet_results", str(dataset.root))
        yield


def preprocess(*arguments: str) -> tuple[int, str]:
    """``nnunet-ssl preprocess``; returns exit code and all that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        code = main(["preprocess", "-d", "7", "-c", "3d_fullres", "-np", "0", *arguments])
    return code, printed.getvalue()


@contextlib.contextmanager
def good_dataset() -> Iterator[TinyDataset]:
    """With one good case; hypothesis calls a test many times with the same fixtures."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = TinyDataset(Path(folder))
        dataset.add("good", voxels(0))
        with folders_of(dataset):
            yield dataset


def check(dataset: TinyDataset, identifier: str) -> tuple[bool, str]:
    """Preprocess; returns whether the case can be used, and what is said of it."""
    code, printed = preprocess()
    ready = ready_cases(dataset.preprocessed, IDENTIFIER)
    assert "good" in ready and code in (0, 1) and "Traceback" not in printed, printed
    used = identifier in ready
    assert code == (not used), printed
    lines = [line for line in printed.splitlines() if line.startswith("failed ")]
    assert len(lines) == (not used), printed
    assert used or (lines[0].split()[1] == identifier and len(lines[0].split()) > 3), printed
    assert np.isfinite(read_preprocessed(dataset.folder, "good")).all()
    if used:
        assert np.isfinite(read_preprocessed(dataset.folder, identifier)).all()
    else:
        assert not [file for file in dataset.folder.iterdir() if file.name.startswith(identifier)]
    assert not dataset.temporary()
    return used, "" if used else lines[0]


# ---- images ---------------------------------------------------------------------------------------------------------

DATATYPES = {
    2: np.uint8, 4: np.int16, 8: np.int32, 16: np.float32, 64: np.float64, 256: np.int8, 512: np.uint16,
    768: np.uint32, 1024: np.int64, 1280: np.uint64, 32: np.complex64, 1792: np.complex128,
    128: np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), 2304: np.dtype("V4"), 1536: np.dtype("V16"),
    1: np.uint8, 0: np.uint8, 9999: np.uint8,
}  # fmt: skip
SIZES = st.sampled_from([1.25, 1.0, 0.02, 5.0, 0.0, -1.25, math.nan, math.inf, 1e-9, 1e9])


def nifti(
    *,
    shape: tuple[int, ...] = (12, 11, 10),
    datatype: int = 16,
    spacing: tuple[float, ...] = (1.25, 1.25, 1.25),
    slope: float = 1.0,
    intercept: float = 0.0,
    offset: float = 352.0,
    magic: bytes = b"n+1\0",
    codes: tuple[int, int] = (1, 0),
    quaternion: tuple[float, float, float] = (0.0, 0.0, 0.0),
    rows: tuple[float, ...] = (1.25, 0, 0, 0, 0, 1.25, 0, 0, 0, 0, 1.25, 0),
    value: float | None = None,
) -> bytes:
    """A NIfTI file, whatever its header says."""
    header = nibabel.Nifti1Header()
    raw = header.structarr
    raw["dim"][0] = len(shape)
    raw["dim"][1 : 1 + len(shape)] = shape
    raw["datatype"], raw["bitpix"] = datatype, np.dtype(DATATYPES[datatype]).itemsize * 8
    raw["pixdim"][1 : 1 + len(spacing)] = spacing
    raw["scl_slope"], raw["scl_inter"], raw["vox_offset"], raw["magic"] = slope, intercept, offset, magic
    raw["qform_code"], raw["sform_code"] = codes
    raw["quatern_b"], raw["quatern_c"], raw["quatern_d"] = quaternion
    raw["srow_x"], raw["srow_y"], raw["srow_z"] = np.reshape(rows, (3, 4))
    raw["xyzt_units"] = 2
    kind, count = np.dtype(DATATYPES[datatype]), math.prod(shape)
    generator = np.random.default_rng(0)
    if kind.kind in "iuf":
        image = generator.uniform(50, 120, count).astype(kind)
        # Of the values drawn, 0 is the one that an integer can hold.
        if value is not None and count and (kind.kind == "f" or value == 0):
            image[count // 2] = value
        content = image.tobytes()
    else:
        content = generator.integers(0, 255, count * kind.itemsize, dtype=np.uint8).tobytes()
    return raw.tobytes() + bytes(4) + content


@pytest.mark.parametrize("datatype", [2, 4, 8, 16, 64, 256, 512, 768])
@pytest.mark.parametrize("shape", [(12, 11, 10), (6, 50, 3)])
def test_all_numeric_types_are_read(datatype, shape):
    with good_dataset() as dataset:
        (dataset.images / "other_0000.nii.gz").write_bytes(gzip.compress(nifti(datatype=datatype, shape=shape)))
        assert check(dataset, "other") == (True, "")


@MANY
@given(
    image=st.fixed_dictionaries(
        {},
        optional={
            "shape": st.lists(st.sampled_from([0, 1, 2, 3, 9, 14, 40]), min_size=1, max_size=5).map(tuple),
            "datatype": st.sampled_from(sorted(DATATYPES)),
            "spacing": st.tuples(SIZES, SIZES, SIZES),
            "slope": st.sampled_from([0.0, 1.0, -2.0, 1e-30, 1e30, math.nan, math.inf]),
            "intercept": st.sampled_from([0.0, -1e30, math.nan, math.inf]),
            "offset": st.sampled_from([0.0, 348.0, 352.0, 368.0, 1e9, -1.0, math.nan]),
            "magic": st.sampled_from([b"n+1\0", b"ni1\0", b"n+2\0", b"\0\0\0\0", b"abcd"]),
            "codes": st.tuples(st.integers(0, 4), st.integers(0, 4)),
            "quaternion": st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 2.0, math.nan])] * 3),
            "rows": st.tuples(*[st.sampled_from([0.0, 1.25, -1.25, 1e9, math.nan])] * 12),
            "value": st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30]),
        },
    ),
    damage=st.sampled_from([None, None, None, "cut", "flip", "not compressed", "double"]),
    where=st.floats(0, 1, exclude_max=True),
)
@example(image={"spacing": (0.02, 1.0, 1.0)}, damage=None, where=0.0)  # anisotropic, 1:50
# Thick slices, few of them: resampled to the plan, larger images would cost minutes.
@example(image={"shape": (9, 3, 3), "spacing": (50.0, 1.25, 1.25)}, damage=None, where=0.0)
@example(image={"spacing": (1e-9, 1.25, 1.25)}, damage=None, where=0.0)
@example(image={"spacing": (0.0, 1.25, 1.25)}, damage=None, where=0.0)
@example(image={"shape": (1, 1, 1)}, damage=None, where=0.0)
@example(image={"shape": (12, 11)}, damage=None, where=0.0)
@example(image={"shape": (12, 11, 1)}, damage=None, where=0.0)
@example(image={"datatype": 128}, damage=None, where=0.0)  # RGB
@example(image={"datatype": 2, "value": 1e30}, damage=None, where=0.0)
@example(image={"shape": (30000, 30000, 30000)}, damage="header alone", where=0.0)
def test_any_image(image, damage, where):
    if damage == "header alone":
        content = gzip.compress(nifti(shape=(1, 1, 1))[:352])
        header = bytearray(gzip.decompress(content))
        header[42:48] = np.array(image["shape"], np.int16).tobytes()
        content = gzip.compress(bytes(header))
    else:
        content = gzip.compress(nifti(**image), 1)
    if damage == "cut":
        content = content[: int(where * len(content))]
    elif damage == "flip":
        position = int(where * len(content))
        content = content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
    elif damage == "not compressed":
        content = gzip.decompress(content)
    elif damage == "double":
        content = gzip.compress(content)
    with good_dataset() as dataset:
        (dataset.images / "other_0000.nii.gz").write_bytes(content)
        used, _ = check(dataset, "other")
        event("used" if used else "refused")
        if not image and damage is None:
            assert used
        if damage == "cut":
            assert not used


# ---- names ----------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 200 and not name.endswith("_seg")
)


@settings(MANY, max_examples=60)
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
@example(names=["a b", "a.b", "a..b", " lead", "trail "])
@example(names=["a", "A", "ä", "a\u0308", "患者"])
@example(names=["[a-z]+(.*)$", "a|b", "\\d", "^", "*", "?"])
@example(names=["--help", "-d", "a_0000", "a_0000_0001", "{x}", "%s", "a\nb", "a\tb"])
@example(names=["C:\\x", "a:b", "a;b", "$(x)", "`x`", "'", '"'])
def test_any_name(names):
    with good_dataset() as dataset:
        for number, name in enumerate(names):
            dataset.add("written", voxels(number + 1))
            (dataset.images / "written_0000.nii.gz").rename(dataset.images / f"{name}_0000.nii.gz")
        code, printed = preprocess()
        assert code == 0, printed
        assert set(ready_cases(dataset.preprocessed, IDENTIFIER)) == {"good", *names}
        contents = {read_preprocessed(dataset.folder, name).tobytes() for name in names}
        assert len(contents) == len(names), "each has its own image"


def test_a_name_that_is_no_text_is_a_problem_of_that_case():
    with good_dataset() as dataset:
        dataset.add("written", voxels(1))
        try:
            (dataset.images / "written_0000.nii.gz").rename(dataset.images / os.fsdecode(b"\xff_0000.nii.gz"))
        except OSError:
            pytest.skip("this file system has no such names")
        code, printed = preprocess()
        assert code == 1 and list(ready_cases(dataset.preprocessed, IDENTIFIER)) == ["good"]
        assert "\\udcff" in printed and "rename" in printed
        printed.encode()


def test_names_that_the_file_system_takes_for_one(monkeypatch):
    """That it takes them for two, as here, is in test_any_name."""
    monkeypatch.setattr(preprocessing, "_one_file", lambda job, name, other: {name, other} == {"ScanÄ", "scana\u0308"})
    with good_dataset() as dataset:
        for name in ("ScanÄ", "scana\u0308", "CASE", "case"):
            dataset.add("written", voxels(1))
            (dataset.images / "written_0000.nii.gz").rename(dataset.images / f"{name}_0000.nii.gz")
        for _ in range(2):  # nothing is removed or done again the next time
            code, printed = preprocess()
            assert code == 1 and "1 failed" in printed, printed
            assert "replace those of ScanÄ" in printed and "rename" in printed
            assert list(ready_cases(dataset.preprocessed, IDENTIFIER)) == ["CASE", "ScanÄ", "case", "good"]
        assert "(0 preprocessed now)" in printed


# ---- files and folders ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links(tmp_path):
    with good_dataset() as dataset:
        elsewhere = tmp_path / "elsewhere.nii.gz"
        dataset.add("linked", voxels(1))
        (dataset.images / "linked_0000.nii.gz").rename(elsewhere)
        (dataset.images / "linked_0000.nii.gz").symlink_to(elsewhere)
        (dataset.images / "circle_0000.nii.gz").symlink_to(dataset.images / "circle_0000.nii.gz")
        code, printed = preprocess()
        assert code == 1 and list(ready_cases(dataset.preprocessed, IDENTIFIER)) == ["good", "linked"]
        assert "failed   circle" in printed
        before = elsewhere.read_bytes()
        (dataset.images / "linked_0000.nii.gz").unlink()
        preprocess()
        assert elsewhere.read_bytes() == before


def test_a_folder_and_a_pipe_in_the_place_of_an_image():
    with good_dataset() as dataset:
        (dataset.images / "folder_0000.nii.gz").mkdir()
        assert preprocess()[0] == 0
        if hasattr(os, "mkfifo"):
            os.mkfifo(dataset.images / "pipe_0000.nii.gz")
            code, printed = preprocess()
            assert code == 1 and "failed   pipe" in printed


def test_empty_folder():
    with good_dataset() as dataset:
        (dataset.images / "good_0000.nii.gz").unlink()
        code, printed = preprocess()
        assert code == 2 and "imagesUn is empty" in printed and "named as in imagesTr" in printed


def _with_permissions_checked() -> None:
    """The command, without root's right to read and write everything."""
    if os.geteuid() == 0:
        header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, rights) == 0
        for index in (0, 1):  # effective, permitted; CAP_DAC_OVERRIDE is 1, CAP_DAC_READ_SEARCH is 2
            rights[index] &= ~0b110
        assert libc.capset(header, rights) == 0
    sys.exit(main(["preprocess", "-d", "7", "-c", "3d_fullres", "-np", "0"]))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' capabilities")
@pytest.mark.parametrize("what", ["folder", "image"])
def test_without_permission(what, tmp_path):
    with good_dataset() as dataset:
        dataset.add("secret", voxels(1))
        locked = dataset.images / "secret_0000.nii.gz" if what == "image" else dataset.preprocessed
        locked.chmod(0o500 if what == "folder" else 0)
        code, output = exit_code(_with_permissions_checked, log=tmp_path / "log")
        locked.chmod(0o700)
        assert "Permission denied" in output and "Traceback" not in output, output
        if what == "image":
            assert code == 1 and list(ready_cases(dataset.preprocessed, IDENTIFIER)) == ["good"], output
        else:
            assert code == 2 and str(dataset.preprocessed) in output, output


# ---- nnU-Net's JSON files -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(MANY, max_examples=60)
@given(
    file=st.sampled_from(["nnUNetPlans.json", "dataset.json"]),
    data=st.data(),
    kind=st.sampled_from(["drop", "replace"]),
)
def test_any_damage_to_plans_and_dataset(file, data, kind):
    with good_dataset() as dataset:
        path = dataset.preprocessed / file
        content = json.loads(path.read_text())
        key = data.draw(st.sampled_from(sorted(content)))
        if kind == "drop":
            del content[key]
        else:
            content[key] = data.draw(JSON)
        path.write_text(json.dumps(content))
        code, printed = preprocess()
        assert "Traceback" not in printed and code in (0, 1, 2), printed
        event(f"exit code {code}")
        if kind == "drop" and key in ("configurations", "transpose_forward", "file_ending", "labels"):
            assert code == 2 and repr(key) in printed and "nnUNetv2_plan_and_preprocess -d 7" in printed, printed


@pytest.mark.parametrize("file", ["nnUNetPlans.json", "dataset.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100000, b'"text"'])
def test_files_that_are_no_table(file, content):
    with good_dataset() as dataset:
        (dataset.preprocessed / file).write_bytes(content)
        code, printed = preprocess()
        assert code == 2 and str(dataset.preprocessed / file) in printed, printed


def test_plans_of_an_older_nnunet():
    """The network was in entries of its own, which nnU-Net converts; version 1 had other plans."""
    with good_dataset() as dataset:
        configuration = dataset.plans["configurations"]["3d_fullres"]
        del configuration["architecture"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 32,
            "unet_max_num_features": 320,
            "n_conv_per_stage_encoder": [2, 2],
            "n_conv_per_stage_decoder": [2],
            "num_pool_per_axis": [1, 1, 1],
            "conv_kernel_sizes": [[3, 3, 3]] * 2,
            "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        }
        (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(dataset.plans))
        assert preprocess()[0] == 0
        old = {"num_stages": 1, "plans_per_stage": {}, "modalities": {"0": "MRI"}}
        (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(old))
        code, printed = preprocess()
        assert code == 2 and "'dataset_name'" in printed and "nnU-Net v2" in printed


@settings(MANY, max_examples=200)
@given(
    kind=st.sampled_from([trainer.settings_class for trainer in TRAINERS]),
    data=st.data(),
    value=JSON,
)
def test_any_setting(kind, data, value):
    names = [*kind().as_dict(), "ramp_lenght", ""]
    name = data.draw(st.sampled_from(names))
    configuration: dict[str, Any] = {**PLANS["configurations"]["3d_fullres"], PLANS_KEY: {name: value}}
    try:
        made = kind.from_plans(configuration)
    except UserError as error:
        assert repr(name) in str(error) or name in str(error)
        event("refused")
    else:
        event("taken")
        assert made.as_dict()[name] == value
        json.dumps(made.as_dict(), allow_nan=False)


@settings(MANY, max_examples=100)
@given(value=JSON)
def test_settings_that_are_no_table(value):
    configuration: dict[str, Any] = {PLANS_KEY: value}
    try:
        CrossMatchSettings.from_plans(configuration)
    except UserError as error:
        assert PLANS_KEY in str(error)
    else:
        assert value == {}
