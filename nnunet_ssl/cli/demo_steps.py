"""Steps of ``nnunet-ssl demo``, each done once."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ssl.cli.lookup import find_program
from nnunet_ssl.errors import UserError


@dataclass
class Steps:
    """Runs steps, each once: a file next to its log marks it as done."""

    logs: Path
    environment: Mapping[str, str]
    total: int
    count: int = 0
    started: float = field(default=0.0)

    def announce(self, what: str) -> None:
        """Print what is done now."""
        self.count += 1
        self.started = time.monotonic()
        print(f"[{self.count}/{self.total}] {what} ...", end=" ", flush=True)

    def done(self) -> None:
        """Print how long it took."""
        print(duration(time.monotonic() - self.started), flush=True)

    def function(self, name: str, what: str, action: Callable[[], None]) -> None:
        """A step that a function of ours does."""
        self._once(name, what, lambda _log: action())

    def command(self, name: str, arguments: Sequence[str]) -> None:
        """A step that one of nnU-Net's commands does."""
        program = find_program(arguments[0])
        self._once(name, shlex.join(arguments), lambda log: self._run([program, *arguments[1:]], log))

    def _once(self, name: str, what: str, action: Callable[[Path], None]) -> None:
        self.announce(what)
        log = self.logs / f"{self.count}_{name}.log"
        marker = log.with_suffix(".done")
        if marker.is_file():
            print("already done", flush=True)
            return
        try:
            action(log)
        except BaseException:
            print("failed", flush=True)
            raise
        marker.touch()
        self.done()

    def _run(self, command: Sequence[str], log: Path) -> None:
        with log.open("w", encoding="utf-8") as output:
            finished = subprocess.run(
                command, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        if finished.returncode != 0:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise UserError(
                f"{Path(command[0]).stem} failed with exit code {finished.returncode}. The end of {log}:\n"
                + "\n".join(f"  {line}" for line in tail)
                + "\nThe same command continues with this step once the reason is removed."
            )


def duration(seconds: float) -> str:
    """For the terminal."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
