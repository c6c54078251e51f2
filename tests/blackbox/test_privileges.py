"""Started as root: nothing of root is left, and the export domain is mounted for the job alone."""
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import hung
import processes
from eventually import eventually
from faults import guardian, strace, tamper
from privileges import keep_all, make_inheritable
from results import error_line
from virt_v2v import ignore, reach, wait

pytestmark = pytest.mark.promise(5)

IDS = ('Uid', 'Gid', 'Groups', 'CapInh', 'CapPrm', 'CapEff', 'CapAmb')
GROUP_OF_ROOT_S = 54321
MOUNT_POINT = '/run/virt-v2v-wrapper'


def vdsm_s(user):
    """Return what /proc/PID/status says of a process that is the user's and nothing else."""
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    found = {name: ['0' * 16] for name in IDS if name.startswith('Cap')}
    return dict(found, Uid=[str(user.pw_uid)] * 4, Gid=[str(user.pw_gid)] * 4,
                Groups=sorted(map(str, groups)))


def privileges(status):
    """Return the same of a process with that status."""
    found = {name: status[name].split() for name in IDS}
    return dict(found, Groups=sorted(found['Groups']))


# --- what the caller may leave to the wrapper --------------------------------------------

def more_groups():
    """Have a group of root's own."""
    os.setgroups([0, GROUP_OF_ROOT_S])


def another_group():
    """Be in a group of root's own, as newgrp has it."""
    os.setgid(GROUP_OF_ROOT_S)


def no_groups():
    """Have no group at all."""
    os.setgroups([])


def everything():
    """Have all of these."""
    more_groups()
    make_inheritable()
    keep_all()


@pytest.mark.parametrize('prepare', [more_groups, another_group, no_groups, make_inheritable,
                                     keep_all, everything])
def test_all_processes_are_vdsm_s_and_have_no_capabilities(root_wrapper, prepare):
    root_wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = root_wrapper.start(prepare=prepare)
    root_wrapper.virt_v2v.wait_for('running')
    state = job.state()
    found = [privileges(processes.status(process))
             for process in (guardian(job), state['wrapper_pid'], state['pid'])]
    found.append(privileges(root_wrapper.recorded().status))
    root_wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert found == [vdsm_s(root_wrapper.user)] * 4


def test_the_caller_does_have_what_is_given_up(root_wrapper):
    """Otherwise the test above would show nothing."""
    program = 'print(open("/proc/self/status").read())'
    text = subprocess.check_output([sys.executable, '-I', '-c', program], preexec_fn=everything)
    status = dict(line.split(':\t', 1) for line in text.decode().splitlines() if ':\t' in line)
    found = privileges(status)
    assert str(GROUP_OF_ROOT_S) in found['Groups']
    assert '0' * 16 not in [found[name][0] for name in IDS if name.startswith('Cap')]


BACK = """\
#!/bin/sh
case $1 in --*) ;; *) /usr/bin/python3 -I -c '
import os
for get_back in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.seteuid(0),
                 lambda: os.setresuid(-1, -1, 0), lambda: os.setgroups([0])):
    try:
        get_back()
        print("back")
    except PermissionError:
        print("refused")
' > "${0%/*}/../home/back" ;; esac
exec "${0%/*}/../bin.real/virt-v2v" "$@"
"""


@pytest.mark.parametrize('prepare', [None, everything])
def test_virt_v2v_cannot_get_back(root_wrapper, prepare):
    os.rename(root_wrapper.virt_v2v.bin, root_wrapper.virt_v2v.bin + '.real')
    os.mkdir(root_wrapper.virt_v2v.bin, 0o755)
    root_wrapper.add_program('virt-v2v', BACK)
    root_wrapper.start(prepare=prepare).wait_finished()
    with open(os.path.join(root_wrapper.home, 'back')) as stream:
        assert stream.read().split() == ['refused'] * 5


def test_the_files_of_the_job_are_vdsm_s(root_wrapper):
    job = root_wrapper.start()
    job.wait_finished()
    paths = job.paths + (root_wrapper.log_dir, root_wrapper.state_dir)
    assert {(os.stat(path).st_uid, os.stat(path).st_gid) for path in paths} == {
        (root_wrapper.user.pw_uid, root_wrapper.user.pw_gid)}


# --- a step that fails -------------------------------------------------------------------

def under_strace(wrapper, *options):
    """Have the wrapper started by strace, which traces nothing but its first process."""
    prefix = [strace(), '-o', '/dev/null'] + list(options) + ['--']
    command = wrapper.command
    wrapper.command = lambda *arguments: prefix + command(*arguments)


