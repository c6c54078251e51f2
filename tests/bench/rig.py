"""Running the real script for the benchmark, and what the kernel counts of its processes."""
import ctypes
import fcntl
import itertools
import json
import marshal
import mmap
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

import blackbox
import processes

PYTHON = os.path.realpath(sys.executable)
HERE = os.path.dirname(os.path.abspath(__file__))
# The wrapper is not dumpable: its user cannot read what it writes and what memory it has.
MAY_LOOK = os.getuid() == 0
PATIENCE = 120.0
KEPT = 1 << 26                      # bytes of a log before it is emptied
PR_SET_CHILD_SUBREAPER = 36         # prctl(2)
IN_MOVED_TO = 0x80                  # inotify(7)
EVENT = struct.Struct('iIII')

LIBC = ctypes.CDLL(None, use_errno=True)

# A shell that answers the one question of the wrapper, and then becomes the stand-in or ends.
PROGRAM = """\
#!/bin/sh
case $1 in
--machine-readable=fd:1) echo virt-v2v virt-v2v-2.0 vddk io/oo input:libvirt output:rhv; exit ;;
esac
{}
"""


class Rig:
    """The script and what it needs, in a directory in memory; it runs as an ordinary user."""

    def __init__(self):
        self._root = tempfile.mkdtemp(prefix='virt-v2v-wrapper-bench-', dir='/dev/shm')
        os.chmod(self._root, 0o755)
        self._user = blackbox.ordinary_user()
        self._wrapper = blackbox.Wrapper(os.path.basename(self._root), self._root,
                                         self._user, self._user)
        self._stand_in = os.path.join(self._root, 'stand_in.py')
        shutil.copyfile(os.path.join(HERE, 'stand_in.py'), self._stand_in)
        # So that the guardian becomes our child when the script has ended.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._do_without_options()
        self._numbers = itertools.count()       # each job has a guest of its own
        self._begin = mmap.mmap(-1, 8)      # shared with children
        self._gates = {}

    def _do_without_options(self):
        """Have the directories be those of the script, as for most callers: options cost time."""
        with open(self._wrapper.script) as stream:
            text = stream.read()
        default = re.search("^VDDK_LIBDIR = .*$", text, re.MULTILINE).group()
        with open(self._wrapper.script, 'w') as stream:
            stream.write(text.replace(default, 'VDDK_LIBDIR = %r' % self._wrapper.vddk_libdir))
        self._wrapper.arguments = []
        self._environment = dict(self._wrapper.environment(), XDG_STATE_HOME=self._wrapper.home)
        self.state_dir = os.path.join(self._wrapper.home, 'virt-v2v-wrapper')

    def close(self):
        """End everything and remove the directory."""
        for process in processes.marked(self._wrapper.name):
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(self._root, ignore_errors=True)

    # --- virt-v2v ------------------------------------------------------------------------

    def use(self, *steps):
        """Have virt-v2v play steps (see stand_in.py), or end at once; lock the gates."""
        last = 'exec {} -I -S {} {} "$@"'.format(PYTHON, self._stand_in, self._wrapper.home)
        self._wrapper.add_program('virt-v2v', PROGRAM.format(last if steps else ''))
        with open(self._path('plan'), 'wb') as stream:
            marshal.dump(steps, stream)
        for gate in {step[1] for step in steps if step[0] == 'wait'}:
            self._gates[gate] = open(self._path(gate), 'w')
            fcntl.flock(self._gates[gate], fcntl.LOCK_EX)

    def open(self, gate):
        """Let the stand-ins go on."""
        self._gates.pop(gate).close()

    def notes(self):
        """Return the pairs (value, time) that the stand-in left."""
        with open(self._path('notes')) as stream:
            return [tuple(map(float, line.split())) for line in stream]

    def _path(self, name):
        return os.path.join(self._wrapper.home, name)

    # --- the script ----------------------------------------------------------------------

    def run(self, command, request=b''):
        """Run a command as the ordinary user; return (seconds from its execution on, output)."""
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd='/',
                                   env=self._environment, preexec_fn=self._prepare)
        output = process.communicate(request)[0]
        seconds = time.perf_counter() - struct.unpack('d', self._begin[:])[0]
        if process.returncode:
            raise SystemExit('{} ended with status {}'.format(command[:3], process.returncode))
        return seconds, output

    def _prepare(self):
        blackbox.become(self._user)
        self._begin[:] = struct.pack('d', time.perf_counter())

    def timed_start(self):
        """Start a conversion; return (seconds it took, Job)."""
        others = processes.children(os.getpid())
        request = self._wrapper.request(vm_name='guest%d' % next(self._numbers))
        seconds, output = self.run(self._wrapper.command(), json.dumps(request).encode())
        guardian, = set(processes.children(os.getpid())) - set(others)
        return seconds, Job(output, guardian)

    def start(self):
        """Start a conversion; return the Job."""
        return self.timed_start()[1]


