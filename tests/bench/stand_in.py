"""What virt-v2v does in the benchmark: one of the functions below, by name.

    python3 -I -S stand_in.py DIRECTORY NAME [NUMBER...] -- VIRT-V2V_ARGUMENT...

In DIRECTORY are the gates: files that the benchmark has locked, until it lets the stand-in go on.
Waiting for a lock costs nobody anything. "notes" is where the stand-in writes what it did when, by
the clock that all processes share. Imports are few, because there may be a hundred of it.
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

    def __init__(self, directory, messages):
        self._directory = directory
        self._messages = messages

    def write(self, data, fd=1):
        """Write bytes to the output, or to another descriptor."""
        while data:
            data = data[os.write(fd, data):]

    def phase(self, text):
        """Say what goes on: the message, then the line of the same text."""
        if self._messages is not None:
            self.write(b'{ "message": "%s", "type": "message" }\n' % text, self._messages)
        self.write(b'[   1.0] %s\n' % text)

    def wait(self, gate):
        """Wait until the benchmark opens a gate."""
        with open(os.path.join(self._directory, gate)) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)

    def note(self, *notes):
        """Leave pairs of numbers for the benchmark."""
        with open(os.path.join(self._directory, 'notes'), 'w') as stream:
            stream.write(''.join('%r %r\n' % note for note in notes))

    # --- what it may do ------------------------------------------------------------------

    def silent(self):
        """Say nothing."""
        self.wait('end')

    def recorded(self):
        """Write the log that the benchmark prepared."""
        with open(os.path.join(self._directory, 'plan'), 'rb') as stream:
            plan = marshal.load(stream)
        self.wait('go')
        for message, data, count in plan:
            if self._messages is not None:
                self.write(message, self._messages)
            for _ in range(count):
                self.write(data)
        self.wait('end')

    def bars(self, count, milliseconds):
        """Copy disks, each in a hundred steps."""
        notes = []
        for step in range(count):
            disk, percent = divmod(step, 100)
            if percent == 0:
                self.phase(b'Copying disk %d/%d' % (disk + 1, (count + 99) // 100))
                time.sleep(milliseconds / 1000)
            line = (BAR % (percent + 1, ('*' * (percent * 2 // 5)).ljust(40, '-'))).encode()
            notes.append((disk * 100 + percent + 1, time.monotonic()))
            self.write(line)
            time.sleep(milliseconds / 1000)
        self.note(*notes)

    def ratios(self, count, milliseconds):
        """Copy one disk in many small steps."""
        self.phase(b'Copying disk 1/1')
        notes = []
        for step in range(1, count + 1):
            line = (RATIO % (step / 100)).encode()
            notes.append((step / 100, time.monotonic()))
            self.write(line)
            time.sleep(milliseconds / 1000)
        self.note(*notes)

    def flood(self, count, seconds):
        """Copy one disk, with count lines of progress, evenly over so many seconds."""
        self.phase(b'Copying disk 1/1')
        self.wait('go')
        start, blocks = time.monotonic(), seconds * 100
        for block in range(blocks):
            steps = range(block * count // blocks, (block + 1) * count // blocks)
            self.write(''.join(RATIO % (10000 * step // count / 100) for step in steps).encode())
            time.sleep(max(0, start + (block + 1) / 100 - time.monotonic()))
        self.wait('end')

    def brief(self):
        """End."""
        self.phase(b'Finishing off')
        self.wait('go')
        self.note((0, time.monotonic()))

    def steady(self, seconds, writes):
        """Write 1 MB of log in each second, by so many writes; then be silent."""
        line = b'nbdkit: vddk[3]: debug: vddk: pread count=2097152 offset=1073741824 flags=0\n'
        block = (line * (1000000 // len(line) + 1))[:1000000 // writes]
        self.phase(b'Copying disk 1/1')
        self.wait('go')
        # Not all in step: the first write is anywhere in the first interval.
        start = time.monotonic() + os.getpid() % 97 / 97 / writes
        for step in range(seconds * writes):
            time.sleep(max(0, start + step / writes - time.monotonic()))
            self.write(block)
        self.wait('end')


def message_descriptor(arguments):
    """Return the descriptor that JSON messages are to go to, or None."""
    for argument in arguments:
        if argument.startswith('--machine-readable=fd:'):
            return int(argument.rpartition(':')[2])
    return None


def main(directory, name, *arguments):
    """Do what name says."""
    end = arguments.index('--')
    stand_in = StandIn(directory, message_descriptor(arguments[end:]))
    getattr(stand_in, name)(*map(int, arguments[:end]))


if __name__ == '__main__':
    main(*sys.argv[1:])
    os._exit(0)
