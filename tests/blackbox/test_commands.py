"""What an administrator does with many jobs: list them, wait for them, cancel them."""
import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import termios

import pytest

import blackbox
from commands import PaperJob, command
from eventually import eventually
from faults import guardian, strace, tamper
from jobs import kill_monitor, kill_wrapper, wait_ended
from processes import is_running
from virt_v2v import DISKS, bar, copying, error, leave, phase, reach, source, wait

STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


# --- wait --------------------------------------------------------------------------------

class Waiting:
    """The wrapper with --wait, whose job waits for "end"."""

    def __init__(self, wrapper, *steps, **keywords):
        wrapper.virt_v2v.play(reach('waiting'), wait('end'), *steps)
        self.process = wrapper.begin(None, *(wrapper.arguments + ['--wait']), **keywords)
        self.job = blackbox.Job(0, self.process.stdout.readline(), b'')
        wrapper.virt_v2v.wait_for('waiting')

    def ending(self):
        """Return its status when it ends, and the job's last state."""
        with self.process:
            try:
                _, stderr = self.process.communicate(timeout=60)
            except BaseException:
                self.process.kill()
                raise
        assert stderr == b''
        return self.process.returncode, self.job.state()


def test_wait_stays_until_the_job_has_converted(wrapper):
    waiting = Waiting(wrapper)
    assert waiting.process.poll() is None
    wrapper.virt_v2v.let('end')
    status, state = waiting.ending()
    assert (status, state['return_code']) == (0, 0)


def test_wait_has_status_3_for_a_job_that_failed(wrapper):
    waiting = Waiting(wrapper, error('no space'))
    wrapper.virt_v2v.let('end')
    status, state = waiting.ending()
    assert (status, state['failed']) == (3, True)


@pytest.mark.parametrize('number', STOPS)
def test_a_stop_signal_to_wait_cancels_the_job(wrapper, number):
    waiting = Waiting(wrapper)
    waiting.process.send_signal(number)
    status, state = waiting.ending()
    assert state['failed'] is True
    assert status == (4 if state.get('cancelled') else 3)
    wrapper.wait_gone()


@pytest.mark.parametrize('number', STOPS)
def test_a_stop_signal_reaches_a_job_without_its_guardian(wrapper, number):
    waiting = Waiting(wrapper)
    os.kill(guardian(waiting.job), signal.SIGKILL)
    waiting.process.send_signal(number)
    assert waiting.ending()[1]['failed'] is True


def test_kill_to_wait_leaves_the_job_as_it_is(wrapper):
    waiting = Waiting(wrapper)
    waiting.process.kill()
    assert waiting.ending()[0] == -signal.SIGKILL
    assert waiting.job.is_alive()
    wrapper.virt_v2v.let('end')
    assert waiting.job.wait_finished()['return_code'] == 0


def test_wait_goes_on_if_the_guardian_is_killed(wrapper):
    waiting = Waiting(wrapper)
    process = guardian(waiting.job)
    os.kill(process, signal.SIGKILL)
    wrapper.virt_v2v.let('end')
    status, state = waiting.ending()
    assert (status, state['return_code']) == (0, 0)


def test_wait_has_status_3_if_all_of_the_job_is_killed(wrapper):
    waiting = Waiting(wrapper)
    kill_guardian_and_monitor(waiting.job)
    assert waiting.ending()[0] == 3


def test_wait_ends_although_others_take_the_lock_meanwhile(wrapper):
    """As the next start does, which ends the job: each second look at the lock finds that."""
    command = wrapper.command
    wrapper.command = lambda *arguments: [
        strace(), '-o', '/dev/null', '-e', 'trace=flock', '-e',
        'inject=flock:error=EAGAIN:when=2+2', '--'] + command(*arguments)
    waiting = Waiting(wrapper)
    os.kill(kill_monitor(waiting.job), signal.SIGKILL)
    assert waiting.ending()[0] == 3


def kill_guardian_and_monitor(job):
    """Kill both, one after the other, although the launcher is there to reap only one."""
    found = guardian(job), job.state()['wrapper_pid']
    for process in found:
        os.kill(process, signal.SIGKILL)


