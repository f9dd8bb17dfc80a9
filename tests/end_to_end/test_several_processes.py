"""``torchrun -m nnunet_ssl.torchrun``: two "machines" of one process each, on this one, over gloo."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAINER = "SimCVDTrainer_recording"

# Writes what each rank saw: cases, noise, and the student and teacher it ends with.
RECORDING = """
import hashlib
import json
from pathlib import Path

from torch import distributed as dist

from nnunet_ssl.methods.simcvd import SimCVDTrainer
from short import Short


class SimCVDTrainer_recording(Short, SimCVDTrainer):
    def on_train_start(self):
        super().on_train_start()
        self.seen = []

    def images(self, labeled, unlabeled, prepared):
        images = super().images(labeled, unlabeled, prepared)
        noise = (images["u_noisy"] - images["u"]).flatten()[:20].tolist()
        self.seen.append({"labeled": len(labeled.image), "unlabeled": unlabeled.keys, "noise": noise})
        return images

    def on_train_end(self):
        super().on_train_end()
        tensors = [*self.training_network.parameters(), *self.training_network.buffers()]
        digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
        report = {"seen": self.seen, "weights": digest, "losses": self.logger.get_value("train_losses", step=None)}
        report["losses"] = [float(loss) for loss in report["losses"]]
        Path(self.output_folder, f"rank_{dist.get_rank()}.json").write_text(json.dumps(report))
"""


def train_on_two_machines(planned, *options: str, **environment: str) -> list[subprocess.CompletedProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for rank in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "nnunet_ssl.torchrun", str(planned.dataset_id), "tiny", "0", "-tr", TRAINER, "-device", "cpu"]
        machines.append(
            subprocess.Popen(
                [*command, *options],
                env={**planned.environment, **environment},
                cwd=planned.root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [machine.communicate(timeout=600)[0] for machine in machines]
    return [
        subprocess.CompletedProcess(machine.args, machine.returncode, output)
        for machine, output in zip(machines, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def planned(planned_2d):
    (planned_2d.root / "trainers" / "recording.py").write_text(RECORDING)
    for folder in planned_2d.preprocessed.glob("*_unlabeled*"):
        for file in folder.iterdir():
            file.unlink()
    yield planned_2d
    (planned_2d.root / "trainers" / "recording.py").unlink()


@pytest.mark.slow
def test_two_machines_train_one_network(planned, tmp_path):
    first, second = train_on_two_machines(planned)
    assert first.returncode == second.returncode == 0, first.stdout[-4000:] + second.stdout[-4000:]
    # Rank 0 preprocesses and writes, the other waits.
    assert "Preprocessing 4 unlabeled case(s)" in first.stdout and "Preprocessing" not in second.stdout
    assert "Mean Validation Dice" in first.stdout and "Mean Validation Dice" not in second.stdout
    folder = planned.results(TRAINER)
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]
    # A plan's batch of 2 is 1 labeled sample for each; CutMix needs 2 unlabeled ones.
    for rank in ranks:
        assert len(rank["seen"]) == 6
        assert {(step["labeled"], len(step["unlabeled"])) for step in rank["seen"]} == {(1, 2)}
    mine, others = ([step["unlabeled"] for step in rank["seen"]] for rank in ranks)
    assert mine != others
    mine, others = ([step["noise"] for step in rank["seen"]] for rank in ranks)
    assert all(a != b for a, b in zip(mine, others, strict=True))
    # Student, teacher and its counter are the same on both.
    assert ranks[0]["weights"] == ranks[1]["weights"] and ranks[0]["losses"] == ranks[1]["losses"]

    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["current_epoch"] == 2 and not any("module." in name for name in checkpoint["network_weights"])
    planned.run(
        "nnUNetv2_predict", "-d", planned.dataset_id, "-i", planned.raw / "imagesTs", "-o", tmp_path,
        "-c", "tiny", "-f", 0, "-tr", TRAINER, "-device", "cpu", "-npp", 1, "-nps", 1,
    )  # fmt: skip
    assert (tmp_path / f"{planned.phantoms.test[0]}.nii.gz").is_file()


@pytest.mark.slow
def test_two_machines_continue_a_training_and_stop_together_at_an_error(planned):
    shutil.rmtree(planned.results(TRAINER), ignore_errors=True)
    stopped = train_on_two_machines(planned, STOP_AFTER_EPOCHS="1")
    assert all(machine.returncode != 0 for machine in stopped)
    first, second = train_on_two_machines(planned, "--c")
    assert first.returncode == second.returncode == 0, first.stdout[-4000:] + second.stdout[-4000:]
    assert "Epoch 1" in first.stdout and "Epoch 0" not in first.stdout

    (case, *_) = planned.phantoms.validation
    copy = planned.raw / "imagesUn" / "copied_0000.nii.gz"
    copy.write_bytes((planned.raw / "imagesTr" / f"{case}_0000.nii.gz").read_bytes())
    try:
        leaking = train_on_two_machines(planned)
    finally:
        copy.unlink()
    assert all(machine.returncode != 0 for machine in leaking) and "allow_transductive" in leaking[0].stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (
            ["-num_gpus", "2"],
            dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "1"),
            "--nproc-per-node",
        ),
    ],
)
def test_a_wrong_call_says_what_is_right(arguments, environment, message, planned_2d):
    done = subprocess.run(
        [sys.executable, "-m", "nnunet_ssl.torchrun", "1", "tiny", "0", *arguments],
        env={**planned_2d.environment, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_arguments_are_nnunets_own(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "-m",
            "nnunet_ssl.torchrun",
            "-device",
            "cpu",
            "-h",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert "--val_best" in done.stdout and "usage: nnUNetv2_train" in done.stdout