class Job(blackbox.Job):
    """One conversion, from outside."""

    def __init__(self, output, guardian):
        super().__init__(0, output, b'')
        self.pids = (guardian, self.state()['wrapper_pid'])     # the latter is the monitor

    def log_size(self):
        """Return the size of virt-v2v's log."""
        return os.stat(self.paths.v2v_log).st_size

    def wait_phase(self, text):
        """Wait until virt-v2v has said that it does this."""
        wait_until(lambda: keep_short(self.paths.v2v_log) or self.state().get('phase') == text)

    def finish(self):
        """Wait for the last process; remove the files."""
        os.waitpid(self.pids[0], 0)
        for path in self.paths:
            os.unlink(path)


def wait_until(condition, pause=0.02):
    """Wait until condition() is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit('not within {} s'.format(PATIENCE))
        time.sleep(pause)


def keep_short(path):
    """Empty a file that got long, as a rotation of logs may do. Returns None.

    The pages of a file of gigabytes are freed with it, and a virtual machine may give them back to
    its host; then the next writer pays for getting them again: up to 4 s for 2 GB were seen.
    """
    if os.stat(path).st_blocks * 512 > KEPT:
        os.truncate(path, 0)


class Watch:
    """Sees when a file in a directory is replaced (inotify)."""

    def __init__(self, directory):
        self._fd = LIBC.inotify_init1(os.O_CLOEXEC)
        if self._fd < 0 or LIBC.inotify_add_watch(self._fd, os.fsencode(directory),
                                                  IN_MOVED_TO) < 0:
            raise SystemExit('inotify: ' + os.strerror(ctypes.get_errno()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._fd)

    def wait(self, patience=PATIENCE):
        """Wait for the next replacements; return how many there were, 0 if none came in time."""
        if not select.select([self._fd], [], [], patience)[0]:
            return 0
        data = os.read(self._fd, 1 << 16)
        count = offset = 0
        while offset < len(data):
            offset += EVENT.size + EVENT.unpack_from(data, offset)[3]
            count += 1
        return count


# --- what the kernel counts --------------------------------------------------------------

def threads(pids):
    """Yield the directory in /proc of each thread of the processes."""
    for pid in pids:
        directory = '/proc/{}/task'.format(pid)
        for name in os.listdir(directory):
            yield os.path.join(directory, name)


def cpu_seconds(pids):
    """Return how long the processes have been running on a processor (to the nanosecond)."""
    total = 0
    for directory in threads(pids):
        with open(os.path.join(directory, 'schedstat')) as stream:
            total += int(stream.read().split()[0])
    return total / 1e9


def wake_ups(pids):
    """Return how often a thread of the processes was woken or interrupted."""
    total = 0
    for directory in threads(pids):
        with open(os.path.join(directory, 'status')) as stream:
            total += sum(int(line.split()[1]) for line in stream if 'ctxt_switches' in line)
    return total


def writes(pids):
    """Return how many calls of write the processes made; only if MAY_LOOK."""
    return sum(processes.io(pid)['syscw'] for pid in pids)


def pss(pids):
    """Return the memory of the processes in MiB, shared pages by shares; only if MAY_LOOK."""
    return sum(memory(pid)['Pss'] for pid in pids) / 1024


def pss_alone(pids):
    """Return the memory in MiB of processes, all forks of one, if no other ran the same program.

    The PSS of the pages of files gets smaller with each other process that has them mapped.
    """
    found = list(map(memory, pids))
    return (max(one['Rss'] - one['Anonymous'] for one in found)
            + sum(one['Pss_Anon'] for one in found)) / 1024


def peak_memory(pids):
    """Return the MiB of memory that the processes had at most, each at its own time."""
    return sum(map(processes.peak_memory, pids)) / 1024


def memory(pid):
    """Return /proc/PID/smaps_rollup in KiB, proc(5)."""
    with open('/proc/{}/smaps_rollup'.format(pid)) as stream:
        lines = [line.split() for line in stream][1:]
    return {line[0].rstrip(':'): int(line[1]) for line in lines}
