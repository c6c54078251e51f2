"""Finding the processes of a test, however far they went from the process that started them.

Each test has a name of its own. It is in the environment of what the test starts (the wrapper
passes LIBGUESTFS_* variables and PATH on to virt-v2v), and in the paths of the arguments, which
can be read even where the environment cannot.
"""
import os

MARK = 'LIBGUESTFS_TEST_JOB'


def marked(name):
    """Return {process ID: command line} of the living processes that carry the name."""
    found = {}
    for entry in os.listdir('/proc'):
        if entry.isdigit() and int(entry) != os.getpid():
            command, environment = _read(entry, 'cmdline'), _read(entry, 'environ')
            # Both are empty for a zombie.
            if name.encode() in command + environment:
                found[int(entry)] = command.replace(b'\0', b' ').decode('utf-8', 'replace')
    return found


def _read(process, name):
    """Return the bytes of a file of a process, none if it is gone or not for us to read."""
    try:
        with open('/proc/%s/%s' % (process, name), 'rb') as stream:
            return stream.read()
    except OSError:
        return b''


def status(process):
    """Return /proc/PID/status as a dict of strings; FileNotFoundError if there is none."""
    try:
        with open('/proc/%d/status' % process) as stream:
            return dict(line.rstrip('\n').split(':\t', 1) for line in stream)
    except ProcessLookupError:      # it ended after the file was opened
        raise FileNotFoundError(process) from None


def state(process):
    """Return the letter for the state of a process: S sleeps, T is stopped, Z is a zombie."""
    return status(process)['State'][0]


def is_running(process):
    """Say whether a process is there and has not ended, with all its threads."""
    try:
        return (state(process) not in 'ZX'
                or len(os.listdir('/proc/%d/task' % process)) > 1)
    except (FileNotFoundError, ProcessLookupError):
        return False


def peak_memory(process):
    """Return the most memory a process ever had, in KiB."""
    return int(status(process)['VmHWM'].split()[0])


def io(process):
    """Return /proc/PID/io as a dict of numbers, proc(5)."""
    with open('/proc/%d/io' % process) as stream:
        return {name: int(value) for name, value in (line.split(': ') for line in stream)}


def children(process):
    """Return the process IDs of the children of a process."""
    with open('/proc/{0}/task/{0}/children'.format(process)) as stream:
        return [int(word) for word in stream.read().split()]


def descriptors(process):
    """Return {number: what it is open on} of a process."""
    directory = '/proc/%d/fd/' % process
    found = {}
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(directory + name)
        except FileNotFoundError:
            pass    # closed meanwhile
    return found
