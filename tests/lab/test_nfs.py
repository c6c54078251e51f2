"""An export domain on a real NFS server, also one that stops answering in the copy."""

import os
import signal

import pytest

import processes
from checks import SLOW, assert_same_data, assert_succeeded, failure, is_copying
from lab import GUESTS, VDSM, poll

pytestmark = pytest.mark.lab

LAB1 = GUESTS[0]
MOUNT_POINT = "/run/virt-v2v-wrapper"


def writers(lab):
    """Return the IDs of the processes that write the copies."""
    return [pid for pid, command in lab.processes().items()
            if command.startswith("nbdkit ") and MOUNT_POINT in command]


def is_waiting(pid):
    """Tell whether a thread of the process waits for storage, so that nothing can end it."""
    return any(processes.state(int(thread)) == "D" for thread in os.listdir("/proc/%d/task" % pid))


@pytest.fixture
def stopped(lab, nfs_server):
    """An export domain, and the job that writes there; the server does not answer any more."""
    domain = lab.export_domain()
    job = lab.start(lab.request("lab1", nfs_server.path(domain)), rate=SLOW)
    job.wait(is_copying)
    nfs_server.stop()
    try:
        poll(lambda: any(map(is_waiting, writers(lab))), 60)
        assert "finished" not in job.state()
        yield domain, job
    finally:
        nfs_server.go_on()


def test_vdsm_writes_to_what_root_has_mounted(lab, nfs_server):
    domain = lab.export_domain()
    job = lab.start(lab.request("lab1", nfs_server.path(domain)))
    last = job.wait_finished()

    assert_succeeded(last, domain, LAB1)
    assert_same_data(lab.disk_files(LAB1), domain.images())
    assert {os.stat(path).st_uid for path in domain.files()} == {VDSM}
    assert last["target"]["directory"] == os.path.join(MOUNT_POINT, domain.uuid)


def test_what_the_server_does_not_have_is_refused(lab, nfs_server):
    path = nfs_server.path(lab.export_domain()) + "-not"
    result = lab.run_wrapper(lab.request("lab1", path))

    assert result.returncode == 1
    assert result.stderr.startswith("virt-v2v-wrapper: error: export_domain: could not be mounted")
    assert "access denied by server" in result.stderr


def test_the_copy_waits_for_a_server_that_comes_back(lab, nfs_server, stopped):
    domain, job = stopped
    nfs_server.go_on()
    last = job.wait_finished()

    assert_succeeded(last, domain, LAB1)
    assert_same_data(lab.disk_files(LAB1), domain.images())


def test_cancelled_while_the_server_is_away_the_end_is_there(lab, stopped):
    domain, job = stopped
    stuck = ["nbdkit (%d)" % pid for pid in writers(lab)]
    os.kill(job.state()["wrapper_pid"], signal.SIGTERM)
    last = job.wait(lambda state: state.get("finished"), seconds=180)

    assert failure(last).endswith("could not be killed, as they wait for storage: "
                                  + ", ".join(stuck))
    assert last["cancelled"] is True
    assert last["left_behind"] == [os.path.basename(os.path.dirname(image))
                                   for image in domain.images()]
    assert domain.vms() == []
