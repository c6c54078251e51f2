"""Started over a real sshd, also through sudo: it returns at once, and the job survives."""
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess

import pytest

import namespaces
import processes
from blackbox import Job, interpreter_for
from eventually import eventually
from readme import block
from script import SCRIPT
from sshd import Sshd, command_path
from virt_v2v import reach, wait

pytestmark = pytest.mark.promise(6)


@pytest.fixture
def waiting(request):
    """The wrapper with a virt-v2v that waits; it becomes vdsm if root tests it."""
    wrapper = request.getfixturevalue('wrapper' if os.getuid() else 'root_wrapper')
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    yield wrapper
    wrapper.virt_v2v.let('end')


class Host:
    """Where the wrapper is started by ssh with a command; its files are below root here."""

    def __init__(self, wrapper, sshd, command, user=None, root=''):
        self.wrapper, self.sshd, self.command = wrapper, sshd, command
        self._options, self._root = ['-l', user] if user else [], root

    def popen(self, *options, arguments='', **keywords):
        """Start the wrapper; a request is on the client's stdin."""
        return self.sshd.popen(self.command + arguments, *(self._options + list(options)),
                               **keywords)

    def popen_with_file(self, *options, then='', **keywords):
        """Start it with a request that is a file there, and then do something else."""
        with self.wrapper.request_file() as stream:
            return self.popen(*options, arguments=' < ' + shlex.quote(stream.name) + then,
                              **keywords)

    def job(self, line):
        """Return the job that has this answer."""
        answer = {name: self._root + path for name, path in json.loads(line.decode()).items()}
        return Job(0, json.dumps(answer).encode(), b'')


@pytest.fixture
def host(waiting):
    """A host to log in as the user who runs the tests."""
    sshd = Sshd(os.path.join(waiting.directory, 'ssh'))
    sshd.ready()
    words = ['env', '-i'] + ['%s=%s' % pair for pair in waiting.environment().items()]
    yield Host(waiting, sshd, ' '.join(map(shlex.quote, words + waiting.command())))
    sshd.close()


# --- ways to start it --------------------------------------------------------------------

def by_ssh(host):
    """Start a job without a terminal, request on stdin; return it."""
    client = host.popen(stdin=subprocess.PIPE)
    request = json.dumps(host.wrapper.request()).encode()
    stdout, stderr = client.communicate(request, timeout=60)
    assert (client.returncode, stderr) == (0, b'')
    return host.job(stdout)


def with_terminal(host):
    """Start a job with a terminal."""
    client = host.popen_with_file('-tt')
    stdout = client.communicate(timeout=60)[0]
    assert client.returncode == 0
    return host.job(stdout)


def hung_up(host, *options):
    """Start a job without a terminal; the client is killed with the answer just there."""
    with host.popen_with_file(*options) as client:
        line = client.stdout.readline()
        client.kill()
    return host.job(line)


def with_terminal_hung_up(host):
    """The same with a terminal."""
    return hung_up(host, '-tt')


def cut(host):
    """Start a job; the server's end of the connection is killed with the answer just there."""
    with host.popen_with_file(then='; cat', stdin=subprocess.PIPE) as client:
        line = client.stdout.readline()
        for process in host.sshd.sessions():
            with contextlib.suppress(ProcessLookupError):     # one ends with the other
                os.kill(process, signal.SIGKILL)
        client.communicate(timeout=60)
    assert client.returncode == 255
    return host.job(line)


def assert_survive(host, jobs):
    """Check that none has an end before virt-v2v is let go on, and that all end well."""
    virt_v2v = host.wrapper.virt_v2v
    eventually(lambda: len(virt_v2v.runs()) == len(jobs), 'all of them run')
    assert ['finished' in job.state() for job in jobs] == [False] * len(jobs)
    virt_v2v.let('end')
    ends = [job.wait_finished() for job in jobs]
    assert [(end['return_code'], 'failed' in end) for end in ends] == [(0, False)] * len(jobs)


# The hundred take minutes: so many jobs wait at once.
@pytest.mark.parametrize('start, count', [
    (by_ssh, 10), (with_terminal_hung_up, 10), (hung_up, 2), (with_terminal, 2), (cut, 2),
    pytest.param(by_ssh, 100, marks=pytest.mark.long),
    pytest.param(with_terminal_hung_up, 100, marks=pytest.mark.long),
    pytest.param(hung_up, 20, marks=pytest.mark.long),
    pytest.param(with_terminal, 20, marks=pytest.mark.long),
    pytest.param(cut, 20, marks=pytest.mark.long)])
def test_it_returns_at_once_and_the_job_survives(host, start, count):
    if start in (with_terminal, with_terminal_hung_up):
        host.sshd.ready('-tt')
    assert_survive(host, [start(host) for _ in range(count)])


def test_status_and_message_of_a_refusal_arrive(host):
    client = host.popen(stdin=subprocess.PIPE)
    stdout, stderr = client.communicate(b'[]', timeout=60)
    assert (client.returncode, stdout) == (2, b'')
    assert stderr == b'virt-v2v-wrapper: error: request: expected one request, not a list\n'


def test_a_terminal_as_stdin_is_refused(host):
    host.sshd.ready('-tt')
    client = host.popen('-tt')
    said = client.communicate(timeout=60)[0]
    assert client.returncode == 2
    assert said.startswith(b'virt-v2v-wrapper: error: request: is a terminal; give the request on')
    assert host.wrapper.files() == []


# --- where it is installed ---------------------------------------------------------------

MIGRATOR = 'migrator'
MIGRATOR_S_ID = 54322
# Additions of a private /etc/passwd and /etc/shadow; a password that none can match.
ACCOUNTS = {'passwd': '%s:x:%d:%d::/:/bin/sh\n' % (MIGRATOR, MIGRATOR_S_ID, MIGRATOR_S_ID),
            'shadow': '%s:*:19000:0:99999:7:::\n' % MIGRATOR}
