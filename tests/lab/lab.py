"""
A laboratory for virt-v2v-wrapper: real conversions without VMware, on one machine.

Real are the wrapper, the distribution's virt-v2v with all it runs (nbdkit, nbdcopy, qemu,
the libguestfs appliance), and libvirt's ESX driver. These are stand-ins:

* the ESX server: esx.py, which answers what libvirt's driver asks;
* VDDK: nbdkit-vddk-plugin.c, which serves local files under VDDK's names, at a chosen speed;
* the guests: make-guest, disks that inspection takes for a Debian system;
* the NFS client: mount.nfs, which binds a local directory (but see nfs.py);
* the user vdsm and its directories, where the machine has none;
* for uploads, the engine: see upload.py, which has the real SDK and the real image server.

What the stand-ins answer was found by watching virt-v2v 2.2.0, nbdkit 1.32, libvirt 9.0 and
libguestfs 1.48 of Debian 12, and read in the public API of nbdkit plugins.

A `Lab` is a context manager. Entering moves the process into a private mount namespace and
lays the stand-ins over the machine there, so that nobody else sees them: nbdkit's plugin,
/sbin/mount.nfs, /etc/passwd and /etc/group with vdsm, and a /run, /var/log and /var/tmp that
are empty but for vdsm's directories. Leaving ends whatever still runs inside, goes back to the
namespace it came from and removes the work directory. Several labs may run at the same time.

Everything lies below /var/cache/virt-v2v-wrapper-lab (not in a home directory, which vdsm
could not read): one `run-*` directory for each lab that runs, and what is worth keeping for
the next one, the guests, the plugin, the libguestfs appliance and packages of PyPI. It may be
removed at will.
"""

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

from collections import namedtuple

from esx import EsxServer, Guest, vmx
from recorder import Recorder
from schemas import read_state

HERE = os.path.dirname(os.path.abspath(__file__))
WRAPPER = os.path.join(os.path.dirname(os.path.dirname(HERE)), "virt-v2v-wrapper.py")
CACHE = "/var/cache/virt-v2v-wrapper-lab"

# Debian's virt-v2v does not depend on all the programs it runs.
PACKAGES = [
    "virt-v2v", "nbdkit", "nbdkit-plugin-dev", "libnbd-bin", "qemu-utils", "uuid-runtime",
    "busybox-static", "bash-static", "gcc", "libc6-dev", "openssl", "e2fsprogs", "fdisk",
    "openssh-client", "openssh-server",
    # For uploads: what virt-v2v's scripts import, and what upload.py builds packages with.
    "nbdkit-plugin-python", "python3-pycurl", "python3-six",
    "python3-pip", "python3-dev", "libxml2-dev",
]
# For the appliance, and its modules are for the guests.
KERNELS = {"debian": "linux-image-amd64", "ubuntu": "linux-image-virtual"}

VDSM = 36       # oVirt's fixed number for the user vdsm and the group kvm
ACCOUNTS = {
    "/etc/passwd": "vdsm:x:36:36:stand-in:/var/lib/vdsm:/sbin/nologin\n",
    "/etc/group": "kvm:x:36:\n",
}

# The directories that get private, empty covers, with their modes.
COVERED = {"/run": 0o755, "/var/log": 0o755, "/var/tmp": 0o1777}

MIB = 1024 * 1024
UNIT = 128 * MIB    # nbdcopy's step of progress; the guests' systems lie in the first one
CLONE_NEWNS = 0x20000

# The last has two systems, one of them encrypted, and two networks.
LUKS_KEY = "needle-of-the-guest"
GUESTS = [
    Guest("lab1", "1", "564d1111-0000-4000-8000-000000000001", 1, ["VM Network"]),
    Guest("lab3", "3", "564d1111-0000-4000-8000-000000000003", 3, ["VM Network"]),
    Guest("twin", "2", "564d1111-0000-4000-8000-000000000002", 1, ["VM Network", "Storage"]),
]


class Unavailable(Exception):
    """This machine cannot have the lab, for the reason given."""


class LabError(Exception):
    """Something the lab waited for did not come, or a command of its own failed."""


