"""Every ending is published, and the end of virt-v2v is the end."""
import os
import re
import resource
import shutil
import signal

import pytest

import processes
import rooms
from blackbox import DOMAIN
from eventually import eventually
from faults import Disk, disk, guardian, known, last_message, tamper, traced
from jobs import kill_wrapper
from virt_v2v import (
    DISKS, bar, copying, daemon, die, error, fork, ignore, json_message, leave, phase, reach,
    repeat, source, stdout, wait)

pytestmark = pytest.mark.promise(3)

SHORT_GRACE = 'module.STOP_GRACE = 0.2'


def ended(wrapper, job):
    """Return the final state of a job, of which nothing may be left."""
    state = job.wait_finished()
    wrapper.wait_gone()
    assert state['finished'] is True
    return state


def failed(wrapper, job):
    """Return (return code, message) of a job that has failed, of which nothing may be left."""
    state = ended(wrapper, job)
    assert state['failed'] is True
    return state.get('return_code'), last_message(state)


# --- virt-v2v ends -----------------------------------------------------------------------

def test_status_0_is_success(wrapper):
    wrapper.virt_v2v.play(leave(0))
    state = ended(wrapper, wrapper.start())
    assert (state['return_code'], 'failed' in state, 'last_message' in state) == (0, False, False)


@pytest.mark.parametrize('status', [1, 2, 126, 255])
def test_any_other_status_is_a_failure(wrapper, status):
    wrapper.virt_v2v.play(leave(status))
    return_code, message = failed(wrapper, wrapper.start())
    assert return_code == status
    assert message.startswith('virt-v2v ended with status %d ' % status)


@pytest.mark.parametrize('number, name', [
    (signal.SIGKILL, 'SIGKILL'), (signal.SIGSEGV, 'SIGSEGV'), (signal.SIGALRM, 'SIGALRM'),
    (40, 'signal 40')])
def test_a_virt_v2v_killed_by_a_signal_has_failed(wrapper, number, name):
    wrapper.virt_v2v.play(die(number))
    assert failed(wrapper, wrapper.start()) == (
        -number, 'virt-v2v was killed by ' + name)


def test_virt_v2v_s_own_words_come_with_the_signal(wrapper):
    wrapper.virt_v2v.play(json_message('error', 'no route to host'), die(signal.SIGKILL))
    assert failed(wrapper, wrapper.start()) == (
        -signal.SIGKILL, 'virt-v2v was killed by SIGKILL (no route to host)')


# --- virt-v2v cannot be executed ---------------------------------------------------------

def replace_after_questions(wrapper, command):
    """Have virt-v2v run a command of the shell on itself when it is asked what it can do."""
    program = wrapper.virt_v2v.program
    for path in (wrapper.virt_v2v.bin, program):
        os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)
    answer = os.path.join(wrapper.directory, 'stand-in', 'answers', '--machine-readable=fd:1')
    with open(program, 'w') as stream:
        stream.write('#!/bin/sh\n/bin/cat %s\n%s\n' % (answer, command))


@pytest.mark.parametrize('command, problem', [
    ('/bin/rm "$0"', 'No such file or directory'),
    ('/bin/chmod 0 "$0"', 'Permission denied'),
    ('/bin/cp /dev/null "$0".new; echo text > "$0".new; /bin/chmod 755 "$0".new;'
     ' /bin/mv "$0".new "$0"', 'Exec format error')])
def test_the_caller_is_told_that_virt_v2v_cannot_be_executed(wrapper, command, problem):
    replace_after_questions(wrapper, command)
    job = wrapper.start()
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr == b'virt-v2v-wrapper: error: virt-v2v: %s\n' % problem.encode()
    assert [name for name in wrapper.files() if '.' in name] == []


def test_the_caller_is_told_that_arguments_do_not_fit(wrapper):
    """The kernel takes 128 KiB where the stack is small: enough for us, not for virt-v2v."""
    def small_stack():
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 19, hard))
    job = wrapper.start(wrapper.request(vm_name='x' * 4096), prepare=small_stack,
                        environment={'LIBGUESTFS_FILLER': 'x' * 126000})
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr == b'virt-v2v-wrapper: error: virt-v2v: Argument list too long\n'


# --- the wrapper is killed ---------------------------------------------------------------

KILLERS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGQUIT, signal.SIGUSR1]