# What distributions say in /etc/sudoers, and how the wrapper is found with that.
SUDOERS = {
    'debian': ('Defaults env_reset, use_pty\n'
               'Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin"\n',
               'virt-v2v-wrapper.py'),
    'rhel': ('Defaults env_reset, !visiblepw\n'
             'Defaults secure_path = /sbin:/bin:/usr/sbin:/usr/bin\n',
             '/usr/local/bin/virt-v2v-wrapper.py'),
}
ADDED = ('/usr/local/bin', '/usr/sbin', '/opt')     # directories with more in them
REPLACED = ('/run', '/var/log', '/etc/passwd', '/etc/shadow', '/etc/sudoers')


def write(path, text, mode):
    """Make a file, and its directory."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as stream:
        stream.write(text)
    os.chmod(path, mode)


def install(wrapper, root, defaults):
    """Make below root what a host has where the wrapper is installed, with its lines for sudo."""
    with open(SCRIPT) as stream:
        script = stream.read().partition('\n')[2]
    # sudo takes the environment away, so the mark of the test is an option without effect.
    write(root + '/usr/local/bin/virt-v2v-wrapper.py',
          '#!%s -ISX%s\n%s' % (interpreter_for(wrapper.user), wrapper.name, script), 0o755)
    write(root + '/usr/sbin/virt-v2v',
          '#!/bin/sh\nexec %s "$@"\n' % wrapper.virt_v2v.program, 0o755)
    shutil.copytree(wrapper.vddk_libdir, root + '/opt/vmware-vix-disklib-distrib')
    for name, line in ACCOUNTS.items():
        with open('/etc/' + name) as stream:
            write(root + '/etc/' + name, stream.read() + line, 0o644 if name == 'passwd' else 0o600)
    write(root + '/etc/sudoers', defaults + block('sudoers'), 0o440)
    os.makedirs(root + '/run/sshd')
    for name in ('/run/vdsm', '/var/log/vdsm'):
        os.makedirs(root + name)
        os.chown(root + name, wrapper.user.pw_uid, wrapper.user.pw_gid)


def cover(root):
    """Return a preparation: that what is below root is in place."""
    def prepare():
        namespaces.own_mounts()
        for path in ADDED:
            layers = 'lowerdir=%s:%s' % (root + path, path)
            namespaces.mount('none', path, 'overlay', options=layers)
        for path in REPLACED:
            namespaces.mount(root + path, path, flags=namespaces.MS_BIND)
    return prepare


@pytest.fixture(params=sorted(SUDOERS))
def installed(waiting, request):
    """A host with the wrapper in its place, to log in as root or, for sudo, as MIGRATOR."""
    namespaces.need_namespaces()
    command_path('sudo')
    if processes.status(os.getpid())['NoNewPrivs'] != '0':
        pytest.skip('sudo can do nothing here: no_new_privs is set')
    defaults, name = SUDOERS[request.param]
    root = os.path.join(waiting.directory, 'root')
    install(waiting, root, defaults)
    sshd = Sshd(os.path.join(waiting.directory, 'ssh'), cover(root))
    sshd.ready()
    yield Host(waiting, sshd, 'sudo -n ' + name, MIGRATOR, root)
    sshd.close()


@pytest.mark.parametrize('start', [by_ssh, with_terminal, hung_up, with_terminal_hung_up, cut])
def test_through_sudo_the_job_is_vdsm_s_and_survives(installed, start):
    job = start(installed)
    assert_survive(installed, [job])
    virt_v2v = installed.wrapper.recorded()
    assert virt_v2v.status['Uid'].split() == [str(installed.wrapper.user.pw_uid)] * 4
    assert virt_v2v.environment[b'PATH'] == b'/usr/sbin:/usr/bin:/sbin:/bin'
    assert os.stat(job.paths.state_file).st_uid == installed.wrapper.user.pw_uid


def test_through_sudo_a_refusal_arrives(installed):
    client = installed.popen(stdin=subprocess.PIPE)
    stdout, stderr = client.communicate(b'[]', timeout=60)
    assert (client.returncode, stdout) == (2, b'')
    assert stderr == b'virt-v2v-wrapper: error: request: expected one request, not a list\n'


@pytest.mark.parametrize('arguments', [' --log-dir /etc', ' --list', ' ""'])
def test_sudo_refuses_arguments(installed, arguments):
    client = installed.popen(arguments=arguments, stdin=subprocess.PIPE)
    request = json.dumps(installed.wrapper.request()).encode()
    assert client.communicate(request, timeout=60) == (b'', b'sudo: a password is required\n')
    assert client.returncode == 1
    assert installed.wrapper.virt_v2v.runs() == []


# The client that the README's commands find.
CLIENT = """\
#!/bin/sh
user=${1%%@*}
shift
exec %s "$user@localhost" "$@"
"""


@pytest.mark.parametrize('installed', ['debian'], indirect=True)
def test_the_readme_s_commands_start_it_and_show_its_state(installed):
    command_path('jq')
    directory = installed.wrapper.directory
    client = ' '.join(map(shlex.quote, installed.sshd.client()))
    write(directory + '/client/ssh', CLIENT % client, 0o755)
    installed.wrapper.request_file().close()
    path = directory + '/client:' + os.environ['PATH']
    state = subprocess.check_output(['sh', '-ec', block('ssh')], cwd=directory, timeout=60,
                                    env={'PATH': path})
    with open(directory + '/job.json', 'rb') as stream:
        job = installed.job(stream.read())
    assert json.loads(state.decode()) == job.state()
    assert_survive(installed, [job])
