"""Running the real script for the benchmark, and what the kernel counts of its processes."""
import ctypes
import fcntl
import json
import marshal
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time

import blackbox
import processes

PYTHON = '/usr/bin/python3'
HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 300.0
KEPT = 1 << 26                      # bytes of a log before it is emptied
PR_SET_CHILD_SUBREAPER = 36         # prctl(2)
IN_MOVED_TO = 0x80                  # inotify(7)
EVENT = struct.Struct('iIII')

LIBC = ctypes.CDLL(None, use_errno=True)

# A shell that answers the one question of the wrapper and then becomes the stand-in.
PROGRAM = """\
#!/bin/sh
case $1 in
--machine-readable=fd:1) echo virt-v2v virt-v2v-2.0 vddk io/oo input:libvirt output:rhv; exit ;;
esac
{}
"""


class Rig:
    """The script and what it needs, in a directory in memory. It runs as an ordinary user.

    Made by root, it makes this whole process that user, so that nothing of the root user's is
    measured.
    """

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix='virt-v2v-wrapper-bench-', dir='/dev/shm')
        os.chmod(self.directory, 0o755)
        user = blackbox.ordinary_user()
        self._wrapper = blackbox.Wrapper(os.path.basename(self.directory), self.directory,
                                         user, user)
        shutil.copy(os.path.join(HERE, 'stand_in.py'), self.directory)
        give_away(self.directory, user)
        os.chdir('/')
        blackbox.become(user)
        # So that the guardian becomes our child when the script has ended.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.state_dir = self._wrapper.state_dir
        os.makedirs(self.state_dir)
        self._request = json.dumps(self._wrapper.request()).encode()
        self._environment = self._wrapper.environment()
        self._gates = {}

    def close(self):
        """End everything and remove the directory."""
        for process in processes.marked(os.path.basename(self.directory)):
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def command(self):
        """Return the command that starts the script."""
        return [PYTHON, '-IS', self._wrapper.script] + self._wrapper.arguments

    # --- virt-v2v ------------------------------------------------------------------------

    def stand_in(self, name, *numbers):
        """Return the command of the stand-in that does what the function of that name does."""
        return [PYTHON, '-I', '-S', os.path.join(self.directory, 'stand_in.py'), self.directory,
                name] + list(map(str, numbers)) + ['--']

    def use(self, name=None, *numbers):
        """Have virt-v2v do that, or nothing at all; lock the gates."""
        last = 'exec {} "$@"'.format(' '.join(self.stand_in(name, *numbers))) if name else 'exit'
        self._wrapper.add_program('virt-v2v', PROGRAM.format(last))
        for gate in ('go', 'end'):
            self._gates[gate] = open(os.path.join(self.directory, gate), 'w')
            fcntl.flock(self._gates[gate], fcntl.LOCK_EX)

    def open(self, gate):
        """Let the stand-ins go on."""
        self._gates.pop(gate).close()

    def plan(self, steps):
        """Set what the stand-in "recorded" writes: (message, output, how often) each."""
        with open(os.path.join(self.directory, 'plan'), 'wb') as stream:
            marshal.dump(steps, stream)

    def notes(self):
        """Return the pairs of numbers that the stand-in left."""
        with open(os.path.join(self.directory, 'notes')) as stream:
            return [tuple(map(float, line.split())) for line in stream]

    # --- the script ----------------------------------------------------------------------

    def timed_start(self):
        """Start a conversion; return (seconds it took, Job)."""
        others = processes.children(os.getpid())
        begin = time.perf_counter()
        output = run(self.command(), self._request, self._environment)
        seconds = time.perf_counter() - begin
        guardian, = set(processes.children(os.getpid())) - set(others)
        return seconds, Job(json.loads(output.decode()), guardian)

    def start(self):
        """Start a conversion; return the Job."""
        return self.timed_start()[1]


def give_away(directory, user):
    """Have a directory and all in it belong to a user."""
    for parent, _, names in os.walk(directory):
        for path in [parent] + [os.path.join(parent, name) for name in names]:
            os.chown(path, user.pw_uid, user.pw_gid)


def run(command, request=b'', environment=None):
    """Run a command to the end of its output; return that. It has to succeed."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=environment, cwd='/')
    output = process.communicate(request)[0]
    if process.returncode:
        raise SystemExit('{} ended with status {}'.format(command[:3], process.returncode))
    return output


class Job:
    """One conversion, from outside."""

    def __init__(self, paths, guardian):
        self._paths = paths
        self.log = paths['v2v_log']
        self.guardian = guardian
        self.monitor = self.state()['wrapper_pid']

    def state(self):
        """Return what the state file says."""
        with open(self._paths['state_file'], encoding='utf-8') as stream:
            return json.load(stream)

    def log_size(self):
        """Return the size of virt-v2v's log."""
        return os.stat(self.log).st_size

    def wait_finished(self):
        """Wait for the last process of the conversion; remove its files; return its last state."""
        os.waitpid(self.guardian, 0)
        state = self.state()
        for path in self._paths.values():
            os.unlink(path)
        return state


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


def ended(process):
    """Say whether a child has ended; it stays a zombie."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Watch:
    """Sees when a file in a directory is replaced (inotify)."""

    def __init__(self, directory):
        self._fd = LIBC.inotify_init1(os.O_CLOEXEC)
        if self._fd < 0 or LIBC.inotify_add_watch(self._fd, os.fsencode(directory),
                                                  IN_MOVED_TO) < 0:
            raise SystemExit('inotify: ' + os.strerror(ctypes.get_errno()))

    def wait(self):
        """Wait for the next replacements; return how many there were."""
        data = os.read(self._fd, 1 << 16)
        count = offset = 0
        while offset < len(data):
            offset += EVENT.size + EVENT.unpack_from(data, offset)[3]
            count += 1
        return count

    def close(self):
        """Watch no longer."""
        os.close(self._fd)


# --- what the kernel counts --------------------------------------------------------------

def cpu_seconds(process):
    """Return how long a process has been running on a processor (to the nanosecond)."""
    with open('/proc/{}/schedstat'.format(process)) as stream:
        return int(stream.read().split()[0]) / 1e9


def memory(process):
    """Return {'VmHWM': peak of the resident set, 'Rss': now, 'Pss': ..., ...} in KiB, proc(5)."""
    with open('/proc/{}/smaps_rollup'.format(process)) as stream:
        lines = [line.split() for line in stream][1:]
    found = {line[0].rstrip(':'): int(line[1]) for line in lines}
    found['VmHWM'] = processes.peak_memory(process)
    return found


def memory_alone(*found):
    """Return the memory in KiB of processes, all forks of one, if no other ran the same program.

    `found` is what memory() says of each. The PSS of the pages of files gets smaller with each
    other process that has the same file mapped, whosever it is.
    """
    files = max(process['Rss'] - process['Anonymous'] for process in found)
    return files + sum(process['Pss_Anon'] for process in found)


def written(process):
    """Return how many bytes a process has written, whereto ever."""
    return processes.io(process)['wchar']


def activity(process):
    """Return (how often it was woken or interrupted, how many calls of write it made)."""
    status = processes.status(process)
    return (int(status['voluntary_ctxt_switches']) + int(status['nonvoluntary_ctxt_switches']),
            processes.io(process)['syscw'])
