"""Files and directories: ours alone, under names of their own, with exact modes."""
import grp
import json
import os
import stat
import subprocess

import pytest

from eventually import eventually
from faults import tamper
from results import error_line, mode
from schemas import read_state
from virt_v2v import copying, phase, reach, wait

pytestmark = pytest.mark.promise(9)

ENDINGS = {'v2v_log': '.log', 'wrapper_log': '-wrapper.log', 'state': '.state', 'lock': '.lock'}
VICTIM = 'what was there before\n'


def fingerprint(path):
    """Return what can be said of a file without following a link or opening a FIFO."""
    status = os.lstat(path)
    about = [stat.S_IFMT(status.st_mode), oct(status.st_mode), status.st_ino, status.st_uid]
    if stat.S_ISREG(status.st_mode):
        with open(path) as stream:
            about.append(stream.read())
    elif stat.S_ISLNK(status.st_mode):
        about.append(os.readlink(path))
    elif stat.S_ISDIR(status.st_mode):
        about.append(sorted(os.listdir(path)))
    return about


# --- something in the place of a file ----------------------------------------------------

@pytest.fixture
def victim(wrapper):
    """A file that the wrapper could write to."""
    path = os.path.join(wrapper.home, 'victim')
    with open(path, 'w') as stream:
        stream.write(VICTIM)
    os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)
    return path


def symlink(path, victim):
    os.symlink(victim, path)


def dangling_symlink(path, victim):
    os.symlink(victim + '.missing', path)


def fifo(path, victim):
    os.mkfifo(path)


def hard_link(path, victim):
    os.link(victim, path)


def file_of_the_caller_s(path, victim):
    with open(path, 'w') as stream:
        stream.write(VICTIM)


def directory(path, victim):
    os.mkdir(path, 0o777)


def remove(path):
    """Remove an obstacle."""
    if os.path.isdir(path) and not os.path.islink(path):
        os.rmdir(path)
    else:
        os.unlink(path)


OBSTACLES = [symlink, dangling_symlink, fifo, hard_link, file_of_the_caller_s, directory]


def make_directories(wrapper):
    """Make the wrapper's directories, as it would."""
    for path in (wrapper.log_dir, wrapper.state_dir):
        os.mkdir(path, 0o755)
        os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)


# Each start takes the time and the process ID for the same; so do two starts after the clock was
# set back, or with process IDs of their own in two containers.
SAME_NAME = """\
real_getpid, real_gmtime = os.getpid, module.time.gmtime


def create_files(*arguments, real=module.create_files):
    os.getpid = lambda: 4242
    module.time.gmtime = lambda *_: real_gmtime(1000000000)
    try:
        return real(*arguments)
    finally:
        os.getpid, module.time.gmtime = real_getpid, real_gmtime


module.create_files = create_files
"""
STEM = 'v2v-import-20010909T014640-4242'

# The job looks for dead ones beside it, and does not wait for that when it ends.
SEARCHED = """\
def end_dead_jobs(*arguments, real=module.end_dead_jobs):
    real(*arguments)
    open({mark!r}, 'w').close()


module.end_dead_jobs = end_dead_jobs
"""


def convert_beside(wrapper, kind, put):
    """Have something in the place of a file of the first name; return (its path, a job).

    The job is over, and has looked for dead jobs.
    """
    make_directories(wrapper)
    path = os.path.join(wrapper.log_dir if kind.endswith('log') else wrapper.state_dir,
                        STEM + ENDINGS[kind])
    put(path)
    before = fingerprint(path)
    mark = os.path.join(wrapper.home, 'searched')
    tamper(wrapper, SAME_NAME + SEARCHED.format(mark=mark))
    wrapper.virt_v2v.play(wait('end'))
    job = wrapper.start()
    assert (job.status, job.stderr) == (0, b'')
    eventually(lambda: os.path.exists(mark), 'dead jobs were looked for')
    wrapper.virt_v2v.let('end')
    assert 'failed' not in job.wait_finished()
    wrapper.wait_gone()
    return path, before, job


