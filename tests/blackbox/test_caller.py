"""The caller: whatever its descriptors, signals and terminal are, the wrapper returns at once.

"At once" means: while virt-v2v, which waits for the test, still runs.
"""
import contextlib
import fcntl
import itertools
import json
import os
import pty
import signal
import socket
import struct
import termios

import pytest

import blackbox
import hidden
import processes
from eventually import eventually
from faults import guardian, tamper
from schemas import read_state
from virt_v2v import reach, wait

pytestmark = pytest.mark.promise(6)

STOPPED = (b'virt-v2v-wrapper: error: standard output: %s\n'
           b'virt-v2v-wrapper: error: standard output: the conversion was stopped\n')
READ_END, WRITE_END = 0, 1


@pytest.fixture
def waiting(wrapper):
    """The wrapper with a virt-v2v that runs until the test says so, or ends."""
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    yield wrapper
    wrapper.virt_v2v.let('end')


def only_state(wrapper):
    """Return the contents of the only state file, or None."""
    names = [name for name in wrapper.files() if name.endswith('.state')]
    if len(names) != 1:
        return None
    return read_state(os.path.join(wrapper.home, names[0]))


def log_texts(wrapper):
    """Return all that is in the logs."""
    texts = []
    for name in wrapper.files():
        if name.endswith('.log'):
            with open(os.path.join(wrapper.home, name), 'rb') as stream:
                texts.append(stream.read())
    return b''.join(texts)


def assert_running(wrapper):
    """Assert that the only job goes on, without an end in its state."""
    state = only_state(wrapper)
    assert state is not None and 'finished' not in state
    wrapper.virt_v2v.wait_for('running')
    assert state['pid'] in wrapper.processes()


def assert_succeeds(wrapper):
    """Let the only job end; assert that it did so well."""
    wrapper.virt_v2v.let('end')
    state = eventually(lambda: 'finished' in only_state(wrapper) and only_state(wrapper),
                       'the state is final')
    assert (state['return_code'], 'failed' in state) == (0, False)
    wrapper.wait_gone()


def assert_stopped(wrapper):
    """Assert that nothing goes on: nobody was told of the job."""
    wrapper.wait_gone()
    state = only_state(wrapper)
    assert state is None or (state['finished'], state['failed']) == (True, True)


# --- descriptors 0 to 2 ------------------------------------------------------------------

def closing(numbers):
    """Return a function for the new process that closes these descriptors."""
    def prepare():
        for number in numbers:
            os.close(number)
    return prepare


@pytest.mark.parametrize('numbers', [
    numbers for count in range(4) for numbers in itertools.combinations(range(3), count)], ids=str)
def test_it_returns_at_once_with_closed_descriptors(waiting, numbers):
    with waiting.request_file() as stdin:
        process = waiting.popen(stdin=stdin, prepare=closing(numbers))
    with process:
        stdout, stderr = process.communicate(timeout=60)
    said = {1: stdout, 2: stderr}
    assert [said[number] for number in numbers if number in said] == [b''] * len(
        [number for number in numbers if number])
    if 0 in numbers:
        assert process.returncode == 2
        assert waiting.processes() == {} and waiting.files() == []
    elif 1 in numbers:
        assert process.returncode == 1
        assert_stopped(waiting)
    else:
        assert (process.returncode, stderr) == (0, b'')
        assert_running(waiting)
        assert_succeeds(waiting)
    # No file of ours may get the number of a closed one, and then what is written to that.
    assert b'error: ' not in log_texts(waiting)
    assert b'"state_file"' not in log_texts(waiting)


HOW = b'give the request on standard input: virt-v2v-wrapper.py < request.json\n'


def test_keys_that_mean_nothing_are_in_answer_and_log(wrapper):
    job = wrapper.start(wrapper.request(vmname='x', rhv_cafile='/x'))
    job.wait_finished()
    assert job.ignored_keys == ['rhv_cafile', 'vmname']
    assert b'WARNING ignored keys of the request: rhv_cafile, vmname\n' in job.log('wrapper_log')


def test_an_answer_without_ignored_keys_does_not_name_any(wrapper):
    job = wrapper.start()
    job.wait_finished()
    assert job.ignored_keys is None


def test_a_closed_stdin_is_named(waiting):
    process = waiting.popen(prepare=closing([0]))
    assert process.communicate(timeout=60) == (
        b'', b'virt-v2v-wrapper: error: request: Bad file descriptor; ' + HOW)


