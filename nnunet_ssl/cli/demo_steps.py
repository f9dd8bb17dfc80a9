"""Steps of ``nnunet-ssl demo``, each done once."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnunet_ssl.cli.lookup import find_program
from nnunet_ssl.errors import UserError

_POLL_SECONDS = 0.2
# Far longer than a command takes to end, with its workers.
_END_SECONDS = 30.0
# Yields while a command runs.
_Waits = Generator[None, None, None]
_REPEAT = "The same command continues with this step once the reason is removed."
# nnU-Net's log has it once per epoch.
_EPOCH_ENDED = b"Epoch time:"


@dataclass
class Steps:
    """Runs steps, each once: a file next to its log marks it as done.

    Attributes:
        logs: folder of the logs.
        environment: of nnU-Net's commands.
        total: number of steps.
        count: number of the last step that began.
    """

    logs: Path
    environment: Mapping[str, str]
    total: int
    count: int = 0

    @contextlib.contextmanager
    def with_progress(self, what: str) -> Iterator[None]:
        """A step that is done each time and draws its own progress, which would erase a line that it began."""
        self.count += 1
        started = time.monotonic()
        yield
        _write(f"{self._label(self.count, what)} ... {duration(time.monotonic() - started)}")

    def function(self, name: str, what: str, action: Callable[[], None]) -> None:
        """A step that a function of ours does."""
        self._once(name, what, lambda _log: action())

    def command(self, name: str, arguments: Sequence[str]) -> None:
        """A step that one of nnU-Net's commands does."""

        def run(log: Path) -> None:
            with contextlib.closing(self._run(arguments, log)) as waits:
                for _ in waits:
                    time.sleep(_POLL_SECONDS)

        self._once(name, shlex.join(arguments), run)

    def chains(self, chains: Sequence[Mapping[str, Sequence[str]]], *, at_once: int, epochs: int) -> None:
        """Steps that nnU-Net's commands do, one after the other within a chain.

        Where a command fails, the other chains go on to their ends.

        Args:
            chains: for each chain, a command's arguments by the name of its step.
            at_once: how many chains run at the same time.
            epochs: how many epochs a chain trains.

        Raises:
            UserError: a command failed.
        """
        logs: list[Path] = []
        waiting = []
        for chain in chains:
            steps = [(self.count + position, name, chain[name]) for position, name in enumerate(chain, 1)]
            self.count += len(chain)
            logs += [self._log(number, name) for number, name, _ in steps]
            waiting.append(self._in_turn(steps))
        failures: list[UserError] = []
        # Steps that begin again would count twice, and steps that are done have taken no time now.
        for log in logs:
            if not _marker(log).is_file():
                log.unlink(missing_ok=True)
        with contextlib.ExitStack() as at_the_end, _progress(epochs * len(chains), _epochs_in(logs)) as bar:
            running: list[_Waits] = []
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(at_the_end.enter_context(contextlib.closing(waiting.pop(0))))
                for one in list(running):
                    try:
                        next(one)
                    except StopIteration:
                        running.remove(one)
                    except UserError as failure:
                        running.remove(one)
                        failures.append(failure)
                bar.n = _epochs_in(logs)
                bar.refresh()
                time.sleep(_POLL_SECONDS)
        if failures:
            raise UserError("\n".join(str(failure) for failure in failures))

    def _in_turn(self, steps: Sequence[tuple[int, str, Sequence[str]]]) -> _Waits:
        """Run commands one after the other; it yields while one runs."""
        for number, name, arguments in steps:
            log, label = self._log(number, name), self._label(number, shlex.join(arguments))
            if _marker(log).is_file():
                _write(f"{label} ... already done")
                continue
            started = time.monotonic()
            try:
                yield from self._run(arguments, log)
                _marker(log).touch()
            except OSError as error:
                _write(f"{label} ... failed")
                raise _failed(shlex.join(arguments), error) from error
            except UserError:
                _write(f"{label} ... failed")
                raise
            _write(f"{label} ... {duration(time.monotonic() - started)}")

    def _once(self, name: str, what: str, action: Callable[[Path], None]) -> None:
        self.count += 1
        started = time.monotonic()
        print(f"{self._label(self.count, what)} ...", end=" ", flush=True)
        log = self._log(self.count, name)
        if _marker(log).is_file():
            print("already done", flush=True)
            return
        try:
            action(log)
            _marker(log).touch()
        except OSError as error:
            print("failed", flush=True)
            raise _failed(what, error) from error
        except BaseException:
            print("failed", flush=True)
            raise
        print(duration(time.monotonic() - started), flush=True)

    def _run(self, arguments: Sequence[str], log: Path) -> _Waits:
        """Run a command; it yields while the command runs, and ends the command where it is closed."""
        command = [find_program(arguments[0]), *arguments[1:]]
        with (
            log.open("w", encoding="utf-8") as output,
            subprocess.Popen(
                command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A process group of its own, which holds its workers too: they would outlive a command that is killed.
                start_new_session=True,
            ) as process,
        ):
            try:
                while process.poll() is None:
                    yield
            finally:
                _end(process)
        if process.returncode != 0:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise UserError(
                f"{Path(arguments[0]).stem} {_how(process.returncode)}. The end of {log}:\n"
                + "\n".join(f"  {line}" for line in tail)
                + f"\n{_REPEAT}"
            )

    def _label(self, number: int, what: str) -> str:
        return f"[{number}/{self.total}] {what}"

    def _log(self, number: int, name: str) -> Path:
        return self.logs / f"{number}_{name}.log"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and the end of the terminal raise SystemExit: no command goes on behind the user's back."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]
    # What nohup has made it ignore stays ignored.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that may still run, and its workers: nnU-Net's go on for ever where the command is killed."""
    _terminate(process)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Workers of our trainers leave SIGTERM to their training as long as that lives.
    _terminate(process)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.terminate()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)


def _how(code: int) -> str:
    """How a command ended."""
    if code == -9:
        return "was killed by SIGKILL, as the system does where memory runs out"
    if code < 0:
        return f"was killed by signal {-code}"
    return f"failed with exit code {code}"


def _failed(what: str, error: OSError) -> UserError:
    """What to raise where the system refuses something, such as space on the disk."""
    where = f": {error.filename}" if error.filename else ""
    return UserError(f"{what} failed: {error.strerror or error}{where}. {_REPEAT}")


def _marker(log: Path) -> Path:
    return log.with_suffix(".done")


def _epochs_in(logs: Sequence[Path]) -> int:
    """How many epochs these logs have to their ends."""
    return sum(log.read_bytes().count(_EPOCH_ENDED) for log in logs if log.is_file())


def _progress(epochs: int, initial: int) -> tqdm:
    """On a terminal, how far the trainings are and how long the rest takes."""
    return tqdm(total=epochs, initial=initial, unit="epoch", desc="train", disable=None, leave=False)


def _write(line: str) -> None:
    """Print a line above the progress."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """For the terminal.

    >>> duration(8.4), duration(119.7)
    ('8 s', '2 min 0 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
