"""Looking for a text everywhere where others could read it: processes, files, their names."""
import os
import stat

import processes
from faults import tamper

# Where every user may write; what else a job writes is in the directory of its test.
PUBLIC = ('/tmp', '/var/tmp', '/dev/shm', '/run')
BLOCK = 1 << 20


def places(needle, wrapper, since):
    """Return where needle (bytes) is to be found: names of files, directories and processes.

    Files elsewhere than in the directory of the wrapper are searched if they were changed at
    the time since or later. The stand-in notes down the password that it reads: that is none.
    """
    found = in_processes(needle) + in_files(needle, wrapper.directory, 0)
    for directory in PUBLIC:
        found += in_files(needle, directory, since)
    notes = os.path.join(wrapper.directory, 'stand-in', 'runs', '')
    return sorted(place for place in set(found) if not place.startswith(notes))


def in_processes(needle):
    """Return the command lines and environments, as paths below /proc, that have needle."""
    paths = ['/proc/%s/%s' % (process, name) for name in ('cmdline', 'environ', 'comm')
             for process in os.listdir('/proc') if process.isdigit()]
    return [path for path in paths if holds(path, needle)]


def in_files(needle, directory, since):
    """Return the paths below directory that have needle in their name or contents.

    What was not changed since then is passed over, with all that is in it.
    """
    found = []
    for parent, directories, names in os.walk(directory):
        found += [os.path.join(parent, name) for name in directories + names
                  if needle in os.fsencode(name)]
        directories[:] = changed(stat.S_IFDIR, parent, directories, since)
        paths = [os.path.join(parent, name)
                 for name in changed(stat.S_IFREG, parent, names, since)]
        found += [path for path in paths if holds(path, needle)]
    return found


def changed(kind, directory, names, since):
    """Return those of the names in directory that are of a kind and were changed since then."""
    found = []
    for name in names:
        try:
            status = os.lstat(os.path.join(directory, name))
        except OSError:
            continue
        if stat.S_IFMT(status.st_mode) == kind and status.st_ctime >= since:
            found.append(name)
    return found


def holds(path, needle):
    """Say whether a file that can be read has needle in it."""
    rest = b''
    try:
        with open(path, 'rb', 0) as stream:
            for block in iter(lambda: stream.read(BLOCK), b''):
                if needle in rest + block:
                    return True
                rest = block[-len(needle):]
    except OSError:
        pass
    return False


def allow_looking_into(wrapper):
    """Have processes of jobs that their own user can look into as well, not only root."""
    tamper(wrapper, 'module._PR_SET_DUMPABLE = 3    # PR_GET_DUMPABLE')


def secret_descriptors(process):
    """Return the descriptors of a process that are open on files in memory."""
    return [number for number, name in processes.descriptors(process).items()
            if name.startswith('/memfd:') or name.startswith('/dev/shm/')]
