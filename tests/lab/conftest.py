"""What the tests of real conversions share: one lab for the session."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from lab import Lab, Unavailable    # noqa: E402


@pytest.fixture(scope="session")
def session_lab():
    try:
        with Lab() as lab:
            yield lab
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def lab(session_lab):
    """The lab; a test that leaves a process or a temporary file behind in it fails."""
    yield session_lab
    session_lab.wait_idle(seconds=10)
    assert os.listdir("/var/tmp") == ["v2v-cache-36"]