class Job(namedtuple("Job", "wrapper_log v2v_log state_file")):
    """A started conversion: the paths the wrapper printed."""

    def state(self):
        """Return the state file as it is now."""
        return read_state(self.state_file)

    def wait(self, reached, seconds=600):
        """Return the first state for which reached(state) is true; LabError if none comes."""
        def last(state):
            return reached(state) or "finished" in state
        with contextlib.suppress(TimeoutError):
            state = poll(lambda: when(last, self.state()), seconds)
            if reached(state):
                return state
        raise LabError("no such state within %d s; the last one is %s" % (seconds, self.state()))

    def wait_finished(self):
        """Return the final state."""
        return self.wait(lambda state: state.get("finished"))


class ExportDomain(namedtuple("ExportDomain", "path uuid")):
    """An export domain as VDSM would have made it, in a local directory."""

    def keys(self, **changes):
        """Return the keys of a request that exports to it."""
        return dict({"export_domain": self.path}, **changes)

    def nfs_path(self):
        """Return the export domain as host:/path, which the stand-in of mount.nfs takes."""
        return "127.0.0.1:" + self.path

    def files(self, part=""):
        """Return the paths of the files below images, master/vms or (by default) all of it."""
        pattern = os.path.join(self.path, self.uuid, part, "**")
        return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))

    def images(self):
        """Return the paths of the disk images."""
        return [path for path in self.files("images") if not path.endswith(".meta")]

    def vms(self):
        """Return an `ArrivedVm` for each OVF."""
        return [ArrivedVm.read(path) for path in self.files("master/vms")]


class ArrivedVm(namedtuple("ArrivedVm", "name uuid disks")):
    """What the OVF of a virtual machine says; `disks` is their number."""

    @classmethod
    def read(cls, path):
        """Take the path of the OVF, whose directory must bear the UUID in it."""
        ovf = xml.etree.ElementTree.parse(path).getroot()
        ids = [value for section in ovf.iter("Section") for key, value in section.items()
               if key.endswith("}id")]
        if ids != [os.path.basename(os.path.dirname(path))]:
            raise LabError("%s: the OVF is that of %s" % (path, ids))
        return cls(ovf.find("Content/Name").text, ids[0], len(list(ovf.iter("Disk"))))