@pytest.mark.parametrize('number', KILLERS)
def test_a_wrapper_that_is_killed_ends_virt_v2v_and_says_so(wrapper, number):
    job = wrapper.start_waiting(source(DISKS[0]), copying(1, 1), bar(44))
    before = job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'] == 44,
                            'it is copying')
    os.kill(before['wrapper_pid'], number)
    return_code, message = failed(wrapper, job)
    assert message == 'the wrapper was killed by ' + number.name
    assert return_code == -signal.SIGKILL
    state = job.state()
    assert (state['disks'], state['pid']) == (before['disks'], before['pid'])


def test_a_killed_wrapper_leaves_no_virt_v2v_that_ignores_term(wrapper):
    job = wrapper.start_waiting(ignore(signal.SIGTERM))
    os.kill(job.state()['wrapper_pid'], signal.SIGKILL)
    assert failed(wrapper, job) == (-signal.SIGKILL, 'the wrapper was killed by SIGKILL')


@pytest.mark.promise(4)
def test_a_killed_wrapper_leaves_no_descendant_of_virt_v2v(wrapper):
    job = wrapper.start_waiting(fork(reach('child'), wait('never')),
                                daemon(ignore(signal.SIGTERM), reach('daemon'), wait('never')))
    wrapper.virt_v2v.wait_for('child')
    wrapper.virt_v2v.wait_for('daemon')
    os.kill(job.state()['wrapper_pid'], signal.SIGKILL)
    failed(wrapper, job)