def test_a_hang_up_that_the_caller_ignores_cancels_nothing(wrapper):
    """So nohup does what it is for."""
    waiting = Waiting(wrapper, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    waiting.process.send_signal(signal.SIGHUP)
    wrapper.virt_v2v.let('end')
    assert waiting.ending()[0] == 0


@pytest.mark.parametrize('request_, status', [({'vm_name': ''}, 2), ({'export_domain': '/x'}, 1)])
def test_wait_refuses_as_a_start_does(wrapper, request_, status):
    job = wrapper.start(wrapper.request(**request_), *(wrapper.arguments + ['--wait']))
    assert (job.status, job.stdout) == (status, b'')
    assert job.stderr.startswith(b'virt-v2v-wrapper: error: ' + list(request_)[0].encode())


def test_three_at_a_time_with_xargs(wrapper):
    """As in the README: xargs is the queue."""
    os.mkdir(os.path.join(wrapper.home, 'requests'))
    for number in range(3):
        path = os.path.join(wrapper.home, 'requests', '%d.json' % number)
        with open(path, 'w') as stream:
            json.dump(wrapper.request(vm_name='guest%d' % number), stream)
        os.chmod(path, 0o644)
    wrapper.virt_v2v.play(copying(1, 1), bar(100), leave(0))
    words = ' '.join(map(shlex.quote, wrapper.command()))
    wrapper.add_program('virt-v2v-wrapper.py', '#!/bin/sh\nexec %s "$@"\n' % words)
    with subprocess.Popen(
            ['sh', '-c', "printf '%s\\0' requests/*.json | xargs -0 -P3 -I{} sh -c"
             " 'virt-v2v-wrapper.py --wait < \"$0\"' {}"], cwd=wrapper.home, stdout=subprocess.PIPE,
            env=wrapper.environment(PATH=wrapper.virt_v2v.bin + ':/usr/bin:/bin'),
            preexec_fn=lambda: blackbox.become(wrapper.caller)) as process:
        lines = process.stdout.read().splitlines()
    jobs = [blackbox.Job(0, line, b'') for line in lines]
    assert process.returncode == 0
    assert sorted(job.state()['vm_name'] for job in jobs) == ['guest0', 'guest1', 'guest2']
    assert [job.state()['return_code'] for job in jobs] == [0, 0, 0]


# --- list --------------------------------------------------------------------------------

def listed(wrapper):
    """Return what --list --json has, by guest, east of Greenwich."""
    status, stdout, stderr = command(wrapper, '--list', '--json', environment={'TZ': 'XXX-05:30'})
    assert (status, stderr) == (0, '')
    return {row['guest']: row for row in json.loads(stdout)}


def test_the_list_before_the_first_job_is_empty(wrapper):
    assert command(wrapper, '--list', '--json') == (0, '[]\n', '')
    assert wrapper.files() == []


def test_the_list_has_a_running_job(wrapper):
    job = wrapper.start_waiting(phase('Opening the source'), source(DISKS[0]), copying(1, 2),
                                bar(44))
    job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'] == 44,
                   'progress is published')
    found = listed(wrapper)['vm']
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert 0 <= found.pop('age') < 100
    assert found == {'guest': 'vm', 'status': 'running', 'percent': 22, 'phase': 'Copying disk 1/2',
                     'state_file': job.paths.state_file}


@pytest.mark.parametrize('keys, status', [
    ({}, 'converted'), ({'failed': True}, 'failed'),
    ({'failed': True, 'last_message': {'type': 'error', 'message': 'no space'}}, 'failed'),
    ({'failed': True, 'cancelled': True}, 'cancelled'), ({'cancelled': True}, 'converted')])
def test_the_list_says_how_a_job_ended(wrapper, keys, status):
    PaperJob(wrapper, 1).end(**keys)
    assert listed(wrapper)['guest1']['status'] == status


def test_the_list_publishes_the_end_of_a_dead_job(wrapper):
    job = wrapper.start_waiting()
    virt_v2v = job.state()['pid']
    kill_wrapper(job)
    wait_ended(virt_v2v)
    assert 'finished' not in job.state()
    assert listed(wrapper)['vm']['status'] == 'failed'
    assert job.state()['finished'] is True
    assert not os.path.exists(job.lock_file)


