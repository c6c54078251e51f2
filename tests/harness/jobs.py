"""The sudden end of the processes of a job."""
import os
import signal

import processes
from eventually import eventually
from faults import guardian


def wait_ended(process):
    """Wait until a process has ended."""
    eventually(lambda: not processes.is_running(process), 'process %d has ended' % process)


def kill_monitor(job):
    """Kill the monitor of a job while its guardian is stopped; return the guardian's process ID.

    SIGCONT lets the guardian end the job.
    """
    process, monitor = guardian(job), job.state()['wrapper_pid']
    os.kill(process, signal.SIGSTOP)
    os.kill(monitor, signal.SIGKILL)
    wait_ended(monitor)
    return process


def kill_wrapper(job):
    """Kill both processes of the wrapper, so that none is left to publish anything."""
    found = guardian(job), job.state()['wrapper_pid']
    for process in found:
        os.kill(process, signal.SIGKILL)
        wait_ended(process)
