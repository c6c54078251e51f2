"""A file system that stops answering, as a dead NFS server does.

    with hung.file_system(directory, user) as storage:
        ...                     # an ordinary directory, in memory, that belongs to the user
        storage.hang()          # who touches it now sleeps, and not even SIGKILL ends that
        storage.release()       # what waits is answered, and it is an ordinary directory again

It is written directly on /dev/fuse: this file, run as a program, is what answers the kernel. A
request that was read and not answered is what holds a process (request_wait_answer in
fs/fuse/dev.c): it waits uninterruptibly after a fatal signal. While it hangs, nobody who has to go
on may touch it, the test itself included.
"""
import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import sys
import time

DEVICE = '/dev/fuse'
PYTHON = '/usr/bin/python3'
# The end of the program is the end of the connection, and so of all waiting; whatever becomes of
# the tests, it comes.
LIFETIME = 150


# --- what a test has of it ---------------------------------------------------------------

class Storage:
    """A file system of its own at a directory."""

    def __init__(self, directory, user):
        self.directory = directory
        # Without the name of the test in its arguments and environment: it is none of the job's.
        self._server = subprocess.Popen(
            [PYTHON, '-I', '-S', os.path.abspath(__file__), str(user.pw_uid), str(user.pw_gid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True, cwd=directory,
            env={})

    def problem(self):
        """Return why it cannot be, or None when it is there."""
        answer = self._server.stdout.readline().rstrip('\n')
        return None if answer == 'ready' else answer or 'no answer'

    def _order(self, order):
        self._server.stdin.write(order + '\n')
        self._server.stdin.flush()
        return [int(word) for word in self._server.stdout.readline().split()]

    def hang(self):
        """Answer nothing from now on."""
        self._order('hang')

    def release(self):
        """Answer what waits, and all that comes."""
        self._order('release')

    def waiting(self):
        """Return the IDs of the processes that wait for an answer."""
        return self._order('who')

    def close(self):
        """Be gone; what waits gets an error."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        subprocess.call(['umount', '-n', '--lazy', self.directory], stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def file_system(directory, user):
    """Have a Storage at a directory, which is made for user; skip where there can be none."""
    import pytest       # the program below does without

    if os.getuid() != 0 or not os.path.exists(DEVICE):
        pytest.skip('needs root and %s, for a file system that hangs' % DEVICE)
    os.makedirs(directory, exist_ok=True)
    storage = Storage(directory, user)
    try:
        problem = storage.problem()
        if problem:
            pytest.skip('cannot have a file system that hangs here: ' + problem)
        yield storage
    finally:
        storage.close()


# --- what answers the kernel: linux/fuse.h -----------------------------------------------

# The names are those of the methods of Server.
OPERATIONS = {
    1: 'lookup', 3: 'getattr', 4: 'setattr', 9: 'mkdir', 10: 'unlink', 11: 'rmdir', 12: 'rename',
    13: 'link', 14: 'open', 15: 'read', 16: 'write', 17: 'statfs', 18: 'release', 20: 'fsync',
    25: 'flush', 26: 'init', 27: 'open', 28: 'readdir', 29: 'release', 30: 'fsync', 35: 'create',
    45: 'rename2'}
UNANSWERED = (2, 36, 42)        # FORGET, INTERRUPT, BATCH_FORGET
ROOT = 1
MAX_WRITE = 1 << 17
ATOMIC_TRUNCATE, BIG_WRITES, PARALLEL = 1 << 3, 1 << 5, 1 << 18
SET_MODE, SET_UID, SET_GID, SET_SIZE = 1, 2, 4, 8
MS_NOSUID_NODEV = 2 | 4


class Node:
    """A file or a directory."""

    def __init__(self, number, mode, uid, gid):
        self.number = number
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.links = 1
        self.changed = time.time()
        self.data = bytearray()
        self.entries = {}           # name: Node

    def attributes(self):
        """Return struct fuse_attr."""
        seconds = int(self.changed)
        nanoseconds = int((self.changed - seconds) * 1e9)
        return struct.pack('=6Q10I', self.number, len(self.data), len(self.data) // 512,
                           seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds,
                           self.mode, self.links, self.uid, self.gid, 0, 4096, 0)

    def entry(self):
        """Return struct fuse_entry_out; nothing is to be remembered of it."""
        return struct.pack('=4Q2I', self.number, 0, 0, 0, 0, 0) + self.attributes()


def name_of(data):
    """Return the first of the names in data, each of which ends in NUL."""
    return data.split(b'\0')[0]


class Server:
    """Answers requests.

    A method takes the node that it is about and what follows the header, and returns the bytes of
    the answer, None for none.
    """

    def __init__(self, uid, gid):
        self._nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755, uid, gid)}
        self._caller = (0, 0)

    def answer(self, request):
        """Return the answer to a request (bytes), None if there is none."""
        _, operation, unique, number, uid, gid, _, _ = struct.unpack_from('=IIQQIIII', request)
        if operation in UNANSWERED:
            return None
        self._caller = (uid, gid)
        method = getattr(self, OPERATIONS.get(operation, ''), None)
        error, data = -errno.ENOSYS, b''
        if method:
            try:
                error, data = 0, method(self._nodes.get(number), request[40:]) or b''
            except OSError as failure:
                error = -failure.errno
        return struct.pack('=IiQ', 16 + len(data), error, unique) + data

    def _child(self, directory, name):
        try:
            return directory.entries[name]
        except KeyError:
            raise OSError(errno.ENOENT, name) from None

    def _make(self, directory, name, mode):
        if name in directory.entries:
            raise OSError(errno.EEXIST, name)
        number = max(self._nodes) + 1
        node = self._nodes[number] = Node(number, mode, *self._caller)
        directory.entries[name] = node
        return node

    def init(self, _, data):
        """Say what is spoken here."""
        return struct.pack('=4I2H2I2HI7I', 7, 31, 0, ATOMIC_TRUNCATE | BIG_WRITES | PARALLEL,
                           16, 12, MAX_WRITE, 1, 0, 0, 0, *[0] * 7)

    def lookup(self, directory, data):
        """Return the entry of a name in a directory."""
        return self._child(directory, name_of(data)).entry()

    def getattr(self, node, _):
        """Return the attributes."""
        return struct.pack('=Q2I', 0, 0, 0) + node.attributes()

    def setattr(self, node, data):
        """Change some attributes, such as the size."""
        valid, _, _, size = struct.unpack_from('=2I2Q', data)
        mode, _, uid, gid = struct.unpack_from('=4I', data, 68)
        if valid & SET_MODE:
            node.mode = mode
        if valid & SET_UID:
            node.uid = uid
        if valid & SET_GID:
            node.gid = gid
        if valid & SET_SIZE:
            node.data[size:] = bytes(max(0, size - len(node.data)))
        return self.getattr(node, data)

    def mkdir(self, directory, data):
        """Make a directory."""
        mode, umask = struct.unpack_from('=2I', data)
        return self._make(directory, name_of(data[8:]), stat.S_IFDIR | mode & ~umask).entry()

    def unlink(self, directory, data):
        """Remove the name of a file."""
        self._child(directory, name_of(data)).links -= 1
        del directory.entries[name_of(data)]

    def rmdir(self, directory, data):
        """Remove an empty directory."""
        if self._child(directory, name_of(data)).entries:
            raise OSError(errno.ENOTEMPTY, '')
        del directory.entries[name_of(data)]

    def _rename(self, directory, target, names):
        old, new = names.split(b'\0')[:2]
        node = self._child(directory, old)
        if new in target.entries:
            target.entries[new].links -= 1
        target.entries[new] = node
        del directory.entries[old]

    def rename(self, directory, data):
        """Give an entry another name or place."""
        self._rename(directory, self._nodes[struct.unpack_from('=Q', data)[0]], data[8:])

    def rename2(self, directory, data):
        """The same with flags, of which none is known."""
        target, flags = struct.unpack_from('=QI', data)
        if flags:
            raise OSError(errno.EINVAL, '')
        self._rename(directory, self._nodes[target], data[16:])

    def link(self, directory, data):
        """Give a file one more name."""
        name = name_of(data[8:])
        if name in directory.entries:
            raise OSError(errno.EEXIST, name)
        node = directory.entries[name] = self._nodes[struct.unpack_from('=Q', data)[0]]
        node.links += 1
        return node.entry()

    def open(self, node, data):
        """Open a file or a directory."""
        if struct.unpack_from('=I', data)[0] & os.O_TRUNC:
            node.data.clear()
        return struct.pack('=Q2I', 0, 0, 0)

    def create(self, directory, data):
        """Make a file and open it."""
        mode, umask = struct.unpack_from('=2I', data, 4)
        node = self._make(directory, name_of(data[16:]), stat.S_IFREG | mode & ~umask)
        return node.entry() + struct.pack('=Q2I', 0, 0, 0)

    def read(self, node, data):
        """Return a part of a file."""
        _, offset, size = struct.unpack_from('=2QI', data)
        return bytes(node.data[offset:offset + size])

    def write(self, node, data):
        """Write to a file."""
        _, offset, size = struct.unpack_from('=2QI', data)
        node.data[len(node.data):] = bytes(max(0, offset - len(node.data)))
        node.data[offset:offset + size] = data[40:40 + size]
        node.changed = time.time()
        return struct.pack('=2I', size, 0)

    def readdir(self, directory, data):
        """Return some of the entries of a directory."""
        _, offset, size = struct.unpack_from('=2QI', data)
        found = b''
        for position, (name, node) in enumerate(sorted(directory.entries.items())):
            entry = struct.pack('=2Q2I', node.number, position + 1, len(name),
                                stat.S_IFMT(node.mode) >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            if position >= offset:
                found += entry
        return found

    def statfs(self, *_):
        """Say that there is room."""
        return struct.pack('=5Q4I6I', 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096,
                           0, *[0] * 6)

    def release(self, *_):
        """Have nothing to do."""

    fsync = flush = release


def mount(device, directory):
    """Mount what the open device answers at directory. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = 'fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions' % device
    if libc.mount(b'hung', os.fsencode(directory), b'fuse', ctypes.c_ulong(MS_NOSUID_NODEV),
                  options.encode()) != 0:
        raise OSError(ctypes.get_errno(), 'mount: ' + os.strerror(ctypes.get_errno()))


class Program:
    """Answers the kernel as long as its standard input says so."""

    def __init__(self, device, server):
        self._device = device
        self._server = server
        self._hung = False
        self._waiting = []

    def run(self):
        """Return at the end of standard input, or after LIFETIME."""
        end = time.monotonic() + LIFETIME
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(0, select.POLLIN)
        while time.monotonic() < end:
            ready = [descriptor for descriptor, _ in poll.poll(1000)]
            if self._device in ready:
                self._take(os.read(self._device, MAX_WRITE + 4096))
            if 0 in ready:
                order = os.read(0, 64)
                if not order:
                    return
                self._obey(order.strip())

    def _take(self, request):
        answer = self._server.answer(request) if not self._hung else None
        if self._hung and struct.unpack_from('=I', request, 4)[0] not in UNANSWERED:
            self._waiting.append(request)
        elif answer is not None:
            self._reply(answer)

    def _reply(self, answer):
        try:
            os.write(self._device, answer)
        except OSError:         # who asked is gone
            pass

    def _obey(self, order):
        self._hung = order == b'hang' or order == b'who' and self._hung
        if not self._hung:
            for request in self._waiting:
                self._reply(self._server.answer(request))
            self._waiting.clear()
        # A request tells who made it (struct fuse_in_header).
        print(*[struct.unpack_from('=I', request, 32)[0] for request in self._waiting], flush=True)


def main(uid, gid):
    """Mount it at the working directory, say so, and serve it."""
    try:
        device = os.open(DEVICE, os.O_RDWR)
        mount(device, os.getcwd())
    except OSError as error:
        print(error.strerror, flush=True)
        return 1
    print('ready', flush=True)
    Program(device, Server(int(uid), int(gid))).run()
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
