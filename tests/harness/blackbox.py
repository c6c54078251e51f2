"""Running the real script as a process, against a stand-in for virt-v2v.

A test gets a Wrapper by a fixture: "wrapper" runs the script as an ordinary user, "root_wrapper"
as root, so that it becomes vdsm. Everything lies in a directory of that test alone:

    bin/virt-v2v            the stand-in (Wrapper.virt_v2v, see virt_v2v.py)
    virt-v2v-wrapper.py     a copy of the script, where every user can read it
    export/UUID/...         the export domain
    vddk/lib64/...          the VDDK library
    home/log, home/state    made by the wrapper, in a home that belongs to the user it runs as
"""
import collections
import fcntl
import functools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys

import processes
from eventually import eventually
from schemas import read_json, read_state
from script import SCRIPT
from virt_v2v import StandIn, reach, wait

DOMAIN = '0c8d2c6a-0000-4000-8000-0123456789ab'
PASSWORD = 'needle-6f1d2c'
ABSENT = object()


def valid_request(**overrides):
    """Return a request that is valid but for the overrides; ABSENT takes a key out."""
    request = {
        'vm_name': 'vm',
        'transport_method': 'vddk',
        'vmware_uri': 'esx://root@esx.example.com?no_verify=1',
        'vmware_password': PASSWORD,
        'vmware_fingerprint': ':'.join(['0A'] * 20),
        'export_domain': '/export',
    }
    request.update(overrides)
    return {key: value for key, value in request.items() if value is not ABSENT}


# --- users -------------------------------------------------------------------------------

def ordinary_user():
    """Return the entry in the user database to run as: nobody if the tests run as root."""
    return pwd.getpwuid(os.getuid()) if os.getuid() else pwd.getpwnam('nobody')


def vdsm_problem():
    """Return why the wrapper cannot be started as root here, or None."""
    if os.getuid() != 0:
        return 'needs root'
    try:
        pwd.getpwnam('vdsm')
    except KeyError:
        return 'there is no user vdsm (tests/run provides one)'
    return None


@functools.lru_cache(maxsize=None)
def interpreter_for(user):
    """Return the interpreter that runs these tests, by a path that the user can run it by.

    AssertionError if there is none: another interpreter would prove nothing about this one.
    """
    # Not the virtual environment's: that one may lie where the user cannot go.
    interpreter = os.path.realpath(sys.executable)
    try:
        subprocess.check_call([interpreter, '-I', '-c', 'import json'],
                              cwd='/', preexec_fn=functools.partial(become, user))
    except (OSError, subprocess.CalledProcessError):
        raise AssertionError('user %s cannot run %s: start the tests by tests/run'
                             % (user.pw_name, interpreter)) from None
    return interpreter


def become(user, umask=0o022):
    """Change this process to another user, for good; do nothing if it is that user."""
    os.umask(umask)
    if os.getuid() != user.pw_uid:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)


# --- a started job -----------------------------------------------------------------------

Paths = collections.namedtuple('Paths', 'wrapper_log v2v_log state_file')


class Job:
    """What the caller of the wrapper got: status, stdout, stderr, and the paths if printed."""

    damaged = False     # set by a test that writes something else into the state file

    def __init__(self, status, stdout, stderr):
        self.status = status
        self.stdout = stdout
        self.stderr = stderr
        self.answer = json.loads(stdout.decode()) if stdout else {}
        self.paths = Paths(*map(self.answer.get, Paths._fields)) if stdout else None
        self.ignored_keys = self.answer.get('ignored_keys')

    def __repr__(self):
        return 'Job(%r, %r, %r)' % (self.status, self.stdout, self.stderr)

    @property
    def lock_file(self):
        """The path of the file that is there, and locked, while the job lives."""
        return os.path.splitext(self.paths.state_file)[0] + '.lock'

    def is_alive(self):
        """Say whether the lock file is there and locked."""
        try:
            with open(self.lock_file) as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def state(self):
        """Return the state file's contents, as the schema says if no test has damaged them."""
        return (read_json if self.damaged else read_state)(self.paths.state_file)

    def log(self, name):
        """Return the bytes of "wrapper_log" or "v2v_log"."""
        with open(getattr(self.paths, name), 'rb') as stream:
            return stream.read()

    def wait_state(self, condition, what):
        """Wait until condition(state) is true; return that state."""
        def reached():
            state = self.state()
            return condition(state) and state
        try:
            return eventually(reached, what)
        except AssertionError as error:
            raise AssertionError('%s\n%s\n%s' % (
                error, self.state(), self.log('wrapper_log').decode('utf-8', 'replace'))) from None

    def wait_finished(self):
        """Wait until the state is final; return it."""
        return self.wait_state(lambda state: 'finished' in state, 'the state is final')


# --- the wrapper -------------------------------------------------------------------------

