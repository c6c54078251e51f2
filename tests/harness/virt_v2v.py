"""A stand-in for virt-v2v: what a test says that it does, and what it was given.

    stand_in = StandIn(directory, generation='2.2.0')
    stand_in.play(phase('Opening the source'), copying(1, 1), bar(44), reach('half'),
                  wait('go'), bar(100))
    ...                             # start the wrapper with stand_in.bin first on its PATH
    stand_in.wait_for('half')       # until that step was reached
    stand_in.let('go')              # let it go on
    stand_in.run().arguments        # what it was started with

It also answers the questions about its capabilities as that generation of virt-v2v does, and
refuses options that generation does not know. Steps that it plays are tuples: see Player in
stand-in/play.py. The functions below make the usual ones, with the bytes that real versions
write.
"""
import ast
import collections
import json
import os
import shutil
import signal

from eventually import eventually

# As VMware calls the disks of a guest.
DISKS = ['[ds1] vm/vm.vmdk', '[ds1] vm/vm_1.vmdk']
SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'stand-in')


# --- what each generation can do ---------------------------------------------------------

SHORT_OPTIONS = '-b -i -ic -if -n -o -oa -oc -of -on -op -os -q -V -v -x'
LONG_OPTIONS = """
    --bridge --colors --compressed --debug-gc --help --in-place --keys-from-stdin
    --machine-readable --network --password-file --print-source --quiet --qemu-boot --root
    --version --verbose --vdsm-compat --vdsm-image-uuid --vdsm-ovf-output --vdsm-vm-uuid
    --vdsm-vol-uuid --vmtype"""
VDDK_OPTIONS = """
    --vddk-config --vddk-cookie --vddk-libdir --vddk-nfchostport --vddk-port --vddk-snapshot
    --vddk-thumbprint --vddk-transports"""
CAPABILITIES = """
    virt-v2v libguestfs-rewrite vcenter-https xen-ssh colours-option vdsm-compat-option
    input:disk input:libvirt input:libvirtxml input:ova
    output:glance output:libvirt output:local output:null output:qemu output:rhv output:vdsm
    convert:linux convert:windows"""
CAPABILITIES_1_40 = CAPABILITIES + """
    vddk in-place io/oo mac-option input:vmx output:openstack output:rhv-upload
    ovf:ovirt ovf:rhvexp"""
CAPABILITIES_2_2 = CAPABILITIES + """
    virt-v2v-2.0 vddk io/oo mac-option bandwidth-option mac-ip-option input:vmx
    output:kubevirt output:openstack output:rhv-upload ovf:ovirt ovf:rhvexp"""
# From 2.7.16 on: another spelling of the outputs.
CAPABILITIES_2_10 = """
    virt-v2v virt-v2v-2.0 libguestfs-rewrite vcenter-https xen-ssh vddk colours-option
    vdsm-compat-option io/oo mac-option bandwidth-option mac-ip-option parallel-option
    customize-ops block-driver-option
    input:disk input:libvirt input:libvirtxml input:ova input:vmx
    output:disk output:glance output:kubevirt output:libvirt output:null output:openstack
    output:ovirt output:ovirt-upload output:qemu output:vdsm
    convert:linux convert:windows ovf:ovirt ovf:ovirtexp"""
CAPABILITIES_RHEL_10 = ' '.join(
    line for line in CAPABILITIES_2_10.split() if not line.startswith('output:ovirt'))

NO_FD = 'virt-v2v: error: invalid output for --machine-readable: fd:1'
NO_ARGUMENT = ("virt-v2v: option '--machine-readable' doesn't allow an argument\n"
               "Try 'virt-v2v --help' or consult virt-v2v(1) for more information.")

Generation = collections.namedtuple('Generation', 'capabilities options json refusal')


def generation(capabilities, *options, json=True, refusal=NO_FD):
    """Return a Generation: what it prints, has as options, and says to fd:1 if it has no JSON."""
    return Generation(capabilities.split(), ' '.join(options).split(), json, refusal)


BASIC = (SHORT_OPTIONS, LONG_OPTIONS)
GENERATIONS = {
    # No VDDK at all.
    '1.36.13': generation(CAPABILITIES, *BASIC, json=False, refusal=NO_ARGUMENT),
    # 1.36.10 with VDDK: neither -io nor -ip.
    'RHEL 7.5': generation(CAPABILITIES + ' vddk', *BASIC, '-it', VDDK_OPTIONS,
                           json=False, refusal=NO_ARGUMENT),
    # 1.38.4 with -io, but not -ip.
    'RHEL 8.0': generation(CAPABILITIES_1_40, *BASIC, '-it -io -oo', VDDK_OPTIONS,
                           json=False, refusal=NO_ARGUMENT),
    '1.40.2': generation(CAPABILITIES_1_40, *BASIC, '-it -io -ip -oo --mac --key', VDDK_OPTIONS,
                         json=False),
    '1.44.2': generation(CAPABILITIES_1_40, *BASIC, '-it -io -ip -oo --mac --key', VDDK_OPTIONS),
    '2.2.0': generation(CAPABILITIES_2_2, *BASIC, '-it -io -ip -oo --mac --key', VDDK_OPTIONS),
    # Neither --vddk-* nor --password-file.
    '2.10.0': generation(CAPABILITIES_2_10, SHORT_OPTIONS,
                         LONG_OPTIONS.replace('--password-file', ''),
                         '-it -io -ip -oo --mac --key --parallel --block-driver'),
    # No output to oVirt.
    'RHEL 10': generation(CAPABILITIES_RHEL_10, SHORT_OPTIONS,
                          LONG_OPTIONS.replace('--password-file', ''),
                          '-it -io -ip -oo --mac --key --parallel --block-driver'),
}