@pytest.mark.parametrize('obstacle', OBSTACLES)
@pytest.mark.parametrize('kind', sorted(ENDINGS))
def test_what_is_in_the_place_of_a_file_stays_as_it_is(wrapper, victim, kind, obstacle):
    path, before, job = convert_beside(wrapper, kind, lambda path: obstacle(path, victim))
    assert path not in job.paths
    assert open_and_read(victim) == VICTIM
    assert not os.path.lexists(victim + '.missing')
    # A state or lock that is a file of the job's own user is one of a dead job, which is ended.
    if kind.endswith('log') or before[0] != stat.S_IFREG or before[3] != wrapper.user.pw_uid:
        assert fingerprint(path) == before
        remove(path)        # whoever looks at the logs afterwards would wait for the FIFO


@pytest.mark.parametrize('kind', sorted(ENDINGS))
def test_when_a_name_is_taken_only_files_of_the_next_are_made(wrapper, victim, kind):
    path, _, job = convert_beside(wrapper, kind, lambda path: symlink(path, victim))
    found = os.listdir(wrapper.log_dir) + os.listdir(wrapper.state_dir)
    assert sorted(found) == sorted(os.path.basename(name) for name in job.paths + (path,))
    assert job.paths.state_file.endswith(STEM + '-2.state')


# --- something in the place of a directory -----------------------------------------------

PLACES = ('log', 'state')


def at(wrapper, place):
    """Return the path of the log or state directory."""
    return {'log': wrapper.log_dir, 'state': wrapper.state_dir}[place]


def assert_refused(wrapper, problem):
    """Start the wrapper; assert that it says that, and leaves no file behind."""
    job = wrapper.start()
    assert (job.status, job.stdout, job.stderr) == (1, b'', error_line(problem))
    wrapper.wait_gone()
    assert wrapper.virt_v2v.runs() == []
    assert [name for name in wrapper.files() if 'v2v-import' in name] == []


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('obstacle, text', [
    (dangling_symlink, 'File exists'), (fifo, 'File exists'), (hard_link, 'File exists'),
    (file_of_the_caller_s, 'File exists')])
def test_what_is_no_directory_in_the_place_of_one_is_refused(wrapper, victim, place, obstacle,
                                                             text):
    path = at(wrapper, place)
    obstacle(path, victim)
    before = fingerprint(path)
    assert_refused(wrapper, '--{}-dir {}: {}'.format(place, path, text))
    assert fingerprint(path) == before
    assert not os.path.lexists(victim + '.missing')


@pytest.mark.parametrize('place', PLACES)
def test_a_symlink_in_the_place_of_a_directory_is_refused(wrapper, place):
    target = os.path.join(wrapper.home, 'target')
    os.mkdir(target, 0o755)
    os.chown(target, wrapper.user.pw_uid, wrapper.user.pw_gid)
    os.symlink(target, at(wrapper, place))
    assert_refused(wrapper, '--{}-dir {}: Not a directory'.format(place, at(wrapper, place)))
    assert os.listdir(target) == []


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('bits', [0o775, 0o757, 0o777, 0o1777, 0o2775, 0o702])
def test_a_directory_that_others_may_write_to_is_refused(wrapper, place, bits):
    make_directories(wrapper)
    os.chmod(at(wrapper, place), bits)
    assert_refused(wrapper, '--{0}-dir {1}: others may write to it (mode {2:04o}), expected {3}'
                   ' alone: chmod go-w {1}'.format(
                       place, at(wrapper, place), bits, wrapper.user.pw_name))
    assert mode(at(wrapper, place)) == bits
    assert os.listdir(at(wrapper, place)) == []


