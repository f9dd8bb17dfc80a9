"""The steps of ``nnunet-ssl demo``: what runs, what goes on after a stop, and that nothing runs on."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from nnunet_ssl.cli import demo_steps
from nnunet_ssl.cli.lookup import find_program
from nnunet_ssl.errors import UserError


def test_a_failing_command_shows_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_steps, "find_program", lambda name: sys.executable)
    steps = demo_steps.Steps(tmp_path, dict(os.environ), total=1)
    with pytest.raises(UserError, match="exit code 3") as error:
        steps.command("train", ["nnUNetv2_train", "-c", "print('no memory'); raise SystemExit(3)"])
    log = tmp_path / "1_train.log"
    assert "no memory" in str(error.value) and str(log) in str(error.value)
    assert log.read_text().strip() == "no memory"

    again = demo_steps.Steps(tmp_path, dict(os.environ), total=1)
    again.command("train", ["nnUNetv2_train", "-c", "print('better')"])
    assert log.read_text().strip() == "better", "a step that failed is done again"
    finished = demo_steps.Steps(tmp_path, dict(os.environ), total=1)
    finished.command("train", ["nnUNetv2_train", "-c", "raise SystemExit(3)"])
    assert "already done" in capsys.readouterr().out


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_steps, "find_program", lambda name: sys.executable)
    return lambda: demo_steps.Steps(tmp_path, dict(os.environ), total=4)


def python(code):
    return ["nnUNetv2_train", "-c", code]


def meeting(own, other):
    """Ends once the other one runs too; fails if that does not happen."""
    return (
        "import pathlib, time\n"
        f"pathlib.Path({str(own)!r}).touch()\n"
        "end = time.monotonic() + 60\n"
        f"while not pathlib.Path({str(other)!r}).exists():\n"
        "    assert time.monotonic() < end\n"
        "    time.sleep(0.05)"
    )


def test_chains_run_at_once_and_each_in_its_order(tmp_path, steps, capsys):
    a, b, made = tmp_path / "a", tmp_path / "b", tmp_path / "made"
    write, read = f"open({str(made)!r}, 'w').write('x')", f"open({str(made)!r}).read()"
    chains = [
        {"train_a": python(meeting(a, b)), "predict_a": python("")},
        {"train_b": python(f"{meeting(b, a)}\n{write}"), "predict_b": python(read)},
    ]
    steps().chains(chains, at_once=2, epochs=1)
    ended = re.findall(r"^\[(\d)/4\]|\.\.\. \d+ s$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(filter(None, ended)) == ["1", "2", "3", "4"]
    assert {file.name for file in tmp_path.glob("*.*")} == {
        f"{name}.{ending}"
        for name in ("1_train_a", "2_predict_a", "3_train_b", "4_predict_b")
        for ending in ("log", "done")
    }

    steps().chains([{name: python("raise SystemExit(3)") for name in chain} for chain in chains], at_once=2, epochs=1)
    assert capsys.readouterr().out.count("already done") == 4


def test_one_chain_at_a_time(tmp_path, steps):
    log = tmp_path / "order"
    code = "import sys, time\nfor _ in range(3): print({0!r}, file=open({1!r}, 'a')); time.sleep(0.05)"
    steps().chains(
        [{f"{name}{number}": python(code.format(name, str(log))) for number in (1, 2)} for name in "ab"],
        at_once=1,
        epochs=1,
    )
    assert log.read_text().split() == ["a"] * 6 + ["b"] * 6


def test_where_a_training_fails_the_other_goes_on(tmp_path, steps, capsys):
    chains = [
        {"train_a": python("print('no memory'); raise SystemExit(3)"), "predict_a": python("")},
        {"train_b": python("import time; time.sleep(1)"), "predict_b": python("")},
    ]
    one = steps()
    with pytest.raises(UserError, match=r"exit code 3. The end of .*1_train_a.log") as error:
        one.chains(chains, at_once=2, epochs=1)
    assert "no memory" in str(error.value)
    assert {marker.stem for marker in tmp_path.glob("*.done")} == {"3_train_b", "4_predict_b"}
    assert not (tmp_path / "2_predict_a.log").exists(), "nothing to predict with"
    assert one.count == 4 and capsys.readouterr().out.count("failed") == 1


def test_nothing_goes_on_behind_a_user_who_stops_it(tmp_path, steps):
    started = tmp_path / "started"
    code = f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"

    def sleep(_seconds):
        if started.is_file() and started.read_text():
            # Once: to wait for the command's end sleeps too.
            patch.undo()
            raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(demo_steps.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        steps().chains([{"train_a": python(code)}, {"train_b": python("")}], at_once=1, epochs=1)
    assert not (tmp_path / "1_train_a.done").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


FORKING = """
import os, pathlib, signal, time
folder = pathlib.Path({folder!r})
worker = os.fork()
(folder / ("command" if worker else "worker")).write_text(str(os.getpid()))
time.sleep(600)
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def runs(file):
    """Whether the process whose number is in the file runs; one that has ended may wait to be noticed."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", file.read_text()], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def began(*files):
    return lambda: all(file.is_file() and file.read_text() for file in files)


@needs_fork
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_nothing_goes_on_where_a_signal_ends_the_demo(tmp_path, number):
    code = f"""
