"""nnU-Net's own console commands, each in a process of its own that is forked from one with the imports done.

Importing PyTorch takes longer than the tiny datasets and trainings do. The server reads a JSON object per line,
``{"command": ..., "arguments": [...], "environment": {...}, "folder": folder, "log": file}``, and answers each with an
exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

CAN_FORK = hasattr(os, "fork")

IMPORTS = (
    "torch._dynamo",
    "batchgenerators.dataloading.multi_threaded_augmenter",
    "batchgeneratorsv2.transforms.base.basic_transform",
    "dynamic_network_architectures.architectures.unet",
    "blosc2",
    "matplotlib.pyplot",
    "nibabel",
    "seaborn",
    "SimpleITK",
    "skimage.transform",
)


class WarmCommands:
    """Runs commands in forks of a server, which it starts for the first one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self, command: str, arguments: Sequence[object], *, environment: dict[str, str], folder: Path, log: Path
    ) -> int:
        """The command's exit code; what it prints is in the log."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {
            "command": command,
            "arguments": list(map(str, arguments)),
            "environment": environment,
            "folder": str(folder),
            "log": str(log),
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            assert self._server.stdin is not None
            # Not the end of the file: a forked process that is left over still has the pipe open.
            print(file=self._server.stdin, flush=True)
            self._server.wait()


def run(entry: EntryPoint, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> int:
    """Run a command in a forked process and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [entry.name, *arguments]
        _fork_workers()
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


def _fork_workers() -> None:
    """nnU-Net spawns the workers that preprocess and export, which import everything again; here they are forked."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]


def main() -> None:
    """Import what the commands need, once, and answer requests. nnU-Net reads its folders when it is imported later."""
    for name in IMPORTS:
        importlib.import_module(name)
    assert not any(name.startswith(("nnunetv2.", "nnunet_ssl.")) for name in sys.modules)
    commands = {one.name: one for one in entry_points(group="console_scripts") if one.name.startswith("nnUNetv2_")}
    gc.freeze()  # a collection in a forked process would write to, and so copy, all that is shared with this one
    while line := sys.stdin.readline().strip():
        request = json.loads(line)
        print(run(commands[request.pop("command")], **request), flush=True)


if __name__ == "__main__":
    main()
