"""The password: in the descriptor that virt-v2v reads, and nowhere else.

Each test has a password of its own, and looks for it in all processes of this machine, and in all
files that were changed since the test began where a job or any user may write.
"""
import contextlib
import copy
import json
import os
import pickle
import pwd
import re
import signal
import traceback
import uuid

import pytest

import hidden
import loopback_engine
import rooms
import openssh
import sweep
from blackbox import ABSENT
from eventually import eventually
from faults import absent, guardian, strace, tamper, without_interpreter
from hidden import secret_descriptors
from results import error_line
from sweep import begun
from virt_v2v import copying, die, error, ignore, phase, reach, wait
from virt_v2v_wrapper import Request, RequestError, Secret, parse_request

pytestmark = pytest.mark.promise(1)

LAUNCHER, GUARDIAN, MONITOR, CHILD = 'launcher', 'guardian', 'monitor', 'child'


class Needle:
    """A password, and the search for it."""

    def __init__(self, wrapper):
        self.text = 'needle-' + uuid.uuid4().hex
        self._wrapper = wrapper
        self._since = begun()

    def request(self, **overrides):
        """Return a request with this password."""
        return self._wrapper.request(**dict({'vmware_password': self.text}, **overrides))

    def assert_hidden(self, *said):
        """Assert that it is nowhere, and not in what was said (bytes) either."""
        assert self.text.encode() not in b''.join(said)
        assert hidden.places(self.text.encode(), self._wrapper, self._since) == []


@pytest.fixture
def needle(wrapper):
    return Needle(wrapper)


# --- the search itself -------------------------------------------------------------------

def test_the_search_finds_a_password_in_a_process(wrapper, needle):
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start(needle.request(vm_name=needle.text),
                        environment={'LIBGUESTFS_X': needle.text})
    wrapper.virt_v2v.wait_for('running')
    found = hidden.in_processes(needle.text.encode())
    wrapper.virt_v2v.let('end')
    pid = job.wait_finished()['pid']
    assert {'/proc/%d/cmdline' % pid, '/proc/%d/environ' % pid} <= set(found)


def test_the_search_finds_a_password_in_a_file(wrapper, needle):
    path = os.path.join(wrapper.home, needle.text)
    with open(path, 'w') as stream:
        stream.write('x' * (hidden.BLOCK - 3) + needle.text)
    found = hidden.places(needle.text.encode(), wrapper, begun())
    assert found == [path]


# --- during the run ----------------------------------------------------------------------

@pytest.fixture
def running(wrapper, needle):
    """A job whose virt-v2v runs until the test ends."""
    if os.getuid() != 0:
        hidden.allow_looking_into(wrapper)
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1), reach('copying'),
                          wait('end'))
    job = wrapper.start(needle.request())
    wrapper.virt_v2v.wait_for('copying')
    yield job
    wrapper.virt_v2v.let('end')
    job.wait_finished()


def test_the_password_reaches_virt_v2v(wrapper, needle, running):
    assert wrapper.recorded().password == needle.text.encode()


def test_during_the_run_the_password_is_nowhere(needle, running):
    needle.assert_hidden(running.stdout, running.stderr)


def test_no_process_of_ours_keeps_the_password_s_descriptor(running):
    assert secret_descriptors(running.state()['wrapper_pid']) == []
    assert secret_descriptors(guardian(running)) == []
    assert len(secret_descriptors(running.state()['pid'])) == 1


def test_the_file_of_the_password_is_its_owner_s_alone(running):
    number, = secret_descriptors(running.state()['pid'])
    status = os.stat('/proc/%d/fd/%d' % (running.state()['pid'], number))
    assert status.st_nlink == 0
    assert oct(status.st_mode & 0o7777) == '0o400'


def test_nobody_but_root_can_look_into_a_process_of_ours(wrapper, needle):
    """Not even their own user: such files in /proc are root's (proc(5), PR_SET_DUMPABLE)."""
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start(needle.request())
    wrapper.virt_v2v.wait_for('running')
    owners = [os.stat('/proc/%d/mem' % process).st_uid
              for process in (guardian(job), job.state()['wrapper_pid'])]
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert owners == [0, 0]


def core_limits(text):
    """Return the limits of the size of core dumps in /proc/PID/limits."""
    return re.search(r'^Max core file size +(\S+) +(\S+)', text, re.MULTILINE).groups()