# --- the stand-in ------------------------------------------------------------------------

class Run:
    """What one run of virt-v2v was given; arguments and environment are bytes."""

    def __init__(self, directory):
        self._directory = directory
        facts = ast.literal_eval(self._read('record').decode())
        self.pid = facts['pid']
        self.group = facts['group']
        self.session = facts['session']
        self.directory = facts['directory']
        self.descriptors = facts['descriptors']     # {number: what it is open on}
        # What is in the files of secrets, by option or, for --key, by device; what the agent has.
        self.secrets, self.agent = facts['secrets'], facts['agent']
        self.password = self.secrets.get('-ip', self.secrets.get('--password-file'))
        # The first two are the shell and the script that it runs.
        self.program, *self.arguments = self._read('cmdline').split(b'\0')[1:-1]
        self.environment = dict(
            entry.split(b'=', 1) for entry in self._read('environ').split(b'\0') if entry)
        self.limits = self._read('limits').decode()
        self.mounts = self._read('mountinfo').decode('utf-8', 'surrogateescape')
        # Uid, Gid, Groups, Umask, SigIgn, SigBlk, CapEff ... as in proc(5), at the start.
        self.status = dict(
            line.split(':\t', 1) for line in self._read('status').decode().splitlines())

    def _read(self, name):
        with open(os.path.join(self._directory, name), 'rb') as stream:
            return stream.read()

    def option(self, name):
        """Return the value that follows an option; ValueError if it was not given."""
        return self.arguments[self.arguments.index(name) + 1]

    def signals(self, kind):
        """Return the set of signal numbers in SigIgn, SigBlk or SigCgt.

        SIGQUIT is left out, which bash ignores. So are 32 and 33: the C library keeps them to
        itself, and its posix_spawn, by which some parent of the tests may have been started,
        ignores them.
        """
        mask = int(self.status[kind], 16)
        return {number for number in range(1, 65)
                if mask & (1 << (number - 1)) and number not in (signal.SIGQUIT, 32, 33)}


class StandIn:
    """A virt-v2v in the directory bin of the given one."""

    def __init__(self, directory, generation='2.2.0'):
        self.bin = os.path.join(directory, 'bin')
        self.program = os.path.join(self.bin, 'virt-v2v')
        self._home = os.path.join(directory, 'stand-in')
        self._generation = GENERATIONS[generation]
        self._install()
        self.play()

    def _install(self):
        os.mkdir(self.bin, 0o755)
        os.mkdir(self._home, 0o755)
        for name in ('answers', 'refused', 'marks', 'runs'):
            os.mkdir(self._path(name))
            os.chmod(self._path(name), 0o777)       # the wrapper may run as another user
        self._write('probes', '', 0o666)
        shutil.copy(os.path.join(SOURCE, 'virt-v2v'), self.program)
        shutil.copy(os.path.join(SOURCE, 'play.py'), self._home)
        os.chmod(self._path('play.py'), 0o644)
        os.chmod(self.program, 0o755)
        self._answer_as(self._generation)

    def _answer_as(self, generation):
        capabilities = '\n'.join(generation.capabilities)
        self.answer('--machine-readable', capabilities)
        if generation.json:
            self.answer('--machine-readable=fd:1', capabilities)
        else:
            self.answer('--machine-readable=fd:1', generation.refusal, refuse=True)
        for question, long in (('--short-options', False), ('--long-options', True)):
            options = [name for name in generation.options if name.startswith('--') is long]
            self.answer(question, '\n'.join(options))

    def _path(self, *names):
        return os.path.join(self._home, *names)

    def _write(self, name, text, mode=0o644):
        with open(self._path(name), 'w', encoding='utf-8') as stream:
            stream.write(text)
        os.chmod(self._path(name), mode)

    def answer(self, question, text, refuse=False):
        """Set the answer to one argument alone; refused: text on stderr and status 1."""
        self._write(os.path.join('answers', question), text + '\n')
        if refuse:
            self._write(os.path.join('refused', question), '')

    def play(self, *steps):
        """Set what the next runs do; with no steps they end at once with status 0."""
        steps = list(flat(steps))
        if 'virt-v2v-2.0' in self._generation.capabilities:
            steps.insert(0, ('exit_on', signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                             signal.SIGQUIT))
        self._write('scenario', repr(self._with_recordings(steps)))

    def _with_recordings(self, steps):
        """Return the steps with the recordings copied to where the stand-in can read them."""
        return [self._with_recording(*step) for step in steps]

    def _with_recording(self, name, *arguments):
        if name == 'replay':
            path, size = arguments
            copy = self._path(os.path.basename(str(path)))
            shutil.copyfile(str(path), copy)
            os.chmod(copy, 0o644)
            return name, os.path.basename(copy), size
        return (name,) + tuple(
            int(value) if isinstance(value, signal.Signals) else
            self._with_recordings(flat(value)) if isinstance(value, list) else value
            for value in arguments)

    def let(self, name):
        """Let the step wait(name) go on."""
        self._write(os.path.join('marks', name), '')

    def wait_for(self, name):
        """Wait until the step reach(name) was played."""
        eventually(lambda: os.path.exists(self._path('marks', name)),
                   'virt-v2v reaches %r' % name)

    def probes(self):
        """Return the questions about capabilities that were asked, in order."""
        with open(self._path('probes')) as stream:
            return stream.read().split()

    def runs(self):
        """Return what every run so far was given, in no order."""
        directories = (self._path('runs', name) for name in os.listdir(self._path('runs')))
        return [Run(directory) for directory in directories
                if os.path.exists(os.path.join(directory, 'record'))]

    def run(self):
        """Return what the only run was given, as soon as it has written that down."""
        run, = eventually(self.runs, 'virt-v2v has started')
        return run


