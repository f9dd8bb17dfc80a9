from __future__ import annotations

import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import nnunet_ssl
from nnunet_ssl.cli.lookup import trainer_descriptions, trainers_folder
from nnunet_ssl.cli.main import COMMANDS, main
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainer_lookup import RECOMMENDED

HEAVY = ("torch", "numpy", "scipy", "SimpleITK", "matplotlib", "nnunetv2", "batchgenerators", "batchgeneratorsv2")


@pytest.mark.parametrize(
    "statement",
    ["import nnunet_ssl", "import nnunet_ssl.cli.main", "nnunet_ssl.cli.main.main(['--help'])"]
    + [f"nnunet_ssl.cli.main.main(['{name}', '--help'])" for name in COMMANDS],
)
def test_help_and_the_package_import_nothing_heavy(statement: str) -> None:
    code = f"""
import sys
import nnunet_ssl
if "cli" in {statement!r}:
    import nnunet_ssl.cli.main
try:
    {statement}
except SystemExit as stop:
    assert stop.code == 0, stop.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("loaded: []")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert f"nnUNetv2_train ... -tr {RECOMMENDED}" in " ".join(text.split())
    assert "unavailable" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nnunet-ssl {nnunet_ssl.__version__}\n"


def test_a_reader_that_stops_is_no_error() -> None:
    """As in ``nnunet-ssl trainers | head -n 0``."""
    command = [sys.executable, "-m", "nnunet_ssl.cli.main", "trainers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["trainers", "--no-such-option"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: nnunet-ssl")


@pytest.mark.parametrize(
    ("arguments", "said", "meant"),
    [
        (["doctr"], "invalid choice: 'doctr'", "Did you mean doctor?"),
        (["doctor", "--raport"], "unrecognized arguments: --raport.", "Did you mean --report?"),
        (["split", "-d", "1", "--labeld=2", "--labeled", "2"], "--labeld=2", "Did you mean --labeled?"),
        (["--debgu", "trainers"], "unrecognized arguments: --debgu.", ""),
        (["trainers", "zzz"], "unrecognized arguments: zzz.", ""),
    ],
)
def test_misspelt_commands_and_options_come_with_what_may_be_meant(arguments, said, meant, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.rstrip().endswith(meant) and error.count("Did you mean") == bool(meant)


@pytest.fixture
def trainers_command_does(monkeypatch: pytest.MonkeyPatch):
    """Replace what ``nnunet-ssl trainers`` runs."""
    from nnunet_ssl.cli import trainers

    return lambda run: monkeypatch.setattr(trainers, "run", run)


def test_exit_code_is_the_commands_own(trainers_command_does) -> None:
    trainers_command_does(lambda args: 7)
    assert main(["trainers"]) == 7


def test_user_error_is_one_message_without_traceback(trainers_command_does, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> int:
        raise UserError("nothing there; put something there.")

    trainers_command_does(fail)
    assert main(["trainers"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "nnunet-ssl trainers: error: nothing there; put something there.\n"


def test_defects_are_not_hidden(trainers_command_does, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> int:
        raise RuntimeError("a defect")

    trainers_command_does(fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["--debug", "trainers"])
    assert main(["trainers"]) == 1
    error = capsys.readouterr().err
    assert "unexpected error: RuntimeError: a defect" in error and "--debug" in error and "Traceback" not in error


def test_warnings_for_the_authors_of_libraries_are_shown_with_debug_only(
    trainers_command_does, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(args: object) -> int:
        warnings.warn("torch.jit.script is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("odd voxels", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(sys, "warnoptions", [])
    trainers_command_does(warn)
    assert main(["trainers"]) == 0
    assert [str(one.message) for one in recwarn] == ["odd voxels"]
    assert main(["--debug", "trainers"]) == 0
    assert "torch.jit.script is deprecated" in [str(one.message) for one in recwarn]


def test_interruption(trainers_command_does, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    trainers_command_does(interrupted)
    assert main(["trainers"]) == 130
    assert capsys.readouterr().err == "nnunet-ssl trainers: interrupted\n"


def test_a_broken_command_leaves_the_others_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules makes the import fail.
    monkeypatch.setitem(sys.modules, "nnunet_ssl.cli.demo", None)  # type: ignore[arg-type]
    monkeypatch.delattr(sys.modules["nnunet_ssl.cli"], "demo", raising=False)
    assert main(["trainers"]) == 0
    assert capsys.readouterr().out == f"{trainers_folder()}\n"
    assert main(["demo", "-o", "somewhere"]) == 2
    assert "nnunet_ssl.cli.demo" in capsys.readouterr().err


def test_trainers_prints_one_line_for_export(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert (Path(lines[0]) / "CrossMatchTrainer.py").is_file()


def test_trainers_list_names_every_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainers", "--list"]) == 0
    folder, *lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in Path(folder).glob("*.py")}
    assert "CrossMatchTrainer" in names
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split()) > 1 for line in lines), "every trainer has a description"


def test_trainer_modules_are_described_without_importing_them(tmp_path: Path) -> None:
    (tmp_path / "BTrainer.py").write_text('"""First line.\n\nMore."""\nraise SystemExit("imported")\n')
    (tmp_path / "ATrainer.py").write_text("import no_such_module\n")
    (tmp_path / "__init__.py").write_text("")
    assert trainer_descriptions(tmp_path) == {"ATrainer": "", "BTrainer": "First line."}


def _installed_at(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    fake = types.SimpleNamespace(__file__=str(package / "__init__.py"))
    monkeypatch.setattr("nnunet_ssl.trainer_lookup.nnunet_ssl", fake)


@pytest.mark.parametrize("place", ["site/nnunet_ssl/trainers", "site/trainers"])
def test_trainers_folder_of_a_wheel_and_of_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    _installed_at(monkeypatch, tmp_path / "site" / "nnunet_ssl")
    folder = tmp_path / place
    folder.mkdir()
    (folder / "CrossMatchTrainer.py").touch()
    assert trainers_folder() == folder.resolve()


def test_a_foreign_folder_called_trainers_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _installed_at(monkeypatch, tmp_path / "site" / "nnunet_ssl")
    (tmp_path / "site" / "trainers").mkdir()
    (tmp_path / "site" / "trainers" / "other.py").touch()
    with pytest.raises(UserError, match=r"site.nnunet_ssl.trainers and .*install nnunet-ssl again"):
        trainers_folder()