@pytest.mark.parametrize('disks, count, percent', [
    ([], 0, 0), ([], 2, 0), ([{'progress': 50}], 1, 50), ([{'progress': 50}], 2, 25),
    ([{'progress': 12.34}], 1, 12.3),
    ([{'progress': 100, 'bytes': 1}, {'progress': 0, 'bytes': 3}], 2, 25),
    ([{'progress': 100, 'bytes': 1}, {'progress': 0}], 2, 50),
    ([{'progress': 40, 'bytes': 7}], 2, 20),
    ([{'progress': 50}, {'progress': 0, 'unknown': True}], 1, 50),
    ([{'progress': 1e300, 'bytes': 1}], 1, 100), ([{'progress': float('nan')}], 1, 0)])
def test_percent_is_of_all_disks_by_their_size(wrapper, disks, count, percent):
    PaperJob(wrapper, 1, disks=disks, disk_count=count)
    assert listed(wrapper)['guest1']['percent'] == percent


def test_the_list_is_a_table_for_people(wrapper):
    job = PaperJob(wrapper, 1, vm_name='web', started_at='2020-01-01T00:00:00Z')
    job.copy(56.7)
    status, stdout, stderr = command(wrapper, '--list')
    assert (status, stderr) == (0, '')
    header, row = stdout.splitlines()
    assert re.split('  +', header) == ['GUEST', 'STATUS', 'PERCENT', 'PHASE', 'AGE', 'STATE FILE']
    cells = re.split('  +', row)
    assert cells[:4] == ['web', 'running', '56%', 'Copying disk 1/1']
    assert re.fullmatch('[0-9]+d', cells[4]) and cells[5] == job.path


def test_the_columns_of_wide_names_are_in_line(wrapper):
    PaperJob(wrapper, 1, vm_name='\u4e2d\u6587\u5b57').end()
    PaperJob(wrapper, 2, vm_name='abcdef').end()
    lines = command(wrapper, '--list')[1].splitlines()
    assert lines[1].startswith('\u4e2d\u6587\u5b57  converted')
    assert lines[2].startswith('abcdef  converted')


@pytest.mark.parametrize('name', ['\x1b[2J\r\n\x07x', 'x' * 100000, '\u202ex\u2028', '\x9b31m'])
def test_a_hostile_name_cannot_break_the_table(wrapper, name):
    PaperJob(wrapper, 1, vm_name=name, phase=name)
    stdout = command(wrapper, '--list')[1]
    assert len(stdout.splitlines()) == 2
    assert len(stdout) < 1000
    assert stdout.replace('\n', '').isprintable()


RUBBISH = {
    'nothing': b'', 'half': b'{"started": true, ', 'a list': b'[]', 'bytes': bytes(range(256)),
    'other types': b'{"started": 1, "disks": {"a": 1}, "vm_name": [], "wrapper_pid": {}}',
    'many disks': b'{"disks": [], "disk_count": 1e300, "started_at": 7}',
    'deep': b'[' * 100000}


@pytest.mark.parametrize('kind', sorted(RUBBISH))
@pytest.mark.parametrize('alive', [False, True])
def test_a_damaged_state_does_not_break_the_list(wrapper, kind, alive):
    running, damaged = PaperJob(wrapper, 1), PaperJob(wrapper, 2)
    with open(damaged.path, 'wb') as stream:
        stream.write(RUBBISH[kind])
    if not alive:
        damaged.die()
    assert listed(wrapper)[running.guest]['status'] == 'running'


@pytest.mark.parametrize('put', [os.mkdir, os.mkfifo, lambda path: os.symlink('x', path),
                                 lambda path: os.symlink('/dev/zero', path)])
def test_what_is_no_file_does_not_break_the_list(wrapper, put):
    job, other = PaperJob(wrapper, 1), PaperJob(wrapper, 3)
    put(os.path.join(wrapper.state_dir, 'v2v-import-20200101T000000-1.state'))
    lock = other.path.replace('.state', '.lock')
    os.unlink(lock)
    put(lock)
    assert listed(wrapper)[job.guest]['status'] == 'running'


