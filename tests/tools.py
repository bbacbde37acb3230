"""What tests do without a tool that they need."""

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skips a test for want of a tool. With CI=true, where every tool should be installed, it fails instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (a skip where CI is not true)", pytrace=False)
    pytest.skip(reason)