def test_what_a_killed_wrapper_had_not_read_is_in_the_log(wrapper):
    wrapper.virt_v2v.play(reach('begun'), wait('print'), stdout(b'the last words\n'),
                          reach('printed'), wait('never'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('begun')
    process = job.state()['wrapper_pid']
    os.kill(process, signal.SIGSTOP)
    eventually(lambda: processes.state(process) == 'T', 'the wrapper is stopped')
    wrapper.virt_v2v.let('print')
    wrapper.virt_v2v.wait_for('printed')
    os.kill(process, signal.SIGKILL)
    failed(wrapper, job)
    assert job.log('v2v_log') == b'the last words\n'


def test_a_killed_wrapper_does_not_hide_a_success(wrapper):
    with disk(wrapper.state_dir, wrapper.user) as state_disk:
        job = wrapper.start_waiting()
        state_disk.fail()
        before = job.state()
        wrapper.virt_v2v.let('end')
        eventually(lambda: is_zombie(before['pid']), 'virt-v2v has ended')
        os.kill(before['wrapper_pid'], signal.SIGKILL)
        state_disk.work()
        state = ended(wrapper, job)
    assert (state['return_code'], 'failed' in state) == (0, False)


def test_after_a_kill_the_ending_comes_once_there_is_room(wrapper):
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    with disk(wrapper.state_dir, wrapper.user) as state_disk:
        job = wrapper.start_waiting()
        state_disk.fail()
        os.kill(job.state()['wrapper_pid'], signal.SIGKILL)
        eventually(lambda: b'trying again' in job.log('wrapper_log'), 'a write has failed')
        assert 'finished' not in job.state()
        state_disk.work()
        assert failed(wrapper, job) == (
            -signal.SIGKILL, 'the wrapper was killed by SIGKILL')


def test_a_killed_guardian_changes_nothing(wrapper):
    job = wrapper.start_waiting(phase('Opening the source'))
    os.kill(guardian(job), signal.SIGKILL)
    wrapper.virt_v2v.let('end')
    state = ended(wrapper, job)
    assert (state['return_code'], 'failed' in state) == (0, False)


KILLED_BEFORE_THE_ANSWER = """
facts = module.Facts


def killed(*arguments, **keywords):
    if os.getsid(0) == os.getpid():     # it leads the session
        victim = os.{victim}()
        os.kill(victim, signal.SIGKILL)
        while os.getppid() == victim:
            module.time.sleep(0.01)
    return facts(*arguments, **keywords)


module.Facts = killed
"""


def test_a_guardian_killed_before_its_answer_leaves_no_job(wrapper):
    tamper(wrapper, KILLED_BEFORE_THE_ANSWER.format(victim='getpid'))
    wrapper.virt_v2v.play(wait('never'))
    job = wrapper.start()
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr == (
        b'virt-v2v-wrapper: error: wrapper: ended before virt-v2v was started\n')


def test_a_launcher_killed_before_its_answer_leaves_no_job(wrapper):
    tamper(wrapper, KILLED_BEFORE_THE_ANSWER.format(victim='getppid'))
    wrapper.virt_v2v.play(wait('never'))
    job = wrapper.start()
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (-signal.SIGKILL, b'')


NO_ROOM_AFTER = '''\
def write(*_, **__):
    while not os.path.exists({mark!r}):
        module.time.sleep(0.01)
    raise OSError(28, 'No space left on device')


module.StateFile.write = write
'''


def test_a_start_that_fails_late_leaves_no_descendant_either(wrapper):
    tamper(wrapper, NO_ROOM_AFTER.format(mark=broken_mark(wrapper)))
    wrapper.virt_v2v.play(daemon(ignore(signal.SIGTERM), reach('broken'), wait('never')),
                          wait('never'))
    job = wrapper.start()
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (1, b'')


def test_without_a_guardian_the_wrapper_still_stops_on_a_signal(wrapper):
    job = wrapper.start_waiting()
    os.kill(guardian(job), signal.SIGKILL)
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    assert failed(wrapper, job) == (1, 'the wrapper was told to stop by SIGTERM')


def test_without_a_guardian_nothing_is_left_either(wrapper):
    job = wrapper.start_waiting(fork(reach('child'), wait('never')),
                                daemon(reach('daemon'), wait('never')))
    wrapper.virt_v2v.wait_for('child')
    wrapper.virt_v2v.wait_for('daemon')
    os.kill(guardian(job), signal.SIGKILL)
    wrapper.virt_v2v.let('end')
    assert ended(wrapper, job)['return_code'] == 0
    assert not os.path.exists(scratch(wrapper))


def test_the_guardian_passes_a_stop_signal_on(wrapper):
    job = wrapper.start_waiting()
    os.kill(guardian(job), signal.SIGTERM)
    assert failed(wrapper, job) == (1, 'the wrapper was told to stop by SIGTERM')


def scratch(wrapper):
    """Return virt-v2v's directory for temporary files."""
    return wrapper.recorded().environment[b'TMPDIR']


def test_a_killed_wrapper_leaves_no_temporary_files(wrapper):
    job = wrapper.start_waiting()
    directory = scratch(wrapper)
    assert os.path.isdir(directory)
    os.kill(job.state()['wrapper_pid'], signal.SIGKILL)
    failed(wrapper, job)
    assert not os.path.exists(directory)


def test_temporary_directories_may_lack_permissions(wrapper):
    job = wrapper.start_waiting()
    closed = os.path.join(scratch(wrapper), b'supermin', b'etc')
    os.makedirs(os.path.join(closed, b'apt'))
    for path in (os.path.join(closed, b'apt'), closed, os.path.dirname(closed)):
        os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)
        os.chmod(path, 0o600)
    wrapper.virt_v2v.let('end')
    assert ended(wrapper, job)['return_code'] == 0
    assert not os.path.exists(scratch(wrapper))


def test_temporary_files_that_stay_do_not_hide_the_ending(wrapper):
    job = wrapper.start_waiting()
    directory = scratch(wrapper)
    os.chmod(directory, 0)
    wrapper.virt_v2v.let('end')
    try:
        state = ended(wrapper, job)
    finally:
        if os.path.exists(directory):
            os.rmdir(directory)
    assert (state['return_code'], 'failed' in state) == (0, False)


# --- mistakes of ours --------------------------------------------------------------------

BREAK = """
def breakable(owner, name):
    original = getattr(owner, name)

    def function(*arguments, **keywords):
        if os.path.exists({mark!r}) and {where}:
            open({mark!r} + '-used', 'w').close()
            raise KeyError('a mistake')
        return original(*arguments, **keywords)
    setattr(owner, name, function)
"""


EVERYWHERE = 'True'
NOT_IN_THE_GUARDIAN = 'os.getsid(0) != os.getpid()'         # it leads the session


def broken_mark(wrapper):
    """Return the path of the file that the step reach("broken") makes."""
    return os.path.join(wrapper.directory, 'stand-in', 'marks', 'broken')


def breaking(wrapper, name, where=NOT_IN_THE_GUARDIAN):
    """Have a function of the script raise an exception from the step reach("broken") on."""
    mark = broken_mark(wrapper)
    owner, _, function = ('module.' + known(name)).rpartition('.')
    tamper(wrapper, '%s\n%s\nbreakable(%s, %r)' % (
        SHORT_GRACE, BREAK.format(mark=mark, where=where), owner, function))


def play_broken(wrapper, *steps):
    """Start a job that copies a disk after something has broken; then it plays steps."""
    wrapper.virt_v2v.play(phase('Opening the source'), wait('begin'), reach('broken'),
                          source(DISKS[0]), copying(1, 1), bar(44), phase('Finishing off'), *steps)
    job = wrapper.start()
    wrapper.virt_v2v.let('begin')       # not before: the first state is needed
    return job


# What ends each job, or is there before or after it.
ENDING = ['finished_document', 'end_descendants', 'remove_tree']
OUTSIDE = ['signal_name', 'Parser.__init__', 'Progress.__init__']
# What follows virt-v2v, and what turns that into the state.
PARSING = [name for name in rooms.boundary('Output', 'Progress') if name not in ENDING + OUTSIDE]


@pytest.mark.parametrize('name', PARSING)
def test_a_mistake_in_parsing_does_not_end_a_healthy_virt_v2v(wrapper, name):
    breaking(wrapper, name)
    job = play_broken(wrapper, reach('copied'), wait('end'))
    wrapper.virt_v2v.wait_for('copied')
    if name not in ('Parser.end', 'Lines.end'):         # which only the end uses
        eventually(lambda: re.search(b'the conversion goes on|trying again',
                                     job.log('wrapper_log')), 'it goes on')
    wrapper.virt_v2v.let('end')
    state = ended(wrapper, job)
    assert (state['return_code'], 'failed' in state) == (0, False)
    wrapper.virt_v2v.wait_for('broken-used')


@pytest.mark.parametrize('name', PARSING)
def test_a_mistake_in_parsing_does_not_hide_a_failure(wrapper, name):
    breaking(wrapper, name)
    return_code, message = failed(wrapper, play_broken(wrapper, error('no space')))
    assert return_code == 1
    assert message


def test_a_mistake_in_a_write_put_off_does_not_end_virt_v2v(wrapper):
    breaking(wrapper, 'Progress.document')
    wrapper.virt_v2v.play(source(DISKS[0]), copying(1, 1), bar(10), wait('break'), reach('broken'),
                          repeat(3, bar(44), bar(55)), wait('end'))
    job = wrapper.start()
    job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'] == 10,
                   'it is copying')
    wrapper.virt_v2v.let('break')
    wrapper.virt_v2v.wait_for('broken-used')
    wrapper.virt_v2v.let('end')
    state = ended(wrapper, job)
    assert (state['return_code'], 'failed' in state) == (0, False)


