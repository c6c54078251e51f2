"""Storage that does not answer: who waits for it sleeps, and not even SIGKILL ends that."""
import os
import re
import signal
import subprocess

import pytest

import hung
import processes
from eventually import eventually
from faults import guardian, last_message, tamper
from jobs import kill_wrapper, wait_ended
from results import error_line
from virt_v2v import fill, fork, ignore, leave, phase, reach, stdout, wait

UUID = '0c8d2c6a-0000-4000-8000-0123456789ab'
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def storage(wrapper):
    """Storage that hangs when it is told to."""
    with hung.file_system(os.path.join(wrapper.directory, 'hung'), wrapper.user) as storage:
        yield storage


def look(name='file'):
    """Look for a file in the storage, as often as it is not there."""
    return wait('../../hung/' + name)


def wait_finished(job):
    """Wait until the state is final; return it. No log is read: that may be what hangs."""
    return eventually(lambda: 'finished' in job.state() and job.state(), 'the state is final')


# --- what virt-v2v has started hangs -----------------------------------------------------

@pytest.fixture
def sleeping(wrapper, storage):
    """A job; a child of its virt-v2v sleeps for ever."""
    tamper(wrapper, 'module.END_PATIENCE = 1.0')
    job = wrapper.start_waiting(fork(look()))
    storage.hang()
    eventually(lambda: child(job) in storage.waiting(), 'the child sleeps')
    return job


def wait_until_one_sleeps(wrapper, storage):
    """Wait until one of the wrapper's processes sleeps; others may look at any file system."""
    eventually(lambda: set(storage.waiting()) & set(wrapper.processes()), 'one of them sleeps')


def child(job):
    """Return the process ID of the only child of virt-v2v."""
    found, = processes.children(job.state()['pid'])
    return found


@pytest.mark.promise(4)
@pytest.mark.parametrize('status', [0, 1])
def test_a_sleeping_child_does_not_hold_up_the_end(wrapper, storage, status):
    tamper(wrapper, 'module.END_PATIENCE = 1.0')
    wrapper.virt_v2v.play(fork(look()), reach('running'), wait('end'), leave(status))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('running')
    storage.hang()
    wait_until_one_sleeps(wrapper, storage)
    wrapper.virt_v2v.let('end')
    assert wait_finished(job)['return_code'] == status


@pytest.mark.promise(4)
@pytest.mark.parametrize('number', STOPS)
def test_a_sleeping_child_does_not_hold_up_a_stop(sleeping, number):
    os.kill(sleeping.state()['wrapper_pid'], number)
    state = wait_finished(sleeping)
    assert state['failed'] is True
    assert last_message(state).startswith('the wrapper was told to stop by ' + number.name)


@pytest.mark.promise(4)
def test_a_sleeping_child_does_not_hold_up_a_killed_wrapper(sleeping):
    os.kill(sleeping.state()['wrapper_pid'], signal.SIGKILL)
    state = wait_finished(sleeping)
    assert state['failed'] is True
    assert last_message(state).startswith('the wrapper was killed by SIGKILL')


@pytest.mark.promise(4)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_cannot_be_ended_is_named(sleeping, number):
    process = child(sleeping)
    name = processes.status(process)['Name']
    os.kill(sleeping.state()['wrapper_pid'], number)
    message = last_message(wait_finished(sleeping))
    assert '%s (%d)' % (name, process) in message, (
        processes.status(process), sleeping.log('wrapper_log'))


def test_a_process_that_cannot_be_ended_is_in_the_log(sleeping):
    process = child(sleeping)
    os.kill(sleeping.state()['wrapper_pid'], signal.SIGTERM)
    wait_finished(sleeping)
    eventually(lambda: re.search(br'WARNING could not be killed: .*\(%d\)' % process,
                                 sleeping.log('wrapper_log')), 'the log names it')


