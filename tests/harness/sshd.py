"""A real sshd on the loopback interface."""
import os
import shutil
import socket
import subprocess

import pytest

import namespaces
import processes
from eventually import eventually

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/client_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 1000
"""


def command_path(name):
    """Return the path of a command that may be an administrator's; skip without it."""
    path = shutil.which(name, path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin')
    return path or pytest.skip('needs ' + name)


def own_run():
    """Have in /run what sshd needs there, also where it does not run as a service."""
    if os.getuid() == 0 and not os.path.isdir('/run/sshd'):
        namespaces.own_mounts()
        namespaces.mount('none', '/run', 'tmpfs', options='mode=0755')
        os.mkdir('/run/sshd', 0o755)


def free_port():
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Sshd:
    """It lets in with its key whom it may: root, or else the user who runs the tests."""

    def __init__(self, directory, prepare=own_run):
        os.mkdir(directory)
        os.chmod(directory, 0o755)
        self.port = free_port()
        self._key = os.path.join(directory, 'client_key')
        for name in ('host_key', 'client_key'):
            subprocess.check_call([command_path('ssh-keygen'), '-q', '-t', 'ed25519', '-N', '',
                                   '-f', os.path.join(directory, name)])
        config = os.path.join(directory, 'sshd_config')
        with open(config, 'w') as stream:
            stream.write(CONFIG.format(port=self.port, directory=directory))
        self._log = open(os.path.join(directory, 'sshd.log'), 'w+b')
        self._process = subprocess.Popen(
            [command_path('sshd'), '-D', '-e', '-f', config], cwd=directory, preexec_fn=prepare,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    def ready(self, *options):
        """Wait until one can log in with these options; skip if that cannot be here."""
        eventually(lambda: self._listening() or self._process.poll() is not None, 'sshd listens')
        login = self.popen('true', *options)
        said = login.communicate(timeout=60)[1]
        if login.returncode != 0:
            self.close()
            pytest.skip('cannot log in by ssh here: %r' % said)

    def _listening(self):
        with socket.socket() as probe:
            return probe.connect_ex(('127.0.0.1', self.port)) == 0

    def client(self, *options):
        """Return the command line of a client up to its options; host and command follow."""
        return [command_path('ssh'), '-q', '-F', 'none', '-i', self._key, '-p', str(self.port),
                '-o', 'IdentitiesOnly=yes', '-o', 'BatchMode=yes',
                '-o', 'StrictHostKeyChecking=no', '-o', 'UserKnownHostsFile=/dev/null',
                '-o', 'HostName=127.0.0.1'] + list(options)

    def popen(self, command, *options, **keywords):
        """Execute a command for the shell by ssh."""
        settings = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        settings.update(keywords)
        return subprocess.Popen(self.client(*options) + ['localhost', command],
                                env={'PATH': '/usr/bin:/bin'}, **settings)

    def sessions(self):
        """Return the process IDs of its ends of connections: of each, two for an ordinary user."""
        found = processes.children(self._process.pid)
        return found + [child for process in found for child in processes.children(process)
                        if processes.status(child)['Name'].startswith('sshd')]

    def close(self):
        """Leave nothing of it."""
        self._process.terminate()
        self._process.wait()
        self._log.close()
