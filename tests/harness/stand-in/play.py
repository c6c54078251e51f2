"""Records what virt-v2v was given, then plays the scenario of the test.

    play.py RUN_DIRECTORY VIRT-V2V_ARGUMENT...

The scenario is a list of steps, each a tuple of a name and the arguments of the method of
Player with that name. It is a Python literal, as is the record: reading JSON would take
longer than everything else here. Imports are few for the same reason.
"""
import os
import signal
import sys
import time

# Nothing waits longer than this, so that nothing is left over when a test is interrupted.
PATIENCE = 600.0

WITHOUT_VALUE = {
    '-V', '-q', '-v', '-x', '--color', '--colors', '--colour', '--colours', '--compressed',
    '--debug-gc', '--echo-keys', '--help', '--in-place', '--keys-from-stdin',
    '--machine-readable', '--no-copy', '--print-source', '--qemu-boot', '--quiet', '--verbose',
    '--version', '--wrap',
}


def main(run, *arguments):
    """Record this run in the directory run, then play the scenario."""
    home = os.path.dirname(os.path.dirname(run))
    undo_python_signals()
    record(run, arguments)
    refuse_unknown_options(home, arguments)
    Player(home, arguments).play(literal(home + '/scenario'))
    return 0


def undo_python_signals():
    """Give the signals that Python changed at its start the effect they have on virt-v2v."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def literal(path):
    """Return the value of the Python literal in a file that the tests wrote."""
    with open(path, encoding='utf-8') as stream:
        return eval(stream.read(), {'__builtins__': {}})


def record(run, arguments):
    """Write what the shell could not copy; the file appears when it is complete."""
    facts = {
        'pid': os.getpid(),
        'group': os.getpgrp(),
        'session': os.getsid(0),
        'directory': os.getcwd(),
        'descriptors': open_descriptors(),
        'secrets': secrets(arguments),
        'agent': keys_in_agent(),
    }
    with open(run + '/record.new', 'w', encoding='utf-8') as stream:
        stream.write(repr(facts))
    os.rename(run + '/record.new', run + '/record')


def open_descriptors():
    """Return {number: what it is open on}."""
    found = {}
    for name in os.listdir('/proc/self/fd'):
        try:
            found[int(name)] = os.readlink('/proc/self/fd/' + name)
        except FileNotFoundError:
            pass    # the one that listed the directory
    return found


def secrets(arguments):
    """Return {option, or device of --key: bytes of the file}, as virt-v2v and others read it.

    Each opens it anew, so the second reading has to give the same as the first.
    """
    found = {}
    for option, value in zip(arguments, arguments[1:]):
        if option == '--key':
            option, _, value = value.partition(':file:')
        elif option not in ('-ip', '--password-file', '-op'):
            value = ''
        if value:
            first, second = read(value), read(value)
            found[option] = first if first == second else None
    return found


def keys_in_agent():
    """Return what ssh(1) would be told of the keys in its agent, None without one."""
    if 'SSH_AUTH_SOCK' not in os.environ:
        return None
    with os.popen('/usr/bin/ssh-add -l') as stream:
        return stream.read()


def read(path):
    """Return the bytes of a file."""
    with open(path, 'rb') as stream:
        return stream.read()


def refuse_unknown_options(home, arguments):
    """Exit as getopt does if an option is not one of this version's."""
    known = set()
    for question in ('--short-options', '--long-options'):
        known.update(read(home + '/answers/' + question).decode().split())
    arguments = iter(arguments)
    for argument in arguments:
        option = argument.partition('=')[0] if argument.startswith('--') else argument
        if argument == '--':
            return
        if argument.startswith('-') and option not in known:
            message = "virt-v2v: unrecognized option '%s'\n" % argument
            os.write(2, os.fsencode(message))
            sys.exit(1)
        if option == argument and argument.startswith('-') and option not in WITHOUT_VALUE:
            next(arguments, None)


class Player:
    """Plays steps; the public methods are the steps."""

    def __init__(self, home, arguments):
        self._home = home
        self._descriptors = {'stdout': 1, 'stderr': 2, 'machine': machine_descriptor(arguments)}

    def play(self, steps):
        """Play a list of steps."""
        for name, *arguments in steps:
            getattr(self, name)(*arguments)

    def write(self, stream, data):
        """Write bytes to "stdout", "stderr" or, where there is one, "machine"."""
        descriptor = self._descriptors[stream]
        while data and descriptor is not None:
            data = data[os.write(descriptor, data):]

    def fill(self, stream, byte, count):
        """Write one byte many times over, without a line end, as fast as it is read."""
        block = byte * min(count, 1 << 20)
        while count > 0:
            self.write(stream, block[:count])
            count -= len(block)

    def replay(self, name, size):
        """Write a recording in pieces of size bytes (0: in one), JSON messages to "machine"."""
        for stream, data in recorded_parts(read(self._home + '/' + name), self._descriptors):
            size_now = size or len(data) or 1
            for start in range(0, len(data), size_now):
                self.write(stream, data[start:start + size_now])

    def touch(self, name):
        """Tell the test that this step was reached."""
        open(self._mark(name), 'w').close()

    def wait(self, name):
        """Wait until the test lets it go on."""
        end = time.monotonic() + PATIENCE
        pause = 0.005
        while not os.path.exists(self._mark(name)):
            if time.monotonic() > end:
                os._exit(99)
            time.sleep(pause)
            pause = min(0.1, pause * 1.2)   # hundreds may wait at once

    def repeat(self, count, steps):
        """Play steps several times."""
        for _ in range(count):
            self.play(steps)

    def ignore(self, *numbers):
        """Ignore signals."""
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def exit_on(self, *numbers):
        """End as virt-v2v 2.x does on a signal, unless that was ignored at the start."""
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._exit_on_signal)

    def fork(self, steps):
        """Start a process that plays its own steps; it has the same output pipes."""
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            self.play(steps)
            os._exit(0)

    def setsid(self):
        """Leave the process group and the session."""
        os.setsid()

    def close(self, stream):
        """Close one of the output streams."""
        os.close(self._descriptors[stream])

    def exit(self, status):
        """End with a status, at once."""
        os._exit(status)

    def kill(self, number):
        """Send itself a signal."""
        os.kill(os.getpid(), number)

    def _mark(self, name):
        return '%s/marks/%s' % (self._home, name)

    def _exit_on_signal(self, number, _frame):
        name = signal.Signals(number).name
        os.write(2, ('virt-v2v: Exiting on signal %s\n' % name).encode())
        os._exit(1)


def machine_descriptor(arguments):
    """Return the file descriptor that JSON messages were asked for on, or None."""
    for argument in arguments:
        if argument.startswith('--machine-readable=fd:'):
            return int(argument.rpartition(':')[2])
    return None


def recorded_parts(data, descriptors):
    """Yield (stream, bytes) of a recording that has JSON messages amid the ordinary output.

    Where no messages were asked for, the recording is stdout as it is.
    """
    start = b'{ "message": '
    while data and descriptors['machine'] is not None:
        plain, found, data = data.partition(start)
        yield 'stdout', plain
        if found:
            message, end, data = data.partition(b'\n')
            yield 'machine', found + message + end
    yield 'stdout', data


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
