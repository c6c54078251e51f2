"""One job from start to end, seen from outside."""
import os
import re
import signal

import pytest

import processes
from faults import absent, not_executable, tamper, without_interpreter
from jobs import kill_wrapper
from results import mode
from virt_v2v import (
    DISKS, GENERATIONS, bar, copying, daemon, die, error, old_bar, phase, reach, source, wait)

UNUSABLE = {'1.36.13', 'RHEL 10'}       # no VDDK, no output to oVirt


def copy_two_disks(progress=bar, to=None):
    """Return the steps of a conversion of two disks."""
    opened = [source(disk) for disk in DISKS]
    copies = [[copying(number, 2, to), progress(44), progress(100)] for number in (1, 2)]
    return [phase('Opening the source')] + opened + copies + [phase('Finishing off', 99.9)]


# --- the start ---------------------------------------------------------------------------

def test_start_prints_the_paths_and_nothing_on_stderr(wrapper):
    job = wrapper.start()
    job.wait_finished()
    assert job.status == 0
    assert job.stderr == b''
    assert re.fullmatch(rb'\{.*\}\n', job.stdout)
    assert [os.path.dirname(path) for path in job.paths] == [
        wrapper.log_dir, wrapper.log_dir, wrapper.state_dir]


@pytest.mark.promise(2)
def test_the_state_file_is_there_when_the_paths_are_printed(wrapper):
    wrapper.virt_v2v.play(wait('end'))
    job = wrapper.start(wrapper.request(source_disks=DISKS))
    state = job.state()
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert state['started'] is True
    assert state['pid'] == wrapper.recorded().pid
    assert state['disks'] == [{'path': disk, 'progress': 0} for disk in DISKS]
    assert state['disk_count'] == 2
    assert 'finished' not in state


@pytest.mark.promise(9)
@pytest.mark.parametrize('umask', [0, 0o077])
def test_modes_do_not_depend_on_the_umask(wrapper, umask):
    job = wrapper.start(umask=umask)
    job.wait_finished()
    assert [mode(path) for path in job.paths] == [0o640, 0o640, 0o644]


@pytest.mark.parametrize('spoil', [not_executable, without_interpreter, absent])
def test_without_a_virt_v2v_that_runs_nothing_is_started_or_left(wrapper, spoil):
    spoil(wrapper)
    job = wrapper.start()
    assert (job.status, job.stdout) == (1, b'')
    assert re.fullmatch(rb'virt-v2v-wrapper: error: .*virt-v2v.*\n', job.stderr)
    wrapper.wait_gone()
    assert [name for name in wrapper.files() if '.' in name] == []


@pytest.mark.promise(6)
def test_if_the_paths_cannot_be_printed_the_job_is_stopped(wrapper):
    wrapper.virt_v2v.play(wait('never'))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        job = wrapper.start(stdout=writing)
    finally:
        os.close(writing)
    assert job.status == 1
    wrapper.wait_gone()


# --- the conversion ----------------------------------------------------------------------

@pytest.mark.parametrize('generation', sorted(set(GENERATIONS) - UNUSABLE))
def test_a_conversion_that_succeeds(wrapper, generation):
    modern = generation in ('2.2.0', '2.10.0')
    wrapper.use(generation).play(copy_two_disks(bar if modern else old_bar,
                                                None if modern else '/export/images/a/b'))
    state = wrapper.start().wait_finished()
    assert state['return_code'] == 0
    assert state['finished'] is True
    assert 'failed' not in state
    assert state['disk_count'] == 2
    assert state['disks'] == [{'path': disk, 'progress': 100} for disk in DISKS]


def test_the_lock_file_is_locked_as_long_as_the_job_lives(wrapper):
    job = wrapper.start_waiting()
    alive = job.is_alive()
    wrapper.virt_v2v.let('end')
    wrapper.wait_gone()
    assert (alive, job.is_alive()) == (True, False)


def test_logs_and_state_are_all_that_is_left_of_a_job(wrapper):
    job = wrapper.start()
    wrapper.wait_gone()
    paths = job.paths + (wrapper.log_dir, wrapper.state_dir)
    assert wrapper.files() == sorted(os.path.relpath(path, wrapper.home) for path in paths)
    assert not os.path.exists(wrapper.recorded().environment[b'TMPDIR'])


