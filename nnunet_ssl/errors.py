"""The one exception for mistakes that a user can mend."""


class UserError(RuntimeError):
    """What failed, where it looked, and what to do next: its text is shown to the user without a traceback.

    Raised by the command line and by the trainers for everything a user can cause: missing folders, bad settings,
    no unlabeled case, a leak. Defects of this package raise ordinary exceptions instead.
    """


class MethodError(Exception):
    """A mistake in a method's class, which its author can correct; the text says where and how."""