def test_closed_descriptors_are_taken_before_any_file_of_ours(wrapper):
    process = wrapper.popen(prepare=closing([1, 2]))
    try:
        eventually(lambda: [processes.descriptors(process.pid).get(number) for number in (1, 2)]
                   == ['/dev/null'] * 2, 'they are taken')
    finally:
        process.communicate(timeout=60)


@pytest.mark.parametrize('numbers', [(1,), (1, 2)], ids=str)
def test_virt_v2v_has_descriptors_when_the_caller_had_none(wrapper, numbers):
    with wrapper.request_file() as stdin:
        process = wrapper.popen(stdin=stdin, prepare=closing(numbers))
    process.communicate(timeout=60)
    wrapper.wait_gone()
    for run in wrapper.virt_v2v.runs():
        assert run.descriptors[0] == '/dev/null'
        assert run.descriptors[1].startswith('pipe:')
        assert run.descriptors[2] == run.descriptors[1]


def test_a_full_device_as_stdout_stops_the_job(waiting):
    with open('/dev/full', 'wb') as full:
        job = waiting.start(stdout=full)
    assert job.status == 1
    assert job.stderr == STOPPED % b'No space left on device'
    assert_stopped(waiting)


def test_a_full_device_as_stderr_does_not_matter_to_a_job(waiting):
    with open('/dev/full', 'wb') as full:
        job = waiting.start(stderr=full)
    assert job.status == 0
    assert_running(waiting)
    assert_succeeds(waiting)


@pytest.mark.parametrize('request_text, status', [(b'{}', 2), (None, 1)])
def test_a_full_device_as_both_leaves_the_exit_status(waiting, request_text, status):
    with open('/dev/full', 'wb') as full:
        job = waiting.start(request_text, stdout=full, stderr=full)
    assert job.status == status
    assert_stopped(waiting)


@contextlib.contextmanager
def pipe():
    """Yield the two ends of a pipe, which are closed afterwards unless that was done before."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


def fill_up(end):
    """Write to a pipe until nothing more goes in."""
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, bytes(4096))
    os.set_blocking(end, True)


def unread(end):
    """Return the number of bytes that wait in a pipe."""
    return struct.unpack('i', fcntl.ioctl(end, termios.FIONREAD, bytes(4)))[0]


def test_a_pipe_without_reader_as_stdout_stops_the_job(waiting):
    with pipe() as ends:
        os.close(ends[READ_END])
        job = waiting.start(stdout=ends[WRITE_END])
    assert job.status == 1
    assert job.stderr == STOPPED % b'Broken pipe'
    assert_stopped(waiting)


def test_a_pipe_without_reader_as_stderr_leaves_the_exit_status(waiting):
    with pipe() as ends:
        os.close(ends[READ_END])
        job = waiting.start(b'{}', stderr=ends[WRITE_END])
    assert job.status == 2


def test_a_pipe_that_nobody_reads_takes_the_paths(waiting):
    with pipe() as ends:
        job = waiting.start(stdout=ends[WRITE_END])
        assert job.status == 0
        assert_running(waiting)
        paths = json.loads(os.read(ends[READ_END], 65536).decode())
    assert os.path.exists(paths['state_file'])
    assert_succeeds(waiting)


@pytest.mark.parametrize('patience', [0.2, pytest.param(5.0, marks=pytest.mark.long)])
def test_a_full_pipe_that_nobody_reads_stops_the_job(waiting, patience):
    if patience != 5.0:
        tamper(waiting, 'module.PRINT_PATIENCE = %s' % patience)
    with pipe() as ends:
        fill_up(ends[WRITE_END])
        job = waiting.start(stdout=ends[WRITE_END])
    assert job.status == 1
    assert job.stderr == STOPPED % b'Connection timed out'
    assert_stopped(waiting)


def test_a_full_pipe_as_stderr_leaves_the_exit_status(waiting):
    tamper(waiting, 'module.PRINT_PATIENCE = 0.2')
    with pipe() as ends:
        fill_up(ends[WRITE_END])
        job = waiting.start(b'{}', stderr=ends[WRITE_END])
    assert job.status == 2


def test_a_full_pipe_that_is_read_in_time_gets_the_paths(waiting):
    with pipe() as ends, waiting.request_file() as stdin:
        fill_up(ends[WRITE_END])
        process = waiting.popen(stdin=stdin, stdout=ends[WRITE_END])
        os.close(ends[WRITE_END])
        waiting.virt_v2v.wait_for('running')
        with open(ends[READ_END], 'rb', closefd=False) as stream:
            text = stream.read().lstrip(b'\0')
        with process:
            process.communicate(timeout=60)
    assert process.returncode == 0
    assert set(json.loads(text.decode())) == {'wrapper_log', 'v2v_log', 'state_file'}
    assert_running(waiting)
    assert_succeeds(waiting)


def test_a_socket_as_all_three_is_released_at_once(waiting):
    """So it is with some ways to call a program on another host."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = waiting.popen(stdin=theirs, stdout=theirs, stderr=theirs)
        ours.sendall(json.dumps(waiting.request()).encode())
        ours.shutdown(socket.SHUT_WR)
        answer = b''.join(iter(lambda: ours.recv(65536), b''))
        process.communicate(timeout=60)
    assert set(json.loads(answer.decode())) == {'wrapper_log', 'v2v_log', 'state_file'}
    assert_running(waiting)
    assert_succeeds(waiting)


