"""
Real conversions, from the request on stdin to the virtual machine in the export domain.

Each conversion boots an appliance and takes most of a minute, so a test looks at all there is
to see of one; the refusals that need no appliance take a second or less.
"""

import json
import os
import signal
import stat
import subprocess

import pytest

from checks import (
    GIB, SLOW, assert_same_data, assert_secret_kept, assert_succeeded, failure, is_copying)
from lab import GUESTS, MIB, VDSM, parent

pytestmark = pytest.mark.lab

LAB1, LAB3 = GUESTS[:2]


def owner_and_mode(path):
    status = os.stat(path)
    return status.st_uid, stat.S_IMODE(status.st_mode)


def started_copying(lab, domain, **changes):
    """Start a slow conversion of lab1; return its job and the state once it copies."""
    job = lab.start(lab.request("lab1", domain.path, **changes), rate=SLOW)
    state = job.wait(is_copying)
    assert "finished" not in state
    return job, state


def assert_image(path, fmt):
    """Check a disk image: its owner, its format and that all of the source's 1 GiB is in it."""
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", path]).decode())
    assert os.stat(path).st_uid == os.stat(path).st_gid == VDSM
    assert info["format"] == fmt
    assert info["virtual-size"] == GIB
    assert info["actual-size"] > 7 * 4 * MIB


def mounts(pid="self"):
    """Return {(directory mounted, mount point), ...} of the mount namespace of a process."""
    with open("/proc/%s/mountinfo" % pid) as stream:
        return {tuple(line.split()[3:5]) for line in stream}


def test_three_disks_raw_with_source_disks(lab):
    domain = lab.export_domain()
    request = lab.request("lab3", domain.path, output_format="raw",
                          source_disks=LAB3.disk_paths())

    job = lab.start(request)
    first = job.state()
    copying = job.wait(is_copying)
    assert_secret_kept(lab)
    last = job.wait_finished()

    assert [disk["path"] for disk in first["disks"]] == LAB3.disk_paths()
    assert (first["started"], first["disk_count"]) == (True, 3)
    assert copying["disk_count"] == 3
    assert_succeeded(last, domain, LAB3)
    assert len(domain.images()) == 3
    for image in domain.images():
        assert_image(image, "raw")
    assert_same_data(lab.disk_files(LAB3), domain.images())
    assert owner_and_mode(job.v2v_log) == (VDSM, 0o640)
    assert owner_and_mode(job.wrapper_log) == (VDSM, 0o640)
    assert owner_and_mode(job.state_file) == (VDSM, 0o644)
    assert_secret_kept(lab)


def test_three_disks_qcow2_without_source_disks(lab):
    domain = lab.export_domain()

    job = lab.start(lab.request("lab3", domain.path, output_format="qcow2"))
    first = job.state()
    last = job.wait_finished()

    assert (first["disks"], first["disk_count"]) == ([], 0)
    assert_succeeded(last, domain, LAB3)
    assert len(domain.images()) == 3
    for image in domain.images():
        assert_image(image, "qcow2")


def test_nfs_export_domain_is_mounted_for_the_job_only(lab):
    domain = lab.export_domain()
    before = mounts()

    job = lab.start(lab.request("lab1", domain.nfs_path()))
    during, of_the_job = mounts(), mounts(job.state()["pid"])
    last = job.wait_finished()

    assert_succeeded(last, domain, LAB1)
    assert_image(domain.images()[0], "raw")
    new = of_the_job - before
    assert [mount for mount in new if mount[0].endswith(domain.path)]
    assert during == before
    assert mounts() == before


def test_nfs_export_domain_that_cannot_be_mounted_is_refused(lab):
    before = mounts()

    result = lab.run_wrapper(lab.request("lab1", "127.0.0.1:/not/exported"))

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("virt-v2v-wrapper: error: ")
    assert "access denied by server" in result.stderr
    assert result.stderr.count("\n") == 1
    assert mounts() == before


def test_wrong_password(lab):
    domain = lab.export_domain()

    job = lab.start(lab.request("lab1", domain.path, vmware_password="wrong"))
    last = job.wait_finished()

    assert "incorrect user name or password" in failure(last)
    assert last["return_code"] == 1
    assert domain.images() == []


def test_wrong_thumbprint(lab):
    domain = lab.export_domain()

    job = lab.start(lab.request("lab1", domain.path, vmware_fingerprint=":".join(["AB"] * 20)))
    last = job.wait_finished()

    assert "the thumbprint does not match" in failure(last)
    assert last["return_code"] == 1
    assert domain.images() == []


def test_unknown_vm(lab):
    domain = lab.export_domain()

    job = lab.start(lab.request("no-such-vm", domain.path))
    last = job.wait_finished()

    assert "no-such-vm" in failure(last)
    assert last["return_code"] == 1


def test_export_domain_that_fills_up(lab):
    domain = lab.export_domain(size=8 * MIB)

    job = lab.start(lab.request("lab1", domain.path))
    last = job.wait_finished()

    assert "No space left on device" in failure(last)
    assert last["return_code"] == 1


@pytest.mark.parametrize("process", ["pid", "wrapper_pid"])
def test_terminating_virt_v2v_or_the_wrapper_during_the_copy(lab, process):
    domain = lab.export_domain()
    job, state = started_copying(lab, domain)

    os.kill(state[process], signal.SIGTERM)
    last = job.wait(lambda state: state.get("finished"), seconds=60)

    failure(last)
    assert last["cancelled"] is True
    assert last["return_code"] in (1, -signal.SIGTERM)
    lab.wait_idle(seconds=5)
    assert domain.vms() == []


def test_killing_virt_v2v_during_the_copy_to_qcow2(lab):
    domain = lab.export_domain()
    job, state = started_copying(lab, domain, output_format="qcow2")
    # With virt-v2v 1.x it is qemu-img.
    assert any(command.startswith(("qemu-nbd", "qemu-img"))
               for command in lab.processes().values())

    os.kill(state["pid"], signal.SIGKILL)
    last = job.wait(lambda state: state.get("finished"), seconds=10)

    failure(last)
    assert last["return_code"] == -signal.SIGKILL
    lab.wait_idle(seconds=5)
    assert domain.vms() == []


def assert_ended(lab, domain, last, because):
    """Check a job whose virt-v2v was killed: the state says so, and nothing is left of it."""
    assert because in failure(last)
    lab.wait_idle(seconds=5)
    assert domain.vms() == []


def test_killing_the_wrapper_during_the_copy_ends_the_job(lab):
    domain = lab.export_domain()
    job, state = started_copying(lab, domain)

    os.kill(state["wrapper_pid"], signal.SIGKILL)
    last = job.wait(lambda state: state.get("finished"), seconds=20)

    assert last["return_code"] == -signal.SIGKILL
    assert_ended(lab, domain, last, "the wrapper was killed by SIGKILL")


def test_after_a_kill_of_all_the_next_start_publishes_the_end(lab):
    domain = lab.export_domain()
    job, state = started_copying(lab, domain)

    for process in (parent(state["wrapper_pid"]), state["wrapper_pid"]):
        os.kill(process, signal.SIGKILL)
    lab.wait_idle(seconds=20)
    assert "finished" not in job.state()
    lab.start(lab.request("no-such-vm", domain.path)).wait_finished()

    last = job.wait(lambda state: state.get("finished"), seconds=20)
    assert_ended(lab, domain, last, "all processes of the wrapper were killed")
