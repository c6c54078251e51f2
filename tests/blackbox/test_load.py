"""Many conversions at once, and much output."""
import os

import pytest

import hidden
import processes
from faults import guardian
from virt_v2v import DISKS, bar, copying, error, leave, phase, repeat, source, stdout, wait

pytestmark = pytest.mark.promise(12)

NOISE = [stdout(b'libguestfs: trace: v2v: something or other\n' * 200)]
# Each prints about 3 MB, as fast as it can.
CONVERSION = [
    wait('go'), phase('Opening the source'), [source(disk) for disk in DISKS],
    [[copying(number, 2), repeat(100, bar(10), NOISE, bar(55)), bar(100)] for number in (1, 2)],
    phase('Finishing off')]
MANY = [20, pytest.param(200, marks=pytest.mark.long)]


def start_many(wrapper, count, *steps):
    """Start so many jobs that play the same steps; return them when all are there."""
    wrapper.virt_v2v.play(*steps)
    jobs = [wrapper.start(wrapper.request(source_disks=DISKS)) for _ in range(count)]
    assert [(job.status, job.stderr) for job in jobs] == [(0, b'')] * count
    wrapper.virt_v2v.let('go')
    return jobs


def left_over(wrapper, jobs):
    """Return what is there besides the files that belong to the jobs."""
    known = {os.path.relpath(path, wrapper.home) for job in jobs for path in job.paths}
    scratch = [run.environment[b'TMPDIR'].decode() for run in wrapper.virt_v2v.runs()]
    return ([name for name in wrapper.files() if name not in known | {'log', 'state'}]
            + [path for path in scratch if os.path.exists(path)])


@pytest.mark.parametrize('count', MANY)
def test_many_conversions_at_once_all_succeed(wrapper, count):
    jobs = start_many(wrapper, count, CONVERSION)
    for job in jobs:
        state = job.wait_finished()
        assert (state['return_code'], 'failed' in state, 'last_message' in state) == (
            0, False, False)
        assert state['disks'] == [{'path': disk, 'progress': 100} for disk in DISKS]
        assert (state['disk_count'], state['phase']) == (2, 'Finishing off')
    wrapper.wait_gone()
    assert len(wrapper.virt_v2v.runs()) == count
    assert left_over(wrapper, jobs) == []


@pytest.mark.parametrize('count', MANY)
def test_many_conversions_at_once_all_fail_with_their_own_words(wrapper, count):
    jobs = start_many(wrapper, count, CONVERSION, error('no space left'))
    for job in jobs:
        state = job.wait_finished()
        assert (state['return_code'], state['failed']) == (1, True)
        assert state['last_message']['message'] == 'no space left'
    wrapper.wait_gone()
    assert left_over(wrapper, jobs) == []


@pytest.mark.parametrize('count', MANY)
def test_the_logs_of_many_conversions_at_once_are_complete(wrapper, count):
    text = b''.join(b'line %06d\n' % number for number in range(30000))
    jobs = start_many(wrapper, count, wait('go'), stdout(text), leave(0))
    for job in jobs:
        job.wait_finished()
        assert job.log('v2v_log') == text


def test_many_conversions_at_once_keep_apart(wrapper):
    wrapper.virt_v2v.play(wait('go'))
    jobs = [wrapper.start(wrapper.request(source_disks=['disk %d' % n])) for n in range(10)]
    wrapper.virt_v2v.let('go')
    states = [job.wait_finished() for job in jobs]
    assert [state['disks'][0]['path'] for state in states] == ['disk %d' % n for n in range(10)]
    assert len({state['pid'] for state in states}) == 10
    assert len({path for job in jobs for path in job.paths}) == 30


def descriptors(process):
    """Return what a process has open, but for a state that is just being written."""
    return {number: name for number, name in processes.descriptors(process).items()
            if not name.endswith('.tmp')}


def test_a_conversion_leaves_no_descriptor_open_meanwhile(wrapper):
    hidden.allow_looking_into(wrapper)
    steps = [[wait(text), phase(text)] for text in ('one', 'two')]
    wrapper.virt_v2v.play(steps, CONVERSION, wait('end'))
    job = wrapper.start()
    for text in ('one', 'two'):     # with the second, all that came before the first is done
        wrapper.virt_v2v.let(text)
        job.wait_state(lambda state, text=text: state.get('phase') == text, text)
    both = [job.state()['wrapper_pid'], guardian(job)]
    before = list(map(descriptors, both))
    wrapper.virt_v2v.let('go')
    job.wait_state(lambda state: state['phase'] == 'Finishing off', 'all was printed')
    after = list(map(descriptors, both))
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert after == before
