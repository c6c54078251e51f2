"""What the tests of several modules check."""

import contextlib
import hashlib
import subprocess

from lab import LUKS_KEY, MIB, UNIT

GIB = 1024 * MIB
SLOW = 1000000      # bytes a second: a disk takes half a minute, time enough to kill it
VERY_SLOW = 200000      # who begins first still copies when the last begins


def is_copying(state):
    return any(disk["progress"] > 0 for disk in state["disks"])


def failure(state):
    """Check that the state is the last of a failed conversion; return its message."""
    assert state["finished"] is True
    assert state["failed"] is True
    assert state["last_message"]["type"] == "error"
    return state["last_message"]["message"]


def assert_succeeded(state, domain, guest):
    assert state["started"] is True
    assert state["finished"] is True
    assert "failed" not in state
    assert state["return_code"] == 0
    assert state["disk_count"] == guest.disk_count
    assert state["disks"] == [{"path": path, "progress": 100, "bytes": GIB}
                              for path in guest.disk_paths()]
    assert domain.vms() == [(guest.name, state["vm_id"], guest.disk_count)]


def data_digest(path):
    """Return a digest of the data that conversion does not touch, behind the file system."""
    digest = hashlib.sha256()
    with open(path, "rb") as disk:
        for offset in range(UNIT, GIB, UNIT):
            disk.seek(offset)
            digest.update(disk.read(4 * MIB))
    return digest.digest()


def assert_same_data(disks, images):
    """Check that the images hold the data of the disks, in whatever order."""
    assert sorted(map(data_digest, images)) == sorted(map(data_digest, disks))


def assert_secret_kept(lab):
    """Check that no password, nor the key of the guest, is in a file of the lab or with a process's
    arguments or environment (those of the servers are in our own memory only)."""
    # That of the engine contains that of the ESX server.
    needles = [lab.password.encode(), LUKS_KEY.encode()]
    for pid in lab.processes():
        for name in ("cmdline", "environ"):
            # A process may end, or have ended, between the list and the look.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open("/proc/%d/%s" % (pid, name), "rb") as stream:
                    found = stream.read()
                assert not [needle for needle in needles if needle in found], (pid, name)
    # With patterns on stdin they are not in grep's arguments either.
    grep = ["grep", "-rlFf", "-", "--exclude-dir=images", lab.work]
    found = subprocess.run(grep, input=b"\n".join(needles), stdout=subprocess.PIPE)
    assert found.stdout == b""