def test_no_process_of_a_job_can_leave_a_core_dump(wrapper, running):
    state = running.state()
    limits = [core_limits(wrapper.recorded().limits)]
    for process in (guardian(running), state['wrapper_pid'], state['pid']):
        with open('/proc/%d/limits' % process) as stream:
            limits.append(core_limits(stream.read()))
    # No file can hold anything in 1 byte, and a program at the end of a pipe gets nothing.
    assert {limit for pair in limits for limit in pair} <= {'0', '1'}


def test_core_dumps_are_off_before_the_request_is_read(wrapper, needle):
    process = wrapper.popen()
    with process:
        process.stdin.write(b'{')
        process.stdin.flush()

        def reading():
            with open('/proc/%d/limits' % process.pid) as stream:
                limits = core_limits(stream.read())
            with open('/proc/%d/wchan' % process.pid) as stream:
                where = stream.read()
            return 'pipe' in where and limits
        try:
            limits = eventually(reading, 'the wrapper reads')
        finally:
            process.communicate()
    assert set(limits) <= {'0', '1'}


def test_the_password_is_written_to_its_descriptor_only(wrapper, needle):
    """Whatever the file: no file system is looked at, but each system call that writes."""
    hidden.allow_looking_into(wrapper)
    log = os.path.join(wrapper.home, 'writes.log')
    calls = 'write,pwrite64,writev,pwritev,?pwritev2,sendto,sendmsg,?vmsplice,?mkdir,?mkdirat'
    prefix = [strace(), '-f', '-qq', '-y', '-s', '100000', '-o', log,
              '-e', 'trace=' + calls + ',openat,execve']
    command = wrapper.command
    wrapper.command = lambda *arguments: prefix + command(*arguments)
    job = wrapper.start(needle.request())
    job.wait_finished()
    wrapper.wait_gone()
    with open(log, encoding='utf-8', errors='replace') as stream:
        lines = [line for line in stream if needle.text in line]
    os.unlink(log)
    written = [line for line in lines if '/stand-in/runs/' not in line]
    assert len(written) == 1
    assert re.match(r'[0-9]+ +write\([0-9]+<(/memfd:|/dev/shm/)', written[0])


# --- each kind of secret -----------------------------------------------------------------

@contextlib.contextmanager
def in_a_file(wrapper, needle):
    path = os.path.join(wrapper.home, 'password')
    with open(path, 'w') as stream:
        stream.write(needle.text + '\n')
    os.chmod(path, 0o600)
    os.chown(path, wrapper.caller.pw_uid, wrapper.caller.pw_gid)
    yield {'request': wrapper.request(vmware_password=ABSENT, vmware_password_file=path)}
    os.unlink(path)


@pytest.mark.parametrize('owner, status', [('root', 1), ('nobody', 0)])
def test_sudo_gives_nobody_a_line_of_a_file_of_root_s(root_wrapper, owner, status):
    """Which would go to any server that the request names."""
    path, user = os.path.join(root_wrapper.directory, 'password'), pwd.getpwnam(owner)
    with open(path, 'w') as stream:
        stream.write('secret\n')
    os.chmod(path, 0o400)
    os.chown(path, user.pw_uid, user.pw_gid)
    job = root_wrapper.start(
        root_wrapper.request(vmware_password=ABSENT, vmware_password_file=path),
        environment={'SUDO_UID': str(pwd.getpwnam('nobody').pw_uid)})
    assert (job.status, job.stderr) == (status, status * error_line(
        'vmware_password_file: expected a file, no link, that belongs to who starts it'))
    if status == 0:
        assert root_wrapper.recorded().password == b'secret'
        job.wait_finished()


@contextlib.contextmanager
def for_an_engine(wrapper, needle):
    with loopback_engine.provide(wrapper, needle.text) as engine:
        yield {'request': wrapper.request(**engine.keys)}


@contextlib.contextmanager
def for_a_disk(wrapper, needle):
    yield {'request': wrapper.request(luks_keys=[{'device': '/dev/sda2', 'key': needle.text}])}


@contextlib.contextmanager
def for_ssh(wrapper, needle):
    prepare = openssh.provide(wrapper)
    key, _ = openssh.make_key()
    needle.text = key.splitlines()[2]
    yield {'request': wrapper.request(ssh_key=key, **openssh.GUEST), 'prepare': prepare}