@pytest.mark.parametrize('name', ['Pipe.read', 'OutputLog.write'])
def test_a_mistake_that_ends_the_wrapper_ends_virt_v2v(wrapper, name):
    breaking(wrapper, name)
    assert failed(wrapper, play_broken(wrapper, wait('never'))) == (
        -signal.SIGKILL, 'the wrapper failed, see its log')


def test_a_mistake_in_taking_signals_ends_virt_v2v(wrapper):
    breaking(wrapper, 'signal_name')
    job = play_broken(wrapper, reach('copied'), wait('never'))
    wrapper.virt_v2v.wait_for('copied')
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    assert failed(wrapper, job) == (-signal.SIGKILL, 'the wrapper failed, see its log')


def fail_broken(wrapper):
    """Start a job that fails after something has broken."""
    job = play_broken(wrapper, json_message('error', 'no space'), wait('end'), leave(1))
    job.wait_state(lambda state: 'last_message' in state, 'the error is published')
    wrapper.virt_v2v.let('end')
    return job


@pytest.mark.parametrize('name', ENDING)
def test_a_mistake_in_the_wrapper_s_ending_is_made_up_for(wrapper, name):
    breaking(wrapper, name)
    job = fail_broken(wrapper)
    # Temporary files are removed when all is published.
    message = 'no space' if name == 'remove_tree' else 'the wrapper failed, see its log (no space)'
    assert failed(wrapper, job) == (1, message)


@pytest.mark.parametrize('name', ENDING)
def test_a_mistake_in_the_wrapper_s_ending_denies_no_success(wrapper, name):
    breaking(wrapper, name)
    job = play_broken(wrapper, wait('end'))
    job.wait_state(lambda state: state['disks'], 'it is copying')
    wrapper.virt_v2v.let('end')
    state = ended(wrapper, job)
    assert (state['return_code'], 'failed' in state, state['disks']) == (
        0, False, [{'path': DISKS[0], 'progress': 100}])