import os, signal, sys
from pathlib import Path
from nnunet_ssl.cli import demo_steps
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
demo_steps.find_program = lambda name: sys.executable
folder = Path({str(tmp_path)!r})
with demo_steps.ended_by_signals():
    steps = demo_steps.Steps(folder, dict(os.environ), total=1)
    steps.chains([{{"train": ["nnUNetv2_train", "-c", {FORKING.format(folder=str(tmp_path))!r}]}}], at_once=1, epochs=1)
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    files = [tmp_path / name for name in ("command", "worker")]
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as demo_process:
        until(began(*files))
        demo_process.send_signal(getattr(signal, number))
        demo_process.wait(60)
    until(lambda: not any(map(runs, files)))
    assert not (tmp_path / "1_train.done").exists()


@needs_fork
def test_the_workers_of_a_command_that_is_killed_end(tmp_path, steps):
    files = [tmp_path / name for name in ("command", "worker")]
    kill = f"""
import os, signal, time
while not all(os.path.exists(file) and os.path.getsize(file) for file in {[*map(str, files)]!r}):
    time.sleep(0.02)
os.kill(int(open({str(files[0])!r}).read()), signal.SIGKILL)
"""
    chains = [{"train_a": python(FORKING.format(folder=str(tmp_path)))}, {"train_b": python(kill)}]
    with pytest.raises(UserError, match="was killed by SIGKILL, as the system does where memory runs out"):
        steps().chains(chains, at_once=2, epochs=1)
    until(lambda: not runs(files[1]))
    assert {marker.stem for marker in tmp_path.glob("*.done")} == {"2_train_b"}


def test_a_full_disk_is_said_to_be_full(steps):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"phantoms failed: No space left on device\. The same command continues"):
        steps().function("phantoms", "make phantoms", write)


def test_the_progress_counts_epochs_of_this_call(tmp_path, steps, monkeypatch):
    """An epoch that was trained before says nothing of the time per epoch; one that is trained again counts once."""
    for name, done in (("1_train_a", True), ("2_train_b", False)):
        (tmp_path / f"{name}.log").write_text("Epoch time: 1 s\n")
        (tmp_path / f"{name}.done").touch() if done else None
    seen = []
    monkeypatch.setattr(
        demo_steps, "_progress", lambda total, initial: seen.append((total, initial)) or tqdm(disable=True)
    )
    steps().chains([{"train_a": python("")}, {"train_b": python("")}], at_once=1, epochs=1)
    assert seen == [(2, 1)]


def test_a_step_with_its_own_progress_leaves_its_line(steps, capsys):
    """A progress bar begins at the start of the line, and erases it at its end."""
    with steps().with_progress("evaluate"):
        assert capsys.readouterr().out == ""
    assert re.fullmatch(r"\[1/4\] evaluate \.\.\. \d+ s\n", capsys.readouterr().out)


def test_missing_nnunet_command():
    with pytest.raises(UserError, match="pip install nnunetv2"):
        find_program("nnUNetv2_no_such_command")
