"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replacing, write_text


class Stop(BaseException):
    """Such as KeyboardInterrupt."""


@pytest.mark.parametrize("aside", [None, "in the making"])
def test_a_file_is_replaced_at_the_end(tmp_path: Path, aside: str | None) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file, aside=tmp_path / aside if aside else None, durable=True) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old" and unfinished.parent == tmp_path
        assert aside in (None, unfinished.name)
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stop", [Stop, OSError, ValueError])
def test_a_stop_leaves_what_was_there(tmp_path: Path, stop: type[BaseException]) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(stop), replacing(file) as unfinished:
        unfinished.write_text("half")
        raise stop
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_nothing_is_renamed_if_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda number: there.append((tmp_path / "file").exists()))
    for durable in (True, False):
        with replacing(tmp_path / "file", durable=durable) as unfinished:
            unfinished.write_text("new")
    assert there == [False]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a\.txt cannot be written: .*\. Elsewhere\."):
        write_text(tmp_path / "file" / "a.txt", "", otherwise="Elsewhere.")
