"""What the tests of real conversions share: one lab for the session."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from lab import Lab, Unavailable    # noqa: E402
import nfs                          # noqa: E402
from ssh import ssh_server          # noqa: E402
from upload import upload_target    # noqa: E402


@pytest.fixture(scope="session")
def session_lab():
    try:
        with Lab(packages=nfs.PACKAGES) as lab:
            yield lab
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def lab(session_lab):
    """The lab; a test that leaves a process or a temporary file behind in it fails."""
    yield session_lab
    session_lab.wait_idle(seconds=10)
    assert os.listdir("/var/tmp") == ["v2v-cache-36"]


@pytest.fixture(scope="module")
def target(session_lab):
    """Where virtual machines are uploaded to."""
    try:
        with upload_target(session_lab) as target:
            yield target
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def own_target(target, lab):
    """Another one, for one test that has its way with it."""
    with upload_target(lab) as own:
        yield own


@pytest.fixture(scope="module")
def ssh(session_lab):
    """The SSH service of the ESX server."""
    with ssh_server(session_lab) as server:
        yield server


@pytest.fixture(scope="module")
def nfs_server(session_lab):
    """An NFS server for export domains."""
    try:
        with nfs.nfs_server(session_lab) as server:
            yield server
    except Unavailable as reason:
        pytest.skip(str(reason))