@pytest.mark.promise(4)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_the_wrapper_goes_while_a_child_sleeps(wrapper, sleeping, number):
    process = child(sleeping)
    os.kill(sleeping.state()['wrapper_pid'], number)
    wait_finished(sleeping)
    eventually(lambda: set(wrapper.processes()) == {process}, 'the wrapper is gone')
    assert processes.status(process)['State'].startswith('D')


def make_domain(wrapper, storage):
    """Make an export domain in the storage."""
    for name in ('images', 'master/vms'):
        os.makedirs(os.path.join(storage.directory, UUID, name))
    for directory, names, _ in os.walk(storage.directory):
        for name in names:
            os.chown(os.path.join(directory, name), wrapper.user.pw_uid, wrapper.user.pw_gid)


def start_there(wrapper, storage, *steps):
    """Start a job that makes an image in the storage, plays steps and waits; return it."""
    make_domain(wrapper, storage)
    wrapper.virt_v2v.play(phase('Setting up the destination: -o rhv'),
                          stdout(b'RHV: disk: /x/images/%s/y\n' % UUID.encode()),
                          [*steps, reach('running'), wait('end'), leave(1)])
    job = wrapper.start(wrapper.request(export_domain=storage.directory))
    wrapper.virt_v2v.wait_for('running')
    job.wait_state(lambda state: 'images' in state, 'the image is in the state')
    return job


@pytest.mark.promise(4)
def test_the_wrapper_goes_while_its_export_domain_hangs(wrapper, storage):
    """What the job has made there is named, since nobody can remove it now."""
    tamper(wrapper, 'module.END_PATIENCE = 1.0')
    job = start_there(wrapper, storage, fork(look()))
    process = child(job)
    storage.hang()
    eventually(lambda: process in storage.waiting(), 'the child sleeps')
    wrapper.virt_v2v.let('end')
    assert wait_finished(job)['left_behind'] == [UUID]
    eventually(lambda: set(wrapper.processes()) == {process}, 'the wrapper is gone')


def test_the_list_ends_while_the_domain_of_a_dead_job_hangs(wrapper, storage):
    tamper(wrapper, 'module.CLEAN_PATIENCE = 1.0')
    job = start_there(wrapper, storage)
    kill_wrapper(job)
    storage.hang()
    status, _, stderr = answer_of(storage, wrapper.popen(*(wrapper.arguments + ['--list'])))
    assert (status, stderr) == (0, b'')
    assert job.state()['left_behind'] == [UUID]


@pytest.mark.promise(4)
def test_a_removal_that_hangs_does_not_outlive_the_job(wrapper, storage):
    """What a dead job has made is left to the next one, which publishes its end, too."""
    job = start_there(wrapper, storage)
    image = os.path.join(storage.directory, UUID, 'images', UUID)
    os.mkdir(image)
    os.chown(image, wrapper.user.pw_uid, wrapper.user.pw_gid)
    kill_wrapper(job)
    storage.hang()
    wrapper.virt_v2v.play(wait('removal'), leave(0))
    next_job = wrapper.start()
    wait_until_one_sleeps(wrapper, storage)
    wrapper.virt_v2v.let('removal')
    wait_finished(next_job)
    eventually(lambda: len(wrapper.processes()) == 1, 'the wrapper is gone')
    storage.release()
    wrapper.wait_gone()
    assert os.path.exists(image)
    assert 'finished' not in job.state()


@pytest.mark.promise(3)
def test_what_its_hanging_export_domain_has_is_named(wrapper, storage):
    tamper(wrapper, 'module.CLEAN_PATIENCE = 1.0')
    job = start_there(wrapper, storage)
    storage.hang()
    os.kill(job.state()['pid'], signal.SIGTERM)
    assert wait_finished(job)['left_behind'] == [UUID]


@pytest.mark.promise(4)
def test_one_deadline_for_all_that_cannot_be_ended(wrapper, storage):
    """A second for each of them would be longer than any test waits."""
    tamper(wrapper, 'module.END_PATIENCE = 1.0')
    count = 30
    job = wrapper.start_waiting([fork(look('file%d' % number)) for number in range(count)])
    storage.hang()
    eventually(lambda: len(storage.waiting()) >= count, 'all of them sleep')
    wrapper.virt_v2v.let('end')
    wait_finished(job)


