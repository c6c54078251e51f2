"""Killing one process of a job at one system call of it.

The processes have roles: "launcher" is the caller's own, "guardian" and "monitor" are the two
that it leaves behind, "child" is what the monitor executes as virt-v2v.
"""
import os
import signal
import subprocess
import time

import pytest

import processes
from eventually import eventually
from faults import strace, tamper

STOP_IN = """\
real_{0} = module.{0}


def {0}(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)
    return real_{0}(*arguments)


module.{0} = {0}
"""
# The process stops where its role begins, until strace is attached.
STOP = {
    'launcher': 'os.kill(os.getpid(), signal.SIGSTOP)\n',
    'guardian': STOP_IN.format('guard'),
    'monitor': STOP_IN.format('monitor'),
}
# Questions about its capabilities would be asked by children, too.
STOP['child'] = STOP['monitor'] + """
module.capabilities = lambda ask: module.Capabilities(True, {'vddk', 'output:rhv'}, {'-io', '-ip'})
"""


def stopped(wrapper):
    """Return the process of the wrapper that has stopped, or None."""
    for process in wrapper.processes():
        try:
            if processes.state(process) == 'T':
                return process
        except FileNotFoundError:
            pass
    return None


def traced_by(process):
    """Return the process that traces this one, 0 for none."""
    try:
        return int(processes.status(process)['TracerPid'])
    except FileNotFoundError:
        return 0


class Tracer:
    """strace, attached to a stopped process that it lets go on."""

    def __init__(self, process, log, *options):
        self._log = log
        # Never with strings: what is written may be what nobody is to see.
        self._strace = subprocess.Popen(
            [strace(), '-s', '0', '-o', log] + list(options) + ['-p', str(process)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={'LC_ALL': 'C'})
        eventually(lambda: traced_by(process) or self._strace.poll() is not None,
                   'strace is attached')
        if self._strace.poll() not in (None, -signal.SIGKILL):
            os.kill(process, signal.SIGKILL)
            pytest.skip('strace cannot attach here: %s' % self._strace.stderr.read().decode())
        os.kill(process, signal.SIGCONT)

    def end(self):
        """Wait until all that it traces has ended; return its log."""
        try:
            self._strace.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._strace.kill()
            self._strace.communicate()
            raise
        with open(self._log, encoding='utf-8', errors='replace') as stream:
            return stream.read()


def killed_at(wrapper, request, role, call, number):
    """Run a job, one process of which is killed at its system call of that name and number.

    Returns (whether there was such a call, what the caller got on stdout and stderr) when all
    processes have ended.
    """
    strace()            # skips, before a process waits for it in vain
    tamper(wrapper, STOP[role])
    log = os.path.join(wrapper.directory, 'strace.log')
    options = ['-e', 'inject=?%s:signal=KILL:when=%d' % (call, number)]
    process = wrapper.popen()
    with process:
        process.stdin.write(request)
        process.stdin.close()
        process.stdin = None
        target = eventually(lambda: stopped(wrapper), 'the %s has stopped' % role)
        tracer = Tracer(target, log, *options + (['-f'] if role == 'child' else []))
        said = process.communicate(timeout=60)
    wrapper.wait_gone()
    return 'killed by SIGKILL' in tracer.end(), b''.join(said)


def numbers():
    """Yield the numbers to kill at: each at first, later fewer.

    What comes late and often is the search of /proc for processes that are left.
    """
    number = 1
    while True:
        yield number
        number = max(number + 1, number * 5 // 4 if number > 20 else 0)


def sweep(wrapper, check, request, role, call):
    """Kill at one number after the other until there is no such call; return how many there were.

    check is called with what the caller got, after each of them.
    """
    for count, number in enumerate(numbers()):
        hit, said = killed_at(wrapper, request, role, call, number)
        check(said)
        if not hit:
            return count
    return None


def begun():
    """Return the time as files have it, which is kept less precisely: not later than now."""
    return time.time() - 1