# How a secret comes to the wrapper, and where virt-v2v finds it; test_ssh.py asks the agent.
KINDS = [(in_a_file, '-ip'), (for_an_engine, '-op'), (for_a_disk, '/dev/sda2'), (for_ssh, None)]


@pytest.mark.parametrize('kind, place', KINDS)
def test_each_secret_reaches_virt_v2v_and_is_nowhere(wrapper, needle, kind, place):
    wrapper.virt_v2v.play(phase('Opening the source'), reach('running'), wait('end'))
    with kind(wrapper, needle) as start:
        job = wrapper.start(**start)
    assert (job.status, job.stderr) == (0, b'')
    wrapper.virt_v2v.wait_for('running')
    assert wrapper.recorded().secrets.get(place) == (place and needle.text.encode())
    needle.assert_hidden(job.stdout)
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    wrapper.wait_gone()
    needle.assert_hidden(job.stdout)


@pytest.mark.parametrize('kind', [kind for kind, _ in KINDS])
def test_after_a_start_that_fails_each_secret_is_nowhere(wrapper, needle, kind):
    wrapper.use('RHEL 10')
    with kind(wrapper, needle) as start:
        job = wrapper.start(**start)
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (1, b'')
    needle.assert_hidden(job.stderr)


@pytest.mark.parametrize('overrides', [
    {'rhv_password': '%s '}, {'luks_keys': [{'device': 'all', 'key': '%s\n'}]},
    {'transport_method': 'ssh', 'ssh_key': '%s'}, {'vmware_password_file': '%s'},
    {'%s': 'x', 'vm_name': ''}], ids=['engine', 'disk', 'ssh', 'file', 'key'])
def test_a_refused_request_shows_no_secret(wrapper, needle, overrides):
    text = json.dumps(wrapper.request(**dict(
        {'export_domain': ABSENT}, **overrides))).replace('%s', needle.text)
    job = wrapper.start(text.encode())
    assert (job.status, job.stdout) == (2, b'')
    needle.assert_hidden(job.stderr)


# --- after each ending -------------------------------------------------------------------

def test_after_success_the_password_is_nowhere(wrapper, needle):
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1))
    job = wrapper.start(needle.request())
    state = job.wait_finished()
    wrapper.wait_gone()
    assert 'failed' not in state
    needle.assert_hidden(job.stdout, job.stderr)


@pytest.mark.parametrize('step', [error('cannot log in'), die(signal.SIGKILL), die(signal.SIGSEGV)],
                         ids=['error', 'killed', 'crashed'])
def test_after_a_conversion_that_fails_the_password_is_nowhere(wrapper, needle, step):
    wrapper.virt_v2v.play(phase('Opening the source'), *step if isinstance(step, list) else [step])
    job = wrapper.start(needle.request())
    state = job.wait_finished()
    wrapper.wait_gone()
    assert state['failed'] is True
    needle.assert_hidden(job.stdout, job.stderr)


def unsuitable(wrapper):
    wrapper.use('RHEL 10')


def without_export_domain(wrapper):
    os.rename(wrapper.export_domain, wrapper.export_domain + '.gone')


def without_places(wrapper):
    for path in (wrapper.log_dir, wrapper.state_dir):
        with open(path, 'w'):
            pass


@pytest.mark.parametrize('spoil', [unsuitable, without_interpreter, absent, without_export_domain,
                                   without_places])
def test_after_a_start_that_fails_the_password_is_nowhere(wrapper, needle, spoil):
    spoil(wrapper)
    job = wrapper.start(needle.request())
    wrapper.wait_gone()
    assert (job.status, job.stdout) == (1, b'')
    needle.assert_hidden(job.stderr)


def test_if_nobody_takes_the_paths_the_password_is_nowhere(wrapper, needle):
    wrapper.virt_v2v.play(wait('never'))
    with open('/dev/full', 'w') as full:
        job = wrapper.start(needle.request(), stdout=full)
    wrapper.wait_gone()
    assert job.status == 1
    needle.assert_hidden(job.stderr)


@pytest.mark.parametrize('overrides', [
    {'vm_name': ''}, {'vmware_uri': 'esx://root:%s@esx.example.com'}, {'output_format': '%s'},
    {'vmware_password': '%s\n'}, {'vmware_password': ['%s']}, {'vmware_password': '%s\0'}],
    ids=['other', 'uri', 'format', 'line-end', 'list', 'nul'])