@pytest.mark.promise(4)
def test_a_virt_v2v_that_cannot_be_killed_holds_up_no_stop(wrapper, storage):
    tamper(wrapper, 'module.END_PATIENCE = 1.0; module.STOP_GRACE = 0.5')
    wrapper.virt_v2v.play(reach('running'), look())
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('running')
    storage.hang()
    wait_until_one_sleeps(wrapper, storage)
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    state = wait_finished(job)
    assert state['failed'] is True
    assert re.search(r'\b%d\b' % state['pid'], last_message(state))


# --- the start hangs ---------------------------------------------------------------------

IMPATIENT = ('module.START_PATIENCE = 1.0; module.PRINT_PATIENCE = 0.5;'
             ' module.END_PATIENCE = 1.0')


def answer_of(storage, process):
    """Return (status, stdout, stderr) of a wrapper that has to end although the storage hangs."""
    try:
        stdout, stderr = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        storage.release()       # or nothing would end it
        process.kill()
        process.communicate()
        raise AssertionError('it waits for what does not answer') from None
    return process.returncode, stdout, stderr


def export_domain(wrapper, place):
    """Return how to start with the export domain there."""
    return {'request': wrapper.request(export_domain=place)}


def log_directory(wrapper, place):
    """Return how to start with the logs there."""
    return {'arguments': ['--log-dir', os.path.join(place, 'log')] + wrapper.arguments[2:]}


def state_directory(wrapper, place):
    """Return how to start with the state there."""
    return {'arguments': wrapper.arguments + ['--state-dir', os.path.join(place, 'state')]}


def vddk(wrapper, place):
    """Return how to start with the VDDK there."""
    return {'arguments': wrapper.arguments + ['--vddk-libdir', place]}


def path(wrapper, place):
    """Return how to start with that directory on PATH."""
    return {'environment': {'PATH': place + ':' + wrapper.virt_v2v.bin}}


def probe(wrapper, place):
    """Return how to start a virt-v2v that looks there before it answers."""
    wrapper.add_program('virt-v2v', '#!/bin/sh\nexec /bin/cat %s/file\n' % place)
    return {}


PLACES = [export_domain, log_directory, state_directory, vddk, path, probe]


def begin_hung(wrapper, storage, where):
    """Start the wrapper with something it needs in the storage, which hangs."""
    how = where(wrapper, storage.directory)
    storage.hang()
    return wrapper.begin(how.pop('request', None), *how.pop('arguments', ()), **how)


@pytest.mark.promise(6)
@pytest.mark.parametrize('where', PLACES)
def test_a_start_that_hangs_is_given_up(wrapper, storage, where):
    tamper(wrapper, IMPATIENT)
    status, stdout, stderr = answer_of(storage, begin_hung(wrapper, storage, where))
    assert (status, stdout) == (1, b'')
    assert re.fullmatch(rb'virt-v2v-wrapper: error: [^\n]*: does not answer\n', stderr)


@pytest.mark.promise(6)
@pytest.mark.parametrize('where, subject', [
    (export_domain, '^export_domain: '), (log_directory, '{place}|--log-dir'),
    (state_directory, '{place}|--state-dir'), (vddk, '--vddk-libdir'),
    (path, '^virt-v2v: '), (probe, '^virt-v2v: ')])
def test_what_a_start_waited_for_is_named(wrapper, storage, where, subject):
    tamper(wrapper, IMPATIENT)
    _, _, stderr = answer_of(storage, begin_hung(wrapper, storage, where))
    text = stderr.decode().replace('virt-v2v-wrapper: error: ', '')
    assert re.search(subject.format(place=re.escape(storage.directory)), text)


@pytest.mark.promise(6)
@pytest.mark.parametrize('number', STOPS)
def test_a_signal_ends_a_start_that_hangs(wrapper, storage, number):
    tamper(wrapper, 'module.END_PATIENCE = 1.0')
    process = begin_hung(wrapper, storage, export_domain)
    wait_until_one_sleeps(wrapper, storage)
    process.send_signal(number)
    assert answer_of(storage, process) == (
        1, b'', error_line('start: interrupted by a signal'))


