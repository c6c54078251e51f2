"""What the tests of real conversions share: one lab for the session."""

import glob
import json
import os
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from lab import Lab, Unavailable    # noqa: E402
import nfs                          # noqa: E402
from ssh import ssh_server          # noqa: E402
from upload import upload_target    # noqa: E402


def pytest_addoption(parser):
    """Have the option --keep-logs."""
    parser.addoption("--keep-logs", metavar="DIR",
                     help="copy logs and states of each test of the lab to a directory of DIR")


def pytest_terminal_summary(terminalreporter):
    """Show what the recorders saw, a line for each job."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports
               if getattr(report, "when", None) == "teardown"]
    lines = [line for report in reports for name, line in report.user_properties if name == "job"]
    if lines:
        terminalreporter.section("state files")
        terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def session_lab():
    try:
        with Lab(packages=nfs.PACKAGES) as lab:
            yield lab
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def lab(session_lab, request):
    """The lab; a test fails if it leaves a process or a temporary file behind in it, or if the
    state of one of its jobs was ever not as promised."""
    yield session_lab
    recorders, session_lab.recorders = session_lab.recorders, []
    for recorder in recorders:
        recorder.end()
        line = "%s: %s" % (request.node.name, recorder.summary())
        request.node.user_properties.append(("job", line))
        keep(recorder, request)
    session_lab.wait_idle(seconds=10)
    assert os.listdir("/var/tmp") == ["v2v-cache-36"]
    assert glob.glob("/run/vdsm/virt-v2v-wrapper/*.lock") == []
    assert [line for recorder in recorders for line in recorder.broken] == []


def keep(recorder, request):
    """Copy what there is of a job to where --keep-logs says."""
    if request.config.getoption("--keep-logs"):
        directory = os.path.join(request.config.getoption("--keep-logs"), request.node.name)
        os.makedirs(directory, exist_ok=True)
        for path in recorder.job:
            shutil.copy(path, directory)
        states = os.path.basename(recorder.job.state_file) + "s"
        with open(os.path.join(directory, states), "w") as stream:
            stream.writelines(json.dumps(state) + "\n" for state in recorder.states)


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