def test_a_stdin_that_does_not_block_is_read_to_its_end(waiting):
    with pipe() as ends:
        os.set_blocking(ends[READ_END], False)
        process = waiting.popen(stdin=ends[READ_END])
        text = json.dumps(waiting.request()).encode()
        os.write(ends[WRITE_END], text[:20])
        eventually(lambda: unread(ends[READ_END]) == 0, 'the first part is read')
        os.write(ends[WRITE_END], text[20:])
        os.close(ends[WRITE_END])
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b'')
    assert_running(waiting)
    assert_succeeds(waiting)


# --- terminals ---------------------------------------------------------------------------

class Terminal:
    """A pseudo-terminal, which hangs up when its master is closed."""

    def __init__(self):
        self.master, self.slave = pty.openpty()

    def hang_up(self):
        """Close the master."""
        if self.master is not None:
            os.close(self.master)
            self.master = None

    def line(self):
        """Return the next line that is printed."""
        line = b''
        while not line.endswith(b'\n'):
            line += os.read(self.master, 1)
        return line

    def control(self):
        """In a new process: have it as controlling terminal, whose end is signalled by SIGHUP."""
        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.hang_up()
    os.close(terminal.slave)


def test_a_terminal_as_stdin_is_refused_at_once(waiting, terminal):
    process = waiting.popen(stdin=terminal.slave)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, b'')
    assert stderr == b'virt-v2v-wrapper: error: request: is a terminal; ' + HOW
    assert waiting.files() == []


def test_a_terminal_that_hung_up_before_stops_the_job(waiting, terminal):
    terminal.hang_up()
    with waiting.request_file() as stdin:
        process = waiting.popen(stdin=stdin, stdout=terminal.slave)
        stderr = process.communicate(timeout=60)[1]
    assert (process.returncode, stderr) == (1, STOPPED % b'Input/output error')
    assert_stopped(waiting)


def hung_up_at_once(wrapper, terminal):
    """Start a job on a terminal that hangs up as soon as the paths are printed; return them."""
    with wrapper.request_file() as stdin:
        process = wrapper.popen(stdin=stdin, stdout=terminal.slave, stderr=terminal.slave,
                                prepare=terminal.control)
    paths = json.loads(terminal.line().decode())
    os.close(terminal.slave)
    terminal.hang_up()
    process.communicate(timeout=60)
    return paths


@pytest.mark.parametrize('count', [5, pytest.param(100, marks=pytest.mark.long)])
def test_a_job_survives_a_terminal_that_hangs_up_at_once(waiting, count):
    paths = []
    for _ in range(count):
        paths.append(hung_up_at_once(waiting, Terminal()))
    eventually(lambda: len(waiting.virt_v2v.runs()) == count, 'all of them run')
    waiting.virt_v2v.let('end')
    assert [ending(path) for path in paths] == [(0, False)] * count
    waiting.wait_gone()


def ending(paths):
    """Wait for the final state; return the status of virt-v2v, and whether it failed."""
    job = blackbox.Job(0, json.dumps(paths).encode(), b'')
    state = job.wait_finished()
    return state['return_code'], 'failed' in state


def test_the_job_has_no_terminal(waiting, terminal):
    with waiting.request_file() as stdin:
        process = waiting.popen(stdin=stdin, stdout=terminal.slave, stderr=terminal.slave,
                                prepare=terminal.control)
    job = blackbox.Job(0, terminal.line(), b'')
    process.communicate(timeout=60)
    waiting.virt_v2v.wait_for('running')
    state = job.state()
    with_terminal = [pid for pid in (guardian(job), state['wrapper_pid'], state['pid'])
                     if controlling_terminal(pid)]
    assert with_terminal == []
    assert_succeeds(waiting)


