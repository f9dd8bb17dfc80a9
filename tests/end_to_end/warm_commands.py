"""nnU-Net's own console commands, each in a process of its own that is forked from one with the imports done.

Importing PyTorch and nnU-Net takes longer than the tiny trainings do. Reads a JSON object per line,
``{"command": ..., "arguments": [...], "environment": {...}, "log": file}``, and answers each with an exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points


def run(entry: EntryPoint, arguments: list[str], environment: dict[str, str], log: str) -> int:
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
        sys.argv = [entry.name, *arguments]
        entry.load()()
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


def main() -> None:
    """Import what the commands need, once, and answer requests. nnU-Net's own processes do not come here."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    commands = {one.name: one for one in entry_points(group="console_scripts") if one.name.startswith("nnUNetv2_")}
    with contextlib.redirect_stdout(sys.stderr):
        for name in ("plan_and_preprocess", "train", "predict", "find_best_configuration"):
            commands[f"nnUNetv2_{name}"].load()
        # The look-up of a trainer that there is not imports all that there are.
        with contextlib.suppress(RuntimeError):
            recursive_find_trainer_class_by_name("no trainer")
    for line in sys.stdin:
        request = json.loads(line)
        print(run(commands[request.pop("command")], **request), flush=True)


if __name__ == "__main__":
    main()
