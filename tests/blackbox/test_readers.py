"""What readers of the state file see: complete JSON, whatever happens to the writer."""
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

import processes
from eventually import eventually
from faults import Disk, FailingCall, ReadOnlyDisk, disk, strace, tamper, traced
from script import SCRIPT, loading
from virt_v2v import DISKS, bar, copying, phase, reach, repeat, source, wait
from virt_v2v_wrapper import Directory, StateFile

pytestmark = pytest.mark.promise(2)


# Reads a file as fast as it can until it is finished. Prints how many different ones it saw.
READER = """\
import json
import sys

print('reading', flush=True)
seen = set()
while True:
    with open(sys.argv[1], 'rb') as stream:
        data = stream.read()
    assert data.endswith(b'\\n'), data
    document = json.loads(data.decode('utf-8'))
    assert {'started', 'pid', 'disks', 'disk_count'} <= set(document), document
    assert len(document['disks']) == document['disk_count'], document
    seen.add(data)
    if 'finished' in document:
        break
print(len(seen))
"""


@contextlib.contextmanager
def reader(path):
    """Have a process read the state file; it has to end well, and to have seen changes."""
    process = subprocess.Popen([sys.executable, '-I', '-S', '-c', READER, path],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b'reading\n'
        yield
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, stderr) == (0, b'')
    assert int(stdout) > 20, 'it saw hardly anything'


@contextlib.contextmanager
def two_readers(path):
    """Have two processes read the state file at once."""
    with reader(path), reader(path):
        yield


@pytest.fixture
def state_directory():
    """A directory in memory, as the state is on a host."""
    with tempfile.TemporaryDirectory(dir='/dev/shm') as path:
        yield path


def document(number):
    """Return a state that is longer or shorter than that with another number."""
    disks = [{'path': 'disk %d' % n, 'progress': number} for n in range(number % 100)]
    return {'started': True, 'pid': number, 'disks': disks, 'disk_count': len(disks)}


def test_readers_of_thousands_of_writes_see_complete_json(state_directory):
    directory = os.open(state_directory, os.O_RDONLY)
    try:
        state = StateFile(Directory(state_directory, directory), 'stem')
        state.write(document(0), durable=False)
        with two_readers(state.path):
            for number in range(3000):
                state.write(document(number), durable=number % 2 == 0)
            state.write(dict(document(0), finished=True), durable=True)
    finally:
        os.close(directory)


def test_readers_of_a_conversion_see_complete_json(wrapper):
    tamper(wrapper, 'module.CHUNK = 64     # so that each message is read, and published, alone')
    wrapper.virt_v2v.play(wait('go'), [phase('Step %d' % n) for n in range(500)], phase('Over'),
                          wait('end'))
    job = wrapper.start()
    with two_readers(job.paths.state_file):
        wrapper.virt_v2v.let('go')
        job.wait_state(lambda state: state.get('phase') == 'Over', 'all was read')
        wrapper.virt_v2v.let('end')
        job.wait_finished()


# --- killed while writing ----------------------------------------------------------------

# What memory is asked for by chance; a kill there is one between two of the other calls.
MEMORY = ('mmap', 'munmap', 'mremap', 'madvise', 'brk')
WRITER = loading(SCRIPT) + """
import os

directory = module.Directory(sys.argv[1], os.open(sys.argv[1], os.O_RDONLY))
state = module.StateFile(directory, 'stem')
state.write({'text': 'old'}, durable=True)
os.getppid()
state.write({'text': 'new'}, durable=True)
os.getppid()
"""


class Writer:
    """A program that writes an old state and a new one, under strace."""

    def __init__(self, directory):
        self._state = os.path.join(directory, 'stem.state')
        self._program = [sys.executable, '-I', '-c', WRITER, directory]
        self._strace = [strace(), '-o', '/dev/stdout']

    def run(self, *options):
        """Write both with options of strace; return strace's log."""
        if os.path.exists(self._state):
            os.unlink(self._state)
        command = self._strace + list(options) + self._program
        return subprocess.run(command, stdout=subprocess.PIPE).stdout.decode('utf-8', 'replace')

    def calls(self):
        """Return the system calls of the second write: (name, how many of that came by then)."""
        names = re.findall(r'^(\w+)\(', self.run(), re.MULTILINE)
        first = names.index('getppid')
        last = names.index('getppid', first + 1)
        return [(names[n], names[:n + 1].count(names[n])) for n in range(first, last + 1)
                if names[n] not in MEMORY]

    def text(self):
        """Return what a reader sees."""
        with open(self._state, encoding='utf-8') as stream:
            return json.load(stream)['text']


def test_a_writer_killed_at_any_call_leaves_the_old_or_the_new(state_directory):
    writer = Writer(state_directory)
    calls = writer.calls()
    seen = []
    for name, count in calls:
        log = writer.run('-e', 'trace=' + name, '-e',
                         'inject=%s:signal=KILL:when=%d' % (name, count))
        assert '+++ killed by SIGKILL +++' in log, name
        seen.append(writer.text())
    # In this order, too: what was new never becomes old again.
    changed = seen.index('new')
    assert seen == ['old'] * changed + ['new'] * (len(calls) - changed)
    assert 'fsync' in [name for name, _ in calls[:changed]]