class Lab:
    """The laboratory; see the text of this module.

    Attributes for the tests: `esx` (the server, whose list of guests may grow), `password`
    (a new one for each lab, to be looked for where it must not be), `work` (its directory),
    `recorders` (one for each job that was started).
    """

    def __init__(self, say=print, packages=()):
        """Take a function that is told each step of the preparation, and what of Debian's packages
        is to be there besides, if it can be had."""
        self._say = say
        self._packages = packages
        self._leaving = contextlib.ExitStack()
        self.password = "needle-" + secrets.token_hex(16)
        self.recorders = []

    def __enter__(self):
        """Prepare everything. Raises Unavailable where that is not possible, LabError."""
        check_machine()
        with contextlib.ExitStack() as stack:
            # vdsm must be able to read what is made here.
            stack.callback(os.umask, os.umask(0o022))
            with locked(CACHE):
                install_packages(PACKAGES + [KERNELS[distribution()]], self._say)
                with contextlib.suppress(LabError):
                    install_packages(self._packages, self._say)
                self.store = build_store(self._say)
                self.work = stack.enter_context(work_directory())
            self._say("starting the simulated ESX server")
            self.esx = stack.enter_context(self._esx_server())
            self._say("laying the stand-ins over this machine, in a mount namespace of our own")
            stack.enter_context(private_mounts())
            self._lay_stand_ins()
            stack.callback(self._end_processes)
            # No thread may be left that shares our mounts when we go back to the others.
            stack.callback(lambda: [recorder.end() for recorder in self.recorders])
            self._leaving = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._leaving.close()

    @contextlib.contextmanager
    def _esx_server(self):
        certificate = os.path.join(self.work, "esx.pem")
        run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", "/CN=127.0.0.1", "-keyout", certificate, "-out", certificate + ".crt"])
        with open(certificate, "a") as key, open(certificate + ".crt") as crt:
            key.write(crt.read())
        with EsxServer(certificate, self.password, GUESTS) as server:
            yield server

    def _lay_stand_ins(self):
        plugins = run(["nbdkit", "--dump-config"]).split("plugindir=")[1].split("\n")[0]
        shutil.copy(os.path.join(self.store, "nbdkit-vddk-plugin.so"), self.layer(plugins))
        lay_over(plugins, self.layer(plugins))

        helpers = os.path.realpath("/sbin")
        write_copy(os.path.join(HERE, "mount.nfs"), os.path.join(self.layer(helpers), "mount.nfs"),
                   {"@EXPORTS@": os.path.join(self.work, "exports"),
                    "@NFS@": os.path.join(self.work, "nfs", "mount")})
        lay_over(helpers, self.layer(helpers))

        if not user_exists("vdsm"):
            for path, line in ACCOUNTS.items():
                bind(add_account(path, line, self.layer("/etc")), path)
        for path in COVERED:
            bind(make_directory(self.work + "/covers" + path, COVERED[path]), path)
        make_directory("/run/vdsm", owner=VDSM)
        make_directory("/var/log/vdsm", owner=VDSM)
        # The appliance takes a while to build and is the same for all.
        os.mkdir("/var/tmp/v2v-cache-36")
        bind(make_directory(os.path.join(CACHE, "appliance"), 0o700, VDSM), "/var/tmp/v2v-cache-36")

    def layer(self, target):
        """Return the directory of what is to be laid over the target."""
        return make_directory(os.path.join(self.work, "layers", target.replace("/", "_")))

    def disk_files(self, guest):
        """Return the paths of the guest's disks as the stand-in for VDDK reads them."""
        return [os.path.join(self.store, "ds", guest.name, disk.replace(".vmdk", "-flat.vmdk"))
                for disk in guest.disk_names()]

    def vddk(self, rate=0):
        """Return a VDDK directory that serves each disk with `rate` bytes a second (0: as fast
        as it can), from the second unit on: so conversion, which reads the first, is quick."""
        libdir = os.path.join(self.work, "vddk-%d" % rate)
        if not os.path.isdir(libdir):
            make_directory(os.path.join(libdir, "lib64"))
            os.symlink(os.path.join(self.store, "libvixDiskLib.so"),
                       os.path.join(libdir, "lib64", "libvixDiskLib.so.7"))
            with open(os.path.join(libdir, "lab.conf"), "w") as conf:
                conf.write("root=%s\nthumbprint=%s\nrate=%d\nrate_from=%d\n" % (
                    self.store, self.esx.thumbprint, rate, UNIT))
        return libdir

    def export_domain(self, size=None):
        """Return a new, empty `ExportDomain`, on a file system of `size` bytes if given."""
        exports = make_directory(os.path.join(self.work, "exports"))
        path = tempfile.mkdtemp(dir=exports)
        if size:
            run(["mount", "-t", "tmpfs", "-o", "size=%d" % size, "tmpfs", path])
        domain = ExportDomain(path, run(["uuidgen"]).strip())
        for part in ("images", "dom_md", "master/vms", "master/tasks"):
            make_directory(os.path.join(path, domain.uuid, part))
        run(["chown", "-R", "%d:%d" % (VDSM, VDSM), path])
        os.chmod(path, 0o755)
        return domain

    def request(self, guest=None, export_domain=None, **changes):
        """Return a request that converts the guest, by name; a change of None takes a key out."""
        request = {
            "vm_name": guest,
            "transport_method": "vddk",
            "vmware_uri": self.esx.uri(),
            "vmware_password": self.password,
            "vmware_fingerprint": self.esx.thumbprint,
            "export_domain": export_domain,
        }
        request.update(changes)
        return {key: value for key, value in request.items() if value is not None}

    def run_wrapper(self, request, rate=0, *words, **environment):
        """Run the wrapper, with these words of a command if any, as an administrator would; return
        what subprocess.run() does."""
        return subprocess.run(
            [WRAPPER, "--vddk-libdir", self.vddk(rate)] + list(words), input=json.dumps(request),
            env=dict(administrators_environment(), **environment), universal_newlines=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600)

    def start(self, request, rate=0, **environment):
        """Start a conversion and return the `Job`; LabError if the wrapper refuses."""
        result = self.run_wrapper(request, rate, **environment)
        if result.returncode != 0 or result.stderr:
            raise LabError("the wrapper ended with status %d: %s" % (
                result.returncode, result.stderr))
        job = Job(**json.loads(result.stdout))
        self.recorders.append(Recorder(job))
        return job

    def processes(self):
        """Return {pid: command line} of everything that runs in the lab but for ourselves and
        our children, the lab's own servers."""
        return {pid: command for pid, command in processes_below(self.work).items()
                if os.getpid() not in (pid, parent(pid))}

    def wait_idle(self, seconds=30):
        """Wait until nothing runs in the lab; LabError with what still does."""
        with contextlib.suppress(TimeoutError):
            return poll(lambda: not self.processes(), seconds)
        raise LabError("after %d s these still run: %s" % (seconds, self.processes()))

    def _end_processes(self):
        poll(lambda: not [end(pid) for pid in self.processes()], 30)


