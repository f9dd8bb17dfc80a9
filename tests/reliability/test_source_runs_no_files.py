"""The source unpickles nothing, and runs no text and no archive."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
# Formats that can carry code or names of files, and who may use them nevertheless.
_FORMATS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "tarfile", "zipfile")
# One writes an archive, one compares a checkpoint's checksums; nothing here extracts any.
_FORMATS_USED = {("nnunet_ssl/cli/export.py", "zipfile"), ("nnunet_ssl/networks/checkpoints.py", "zipfile")}
# nnU-Net's dataset classes unpickle a preprocessed case's properties, CASE.pkl. These are written by nnU-Net's own
# preprocessing into nnUNet_preprocessed, where nnU-Net unpickles those of the labeled cases in every training.
_CASES_READ = {
    "nnunet_ssl/data/leak_guard.py",
    "nnunet_ssl/data/loader.py",
    "nnunet_ssl/data/previous_stage.py",
}
_FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "system", "popen", "getoutput", "getstatusoutput"),
    *("extract", "extractall"),
    *("unpack_archive", "add_safe_globals", "safe_globals", "load_pickle", "read_pickle", "unpickle", "mktemp"),
}


def problems_in(source: str, name: str) -> Iterator[str]:
    """What the source does that it must not, line by line."""
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or "", *(alias.name for alias in node.names)]
        for module in imported:
            if module.split(".")[0] in _FORMATS and (name, module) not in _FORMATS_USED:
                yield f"line {node.lineno}: imports {module}"
            if module in _FORBIDDEN_CALLS:
                yield f"line {node.lineno}: imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
        function = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        # A network's or a regular expression's own method of this name is another one.
        method = function in ("eval", "compile") and owner not in ("", "builtins")
        if function in _FORBIDDEN_CALLS and not method:
            yield f"line {node.lineno}: calls {function}"
        if function == "load" and owner == "torch" and ast.unparse(options.get("weights_only", node)) != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if function == "load_case" and name not in _CASES_READ:
            yield f"line {node.lineno}: reads a case with nnU-Net's dataset class, which unpickles"
        for option in ("shell", "allow_pickle"):
            if option in options and ast.unparse(options[option]) != "False":
                yield f"line {node.lineno}: {option}={ast.unparse(options[option])}"
        if owner == "subprocess" and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp)):
            yield f"line {node.lineno}: a command as text"
        if None in options and (owner in ("torch", "subprocess")):
            yield f"line {node.lineno}: options of {function} that cannot be read here"


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=safe)",
        "torch.load(file, **options)",
        "import pickle",
        "from pickle import loads",
        "import zipfile",
        "from os import system",
        "os.system('ls')",
        "os.popen('ls')",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=shell)",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {folder}')",
        "subprocess.run('ls ' + folder)",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "compile(text, '', 'eval')",
        "__import__(name)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(file)",
        "np.load(file, allow_pickle=True)",
        "load_pickle(file)",
        "torch.serialization.add_safe_globals([A])",
        "dataset.load_case(name)",
    ],
)
def test_the_check_of_the_source_finds(source) -> None:
    assert list(problems_in(source, "nnunet_ssl/some.py"))


def test_the_check_of_the_source_lets_pass() -> None:
    harmless = """
torch.load(file, map_location="cpu", weights_only=True)
network.eval()
re.compile(pattern)
subprocess.run(["ls", folder], check=True)
subprocess.run(command, shell=False)
np.load(file)
"""
    assert not list(problems_in(harmless, "nnunet_ssl/some.py"))


@pytest.mark.parametrize(
    "file",
    sorted(path for folder in ("nnunet_ssl", "trainers", "benchmarks") for path in (PROJECT / folder).rglob("*.py")),
    ids=lambda file: file.relative_to(PROJECT).as_posix(),
)
def test_the_source_unpickles_nothing_and_runs_no_text(file) -> None:
    name = file.relative_to(PROJECT).as_posix()
    assert not list(problems_in(file.read_text(encoding="utf-8"), name))