def test_a_request_that_is_refused_shows_no_password(wrapper, needle, overrides):
    text = json.dumps(needle.request(**overrides)).replace('%s', needle.text)
    job = wrapper.start(text.encode())
    assert (job.status, job.stdout) == (2, b'')
    needle.assert_hidden(job.stderr)


@pytest.mark.parametrize('text', ['{"vmware_password": "%s', '{"vmware_password": %s}',
                                  '{"vmware_password": "%s", "vmware_password": "%s"}', '"%s"',
                                  '{"vmware_password": "%s"} %s', '{"%s": 1, "%s": 2}'])
def test_a_text_that_is_no_request_shows_no_password(wrapper, needle, text):
    job = wrapper.start(text.replace('%s', needle.text).encode())
    assert (job.status, job.stdout) == (2, b'')
    needle.assert_hidden(job.stderr)


# --- killed at any moment ----------------------------------------------------------------

@pytest.mark.parametrize('roles', [(MONITOR,), (GUARDIAN,), (GUARDIAN, MONITOR),
                                   (GUARDIAN, MONITOR, CHILD), (CHILD,)])
def test_after_a_kill_of_a_process_the_password_is_nowhere(wrapper, needle, roles):
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start(needle.request())
    wrapper.virt_v2v.wait_for('running')
    state = job.state()
    pids = {GUARDIAN: guardian(job), MONITOR: state['wrapper_pid'], CHILD: state['pid']}
    for role in roles:
        os.kill(pids[role], signal.SIGKILL)
    needle.assert_hidden()
    wrapper.virt_v2v.let('end')
    wrapper.wait_gone()
    needle.assert_hidden(job.stdout, job.stderr)


def test_after_a_kill_by_the_wrapper_the_password_is_nowhere(wrapper, needle):
    tamper(wrapper, 'module.STOP_GRACE = 0.1')
    wrapper.virt_v2v.play(ignore(signal.SIGTERM), reach('running'), wait('never'))
    job = wrapper.start(needle.request())
    wrapper.virt_v2v.wait_for('running')
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    assert job.wait_finished()['return_code'] == -signal.SIGKILL
    wrapper.wait_gone()
    needle.assert_hidden(job.stdout, job.stderr)


# One moment for each thing that a process does with a password near.
@pytest.mark.parametrize('role, call, number', [
    (LAUNCHER, 'read', 1), (LAUNCHER, 'clone', 1), (LAUNCHER, 'poll', 1),
    (GUARDIAN, 'setsid', 1), (GUARDIAN, 'mkdir', 1),
    (GUARDIAN, 'wait4', 1), (GUARDIAN, 'fchmod', 1), (GUARDIAN, 'clone', 1),
    (GUARDIAN, 'waitid', 1), (MONITOR, 'fsync', 1),
    (MONITOR, 'waitid', 1), (MONITOR, 'rmdir', 1), (CHILD, 'setsid', 1), (CHILD, 'execve', 1)])
def test_after_a_kill_at_a_system_call_the_password_is_nowhere(wrapper, needle, role, call, number):
    request = json.dumps(needle.request()).encode()
    hit, said = sweep.killed_at(wrapper, request, role, call, number)
    assert hit, 'the %s has no call of that name' % role
    needle.assert_hidden(said)


SWEPT = ('read openat close write mkdir unlink unlinkat rename renameat link linkat flock fsync'
         ' newfstatat fchmod memfd_create fcntl pipe2 clone clone3 fork vfork execve setsid chdir'
         ' dup2 dup3 kill wait4 waitid prctl poll getdents64 rmdir rt_sigprocmask rt_sigaction'
         ' rt_sigtimedwait').split()


@pytest.mark.long
@pytest.mark.parametrize('call', SWEPT)
@pytest.mark.parametrize('role', [LAUNCHER, GUARDIAN, MONITOR, CHILD])
def test_after_a_kill_at_any_system_call_the_password_is_nowhere(wrapper, needle, role, call):
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1))
    request = json.dumps(needle.request()).encode()
    sweep.sweep(wrapper, needle.assert_hidden, request, role, call)


@pytest.mark.long
def test_the_sweep_meets_calls_of_each_process(wrapper, needle):
    request = json.dumps(needle.request()).encode()
    for role in (LAUNCHER, GUARDIAN, MONITOR):
        assert sweep.sweep(wrapper, needle.assert_hidden, request, role, 'close') >= 3