def foreign(wrapper, place, path, owner):
    """Return the problem with a directory of somebody else."""
    return ('--{}-dir {path}: belongs to {}, expected a directory of {user}; one in it will do:'
            ' install -d -o {user} -g {} {path}/virt-v2v-wrapper').format(
        place, 'root' if owner == 0 else owner, group_of(wrapper), path=path,
        user=wrapper.user.pw_name)


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('owner', [0, 12345])
def test_a_directory_of_somebody_else_is_refused(wrapper, place, owner):
    if os.getuid() != 0:
        pytest.skip('needs root, to make a directory of another user')
    make_directories(wrapper)
    os.chown(at(wrapper, place), owner, owner)
    os.chmod(at(wrapper, place), 0o755)
    assert_refused(wrapper, foreign(wrapper, place, at(wrapper, place), owner))
    assert os.lstat(at(wrapper, place)).st_uid == owner


@pytest.mark.parametrize('place', PLACES)
def test_root_makes_nothing_where_a_dangling_symlink_points_to(root_wrapper, place):
    ours = os.path.join(root_wrapper.directory, 'ours')
    path = os.path.join(root_wrapper.directory, 'link')
    os.symlink(ours, path)
    arguments = ['--log-dir', root_wrapper.log_dir, '--state-dir', root_wrapper.state_dir]
    arguments[1 if place == 'log' else 3] = path
    job = root_wrapper.start(None, *arguments + root_wrapper.arguments[4:])
    assert (job.status, job.stderr) == (
        1, error_line('--{}-dir {}: File exists'.format(place, path)))
    assert not os.path.lexists(ours)
    assert os.lstat(path).st_uid == 0


def test_root_gives_nothing_away_that_was_there_before(root_wrapper):
    path = os.path.join(root_wrapper.directory, 'root-s')
    os.mkdir(path, 0o755)
    job = root_wrapper.start(None, '--log-dir', path, *root_wrapper.arguments[2:])
    assert (job.status, job.stderr) == (1, error_line(foreign(root_wrapper, 'log', path, 0)))
    assert os.lstat(path).st_uid == 0
    assert os.listdir(path) == []


@pytest.mark.parametrize('owner, group, bits', [
    (0, 0, 0o755), (12345, 12345, 0o755), (0, 12345, 0o1775)])
def test_root_makes_no_directory_where_vdsm_may_not(root_wrapper, owner, group, bits):
    """The command that makes it is named."""
    shared = os.path.join(root_wrapper.directory, 'a b')
    os.mkdir(shared)
    os.chown(shared, owner, group)
    os.chmod(shared, bits)
    path = os.path.join(shared, 'log')
    job = root_wrapper.start(None, '--log-dir', path, *root_wrapper.arguments[2:])
    assert job.status == 1
    assert job.stderr == error_line(
        "--log-dir {0}: is missing, and may only be made by root: install -d -o vdsm -g {1}"
        " '{0}'".format(path, group_of(root_wrapper)))
    assert os.listdir(shared) == []


def group_of(wrapper):
    """Return the name of the group of the user that a wrapper runs as."""
    return grp.getgrgid(wrapper.user.pw_gid).gr_name


def test_the_command_that_is_named_makes_the_directory(root_wrapper):
    path = os.path.join(root_wrapper.directory, "it's a", 'log')
    arguments = ['--log-dir', path] + root_wrapper.arguments[2:]
    said = root_wrapper.start(None, *arguments).stderr.decode()
    subprocess.check_call(said.partition('by root: ')[2], shell=True)
    job = root_wrapper.start(None, *arguments)
    assert (job.status, job.stderr) == (0, b'')
    job.wait_finished()


# --- the directory for temporary files ---------------------------------------------------

TEMPORARY = """\
module.os.urandom = lambda count: b'same'
module.TEMPORARY_DIR = {home!r}
"""
TAKEN = 'v2v-' + b'same'.hex()


@pytest.mark.parametrize('obstacle', OBSTACLES)
def test_what_is_in_the_place_of_temporary_files_stays(wrapper, victim, obstacle):
    tamper(wrapper, TEMPORARY.format(home=wrapper.home))
    path = os.path.join(wrapper.home, TAKEN)
    obstacle(path, victim)
    before = fingerprint(path)
    assert_refused(wrapper, path + ': File exists')
    assert fingerprint(path) == before
    assert open_and_read(victim) == VICTIM


