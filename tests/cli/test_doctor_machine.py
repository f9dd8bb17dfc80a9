"""``nnunet-ssl doctor`` on versions, memory, time and trainers."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from doctor_dataset import Dataset, add_trainer, made, report
from method_steps import of_methods
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli import doctor, training_checks
from nnunet_ssl.cli.lookup import find_trainer
from nnunet_ssl.cli.main import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainer.memory import trainer_of_plans
from nnunet_ssl.trainer.step_time import seconds_per_step


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    return made(tmp_path, monkeypatch)


def test_versions() -> None:
    required = [
        "no-such-package>=1.0",
        "numpy>=9999.1",
        "torch>=1.0",
        'no-such-extra>=1; extra == "test"',
        'no-such-system>=1; sys_platform == "elsewhere"',
    ]
    missing, old, good = map(str, doctor.check_versions(required))
    assert missing == "FAIL  no-such-package is not installed: pip install 'no-such-package>=1.0'"
    assert old.startswith("FAIL  numpy ") and "does not fit: pip install 'numpy>=9999.1'" in old
    assert good.startswith("ok    Python 3.") and ", torch " in good


def _install(folder: Path, name: str, version: str, *lines: str) -> None:
    installed = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    installed.mkdir()
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
    (installed / "METADATA").write_text("\n".join(metadata))


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.8.1", "ok"), ("2.10.0+cu128", "ok"), ("2.8.1rc1", "ok"), ("2.8.1a0+5f2", "ok"), ("2.8", "FAIL")],
)
def test_version_numbers(version: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "an-example", version)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert next(doctor.check_versions(["an-example>=2.8.1"])).level == level


def test_required_versions_are_those_of_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "nnunet-ssl", "9", "Requires-Dist: numpy>=9999.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (old,) = [finding for finding in doctor.check_versions() if finding.level != "ok"]
    assert old.level == "FAIL" and "numpy>=9999.1" in old.text


def test_a_checkout_that_is_not_installed_gets_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [folder for folder in sys.path if not list(Path(folder or ".").glob("nnunet_ssl-*.*-info"))]
    monkeypatch.setattr(sys, "path", found)
    warning, good = doctor.check_versions()
    assert warning.level == "warn" and "nnunet-ssl is not installed" in warning.text
    assert good.level == "ok" and good.text.startswith("Python 3.")


def test_the_estimate_follows_the_settings(dataset: Dataset) -> None:
    def estimate(**settings: Any) -> list[float]:
        dataset.plans["configurations"]["2d"] |= {"patch_size": [320, 320], "semi_supervised": settings}
        dataset.write()
        (line,) = [line for line in report("-d", "7", "-c", "2d") if "estimate of a step's" in line]
        assert f"(batches of 4 + {settings.get('unlabeled_batch_size', 4)})" in line
        return [float(number) for number in re.findall(r"(\d+\.\d) GB", line)]

    supervised, split, stacked = estimate()
    assert 0.1 <= supervised <= split < stacked
    more = estimate(unlabeled_batch_size=12)
    assert more[0] == supervised and more[1] > 1.5 * split and more[2] > 1.5 * stacked


@of_methods("trainer", fast=1)
def test_the_estimate_of_every_trainer_changes_nothing(
    dataset: Dataset, trainer: type, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(dataset.home.rglob("*"))
    assert main(["doctor", "-d", "7", "-c", "2d", "-tr", trainer.__name__]) == 0
    text = capsys.readouterr().out
    assert re.search(
        rf"ok    estimate of .*: nnUNetTrainer \d\.\d GB, {trainer.__name__} split .*\(batches of 4 \+ 4\)", text
    )
    assert sorted(dataset.home.rglob("*")) == before, "no folder either"


@of_methods("trainer", fast=1)
def test_a_step_of_every_trainer_is_timed_and_changes_nothing(
    dataset: Dataset, trainer: type, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(dataset.home.rglob("*"))
    call = ["doctor", "-d", "7", "-c", "2d", "-tr", f"{trainer.__name__}_5epochs", "--time", "-device", "cpu"]
    assert main(call) == 0
    assert re.search(
        rf"ok    a step of {trainer.__name__}_5epochs takes \d+\.\d\d s on cpu: \d+\.\d min per epoch of 250 steps, "
        r"\d+\.\d h for 5 epochs,",
        capsys.readouterr().out,
    )
    assert sorted(dataset.home.rglob("*")) == before, "no folder either"


@pytest.mark.parametrize("name", ["nnUNetTrainer", "MeanTeacherTrainer"])
def test_the_first_step_does_not_count(dataset: Dataset, name: str) -> None:
    slept: list[float] = []

    class Slow(find_trainer(name)):  # type: ignore[misc]
        def train_step(self, batch: dict) -> dict:
            slept.append(0.3 if slept else 3.0)
            time.sleep(slept[-1])
            return super().train_step(batch)

    plans = PlansManager(dataset.plans)
    seconds = seconds_per_step(trainer_of_plans(Slow, plans, "2d", dataset.dataset_json), steps=3)
    assert 0.3 <= seconds < 1.2 and len(slept) == 4


def test_a_trainer_without_an_estimate_is_no_failure(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_trainer(
        tmp_path / "trainers",
        "Unfinished",
        monkeypatch,
        "from nnunet_ssl.api import SemiSupervisedTrainer\nclass Unfinished(SemiSupervisedTrainer):\n    pass\n",
    )
    lines = report("-d", "7", "-c", "2d", "-tr", "Unfinished")
    assert [line for line in lines if line.startswith("warn  no estimate of the GPU memory of Unfinished")]
    assert not [line for line in lines if line.startswith("FAIL")]


def test_a_mistake_of_a_method_is_a_failure_said_once(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_trainer(
        tmp_path / "trainers",
        "Unweighted",
        monkeypatch,
        "from nnunet_ssl.methods.mean_teacher import MeanTeacherTrainer\n"
        "class Unweighted(MeanTeacherTrainer):\n"
        "    def loss_weights(self, progress):\n        return {'supervised': 1.0}\n",
    )
    lines = report("-d", "7", "-c", "2d", "-tr", "Unweighted", "--time")
    (line,) = (line for line in lines if "has no weight" in line)
    assert line.startswith("FAIL  The term 'consistency' has no weight")
    assert not [line for line in lines if "no estimate" in line or "no time" in line]


@pytest.mark.parametrize(
    ("free", "level", "expected"),
    [(50.0, "ok", "stacked should fit into 50.0 GB"), (0.0, "warn", "-gpu_memory_target")],
)
def test_every_gpu_is_judged(
    dataset: Dataset, free: float, level: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_checks, "gpus", lambda: [(f"GPU {index}, Example", free, 80.0) for index in range(2)])
    lines = [line for line in report("-d", "7", "-c", "2d") if line.startswith(f"{level:<4}  GPU") and expected in line]
    assert [line.split()[2] for line in lines] == ["0,", "1,"]


def test_gpus_are_listed_or_their_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_checks, "gpus", lambda: [("GPU 0, Example", 10.0, 12.0)])
    lines = [str(finding) for finding in training_checks.check_device()]
    assert lines == ["ok    GPU 0, Example: 10.0 of 12.0 GB free"]
    monkeypatch.setattr(training_checks, "gpus", list)
    (finding,) = training_checks.check_device()
    assert finding.level == "warn" and "-device cpu" in finding.text


def test_find_trainer_says_who_did_not_find_it(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="nnU-Net does not find the trainer Absent"):
        find_trainer("Absent")


def test_a_trainer_that_is_not_found_comes_with_those_there_are(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"CrosMatchTrainer\. Did you mean CrossMatchTrainer\? .* has BCPTrainer, .*UniMatch"
    ):
        find_trainer("CrosMatchTrainer")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    with pytest.raises(UserError) as error:
        find_trainer("CrossMatchTrainer")
    assert 'export nnUNet_extTrainer="$(nnunet-ssl trainers)"' in str(error.value)
    assert "The trainers there: BCPTrainer, " in str(error.value)
    (tmp_path / "Broken.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"CrossMatchTrainer \(ModuleNotFoundError: .*no_such_module"):
        find_trainer("CrossMatchTrainer")


def test_a_network_that_cannot_be_trained_is_found(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_trainer(
        tmp_path / "trainers",
        "PrimusCrossMatchTrainer",
        monkeypatch,
        "from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer\n"
        "from nnunet_ssl.methods.crossmatch import CrossMatchTrainer\n"
        "class PrimusCrossMatchTrainer(CrossMatchTrainer):\n"
        "    build_network_architecture = staticmethod(nnUNet_Primus_S_Trainer.build_network_architecture)\n",
    )
    dataset.plans["configurations"]["2d"]["patch_size"] = [16, 32, 48]  # nnU-Net's Primus is a 3D network
    dataset.write()
    lines = report("-d", "7", "-c", "2d", "-tr", "PrimusCrossMatchTrainer")
    (line,) = [line for line in lines if line.startswith("FAIL")]
    assert "make a Primus" in line and "PlainConvUNet and ResidualEncoderUNet" in line
    assert not any("estimate" in line for line in lines)
