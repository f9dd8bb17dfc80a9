"""Tiny real datasets, planned and preprocessed once per session by nnU-Net's own commands."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# nnU-Net reads it when it is imported. It would start eight processes for each of its pools.
os.environ.setdefault("nnUNet_def_n_proc", "1")
# PyTorch reads these when it is imported. On the tests' small tensors, threads cost more than they save. Threads that
# spin while they wait take the cores from other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from method_steps import TRAINERS
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from own_process import server
from warm_commands import CAN_FORK, WarmCommands

from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.data.phantoms import PhantomDataset, write_phantom_dataset
from nnunet_ssl.testing import tiny_trainers
from nnunet_ssl.testing.short import short_trainers

# What is checked is true on a slow or busy machine too. All else is as hypothesis has it, which draws the same examples
# in every run where CI is set.
_NO_DEADLINE = "no deadline"
settings.register_profile(_NO_DEADLINE, settings(), deadline=None)
settings.load_profile(_NO_DEADLINE)

WARM = WarmCommands()
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SHORT_TRAINERS = short_trainers([nnUNetTrainer, *TRAINERS], epochs=2, iterations=3)


@dataclass
class Planned:
    """A dataset in nnU-Net's folders, with a configuration ``tiny`` that two cores train in seconds."""

    root: Path
    dataset_id: int
    raw: Path
    environment: dict[str, str]
    phantoms: PhantomDataset

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.raw.name

    def results(self, trainer: str) -> Path:
        return self.root / "results" / self.raw.name / f"{trainer}__nnUNetPlans__tiny" / "fold_0"

    def run(self, command: str, *arguments: object, check: bool = True, **environment: str):
        """Run an nnU-Net command as a user would; its output is shown when it fails."""
        script = Path(sysconfig.get_path("scripts")) / command
        done = subprocess.run(
            [str(script), *map(str, arguments)],
            env={**self.environment, **environment},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert not check or done.returncode == 0, f"{command} {arguments}:\n{done.stdout[-6000:]}"
        return done


def run_warm(command: str, arguments: Sequence[object], *, environment: dict[str, str], folder: Path) -> None:
    """Run a command of nnU-Net where PyTorch is imported already, or where that cannot be, as a user would."""
    log = folder / "log.txt"
    if CAN_FORK:
        code = WARM(command, arguments, environment=environment, folder=folder, log=log)
    else:
        with log.open("w") as output:
            run = [str(Path(sysconfig.get_path("scripts")) / command), *map(str, arguments)]
            code = subprocess.call(run, env=environment, cwd=folder, stdout=output, stderr=output)
    assert code == 0, f"{command} {arguments}:\n{log.read_text()[-6000:]}"


def nnunet_environment(root: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    environment |= {name: str(root / name.removeprefix("nnUNet_")) for name in NNUNET_FOLDERS}
    environment["nnUNet_extTrainer"] = os.pathsep.join([str(trainers_folder()), str(root / "trainers")])
    # Worker processes for two cores.
    environment |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return environment


def plan_tiny(root: Path, dataset_id: int, *, two_d: bool) -> Planned:
    raw = root / "raw" / f"Dataset{dataset_id:03d}_Phantoms"
    shape = (1, 40, 44) if two_d else (20, 32, 36)
    patch_size = [24, 24] if two_d else [12, 16, 20]
    phantoms = write_phantom_dataset(
        raw, labeled=3, unlabeled=4, validation=2, test=1, seed=7, shape=shape, two_d=two_d
    )
    return plan(Planned(root, dataset_id, raw, nnunet_environment(root), phantoms), two_d=two_d, patch_size=patch_size)


def plan(planned: Planned, *, two_d: bool, patch_size: list[int]) -> Planned:
    """Plan and preprocess; add the configuration ``tiny`` and the short trainers."""
    (planned.root / "trainers").mkdir()
    (planned.root / "trainers" / "short.py").write_text(SHORT_TRAINERS)
    parent = "2d" if two_d else "3d_fullres"
    arguments = ("-d", planned.dataset_id, "-c", parent, "-np", 1, "-npfp", 1)
    run_warm("nnUNetv2_plan_and_preprocess", arguments, environment=planned.environment, folder=planned.root)
    plans_file = planned.preprocessed / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    architecture = plans["configurations"][parent]["architecture"]
    dim = 2 if two_d else 3
    architecture["arch_kwargs"] |= {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "kernel_sizes": [[3] * dim] * 3,
        "strides": [[1] * dim, [2] * dim, [2] * dim],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }
    plans["configurations"]["tiny"] = {
        "inherits_from": parent,
        "patch_size": patch_size,
        "batch_size": 2,
        "architecture": architecture,
    }
    plans_file.write_text(json.dumps(plans))
    return planned


@pytest.fixture(scope="session", autouse=True)
def end_of_warm_commands() -> Iterator[None]:
    """End the server of commands with the session."""
    yield
    WARM.close()


@pytest.fixture
def environment(monkeypatch) -> None:
    """For trainers in processes that inherit this one's environment: one worker for each loader."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    for name in NNUNET_FOLDERS:
        monkeypatch.setenv(name, "set by make_trainer, and restored here")


@pytest.fixture(scope="session")
def planned_3d(tmp_path_factory) -> Planned:
    return plan_tiny(tmp_path_factory.mktemp("nnunet_3d"), 998, two_d=False)


@pytest.fixture(scope="session")
def planned_2d(tmp_path_factory) -> Planned:
    return plan_tiny(tmp_path_factory.mktemp("nnunet_2d"), 997, two_d=True)


@pytest.fixture(scope="session", params=["3d", pytest.param("2d", marks=pytest.mark.slow)])
def planned_left_atrium(tmp_path_factory, request) -> Planned:
    """The left-atrium data, for a checkout that has it beside it: 8 labeled, 4 validation, 56 unlabeled cases."""
    raw = request.config.rootpath.parent / "shared" / "data" / "Dataset901_LeftAtrium"
    if not raw.is_dir():
        pytest.skip(f"{raw} is not there")
    root = tmp_path_factory.mktemp(f"left_atrium_{request.param}")
    (root / "raw").mkdir()
    (root / "raw" / raw.name).symlink_to(raw)
    splits = json.loads((raw / "splits_final.json").read_text())[0]
    unlabeled = sorted(file.name.removesuffix("_0000.nii.gz") for file in (raw / "imagesUn").iterdir())
    splits["val"] = splits["val"][:4]
    cases = PhantomDataset(raw, tuple(splits["train"]), tuple(unlabeled), tuple(splits["val"]), (), {"left_atrium": 1})
    planned = Planned(root, 901, root / "raw" / raw.name, nnunet_environment(root), cases)
    # Few cases with few patches each: predicting them takes most of the time.
    two_d = request.param == "2d"
    plan(planned, two_d=two_d, patch_size=[80, 96] if two_d else [40, 56, 64])
    splits_file = planned.preprocessed / "splits_final.json"
    splits_file.unlink()  # a copy of a file that may be read-only
    splits_file.write_text(json.dumps([splits]))
    return planned


@pytest.fixture(autouse=True)
def pools_start_quickly(monkeypatch):
    """Processes that nnU-Net and this package spawn in a test are forked from one that has imported PyTorch.

    As spawned ones, they have nothing of this process but what is sent to them. Commands in processes of their own
    spawn.
    """
    if CAN_FORK:
        monkeypatch.setattr(multiprocessing, "get_context", _context)


_get_context = multiprocessing.get_context


def _context(method: str | None = None):
    return server() if method == "spawn" else _get_context(method)


@pytest.fixture
def made():
    """Trainers of the tiny plans in 2D."""
    with ExitStack() as opened:
        yield lambda method, **options: opened.enter_context(tiny_trainers(method, **({"dim": 2} | options)))()