def test_after_a_mistake_in_every_ending_the_next_start_ends_it(wrapper):
    breaking(wrapper, 'finished_document', EVERYWHERE)
    job = fail_broken(wrapper)
    wrapper.wait_gone()
    assert 'finished' not in job.state()
    os.unlink(broken_mark(wrapper))
    assert ended_by_the_next_start(wrapper, job).endswith(' (no space)')


# --- at any moment -----------------------------------------------------------------------

# Numbers the calls that the monitor makes of the operating system, and does something at one.
AT_CALL = """
calls = 0
monitor = module.monitor
SYSTEM = ('posix', 'fcntl', 'time', 'select', '_posixsubprocess', '_signal')


def profile(frame, event, function):
    global calls
    owner = getattr(function, '__module__', None) or type(
        getattr(function, '__self__', None)).__module__
    if event == 'c_call' and owner in SYSTEM:
        calls += 1
        if calls == {number}:
            {action}


def observed(*arguments):
    sys.setprofile(profile)
    status = monitor(*arguments)
    sys.setprofile(None)
    with open({count!r}, 'w') as stream:
        stream.write(str(calls))
    return status


module.monitor = observed
"""
ACTIONS = {
    'killed': 'os.kill(os.getpid(), signal.SIGKILL)',
    'told to stop': 'os.kill(os.getpid(), signal.SIGTERM)',
    'a mistake': 'raise KeyError(function.__name__)',
    'an error': 'raise OSError(5, "Input/output error")',
}


def at_call(wrapper, number, action):
    """Have something happen to the monitor at one of its calls of the operating system."""
    path = os.path.join(wrapper.home, 'count')
    settings = '%s\nmodule.PUBLISH_RETRY = 0.05\nmodule.TEMPORARY_DIR = %r\n' % (
        SHORT_GRACE, scratch_directory(wrapper))
    tamper(wrapper, settings + AT_CALL.format(
        number=number, action=ACTIONS[action], count=path))
    return path


def scratch_directory(wrapper):
    """Return a directory for the directories of temporary files."""
    path = os.path.join(wrapper.directory, 'tmp')
    if not os.path.exists(path):
        os.mkdir(path)
        os.chmod(path, 0o777)
    return path


def play_short(wrapper):
    """Have virt-v2v do a bit of everything."""
    wrapper.virt_v2v.play(phase('Opening the source'), source(DISKS[0]), copying(1, 1), bar(44),
                          daemon(wait('never')), phase('Finishing off'))


def number_of_calls(wrapper):
    """Return how many calls of the operating system the monitor makes in a short job."""
    path = at_call(wrapper, 0, 'killed')
    play_short(wrapper)
    job = wrapper.start()
    job.wait_finished()
    wrapper.wait_gone()
    assert left_over(wrapper, job) == []
    with open(path) as stream:
        return int(stream.read())


def is_published(wrapper, number, action):
    """Have something happen at one call; say whether the caller was told of the job.

    If so, its end has to be published. In any case nothing may be left.
    """
    at_call(wrapper, number, action)
    job = wrapper.start()
    if job.status == 0:
        state = job.wait_finished()
        assert state.get('return_code') == 0 or (state['failed'] and last_message(state)), number
        assert not (state.get('return_code') == 0 and 'failed' in state), number
    wrapper.wait_gone()
    assert left_over(wrapper, job) == [], number
    return job.status == 0


def left_over(wrapper, job):
    """Return what is left of a job but its logs and state, and these, too, if it has no paths.

    What is left of its temporary files, because removing them failed, does not count if its log
    says so.
    """
    known, said = [], ''
    if job.paths is not None:
        known = [os.path.relpath(path, wrapper.home) for path in job.paths]
        said = job.log('wrapper_log').decode()
    left = [name for name in wrapper.files() if '.' in name and name not in known]
    for path in job.paths or ():
        os.unlink(path)
    for name in os.listdir(scratch_directory(wrapper)):
        path = os.path.join(scratch_directory(wrapper), name)
        if 'temporary files are left in %s\n' % path in said:
            shutil.rmtree(path)
        elif name != 'v2v-cache-%d' % wrapper.user.pw_uid:
            left.append(name)
    return left