def assert_nothing_happened(wrapper, job, *problems):
    """Assert that a job was refused for these problems, before anything was made or started."""
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr == b''.join(map(error_line, problems))
    assert wrapper.virt_v2v.probes() == []
    assert wrapper.virt_v2v.runs() == []
    assert wrapper.files() == []
    wrapper.wait_gone()


@pytest.mark.parametrize('call', ['setgroups', 'setresgid', 'setresuid', 'capset'])
def test_if_a_step_of_the_change_fails_nothing_is_started(root_wrapper, call):
    under_strace(root_wrapper, '-e', 'inject=%s:error=EPERM' % call)
    job = root_wrapper.start()
    name = 'capset: ' if call == 'capset' else ''       # not called by Python, so named
    assert_nothing_happened(root_wrapper, job, 'cannot become user vdsm: %sOperation not permitted'
                            % name)


@pytest.mark.parametrize('call', ['setgroups', 'setresgid', 'setresuid', 'capset', 'prctl'])
def test_if_a_step_of_the_change_is_void_nothing_is_started(root_wrapper, call):
    """The system call says that it worked, and did not."""
    under_strace(root_wrapper, '-e', 'inject=%s:retval=0' % call)
    job = root_wrapper.start(prepare=everything)
    assert_nothing_happened(root_wrapper, job, 'cannot become user vdsm: privileges are left')


USER_DATABASE = """\
import collections
import types
Entry = collections.namedtuple('Entry', 'pw_name pw_uid pw_gid pw_dir')


def getpwnam(name):
    return {entry}[name]


module.pwd = types.SimpleNamespace(getpwnam=getpwnam)
"""


@pytest.mark.parametrize('entry, problem', [
    ('{}', 'user: there is no user vdsm on this host'),
    ('{"vdsm": Entry("vdsm", 0, 36, "/")}', 'user: user vdsm is root')], ids=['absent', 'root'])
def test_without_a_proper_vdsm_nothing_is_started(root_wrapper, entry, problem):
    tamper(root_wrapper, USER_DATABASE.format(entry=entry))
    assert_nothing_happened(root_wrapper, root_wrapper.start(), problem)


# --- the export domain's mount -----------------------------------------------------------

# A mount namespace that stands for the host: what is mounted in it would be seen by all there.
# With a file system of its own in /run, and with mount.nfs, which is called by mount(8).
HOST = """\
set -eu
directory=$1
helper=$2
sbin=$(readlink -f /sbin)
mount -t tmpfs -o mode=0755 tmpfs /run
if [ -e "$sbin/mount.nfs" ]; then
    mount --bind "$helper" "$sbin/mount.nfs"
else
    mkdir "$directory/sbin"
    mount --bind "$sbin" "$directory/sbin"
    mount -t tmpfs -o mode=0755 tmpfs "$sbin"
    ln -s "$directory"/sbin/* "$sbin"
    ln -s "$helper" "$sbin/mount.nfs"
fi
mount --make-rshared /
echo ready
exec cat
"""
BIND = """\
#!/bin/sh
exec mount --bind "{export}" "$2"
"""


