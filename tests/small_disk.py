"""A disk on which large files do not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

can_limit_files = pytest.mark.skipif(sys.platform == "win32", reason="cannot limit the size of files")


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Within it, no file of this process grows beyond this many bytes. Python then sees an error, ITK says nothing."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
