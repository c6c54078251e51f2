"""Ordinary problems of a host: each is a line that names the thing, and nothing is left."""
import os
import re
import resource
import shutil
import subprocess

import pytest

import namespaces
import script
from blackbox import become
from faults import strace, tamper
from namespaces import MS_RDONLY, MS_REMOUNT, SCRATCH, mount, need_namespaces
from virt_v2v import reach, wait

LINE = re.compile(rb'virt-v2v-wrapper: error: [^\n]+\n')


def assert_refused(wrapper, job, *words):
    """Assert that nothing was started, and that one line has these words (regular expressions)."""
    assert (job.status, job.stdout) == (1, b'')
    assert LINE.fullmatch(job.stderr)
    assert b'internal error' not in job.stderr
    text = job.stderr.decode()
    assert [word for word in words if not re.search(word, text)] == []
    wrapper.wait_gone()
    assert wrapper.virt_v2v.runs() == []
    assert [name for name in wrapper.files() if '.' in name] == []


# --- the directory for temporary files ---------------------------------------------------

def full(wrapper):
    """Have no room in it: what is there takes all inodes."""
    return namespaces.small_scratch(wrapper, ',nr_inodes=2')


def read_only(wrapper):
    """Have it read-only."""
    return namespaces.small_scratch(
        wrapper, then=lambda: mount(None, SCRATCH, flags=MS_REMOUNT | MS_RDONLY))


def closed(wrapper):
    """Have it closed to all but root."""
    return namespaces.small_scratch(wrapper, then=lambda: os.chmod(SCRATCH, 0o755))


@pytest.mark.parametrize('fault, text', [
    (full, 'No space left on device'), (read_only, 'Read-only file system'),
    (closed, 'Permission denied')])
def test_a_place_for_temporary_files_that_fails_is_named(wrapper, fault, text):
    need_namespaces()
    job = wrapper.start(prepare=fault(wrapper))
    assert_refused(wrapper, job, SCRATCH, text)


# --- what else a process needs -----------------------------------------------------------

def test_a_host_without_proc_is_named(wrapper):
    need_namespaces()
    assert_refused(wrapper, wrapper.start(prepare=namespaces.empty('/proc')), '/proc')


def test_a_host_without_dev_null_is_named(wrapper):
    need_namespaces()
    assert_refused(wrapper, wrapper.start(prepare=namespaces.empty('/dev')), '/dev/null')


def start_with_descriptors(wrapper, count):
    """Start a job that may have so many descriptors."""
    return wrapper.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count)))


def test_too_few_descriptors_are_named(wrapper):
    """Whatever it is that fails for lack of one, except for Python's own start."""
    wrapper.virt_v2v.play()
    scratch = os.path.join(wrapper.home, 'scratch')
    os.mkdir(scratch)
    os.chmod(scratch, 0o1777)
    tamper(wrapper, 'module.TEMPORARY_DIR = %r' % scratch)
    jobs = [start_with_descriptors(wrapper, count) for count in list(range(4, 24)) + [100]]
    refused = [job.stderr for job in jobs if job.status == 1 and b'-wrapper: error: ' in job.stderr]
    assert refused
    assert [text for text in refused if not LINE.match(text) or b'internal error' in text] == []
    assert [text for text in refused if b'open files' not in text] == []
    assert jobs[-1].status == 0
    for job in jobs:
        if job.status == 0:
            job.wait_finished()
    wrapper.wait_gone()
    assert [name for name in os.listdir(scratch) if not name.startswith('v2v-cache-')] == []


def gone_directory(wrapper):
    """Return a preparation: to be in a directory that was removed."""
    def prepare():
        path = os.path.join(wrapper.home, 'gone')
        os.mkdir(path)
        os.chdir(path)
        os.rmdir(path)
    return prepare


def test_a_working_directory_that_is_gone_does_not_matter(wrapper):
    job = wrapper.start(prepare=gone_directory(wrapper))
    assert (job.status, job.stderr) == (0, b'')
    assert job.wait_finished()['return_code'] == 0


def test_a_relative_path_from_a_directory_that_is_gone_is_named(wrapper):
    job = wrapper.start(None, '--log-dir', 'log', *wrapper.arguments[2:],
                        prepare=gone_directory(wrapper))
    assert (job.status in (1, 2), job.stdout) == (True, b'')
    assert LINE.fullmatch(job.stderr)
    assert b'internal error' not in job.stderr
    assert b'--log-dir' in job.stderr or b'irectory' in job.stderr


def test_a_secret_without_memfd_is_kept_or_named(wrapper):
    """A sandbox may deny the call."""
    prefix = [strace(), '-f', '-o', '/dev/null', '-e', 'trace=memfd_create', '-e',
              'inject=memfd_create:error=EPERM', '--']
    command = wrapper.command
    wrapper.command = lambda *arguments: prefix + command(*arguments)
    job = wrapper.start()
    if job.status == 0:
        job.wait_finished()
        assert wrapper.recorded().password == wrapper.request()['vmware_password'].encode()
    else:
        assert_refused(wrapper, job, 'password|memfd|memory')


def no_processes(wrapper):
    """Let the user of a wrapper have no process more; return what is to be done before."""
    def prepare():
        become(wrapper.user)        # first: root may always fork
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    return prepare


# The second process cannot fork: by then there are files to be removed.
NO_SECOND_FORK = """
def fork(real=os.fork):
    if os.getsid(0) == os.getpid():     # it leads the session
        raise BlockingIOError(11, 'Resource temporarily unavailable')
    return real()


os.fork = fork
"""


def no_second_process(wrapper):
    """The same, but for the first one; return what is to be done before."""
    tamper(wrapper, NO_SECOND_FORK)