def sweep(wrapper, action, share):
    """Have something happen at so many evenly spread calls; 0 means at each of them."""
    count = number_of_calls(wrapper)
    numbers = range(1, count + 1, count // share if share else 1)
    published = [is_published(wrapper, number, action) for number in numbers]
    assert published[-1]
    # The first calls come before anybody is told of the job.
    assert not published[0] or action != 'killed'


@pytest.mark.parametrize('action', sorted(ACTIONS))
def test_whatever_happens_the_ending_is_published(wrapper, action):
    sweep(wrapper, action, 6)


@pytest.mark.long
@pytest.mark.parametrize('action', sorted(ACTIONS))
def test_whatever_happens_at_any_call_the_ending_is_published(wrapper, action):
    sweep(wrapper, action, 0 if action == 'killed' else 60)


@pytest.mark.long
def test_killed_at_any_system_call_the_ending_is_published(wrapper):
    for name, count in system_calls(wrapper):
        job = wrapper.start_waiting(phase('Opening the source'))
        with traced(job.state()['wrapper_pid'], '-e', 'trace=' + name, '-e',
                    'inject=%s:signal=KILL:when=%d' % (name, count)):
            wrapper.virt_v2v.let('end')
            state = job.wait_finished()
        assert state['return_code'] in (0, -signal.SIGKILL)
        assert ('failed' in state) is (state['return_code'] != 0)
        if 'failed' in state:
            assert last_message(state) == 'the wrapper was killed by SIGKILL'
        wrapper.wait_gone()
        wrapper.use('2.2.0')


def system_calls(wrapper):
    """Return the monitor's system calls at the end as (name, how many of that came by then)."""
    job = wrapper.start_waiting(phase('Opening the source'))
    with traced(job.state()['wrapper_pid']) as log:
        wrapper.virt_v2v.let('end')
        job.wait_finished()
        wrapper.wait_gone()
        names = re.findall(r'^(\w+)\(', log(), re.MULTILINE)
    wrapper.use('2.2.0')
    assert 'exit_group' in names
    return [(name, names[:n + 1].count(name)) for n, name in enumerate(names)]


# --- all of the wrapper is killed --------------------------------------------------------

def ended_by_the_next_start(wrapper, job):
    """Start a job that ends at once; return the message with which it has ended a dead one."""
    def is_ended():
        with open(job.paths.state_file) as stream:      # which may not be JSON yet
            return '"finished": true' in stream.read()

    wrapper.virt_v2v.play(leave(0))
    wrapper.start()
    eventually(is_ended, 'the ending is published')
    state = ended(wrapper, job)
    assert (state['failed'], 'return_code' in state) == (True, False)
    return last_message(state)


def test_the_next_start_publishes_the_ending_of_a_dead_job(wrapper):
    job = wrapper.start_waiting(source(DISKS[0]), copying(1, 1), bar(44))
    before = job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'] == 44,
                            'it is copying')
    kill_wrapper(job)
    wrapper.wait_gone()
    assert job.state() == before
    assert ended_by_the_next_start(wrapper, job) == (
        'all processes of the wrapper were killed, or the host was restarted; the state was last'
        ' written at ' + before['updated_at'])
    assert job.state()['disks'] == before['disks']


@pytest.mark.promise(4)
def test_the_next_start_ends_all_that_is_left_of_a_dead_job(wrapper):
    job = wrapper.start_waiting(daemon(ignore(signal.SIGTERM), reach('daemon'), wait('never')))
    wrapper.virt_v2v.wait_for('daemon')
    directory = scratch(wrapper)
    place, name = os.path.split(job.lock_file)
    half_written = os.path.join(place, '.{}.0123.tmp'.format(name[:-len('.lock')]))
    open(half_written, 'w').close()
    kill_wrapper(job)
    ended_by_the_next_start(wrapper, job)
    assert [path for path in (directory, job.lock_file, half_written)
            if os.path.exists(path)] == []


def test_the_next_start_leaves_living_jobs_alone(wrapper):
    job = wrapper.start_waiting()
    before = job.state()
    wrapper.virt_v2v.play(leave(0))
    wrapper.start().wait_finished()
    eventually(lambda: len(wrapper.processes()) == 3, 'the other job has ended')
    assert job.state() == before
    wrapper.virt_v2v.let('end')
    assert ended(wrapper, job)['return_code'] == 0