# Small helpers.

def run(command):
    """Run a command of the lab's own and return its output; LabError if it fails."""
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True)
    if result.returncode != 0:
        raise LabError("%s: status %d: %s" % (" ".join(command), result.returncode, result.stderr))
    return result.stdout


def poll(question, seconds):
    """Return the first true answer of question(); TimeoutError when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError("nothing within %d s" % seconds)
        time.sleep(0.05)


def when(condition, value):
    """Return the value if condition(value) is true, else None."""
    return value if condition(value) else None


def end(pid):
    """Kill the process if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def parent(pid):
    """Return the process's parent, or None."""
    with contextlib.suppress(OSError), open("/proc/%d/status" % pid) as stream:
        return int(re.search(r"^PPid:\s*([0-9]+)$", stream.read(), re.MULTILINE).group(1))


def administrators_environment():
    """Return the environment of a login, without a test's own Python, and without a proxy, which
    would be asked for the simulated servers."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return dict(kept, PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")


def make_directory(path, mode=0o755, owner=0):
    """Make the directory and its parents if they are missing; return the path."""
    os.makedirs(path, exist_ok=True)
    os.chmod(path, mode)
    os.chown(path, owner, owner)
    return path


def write_copy(source, target, words):
    """Copy a script, with the words replaced."""
    with open(source) as stream:
        text = stream.read()
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    with open(target, "w") as stream:
        stream.write(text)
    shutil.copymode(source, target)


def user_exists(name):
    """Tell whether the machine has a user of that name."""
    return subprocess.call(["getent", "passwd", name], stdout=subprocess.DEVNULL) == 0


def add_account(path, line, directory):
    """Write a copy of a user or group file with the line in place of that of the same name;
    return the path of the copy. Debian's group kvm has another number than oVirt's."""
    copy = os.path.join(directory, os.path.basename(path))
    name = line.split(":")[0] + ":"
    with open(path) as original, open(copy, "w") as changed:
        changed.writelines(other for other in original if not other.startswith(name))
        changed.write(line)
    return copy


def processes_below(directory):
    """Return {pid: command line} of the processes whose mount namespace has something of the
    directory mounted: only those of the lab that made it, even if it made others."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/mountinfo" % pid) as mounts, \
                    open("/proc/%s/cmdline" % pid, "rb") as command:
                if directory + "/" in mounts.read():
                    found[int(pid)] = command.read().replace(b"\0", b" ").decode(errors="replace")
    return found


# Preparing the machine.

def check_machine():
    """Raises Unavailable where the lab cannot be."""
    if os.geteuid() != 0:
        raise Unavailable("the lab needs root")
    if distribution() not in KERNELS:
        raise Unavailable("the lab needs Debian or Ubuntu, from whose packages it takes virt-v2v")
    if subprocess.call(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL) != 0:
        raise Unavailable("the lab needs a mount namespace, and may not make one here")
    if not os.access(WRAPPER, os.X_OK):
        raise Unavailable("%s is missing or not executable" % WRAPPER)
    for path in map(os.path.realpath, (WRAPPER, sys.prefix)):
        if path.startswith(tuple(covered + "/" for covered in COVERED)):
            raise Unavailable("%s may not lie there: the lab covers %s" % (path, list(COVERED)))


def distribution():
    """Return the name of the distribution, "debian" for example (but not for its relatives)."""
    with contextlib.suppress(OSError), open("/etc/os-release") as release:
        found = re.search("^ID=(.*)$", release.read(), re.MULTILINE)
        return found and found.group(1)


