"""The one exception for mistakes that a user can correct."""


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
