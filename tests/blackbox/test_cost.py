"""What the wrapper costs, as far as that can be counted: wake-ups, writes, memory. No timings.

tests/bench measures the rest.
"""
import os
import subprocess
import sys
import time

import pytest

import hidden
import processes
from eventually import eventually
from faults import guardian
from virt_v2v import copying, fill, old_bar, phase, reach, repeat, stderr, stdout, wait

# Of the memory of a Python that does nothing. What the monitor keeps of the output is at most a few
# chunks and lines of 64 KiB.
MEMORY_BOUND = 3
MEGABYTE = 1000 * 1000


# --- silence -----------------------------------------------------------------------------

def counters(process):
    """Return what changes if a process wakes up, or writes anything."""
    io = processes.io(process)
    return processes.status(process)['voluntary_ctxt_switches'], io['syscw'], io['syscr']


def asleep(process):
    """Say whether a process waits for something."""
    return processes.state(process) == 'S'


def test_while_virt_v2v_is_silent_nothing_wakes_up_or_writes(wrapper):
    hidden.allow_looking_into(wrapper)
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1), old_bar(44),
                          reach('silent'), wait('end'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('silent')
    ours = [guardian(job), job.state()['wrapper_pid']]
    job.wait_state(lambda state: [disk['progress'] for disk in state['disks']] == [44],
                   'the progress is published')
    before = eventually(lambda: settled(ours), 'both processes have come to rest')
    # Longer than any interval that the wrapper has for a conversion that goes on.
    until = time.monotonic() + 1.5
    eventually(lambda: time.monotonic() > until, 'a while has passed')
    after = [counters(process) for process in ours]
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert after == before


def settled(found):
    """Return the counters of processes if they stay as they are for half a second, or None."""
    before = [counters(process) for process in found]
    until = time.monotonic() + 0.5
    eventually(lambda: time.monotonic() > until, 'half a second has passed')
    same = before == [counters(process) for process in found]
    return before if same and all(map(asleep, found)) else None


# --- writes ------------------------------------------------------------------------------

def states_until(job, condition):
    """Look at the state file all the time until condition(state); return how many there were."""
    seen = set()

    def look():
        status = os.stat(job.paths.state_file)
        seen.add((status.st_ino, status.st_mtime_ns))
        return condition(job.state())
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end, job.state()
    return len(seen)


def test_a_flood_of_progress_is_ten_writes_a_second(wrapper):
    steps = [repeat(500, stdout(b'    (%.2f/100%%)\r' % (percent + 0.5)))
             for percent in range(100)]
    wrapper.virt_v2v.play(copying(1, 1), wait('go'), steps, reach('flooded'), wait('end'))
    job = wrapper.start()
    job.wait_state(lambda state: state['disks'], 'the copy has begun')
    begin = time.monotonic()
    wrapper.virt_v2v.let('go')
    writes = states_until(job, lambda state: state['disks'][0]['progress'] == 99.5)
    seconds = time.monotonic() - begin
    wrapper.virt_v2v.wait_for('flooded')
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    # Beside those of progress: the one that was there, the first one, which is written at once.
    assert writes <= seconds * 10 + 2


# --- memory ------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def floor():
    """The memory in KiB of a Python that does nothing."""
    code = 'import time; print(end="x", flush=True); time.sleep(600)'
    with subprocess.Popen([sys.executable, '-I', '-c', code], stdout=subprocess.PIPE) as python:
        python.stdout.read(1)
        found = processes.peak_memory(python.pid)
        python.kill()
    return found


def peak_after(wrapper, *steps):
    """Return the peak of the monitor's memory in KiB when virt-v2v has done that."""
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1), *steps, stdout(b'\n'),
                          old_bar(44), reach('done'), wait('end'))
    job = wrapper.start()
    job.wait_state(lambda state: [disk['progress'] for disk in state['disks']] == [44],
                   'all of it has been read')
    found = processes.peak_memory(job.state()['wrapper_pid'])
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    return found


def test_a_line_of_200_megabytes_takes_no_memory(wrapper, floor):
    assert peak_after(wrapper, fill('stdout', b'x', 200 * MEGABYTE)) < MEMORY_BOUND * floor


def test_a_log_of_100_megabytes_takes_no_memory(wrapper, floor):
    line = b'nbdkit: vddk[3]: debug: pread count=2097152 offset=1073741824\n'
    lines = (line * 99 + b'something: error: that is none of ours\n') * 10
    count = 100 * MEGABYTE // len(lines)
    assert peak_after(wrapper, repeat(count, stderr(lines))) < MEMORY_BOUND * floor