def missing_packages(packages):
    """Return those of the packages that are not installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"] + list(packages)
    listed = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            universal_newlines=True).stdout.splitlines()
    return [package for package in packages if package + " installed" not in listed]


def install_packages(packages, say):
    """Install what is missing; LabError if that fails."""
    say("looking for the packages")
    missing = missing_packages(packages)
    if not missing:
        return
    say("installing %s" % ", ".join(missing))
    run(["apt-get", "update"])
    run(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y",
         "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"] + missing)
    # In Ubuntu only root may read kernels, but the appliance is built by vdsm.
    for kernel in glob.glob("/boot/vmlinuz-*"):
        os.chmod(kernel, 0o644)


@contextlib.contextmanager
def locked(directory):
    """Hold the lock of the directory, which is made if it is missing."""
    make_directory(directory)
    lock = os.open(os.path.join(directory, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def build_store(say):
    """Return the directory with the guests' disks, the plugin and VDDK's library, which is
    made only if there is none yet from the same sources."""
    sources = [os.path.join(HERE, name)
               for name in ("make-guest", "nbdkit-vddk-plugin.c", "esx.py")]
    digest = hashlib.sha256(repr(GUESTS).encode())
    for source in sources:
        with open(source, "rb") as stream:
            digest.update(stream.read())
    store = os.path.join(CACHE, "store-" + digest.hexdigest()[:12])
    if not os.path.isdir(store):
        fresh = store + ".new"
        shutil.rmtree(fresh, ignore_errors=True)
        fill_store(make_directory(fresh), say)
        os.rename(fresh, store)
    return store


def fill_store(store, say):
    """Make what build_store() promises."""
    say("building the stand-in for VDDK")
    build = ["gcc", "-shared", "-fPIC", "-O2", "-Wall"]
    run(build + ["-o", os.path.join(store, "nbdkit-vddk-plugin.so"),
                 os.path.join(HERE, "nbdkit-vddk-plugin.c")])
    run(build + ["-o", os.path.join(store, "libvixDiskLib.so"), "-x", "c", "/dev/null"])
    for guest in GUESTS:
        say("making the guest %s, %d disk(s)" % (guest.name, guest.disk_count))
        directory = os.path.join(store, "ds", guest.name)
        run([os.path.join(HERE, "make-guest"), directory, guest.name, str(guest.disk_count)] +
            [LUKS_KEY] * (guest.name == "twin"))
        with open(os.path.join(directory, guest.name + ".vmx"), "w") as stream:
            stream.write(vmx(guest))


@contextlib.contextmanager
def work_directory():
    """Make a directory for one lab and remove it at the end. Those that killed labs left
    behind are removed, too; call this with the CACHE locked."""
    for left in glob.glob(os.path.join(CACHE, "run-*")):
        remove_abandoned(left)
    path = tempfile.mkdtemp(prefix="run-", dir=CACHE)
    os.chmod(path, 0o755)
    alive = os.open(path, os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path)
        os.close(alive)


def remove_abandoned(path):
    """Remove a work directory unless its lab, or a conversion of it, still runs."""
    # It may vanish meanwhile: a lab that ends removes it without the lock of the CACHE.
    with contextlib.suppress(FileNotFoundError, BlockingIOError), contextlib.ExitStack() as stack:
        alive = os.open(path, os.O_RDONLY)
        stack.callback(os.close, alive)
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not processes_below(path):
            shutil.rmtree(path)


# Mounts. Python has os.unshare() and os.setns() from 3.12 only.

def system_call(name, *arguments):
    """Call a function of the C library; OSError if it says -1."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "%s: %s" % (name, os.strerror(ctypes.get_errno())))


@contextlib.contextmanager
def private_mounts():
    """Move this thread to a mount namespace of its own, and back at the end."""
    directory = os.getcwd()
    host = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    system_call("unshare", CLONE_NEWNS)
    try:
        run(["mount", "--make-rprivate", "/"])
        yield
    finally:
        system_call("setns", host, CLONE_NEWNS)
        os.close(host)
        os.chdir(directory)


def bind(source, target):
    """Bind a file or directory over another."""
    run(["mount", "--bind", source, target])


def lay_over(target, layer):
    """Let the directory show the files of the layer besides (and before) its own, read-only."""
    run(["mount", "-t", "overlay", "-o", "lowerdir=%s:%s" % (layer, target), "overlay", target])
