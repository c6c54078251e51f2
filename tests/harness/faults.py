"""Faults for the tests to inject: mistakes of ours, failing disks, failing system calls, kills."""
import ast
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile

import pytest
import virt_v2v_wrapper

import processes
from eventually import eventually
from script import loading

RUNNER = """\
import os
import signal

{load}
{changes}

os._exit(module.main())
"""


# --- mistakes of ours --------------------------------------------------------------------

def tamper(wrapper, changes):
    """Have the wrapper started by a program that changes its module first.

    changes are statements, in which the script is "module". AssertionError if they use a name
    that the script does not have: then nothing would be broken, and the test would prove nothing.
    """
    for name in names_in(changes):
        known(name)
    runner = os.path.join(wrapper.directory, 'runner.py')
    script = os.path.join(wrapper.directory, 'virt-v2v-wrapper.py')
    with open(runner, 'w', encoding='utf-8') as stream:
        stream.write(RUNNER.format(load=loading(script), changes=changes))
    wrapper.script = runner


def names_in(changes):
    """Return the names of the script, dotted below its classes, that statements use."""
    found = set()
    for node in ast.walk(ast.parse(changes)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id == 'module':
            found.add('.'.join(parts))
    return found


def known(name):
    """Return a name of the script, dotted if it is of a class; AssertionError if there is none."""
    found = virt_v2v_wrapper
    for part in name.split('.'):
        assert hasattr(found, part), 'the script has no %r' % name
        found = getattr(found, part)
    return name


def absent(wrapper):
    """Have no virt-v2v."""
    os.unlink(wrapper.virt_v2v.program)


def not_executable(wrapper):
    """Have a virt-v2v that is no program."""
    os.chmod(wrapper.virt_v2v.program, 0o644)


def without_interpreter(wrapper):
    """Have a virt-v2v that cannot be executed although it is a program."""
    with open(wrapper.virt_v2v.program, 'w') as stream:
        stream.write('#!/nonexistent\n')


def guardian(job):
    """Return the process ID of the guardian of a job that goes on."""
    return int(processes.status(job.state()['wrapper_pid'])['PPid'])


def last_message(state):
    """Return the text that says why a conversion failed."""
    assert state['last_message']['type'] == 'error'
    return state['last_message']['message']


# --- disks -------------------------------------------------------------------------------

class Disk:
    """A small file system of its own."""

    def __init__(self, directory):
        self._directory = directory
        self._filler = os.path.join(directory, 'filler')

    def fail(self):
        """Leave no room in it."""
        with open(self._filler, 'ab', 0) as stream:
            with pytest.raises(OSError) as caught:
                while True:
                    stream.write(bytes(4096))
        assert caught.value.errno == errno.ENOSPC

    def work(self):
        """Make room again."""
        os.unlink(self._filler)

    def remount(self, options):
        """Change how it is mounted."""
        command = ['mount', '-n', '-o', 'remount,' + options, self._directory]
        # Busy while something is being written.
        eventually(lambda: subprocess.call(command, stderr=subprocess.DEVNULL) == 0, 'remounted')


class ReadOnlyDisk(Disk):
    """One that becomes read-only, as a file system does after an error."""

    def fail(self):
        """Refuse to write."""
        self.remount('ro')

    def work(self):
        """Write again."""
        self.remount('rw')


@contextlib.contextmanager
def disk(directory, user, kind=Disk):
    """Have a small file system at a directory, which is made for user; skip without mounts."""
    if os.getuid() != 0:
        pytest.skip('needs root, to mount a small file system')
    os.mkdir(directory)
    options = 'size=256k,mode=0755,uid=%d,gid=%d' % (user.pw_uid, user.pw_gid)
    mount = ['mount', '-n', '-t', 'tmpfs', '-o', options, 'tmpfs', directory]
    if subprocess.call(mount, stderr=subprocess.DEVNULL) != 0:
        pytest.skip('cannot mount a file system here')
    try:
        yield kind(directory)
    finally:
        subprocess.check_call(['umount', '-n', '--lazy', directory])


# --- system calls ------------------------------------------------------------------------

def strace():
    """Return the command strace; skip where it is not there or may not trace."""
    program = shutil.which('strace')
    if program is None:
        pytest.skip('needs strace')
    if subprocess.call([program, '-o', '/dev/null', 'true'], stderr=subprocess.DEVNULL) != 0:
        pytest.skip('strace may not trace here')
    return program


@contextlib.contextmanager
def traced(process, *options):
    """Have strace with options on a process; yields a function that returns its log so far."""
    program = strace()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, 'log')

        def log():
            with open(path, encoding='utf-8', errors='replace') as stream:
                return stream.read()

        open(path, 'w').close()
        tracer = subprocess.Popen([program, '-o', path] + list(options) + ['-p', str(process)],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: noticed(process, tracer, log), 'strace traces')
            yield log
        finally:
            if tracer.poll() is None:
                tracer.terminate()
            tracer.wait()


def noticed(process, tracer, log):
    """Say whether the tracer saw a signal that is ignored, so that it sees all from now on."""
    if tracer.poll() not in (None, 0, -signal.SIGKILL):
        pytest.skip('strace cannot attach to a process here')
    try:
        os.kill(process, signal.SIGURG)
    except ProcessLookupError:
        return True         # killed by what was injected
    return log() != ''


class FailingCall:
    """A system call of a process that fails, if paths are given only there."""

    def __init__(self, process, call, error, paths=()):
        self._process = process
        self._options = ['-e', 'trace=' + call, '-e', 'inject=%s:error=%s' % (call, error)]
        for path in paths:
            self._options += ['-P', path]
        self._stack = contextlib.ExitStack()

    def fail(self):
        """Have it fail from now on."""
        self.log = self._stack.enter_context(traced(self._process, *self._options))

    def work(self):
        """Have it succeed from now on."""
        self._stack.close()