class Host:
    """A host that mounts the export domain of a wrapper as NFS, and the wrapper on it."""

    def __init__(self, wrapper):
        self.export = 'nfs.example.com:/' + wrapper.name
        self._wrapper = wrapper
        self._helper = os.path.join(wrapper.directory, 'mount.nfs')
        self.helper(BIND.format(export=wrapper.export_domain))
        self._process = subprocess.Popen(
            ['unshare', '--mount', '--propagation', 'slave', 'sh', '-c', HOST, 'sh',
             wrapper.directory, self._helper],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if self._process.stdout.readline() != b'ready\n':
            said = self._process.communicate()[1].decode()
            pytest.skip('cannot have a mount namespace here: ' + said.strip())
        self.pid = self._process.pid
        self.prefix = [shutil.which('nsenter'), '--mount=/proc/%d/ns/mnt' % self.pid, '--']
        command = wrapper.command
        wrapper.command = lambda *arguments: self.prefix + command(*arguments)

    def helper(self, text):
        """Have another mount.nfs."""
        with open(self._helper, 'w') as stream:
            stream.write(text)
        os.chmod(self._helper, 0o755)

    def request(self):
        """Return a request with the export domain as NFS."""
        return self._wrapper.request(export_domain=self.export)

    def start(self, *arguments, **keywords):
        """Start a job."""
        return self._wrapper.start(self.request(), *arguments, **keywords)

    def job_processes(self):
        """Return the processes of the wrapper's jobs."""
        return sorted(set(self._wrapper.processes()) - {self.pid})

    def wait_gone(self):
        """Wait until none of these is left."""
        eventually(lambda: not self.job_processes(), 'the job is gone')

    def close(self):
        """Leave nothing of it."""
        self._process.communicate()


@pytest.fixture
def host(root_wrapper):
    host = Host(root_wrapper)
    yield host
    host.close()


def mounts(process, point=MOUNT_POINT):
    """Return the lines of a process's mountinfo that are about the mount point."""
    try:
        with open('/proc/%s/mountinfo' % process) as stream:
            return [line for line in stream if line.split()[4] == point]
    except (OSError, ValueError):
        return []


def seeing(wrapper):
    """Return the processes that see the export domain of this wrapper at the mount point."""
    return sorted(int(process) for process in os.listdir('/proc') if process.isdigit()
                  and any(wrapper.name in line for line in mounts(process)))


@pytest.fixture
def mounted(root_wrapper, host):
    """A job that goes on, with its export domain mounted."""
    root_wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = host.start()
    assert job.stderr == b''
    root_wrapper.virt_v2v.wait_for('running')
    return job


def test_virt_v2v_gets_the_mounted_export_domain(root_wrapper, mounted):
    run = root_wrapper.recorded()
    root_wrapper.virt_v2v.let('end')
    assert mounted.wait_finished()['return_code'] == 0
    assert run.option(b'-os') == MOUNT_POINT.encode()
    assert [line for line in run.mounts.splitlines()
            if root_wrapper.name in line and line.split()[4] == MOUNT_POINT]


def test_virt_v2v_runs_as_vdsm_with_a_mounted_export_domain_too(root_wrapper, mounted):
    root_wrapper.virt_v2v.let('end')
    mounted.wait_finished()
    assert privileges(root_wrapper.recorded().status) == vdsm_s(root_wrapper.user)


def test_the_mount_is_seen_by_the_job_alone(root_wrapper, host, mounted):
    found = seeing(root_wrapper)
    expected = host.job_processes()
    outside = mounts(host.pid) + mounts('self')
    root_wrapper.virt_v2v.let('end')
    mounted.wait_finished()
    assert outside == []
    assert found == expected
    assert set(found) >= {mounted.state()['pid'], mounted.state()['wrapper_pid']}


def test_the_mount_is_gone_when_the_job_has_ended(root_wrapper, host, mounted):
    root_wrapper.virt_v2v.let('end')
    mounted.wait_finished()
    host.wait_gone()
    assert seeing(root_wrapper) == []
    assert mounts(host.pid) == []


def test_the_mount_is_gone_after_a_kill_of_all_processes(root_wrapper, host, mounted):
    for process in host.job_processes():
        os.kill(process, signal.SIGKILL)
    host.wait_gone()
    assert seeing(root_wrapper) == []
    assert mounts(host.pid) == []


def test_the_mount_is_gone_after_a_start_that_fails(root_wrapper, host):
    os.unlink(root_wrapper.virt_v2v.program)
    job = host.start()
    assert (job.status, job.stderr) == (1, error_line('virt-v2v: not found on PATH'))
    assert seeing(root_wrapper) == []
    assert mounts(host.pid) == []


def test_two_jobs_do_not_see_each_other_s_mounts(root_wrapper, host):
    root_wrapper.virt_v2v.play(wait('end'))
    jobs = [host.start(), host.start()]
    counts = {job.state()['pid']: len(mounts(job.state()['pid'])) for job in jobs}
    namespaces = {os.readlink('/proc/%d/ns/mnt' % pid) for pid in counts}
    root_wrapper.virt_v2v.let('end')
    for job in jobs:
        assert job.wait_finished()['return_code'] == 0
    assert list(counts.values()) == [1, 1]
    assert len(namespaces) == 2


RECORDING = """\
#!/bin/sh
echo "$4" > "{record}"
exec mount --bind "{export}" "$2"
"""


def test_nothing_in_the_mount_is_a_device_or_executed(root_wrapper, host):
    record = os.path.join(root_wrapper.directory, 'options')
    host.helper(RECORDING.format(record=record, export=root_wrapper.export_domain))
    host.start().wait_finished()
    host.wait_gone()
    with open(record) as stream:
        assert set(stream.read().strip().split(',')) >= {'nosuid', 'nodev', 'noexec'}


def test_what_the_host_unmounts_is_unmounted_for_the_job(root_wrapper, host):
    """Or the job would keep it busy."""
    place = os.path.join(root_wrapper.directory, 'other')
    os.mkdir(place)
    subprocess.check_call(host.prefix + ['mount', '-n', '-t', 'tmpfs', 'tmpfs', place])
    root_wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = host.start()
    root_wrapper.virt_v2v.wait_for('running')
    process = job.state()['pid']
    before = mounts(process, place)
    subprocess.check_call(host.prefix + ['umount', '-n', place])
    after = mounts(process, place)
    root_wrapper.virt_v2v.let('end')
    job.wait_finished()
    host.wait_gone()
    assert (len(before), len(after)) == (1, 0)


DENIED = """\
#!/bin/sh
echo "mount.nfs: access denied by server" >&2
echo "while mounting $1" >&2
exit 32
"""


def test_a_mount_helper_that_fails_has_its_text_in_the_one_line(root_wrapper, host):
    host.helper(DENIED)
    job = host.start()
    assert_nothing_happened_on(host, root_wrapper, job, (
        'export_domain: could not be mounted: mount.nfs: access denied by server while mounting '
        + host.export))


def assert_nothing_happened_on(host, wrapper, job, problem):
    """The same as assert_nothing_happened, on a host."""
    host.wait_gone()
    assert (job.status, job.stdout, job.stderr) == (1, b'', error_line(problem))
    assert wrapper.virt_v2v.probes() == []
    assert files_but_empty_directories(wrapper) == []
    assert seeing(wrapper) == []


def files_but_empty_directories(wrapper):
    """Return what was made; the directories for logs and state may be there, as the user's."""
    return sorted(set(wrapper.files()) - {'log', 'state'})


def test_a_silent_mount_helper_has_its_status_in_the_line(root_wrapper, host):
    host.helper('#!/bin/sh\nexit 32\n')
    job = host.start()
    host.wait_gone()
    assert job.status == 1
    assert re.fullmatch(rb'virt-v2v-wrapper: error: export_domain: could not be mounted: .+\n',
                        job.stderr)


def test_a_mount_helper_that_never_ends_is_ended(root_wrapper, host):
    """A server that does not answer: mount(8) waits for its helper, which tries for ever."""
    tamper(root_wrapper, 'module.MOUNT_PATIENCE = 0.3')
    host.helper('#!/bin/sh\nread answer < "%s"\n' % make_fifo(root_wrapper, 'never'))
    job = host.start()
    assert_nothing_happened_on(host, root_wrapper, job,
                               'export_domain: does not answer')


@pytest.fixture
def storage(root_wrapper):
    """Storage that hangs when it is told to; there before the host is."""
    with hung.file_system(os.path.join(root_wrapper.directory, 'hung'),
                          root_wrapper.user) as storage:
        yield storage


def test_a_mount_that_cannot_be_killed_is_left(root_wrapper, storage, host):
    tamper(root_wrapper, 'module.MOUNT_PATIENCE = 0.3')
    stand_in = root_wrapper.add_program(
        'mount', '#!/bin/sh\nexec /bin/cat "%s/file"\n' % storage.directory)
    subprocess.check_call(host.prefix + ['mount', '-n', '--bind', stand_in, shutil.which('mount')])
    storage.hang()
    job = host.start()
    waited = storage.waiting()
    storage.release()
    host.wait_gone()
    assert waited
    assert (job.status, job.stdout) == (1, b'')
    assert re.fullmatch(re.escape(error_line('export_domain: ')[:-1]) + rb'[^\n]+\n', job.stderr)


def make_fifo(wrapper, name):
    """Make a FIFO that nobody writes to; return its path."""
    path = os.path.join(wrapper.directory, name)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize('call', ['unshare', 'mount'])
def test_without_a_mount_of_the_job_s_own_nothing_is_started(root_wrapper, host, call):
    command = root_wrapper.command
    prefix = [strace(), '-o', '/dev/null', '-e', 'inject=%s:error=EPERM' % call, '--']
    # Not nsenter, but what it executes.
    root_wrapper.command = lambda *arguments: (
        host.prefix + prefix + command(*arguments)[len(host.prefix):])
    job = host.start()
    assert_nothing_happened_on(host, root_wrapper, job,
                               'export_domain: %s: Operation not permitted' % call)
    assert mounts(host.pid) == []


def test_the_mount_is_gone_after_a_job_that_ignores_term(root_wrapper, host):
    tamper(root_wrapper, 'module.STOP_GRACE = 0.1')
    root_wrapper.virt_v2v.play(ignore(signal.SIGTERM), reach('running'), wait('never'))
    job = host.start()
    root_wrapper.virt_v2v.wait_for('running')
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    job.wait_finished()
    host.wait_gone()
    assert seeing(root_wrapper) == []


def test_an_ordinary_user_mounts_nothing(wrapper):
    job = wrapper.start(wrapper.request(export_domain='nfs.example.com:/export'))
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr == error_line('export_domain: is not mounted here, and only root can mount'
                                    ' it')
    assert wrapper.virt_v2v.probes() == []
    assert files_but_empty_directories(wrapper) == []
