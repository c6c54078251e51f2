"""Alive or dead: the lock file tells, and the next start ends what died with all its processes."""
import contextlib
import fcntl
import functools
import os
import re
import signal
import stat
import subprocess

import pytest

from blackbox import become
from eventually import eventually
from faults import guardian, strace
from jobs import kill_monitor, kill_wrapper, wait_ended
from processes import is_running
from virt_v2v import (
    DISKS, bar, copying, daemon, error, ignore, leave, phase, reach, source, wait)

pytestmark = pytest.mark.promise(3)


def scratch(wrapper):
    """Return virt-v2v's directory for temporary files."""
    return os.fsdecode(wrapper.recorded().environment[b'TMPDIR'])


# --- virt-v2v goes with the wrapper ------------------------------------------------------

@pytest.mark.parametrize('steps', [[], [ignore(signal.SIGTERM, signal.SIGHUP)]])
def test_virt_v2v_ends_with_the_last_process_of_the_wrapper(wrapper, steps):
    job = wrapper.start_waiting(*steps)
    virt_v2v = job.state()['pid']
    kill_wrapper(job)
    wait_ended(virt_v2v)


# --- the lock ----------------------------------------------------------------------------

def test_a_job_that_goes_on_has_locked_its_file(wrapper):
    job = wrapper.start_waiting()
    locked = job.is_alive()
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert locked


def test_everybody_can_ask_for_the_lock(wrapper):
    job = wrapper.start_waiting()
    mode = stat.S_IMODE(os.stat(job.lock_file).st_mode)
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert oct(mode) == '0o644'


def test_a_job_without_its_guardian_is_alive(wrapper):
    job = wrapper.start_waiting()
    process = guardian(job)
    os.kill(process, signal.SIGKILL)
    wait_ended(process)
    locked = job.is_alive()
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert locked


def test_a_job_that_waits_for_its_guardian_to_end_it_is_alive(wrapper):
    job = wrapper.start_waiting()
    process = kill_monitor(job)
    locked = job.is_alive()
    os.kill(process, signal.SIGCONT)
    job.wait_finished()
    assert locked


def test_what_virt_v2v_left_running_does_not_keep_the_lock(wrapper):
    job = wrapper.start_waiting(daemon(reach('daemon'), wait('never')))
    wrapper.virt_v2v.wait_for('daemon')
    assert job.is_alive()
    kill_wrapper(job)
    wait_ended(job.state()['pid'])
    assert os.path.exists(job.lock_file)
    eventually(lambda: not job.is_alive(), 'the lock is free')
    left, = wrapper.processes()
    os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize('steps', [[leave(0)], [error('no space')]], ids=['success', 'failure'])
def test_the_lock_goes_with_the_job(wrapper, steps):
    wrapper.virt_v2v.play(wait('end'), *steps)
    job = wrapper.start()
    was_there = os.path.exists(job.lock_file)
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    wrapper.wait_gone()
    assert was_there
    assert not os.path.exists(job.lock_file)


def test_a_start_that_is_refused_leaves_no_lock(wrapper):
    wrapper.use('RHEL 10')
    assert wrapper.start().status == 1
    wrapper.wait_gone()
    assert [name for name in wrapper.files() if name.endswith('.lock')] == []


@pytest.mark.parametrize('killed', [False, True])
def test_no_job_that_goes_on_ever_looks_dead(wrapper, killed):
    wrapper.virt_v2v.play(phase('Opening the source'), source(DISKS[0]), copying(1, 1), bar(44),
                          daemon(wait('never')), wait('killed') if killed else leave(0))
    job = wrapper.start()
    looks_dead = not job.is_alive()
    assert not looks_dead or 'finished' in job.state()
    if killed:
        os.kill(job.state()['wrapper_pid'], signal.SIGKILL)

    def over():
        looks_dead = not job.is_alive()
        state = job.state()         # after that look
        assert not looks_dead or 'finished' in state
        return looks_dead
    eventually(over, 'it is over')


def test_a_lock_is_locked_before_it_has_its_name(wrapper):
    log, command = os.path.join(wrapper.home, 'calls'), wrapper.command
    prefix = [strace(), '-f', '-o', log, '-e', 'trace=flock,linkat', '--']
    wrapper.command = lambda *arguments: prefix + command(*arguments)
    wrapper.start().wait_finished()
    with open(log) as stream:
        calls = re.findall('(flock|linkat)[(]', stream.read())
    assert calls[:2] == ['flock', 'linkat']


# --- the next start ----------------------------------------------------------------------

def make_dead(wrapper):
    """Return a job whose processes were all killed while it copied."""
    job = wrapper.start_waiting(source(DISKS[0]), copying(1, 1), bar(44))
    virt_v2v = job.state()['pid']
    kill_wrapper(job)
    wait_ended(virt_v2v)
    assert 'finished' not in job.state()
    wrapper.dead_scratch = scratch(wrapper)
    return job


@pytest.fixture
def dead(wrapper):
    """A job whose processes were all killed while it copied."""
    return make_dead(wrapper)


@contextlib.contextmanager
def next_start(wrapper):
    """Have another job, which does nothing, until the end of this context."""
    wrapper.use('2.2.0')
    wrapper.virt_v2v.play(wait('end'))
    job = wrapper.start()
    assert (job.status, job.stderr) == (0, b'')
    yield
    wrapper.virt_v2v.let('end')
    assert job.wait_finished()['return_code'] == 0
    own = {job.state()['pid'], job.state()['wrapper_pid']}
    eventually(lambda: not own & set(wrapper.processes()), 'it is over')


