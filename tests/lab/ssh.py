"""
The SSH service of the simulated ESX server: a real sshd on loopback.

Who logs in sees what an ESX has: a busybox, and the datastore below /vmfs/volumes. The lab knows
the server's key by the name localhost, and by no other name.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile

from collections import namedtuple

from esx import DATASTORE
from lab import VDSM, LabError, bind, lay_over, make_directory, poll, run

CONFIGURATION = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
ChrootDirectory {directory}/root
PasswordAuthentication no
PermitRootLogin yes
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""


class SshServer(namedtuple("SshServer", "port key")):
    """The server: its port, and the path of the private key that it lets in."""

    def keys(self, guest, host="localhost", **changes):
        """Return the keys of a request that takes the guest from there."""
        keys = {
            "vm_name": "ssh://root@%s:%d/vmfs/volumes/%s/%s/%s.vmx" % (
                host, self.port, DATASTORE, guest, guest),
            "transport_method": "ssh",
            "vmware_uri": None,
            "vmware_password": None,
            "vmware_fingerprint": None,
        }
        return dict(keys, **changes)

    def key_text(self):
        """Return the private key."""
        with open(self.key) as stream:
            return stream.read()


@contextlib.contextmanager
def ssh_server(lab):
    """Have an `SshServer` in the lab."""
    directory = make_directory(tempfile.mkdtemp(prefix="ssh-", dir=lab.work))
    for name in ("host_key", "user_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", os.path.join(directory, name)])
    make_root(os.path.join(directory, "root"), lab.store)
    port = free_port()
    with open(os.path.join(directory, "sshd_config"), "w") as stream:
        stream.write(CONFIGURATION.format(directory=directory, port=port))
    know_host(lab, port, os.path.join(directory, "host_key.pub"))
    allow_root(lab)
    make_directory("/run/sshd")
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", directory + "/sshd_config"],
                            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield SshServer(port, os.path.join(directory, "user_key"))
    finally:
        sshd.terminate()
        sshd.wait()


@contextlib.contextmanager
def agent(server):
    """Have an agent of user vdsm that holds the server's key; gives the path of its socket."""
    directory = make_directory(tempfile.mkdtemp(dir="/run"), owner=VDSM)
    address = os.path.join(directory, "agent")
    process = subprocess.Popen(["setpriv", "--reuid=%d" % VDSM, "--clear-groups",
                                "ssh-agent", "-D", "-a", address], stdout=subprocess.DEVNULL)
    try:
        poll(lambda: os.path.exists(address), 30)
        run(["env", "SSH_AUTH_SOCK=" + address, "ssh-add", "-q", server.key])
        yield address
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(directory)


def make_root(root, store):
    """Make what who logs in sees."""
    binaries = make_directory(os.path.join(root, "bin"))
    shutil.copy(shutil.which("busybox"), binaries)
    # The shell of root on this machine, which the server starts.
    with open(os.path.join(binaries, "bash"), "w") as script:
        script.write('#!/bin/busybox sh\nexec /bin/busybox sh "$@"\n')
    os.chmod(script.name, 0o755)
    # What scp starts there; that of OpenSSH 9 does not.
    scp = shutil.which("scp")
    for path in [scp] + re.findall(r"(/\S+) \(", run(["ldd", scp])):
        shutil.copy(path, make_directory(root + os.path.dirname(path)))
    # Some versions of scp open the one, and look who they are in the other.
    for path in ("/dev/null", "/etc/passwd"):
        make_directory(root + os.path.dirname(path))
        open(root + path, "w").close()
        bind(path, root + path)
    datastore = make_directory(os.path.join(root, "vmfs/volumes", DATASTORE))
    bind(os.path.join(store, DATASTORE), datastore)


def know_host(lab, port, public_key):
    """Let the lab know the server by the name localhost."""
    layer = lab.layer("/etc/ssh")
    with open(public_key) as key, open(os.path.join(layer, "ssh_known_hosts"), "w") as known:
        known.write("[localhost]:%d %s" % (port, key.read()))
    lay_over("/etc/ssh", layer)


def allow_root(lab):
    """Let root log in with a key: sshd refuses an account that is locked."""
    shadow = os.path.join(lab.layer("/etc"), "shadow")
    with open(shadow, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        stream.write("root:*:19000:0:99999:7:::\n")
    bind(shadow, "/etc/shadow")


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    def connects():
        with contextlib.closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0
    with contextlib.suppress(TimeoutError):
        return poll(connects, 30)
    raise LabError("sshd does not answer at port %d" % port)
