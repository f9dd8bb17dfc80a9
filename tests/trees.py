"""What a folder holds, to be compared byte by byte."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, tuple[object, int]]:
    """{path: (bytes, or where a link leads, or None for a folder; time of a file's last change)}"""
    found: dict[str, tuple[object, int]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = (str(path.readlink()), path.lstat().st_mtime_ns)
        elif path.is_dir():
            found[name] = (None, 0)
        else:
            found[name] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found