# What virt-v2v could leave in there, and what that points to must stay.
LEFT = """\
#!/bin/sh
case $1 in --*) exec "${0%/*}/../bin.real/virt-v2v" "$@" ;; esac
/bin/ln -s "$HOME/victim" "$TMPDIR/link"
/bin/mkdir "$TMPDIR/sub"
/bin/ln -s "$HOME" "$TMPDIR/sub/home"
/usr/bin/mkfifo "$TMPDIR/sub/fifo"
echo "$TMPDIR" > "$HOME/../where"
"""


def test_what_temporary_links_point_to_stays(wrapper, victim):
    with open(os.path.join(wrapper.directory, 'where'), 'w'):
        os.chmod(os.path.join(wrapper.directory, 'where'), 0o666)
    tamper(wrapper, 'real = module.Identity.find\n'
                    'module.Identity.find = lambda: real()._replace(home=%r)\n' % wrapper.home)
    os.rename(wrapper.virt_v2v.bin, wrapper.virt_v2v.bin + '.real')
    os.mkdir(wrapper.virt_v2v.bin, 0o755)
    wrapper.add_program('virt-v2v', LEFT)
    before = mode(wrapper.home)
    wrapper.start().wait_finished()
    wrapper.wait_gone()
    with open(os.path.join(wrapper.directory, 'where')) as stream:
        scratch = stream.read().strip()
    assert scratch.startswith('/var/tmp/v2v-')
    assert not os.path.exists(scratch)
    assert mode(wrapper.home) == before
    with open(victim) as stream:
        assert stream.read() == VICTIM


# --- modes -------------------------------------------------------------------------------

@pytest.mark.parametrize('umask', [0, 0o077, 0o777])
def test_modes_are_exact_under_any_umask(wrapper, umask):
    wrapper.virt_v2v.play(phase('Opening the source'), copying(1, 1), reach('copying'), wait('end'))
    job = wrapper.start(umask=umask)
    wrapper.virt_v2v.wait_for('copying')
    scratch = wrapper.recorded().environment[b'TMPDIR']
    modes = [mode(path) for path in job.paths + (
        wrapper.log_dir, wrapper.state_dir, scratch, job.lock_file)]
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert modes == [0o640, 0o640, 0o644, 0o755, 0o755, 0o700, 0o644]
    assert [mode(path) for path in job.paths] == [0o640, 0o640, 0o644]


@pytest.mark.parametrize('umask', [0, 0o077])
def test_modes_and_owners_are_exact_as_root_too(root_wrapper, umask):
    path = os.path.join(root_wrapper.home, 'new', 'state')
    root_wrapper.arguments[3] = path
    job = root_wrapper.start(umask=umask)
    job.wait_finished()
    paths = job.paths + (root_wrapper.log_dir, path, os.path.dirname(path))
    assert [mode(path) for path in paths] == [0o640, 0o640, 0o644] + [0o755] * 3
    assert {(os.stat(path).st_uid, os.stat(path).st_gid) for path in paths} == {
        (root_wrapper.user.pw_uid, root_wrapper.user.pw_gid)}


# --- names -------------------------------------------------------------------------------

def test_names_hold_the_time_and_the_process(wrapper):
    tamper(wrapper, SAME_NAME)
    job = wrapper.start()
    job.wait_finished()
    assert job.paths == (os.path.join(wrapper.log_dir, STEM + '-wrapper.log'),
                         os.path.join(wrapper.log_dir, STEM + '.log'),
                         os.path.join(wrapper.state_dir, STEM + '.state'))


def test_starts_of_the_same_name_do_not_collide(wrapper):
    tamper(wrapper, SAME_NAME)
    wrapper.virt_v2v.play(wait('end'))
    jobs = [wrapper.start() for _ in range(5)]
    states = [job.state() for job in jobs]
    wrapper.virt_v2v.let('end')
    for job in jobs:
        assert job.wait_finished()['return_code'] == 0
    assert len({path for job in jobs for path in job.paths}) == 15
    assert len({state['pid'] for state in states}) == 5