@pytest.mark.long
def test_after_a_run_the_password_is_in_no_file_system(wrapper, needle):
    since = begun()
    job = wrapper.start(needle.request())
    job.wait_finished()
    wrapper.wait_gone()
    skip = {'/proc', '/sys', '/dev/pts', '/dev/mqueue'}
    found = []
    for top in os.listdir('/'):
        if '/' + top not in skip:
            found += hidden.in_files(needle.text.encode(), '/' + top, since)
    assert [path for path in found if '/stand-in/runs/' not in path] == []


# --- messages, exceptions, representations ----------------------------------------------

def leaks(function, *arguments):
    """Return the text that a function returns, or that of the exception it raises."""
    try:
        return str(function(*arguments))
    except Exception:
        return traceback.format_exc()


@pytest.mark.parametrize('show', [
    str, repr, ascii, format, '{0}'.format, '{0!r}'.format, '%s'.__mod__, '%r'.__mod__,
    pickle.dumps, copy.copy, copy.deepcopy, json.dumps, list, len, hash, vars, dir, int, bytes,
    '{0.text}'.format, ''.join, 'x'.__add__], ids=lambda show: getattr(show, '__name__', None))
def test_nothing_but_its_descriptor_shows_a_secret(show):
    assert 'needle-1' not in leaks(show, Secret('needle-1'))


def contents(secret):
    """Return the bytes in the file of a secret."""
    secret.store()
    with open(secret.path, 'rb') as stream:
        data = stream.read()
    secret.close()
    return data


def test_the_descriptor_has_the_bytes_of_the_secret():
    assert contents(Secret('needle-\u00e9')) == b'needle-\xc3\xa9'


@pytest.mark.parametrize('show', [str, repr, format, pickle.dumps, json.dumps, copy.deepcopy,
                                  '{0[4]}'.format, tuple, Request._asdict])
def test_a_request_shows_no_password(wrapper, show):
    data = json.dumps(wrapper.request(vmware_password='needle-1')).encode()
    request = parse_request(data)
    assert 'needle-1' not in leaks(show, request)
    assert contents(request.vmware_password) == b'needle-1'


def test_the_error_of_a_request_shows_no_password():
    wrong = json.dumps({'vmware_password': 'needle-1\n', 'vm_name': 1})
    with pytest.raises(RequestError) as caught:
        parse_request(wrong.encode())
    error = caught.value
    assert 'needle-1' not in str(error) + repr(error) + repr(error.problems)
    assert 'needle-1' not in ''.join(traceback.format_exception(
        type(error), error, error.__traceback__))


# --- mistakes of ours --------------------------------------------------------------------

# A function that fails with its arguments and with the password in what it says. The password is
# taken from the request, because the lines of a program are shown by a traceback.
MISTAKE = """\
seen = []


def remember(self, text, init=module.Secret.__init__):
    seen.append(text)
    init(self, text)


def mistake(*arguments, **keywords):
    raise {kind}('%r %r %r' % (arguments, keywords, seen))


module.Secret.__init__ = remember
module.FINAL_WRITE_PATIENCE = 0.1       # or an OSError may be taken for a full disk for an hour
module.{name} = mistake
"""
BOUNDARY = [rooms.boundary(name) for name in rooms.rooms() if rooms.boundary(name)]
FEW = {name for names in BOUNDARY for name in (names[0], names[-1])}
# All but what catches mistakes. What main prints them with cannot be caught by it.
BREAKABLE = [name for name in rooms.functions(*rooms.rooms()) if name not in ('main', 'print_line')]


@pytest.mark.parametrize('kind', ['RuntimeError', pytest.param('OSError', marks=pytest.mark.long)])
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in BREAKABLE])
def test_a_mistake_of_ours_shows_no_password(wrapper, needle, name, kind):
    tamper(wrapper, MISTAKE.format(name=name, kind=kind))
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1))
    job = wrapper.start(needle.request())
    wrapper.wait_gone()
    assert b'Traceback' not in job.stderr
    needle.assert_hidden(job.stdout, job.stderr)


def test_a_mistake_of_ours_is_one_line_without_its_text(wrapper, needle):
    tamper(wrapper, MISTAKE.format(name='prepare', kind='RuntimeError'))
    job = wrapper.start(needle.request())
    assert job.status == 1
    assert re.fullmatch(
        rb'virt-v2v-wrapper: error: internal error: RuntimeError in guard line [0-9]+\n',
        job.stderr)