# --- steps -------------------------------------------------------------------------------

def flat(steps):
    """Yield the steps of nested lists of steps."""
    for step in steps:
        if isinstance(step, list):
            yield from flat(step)
        else:
            yield step


def stdout(data):
    """Write bytes to stdout."""
    return ('write', 'stdout', data)


def stderr(data):
    """Write bytes to stderr."""
    return ('write', 'stderr', data)


def machine(data):
    """Write bytes to the descriptor for JSON messages; nothing where there is none."""
    return ('write', 'machine', data)


def json_message(kind, text):
    """Write one JSON message ("message", "info", "warning" or "error")."""
    line = '{ "message": %s, "timestamp": "%s", "type": "%s" }\n' % (
        json.dumps(text, ensure_ascii=False), '2026-11-23T09:05:59.616252050+00:00', kind)
    return machine(line.encode('utf-8'))


def phase(text, seconds=0.0):
    """Say what it is doing now."""
    line = '[%6.1f] %s\n' % (seconds, text)
    return [json_message('message', text), stdout(line.encode('utf-8'))]


def warning(text):
    """Give a warning."""
    return [json_message('warning', text), stdout(b'virt-v2v: warning: %s\n' % text.encode())]


def error(text):
    """Report an error and end with status 1."""
    return [json_message('error', text), stderr(b'virt-v2v: error: %s\n' % text.encode()),
            leave(1)]


def copying(number, count, to=None):
    """Start to copy a disk; up to 1.45.3 the message says where to."""
    return phase('Copying disk %d/%d' % (number, count) + (' to %s (raw)' % to if to else ''))


def bar(percent):
    """Show progress as 2.x does: nbdcopy's bar."""
    done = round(percent * 40 / 100)
    end = '\n' if percent == 100 else '\r'
    text = '%s %3d%% [%s]%s' % ('█' if percent == 100 else '▐', percent,
                                ('*' * done).ljust(40, '-'), end)
    return stderr(text.encode('utf-8'))


def old_bar(percent):
    """Show progress as 1.x does: qemu-img's."""
    end = b'\r\n' if percent == 100 else b'\r'
    return stdout(b'    (%.2f/100%%)' % percent + end)


def source(path):
    """Run the nbdkit of one source disk, as -v shows it."""
    line = "running nbdkit:\n LANG=C 'nbdkit' '--unix' '/tmp/in0' 'vddk' 'file=%s'\n" % path
    return stderr(line.encode('utf-8'))


def replay(path, size=0):
    """Write a recording, in pieces of so many bytes (0: in one piece)."""
    return ('replay', path, size)


def reach(name):
    """Tell the test that it got here: StandIn.wait_for(name)."""
    return ('touch', name)


def wait(name):
    """Wait for the test: StandIn.let(name)."""
    return ('wait', name)


def ignore(*numbers):
    """Ignore signals."""
    return ('ignore',) + numbers


def fork(*steps):
    """Start a process that plays steps of its own and holds the same pipes."""
    return ('fork', list(steps))


def daemon(*steps):
    """The same in a process group and session of its own."""
    return fork(('setsid',), *steps)


def repeat(count, *steps):
    """Play steps many times."""
    return ('repeat', count, list(steps))


def fill(stream, byte, count):
    """Write one byte many times over to "stdout" or "stderr", without a line end."""
    return ('fill', stream, byte, count)


def leave(status):
    """End with a status."""
    return ('exit', status)


def die(number):
    """Be killed by a signal."""
    return ('kill', number)
