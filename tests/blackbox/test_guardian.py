"""The guardian ends a job whatever has become of its state file, and its directory."""
import contextlib
import functools
import os
import shutil
import signal
import subprocess

import pytest

from blackbox import become, interpreter_for
from eventually import eventually
from faults import Disk, FailingCall, disk, guardian, last_message, tamper, traced
from jobs import wait_ended
from processes import is_running
from virt_v2v import daemon, ignore, json_message, phase, reach, wait

pytestmark = pytest.mark.promise(3)

KILLED = 'the wrapper was killed by SIGKILL'


def failed(job):
    """Return why the job has failed, as soon as that is published."""
    state = eventually(lambda: os.path.exists(job.paths.state_file) and job.wait_finished(),
                       'there is a state')
    assert state['failed'] is True
    return last_message(state)


# --- for a moment ------------------------------------------------------------------------

@contextlib.contextmanager
def closed(wrapper, job):
    """Nobody but root may do anything in the state directory; yields how to see that it was met."""
    if os.getuid() != 0:
        pytest.skip('needs root, or it would be closed to the test too')
    os.chmod(wrapper.state_dir, 0)
    yield lambda: b'Permission denied' in job.log('wrapper_log')
    os.chmod(wrapper.state_dir, 0o755)


LIMIT = """\
import resource, sys
process, soft = map(int, sys.argv[1:])
hard = resource.prlimit(process, resource.RLIMIT_NOFILE)[1]
resource.prlimit(process, resource.RLIMIT_NOFILE, (soft if soft >= 0 else hard, hard))
"""


def limit_descriptors(wrapper, process, soft):
    """Let a process of the wrapper's user open so many descriptors; -1: as many as it may."""
    subprocess.check_call(
        [interpreter_for(wrapper.user), '-I', '-c', LIMIT, str(process), str(soft)], cwd='/',
        preexec_fn=functools.partial(become, wrapper.user))


@contextlib.contextmanager
def no_descriptors(wrapper, job):
    """The guardian can open nothing."""
    process = guardian(job)
    limit_descriptors(wrapper, process, 0)
    yield lambda: b'Too many open files' in job.log('wrapper_log')
    if is_running(process):
        limit_descriptors(wrapper, process, -1)


@contextlib.contextmanager
def broken(wrapper, job):
    """The state directory has an error, whatever the guardian does there."""
    call = FailingCall(guardian(job), 'openat', 'EIO', paths=[wrapper.state_dir])
    call.fail()
    yield lambda: call.log().count('INJECTED') > 2
    call.work()


@pytest.mark.parametrize('fault', [closed, no_descriptors, broken])
def test_a_state_that_fails_for_a_moment_gets_the_end_of_the_job(wrapper, fault):
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    job = wrapper.start_waiting()
    found = job.state()
    watcher = guardian(job)
    with fault(wrapper, job) as met:
        os.kill(found['wrapper_pid'], signal.SIGKILL)
        eventually(lambda: met() or not is_running(watcher), 'the guardian has met the fault')
    assert failed(job).startswith(KILLED)


def test_a_deleted_state_file_is_made_anew_by_the_guardian(wrapper):
    job = wrapper.start_waiting()
    found = job.state()
    os.unlink(job.paths.state_file)
    os.kill(found['wrapper_pid'], signal.SIGKILL)
    assert failed(job).startswith(KILLED)


# --- for ever ----------------------------------------------------------------------------

def given_up(wrapper, state_disk, killed):
    """Return the wrapper's log of a job whose last state found no room for some seconds."""
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.05; module.FINAL_WRITE_PATIENCE = 4.0')
    job = wrapper.start_waiting()
    found = job.state()
    state_disk.fail()
    if killed:
        os.kill(found['wrapper_pid'], signal.SIGKILL)
    wrapper.virt_v2v.let('end')
    wait_ended(found['pid'])
    # Twice the time would be over by then, but not three times.
    eventually(lambda: not wrapper.processes(), 'it was given up', seconds=10)
    return job.log('wrapper_log')


@pytest.mark.parametrize('killed', [False, True])
def test_the_last_state_has_one_deadline_and_few_records(wrapper, killed):
    with disk(wrapper.state_dir, wrapper.user, Disk) as state_disk:
        log = given_up(wrapper, state_disk, killed)
    assert 1 <= log.count(b'No space left on device') <= 4


# --- removed and made anew ---------------------------------------------------------------

def make_anew(wrapper, mode=0o755, owner=None):
    """Remove the state directory with all in it, and make another one."""
    shutil.rmtree(wrapper.state_dir)
    os.mkdir(wrapper.state_dir)
    os.chmod(wrapper.state_dir, mode)
    os.chown(wrapper.state_dir, wrapper.user.pw_uid if owner is None else owner,
             wrapper.user.pw_gid)


