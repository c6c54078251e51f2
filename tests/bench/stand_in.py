"""What virt-v2v does in the benchmark: the steps in the file "plan", methods of StandIn by name.

    python3 -I -S stand_in.py DIRECTORY VIRT-V2V_ARGUMENT...

In DIRECTORY are the plan and the gates: files that the benchmark has locked, until it lets the
stand-in go on. Waiting for a lock costs nobody anything. "notes" is where the stand-in writes what
it did when, by the clock that all processes share. Imports are few, because there may be a hundred
of it.
"""
import fcntl
import marshal
import os
import sys
import time

BAR = '▌ %3d%% [%s]\r'               # nbdcopy's
RATIO = '    (%.2f/100%%)\r'        # qemu-img's: more values for one disk than nbdcopy has


class StandIn:
    """Writes what virt-v2v writes."""

    def __init__(self, directory, arguments):
        self._directory = directory
        self._messages = next(int(argument.rpartition(':')[2]) for argument in arguments
                              if argument.startswith('--machine-readable=fd:'))
        self._notes = []

    def path(self, name):
        """Return the path of a file that the benchmark knows as well."""
        return os.path.join(self._directory, name)

    def play(self):
        """Do what is planned, and leave the notes."""
        with open(self.path('plan'), 'rb') as stream:
            plan = marshal.load(stream)
        for name, *arguments in plan:
            getattr(self, name)(*arguments)
        if self._notes:
            with open(self.path('notes'), 'w') as stream:
                stream.write(''.join('%r %r\n' % note for note in self._notes))

    # --- steps ---------------------------------------------------------------------------

    def write(self, data, count=1, fd=1):
        """Write bytes to the output, or to another descriptor, several times."""
        for _ in range(count):
            rest = data
            while rest:
                rest = rest[os.write(fd, rest):]

    def phase(self, text):
        """Say what goes on: the message, then the line of the same text."""
        self.write(b'{ "message": "%s", "type": "message" }\n' % text, fd=self._messages)
        self.write(b'[   1.0] %s\n' % text)

    def wait(self, gate):
        """Wait until the benchmark opens a gate."""
        with open(self.path(gate)) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)

    def note(self, value=0):
        """Note the time at which something happens."""
        self._notes.append((value, time.monotonic()))

    def bars(self, milliseconds):
        """Copy a disk in a hundred steps."""
        for percent in range(1, 101):
            line = (BAR % (percent, ('*' * (percent * 2 // 5)).ljust(40, '-'))).encode()
            time.sleep(milliseconds / 1000)
            self.note(percent)
            self.write(line)

    def flood(self, count, seconds):
        """Copy a disk, with count lines of progress, evenly over so many seconds."""
        start, blocks = time.monotonic(), seconds * 100
        for block in range(blocks):
            steps = range(block * count // blocks, (block + 1) * count // blocks)
            self.write(''.join(RATIO % (10000 * step // count / 100) for step in steps).encode())
            time.sleep(max(0, start + (block + 1) / 100 - time.monotonic()))

    def steady(self, seconds, writes):
        """Write 1 MB of log in each second, by so many writes."""
        line = b'nbdkit: vddk[3]: debug: vddk: pread count=2097152 offset=1073741824 flags=0\n'
        block = (line * (1000000 // len(line) + 1))[:1000000 // writes]
        # Not all in step: the first write is anywhere in the first interval.
        start = time.monotonic() + os.getpid() % 97 / 97 / writes
        for step in range(seconds * writes):
            time.sleep(max(0, start + step / writes - time.monotonic()))
            self.write(block)


if __name__ == '__main__':
    StandIn(sys.argv[1], sys.argv[2:]).play()
    os._exit(0)
