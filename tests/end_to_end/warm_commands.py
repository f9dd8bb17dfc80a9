"""nnU-Net's own console commands, each in a process of its own that is forked from one with the imports done.

Importing PyTorch and nnU-Net takes longer than the tiny trainings do. Reads a JSON object per line,
``{"command": ..., "arguments": [...], "environment": {...}, "log": file}``, and answers each with an exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib.metadata import entry_points

import nnunetv2.evaluation.find_best_configuration
import nnunetv2.experiment_planning.plan_and_preprocess_entrypoints
import nnunetv2.inference.predict_from_raw_data
import nnunetv2.postprocessing.remove_connected_components
import nnunetv2.run.run_training  # noqa: F401

COMMANDS = {entry.name: entry for entry in entry_points(group="console_scripts") if entry.name.startswith("nnUNetv2_")}


def run(command: str, arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Run a command in a forked process and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [command, *arguments]
        COMMANDS[command].load()()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        print(stop, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
