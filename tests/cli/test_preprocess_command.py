from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import run_warm

from nnunet_ssl.cli.main import main

PLANS = "nnUNetPlans_3d_fullres"
SEPARATE_PROCESS = [sys.executable, "-m", "nnunet_ssl.cli.main", "preprocess"]


def write_image(file: Path, seed: int, size: int = 24) -> None:
    rng = np.random.default_rng(seed)
    image = rng.uniform(50, 100, (size - 4, size, size)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[4:-4, 6:-6, 6:-6] = 1
    image += 50 * label
    file.parent.mkdir(parents=True, exist_ok=True)
    for array, name in ((image, file), (label, file.parents[1] / "labelsTr" / file.name.replace("_0000", ""))):
        if name.parent.is_dir() or name == file:
            written = sitk.GetImageFromArray(array)
            written.SetSpacing((1.0, 1.0, 1.5))
            sitk.WriteImage(written, str(name))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_raw and nnUNet_preprocessed with a dataset that nnU-Net's own command planned and preprocessed."""
    root = tmp_path_factory.mktemp("command")
    raw = root / "raw" / "Dataset007_Tiny"
    (raw / "labelsTr").mkdir(parents=True)
    for number in range(3):
        write_image(raw / "imagesTr" / f"L{number}_0000.nii.gz", number)
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "box": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    (root / "preprocessed").mkdir()
    arguments = ("-d", 7, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    run_warm("nnUNetv2_plan_and_preprocess", arguments, environment=environment(root), folder=root)
    return root


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"),
    }


@pytest.fixture
def root(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the planned dataset, in nnU-Net's environment variables, with an empty imagesUn."""
    copied = shutil.copytree(planned, tmp_path / "copy")
    for name, value in environment(copied).items():
        monkeypatch.setenv(name, value)
    (copied / "raw" / "Dataset007_Tiny" / "imagesUn").mkdir()
    return copied


def images(root: Path) -> Path:
    return root / "raw" / "Dataset007_Tiny" / "imagesUn"


def preprocessed(root: Path, name: str) -> Path:
    return root / "preprocessed" / "Dataset007_Tiny" / name


def read(file: Path) -> np.ndarray:
    return blosc2.open(str(file), mode="r")[:]


def test_result_equals_nnunets_own_and_bad_cases_make_exit_code_1(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(root / "raw/Dataset007_Tiny/imagesTr/L1_0000.nii.gz", images(root) / "copy_0000.nii.gz")
    (images(root) / "bad_0000.nii.gz").write_bytes(b"no image")
    (images(root) / "nameless.nii.gz").write_bytes(b"")
    assert main(["preprocess", "-d", "7", "-np", "0"]) == 1
    out = capsys.readouterr().out
    assert f"{PLANS}_unlabeled: 1 ready (1 preprocessed now), 0 removed, 2 failed, 0 warnings" in out
    assert "bad_0000.nii.gz is damaged" in out and "name it nameless_0000.nii.gz" in out
    np.testing.assert_array_equal(
        read(preprocessed(root, f"{PLANS}_unlabeled") / "copy.b2nd"), read(preprocessed(root, PLANS) / "L1.b2nd")
    )

    (images(root) / "bad_0000.nii.gz").unlink()
    (images(root) / "nameless.nii.gz").unlink()
    assert main(["preprocess", "-d", "Dataset007_Tiny", "-c", "3d_fullres", "-np", "0"]) == 0
    assert "1 ready (0 preprocessed now), 1 removed, 0 failed" in capsys.readouterr().out


def test_killed_command_continues_where_it_stopped(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 8
    for number in range(count):
        write_image(images(root) / f"U{number}_0000.nii.gz", 100 + number, size=64)
    records = preprocessed(root, f"{PLANS}_unlabeled_records")
    folder = preprocessed(root, f"{PLANS}_unlabeled")
    command = [*SEPARATE_PROCESS, "-d", "7", "-np", "2"]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(records.glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    # Its workers end too, at once, so after a moment nothing changes any more.
    time.sleep(1)
    finished = {file.name: file.stat().st_mtime_ns for file in records.glob("*.json")}
    assert 2 <= len(finished) < count, "the command has to be killed while it is running"
    time.sleep(1)
    assert {file.name for file in records.glob("*.json")} == set(finished)

    assert main(["preprocess", "-d", "7", "-np", "0"]) == 0
    assert f"{count} ready ({count - len(finished)} preprocessed now)" in capsys.readouterr().out
    for name, stamp in finished.items():
        assert (records / name).stat().st_mtime_ns == stamp
    assert len(list(folder.iterdir())) == 3 * count
    # What the killed workers were at stays for a day, at most a case each.
    assert len(list(folder.parent.glob(f"{PLANS}_unlabeled_tmp*"))) <= 2
    continued = {file.name: read(file) for file in folder.glob("*.b2nd")}

    shutil.rmtree(folder)
    shutil.rmtree(records)
    assert main(["preprocess", "-d", "7", "-np", "0"]) == 0
    assert sorted(continued) == sorted(file.name for file in folder.glob("*.b2nd"))
    for name, image in continued.items():
        np.testing.assert_array_equal(read(folder / name), image)


def test_parts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_image(images(root) / f"U{number}_0000.nii.gz", number + 50)
    for part, ready in (("0", 2), ("1", 1)):
        assert main(["preprocess", "-d", "7", "-np", "0", "--num-parts", "2", "--part-id", part]) == 0
        assert f"{ready} ready ({ready} preprocessed now)" in capsys.readouterr().out
    assert len(list(preprocessed(root, f"{PLANS}_unlabeled").iterdir())) == 9


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-d", "8"], "contains no dataset 8; planned datasets there: Dataset007_Tiny."),
        (["-d", "nonsense"], "planned datasets there: Dataset007_Tiny."),
        (["-d", "7", "-p", "nnUNetResEncUNetMPlans"], "plans there: nnUNetPlans."),
        (["-d", "7", "-c", "3d_fullres", "3d_lowres"], "no configuration 3d_lowres; it has: 2d, 3d_fullres."),
        (["-d", "7", "-np", "-1"], "0 or more"),
        (["-d", "7", "--num-parts", "2", "--part-id", "2"], "Part 2 of 2 does not exist"),
        (["-d", "7"], "imagesUn is empty"),
    ],
)
def test_mistakes_are_explained(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["preprocess", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_missing_folders_are_explained(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images(root).rmdir()
    assert main(["preprocess", "-d", "7"]) == 2
    assert f"There is no folder {images(root)}" in capsys.readouterr().err
    (images(root).parent / "imagesUnlabeled").mkdir()
    assert main(["preprocess", "-d", "7"]) == 2
    assert "has imagesUnlabeled, which nothing reads: unlabeled images belong in imagesUn." in capsys.readouterr().err
    monkeypatch.setenv("nnUNet_preprocessed", str(root / "nowhere"))
    assert main(["preprocess", "-d", "7"]) == 2
    assert "nowhere, which is no folder" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_raw")
    assert main(["preprocess", "-d", "7"]) == 2
    assert "nnUNet_raw is not set" in capsys.readouterr().err


def test_without_preprocessed_labeled_cases_a_configuration_must_be_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(preprocessed(root, PLANS))
    write_image(images(root) / "U0_0000.nii.gz", 9)
    assert main(["preprocess", "-d", "7", "-np", "0"]) == 2
    assert "Choose one with -c; the plans have: 2d, 3d_fullres." in capsys.readouterr().err
    assert main(["preprocess", "-d", "7", "-np", "0", "-c", "2d"]) == 0


def test_an_image_of_another_ending_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(images(root) / "U0_0000.nii.gz", 9)
    write_image(images(root) / "U0_0000.nii", 9)
    assert main(["preprocess", "-d", "7", "-np", "0"]) == 1
    printed = capsys.readouterr().out
    assert "1 ready (1 preprocessed now), 0 removed, 1 failed" in printed
    assert "failed   U0_0000.nii  it does not end in .nii.gz as the images of this dataset do" in printed
    assert (preprocessed(root, f"{PLANS}_unlabeled") / "U0.b2nd").is_file()


def test_plans_without_what_preprocessing_reads(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(images(root) / "U0_0000.nii.gz", 9)
    file = root / "preprocessed" / "Dataset007_Tiny" / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    del plans["configurations"]["3d_fullres"]["normalization_schemes"]
    file.write_text(json.dumps(plans))
    assert main(["preprocess", "-d", "7", "-np", "0", "-c", "3d_fullres"]) == 2
    error = capsys.readouterr().err
    assert "Configuration '3d_fullres' of the plans nnUNetPlans has no normalization_schemes, which nnU-Net" in error