class Wrapper:
    """The script and all that it needs; caller starts it, user is whom it runs as."""

    def __init__(self, name, directory, caller, user):
        self.name = name                        # in the environment of all its processes
        self.directory = directory
        self.caller = caller
        self.user = user
        self.home = self._make('home', mine=True)
        self.log_dir = os.path.join(self.home, 'log')
        self.state_dir = os.path.join(self.home, 'state')
        self.vddk_libdir = self._make('vddk')
        self.export_domain = self._make('export')
        self.script = os.path.join(directory, 'virt-v2v-wrapper.py')
        self.arguments = ['--log-dir', self.log_dir, '--state-dir', self.state_dir,
                          '--vddk-libdir', self.vddk_libdir]
        self.virt_v2v = None
        self._requests = 0
        self._furnish()

    def _make(self, *names, mine=False):
        path = os.path.join(self.directory, *names)
        os.mkdir(path)
        os.chmod(path, 0o755)
        if mine:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        return path

    def _furnish(self):
        for names in ((), ('images',), ('master',), ('master', 'vms'), ('dom_md',)):
            self._make('export', DOMAIN, *names, mine=True)
        library = os.path.join(self._make('vddk', 'lib64'), 'libvixDiskLib.so.7')
        open(library, 'w').close()
        shutil.copyfile(SCRIPT, self.script)
        os.chmod(self.script, 0o755)
        self.use('2.2.0')

    def use(self, generation):
        """Have a virt-v2v of another generation instead; return the stand-in."""
        if self.virt_v2v is not None:
            shutil.rmtree(os.path.join(self.directory, 'bin'))
            shutil.rmtree(os.path.join(self.directory, 'stand-in'))
        self.virt_v2v = StandIn(self.directory, generation)
        return self.virt_v2v

    def add_program(self, name, text):
        """Put another program on the wrapper's PATH; return its path."""
        path = os.path.join(self.virt_v2v.bin, name)
        with open(path, 'w', encoding='utf-8') as stream:
            stream.write(text)
        os.chmod(path, 0o755)
        return path

    def request(self, **overrides):
        """Return a request for this export domain, valid but for the overrides.

        Each is for another guest: vm, vm-2, vm-3 ... A guest has one job at a time.
        """
        self._requests += 1
        name = 'vm' if self._requests == 1 else 'vm-%d' % self._requests
        return valid_request(**dict({'export_domain': self.export_domain, 'vm_name': name},
                                    **overrides))

    def request_file(self):
        """Return an open file with such a request."""
        path = os.path.join(self.directory, 'request.json')
        with open(path, 'w') as stream:
            json.dump(self.request(), stream)
        os.chmod(path, 0o644)
        return open(path, 'rb')

    def environment(self, **overrides):
        """Return the environment that the wrapper is started with; None takes one out."""
        environment = {
            # Alone: the system may have a real virt-v2v.
            'PATH': self.virt_v2v.bin,
            'HOME': self.home,
            processes.MARK: self.name,
        }
        environment.update(overrides)
        return {name: value for name, value in environment.items() if value is not None}

    def command(self, *arguments):
        """Return the command line that starts the wrapper; by default with its directories."""
        return [interpreter_for(self.user), '-IS', self.script] + list(arguments or self.arguments)

    def popen(self, *arguments, umask=0o022, environment=None, prepare=None, **others):
        """Start the wrapper as its caller would; the keywords are Popen's but for three.

        umask and environment (see there for overrides) are what the wrapper is started with;
        prepare is called in the new process before it becomes the caller.
        """
        def prepare_process():
            # A worker of pytest-xdist ignores the first, nohup the second; a caller does not.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            if prepare is not None:
                prepare()
            become(self.caller, umask)
        settings = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        cwd='/', env=self.environment(**(environment or {})),
                        preexec_fn=prepare_process)
        settings.update(others)
        return subprocess.Popen(self.command(*arguments), **settings)

    def begin(self, request=None, *arguments, **keywords):
        """Start the wrapper and give it a request, by default a valid one; return its process."""
        process = self.popen(*arguments, **keywords)
        process.stdin.write(json.dumps(request or self.request()).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def start(self, request=None, *arguments, **keywords):
        """Start the wrapper with a request (dict or bytes; by default a valid one) on stdin.

        Returns a Job when the script has ended and released its stdout and stderr, as an ssh
        client would. arguments replace its directories, keywords are those of popen.
        """
        if request is None:
            request = self.request()
        if not isinstance(request, bytes):
            request = json.dumps(request).encode('utf-8')
        process = self.popen(*arguments, **keywords)
        with process:
            try:
                stdout, stderr = process.communicate(request, timeout=60)
            except BaseException:
                process.kill()
                raise
        return Job(process.returncode, stdout, stderr)

    def start_waiting(self, *steps, **keywords):
        """Start a job that plays steps, then waits for "end"; return it when it waits.

        The keywords are those of start.
        """
        self.virt_v2v.play(*steps, reach('waiting'), wait('end'))
        job = self.start(**keywords)
        self.virt_v2v.wait_for('waiting')
        return job

    def recorded(self):
        """Return what the only run of virt-v2v was given (virt_v2v.Run)."""
        return self.virt_v2v.run()

    def processes(self):
        """Return {process ID: command line} of all that is running here."""
        return processes.marked(self.name)

    def wait_gone(self):
        """Wait until no process of any of its jobs is left."""
        try:
            eventually(lambda: not self.processes(), 'all processes have ended')
        except AssertionError:
            raise AssertionError('these go on: %s' % self.processes()) from None

    def files(self):
        """Return the paths, below its home, of all files and directories there, sorted."""
        found = []
        for directory, directories, names in os.walk(self.home):
            found += [os.path.relpath(os.path.join(directory, name), self.home)
                      for name in directories + names]
        return sorted(found)