def wait_dealt_with(dead):
    """Wait until nothing more is to be done about a dead job; return its state."""
    state = dead.wait_finished()
    eventually(lambda: not os.path.exists(dead.lock_file), 'its lock is gone')
    return state


def test_root_s_next_start_ends_a_dead_job_of_root_s(root_wrapper):
    dead = make_dead(root_wrapper)
    with next_start(root_wrapper):
        assert dead.wait_finished()['failed'] is True


def test_the_end_of_a_dead_job_is_published_once(wrapper, dead):
    with next_start(wrapper):
        wait_dealt_with(dead)
    before = os.stat(dead.paths.state_file)
    with next_start(wrapper):
        pass
    after = os.stat(dead.paths.state_file)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_reader_of_the_lock_of_a_dead_job_holds_up_no_start(wrapper, dead):
    with open(dead.lock_file, 'rb') as stream:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with next_start(wrapper):
            pass
    with next_start(wrapper):
        assert dead.wait_finished()['failed'] is True


@pytest.mark.parametrize('environment', ['TMPDIR={}/sub', 'TMPDIR={}0', 'OTHER=TMPDIR={}'])
def test_a_process_of_another_job_is_left_alone(wrapper, dead, environment):
    name, _, value = environment.format(wrapper.dead_scratch).partition('=')
    with subprocess.Popen(['sleep', '600'], env={name: value},
                          preexec_fn=functools.partial(become, wrapper.user)) as stranger:
        try:
            with next_start(wrapper):
                wait_dealt_with(dead)
            assert is_running(stranger.pid)
        finally:
            stranger.kill()


def test_a_directory_that_is_no_job_s_is_left_alone(wrapper, dead):
    """Whatever the lock of a dead job has come to name."""
    victim = os.path.join(wrapper.home, 'victim')
    os.mkdir(victim)
    with open(dead.lock_file, 'r+') as stream:
        text = stream.read()
        assert wrapper.dead_scratch in text
        stream.seek(0)
        stream.truncate()
        stream.write(text.replace(wrapper.dead_scratch, victim))
    with next_start(wrapper):
        wait_dealt_with(dead)
    assert os.path.isdir(victim)


RUBBISH = {
    'nothing': lambda path: open(path, 'w').close(),
    'bytes': lambda path: write(path, bytes(range(256))),
    'other JSON': lambda path: write(path, b'[{"pid": "1"}]'),
    'a directory': os.mkdir,
    'a pipe': os.mkfifo,
    'a link to nothing': lambda path: os.symlink('nothing', path),
}


def write(path, data):
    """Make a file."""
    with open(path, 'wb') as stream:
        stream.write(data)


@pytest.mark.parametrize('kind', sorted(RUBBISH))
@pytest.mark.parametrize('state', [None, b'{', b'{"started": true}'], ids=str)
def test_rubbish_in_the_place_of_a_lock_disturbs_no_start(wrapper, kind, state):
    with next_start(wrapper):       # it makes the directories
        pass
    stem = os.path.join(wrapper.state_dir, 'v2v-import-20200101T000000-1')
    RUBBISH[kind](stem + '.lock')
    if state is not None:
        write(stem + '.state', state)
    for name in os.listdir(wrapper.state_dir):
        os.chown(os.path.join(wrapper.state_dir, name), wrapper.user.pw_uid, wrapper.user.pw_gid,
                 follow_symlinks=False)
    with next_start(wrapper):
        pass
    wrapper.wait_gone()


def rubbish(wrapper, kind):
    """Have rubbish in the place of a lock, which is looked at before others; return its path."""
    path = os.path.join(wrapper.state_dir, 'v2v-import-20200101T000000-1.lock')
    RUBBISH[kind](path)
    os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid, follow_symlinks=False)
    return path


@pytest.mark.parametrize('kind', sorted(RUBBISH))
def test_rubbish_in_the_place_of_a_lock_holds_up_no_other_end(wrapper, dead, kind):
    rubbish(wrapper, kind)
    with next_start(wrapper):
        assert wait_dealt_with(dead)['failed'] is True


def test_a_pipe_in_the_place_of_a_lock_stays(wrapper, dead):
    path = rubbish(wrapper, 'a pipe')
    with next_start(wrapper):
        wait_dealt_with(dead)
    assert stat.S_ISFIFO(os.stat(path).st_mode)


def test_a_job_that_cannot_be_ended_is_not_kept_locked(wrapper, dead):
    """Its state cannot be read; who asks for its lock is not to believe that it lives."""
    path = rubbish(wrapper, 'nothing')
    os.mkdir(path.replace('.lock', '.state'))
    with next_start(wrapper):
        wait_dealt_with(dead)
        with open(path) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_job_killed_before_its_first_state_leaves_no_lock(wrapper, dead):
    path = rubbish(wrapper, 'nothing')
    with next_start(wrapper):
        wait_dealt_with(dead)
        eventually(lambda: not os.path.exists(path), 'the lock is gone')


@pytest.mark.parametrize('name', ['other.lock', 'v2v-import-20200101T000000-1-copy.lock'])
def test_a_file_that_is_no_job_s_lock_stays(wrapper, dead, name):
    path = os.path.join(wrapper.state_dir, name)
    write(path, b'')
    os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)
    with next_start(wrapper):
        wait_dealt_with(dead)
    assert os.path.exists(path)
