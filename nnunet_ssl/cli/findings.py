"""One line of the report of ``nnunet-ssl doctor``: ok, warn or FAIL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nnunet_ssl.cli.lookup import described
from nnunet_ssl.errors import MethodError, UserError


@dataclass(frozen=True)
class Finding:
    """One line of the report; the text of a ``warn`` or ``FAIL`` says what to do."""

    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.text}"


def ok(text: str) -> Finding:
    """A check that passed."""
    return Finding("ok", text)


def warn(text: str) -> Finding:
    """Something that does not stop a training."""
    return Finding("warn", text)


def fail(text: str) -> Finding:
    """Something that has to be fixed before a training."""
    return Finding("FAIL", text)


def safely(check: Iterable[Finding]) -> Iterator[Finding]:
    """A check that breaks is a finding too: the others still run."""
    try:
        yield from check
    except (UserError, MethodError) as error:
        yield fail(str(error))
    except Exception as error:
        yield fail(f"this check failed ({described(error)}): if no other line explains it, please report it")