@pytest.mark.parametrize('generation', sorted(UNUSABLE))
def test_a_virt_v2v_that_cannot_do_it_is_not_started(wrapper, generation):
    wrapper.use(generation)
    job = wrapper.start()
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr.startswith(b'virt-v2v-wrapper: error: ')
    assert wrapper.virt_v2v.runs() == []


def test_progress_is_published_while_virt_v2v_is_copying(wrapper):
    wrapper.virt_v2v.play(source(DISKS[0]), copying(1, 1), bar(44), wait('end'))
    job = wrapper.start()
    state = job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'],
                           'progress is published')
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert state['disks'] == [{'path': DISKS[0], 'progress': 44}]


def test_drivers_that_are_nowhere_to_be_found_are_a_warning(wrapper):
    tamper(wrapper, 'module._DRIVERS = ()')
    state = wrapper.start(wrapper.request(install_drivers=True)).wait_finished()
    assert state['warnings'] == ['no drivers for Windows guests were found on this host']


SLOW_READS = '''\
read = module.Pipe.read
module.Pipe.read = lambda pipe: (read(pipe), module.time.sleep(0.05))[0]
'''


def test_no_copy_is_missed_that_begins_between_two_reads(wrapper):
    tamper(wrapper, SLOW_READS)
    job = wrapper.start_waiting([copying(number, 999) for number in range(1, 1000)])
    job.wait_state(lambda state: len(state['disks']) == 999, 'all copies have begun')
    wrapper.virt_v2v.let('end')
    job.wait_finished()


def test_a_conversion_that_fails(wrapper):
    wrapper.virt_v2v.play(phase('Opening the source'), error('cannot log in'))
    state = wrapper.start().wait_finished()
    assert state['return_code'] == 1
    assert state['failed'] is True
    assert state['last_message'] == {
        'type': 'error', 'message': 'cannot log in', 'code': 'unknown'}


@pytest.mark.promise(3)
def test_a_virt_v2v_that_is_killed(wrapper):
    wrapper.virt_v2v.play(die(signal.SIGKILL))
    state = wrapper.start().wait_finished()
    assert state['return_code'] == -signal.SIGKILL
    assert state['failed'] is True