def test_what_a_killed_writer_left_goes_with_the_last_write(wrapper):
    wrapper.virt_v2v.play(wait('end'))
    job = wrapper.start()
    rename = 'inject=renameat,renameat2:signal=KILL:when=1'
    with traced(job.state()['wrapper_pid'], '-e', 'trace=renameat,renameat2', '-e', rename) as log:
        wrapper.virt_v2v.let('end')
        job.wait_finished()
        wrapper.wait_gone()
        assert 'killed by SIGKILL' in log()
    assert os.listdir(wrapper.state_dir) == [os.path.basename(job.paths.state_file)]


# --- errors while writing ----------------------------------------------------------------

FAULTS = ['no room', 'read-only', 'fsync EIO', 'rename EIO', 'create EROFS']


@contextlib.contextmanager
def failing_state(wrapper, fault):
    """Yield a function that takes a job and returns what fails and works on command."""
    disks = {'no room': Disk, 'read-only': ReadOnlyDisk}
    # Only the state is flushed; the directory of the state is what others are relative to.
    calls = {'fsync EIO': ('fsync', 'EIO', []),
             'rename EIO': ('renameat,renameat2', 'EIO', [wrapper.state_dir]),
             'create EROFS': ('openat', 'EROFS', [wrapper.state_dir])}
    tamper(wrapper, 'module.PUBLISH_RETRY = 0.1')
    if fault in disks:
        with disk(wrapper.state_dir, wrapper.user, disks[fault]) as found:
            yield lambda job: found
    else:
        yield lambda job: FailingCall(job.state()['wrapper_pid'], *calls[fault])


def write_failed(job):
    """Wait until the wrapper has noted that it could not write the state."""
    eventually(lambda: b'trying again' in job.log('wrapper_log'), 'a write has failed')


def no_litter(wrapper, job, *others):
    """Wait until nothing but the state file and these is there; one more may come and go."""
    known = {os.path.basename(path) for path in (job.paths.state_file,) + others} | {'filler'}
    eventually(lambda: set(os.listdir(wrapper.state_dir)) <= known, 'no litter is left')


def percent(state):
    """Return the progress of the only disk."""
    return state['disks'][0]['progress']


def one_disk(*steps):
    """Return the steps of copying one disk, of which 10 % are done before the given steps."""
    return [source(DISKS[0]), copying(1, 1), bar(10), *steps]


@pytest.mark.parametrize('fault', FAULTS)
def test_after_a_failed_write_the_newest_state_comes(wrapper, fault):
    # A new phase, because mere progress is not flushed to the disk.
    wrapper.virt_v2v.play(one_disk(wait('go'), bar(50), phase('Over'), reach('done'), wait('end')))
    with failing_state(wrapper, fault) as failing:
        job = wrapper.start()
        old = job.wait_state(lambda state: state['disks'] and percent(state), 'it is copying')
        state_file = failing(job)
        state_file.fail()
        wrapper.virt_v2v.let('go')
        wrapper.virt_v2v.wait_for('done')
        write_failed(job)
        assert job.state() == old
        no_litter(wrapper, job, job.lock_file)
        state_file.work()
        job.wait_state(lambda state: percent(state) == 50, 'the newest state is published')
        wrapper.virt_v2v.let('end')
        state = job.wait_finished()
    assert (state['return_code'], 'failed' in state, percent(state)) == (0, False, 100)


@pytest.mark.parametrize('fault', FAULTS)
def test_the_final_state_comes_once_writing_works_again(wrapper, fault):
    wrapper.virt_v2v.play(one_disk(wait('end')))
    with failing_state(wrapper, fault) as failing:
        job = wrapper.start()
        old = job.wait_state(lambda state: state['disks'] and percent(state), 'it is copying')
        state_file = failing(job)
        state_file.fail()
        wrapper.virt_v2v.let('end')
        eventually(lambda: processes.state(old['pid']) == 'Z', 'virt-v2v has ended')
        write_failed(job)
        assert job.state() == old
        no_litter(wrapper, job, job.lock_file)
        state_file.work()
        state = job.wait_finished()
        no_litter(wrapper, job)
    assert (state['return_code'], 'failed' in state, percent(state)) == (0, False, 100)


def test_a_failing_state_file_does_not_hold_up_virt_v2v(wrapper):
    wrapper.virt_v2v.play(one_disk(wait('go'), repeat(20000, bar(50)), reach('done')))
    with failing_state(wrapper, 'no room') as failing:
        job = wrapper.start()
        state_file = failing(job)
        state_file.fail()
        wrapper.virt_v2v.let('go')
        wrapper.virt_v2v.wait_for('done')
        state_file.work()
        assert job.wait_finished()['return_code'] == 0


def test_without_room_for_the_first_state_nothing_is_started(wrapper):
    wrapper.virt_v2v.play(wait('never'))
    with disk(wrapper.state_dir, wrapper.user) as full:
        full.fail()
        job = wrapper.start()
        wrapper.wait_gone()
        assert os.listdir(wrapper.state_dir) == ['filler']
    assert (job.status, job.stdout) == (1, b'')
    assert re.fullmatch(rb'virt-v2v-wrapper: error: .*: No space left on device\n', job.stderr)