@pytest.mark.parametrize('damage', ['', '{"started": true', '[1]', '{"disks": 1}', '{}'])
def test_an_ending_is_published_in_a_damaged_state(wrapper, damage):
    """As a power loss may leave it."""
    job = wrapper.start_waiting()
    kill_wrapper(job)
    wrapper.wait_gone()
    job.damaged = True
    with open(job.paths.state_file, 'w') as stream:
        stream.write(damage)
    ended_by_the_next_start(wrapper, job)


def test_an_ending_is_published_where_the_lock_is_gone(wrapper):
    job = wrapper.start_waiting()
    kill_wrapper(job)
    wrapper.wait_gone()
    os.unlink(job.lock_file)
    shutil.rmtree(scratch(wrapper))
    ended_by_the_next_start(wrapper, job)


# --- the end of virt-v2v is the end ------------------------------------------------------

BURST = b''.join(b'line %06d of many\n' % number for number in range(60000))


@pytest.mark.promise(4)
@pytest.mark.parametrize('start', [fork, daemon])
def test_a_process_that_holds_the_pipe_is_killed_at_the_end(wrapper, start):
    job = wrapper.start_waiting(start(ignore(signal.SIGTERM), reach('held'), wait('never')))
    wrapper.virt_v2v.wait_for('held')
    wrapper.virt_v2v.let('end')
    assert ended(wrapper, job)['return_code'] == 0


@pytest.mark.promise(4)
@pytest.mark.parametrize('start', [fork, daemon])
def test_a_process_that_prints_for_ever_is_killed_at_the_end(wrapper, start):
    job = wrapper.start_waiting(start(reach('held'), repeat(10 ** 9, stdout(b'more\n'))))
    wrapper.virt_v2v.wait_for('held')
    wrapper.virt_v2v.let('end')
    assert ended(wrapper, job)['return_code'] == 0


@pytest.mark.promise(4)
def test_what_was_printed_right_before_the_end_is_in_the_log(wrapper):
    assert len(BURST) > 1 << 20
    wrapper.virt_v2v.play(stdout(BURST), leave(0))
    job = wrapper.start()
    ended(wrapper, job)
    assert job.log('v2v_log') == BURST


@pytest.mark.promise(4)
def test_what_was_printed_is_in_the_log_if_the_pipe_is_held(wrapper):
    wrapper.virt_v2v.play(daemon(reach('held'), wait('never')), wait('go'), stdout(BURST))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('held')
    wrapper.virt_v2v.let('go')
    ended(wrapper, job)
    assert job.log('v2v_log') == BURST


def test_an_error_right_after_a_burst_of_output_is_published(wrapper):
    wrapper.virt_v2v.play(stdout(BURST), error('the very last words'))
    assert failed(wrapper, wrapper.start()) == (1, 'the very last words')


def is_zombie(process):
    """Say whether a process has ended, but its number cannot be given to another."""
    return processes.state(process) == 'Z'


def wait_for_tries(wrapper):
    """Wait until it was tried twice to write the state, which changes its directory each time."""
    seen = set()

    def tried():
        seen.add(os.stat(wrapper.state_dir).st_mtime_ns)
        return len(seen) > 4        # a file was made, and removed, at each
    eventually(tried, 'it goes on trying')


@pytest.mark.promise(4)
@pytest.mark.parametrize('kill', [False, True])
def test_the_published_pid_is_taken_until_the_final_state(wrapper, kill):
    """Also if the wrapper is killed in between; then the guardian sees to that."""
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    with disk(wrapper.state_dir, wrapper.user, Disk) as state_disk:
        job = wrapper.start_waiting()
        before = job.state()
        state_disk.fail()
        wrapper.virt_v2v.let('end')
        eventually(lambda: is_zombie(before['pid']), 'virt-v2v has ended')
        if kill:
            os.kill(before['wrapper_pid'], signal.SIGKILL)
        wait_for_tries(wrapper)
        assert is_zombie(before['pid'])
        assert job.state() == before
        state_disk.work()
        ended(wrapper, job)
    eventually(lambda: not os.path.exists('/proc/%d' % before['pid']), 'nothing is left of it')


def test_what_a_failure_left_in_the_export_domain_is_named(wrapper):
    image = '../../export/%s/images/left' % DOMAIN
    wrapper.virt_v2v.play(reach(image), leave(1))
    job = wrapper.start()
    failed(wrapper, job)
    assert ('/export/%s/images/left' % DOMAIN).encode() in job.log('wrapper_log')