@pytest.mark.parametrize('fault', [no_processes, no_second_process])
def test_a_process_that_cannot_fork_is_named_and_leaves_nothing(wrapper, fault):
    need_namespaces()
    directory, own_scratch = namespaces.own_scratch(wrapper)
    more = fault(wrapper)

    def prepare():
        own_scratch()
        if more:
            more()
    assert_refused(wrapper, wrapper.start(prepare=prepare), 'Resource temporarily unavailable')
    assert [name for name in os.listdir(directory) if re.fullmatch('v2v-[0-9a-f]{8}', name)] == []


# --- mistakes of ours in the library -----------------------------------------------------

# A function far down in a file of the library that is longer than the script.
FAR_DOWN = """
import _pydecimal, json, types


def mistake(*_, **__):
    _pydecimal._parse_format_specifier(None)


module.json = types.SimpleNamespace(loads=mistake, dumps=json.dumps)
"""


def test_an_internal_error_has_no_line_of_another_file(wrapper):
    tamper(wrapper, FAR_DOWN)
    job = wrapper.start()
    assert (job.status, job.stdout) == (1, b'')
    assert LINE.fullmatch(job.stderr)
    with open(script.SCRIPT, 'rb') as stream:
        length = len(stream.readlines())
    assert [number for number in re.findall(rb'line ([0-9]+)', job.stderr)
            if int(number) > length] == []


# --- the appliance's cache ---------------------------------------------------------------

def cache(run):
    """Return the directory for the appliance of a run of virt-v2v."""
    return os.fsdecode(run.environment[b'LIBGUESTFS_CACHEDIR'])


@pytest.mark.promise(9)
@pytest.mark.parametrize('kind', ['wrapper', 'root_wrapper'])
def test_the_appliance_is_where_nobody_else_may_write(request, kind):
    wrapper = request.getfixturevalue(kind)
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('running')
    status = os.stat(cache(wrapper.recorded()))
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert status.st_uid == wrapper.user.pw_uid
    assert status.st_mode & 0o022 == 0


def run_with_scratch(wrapper, directory, prepare):
    """Run a job; return where its appliance was, as seen from outside, and who owned that."""
    wrapper.use('2.2.0')
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start(prepare=prepare)
    assert (job.status, job.stderr) == (0, b'')
    wrapper.virt_v2v.wait_for('running')
    path = cache(wrapper.recorded())
    # Nothing else may be removed or taken by the test.
    assert re.fullmatch(SCRATCH + '/[^/]+', path)
    path = os.path.join(directory, os.path.basename(path))
    owner = os.stat(path).st_uid
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    wrapper.wait_gone()
    return path, owner


def taken_by(wrapper, path):
    """Have somebody else take a path."""
    os.mkdir(path, 0o700)
    os.chown(path, wrapper.user.pw_uid + 1, wrapper.user.pw_gid)


@pytest.mark.promise(9)
def test_a_cache_that_somebody_else_has_taken_does_no_harm(wrapper):
    need_namespaces()
    directory, prepare = namespaces.own_scratch(wrapper)
    taken_by(wrapper, os.path.join(directory, '.guestfs-%d' % wrapper.user.pw_uid))
    path, _ = run_with_scratch(wrapper, directory, prepare)
    assert not os.path.exists(os.path.join(path, '.guestfs-%d' % wrapper.user.pw_uid))


@pytest.mark.promise(9)
@pytest.mark.parametrize('how', [
    'somebody else', 'a link', 'a link to ours', 'open to others', 'shown to others'])
def test_a_cache_that_is_not_ours_alone_is_not_used(wrapper, how):
    need_namespaces()
    directory, prepare = namespaces.own_scratch(wrapper)
    taken, _ = run_with_scratch(wrapper, directory, prepare)
    shutil.rmtree(taken)
    if how == 'a link':
        taken_by(wrapper, taken + '-real')
        os.symlink(taken + '-real', taken)
    elif how == 'a link to ours':
        os.symlink(wrapper.home, taken)
        os.chmod(wrapper.home, 0o700)
    elif how == 'somebody else':
        taken_by(wrapper, taken)
    else:
        os.mkdir(taken)
        os.chmod(taken, 0o777 if how == 'open to others' else 0o755)
        os.chown(taken, wrapper.user.pw_uid, wrapper.user.pw_gid)
    path, owner = run_with_scratch(wrapper, directory, prepare)
    assert path != taken
    assert owner == wrapper.user.pw_uid


# --- what else the host's Python would run -----------------------------------------------

SYSTEM_PYTHON = '/usr/bin/python3'


def test_no_code_of_the_host_runs_before_the_script(wrapper):
    """A file NAME.pth in a directory for packages is code for each start of Python."""
    need_namespaces()
    places = subprocess.check_output([SYSTEM_PYTHON, '-I', '-c', """if 1:
        import os, site
        print([path for path in site.getsitepackages() if os.path.isdir(path)][0])"""])
    mark = os.path.join(wrapper.home, 'ran')

    def prepare():
        namespaces.empty(places.decode().strip())()
        with open(os.path.join(places.decode().strip(), 'x.pth'), 'w') as stream:
            stream.write('import os; open(%r, "w").close()\n' % mark)
    subprocess.check_call([SYSTEM_PYTHON, '-I', '-c', ''], preexec_fn=prepare)
    assert os.path.exists(mark), 'it would show nothing'
    os.unlink(mark)
    wrapper.command = lambda *arguments: [wrapper.script] + list(arguments or wrapper.arguments)
    job = wrapper.start(prepare=prepare)
    assert (job.status, job.stderr) == (0, b'')
    job.wait_finished()
    assert not os.path.exists(mark)
