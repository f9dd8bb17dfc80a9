"""An exported model on a machine without this package: nnU-Net's own commands, in an environment of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from method_steps import BY_NAME

from nnunet_ssl.methods.simcvd import SimCVDTrainer

FOLDS = (0, 1)


class OtherMachine:
    """A virtual environment with all that is installed here but this package, and nnU-Net folders of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = home / "environment"
        venv.create(environment, with_pip=False, symlinks=os.name != "nt")
        self.scripts = environment / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.scripts / f"python{sysconfig.get_config_var('EXE')}"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site_packages = Path(subprocess.check_output([str(self.python), "-I", "-c", where], text=True).strip())
        for here in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
            for entry in Path(here).iterdir():
                # The package, its metadata, and what an editable installation leaves.
                if "nnunet_ssl" in entry.name.replace("-", "_") or entry.name == "__pycache__":
                    continue
                if not (site_packages / entry.name).exists():
                    (site_packages / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
        ours = ("nnUNet", "PYTHON", "VIRTUAL_ENV")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        # Packages in the user's home folder would come into every environment.
        self.environment |= {"PYTHONNOUSERSITE": "1", "nnUNet_compile": "f"}
        # As many threads as here: sums in another order would be rounded differently.
        self.environment["nnUNet_def_n_proc"] = "1"
        for name in ("raw", "preprocessed", "results"):
            (home / name).mkdir()
            self.environment[f"nnUNet_{name}"] = str(home / name)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *map(str, command)],
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def nnunet(self, name: str, *arguments: object) -> str:
        """Run a command of nnU-Net by a script such as pip makes of the package's metadata."""
        (command,) = entry_points(group="console_scripts", name=name)
        script = self.scripts / f"{name}.py"
        # Guarded, because worker processes import it.
        script.write_text(
            f"import sys\nfrom {command.module} import {command.attr}\n"
            f"if __name__ == '__main__':\n    sys.exit({command.attr}())\n"
        )
        done = self.run(script, *arguments)
        assert done.returncode == 0, f"{name} {arguments}:\n{done.stdout[-6000:]}"
        return done.stdout


@pytest.fixture
def other_machine(tmp_path) -> OtherMachine:
    try:
        machine = OtherMachine(tmp_path / "elsewhere")
    except (OSError, NotImplementedError) as error:
        pytest.skip(f"no virtual environment of links can be made here: {error}")
    missing = machine.run("-c", "import nnunet_ssl")
    assert missing.returncode != 0 and "No module named 'nnunet_ssl'" in missing.stdout
    return machine


TEST_OPTIONS = ("-f", *FOLDS, "-device", "cpu", "-npp", 1, "-nps", 1, "--save_probabilities")


def train(planned, trainer: str) -> Path:
    for fold in FOLDS:
        # Another test of the session may have trained it.
        if not (planned.results(trainer).parent / f"fold_{fold}" / "checkpoint_final.pth").is_file():
            planned.run("nnUNetv2_train", planned.dataset_id, "tiny", fold, "-tr", trainer, "-device", "cpu")
    return planned.results(trainer).parent


def predict_here(planned, trainer: str, output: Path, **environment: str) -> None:
    planned.run(
        "nnUNetv2_predict", "-d", planned.dataset_id, "-i", planned.raw / "imagesTs", "-o", output, "-c", "tiny",
        "-tr", trainer, *TEST_OPTIONS, **environment,
    )  # fmt: skip


def export(planned, trainer: str, output: Path, *options: str) -> None:
    command = [sys.executable, "-m", "nnunet_ssl.cli.main", "export", "-d", planned.dataset_id, "-c", "tiny"]
    command += ["-tr", trainer, "-f", *FOLDS, "-o", output, *options]
    subprocess.run([*map(str, command)], env=planned.environment, cwd=planned.root, check=True, timeout=600)


def predict_there(machine: OtherMachine, planned, archive: Path, output: Path) -> None:
    machine.nnunet("nnUNetv2_install_pretrained_model_from_zip", archive)
    machine.nnunet(
        "nnUNetv2_predict", "-d", planned.raw.name, "-i", planned.raw / "imagesTs", "-o", output, "-c", "tiny",
        "-tr", "nnUNetTrainer", *TEST_OPTIONS,
    )  # fmt: skip


def probabilities(planned, folder: Path) -> np.ndarray:
    (case,) = planned.phantoms.test
    return np.load(folder / f"{case}.npz")["probabilities"]


def assert_same_voxels(planned, first: Path, second: Path) -> None:
    (case,) = planned.phantoms.test
    images = [sitk.ReadImage(folder / f"{case}.nii.gz") for folder in (first, second)]
    assert np.array_equal(*map(sitk.GetArrayFromImage, images))
    assert images[0].GetSpacing() == images[1].GetSpacing() and images[0].GetOrigin() == images[1].GetOrigin()
    # Labels alone could agree by chance: after few steps there may be background everywhere.
    assert np.array_equal(probabilities(planned, first), probabilities(planned, second))


def let_the_teacher_predict(model: Path, planned, monkeypatch) -> None:
    """Replace the weights that predict by the teacher's, as the training network gives them."""
    for name, value in planned.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(model.parents[1]))
    for file in model.glob("fold_*/checkpoint_final.pth"):
        checkpoint = torch.load(file, weights_only=True)
        arguments = {**checkpoint["init_args"], "device": torch.device("cpu")}
        arguments["plans"] = {**arguments["plans"], "continue_training": False}
        trainer = SimCVDTrainer(**arguments)
        trainer.load_checkpoint(str(file))
        torch.save({**checkpoint, "network_weights": trainer.training_network.teacher.stock().state_dict()}, file)


@pytest.mark.slow
def test_student_and_teacher_predict_the_same_voxels_elsewhere(planned_3d, other_machine, tmp_path, monkeypatch):
    trainer = "SimCVDTrainer_short"
    model = train(planned_3d, trainer)
    predict_here(planned_3d, trainer, tmp_path / "student")
    export(planned_3d, trainer, tmp_path / "student.zip")
    predict_there(other_machine, planned_3d, tmp_path / "student.zip", tmp_path / "student_there")
    assert_same_voxels(planned_3d, tmp_path / "student", tmp_path / "student_there")

    changed = tmp_path / "results" / planned_3d.raw.name / model.name
    shutil.copytree(model, changed)
    let_the_teacher_predict(changed, planned_3d, monkeypatch)
    predict_here(planned_3d, trainer, tmp_path / "teacher", nnUNet_results=str(tmp_path / "results"))
    export(planned_3d, trainer, tmp_path / "teacher.zip", "--weights", "teacher")
    predict_there(other_machine, planned_3d, tmp_path / "teacher.zip", tmp_path / "teacher_there")
    assert_same_voxels(planned_3d, tmp_path / "teacher", tmp_path / "teacher_there")
    student, teacher = (probabilities(planned_3d, tmp_path / name) for name in ("student", "teacher"))
    assert not np.array_equal(student, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [f"{name}_short" for name in BY_NAME if name != SimCVDTrainer.__name__])
def test_other_trainers_predict_the_same_voxels_elsewhere(trainer, planned_3d, other_machine, tmp_path):
    train(planned_3d, trainer)
    predict_here(planned_3d, trainer, tmp_path / "here")
    export(planned_3d, trainer, tmp_path / "model.zip")
    predict_there(other_machine, planned_3d, tmp_path / "model.zip", tmp_path / "there")
    assert_same_voxels(planned_3d, tmp_path / "here", tmp_path / "there")