@pytest.mark.promise(6)
def test_a_signal_right_after_the_fork_leaves_nothing(wrapper):
    tamper(wrapper, """\
def fork(child, real=module.fork):
    pid = real(child)
    os.kill(os.getpid(), %d)
    return pid


module.fork = fork
""" % signal.SIGTERM)
    process = wrapper.begin()
    assert process.communicate(timeout=20) == (
        b'', error_line('start: interrupted by a signal'))
    assert process.returncode == 1
    wrapper.wait_gone()


@pytest.mark.promise(6)
def test_a_signal_while_virt_v2v_is_asked_leaves_nothing(wrapper):
    wrapper.add_program('virt-v2v', '#!/bin/sh\n/bin/sleep 600\nexit 1\n')
    process = wrapper.begin()
    eventually(lambda: '/bin/sleep' in str(wrapper.processes()), 'it is asked')
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (1, error_line('start: interrupted by a signal'))
    assert (wrapper.processes(), sorted(wrapper.files())) == ({}, ['log', 'state'])


@pytest.mark.promise(6)
def test_a_start_that_was_given_up_begins_nothing_later(wrapper, storage):
    tamper(wrapper, IMPATIENT)
    make_domain(wrapper, storage)
    answer_of(storage, begin_hung(wrapper, storage, export_domain))
    storage.release()
    wrapper.wait_gone()
    assert wrapper.virt_v2v.runs() == []
    assert [name for name in wrapper.files() if '.' in name] == []


# --- logs or state hang ------------------------------------------------------------------

def start_talkative(wrapper, storage, option, *steps):
    """Start a job that has filled its pipe, because the wrapper sleeps over its log or state."""
    tamper(wrapper, 'module.STOP_GRACE = 0.5; module.END_PATIENCE = 1.0')
    wrapper.virt_v2v.play(*steps, reach('running'), wait('go'), phase('Opening the source'),
                          fill('stdout', b'x', 1 << 24), wait('never'))
    job = wrapper.start(None, *(wrapper.arguments + [option, storage.directory]))
    assert job.status == 0
    wrapper.virt_v2v.wait_for('running')
    found = job.state()
    processes_of_it = {'monitor': found['wrapper_pid'], 'guardian': guardian(job)}
    storage.hang()
    wrapper.virt_v2v.let('go')
    wait_until_one_sleeps(wrapper, storage)
    return job, found['pid'], processes_of_it


@pytest.mark.promise(11)
@pytest.mark.parametrize('target, steps', [
    ('monitor', []), ('guardian', []), ('guardian', [ignore(signal.SIGTERM)])])
@pytest.mark.parametrize('option', ['--log-dir', '--state-dir'])
def test_a_wrapper_that_sleeps_over_its_files_can_be_stopped(
        wrapper, storage, option, target, steps):
    """And its end is published, at the latest when they answer again."""
    job, virt_v2v, found = start_talkative(wrapper, storage, option, *steps)
    assert processes.is_running(virt_v2v)
    os.kill(found[target], signal.SIGTERM)
    wait_ended(virt_v2v)
    storage.release()
    state = wait_finished(job)
    wrapper.wait_gone()
    assert last_message(state) == 'the wrapper was told to stop by SIGTERM'


@pytest.mark.promise(3)
@pytest.mark.parametrize('option', ['--log-dir', '--state-dir'])
def test_killed_while_it_sleeps_its_end_is_published_later(wrapper, storage, option):
    """Nothing ends a process that sleeps; but when it goes, its guardian sees that."""
    job, _, found = start_talkative(wrapper, storage, option)
    os.kill(found['monitor'], signal.SIGKILL)
    storage.release()
    state = wait_finished(job)
    wrapper.wait_gone()
    assert last_message(state).startswith('the wrapper was killed by SIGKILL')
