"""The exceptions for mistakes that a user, or the author of a method, can correct."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class UserError(RuntimeError):
    """What failed, where it looked, and what to do next: its text is shown to the user without a traceback.

    Raised by the command line and by the trainers for everything a user can cause: missing folders, bad settings,
    no unlabeled case, a leak. Defects of this package raise ordinary exceptions instead.

    >>> raise UserError("splits_final.json holds no fold 7. Choose one of 0 to 4.")
    Traceback (most recent call last):
    nnunet_ssl.errors.UserError: splits_final.json holds no fold 7. Choose one of 0 to 4.
    """


class MethodError(Exception):
    """A mistake in a method's class, which its author can correct; the text says where and how.

    >>> raise MethodError("The term 'consistency' has no weight: loss_weights() returns 'supervised'.")
    Traceback (most recent call last):
    nnunet_ssl.errors.MethodError: The term 'consistency' has no weight: loss_weights() returns 'supervised'.
    """


def returned(hook: str, value: Any, kind: type[Any], advice: str) -> Any:
    """What a hook of a method has returned, if it is of the kind that it should be.

    Args:
        hook: its name.
        value: what it has returned.
        kind: the type, also an abstract one.
        advice: what its author is to do otherwise.

    Raises:
        MethodError: it is of another kind, as where a ``return`` was forgotten.
    """
    if not isinstance(value, kind):
        raise MethodError(f"{hook}() returns a value of the type {type(value).__name__}. {advice}")
    return value


def show_user_errors_alone() -> None:
    """Let Python end at a user's error with its text and without a traceback, in nnU-Net's own commands too.

    All other exceptions are shown as before.
    """
    before = sys.excepthook
    if getattr(before, "shows_user_errors_alone", False):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(f"nnunet-ssl: error: {error}", file=sys.stderr)
        else:
            before(kind, error, traceback)

    show.shows_user_errors_alone = True  # type: ignore[attr-defined]
    sys.excepthook = show
