"""nnU-Net's own commands with every trainer, as a user runs them: train, stop, go on, validate, predict, export.

    python benchmarks/commands.py -d 901 -c 3d_small -o FOLDER -device cuda --jobs 12

Needs a dataset that is planned and preprocessed, its unlabeled images too. Each trainer trains 4 epochs of 10
iterations: it is stopped after two, goes on with --c, validates, predicts the first case on the device and on the CPU,
and a method is exported and predicts again from the exported model by nnU-Net alone. Each command is named as soon as
it has ended; FOLDER/commands.md has the table and FOLDER/logs what the commands printed. Nothing is written into
nnUNet_results.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from common import method_names, trainer_class, where
from gpu_rows import SUPERVISED
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.files import write_text
from nnunet_ssl.testing.short import short_trainers

EPOCHS, STOP_AFTER, STOPPED = 4, 2, 75  # the last: an exit code that no error has
HEAD = ["trainer", "memory mode", "compiled", "finite losses", "Dice", "device = CPU", "export = CPU", "s", "failed"]


@dataclass
class Trial:
    """All commands of one trainer, and what became of them."""

    args: argparse.Namespace
    trainer: str
    folder: Path
    case: Path
    row: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, str]:
        """Every command in turn; the first that fails ends it."""
        start = time.monotonic()
        try:
            self._train()
            on_device, on_cpu = self._predict(self.args.device), self._predict("cpu")
            self.row["device = CPU"] = f"{np.mean(on_device == on_cpu):.4f}"
            if not self.trainer.startswith(SUPERVISED):
                self.row["export = CPU"] = f"{np.mean(self._export() == on_cpu):.4f}"
        except RuntimeError as error:
            self.row["failed"] = str(error)
        self.row["s"] = f"{time.monotonic() - start:.0f}"
        return self.row

    def _train(self) -> None:
        dataset, configuration, device = self.args.d, self.args.c, self.args.device
        command = ["nnUNetv2_train", dataset, configuration, self.args.f, "-tr", self.trainer, "-device", device]
        self._command("train", *command, code=STOPPED, environment={"STOP_AFTER_EPOCHS": str(STOP_AFTER)})
        log = self._command("go on", *command, "--c")
        losses = re.findall(r"train_loss (\S+)", self._training_log())
        self.row["finite losses"] = f"{sum(np.isfinite(list(map(float, losses))))} of {EPOCHS}"
        self.row["Dice"] = "".join(re.findall(r"Mean Validation Dice:\s*([0-9.]+|nan)", log)[-1:])[:6]
        self.row["memory mode"] = "".join(re.findall(r"Memory mode: (\w+)", self._training_log())[-1:])
        self.row["compiled"] = "yes" if "Using torch.compile" in log else "no"

    def _training_log(self) -> str:
        logs = self.folder.rglob("training_log*.txt")
        return "\n".join(log.read_text(encoding="utf-8") for log in sorted(logs))

    @property
    def _model(self) -> list[str]:
        return ["-d", self.args.d, "-c", self.args.c, "-tr", self.trainer, "-f", self.args.f]

    def _predict(self, device: str) -> np.ndarray:
        return self._segmentation("nnUNetv2_predict", device, *self._model)

    def _export(self) -> np.ndarray:
        model = self.folder / "exported"
        self._command("export", "nnunet-ssl", "export", *self._model, "-o", str(model))
        model = next(model.rglob("plans.json")).parent
        # Where the exported model is used, there is no nnUNet_extTrainer.
        command = ["-m", str(model), "-f", self.args.f]
        return self._segmentation("nnUNetv2_predict_from_modelfolder", "cpu", *command, folders="")

    def _segmentation(self, command: str, device: str, *model: str, folders: str | None = None) -> np.ndarray:
        environment = {} if folders is None else {"nnUNet_extTrainer": folders}
        output = self.folder / f"{command}_{device}"
        options = ["-i", str(self.case), "-o", str(output), *model, "-device", device, "-npp", "1", "-nps", "1"]
        self._command(output.name, command, *options, "--disable_tta", environment=environment)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(next(output.glob("*.nii.gz")))))

    def _command(self, step: str, *command: str, code: int = 0, environment: dict[str, str] | None = None) -> str:
        """What the command printed.

        Raises:
            RuntimeError: it did not end with ``code``.
        """
        start = time.monotonic()
        log = self.args.output / "logs" / f"{self.trainer}-{step.replace(' ', '-')}.log"
        own = {"nnUNet_results": str(self.folder), "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            ended = subprocess.run(
                command, env=os.environ | own | (environment or {}), stdout=file, stderr=file, check=False
            )
        print(f"{self.trainer}, {step}: {time.monotonic() - start:.0f} s", flush=True)
        text = log.read_text(encoding="utf-8", errors="replace")
        if ended.returncode != code:
            last = (text.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"{step} ended with {ended.returncode}: {last}")
        return text


def main() -> None:
    """Run from the command line."""
    args = _arguments()
    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    images = Path(str(nnUNet_raw)) / maybe_convert_to_dataset_name(args.d) / "imagesTr"
    image = min(images.iterdir())
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(temporary)
        (folder / "case").mkdir()
        for channel in images.glob(image.name.replace("_0000.", "_*.")):
            (folder / "case" / channel.name).symlink_to(channel)
        os.environ["nnUNet_extTrainer"] = str(_short_trainers(folder / "trainers", args.tr))
        trials = [Trial(args, f"{name}_short", folder / name, folder / "case") for name in args.tr]
        for trial in trials:
            trial.folder.mkdir()
        running = {pool.submit(trial.run): trial for trial in trials}
        for done in as_completed(running):
            name = running[done].trainer.removesuffix("_short")
            rows[name] = {"trainer": name, **done.result()}
            print(", ".join(f"{key} {value}" for key, value in rows[name].items()), flush=True)
            write_text(args.output / "commands.md", _table(args, [rows[name] for name in args.tr if name in rows]))
    print("\n" + (args.output / "commands.md").read_text(encoding="utf-8"))
    if failed := [name for name, row in rows.items() if "failed" in row]:
        raise SystemExit(f"{len(failed)} of {len(rows)} trainers failed: {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="output", type=Path, required=True, help="folder for the table and logs")
    parser.add_argument("-d", required=True, help="dataset id or name, preprocessed")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-tr", nargs="+", help="trainers (default: nnUNetTrainer and all methods)")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"])
    parser.add_argument("--jobs", type=int, default=1, help="trainers at a time (default: 1)")
    args = parser.parse_args()
    args.output, args.tr = args.output.resolve(), args.tr or [SUPERVISED, *method_names()]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU here; -device cpu does all of it on the CPU")
    return args


def _short_trainers(folder: Path, names: list[str]) -> Path:
    """A folder of trainers that train for a few iterations."""
    folder.mkdir()
    text = short_trainers(map(trainer_class, names), epochs=EPOCHS, iterations=10, stopped=STOPPED)
    (folder / "short_trainers.py").write_text(text, encoding="utf-8")
    return folder


def _table(args: argparse.Namespace, rows: list[dict[str, str]]) -> str:
    command = " ".join(["python", "benchmarks/commands.py", *sys.argv[1:]])
    table = format_table(HEAD, [[row.get(name, "") for name in HEAD] for row in rows], style="markdown")
    return f"# nnU-Net's commands with every trainer, {args.device}\n\n    {command}\n\n{where()}\n\n{table}\n"


if __name__ == "__main__":
    main()
