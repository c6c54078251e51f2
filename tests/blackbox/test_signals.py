"""Signals to the published process ID, and to the wrapper."""
import contextlib
import os
import signal

import pytest

import processes
from eventually import eventually
from faults import guardian, last_message, tamper
from virt_v2v import DISKS, bar, copying, daemon, fork, ignore, phase, reach, source, wait

pytestmark = pytest.mark.promise(11)

STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
STOPPED = 'virt-v2v was told to stop by '


@pytest.fixture
def impatient(wrapper):
    """The wrapper, but virt-v2v has little time to end when it is told to."""
    tamper(wrapper, 'module.STOP_GRACE = 0.2')
    return wrapper


def start_copying(wrapper, *steps):
    """Start a job that plays steps, then waits for "end"; return it when it waits."""
    wrapper.virt_v2v.play(*steps, source(DISKS[0]), copying(1, 1), bar(44), reach('copying'),
                          wait('end'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('copying')
    job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'] == 44,
                   'progress is published')
    return job


def assert_failed(wrapper, job, return_code, message):
    """The job has failed this way, its state is as documented, and nothing is left of it."""
    state = job.wait_finished()
    wrapper.wait_gone()
    assert (state['return_code'], state['failed']) == (return_code, True)
    assert last_message(state) == message
    assert state['disks'] == [{'path': DISKS[0], 'progress': 44}]
    assert_nothing_left(wrapper)


def assert_nothing_left(wrapper):
    """No process of the job and no temporary file is left."""
    wrapper.wait_gone()
    for run in wrapper.virt_v2v.runs():
        assert not os.path.exists(run.environment[b'TMPDIR'])


def signal_published(job, *numbers):
    """Send signals to the published process ID."""
    for number in numbers:
        os.kill(job.state()['pid'], number)


def signal_wrapper(job, *numbers):
    """Send signals to the wrapper."""
    process = job.state()['wrapper_pid']
    for number in numbers:
        os.kill(process, number)


def stop_published(job):
    """Stop virt-v2v with a signal; return when it has stopped."""
    process = job.state()['pid']
    os.kill(process, signal.SIGSTOP)
    eventually(lambda: processes.state(process) == 'T', 'virt-v2v is stopped')


# --- to the published process ID ---------------------------------------------------------

@pytest.mark.parametrize('number', STOPS)
def test_a_stop_signal_to_the_published_pid_ends_the_job(wrapper, number):
    job = start_copying(wrapper)
    signal_published(job, number)
    assert_failed(wrapper, job, 1, STOPPED + signal.Signals(number).name)


def test_a_stop_signal_to_an_older_virt_v2v_ends_the_job(wrapper):
    """It has no handler for it."""
    wrapper.use('1.40.2')
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('running')
    signal_published(job, signal.SIGTERM)
    state = job.wait_finished()
    assert (state['return_code'], state['failed']) == (-signal.SIGTERM, True)
    assert last_message(state) == 'virt-v2v was killed by SIGTERM'
    assert_nothing_left(wrapper)


def start_copying_with_stubborn_children(wrapper, *steps):
    """Start a job whose virt-v2v, after steps, has a child and a daemon that ignore TERM."""
    job = start_copying(wrapper, *steps,
                        fork(ignore(signal.SIGTERM), reach('child'), wait('never')),
                        daemon(ignore(signal.SIGTERM), reach('daemon'), wait('never')))
    wrapper.virt_v2v.wait_for('child')
    wrapper.virt_v2v.wait_for('daemon')
    return job


def test_kill_to_the_published_pid_ends_the_job(wrapper):
    job = start_copying(wrapper)
    signal_published(job, signal.SIGKILL)
    assert_failed(wrapper, job, -signal.SIGKILL, 'virt-v2v was killed by SIGKILL')


def test_kill_to_the_published_pid_ends_its_descendants(wrapper):
    job = start_copying_with_stubborn_children(wrapper)
    signal_published(job, signal.SIGKILL)
    assert_failed(wrapper, job, -signal.SIGKILL, 'virt-v2v was killed by SIGKILL')


def test_stop_and_cont_to_the_published_pid_change_nothing(wrapper):
    job = start_copying(wrapper)
    before = job.state()
    stop_published(job)
    assert job.state() == before
    wrapper.virt_v2v.let('end')
    signal_published(job, signal.SIGCONT)
    state = job.wait_finished()
    assert (state['return_code'], 'failed' in state) == (0, False)
    assert_nothing_left(wrapper)


def test_a_stopped_virt_v2v_is_not_taken_for_one_that_ended(wrapper):
    job = start_copying(wrapper, fork(wait('print'), phase('What came later'), wait('never')))
    stop_published(job)
    wrapper.virt_v2v.let('print')
    state = job.wait_state(lambda state: state['phase'] == 'What came later', 'it goes on')
    assert 'return_code' not in state
    wrapper.virt_v2v.let('end')
    signal_published(job, signal.SIGCONT)
    assert job.wait_finished()['return_code'] == 0


def test_term_to_a_stopped_virt_v2v_ends_the_job_when_it_goes_on(wrapper):
    job = start_copying(wrapper)
    stop_published(job)
    signal_published(job, signal.SIGTERM, signal.SIGCONT)
    assert_failed(wrapper, job, 1, STOPPED + 'SIGTERM')


def test_kill_to_a_stopped_virt_v2v_ends_the_job(wrapper):
    job = start_copying(wrapper)
    stop_published(job)
    signal_published(job, signal.SIGKILL)
    assert_failed(wrapper, job, -signal.SIGKILL, 'virt-v2v was killed by SIGKILL')


def test_a_virt_v2v_that_ignores_term_goes_on(wrapper):
    job = start_copying(wrapper, ignore(signal.SIGTERM))
    signal_published(job, signal.SIGTERM)
    wrapper.virt_v2v.let('end')
    state = job.wait_finished()
    assert (state['return_code'], 'failed' in state) == (0, False)


# --- to the wrapper ----------------------------------------------------------------------

@pytest.mark.parametrize('number', STOPS)
def test_a_stop_signal_to_the_wrapper_ends_virt_v2v_with_term(wrapper, number):
    job = start_copying(wrapper)
    signal_wrapper(job, number)
    assert_failed(wrapper, job, 1, 'the wrapper was told to stop by ' + number.name)
    assert b'Exiting on signal SIGTERM' in job.log('v2v_log')


@pytest.mark.parametrize('number', STOPS)
def test_a_second_stop_signal_does_not_interrupt_the_first(wrapper, number):
    job = start_copying(wrapper, ignore(signal.SIGTERM))
    signal_wrapper(job, signal.SIGTERM)
    eventually(lambda: b'stopping virt-v2v' in job.log('wrapper_log'), 'it is being stopped')
    signal_wrapper(job, number)
    assert 'finished' not in job.state()
    signal_published(job, signal.SIGINT)        # it ends in its own time
    assert_failed(wrapper, job, 1, 'the wrapper was told to stop by SIGTERM')
    assert job.log('wrapper_log').count(b'stopping virt-v2v') == 1


def test_two_stop_signals_at_once_are_one(wrapper):
    job = start_copying(wrapper)
    signal_wrapper(job, signal.SIGTERM, signal.SIGTERM)
    assert_failed(wrapper, job, 1, 'the wrapper was told to stop by SIGTERM')


def test_term_to_wrapper_and_virt_v2v_at_once_ends_the_job(wrapper):
    job = start_copying(wrapper)
    signal_wrapper(job, signal.SIGTERM)
    signal_published(job, signal.SIGTERM)
    state = job.wait_finished()
    wrapper.wait_gone()
    assert (state['return_code'], state['failed']) == (1, True)


@pytest.mark.parametrize('number', STOPS)
def test_a_virt_v2v_that_ignores_term_is_killed(impatient, number):
    job = start_copying(impatient, ignore(signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    signal_wrapper(job, number)
    assert_failed(impatient, job, -signal.SIGKILL,
                  'the wrapper was told to stop by ' + number.name)


def test_what_virt_v2v_started_is_killed_too_if_all_ignore_term(impatient):
    job = start_copying_with_stubborn_children(impatient, ignore(signal.SIGTERM))
    signal_wrapper(job, signal.SIGTERM)
    assert_failed(impatient, job, -signal.SIGKILL, 'the wrapper was told to stop by SIGTERM')


def test_term_to_the_wrapper_of_a_stopped_virt_v2v_ends_it(wrapper):
    job = start_copying(wrapper)
    stop_published(job)
    signal_wrapper(job, signal.SIGTERM)
    assert_failed(wrapper, job, 1, 'the wrapper was told to stop by SIGTERM')


def test_a_stopped_virt_v2v_that_ignores_term_is_killed(impatient):
    job = start_copying(impatient, ignore(signal.SIGTERM))
    stop_published(job)
    signal_wrapper(job, signal.SIGTERM)
    assert_failed(impatient, job, -signal.SIGKILL, 'the wrapper was told to stop by SIGTERM')


def test_a_stopped_wrapper_goes_on_where_it_was(wrapper):
    job = start_copying(wrapper)
    signal_wrapper(job, signal.SIGSTOP)
    wrapper.virt_v2v.let('end')
    pid = job.state()['pid']
    eventually(lambda: processes.state(pid) == 'Z', 'virt-v2v has ended')
    assert 'finished' not in job.state()
    signal_wrapper(job, signal.SIGCONT)
    assert job.wait_finished()['return_code'] == 0


def test_term_to_all_processes_of_the_job_at_once_ends_it(wrapper):
    job = start_copying(wrapper)
    for process in (guardian(job), job.state()['wrapper_pid'], job.state()['pid']):
        # The signal to the one before may have ended this one.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    state = job.wait_finished()
    assert (state['return_code'], state['failed']) == (1, True)
    assert_nothing_left(wrapper)


def test_a_success_although_it_was_told_to_stop_is_a_success(wrapper):
    job = start_copying(wrapper, ignore(signal.SIGTERM))
    signal_wrapper(job, signal.SIGTERM)
    eventually(lambda: b'stopping virt-v2v' in job.log('wrapper_log'), 'it is being stopped')
    wrapper.virt_v2v.let('end')
    state = job.wait_finished()
    assert (state['return_code'], 'failed' in state) == (0, False)
    assert state['disks'] == [{'path': DISKS[0], 'progress': 100}]
