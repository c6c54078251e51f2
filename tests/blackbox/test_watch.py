"""--watch, as it looks on a real terminal (pyte), and where there is none."""
import fcntl
import os
import pty
import select
import signal
import struct
import termios

import pyte
import pytest

from blackbox import ordinary_user
from commands import PaperJob, command
from eventually import eventually
from faults import tamper

FULL, EMPTY = '\u2588', '\u2591'


class Terminal:
    """A terminal with a command on it."""

    def __init__(self, columns=80, lines=24):
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._master, self._slave = pty.openpty()
        self.resize(columns, lines)
        self.frames = 0

    def run(self, wrapper, *words, **environment):
        """Run a command of the wrapper in it; its locale is UTF-8 unless said otherwise."""
        environment = dict({'TERM': 'xterm', 'LC_ALL': 'C.UTF-8'}, **environment)
        self._process = wrapper.popen(
            *(wrapper.arguments + list(words)), environment=environment, prepare=self._control,
            stdin=self._slave, stdout=self._slave, stderr=self._slave)

    def _control(self):
        os.setsid()
        fcntl.ioctl(self._slave, termios.TIOCSCTTY, 0)

    def resize(self, columns, lines):
        """Change the size of its window."""
        size = struct.pack('4H', lines, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
        self.screen.resize(lines, columns)

    def wrap(self, count):
        """Have so many lines more, as a terminal does that wraps lines when it becomes narrow."""
        self._stream.feed(b'wrapped\r\n' * count)

    def press(self, data):
        """Press keys."""
        os.write(self._master, data)

    def read(self):
        """Take in what was printed; return the lines that are not empty, from the top."""
        while select.select([self._master], [], [], 0)[0]:
            data = os.read(self._master, 1 << 16)
            self.frames += data.count(b'\x1b[J')
            self._stream.feed(data)
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def shows(self, condition, what):
        """Wait until condition(lines) is true; return the lines."""
        def met():
            lines = self.read()
            return lines and condition(lines) and lines
        try:
            return eventually(met, what)
        except AssertionError as error:
            raise AssertionError('%s\n%s' % (error, '\n'.join(self.read()))) from None

    def wait(self):
        """Wait for the end of the command; return its status."""
        eventually(lambda: self.read() and False or self._process.poll() is not None, 'it ends')
        self.read()
        return self._process.returncode

    def all_lines(self):
        """Return all lines, those that have left the top of the screen too."""
        width = self.screen.columns
        history = [''.join(line[column].data for column in range(width)).rstrip()
                   for line in self.screen.history.top]
        return [line for line in history if line] + self.read()

    def close(self):
        """Leave nothing of it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.close()


def jobs_of(wrapper, count):
    """Return so many jobs that copy."""
    jobs = [PaperJob(wrapper, number) for number in range(1, count + 1)]
    for number, job in enumerate(jobs):
        job.copy(number)
    return jobs


# --- on a screen -------------------------------------------------------------------------

@pytest.mark.parametrize('columns, length', [(80, 8), (200, 30)])
def test_one_job_is_one_line_with_a_bar(wrapper, terminal, columns, length):
    job, = jobs_of(wrapper, 1)
    job.copy(50)
    terminal.resize(columns, 24)
    terminal.run(wrapper, '--watch', job.path)
    lines = terminal.shows(lambda lines: '%' in lines[0], 'the job')
    done = length // 2
    assert len(lines) == 1
    assert lines[0].split() == [
        'guest1', FULL * done + EMPTY * (length - done), '50%', 'Copying', 'disk', '1/1']


@pytest.mark.parametrize('columns', [20, 40, 80, 200])
def test_no_line_is_wider_than_the_window(wrapper, terminal, columns):
    terminal.resize(columns, 24)
    job = PaperJob(wrapper, 1, vm_name='\u4e2d' * 100, phase='p' * 500)
    terminal.run(wrapper, '--watch', job.path)
    terminal.shows(lambda lines: '%' in lines[0] or columns == 20, 'the job')
    frames = terminal.frames
    terminal.shows(lambda _: terminal.frames > frames + 1, 'it is drawn again')
    assert len(terminal.read()) == 1
    assert not terminal.screen.history.top


def test_progress_is_redrawn_in_place(wrapper, terminal):
    jobs = jobs_of(wrapper, 3)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: len(lines) == 3, 'three jobs')
    jobs[1].copy(77)
    lines = terminal.shows(lambda lines: '77%' in lines[1], 'the progress')
    assert [line.split()[0] for line in lines] == ['guest1', 'guest2', 'guest3']
    assert '77%' not in lines[0] + lines[2]


def test_rate_and_time_left_follow_from_the_progress(wrapper, terminal):
    job, = jobs_of(wrapper, 1)
    job.copy(0)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    job.copy(10)
    lines = terminal.shows(lambda lines: '10%' in lines[0] and 'left' in lines[0], 'time left')
    assert '%/min' in lines[0]


def test_what_comes_before_the_copies_tells_no_rate(wrapper, terminal):
    job, = jobs_of(wrapper, 1)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    job.update(disks=[{'path': '[ds] a', 'progress': 10}], disk_count=1, phase='Copying soon')
    lines = terminal.shows(lambda lines: '10%' in lines[0], 'the progress')
    assert '%/min' not in lines[0]


def test_the_rate_is_in_bytes_where_sizes_are_known(wrapper, terminal):
    job, = jobs_of(wrapper, 1)
    job.copy(0, bytes=1 << 30)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    job.copy(10, bytes=1 << 30)
    terminal.shows(lambda lines: 'MiB/s' in lines[0] and 'left' in lines[0], 'the rate')


def test_of_thirty_jobs_those_that_run_come_first(wrapper, terminal):
    jobs = jobs_of(wrapper, 30)
    terminal.resize(80, 11)
    terminal.run(wrapper, '--watch', *[job.path for job in jobs])
    lines = terminal.shows(lambda lines: len(lines) == 10, 'ten lines')
    assert lines[-1] == 'and 21 more'
    assert [line.split()[0] for line in lines[:-1]] == ['guest%d' % n for n in range(1, 10)]
    for job in jobs[:5]:
        job.end()
    lines = terminal.shows(lambda lines: lines[0].startswith('guest6 '), 'the running ones first')
    assert len(lines) == 10
    assert not terminal.screen.history.top


def test_at_the_end_all_thirty_jobs_are_shown(wrapper, terminal):
    jobs = jobs_of(wrapper, 30)
    terminal.resize(80, 11)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: len(lines) == 10, 'ten lines')
    for job in jobs:
        job.end()
    assert terminal.wait() == 0
    shown = [line.split()[0] for line in terminal.all_lines()]
    assert sorted(shown) == sorted(job.guest for job in jobs)


@pytest.mark.parametrize('columns, lines', [(50, 24), (120, 24), (80, 6), (80, 40), (40, 8)])
def test_a_resize_leaves_each_job_on_one_line(wrapper, terminal, columns, lines):
    jobs_ = jobs_of(wrapper, 4)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda shown: len(shown) == 4, 'four jobs')
    terminal.resize(columns, lines)
    jobs_[3].copy(88)
    shown = terminal.shows(lambda shown: '88%' in shown[-1], 'it is drawn again')
    assert [line.split()[0] for line in shown] == [job.guest for job in jobs_]


def test_a_resize_that_wraps_lines_leaves_nothing_of_them(wrapper, terminal):
    jobs = jobs_of(wrapper, 4)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda shown: len(shown) == 4, 'four jobs')
    terminal.resize(40, 24)
    terminal.wrap(4)
    jobs[3].copy(88)
    shown = terminal.shows(lambda shown: '88%' in shown[-1], 'it is drawn again')
    assert [line.split()[0] for line in shown] == [job.guest for job in jobs]


def test_without_utf8_all_is_ascii(wrapper, terminal):
    job = PaperJob(wrapper, 1, vm_name='\u4e2d\u6587')
    job.copy(50)
    terminal.run(wrapper, '--watch', LC_ALL='C')
    lines = terminal.shows(lambda lines: '50%' in lines[0], 'the job')
    assert lines[0].split()[:3] == ['??', '#####-----', '50%']


def test_a_hostile_name_sends_nothing_to_the_terminal(wrapper, terminal):
    job = PaperJob(wrapper, 1, vm_name='a\x1b[2J\x1b]0;x\x07\nb\x9b', phase='\x1b[5A')
    terminal.run(wrapper, '--watch', job.path)
    lines = terminal.shows(lambda lines: '%' in lines[0], 'the job')
    assert len(lines) == 1
    assert lines[0].startswith('a?[2J?]0;x??b?')
    assert terminal.screen.title == ''


def test_it_says_why_a_job_failed(wrapper, terminal):
    job, = jobs_of(wrapper, 1)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    job.end(failed=True, last_message={'type': 'error', 'message': 'No space left'})
    assert terminal.wait() == 3
    assert terminal.read()[0].endswith('failed: No space left')


def test_ctrl_c_ends_it_quietly_and_the_job_goes_on(wrapper, terminal):
    job = wrapper.start_waiting()
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '%' in lines[0], 'the job')
    terminal.press(b'\x03')
    assert terminal.wait() in (-signal.SIGINT, 130)
    assert job.is_alive()
    assert [line for line in terminal.read()[1:] if line != '^C'] == []
    wrapper.virt_v2v.let('end')
    assert job.wait_finished()['return_code'] == 0


def test_with_nothing_to_watch_it_says_so(wrapper, terminal):
    terminal.run(wrapper, '--watch')
    assert terminal.wait() == 0
    assert terminal.read() == ['no job is running']


# --- the end -----------------------------------------------------------------------------

CONVERTED, FAILED = {}, {'failed': True}
CANCELLED = {'failed': True, 'cancelled': True}


@pytest.mark.parametrize('endings, status', [
    ([CONVERTED], 0), ([CONVERTED, FAILED], 3), ([CONVERTED, CANCELLED], 4),
    ([CANCELLED, FAILED, CONVERTED], 3)])
def test_the_status_is_that_of_all_jobs(wrapper, endings, status):
    jobs = jobs_of(wrapper, len(endings))
    for job, ending in zip(jobs, endings):
        job.end(**ending)
    assert command(wrapper, '--watch', *[job.path for job in jobs])[0] == status


@pytest.mark.parametrize('spoil', [lambda path: None, os.unlink, lambda path: open(path, 'w')])
def test_a_job_whose_lock_is_free_has_failed(wrapper, terminal, spoil):
    job, = jobs_of(wrapper, 1)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    spoil(job.path)
    job.die()
    assert terminal.wait() == 3
    assert terminal.read()[0].endswith('failed')


def test_without_a_path_only_jobs_that_run_are_watched(wrapper, terminal):
    running, failed = jobs_of(wrapper, 2)
    failed.end(failed=True)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    running.end()
    assert terminal.wait() == 0


# The first look finds out that it is a job.
SECOND_LOOK = '''\
looks = []


def is_locked(path, real=module.is_locked):
    looks.append(path)
    while len(looks) == 2 and not os.path.exists('{home}/ended'):
        open('{home}/asked', 'w').close()
        module.time.sleep(0.01)
    return real(path)


module.is_locked = is_locked
'''


def test_a_job_that_ends_while_it_is_looked_at_has_not_failed(wrapper, terminal):
    tamper(wrapper, SECOND_LOOK.format(home=wrapper.home))
    asked, ended = (os.path.join(wrapper.home, name) for name in ('asked', 'ended'))
    job, = jobs_of(wrapper, 1)
    terminal.run(wrapper, '--watch', job.path)
    eventually(lambda: os.path.exists(asked), 'it looks')
    job.end()
    open(ended, 'w').close()
    assert terminal.wait() == 0


def test_a_state_that_is_gone_for_a_moment_is_no_end(wrapper, terminal):
    job, = jobs_of(wrapper, 1)
    terminal.run(wrapper, '--watch')
    terminal.shows(lambda lines: '0%' in lines[0], 'the job')
    os.unlink(job.path)
    frames = terminal.frames
    terminal.shows(lambda _: terminal.frames > frames + 1, 'it is drawn again')
    job.copy(60)
    terminal.shows(lambda lines: '60%' in lines[0], 'it goes on')


def test_a_path_that_is_no_job_is_an_error(wrapper):
    path = os.path.join(wrapper.home, 'nothing.state')
    assert command(wrapper, '--watch', path) == (
        1, '', 'virt-v2v-wrapper: error: %s: is not the state file of a job\n' % path)


# --- without a terminal ------------------------------------------------------------------

def test_without_a_terminal_each_change_is_a_line(wrapper):
    still, job = jobs_of(wrapper, 2)
    with wrapper.popen(*(wrapper.arguments + ['--watch'])) as process:
        said = [process.stdout.readline(), process.stdout.readline()]
        for percent in (33, 66):
            still.copy(percent / 100)       # nothing that could be seen
            job.copy(percent)
            said.append(process.stdout.readline())
        job.end()
        said.append(process.stdout.readline())
        still.end()
        said += process.stdout.readlines()
    assert process.returncode == 0
    assert said == [b'guest1: 0% Copying disk 1/1\n', b'guest2: 1% Copying disk 1/1\n',
                    b'guest2: 33% Copying disk 1/1\n', b'guest2: 66% Copying disk 1/1\n',
                    b'guest2: 100% converted\n', b'guest1: 100% converted\n']


def test_a_terminal_that_cannot_redraw_gets_lines(wrapper, terminal):
    job, = jobs_of(wrapper, 1)
    terminal.run(wrapper, '--watch', TERM='dumb')
    terminal.shows(lambda lines: lines == ['guest1: 0% Copying disk 1/1'], 'a line')
    job.end()
    assert terminal.wait() == 0
    assert terminal.frames == 0


def test_anybody_may_watch_a_job_by_its_path(root_wrapper):
    job, = jobs_of(root_wrapper, 1)
    job.end()
    root_wrapper.caller = ordinary_user()
    assert command(root_wrapper, '--watch', job.path) == (0, 'guest1: 100% converted\n', '')