def start_at_once(wrapper, count):
    """Start that many; return (status, stdout, stderr) of each."""
    starts = [wrapper.popen() for _ in range(count)]
    for process in starts:
        process.stdin.write(json.dumps(wrapper.request()).encode())
    results = []
    for process in starts:      # each of them reads only now to the end
        process.stdin.close()
        process.stdin = None
    for process in starts:
        with process:
            stdout, stderr = process.communicate(timeout=60)
        results.append((process.returncode, stdout, stderr))
    return results


def finished(path):
    """Say whether the state in a file is final, or None if it is."""
    return 'finished' in read_state(path)


@pytest.mark.parametrize('count', [8, pytest.param(60, marks=pytest.mark.long)])
def test_starts_of_one_name_at_one_moment_do_not_collide(wrapper, count):
    tamper(wrapper, SAME_NAME)
    results = start_at_once(wrapper, count)
    assert {(status, stderr) for status, _, stderr in results} == {(0, b'')}
    printed = [json.loads(stdout.decode()) for _, stdout, _ in results]
    assert len({path for paths in printed for path in paths.values()}) == 3 * count
    for paths in printed:
        eventually(lambda path=paths['state_file']: finished(path), 'the state is final')


# Another job of the same name ends, and leaves its state and logs, while this one claims the name.
ENDED = SAME_NAME + """
def create_exclusively(name, mode, directory_fd, real=module.create_exclusively):
    if name.endswith('-4242-wrapper.log'):
        with open({state!r}, 'x') as stream:
            stream.write({other!r})
        raise FileExistsError(17, 'File exists')
    return real(name, mode, directory_fd)


module.create_exclusively = create_exclusively
"""


@pytest.mark.promise(9)
def test_the_state_of_a_job_that_ended_meanwhile_stays(wrapper):
    state = os.path.join(wrapper.state_dir, 'v2v-import-20010909T014640-4242.state')
    other = json.dumps({'started': True, 'disks': [], 'finished': True})
    tamper(wrapper, ENDED.format(state=state, other=other))
    job = wrapper.start()
    assert job.wait_finished()['return_code'] == 0
    with open(state) as stream:
        assert stream.read() == other


# Another job of the same name, which is faster by a moment. It makes its files exclusively, too,
# and goes away if the first of them is there.
FASTER = SAME_NAME + """
locks = []


def other(path):
    with open(path, 'x') as stream:
        stream.write('other')
    with open({made!r}, 'a') as stream:
        print(path, file=stream)
    if path.endswith('.lock'):
        locks.append(open(path))
        module.fcntl.flock(locks[0], module.fcntl.LOCK_EX)


def create_exclusively(name, mode, directory_fd, real=module.create_exclusively):
    if name.endswith({moment!r}):
        try:
            for path in {others!r}:
                other(path)
        except FileExistsError:
            pass
    return real(name, mode, directory_fd)


module.create_exclusively = create_exclusively
"""


@pytest.mark.parametrize('moment, states', [('.tmp', 'state'), ('-wrapper.log', 'other')])
def test_a_name_taken_meanwhile_leaves_the_other_s_files_alone(wrapper, moment, states):
    """Both saw that there was no state, or both have their lock, in directories of their own."""
    other_states = os.path.join(wrapper.home, states)
    make_directories(wrapper)
    os.makedirs(other_states, exist_ok=True)
    os.chmod(other_states, 0o755)
    os.chown(other_states, wrapper.user.pw_uid, wrapper.user.pw_gid)
    others = [os.path.join(other_states, STEM + '.lock'),
              os.path.join(wrapper.log_dir, STEM + '-wrapper.log'),
              os.path.join(wrapper.log_dir, STEM + '.log'),
              os.path.join(other_states, STEM + '.state')]
    list_of_made = os.path.join(wrapper.home, 'made')
    tamper(wrapper, FASTER.format(made=list_of_made, others=others, moment=moment))
    job = wrapper.start()
    assert job.wait_finished()['return_code'] == 0
    wrapper.wait_gone()
    assert open_and_read(list_of_made).splitlines() == others
    assert {open_and_read(path) for path in others} == {'other'}
    assert sorted(os.listdir(wrapper.state_dir) + os.listdir(wrapper.log_dir)) == sorted(
        os.path.basename(path) for path in job.paths + tuple(others)
        if os.path.dirname(path) in (wrapper.state_dir, wrapper.log_dir))


