"""What Python prints where nothing catches an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
from nnunet_ssl.errors import UserError, show_user_errors_alone
show_user_errors_alone()
show_user_errors_alone()
try:
    {}["imagesUn"]
except KeyError as error:
    raise %s("There is no imagesUn. Make it.") from error
"""


@pytest.mark.parametrize(("kind", "whole"), [("UserError", True), ("ValueError", False)])
def test_users_errors_are_shown_alone_and_others_with_their_traceback(kind, whole):
    done = subprocess.run([sys.executable, "-c", SCRIPT % kind], capture_output=True, text=True)
    assert done.returncode == 1
    if whole:
        assert done.stderr == "nnunet-ssl: error: There is no imagesUn. Make it.\n"
    else:
        assert "Traceback" in done.stderr and "KeyError" in done.stderr and done.stderr.count("ValueError") == 1
