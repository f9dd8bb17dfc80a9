"""How long files, classes and functions may become; ``pytest -s`` prints the largest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nnunet_ssl"
LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION = 400, 449, 60
# The trainer that nnU-Net's hooks and a method's have in common.
LONGER_FILES = {"trainer/base.py": 499}


def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def _definitions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines from the name to the end; of a function, without its docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def _too_long(what: str, lengths: dict[str, int], limit: int) -> list[str]:
    longest = sorted(lengths, key=lambda name: -lengths[name])
    print(f"\nlongest {what} (at most {limit}):", *(f"{lengths[name]:4d} {name}" for name in longest[:5]), sep="\n  ")
    return [name for name in longest if lengths[name] > limit]


def test_no_file_is_too_long() -> None:
    lengths = {file.relative_to(PACKAGE).as_posix(): _lines(file) for file in PACKAGE.rglob("*.py")}
    assert len(lengths) > 100
    for name, limit in LONGER_FILES.items():
        assert _too_long(name, {name: lengths.pop(name)}, limit) == []
    assert _too_long("files", lengths, LONGEST_FILE) == []


def test_no_class_is_too_long() -> None:
    lengths = {
        f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}": _length(node)
        for file in PACKAGE.rglob("*.py")
        for node in _definitions(file)
        if isinstance(node, ast.ClassDef)
    }
    assert len(lengths) > 50
    assert _too_long("classes", lengths, LONGEST_CLASS) == []


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}": _length(node)
        for file in PACKAGE.rglob("*.py")
        for node in _definitions(file)
        if not isinstance(node, ast.ClassDef)
    }
    assert len(lengths) > 500
    assert _too_long("functions", lengths, LONGEST_FUNCTION) == []