def test_the_list_waits_for_a_reader_that_does_not_block(wrapper):
    """As of the pipes that some programs make, and of a terminal that they share."""
    PaperJob(wrapper, 1, vm_name='x' * 4000, phase='y' * 4000).end()
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, 1031, 4096)      # F_SETPIPE_SZ, which Python 3.6 has not
    os.set_blocking(writer, False)
    with wrapper.popen(*(wrapper.arguments + ['--list', '--json']), stdout=writer) as process:
        os.close(writer)
        eventually(lambda: process.poll() is not None or unread(reader) == size, 'it is full')
        with open(reader) as stream:
            rows = json.load(stream)
        assert (process.wait(60), process.stderr.read()) == (0, b'')
    assert rows[0]['guest'] == 'x' * 4000


def unread(pipe):
    """Return how many bytes are in a pipe."""
    return struct.unpack('i', fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_root_lists_the_jobs_of_vdsm(root_wrapper):
    PaperJob(root_wrapper, 1)
    assert set(listed(root_wrapper)) == {'guest1'}


# --- cancel ------------------------------------------------------------------------------

@pytest.fixture
def impatient(wrapper):
    """The wrapper, but it waits for little time only."""
    tamper(wrapper, 'module.CANCEL_PATIENCE = 1.0')
    return wrapper


def test_cancel_ends_jobs_and_waits_for_that(wrapper):
    wrapper.virt_v2v.play(reach('waiting'), wait('end'))
    jobs = [wrapper.start(), wrapper.start()]
    paths = [job.paths.state_file for job in jobs]
    eventually(lambda: len(wrapper.virt_v2v.runs()) == 2, 'both run')
    status, stdout, stderr = command(wrapper, '--cancel', *paths)
    states = [job.state() for job in jobs]
    assert (status, stderr) == (0, '')
    assert [state.get('finished') for state in states] == [True, True]
    said = dict(line.split(': ', 1) for line in stdout.splitlines())
    assert set(said) == set(paths)
    assert {text.partition(':')[0] for text in said.values()} <= {'failed', 'cancelled'}
    wrapper.wait_gone()


def test_cancel_ends_a_job_without_its_guardian(wrapper):
    job = wrapper.start_waiting()
    process = guardian(job)
    os.kill(process, signal.SIGKILL)
    wait_ended(process)
    assert command(wrapper, '--cancel', job.paths.state_file)[0] == 0
    assert job.state()['failed'] is True


def test_root_cancels_a_job_of_vdsm(root_wrapper):
    job = root_wrapper.start_waiting()
    assert command(root_wrapper, '--cancel', job.paths.state_file)[0] == 0
    assert job.state()['failed'] is True


def test_cancel_of_a_job_that_ended_before_is_fine(wrapper):
    job = wrapper.start()
    job.wait_finished()
    path = job.paths.state_file
    assert command(wrapper, '--cancel', path) == (0, path + ': had ended before: converted\n', '')


def test_cancel_of_a_job_that_was_killed_is_fine(wrapper):
    job = PaperJob(wrapper, 1)
    job.die()
    said = job.path + ': had ended before: failed\n'
    assert command(wrapper, '--cancel', job.path) == (0, said, '')


@pytest.mark.parametrize('name', ['nothing.state', 'v2v.log', '..'])
def test_cancel_of_what_is_no_job_is_an_error_of_its_own(wrapper, name):
    job = wrapper.start_waiting()
    path = os.path.join(wrapper.log_dir, name)
    status, stdout, stderr = command(wrapper, '--cancel', path, job.paths.state_file)
    assert status == 1
    assert stderr == 'virt-v2v-wrapper: error: %s: is not the state file of a job\n' % path
    assert stdout.startswith(job.paths.state_file + ': ')
    assert job.state()['finished'] is True


@pytest.fixture
def stranger(wrapper):
    """A process of the same user that belongs to no job."""
    with subprocess.Popen(['sleep', '600'], start_new_session=True,
                          preexec_fn=lambda: blackbox.become(wrapper.user)) as process:
        yield process.pid
        process.kill()


def edit(job, **changes):
    """Change what the state file of a job has."""
    state, job.damaged = dict(job.state(), **changes), True
    with open(job.paths.state_file, 'w') as stream:
        json.dump(state, stream)


@pytest.mark.parametrize('pid', [0, 1, -1, 2 ** 70, 'sleep', None])
def test_a_process_that_is_not_the_job_s_is_never_signalled(wrapper, stranger, pid):
    job = wrapper.start_waiting()
    edit(job, wrapper_pid=stranger if pid == 'sleep' else pid)
    status, stdout, stderr = command(wrapper, '--cancel', job.paths.state_file)
    assert (status, stdout) == (1, '')
    assert re.fullmatch('virt-v2v-wrapper: error: %s: .*\n' % job.paths.state_file, stderr)
    assert is_running(stranger) and job.is_alive()
    wrapper.virt_v2v.let('end')
    assert job.wait_finished()['return_code'] == 0


def test_cancel_waits_for_a_guardian_that_ends_the_job(wrapper):
    job = wrapper.start_waiting()
    process = kill_monitor(job)
    cancelling = wrapper.popen(*(wrapper.arguments + ['--cancel', job.paths.state_file]))
    assert job.is_alive()
    os.kill(process, signal.SIGCONT)
    stdout, stderr = cancelling.communicate(timeout=60)
    assert (cancelling.returncode, stderr) == (0, b'')
    assert b'the wrapper was killed by SIGKILL' in stdout


def test_cancel_tells_which_job_has_not_ended(impatient):
    job = impatient.start_waiting()
    monitor = job.state()['wrapper_pid']
    os.kill(monitor, signal.SIGSTOP)
    path = job.paths.state_file
    assert command(impatient, '--cancel', path) == (
        1, '', 'virt-v2v-wrapper: error: %s: has not ended within 1 s\n' % path)
    os.kill(monitor, signal.SIGCONT)
    assert job.wait_finished()['failed'] is True


def test_a_job_of_another_pid_namespace_is_refused(wrapper):
    job = wrapper.start_waiting()
    inner = wrapper.command(*(wrapper.arguments + ['--cancel', job.paths.state_file]))
    if os.getuid() != 0:
        pytest.skip('needs root')
    with subprocess.Popen(
            ['unshare', '--pid', '--fork', '--mount-proc', '--kill-child', 'setpriv',
             '--reuid', str(wrapper.user.pw_uid), '--regid', str(wrapper.user.pw_gid),
             '--clear-groups'] + inner, stderr=subprocess.PIPE,
            env=wrapper.environment(PATH='/usr/sbin:/usr/bin:/sbin:/bin')) as process:
        stderr = process.stderr.read().decode()
    assert stderr == ('virt-v2v-wrapper: error: %s: its processes cannot be seen from here; is it'
                      ' in a container?\n' % job.paths.state_file)
    assert process.returncode == 1
    wrapper.virt_v2v.let('end')
    assert job.wait_finished()['return_code'] == 0


# --- usage, and what a plain start pays for it -------------------------------------------

@pytest.mark.parametrize('words, text', [
    (['--json'], '--json goes with --check or --list'),
    (['--list', '--wait'], 'argument --wait: not allowed with argument --list'),
    (['--cancel'], 'argument --cancel: expected at least one argument'),
    (['--list', '--all'], 'unknown option: --all')])
def test_wrong_usage_is_told_as_always(wrapper, words, text):
    assert command(wrapper, *words) == (
        2, '', 'virt-v2v-wrapper: error: usage: %s; see --help\n' % text)


def test_help_fits_80_columns(wrapper):
    stdout = command(wrapper, '--help', environment={'COLUMNS': '80'})[1]
    assert [line for line in stdout.splitlines() if len(line) > 80] == []


IMPORTED = """\
def main(real=module.main):
    import ctypes       # which each start needs
    before = set(sys.modules)
    status = real([])
    with open({path!r}, 'w') as stream:
        stream.write(' '.join(set(sys.modules) - before))
    return status


module.main, module.VDDK_LIBDIR = main, {libdir!r}
"""


def test_a_plain_start_imports_nothing_late(wrapper):
    path = os.path.join(wrapper.home, 'modules')
    tamper(wrapper, IMPORTED.format(path=path, libdir=wrapper.vddk_libdir))
    wrapper.arguments = ['']        # the test's own program takes none
    job = wrapper.start(environment={'XDG_STATE_HOME': wrapper.home})
    with open(path) as stream:
        assert (job.status, stream.read()) == (0, '')
    job.wait_finished()