@pytest.mark.promise(11)
def test_term_to_the_published_pid_ends_the_job(wrapper):
    wrapper.virt_v2v.play(reach('copying'), wait('never'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('copying')
    os.kill(job.state()['pid'], signal.SIGTERM)
    state = job.wait_finished()
    wrapper.wait_gone()
    assert (state['return_code'], state['failed']) == (1, True)


@pytest.mark.promise(4)
def test_what_still_holds_the_pipe_does_not_hold_up_the_end(wrapper):
    """The daemon would end only when the test says so, which it does after the final state."""
    wrapper.virt_v2v.play(daemon(reach('daemon'), wait('end')), wait('go'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('daemon')
    wrapper.virt_v2v.let('go')
    state = job.wait_finished()
    wrapper.virt_v2v.let('end')
    assert state['return_code'] == 0


# --- what virt-v2v is given --------------------------------------------------------------

@pytest.mark.promise(1)
def test_the_password_is_in_a_descriptor_only(wrapper):
    wrapper.start(wrapper.request(vmware_password='needle-1')).wait_finished()
    run = wrapper.recorded()
    assert run.password.splitlines() == [b'needle-1']
    given = b' '.join(run.arguments) + b' '.join(run.environment.values())
    assert b'needle-1' not in given


@pytest.mark.promise(7)
def test_a_name_like_an_option_comes_after_the_options(wrapper):
    name = '-v "\u00e9\U0001f4bf'
    wrapper.start(wrapper.request(vm_name=name)).wait_finished()
    assert wrapper.recorded().arguments[-2:] == [b'--', name.encode('utf-8')]


def test_virt_v2v_has_the_signals_of_a_fresh_process(wrapper):
    wrapper.start().wait_finished()
    run = wrapper.recorded()
    assert run.signals('SigIgn') == set()
    assert run.signals('SigBlk') == set()


def test_virt_v2v_is_the_leader_of_a_process_group(wrapper):
    wrapper.start().wait_finished()
    run = wrapper.recorded()
    assert run.group == run.pid


def test_virt_v2v_inherits_no_descriptor_of_the_caller(wrapper):
    reading, writing = os.pipe()
    pipe = os.readlink('/proc/self/fd/%d' % reading)
    try:
        wrapper.start(pass_fds=[reading, writing]).wait_finished()
    finally:
        os.close(reading)
        os.close(writing)
    run = wrapper.recorded()
    assert run.descriptors[0] == '/dev/null'
    assert pipe not in run.descriptors.values()


# --- as root -----------------------------------------------------------------------------

@pytest.mark.promise(5)
def test_root_becomes_vdsm(root_wrapper):
    job = root_wrapper.start()
    job.wait_finished()
    user = root_wrapper.user
    run = root_wrapper.recorded()
    assert run.status['Uid'].split() == [str(user.pw_uid)] * 4
    assert run.status['Gid'].split() == [str(user.pw_gid)] * 4
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    assert sorted(map(int, run.status['Groups'].split())) == sorted(groups)
    assert {run.status[name] for name in ('CapPrm', 'CapEff', 'CapInh', 'CapAmb')} == {'0' * 16}
    assert {os.stat(path).st_uid for path in job.paths} == {user.pw_uid}


@pytest.mark.promise(5)
def test_the_processes_of_root_s_job_are_vdsm_s(root_wrapper):
    root_wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = root_wrapper.start()
    root_wrapper.virt_v2v.wait_for('running')
    owners = {processes.status(process)['Uid'].split()[0] for process in root_wrapper.processes()}
    root_wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert owners == {str(root_wrapper.user.pw_uid)}


# --- one job for a guest -----------------------------------------------------------------

def test_a_second_start_of_a_guest_whose_job_runs_is_refused(wrapper):
    request = wrapper.request()
    job = wrapper.start_waiting(request=request)
    before = wrapper.files()
    second = wrapper.start(request)
    after = wrapper.files()
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    text = 'virt-v2v-wrapper: error: vm_name: a job of this guest is running: %s\n'
    assert (second.status, second.stdout) == (1, b'')
    assert second.stderr.decode() == text % job.paths.state_file
    assert after == before


@pytest.mark.parametrize('others', [
    {'vm_name': 'VM'}, {'vmware_uri': 'esx://root@other.example.com'}])
def test_other_guests_are_started_meanwhile(wrapper, others):
    request = wrapper.request()
    job = wrapper.start_waiting(request=request)
    other = wrapper.start(dict(request, **others))
    wrapper.virt_v2v.let('end')
    assert [found.wait_finished()['return_code'] for found in (job, other)] == [0, 0]


def test_a_guest_is_started_again_as_soon_as_it_has_finished(wrapper):
    """The job may still be at work, and removes its temporary files."""
    tamper(wrapper, REMOVE_SLOWLY.format(wrapper.home))
    request = wrapper.request()
    job = wrapper.start(request)
    job.wait_finished()
    assert job.is_alive()
    again = wrapper.start(request)
    open(os.path.join(wrapper.home, 'go'), 'w').close()
    assert again.wait_finished()['return_code'] == 0


REMOVE_SLOWLY = """
def remove_tree(path, real=module.remove_tree):
    while not os.path.exists('{0}/go'):
        module.time.sleep(0.01)
    real(path)


module.remove_tree = remove_tree
"""


def test_a_guest_whose_job_is_dead_is_started_again(wrapper):
    request = wrapper.request()
    job = wrapper.start_waiting(request=request)
    kill_wrapper(job)
    wrapper.virt_v2v.play()
    assert wrapper.start(request).wait_finished()['return_code'] == 0
    job.wait_finished()


# --- load --------------------------------------------------------------------------------

@pytest.mark.promise(2)
@pytest.mark.long
def test_the_state_file_is_complete_at_each_of_many_starts(wrapper):
    wrapper.virt_v2v.play(wait('end'))
    jobs = [wrapper.start() for _ in range(100)]
    states = [job.state() for job in jobs]
    wrapper.virt_v2v.let('end')
    for job in jobs:
        job.wait_finished()
    assert len({job.paths for job in jobs}) == 100
    assert len({state['pid'] for state in states}) == 100
    wrapper.wait_gone()