def controlling_terminal(process):
    """Return the device number of a process's terminal, 0 for none."""
    with open('/proc/%d/stat' % process) as stream:
        return int(stream.read().rpartition(') ')[2].split()[4])


# --- what the caller leaves to its children ----------------------------------------------

LEAKED = (3, 4, 5, 9, 63, 200, 1000)


def job_processes(job):
    """Return the three processes of a job that goes on."""
    state = job.state()
    return guardian(job), state['wrapper_pid'], state['pid']


def test_no_descriptor_of_the_caller_gets_into_the_job(waiting):
    hidden.allow_looking_into(waiting)
    leak = os.path.join(waiting.directory, 'leak')

    def open_more():
        descriptor = os.open(leak, os.O_RDWR | os.O_CREAT, 0o600)
        for number in LEAKED:
            os.dup2(descriptor, number)
    job = waiting.start(prepare=open_more, close_fds=False)
    waiting.virt_v2v.wait_for('running')
    found = [name for process in job_processes(job)
             for name in processes.descriptors(process).values()]
    run = waiting.recorded()
    assert_succeeds(waiting)
    assert os.path.exists(leak)
    assert leak not in found
    assert leak not in run.descriptors.values()


def test_virt_v2v_has_no_descriptor_but_those_it_needs(waiting):
    waiting.start()
    found = waiting.recorded().descriptors
    assert_succeeds(waiting)
    secret = [name for number, name in found.items()
              if name.startswith('/memfd:') or name.startswith('/dev/shm/')]
    pipes = [name for number, name in found.items() if number > 2 and name.startswith('pipe:')]
    assert (len(found), len(secret), len(pipes)) == (5, 1, 1)


def test_the_job_is_not_where_its_caller_was(waiting):
    """So that the file system can be unmounted."""
    hidden.allow_looking_into(waiting)
    job = waiting.start(cwd=waiting.directory)
    directories = {os.readlink('/proc/%d/cwd' % process) for process in job_processes(job)}
    assert_succeeds(waiting)
    assert directories == {'/'}


def ignore_all():
    """Ignore all signals that can be ignored, and block all that can be blocked."""
    for number in range(1, 65):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, 65))


def ignore_ended_children():
    """Have the kernel reap children at once, so that nobody can wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def block_ended_children():
    """Not be told of the end of children."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])


@pytest.mark.parametrize('prepare', [ignore_all, ignore_ended_children, block_ended_children])
def test_virt_v2v_gets_no_signal_ignored_or_blocked(waiting, prepare):
    job = waiting.start(prepare=prepare)
    assert job.status == 0
    waiting.virt_v2v.wait_for('running')
    run = waiting.recorded()
    assert_succeeds(waiting)
    assert (run.signals('SigIgn'), run.signals('SigBlk')) == (set(), set())


def test_a_job_can_be_stopped_whatever_the_caller_ignored(waiting):
    job = waiting.start(prepare=ignore_all)
    waiting.virt_v2v.wait_for('running')
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    assert job.wait_finished()['failed'] is True
    waiting.wait_gone()


@pytest.mark.parametrize('umask', [0, 0o077, 0o777])
def test_virt_v2v_has_an_ordinary_umask(wrapper, umask):
    job = wrapper.start(umask=umask)
    assert job.status == 0
    assert job.wait_finished()['return_code'] == 0
    assert int(wrapper.recorded().status['Umask'], 8) == 0o022


# --- the state is there when the paths are -----------------------------------------------

def announced(wrapper):
    """Start a job; return its state at the moment when the line with the paths has come."""
    with wrapper.begin() as process:
        state = read_state(json.loads(process.stdout.readline().decode())['state_file'])
        process.communicate(timeout=60)
    return state


@pytest.mark.parametrize('count', [30, pytest.param(1000, marks=pytest.mark.long)])
def test_each_announced_state_file_is_there_and_complete(wrapper, count):
    states = [announced(wrapper) for _ in range(count)]
    for state in states:
        assert state['started'] is True
        assert {'pid', 'wrapper_pid', 'disks', 'disk_count', 'started_at'} <= set(state)
    assert {run.pid for run in wrapper.virt_v2v.runs()} <= {state['pid'] for state in states}
    wrapper.wait_gone()