@pytest.mark.parametrize('killed', [False, True])
def test_a_state_directory_made_anew_gets_the_end_of_the_job(wrapper, killed):
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    job = wrapper.start_waiting()
    found = job.state()
    make_anew(wrapper)
    os.kill(found['wrapper_pid' if killed else 'pid'], signal.SIGKILL)
    assert 'killed by SIGKILL' in failed(job)


def test_a_state_directory_made_anew_gets_what_follows(wrapper):
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    job = wrapper.start_waiting()
    make_anew(wrapper)
    wrapper.virt_v2v.let('end')
    state = eventually(lambda: os.path.exists(job.paths.state_file) and job.wait_finished(),
                       'there is a state')
    assert (state['return_code'], 'failed' in state) == (0, False)


def test_a_state_directory_of_others_put_right_gets_the_end(wrapper):
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    job = wrapper.start_waiting()
    make_anew(wrapper, 0o777)
    wrapper.virt_v2v.let('end')
    eventually(lambda: b'could not be published' in job.log('wrapper_log'), 'it was tried')
    os.chmod(wrapper.state_dir, 0o755)
    eventually(lambda: os.path.exists(job.paths.state_file), 'there is a state')
    assert job.wait_finished()['return_code'] == 0


def test_in_a_state_directory_made_anew_a_job_is_alive(wrapper):
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    wrapper.virt_v2v.play(wait('go'), phase('Over'), wait('end'))
    job = wrapper.start()
    make_anew(wrapper)
    wrapper.virt_v2v.let('go')
    eventually(lambda: os.path.exists(job.paths.state_file), 'there is a state')
    alive = job.is_alive()
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert alive


@pytest.mark.parametrize('mode, owner', [(0o777, None), (0o775, None), (0o755, 0)])
def test_a_directory_of_others_in_its_place_gets_nothing(wrapper, mode, owner):
    if owner == 0 and os.getuid() != 0:
        pytest.skip('needs root, to make a directory of somebody else')
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1; module.FINAL_WRITE_PATIENCE = 0.5')
    wrapper.start_waiting()
    make_anew(wrapper, mode, owner)
    wrapper.virt_v2v.let('end')
    wrapper.wait_gone()
    assert os.listdir(wrapper.state_dir) == []


# --- what the guardian says --------------------------------------------------------------

def test_virt_v2v_s_own_words_come_with_the_wrapper_s_kill(wrapper):
    job = wrapper.start_waiting(json_message('error', 'no route to host'))
    job.wait_state(lambda state: 'last_message' in state, 'the error is published')
    os.kill(job.state()['wrapper_pid'], signal.SIGKILL)
    assert failed(job) == KILLED + ' (no route to host)'


def test_what_a_killed_wrapper_s_virt_v2v_left_is_named(wrapper):
    image = 'export/0c8d2c6a-0000-4000-8000-0123456789ab/images/left'
    job = wrapper.start_waiting(reach('../../' + image))
    os.kill(job.state()['wrapper_pid'], signal.SIGKILL)
    failed(job)
    eventually(lambda: ('/' + image).encode() in job.log('wrapper_log'), 'it is named')


def test_an_end_that_was_published_is_not_published_again(wrapper):
    """Its publisher is killed as the last thing it does."""
    job = wrapper.start_waiting()
    found = job.state()
    with traced(found['wrapper_pid'], '-e', 'trace=exit_group', '-e',
                'inject=exit_group:signal=KILL') as log:
        os.kill(found['pid'], signal.SIGKILL)
        wrapper.wait_gone()
        assert 'killed by SIGKILL' in log()
    assert failed(job) == 'virt-v2v was killed by SIGKILL'


# --- virt-v2v dies while it is ended -----------------------------------------------------

# The order to kill it fails; it is killed at the moment when somebody asks about it.
DIES_WHEN_ASKED = """\
import os, signal
kill, ending_of, groups = module.kill, module.ending_of, []
module.STOP_GRACE = 0.2

def refuse_groups(process, number):
    groups.append(process) if process < 0 else kill(process, number)

def ask(process):
    if process and -process in groups:
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    return ending_of(process)

module.kill, module.ending_of = refuse_groups, ask
"""


def test_what_it_leaves_while_it_dies_is_ended_too(wrapper):
    tamper(wrapper, DIES_WHEN_ASKED)
    job = wrapper.start_waiting(ignore(signal.SIGTERM), daemon(wait('never')))
    os.kill(guardian(job), signal.SIGTERM)
    assert failed(job) == 'the wrapper was told to stop by SIGTERM'
    wrapper.wait_gone()
