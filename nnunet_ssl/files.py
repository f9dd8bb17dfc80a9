"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_ssl.errors import UserError

_MEND = "See to space and permissions there and run the command again."


def write_text(file: Path, text: str, *, otherwise: str = _MEND) -> None:
    """Write a file (UTF-8) aside and rename it; its folder is made.

    Args:
        file: replaced if it exists; a link of this name is replaced, not followed.
        text: its content.
        otherwise: what to do where it cannot be written.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A link of this name, in a folder from elsewhere, would be written through.
        unfinished.unlink(missing_ok=True)
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}. {otherwise}") from error