def open_and_read(path):
    """Return the text in a file."""
    with open(path) as stream:
        return stream.read()


def test_jobs_with_other_log_directories_share_no_state_file(wrapper):
    """Both have chosen the same name, and neither has its lock, when they go on."""
    tamper(wrapper, SAME_NAME + """
def create_exclusively(name, *arguments, real=module.create_exclusively):
    if name.endswith('.tmp'):
        open('{home}/named-%d' % real_getpid(), 'w').close()
        while not os.path.exists('{home}/go'):
            module.time.sleep(0.01)
    return real(name, *arguments)


module.create_exclusively = create_exclusively
""".format(home=wrapper.home))
    other_logs = wrapper.arguments[2:] + ['--log-dir', os.path.join(wrapper.home, 'log2')]
    starts = [wrapper.begin(), wrapper.begin(None, *other_logs)]
    eventually(lambda: len([name for name in wrapper.files() if 'named' in name]) == 2,
               'the names are chosen')
    open(os.path.join(wrapper.home, 'go'), 'w').close()
    results = []
    for process in starts:
        with process:
            results.append(json.loads(process.communicate(timeout=60)[0].decode())['state_file'])
    wrapper.wait_gone()
    assert results[0] != results[1]


def test_when_all_names_are_taken_the_start_is_refused(wrapper):
    tamper(wrapper, SAME_NAME)
    make_directories(wrapper)
    taken = [STEM] + ['{}-{}'.format(STEM, number) for number in range(2, 100)]
    for name in taken:
        open(os.path.join(wrapper.log_dir, name + '.log'), 'w').close()
    job = wrapper.start()
    assert (job.status, job.stdout, job.stderr) == (
        1, b'', error_line(wrapper.log_dir + ': all names for a job are taken'))
    assert sorted(os.listdir(wrapper.log_dir)) == sorted(name + '.log' for name in taken)
    assert os.listdir(wrapper.state_dir) == []


# --- nothing of a job that was refused ---------------------------------------------------

def test_a_start_that_fails_leaves_only_the_files_of_others(wrapper):
    make_directories(wrapper)
    other = os.path.join(wrapper.state_dir, 'v2v-import-20010101T000000-1.state')
    file_of_the_caller_s(other, None)
    with open(wrapper.virt_v2v.program, 'w') as stream:
        stream.write('#!/nonexistent\n')
    job = wrapper.start()
    assert job.status == 1
    wrapper.wait_gone()
    assert os.listdir(wrapper.log_dir) == []
    assert os.listdir(wrapper.state_dir) == [os.path.basename(other)]


def acl_tool():
    """Return setfacl; skip without it."""
    try:
        subprocess.check_output(['setfacl', '--version'])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('needs setfacl')
    return 'setfacl'


def test_a_directory_that_an_access_list_opens_is_refused(wrapper):
    make_directories(wrapper)
    if subprocess.call([acl_tool(), '-m', 'u:daemon:rwx', wrapper.state_dir]) != 0:
        pytest.skip('this file system has no access lists')
    assert_refused(
        wrapper, '--state-dir {0}: others may write to it (mode 0775), expected {1} alone: chmod'
        ' go-w {0}'.format(wrapper.state_dir, wrapper.user.pw_name))


def test_a_wrapper_killed_after_its_first_state_leaves_no_file(wrapper):
    tamper(wrapper, """
def write(*arguments, real=module.StateFile.write, **keywords):
    real(*arguments, **keywords)
    os.kill(os.getpid(), signal.SIGKILL)


module.StateFile.write = write""")
    assert wrapper.start().status == 1
    wrapper.wait_gone()
    assert os.listdir(wrapper.state_dir) == []
