"""
An NFS server and its client, for an export domain that is HOST:/PATH.

The server is real: nfs-ganesha, which exports what lab.export_domain() makes, with root squashed.
The client is nfs-client.c, which is FUSE and libnfs, because the kernel may have none. They speak
NFS 3, which the libnfs of Debian 12 can do fully, in a network namespace of their own, so that no
other NFS server or rpcbind of the machine is in the way.
"""

import contextlib
import os
import signal
import subprocess
import tempfile

from lab import HERE, LabError, Unavailable, make_directory, missing_packages, poll, run

# What the tests need of Debian besides the lab.
PACKAGES = ["nfs-ganesha", "nfs-ganesha-vfs", "rpcbind", "iproute2", "libnfs-dev", "libfuse3-dev"]

HOST = "127.0.0.2"      # not 127.0.0.1, from where the lab's stand-in binds a directory
CONFIGURATION = """
NFS_CORE_PARAM {{ Protocols = 3, 4; Enable_NLM = false; Enable_RQUOTA = false; }}
NFSv4 {{ Graceless = true; RecoveryRoot = {directory}; }}
EXPORT {{
    Export_Id = 1; Path = {exports}; Pseudo = {exports}; FSAL {{ Name = VFS; }}
    Protocols = 3, 4; Access_Type = RW; Squash = root_squash; SecType = sys;
}}
"""
MOUNT = """\
#!/bin/sh
exec nsenter --net={namespace} {directory}/nfs-client "$@"
"""


class NfsServer:
    """The server."""

    def __init__(self, process):
        self._process = process

    def path(self, domain):
        """Return HOST:/PATH of an export domain."""
        return "%s:%s" % (HOST, domain.path)

    def stop(self):
        """Answer nothing from now on, as if the network were down."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        """Answer again, also what was asked meanwhile."""
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def nfs_server(lab):
    """Have an `NfsServer` in the lab; Unavailable where there can be none."""
    missing = missing_packages(PACKAGES)
    if missing:
        raise Unavailable("the NFS server needs %s" % ", ".join(missing))
    directory = make_directory(os.path.join(lab.work, "nfs"))
    exports = make_directory(os.path.join(lab.work, "exports"))
    run(["gcc", "-O2", "-Wall", "-I/usr/include/fuse3", "-o", directory + "/nfs-client",
         os.path.join(HERE, "nfs-client.c"), "-lfuse3", "-lnfs"])
    with own_network() as namespace, ganesha(directory, exports, namespace) as server:
        with open(directory + "/mount", "w") as stream:
            stream.write(MOUNT.format(namespace=namespace, directory=directory))
        os.chmod(directory + "/mount", 0o755)
        try_mount(exports)
        yield server


@contextlib.contextmanager
def own_network():
    """Have a network namespace that has its own loopback; gives its path."""
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && exec sleep infinity"]
    with running(command, stdout=subprocess.PIPE) as process, process.stdout:
        if not process.stdout.readline():
            raise Unavailable("there can be no network namespace here")
        yield "/proc/%d/ns/net" % process.pid


@contextlib.contextmanager
def ganesha(directory, exports, namespace="/proc/self/ns/net"):
    """Have an `NfsServer` that keeps its own files in a directory, in a network namespace."""
    with open(directory + "/ganesha.conf", "w") as stream:
        stream.write(CONFIGURATION.format(directory=directory, exports=exports))
    log = directory + "/ganesha.log"
    enter = ["nsenter", "--net=" + namespace]
    with running(enter + ["rpcbind", "-f"]) as rpcbind:
        wait_for(lambda: os.path.exists("/run/rpcbind.sock"), rpcbind, "rpcbind")
        with running(enter + ["ganesha.nfsd", "-F", "-L", log, "-f", directory + "/ganesha.conf",
                              "-p", directory + "/ganesha.pid"]) as process:
            wait_for(lambda: has(log, "NFS SERVER INITIALIZED"), process, "nfs-ganesha")
            yield NfsServer(process)


@contextlib.contextmanager
def running(command, stdout=subprocess.DEVNULL):
    """Have a process run; it is killed at the end, also if it is stopped."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout,
                               stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(is_ready, process, name):
    """Wait until a server is ready; Unavailable if it ends instead."""
    poll(lambda: is_ready() or process.poll() is not None, 60)
    if process.poll() is not None:
        raise Unavailable("%s cannot run here: it ended with status %d" % (
            name, process.returncode))


def has(path, text):
    """Tell whether there is a file with the text in it."""
    with contextlib.suppress(FileNotFoundError), open(path) as stream:
        return text in stream.read()


def try_mount(exports):
    """Raises Unavailable if nothing can be mounted: FUSE, or handles of files, may be missing."""
    directory = tempfile.mkdtemp(dir="/run")
    try:
        run(["mount", "-t", "nfs", "%s:%s" % (HOST, exports), directory])
        run(["umount", directory])
    except LabError as error:
        raise Unavailable("the NFS server cannot be used here: %s" % error)
    os.rmdir(directory)
