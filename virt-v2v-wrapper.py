#!/usr/bin/python3 -IS
"""Start the conversion of a VMware guest for oVirt with virt-v2v, and keep its state in a file.

A JSON request on standard input starts one conversion, a job. The command answers at once with one
JSON object, the paths of two logs and of a state file, and leaves. The job goes on in the
background; the state file follows it until the key "finished" appears in it.

What it promises:

* Paths are printed if and only if virt-v2v was executed and the state file exists. Otherwise
  standard error has one line for each problem, and the exit status is not 0.
* The state file is complete JSON at every moment, and every ending is published in it: at once if
  any process of the job is left, else by the next start.
* A job is alive exactly as long as its lock file is locked.
* The password is in no argument list, environment, log or named file.
* Whoever starts it, virt-v2v runs without privileges: started as root, as user vdsm.

Three processes, all of them this script:

    launcher   read the request -> mount if need be -> become vdsm -> fork ... wait ... print
    launch()      |                                                      ^
                  |                                answer: the paths, or the problems
    guardian   check_host() -> prepare(): the files -> fork ... wait ... answer, wait on;
    guard()       |                                       ^   if the monitor was killed: conclude()
                  |                            report: Facts, or problems
    monitor    Conversion(): execute virt-v2v, first state -> report -> follow() -> conclude()
    monitor()     |
                  |
    virt-v2v   -- output pipe  --> OutputLog, Lines -->\
               -- message pipe ------------> Lines --> Parser -> events -> Progress -> StateFile

The launcher does what only root or the caller's own process can do, and waits with a limit: no file
system that hangs can hang the caller. The guardian makes, before it forks the monitor, all that
both need: lock, logs, pipes. Afterwards it touches no file while the monitor lives. Answer and
report are pipes for lines of JSON; Facts are what the report says of a job that runs.

How a job ends:

    virt-v2v ends, or is killed    the monitor publishes that
    TERM, INT or HUP               to guardian or monitor: virt-v2v gets TERM, 45 s later KILL
    the monitor is killed          the kernel kills virt-v2v, the guardian publishes that
    the guardian is killed         the monitor goes on; during the start the job is stopped
    all are killed                 the next start, or --list, by the same user publishes that
    the answer cannot be printed   the launcher stops the job, and waits for its end

What virt-v2v leaves behind becomes a child of the monitor, or of the guardian, and is ended.

The rooms of this file follow that story, and each uses only what is above it:

    errors and log; request; output; progress; command: what goes in decides what comes out
    processes; places; files: thin layers above the kernel
    job: what guardian and monitor share: the files, and the ending; and the ending of dead jobs
    monitor, guardian, launcher: the three processes, each to be read from top to bottom
    jobs: --list, --watch, --cancel and --wait, which see jobs through their files
    main: arguments, what is printed, exit status

A new key of the request is a row in _RULES and its use in make_arguments(). A new thing that
virt-v2v says is a row in _TABLE and, if it is a new kind of event, a method of Progress. A check
of the host belongs in check_host().

It needs Linux 4.10, Python 3.6 or newer with its standard library, and virt-v2v.
"""

import ctypes
import errno
import fcntl
import json
import os
import pwd
import re
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque, namedtuple
from contextlib import ExitStack, contextmanager, suppress

VERSION = '1.0'
PROGRAM = 'virt-v2v-wrapper'

EXIT_STARTED = 0
EXIT_HOST = 1        # the request is right, but this host cannot carry it out
EXIT_REQUEST = 2     # the request, or the command line, is wrong
EXIT_FAILED = 3      # the job was started, and has failed
EXIT_CANCELLED = 4   # somebody ended it

# A request is some hundred bytes; this leaves room for thousands of disks.
MAX_REQUEST = 1 << 20
# Linux takes no argument above 128 KiB. No name or path in the field comes near this.
MAX_TEXT = 4096
# The longest line of output that can matter is an nbdkit command of a few KiB. Logs hold lines of
# hundreds of KiB, such as a hex dump of a registry; of these the beginning is enough.
MAX_LINE = 1 << 13
# A message is one line of JSON, which is of no use without its end.
MAX_MESSAGE_LINE = 1 << 20
# How much of virt-v2v's own text goes into the state file.
MAX_MESSAGE = 4096
# Messages whose line in the output has not come yet. One is usual; a pipe holds about that many.
MAX_ANNOUNCED = 1000
# What a program may answer. The longest answer in the field, virt-v2v's options, is 2 KiB long.
MAX_ANSWER = 1 << 16
CHUNK = 1 << 16             # what is read at once
SMALL_CHUNK = 1 << 10       # what is parsed line by line, if it matters at all

# Seconds.
PUBLISH_INTERVAL = 0.1      # between two writes of mere progress
PUBLISH_RETRY = 1.0         # until a failed write is tried again
# Lines come in bursts: it is cheaper to read a burst at once. But somebody may watch the progress.
GATHER_INTERVAL = 0.02
GATHER_INTERVAL_COPYING = 0.003
# virt-v2v 2.x acts on a signal when the current libguestfs call has ended: 8 to 17 s were seen.
STOP_GRACE = 45.0
END_PATIENCE = 10.0         # for killed processes to go; one asleep on a dead server does not
START_PATIENCE = 90.0       # for the guardian to answer: healthy hosts need a tenth of a second
PROBE_PATIENCE = 30.0       # for virt-v2v to tell what it can do: it needs 0.05 s
MOUNT_PATIENCE = 60.0
PRINT_PATIENCE = 5.0        # for a caller that does not read what it asked for
FINAL_WRITE_PATIENCE = 3600.0       # how long the final state waits for room on its file system
LOOK_INTERVAL = 0.5         # between two looks at jobs that somebody watches or waits for
RATE_PERIOD = 180.0         # the time left follows from the progress in so many last seconds

VDSM_USER = 'vdsm'
VDSM_LOG_DIR = '/var/log/vdsm/import'
VDSM_STATE_DIR = '/run/vdsm/virt-v2v-wrapper'
VDDK_LIBDIR = '/opt/vmware-vix-disklib-distrib'
MOUNT_POINT = '/run/virt-v2v-wrapper'
# Short, because sockets live there (108 bytes for a path, unix(7)); on disk, because overlays do.
TEMPORARY_DIR = '/var/tmp'
ADMIN_PATH = '/usr/sbin:/usr/bin:/sbin:/bin'


# --- Errors and log

class WrapperError(Exception):
    """Why no conversion was started: `problems` are pairs (subject, text), each of them a line.

    The subject is the key, option or thing; the text says what was expected, or what happened.
    """

    status = EXIT_HOST

    def __init__(self, *problems):
        super().__init__(*map(': '.join, problems))
        self.problems = problems


class HostError(WrapperError):
    """This host cannot do what was asked for."""


class RequestError(WrapperError):
    """The request, or the command line, is wrong."""

    status = EXIT_REQUEST


def os_text(error):
    """Return what OSError `error` says, without the name of a file in it."""
    known = os.strerror(error.errno) if error.errno else type(error).__name__
    # system_call() puts a name before it; the subprocess of Python 3.6 puts a file's name after it.
    text = error.strerror or known
    return text if text.endswith(known) else known


def problems_of(error):
    """Return the problems for the caller that exception `error` stands for."""
    if isinstance(error, WrapperError):
        return error.problems
    if isinstance(error, OSError):
        return [('this host', os_text(error))]      # no descriptors left, or the like
    return [('internal error', where(error))]


@contextmanager
def blaming(subject):
    """Turn an OSError into a HostError about `subject`."""
    try:
        yield
    except OSError as error:
        raise HostError((subject, os_text(error))) from None


def where(error):
    """Say what exception `error` is and where in this file it came from. Its text may be secret."""
    kind = type(error).__name__
    kind = '{} ({})'.format(kind, os_text(error)) if isinstance(error, OSError) else kind
    places, trace = [], error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename == where.__code__.co_filename:
            places.append('{} line {}'.format(code.co_name, trace.tb_lineno))
        trace = trace.tb_next
    return '{} in {}'.format(kind, ', '.join(places))


# C0, DEL and C1 controls, line separators, controls of the writing direction, and halves of
# surrogate pairs, which are no text.
_UNPRINTABLE = re.compile(
    '[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def clean(data):
    """Return `data` (bytes or str) as a text that may be shown on a terminal, of bounded length."""
    text = data.decode('utf-8', 'replace') if isinstance(data, bytes) else data
    lines = text[:MAX_MESSAGE].strip('\n').split('\n')
    return '\n'.join(_UNPRINTABLE.sub('?', line) for line in lines)


def timestamp():
    """Return the time, UTC in ISO 8601."""
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def write_all(fd, data):
    """Write all of `data` (bytes). Raises OSError, whose `written` says how much came before."""
    written = 0
    try:
        while written < len(data):
            written += os.write(fd, data[written:] if written else data)
    except OSError as error:
        error.written = written
        raise


class Log:
    """The wrapper's own log, one line for each record. Whatever is wrong with it is ignored.

    Not the module logging: importing that takes longer than all that is done before virt-v2v runs.
    """

    def __init__(self):
        self.fd = None          # the job's log, as soon as there is one

    def write(self, level, template, *values):
        """Add a record: `template` with `values` in the places of its {}."""
        with suppress(Exception):       # a full disk, no log yet, or a mistake of ours
            # Line ends are escaped, so that no name can forge a record.
            text = _UNPRINTABLE.sub(
                lambda match: match.group().encode('unicode_escape').decode('ascii'),
                template.format(*values))
            record = '{} {} {}\n'.format(timestamp(), level, text)
            write_all(self.fd, record.encode('utf-8', 'backslashreplace'))


LOG = Log()


# --- Request: bytes -> Request, or one error that lists everything that is wrong

class Secret:
    """A text that no message, log or repr shows."""

    __slots__ = ('_text',)

    def __init__(self, text):
        """Raises ValueError if virt-v2v would not get it all: it reads the first line of a file."""
        if not text or re.search('[\x00\n\r\ud800-\udfff]', text):
            raise ValueError
        self._text = text

    def __repr__(self):
        return '***'

    def __reduce__(self):
        raise TypeError('a secret is not to be stored')

    def to_descriptor(self):
        """Return a descriptor of a file in memory, without a name, that holds the text.

        The text itself is forgotten. Raises HostError.
        """
        with blaming('memory for the password'):
            if hasattr(os, 'memfd_create'):                 # Python 3.8
                fd = os.memfd_create(PROGRAM)       # novm
            else:
                fd = os.open('/dev/shm', os.O_RDWR | os.O_TMPFILE, 0o400)
            os.fchmod(fd, 0o400)
            write_all(fd, self._text.encode('utf-8'))
        self._text = None
        return fd


_URI = re.compile(r'''
    (?:esx|vpx) ://
    (?: (?!%3[aA]) [\w.~!$&'()*+,;=%-] )+ @             # a user, no colon: so no password
    (?: [A-Za-z0-9][A-Za-z0-9._-]* | \[[0-9A-Fa-f:.]+\] )
    (?: : [0-9]{1,5} )?
    (?: / [\w.~!$&'()*+,;=:@%/-]* )?
    (?: \? [\w.~!$&'()*+,;=:@%/?\[\]-]* )?
    ''', re.VERBOSE | re.ASCII)
_FINGERPRINT = re.compile('[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){19}(?:(?::[0-9A-Fa-f]{2}){12})?')
_EXPORT_DOMAIN = re.compile(r'/\S*|'
                            r'(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):/\S*')


def _text(value, pattern=None):
    """Return `value` if it is printable, not empty, not too long, and as `pattern` says.

    Like all of these it raises ValueError if the value is wrong, and TypeError if its type is.
    """
    if not value or _UNPRINTABLE.search(value) or len(value.encode('utf-8')) > MAX_TEXT:
        raise ValueError
    if pattern and not pattern.fullmatch(value):
        raise ValueError
    return value


def _disks(value):
    disks = tuple(map(_text, value))
    if not isinstance(value, list) or len(set(disks)) < len(disks):
        raise ValueError
    return disks


def _one_of(*values):
    return lambda value: values[values.index(_text(value))]


_MANDATORY = object()

# Key, default, the function that turns the value into the field, what is expected.
_RULES = (
    ('vm_name', _MANDATORY, _text,
     'a non-empty string of at most 4096 bytes without control characters'),
    ('output_format', 'raw', _one_of('raw', 'qcow2'), '"raw" or "qcow2"'),
    ('transport_method', _MANDATORY, _one_of('vddk'), '"vddk"'),
    ('vmware_uri', _MANDATORY, lambda value: _text(value, _URI),
     'a libvirt URI esx://USER@HOST... or vpx://USER@HOST... without a password'),
    ('vmware_password', _MANDATORY, Secret, 'a non-empty string without NUL or line ends'),
    ('vmware_fingerprint', _MANDATORY, lambda value: _text(value, _FINGERPRINT).upper(),
     '20 or 32 colon-separated pairs of hex digits'),
    ('export_domain', _MANDATORY, lambda value: _text(value, _EXPORT_DOMAIN),
     'HOST:/PATH or an absolute directory, without blanks or control characters'),
    ('source_disks', (), _disks, 'a list of different non-empty strings'),
)
# What the caller wants: a field for each key, and the names of the keys that we do not know.
Request = namedtuple('Request', [rule[0] for rule in _RULES] + ['unknown'])


def _number(text):
    """Numbers mean nothing to us, but 1e999 would become Infinity, which JSON has not, nor NaN."""
    number = float(text)
    if not float('-inf') < number < float('inf'):
        raise RequestError(('request', 'a number is out of range, or none'))
    return number


def _document(data):
    """Return the JSON object in `data`."""
    def unique(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            # The name of a key that we do not know may be anything, a misplaced password too.
            twice = [rule[0] for rule in _RULES if keys.count(rule[0]) > 1] or ['a key']
            raise RequestError(*[('request', key + ' is given twice') for key in twice])
        return dict(pairs)

    if len(data) > MAX_REQUEST:
        raise RequestError(('request', 'is longer than {} bytes'.format(MAX_REQUEST)))
    if not data.strip():
        raise RequestError(('request', 'is empty, expected a JSON object'))
    if data.startswith(b'\xef\xbb\xbf'):
        raise RequestError(('request', 'begins with a byte order mark'))
    try:
        document = json.loads(data.decode('utf-8'), object_pairs_hook=unique, parse_int=_number,
                              parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise RequestError(('request', 'is nested too deeply')) from None
    except UnicodeDecodeError:
        raise RequestError(('request', 'is not UTF-8')) from None
    except ValueError as error:
        raise RequestError(('request', 'is not JSON: {}, line {} column {}'.format(
            error.msg.partition(':')[0], error.lineno, error.colno))) from None
    if not isinstance(document, dict):
        raise RequestError(('request', 'expected a JSON object'))
    return document


def parse_request(data):
    """Return the Request in `data` (bytes). Raises RequestError with all its problems."""
    document = _document(data)
    values, problems = {}, []
    for key, default, make, expected in _RULES:
        value = document.pop(key, None)
        try:
            values[key] = default if value is None else make(value)
        except (ValueError, TypeError):
            problems.append((key, 'expected ' + expected))
        if value is None and default is _MANDATORY:
            problems.append((key, 'missing, expected ' + expected))
    if problems:
        raise RequestError(*problems)
    return Request(unknown=tuple(sorted(document)), **values)


def read_request(fd):
    """Read descriptor `fd` to its end and return the Request in it. Raises RequestError."""
    if os.isatty(fd):
        raise RequestError(('request', 'expected as JSON on standard input, which is a terminal;'
                                       ' see --help'))
    data, piece = b'', None
    while piece != b'' and len(data) <= MAX_REQUEST:
        try:
            piece = os.read(fd, CHUNK)
            data += piece
        except BlockingIOError:
            select.select([fd], [], [])
        except OSError as error:
            raise RequestError(('request', os_text(error))) from None
    return parse_request(data)


# --- Output: chunks -> lines -> events. Bytes until a field is taken out, and bounded memory.
#
# From 1.41.1 on virt-v2v sends JSON messages. There, a message says what happens, and the line of
# the same text in the output says when: virt-v2v writes the message first. A phase line counts only
# if its text was announced by a message, and once; copies count only in sequence; errors count from
# the messages alone. Without messages, only the lines count.
#
# Nothing is believed while virt-v2v looks into the guest, because then the guest speaks in the log.
# The exit status of virt-v2v alone decides whether the conversion succeeded.

# One thing that happened. The names, and the line or message that each comes from:
#   phase    text     what virt-v2v does now            [   0.0] Setting up the source: -i libvirt
#   disk     number   this disk begins to be copied     [  40.1] Copying disk 2/3
#   idle     None     no disk is being copied           any other phase line
#   percent  0..100   of the disk being copied          a bar of nbdcopy or qemu-img
#   source   path     the next disk of the guest        the command of its nbdkit
#   opened   path     the disk being copied is this     Opening file [ds] vm/vm.vmdk (vpxa-nfcssl://
#   vm_id    UUID     of the VM in the export domain    the OVF that -v shows
#   error    text     virt-v2v's own error              virt-v2v: error: ...
#   cause    text     a program below it complains      nbdkit: file.3: error: ...
#   warning  text     virt-v2v's own warning            a message
Event = namedtuple('Event', 'name value')

# The stages of a conversion. A stage begins with the phase whose text begins so, and every other
# phase is one in which virt-v2v looks into the guest.
_OPENING, _GUEST, _TARGET, _COPYING, _METADATA, _OVER = (
    'opening', 'guest', 'target', 'copying', 'metadata', 'over')
_STAGES = (
    ('Setting up the source', _OPENING),        # 2.x
    ('Opening the ', _OPENING),
    ('Creating an overlay', _OPENING),          # 1.x
    ('Setting up the destination', _TARGET),    # 2.x
    ('Initializing the target', _TARGET),       # 1.x
    ('Copying disk ', _COPYING),
    ('Creating output metadata', _METADATA),
    ('Finishing off', _METADATA),
)
# Versions without messages: believed at every stage. Their errors may come at any time.
_LEGACY = 'legacy'
_TRUSTED = {_OPENING, _TARGET, _COPYING, _METADATA}

_PHASE_LINE = rb'\[ *[0-9]{1,9}\.[0-9]\] (.+)'      # "[%6.1f] %s"; kernels show more decimals


# What is understood: the stages in which a line may be believed, a literal to find it by, the
# pattern of the whole line, the event, and what makes its value of the group in the pattern.
_Row = namedtuple('_Row', 'stages literal pattern event make')
_TABLE = tuple(_Row(*row) for row in (
    # 1.38 to 2.7.15: LANG=C 'nbdkit' '--exit-with-parent' ... 'vddk' ... 'file=[ds] vm/vm.vmdk' ...
    ({_OPENING}, b"'vddk'",
     rb" *(?:LANG=C )?'?nbdkit'? .*?'vddk'.*?'file=((?:[^']|'\\'')+)'.*", 'source',
     lambda path: clean(path.replace(rb"'\''", b"'"))),
    # 1.36 of RHEL 7.5: nbdkit: debug: vddk: config key=file, value=[ds] vm/vm.vmdk
    ({_LEGACY}, b'=file, value=', rb'.*?vddk: config key=file, value=(.*)', 'source', clean),
    # 2.x: a spinner, then "  12% [*****-----------------------------------]"
    ({_COPYING}, b'% [', rb'[^%]{0,12}?([0-9]{1,3})% \[[*-]{40}\]', 'percent', int),
    # 1.x, qemu-img: "    (12.34/100%)"
    ({_COPYING}, b'/100%)', rb' {4}\(([0-9]{1,3}(?:\.[0-9]+)?)/100%\)', 'percent', float),
    # From 2.7.16 on: nbdcopy 'nbd+unix:///%5bds%5d%20vm/vm.vmdk?socket=/tmp/v2v.x/in0' ...
    ({_COPYING}, b'nbdcopy ', rb"nbdcopy .*?'nbd\+unix:///(%5[bB][^?']*)\?socket=.*", 'opened',
     lambda path: clean(re.sub(rb'%([0-9A-Fa-f]{2})', lambda match: bytes.fromhex(
         match.group(1).decode('ascii')), path))),
    # nbdkit: vddk[1]: debug: Opening file [ds] vm/vm.vmdk (vpxa-nfcssl://[ds] vm/vm.vmdk@host:902)
    ({_COPYING}, b'ile [', rb'.*?Opening file (\[[^]]*\] .+?) \([a-z-]+://.*', 'opened', clean),
    # virt-v2v: error: nbdcopy command failed, see earlier error messages
    (_TRUSTED | {_LEGACY}, b': err', rb'virt-v2v: error: (.*)', 'error', bytes),
    # nbdkit: vddk[4]: error: VixDiskLib_ReadAsync: ...; from 1.46 on: nbdkit[in0]: error: ...
    (_TRUSTED, b': err',
     rb'(nbdkit(?:\[[\w.-]+\])?: (?:[\w.-]+(?:\[[0-9]+\])?: )?error: .+)', 'cause', clean),
    # mount.nfs: access denied by server while mounting ...
    ({_TARGET}, b'mount', rb'(mount(?:\.nfs4?)?: .*)', 'cause', clean),
    # nbdcopy: write at offset 51904512 failed: No space left on device
    ({_COPYING}, b'copy: ', rb'(nbdcopy: .*)', 'cause', clean),
    # 1.x: qemu-img: error while writing sector 1: No space left on device
    ({_COPYING}, b'-img: ', rb'(qemu-img: .*)', 'cause', clean),
    # <Section ovf:id='UUID' ovf:required='false' xsi:type='ovf:OperatingSystemSection_Type'>
    ({_COPYING, _METADATA}, b':OperatingSystemSection_Type',
     rb""".*?ovf:id=['"]([0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})['"].*""", 'vm_id',
     lambda uuid: uuid.decode('ascii').lower()),
))


class Lines:
    """Joins chunks to whole lines, ended by LF or CR. What exceeds `limit` bytes is left out."""

    def __init__(self, limit):
        self._limit = limit
        self._rest = b'\n'      # the end of the last whole line, and the line that has only begun

    def take(self, chunk):
        """Return the lines that are whole now, each with the end of the one before: b'\\na\\rb'."""
        data = self._rest + chunk
        end = max(data.rfind(b'\n'), data.rfind(b'\r'))
        self._rest = data[end:end + 1 + self._limit]
        return data[:end]

    def end(self):
        """Return the last line if nothing ended it, as take does."""
        return self._rest


def copying_disk(text):
    """Return (number, count) if phase `text` is of a disk being copied, else None."""
    match = re.match(r'Copying disk ([0-9]{1,3})/([0-9]{1,3})(?![0-9])', text)
    number, count = map(int, match.groups()) if match else (0, 0)
    return (number, count) if 1 <= number <= count else None


class Parser:
    """Makes events of what virt-v2v and the programs below it print, and of its messages."""

    def __init__(self, has_messages):
        # Texts of phases, in bytes, whose message has come and whose line has not.
        self._announced = deque(maxlen=MAX_ANNOUNCED) if has_messages else None
        self._begin(_OPENING)
        self._copies = 0        # how many have begun
        self._message_lines = Lines(MAX_MESSAGE_LINE)
        self._lines = Lines(MAX_LINE)
        self._error = None      # beginning of an error that goes on in the next line

    def messages(self, chunk):
        """Return the events in what was read last from the pipe of messages."""
        lines = self._message_lines.take(chunk).splitlines()
        return list(filter(None, map(self._message, lines)))

    def _message(self, line):
        try:
            message = json.loads(line.decode('utf-8'))
            kind, text = message['type'], message['message']
            name = {'message': 'phase', 'error': 'error', 'warning': 'warning'}[kind]
            event = Event(name, clean(text))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None         # a message of another type, or none at all
        if name == 'phase' and event.value and self._announced is not None:
            self._announced.append(text.strip('\n').partition('\n')[0].encode('utf-8', 'replace'))
        return event

    def output(self, chunk):
        """Return the events in what was read last from the pipe of output."""
        return self._parse(self._lines.take(chunk))

    def end(self):
        """Return the events that were waiting for more output."""
        events = self._parse(self._lines.end() + b'\n')
        if self._error is not None:
            events.append(Event('error', clean(self._error)))
        for text in list(self._announced or ()):
            events += [event for event in self._enter(text) if event.name == 'disk']
        return events

    def _parse(self, lines):
        # Most parts have nothing in them that can matter now, and this is how that is seen fast.
        if self._error is None and not self._has_literal(lines):
            return []
        middle = lines.find(b'\n', len(lines) // 2)
        if len(lines) > SMALL_CHUNK and middle > 0:
            return self._parse(lines[:middle]) + self._parse(lines[middle:])
        return [event for line in lines.replace(b'\r', b'\n').split(b'\n')
                for event in self._line(line[:MAX_LINE])]

    def _has_literal(self, lines):
        if any(row.literal in lines for row in self._rows):
            return True
        if self._announced is None:
            return re.search(b'[\n\r]' + _PHASE_LINE, lines)
        return ((b'\n[' in lines or b'\r[' in lines)
                and any(text in lines for text in self._announced))

    def _line(self, line):
        """Return the events in one line."""
        if self._error is not None:
            return self._error_line(line)
        if line[:1] == b'[':
            match = re.fullmatch(_PHASE_LINE, line)
            return self._enter(match.group(1)) if match else []
        for row in self._rows:
            match = row.literal in line and re.fullmatch(row.pattern, line)
            if match and row.event == 'error':
                return self._error_line(match.group(1))
            if match:
                return [Event(row.event, row.make(match.group(1)))]
        return []

    def _enter(self, text):
        """The line of phase `text` (bytes) has come: go to its stage, if it may be believed."""
        number, _ = copying_disk(text.decode('utf-8', 'replace')) or (0, 0)
        if self._announced is not None:
            # A guest may know what will be announced; but its line never comes before the message.
            if text not in self._announced or number and number != self._copies + 1:
                return []
            self._announced.remove(text)
        self._copies += bool(number)
        self._begin(next((stage for start, stage in _STAGES
                          if text.startswith(start.encode('ascii'))), _GUEST))
        event = Event('disk', number) if number else Event('idle', None)
        return [event] if self._announced is not None else [Event('phase', clean(text)), event]

    def _begin(self, stage):
        self._rows = [row for row in _TABLE if stage in row.stages
                      or self._announced is None and _LEGACY in row.stages]

    def _error_line(self, text):
        """An error. Up to 1.40 it is wrapped after a blank, so a blank says that it goes on."""
        self._begin(_OVER)              # what nbdkit says from now on is no cause of it
        if self._announced is not None:
            return []
        text = (self._error or b'') + text
        goes_on = (not text or text.endswith(b' ')) and len(text) < MAX_MESSAGE
        self._error = text if goes_on else None
        return [] if goes_on else [Event('error', clean(text))]


# --- Progress: events -> what is known -> the state document, whose keys only this room knows

# What is fixed when virt-v2v has been executed. The names of the fields are keys of the state.
Facts = namedtuple('Facts', 'pid wrapper_pid vm_name wrapper_log v2v_log started_at')


class Disk:
    """A disk that is copied, or has been; `sure` if virt-v2v said which one it is."""

    def __init__(self, number, path, sure):
        self.number, self.path, self.sure = number, path, sure
        self.percent = 0


class Progress:
    """All that is known of a conversion. For each kind of event it has a method of that name."""

    def __init__(self, listed):
        """`listed` are the request's source_disks, a tuple."""
        self._listed = listed
        self._count = len(listed)
        self._sources = []
        self._disks = []
        self._current = None        # the disk that is being copied
        self._phase = self._error = self._vm_id = None
        self._causes = OrderedDict()        # program: what it said

    def apply(self, event):
        """Take in an Event."""
        getattr(self, event.name)(event.value)

    def phase(self, text):
        """virt-v2v does something else now."""
        self._phase = text
        self._count = (copying_disk(text) or (0, self._count))[1]

    def disk(self, number):
        """The copying of the disk of this number begins."""
        self.idle(None)
        if number > max([0] + [disk.number for disk in self._disks]):
            for disk in self._disks:
                disk.percent = 100
            self._disks.append(self._new_disk(number))
        self._current = next((disk for disk in self._disks if disk.number == number), None)

    def idle(self, _):
        """No disk is being copied, and what programs said before is no cause of what comes."""
        self._current = None
        self._causes.clear()

    def _new_disk(self, number):
        taken = {disk.path for disk in self._disks}
        source = self._sources[number - 1:number]
        if source and source[0] not in taken:
            return Disk(number, source[0], sure=True)
        # virt-v2v does not tell: take the one of that number in the request, or make up a name.
        nth = self._listed[number - 1:number] + self._listed
        path = next((path for path in nth if path not in taken), 'disk {}'.format(number))
        while path in taken:            # a listed path may read "disk 2"
            path = 'another ' + path
        return Disk(number, path, sure=False)

    def percent(self, value):
        """So much of the current disk is copied."""
        if self._current:
            self._current.percent = min(100, max(self._current.percent, value))

    def source(self, path):
        """This is the next disk in the guest's order."""
        if path not in self._sources:
            self._sources.append(path)

    def opened(self, path):
        """The current disk is this one."""
        disk = self._current
        if not disk or path in [other.path for other in self._disks]:
            return
        # A listed disk keeps the progress it has shown, so then it is too late for another path.
        if not disk.sure and not (disk.percent and disk.path in self._listed):
            disk.path, disk.sure = path, True

    def error(self, text):
        """virt-v2v says why it fails."""
        self._error = text

    def cause(self, text):
        """A program complains. The first of each counts: what follows are mostly consequences."""
        self._causes.setdefault(re.match(r'[\w.-]*', text).group(), text)

    def warning(self, text):
        """virt-v2v warns; that is in the logs."""

    def vm_id(self, uuid):
        """The new VM has this UUID."""
        self._vm_id = uuid

    def is_copying(self):
        """Say whether a disk is being copied."""
        return self._current is not None

    def document(self, facts):
        """Return the state of a conversion that goes on."""
        percents = dict.fromkeys(self._listed, 0)
        percents.update((disk.path, disk.percent) for disk in self._disks)
        state = dict(started=True, **facts._asdict())
        state['disks'] = [{'path': path, 'progress': percents[path]} for path in percents]
        state['disk_count'] = self._count
        state['updated_at'] = timestamp()
        state.update((key, value) for key, value in (
            ('phase', self._phase), ('vm_id', self._vm_id)) if value is not None)
        error = self._error
        if error and self._causes and re.search('(?i)see (?:earlier|previous)', error):
            error = '{} ({})'.format(error, '; '.join(self._causes.values()))
        if error:
            state['last_message'] = {'type': 'error', 'message': error}
        return state


def signal_name(number):
    """Return a name such as SIGTERM for the number of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return 'signal {}'.format(number)


def finished_document(state, return_code, reason, stuck=()):
    """Return the last state of a conversion, made of the state before it.

    `return_code` is virt-v2v's, None if it is not known; `reason` why the wrapper ended it, None
    if it did not; `stuck` are the processes that cannot be ended. Status 0 alone is success.
    """
    state = dict(state)
    error = state.pop('last_message', {}).get('message')
    if reason is None and return_code is None:
        reason = 'virt-v2v is gone, and nobody knows how it ended'
    elif reason is None and return_code < 0:
        reason = 'virt-v2v was killed by ' + signal_name(-return_code)
    elif reason is None and not error:
        reason = ('virt-v2v ended with status {} and no error message, as it does when a signal'
                  ' tells it to stop'.format(return_code))
    text = '{} ({})'.format(reason, error) if reason and error else reason or error
    if stuck:
        text += '; could not be killed, as they wait for storage: ' + ', '.join(stuck)
    if return_code != 0:
        state['last_message'] = {'type': 'error', 'message': text}
    if return_code is not None:
        state['return_code'] = return_code
    if return_code == 0:
        state['disks'] = [dict(disk, progress=100) for disk in state['disks']]
    else:
        state['failed'] = True
    state['updated_at'] = state['finished_at'] = timestamp()
    state['finished'] = True
    return state


# --- Command: what to execute, in the words of the version that is there

# Which of its spellings this virt-v2v knows: has it messages, has it -io, and how a password file
# is named.
Capabilities = namedtuple('Capabilities', 'messages io_option password_option')

# Those of the caller's variables that virt-v2v gets.
_ENVIRONMENT = re.compile(rb'PATH|LIBGUESTFS_\w+|VIRTIO_WIN|(?:https?|ftp|all|no)_proxy'
                          rb'|(?:HTTPS?|FTP|ALL|NO)_PROXY')


def capabilities(ask):
    """Find out what this virt-v2v knows. Returns Capabilities.

    `ask` takes an option and returns the lines virt-v2v prints for it, or None if it refuses.
    Raises HostError if it cannot convert from VDDK to an export domain.
    """
    # JSON messages came together with this spelling (1.41.1), later than -io and -ip.
    features = ask('--machine-readable=fd:1')
    messages = features is not None
    if messages:
        options = {'-io', '-ip'} if 'vddk' in features else {'-ip'}
    else:
        features = ask('--machine-readable') or []
        options = set(ask('--short-options') or []) | set(ask('--long-options') or [])
    # Up to 2.7.15 it says rhv, later ovirt, where -o rhv still works (select_output.ml).
    if not {'output:rhv', 'output:ovirt'} & set(features):
        raise HostError(('virt-v2v', 'this version cannot write to an oVirt export domain'
                                     ' (RHEL 10 has no -o rhv)'))
    if not {'-io', '--vddk-libdir'} & options:
        raise HostError(('virt-v2v', 'this version cannot read disks with VDDK'))
    return Capabilities(messages=messages, io_option='-io' in options,
                        password_option='-ip' if '-ip' in options else '--password-file')


def make_arguments(capability, request, directory, libdir, password_fd, message_fd):
    """Return the arguments of virt-v2v, without its own name, as bytes.

    `directory` is the export domain. They are encoded here, because under LC_ALL=C Python 3.6
    would take everything for ASCII.
    """
    arguments = ['-v', '-x']
    if capability.messages:
        arguments += ['--machine-readable=fd:{}'.format(message_fd)]
    arguments += ['--root', 'first',        # without it, a guest with two systems makes it ask
                  '-i', 'libvirt', '-ic', request.vmware_uri,
                  capability.password_option, '/proc/self/fd/{}'.format(password_fd),
                  '-it', 'vddk']
    # 1.39.2 brought -io; the older spelling went in 2.7.13.
    if capability.io_option:
        arguments += ['-io', 'vddk-libdir=' + libdir,
                      '-io', 'vddk-thumbprint=' + request.vmware_fingerprint]
    else:
        arguments += ['--vddk-libdir', libdir, '--vddk-thumbprint', request.vmware_fingerprint]
    arguments += ['-of', request.output_format, '-o', 'rhv', '-os', directory,
                  '--bridge', 'ovirtmgmt', '--', request.vm_name]
    return [argument.encode('utf-8', 'surrogateescape') for argument in arguments]


def make_environment(inherited, identity, scratch, cache):
    """Return virt-v2v's environment: the useful part of `inherited` (bytes to bytes), and ours.

    `scratch` is the directory for its temporary files, `cache` the one for libguestfs' appliance
    (both bytes). libguestfs puts its sockets below XDG_RUNTIME_DIR, or /tmp, where a killed run
    would leave them; and after a change of user the caller's XDG_RUNTIME_DIR is somebody else's.
    """
    environment = {b'LIBGUESTFS_BACKEND': b'direct', b'PATH': os.fsencode(ADMIN_PATH),
                   b'LIBGUESTFS_CACHEDIR': cache}
    environment.update((name, value) for name, value in inherited.items()
                       if _ENVIRONMENT.fullmatch(name))
    environment.update({
        b'LC_ALL': b'C',                    # its messages are translated
        b'TMPDIR': scratch, b'VIRT_V2V_TMPDIR': scratch, b'XDG_RUNTIME_DIR': scratch,
        b'HOME': os.fsencode(identity.home),
        b'USER': os.fsencode(identity.name), b'LOGNAME': os.fsencode(identity.name)})
    return environment


# --- Processes: thin layers above system calls. No JSON but on our own pipes, no parsing.

# Constants of the kernel that Python 3.6 has no names for.
_CLONE_NEWNS = 0x00020000           # unshare(2)
_MS_REC_SLAVE = 0x4000 | 0x80000    # mount(2)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4      # prctl(2)
_CAPABILITY_VERSION_3 = 0x20080522  # capset(2)
_KEYCTL = {'x86_64': 250, 'aarch64': 219, 'ppc64le': 271, 's390x': 280}     # syscall(2)
_KEYCTL_JOIN_SESSION_KEYRING = 1    # keyctl(2)
# Enough for virt-v2v, and not too many for old programs that close every number there may be.
_MAX_DESCRIPTORS = 1 << 16

_LIBC = ctypes.CDLL(None, use_errno=True)
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def system_call(name, *arguments):
    """Call a function of the C library that returns -1 where it fails. Raises OSError."""
    if getattr(_LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, '{}: {}'.format(name, os.strerror(number)))


def unblock_signals():
    """Let all signals in: in a child, before it is executed."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def shed_inheritance():
    """Free this process of what its caller left to it, and of core dumps. Raises HostError."""
    for fd in range(3):
        # Opened, so that no other file gets these numbers; reading and writing still fail.
        try:
            os.fstat(fd)
        except OSError:
            with blaming(os.devnull):
                os.open(os.devnull, os.O_WRONLY if fd == 0 else os.O_RDONLY)
    with blaming('/proc'):
        inherited = [int(name) for name in os.listdir('/proc/self/fd') if int(name) > 2]
    for fd in inherited:
        with suppress(OSError):     # the one that listdir used
            os.close(fd)
    for number in range(1, signal.NSIG):
        if signal.getsignal(number) == signal.SIG_IGN and number not in (
                signal.SIGPIPE, signal.SIGXFSZ):        # Python ignores these itself
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    unblock_signals()
    os.umask(0o022)
    # A dump would show the password. A limit of 1 byte also keeps it from being piped to a program,
    # which 0 does not (fs/coredump.c); below a hard limit of 0, it is at least empty.
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open('/proc/self/coredump_filter', 'w') as stream:
        stream.write('0')
    # What a shell limits for its user, or a service for itself, is not meant for a conversion.
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS):
        resource.setrlimit(kind, resource.getrlimit(kind)[1:] * 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MAX_DESCRIPTORS)), hard))
    with suppress(OSError), open('/proc/self/oom_score_adj', 'r+') as stream:
        if int(stream.read()) < 0:
            stream.write('0')


@contextmanager
def interruptible():
    """Have the stop signals raise KeyboardInterrupt, so that what was begun is undone.

    Afterwards they are blocked.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def fork(child):
    """Fork; the new process runs `child`, a function that returns an exit status, and ends.

    Returns the process ID. In the child, SIGCHLD and the stop signals are blocked.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS | {signal.SIGCHLD})
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = child()
        except Exception as error:
            LOG.write('ERROR', 'internal error: {}', where(error))
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def kill(pid, number):
    """Send a signal to a process, or with a negative `pid` to a group, if there is one of ours."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def can_be_read(stream, patience):
    """Wait at most `patience` seconds (None: for ever) until `stream` can be read; say if so."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(None if patience is None else max(0, patience) * 1000))


def run_program(subject, argv, environment, patience, stderr):
    """Run a program that ends by itself; return its status and what it printed (bytes).

    `stderr` is as for Popen. Raises HostError about `subject`, also if it takes more than
    `patience` seconds or prints more than MAX_ANSWER bytes; then it is killed, and all it started.
    """
    with blaming(subject):
        child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stderr=stderr,
                                 stdout=subprocess.PIPE, start_new_session=True)
    give_up = time.monotonic() + patience
    output, piece = b'', None
    try:
        while piece != b'' and len(output) <= MAX_ANSWER:
            if not can_be_read(child.stdout, give_up - time.monotonic()):
                raise HostError((subject, 'does not answer'))
            piece = os.read(child.stdout.fileno(), CHUNK)
            output += piece
        if piece:
            raise HostError((subject, 'answers with more than {} bytes'.format(MAX_ANSWER)))
        return child.wait(max(0, give_up - time.monotonic())), output
    except subprocess.TimeoutExpired:
        raise HostError((subject, 'does not end')) from None
    finally:
        kill(-child.pid, signal.SIGKILL)
        child.stdout.close()
        with suppress(subprocess.TimeoutExpired):       # it may sleep on a dead server
            child.wait(1)


class Channel:
    """A pipe for JSON values, one a line, from one of our processes to the one that forked it."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        self._data = b''

    def send(self, value):
        """Send a value that is not None. Raises OSError, also if nobody can receive it."""
        write_all(self.writer, json.dumps(value).encode('ascii') + b'\n')

    def receive(self, give_up=None):
        """Return the next value, None when all senders are gone. Raises TimeoutError.

        `give_up` is a time of time.monotonic().
        """
        while b'\n' not in self._data:
            if not can_be_read(self.reader, give_up and give_up - time.monotonic()):
                raise TimeoutError
            piece = os.read(self.reader, CHUNK)
            if not piece:
                return None
            self._data += piece
        line, _, self._data = self._data.partition(b'\n')
        return json.loads(line.decode('ascii'))


def expect_success(told):
    """Return what another process has told, a dict. Raises HostError where it told problems."""
    if isinstance(told, dict):
        return told
    raise HostError(*map(tuple, told or [('wrapper', 'ended before virt-v2v was started')]))


class Pipe:
    """A pipe that virt-v2v writes to. We keep the writing end too, so it never comes to an end."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def read(self):
        """Return what is there, at most CHUNK bytes; b'' if there is nothing."""
        try:
            return os.read(self.reader, CHUNK)
        except BlockingIOError:
            return b''


def ending_of(pid):
    """Return how child `pid` ended, as subprocess has it, or None while it runs.

    The child stays a zombie, so that its ID names nothing else. Raises ChildProcessError.
    """
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def is_over(pid):
    """Say whether `pid`, which may be None or no child of ours, is a child that has ended."""
    with suppress(ChildProcessError):
        return pid is not None and ending_of(pid) is not None


def end_descendants(keep=None):
    """Kill all our descendants: what loses its parent comes to us, who are a subreaper.

    All are reaped but child `keep`, which stays a zombie. Returns the names of those that have not
    gone after END_PATIENCE seconds: a process asleep on a dead server cannot be killed.
    """
    give_up = time.monotonic() + END_PATIENCE
    while True:
        # Before the list is read: what a process leaves to us comes when it has ended.
        ended = is_over(keep)
        # The kernel's list may miss some while others are reaped; but only we do that (proc(5)).
        with open('/proc/{0}/task/{0}/children'.format(os.getpid())) as stream:
            living = [int(pid) for pid in stream.read().split()]
        if ended and keep in living:
            living.remove(keep)
        if not living or time.monotonic() > give_up:
            names = []
            for pid in living:
                with open('/proc/{}/comm'.format(pid), 'rb') as stream:
                    names.append('{} ({})'.format(clean(stream.read()), pid))
            return names
        for pid in living:
            kill(pid, signal.SIGKILL)
            if pid != keep:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)


# --- Places: who we are, which directories, which export domain

# The directories that the caller chose, None if not given.
Options = namedtuple('Options', 'log_dir state_dir vddk_libdir')
# What check_host has found: `virt_v2v` is a path (bytes), the directories are (path, descriptor).
Host = namedtuple('Host', 'domain libdir virt_v2v log_dir state_dir')


def as_text(path):
    """Return `path`, a name that Python made of bytes in its own encoding, as the text it is."""
    return os.fsencode(path).decode('utf-8', 'surrogateescape')


class Identity(namedtuple('Identity', 'name uid gid home')):
    """The account that the conversion runs as."""

    __slots__ = ()

    @classmethod
    def find(cls):
        """Return vdsm for root, else who we are. Raises HostError."""
        uid = os.geteuid()
        try:
            entry = pwd.getpwuid(uid) if uid else pwd.getpwnam(VDSM_USER)
        except KeyError:
            who = 'with ID {}'.format(uid) if uid else VDSM_USER
            raise HostError(('user', 'there is no user {} on this host'.format(who))) from None
        if entry.pw_uid == 0:
            raise HostError(('user', 'user {} is root'.format(entry.pw_name)))
        return cls(entry.pw_name, entry.pw_uid, uid and os.getegid() or entry.pw_gid, entry.pw_dir)

    def become(self):
        """Be this account and have no privileges, for good, whoever we are. Raises HostError."""
        subject = 'cannot become user ' + self.name
        groups = set(os.getgrouplist(self.name, self.gid) if os.geteuid() == 0
                     else [self.gid] + [group for group in os.getgroups() if group != 0])
        with suppress(OSError, KeyError):       # kernels and containers that have no keyrings
            system_call('syscall', _KEYCTL[os.uname().machine], _KEYCTL_JOIN_SESSION_KEYRING, None)
        if set(os.getgroups()) - groups and os.geteuid() != 0:
            raise HostError((subject, 'is in group 0, which only root can leave'))
        with blaming(subject):
            if os.geteuid() == 0:
                os.setgroups(sorted(groups))
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
            system_call('prctl', _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
            header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
            system_call('capset', header, (ctypes.c_uint32 * 6)())
            system_call('prctl', _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            system_call('prctl', _PR_SET_DUMPABLE, 0, 0, 0, 0)
        with blaming('/proc'), open('/proc/self/status') as stream:
            status = dict(line.rstrip('\n').split(':\t', 1) for line in stream if ':\t' in line)
        # What the kernel says counts, not that the calls above returned.
        wanted = {'Uid': {self.uid}, 'Gid': {self.gid}, 'NoNewPrivs': {1}}
        holds = [set(map(int, status[key].split())) == value for key, value in wanted.items()]
        holds += [int(status[key], 16) == 0 for key in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')]
        holds += [set(map(int, status['Groups'].split())) <= groups]
        with suppress(PermissionError):
            os.setuid(0)
            holds = [False]
        if not all(holds):
            raise HostError((subject, 'privileges are left'))


def job_directories(identity, options):
    """Return where the logs and the states of this account's jobs are: the paths of both."""
    log_dir, state_dir = VDSM_LOG_DIR, VDSM_STATE_DIR
    if identity.name != VDSM_USER:
        base = os.environ.get('XDG_STATE_HOME', '')         # a relative one does not count
        base = base if os.path.isabs(base) else os.path.join(identity.home, '.local/state')
        log_dir = state_dir = os.path.join(base, PROGRAM)
    return options.log_dir or log_dir, options.state_dir or state_dir


def open_private_directory(path):
    """Make directory `path` if it is missing; return a descriptor of it.

    Raises HostError if it is not ours alone to write to: whoever can rename what is in it could
    have us write to any file of ours.
    """
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except PermissionError:
        import grp          # not needed by a start that succeeds
        import shlex
        group = os.getegid()
        with suppress(KeyError):        # a group without a name
            group = grp.getgrgid(group).gr_name
        command = 'install -d -o {} -g {} {}'.format(
            pwd.getpwuid(os.geteuid()).pw_name, group, shlex.quote(as_text(path)))
        raise HostError((path, 'is missing, and may only be made by root: ' + command)) from None
    except OSError as error:
        raise HostError((path, os_text(error))) from None
    with blaming(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return fd
    os.close(fd)
    raise HostError((path, 'expected a directory that belongs to the user who runs the conversion,'
                           ' and that nobody else may write to'))


Mount = namedtuple('Mount', 'id parent root point kind source options')


def mount_at(path, mounts):
    """Return the Mount that is seen at `path`, where others may cover it, None if there is none."""
    on_the_way = [mount for mount in mounts
                  if (path + '/').startswith(mount.point.rstrip('/') + '/')]
    known = {mount.id for mount in mounts}
    # The parent of the first is not listed, or it is its own.
    inner = [mount for mount in on_the_way
             if mount.parent not in known or mount.parent == mount.id]
    shown = None
    while inner:
        shown = min(inner, key=lambda mount: len(mount.point))
        inner = [mount for mount in on_the_way if mount.parent == shown.id and mount != shown]
    return shown


def find_nfs_mount(spec, mountinfo):
    """Return where the NFS export `spec` (HOST:/PATH) is mounted, or None.

    `mountinfo` is a text as in proc(5). VDSM's own mount is preferred. A mount that is read-only,
    shows only a part of the export, or is hidden by another does not count.
    """
    mounts = []
    for line in mountinfo.split('\n'):
        left, _, right = line.partition(' - ')
        fields, more = left.split(' '), right.split(' ')
        if len(fields) >= 6 and len(more) >= 3:
            root, point, source = (
                re.sub(r'\\([0-7]{3})', lambda match: chr(int(match.group(1), 8)), name)
                for name in (fields[3], fields[4], more[1]))
            mounts.append(Mount(fields[0], fields[1], root, point, more[0], source,
                                fields[5].split(',') + more[2].split(',')))
    found = [mount.point for mount in mounts
             if mount.kind in ('nfs', 'nfs4') and mount.source.rstrip('/') == spec.rstrip('/')
             and mount.root == '/' and 'ro' not in mount.options
             and mount_at(mount.point, mounts) is mount]
    preferred = [point for point in found if point.startswith('/rhev/data-center/mnt/')]
    return (preferred or found or [None])[-1]


def export_directory(spec):
    """Return the directory of export domain `spec`, mounted if need be. Raises HostError.

    A mount of our own is in a namespace of our own, so it goes with the last process in it.
    Propagation is one way: what the host unmounts is unmounted here too.
    """
    subject = 'export_domain'
    spec = os.fsdecode(spec.encode('utf-8'))    # under LC_ALL=C, Python 3.6 has names in ASCII
    if spec.startswith('/'):
        return spec
    with blaming('/proc'), open('/proc/self/mountinfo', 'rb') as stream:
        mounted = find_nfs_mount(spec, os.fsdecode(stream.read()))
    if mounted:
        return mounted
    if os.geteuid() != 0:
        raise HostError((subject, 'is not mounted here, and only root can mount it'))
    with blaming(subject):
        os.makedirs(MOUNT_POINT, mode=0o755, exist_ok=True)
        system_call('unshare', _CLONE_NEWNS)
        system_call('mount', None, b'/', None, ctypes.c_ulong(_MS_REC_SLAVE), None)
    status, output = run_program(
        subject, ['mount', '-t', 'nfs', '-o', 'nosuid,nodev,noexec', '--', spec, MOUNT_POINT],
        {'PATH': ADMIN_PATH, 'LC_ALL': 'C'}, MOUNT_PATIENCE, stderr=subprocess.STDOUT)
    if status != 0:
        said = ' '.join(clean(output).split()) or 'status {}'.format(status)
        raise HostError((subject, 'could not be mounted: ' + said))
    return MOUNT_POINT


class ExportDomain:
    """A directory with exactly one in it named by a UUID, which holds images/ and master/vms/."""

    _PARTS = ('images', 'master/vms')

    def __init__(self, directory):
        """Check what virt-v2v checks after the conversion (output_rhv.ml). Raises HostError."""
        subject, self.directory = 'export_domain', directory
        if ':/' in directory:
            raise HostError((subject, 'virt-v2v takes a path with ":/" in it for an NFS export'))
        with blaming(subject):
            uuids = [name for name in os.listdir(directory)
                     if re.fullmatch('(?s).{8}-.{4}-.{4}-.{4}-.{12}', name)]    # to virt-v2v
        if len(uuids) != 1:
            raise HostError((subject, 'expected exactly one directory named by a UUID in it, found'
                                      ' {}'.format(len(uuids))))
        root = os.path.join(directory, uuids[0])
        self._parts = [os.path.join(root, part) for part in self._PARTS]
        for path in [root] + self._parts:
            if not os.path.isdir(path):
                raise HostError((subject, '{} is not a directory; is the domain attached to a data'
                                          ' center?'.format(path)))
            if not os.access(path, os.W_OK | os.X_OK):
                raise HostError((subject, 'may not write to ' + path))
        self._before = self._contents()

    def _contents(self):
        contents = set()
        for part in self._parts:
            with suppress(OSError):
                contents.update(os.path.join(part, name) for name in os.listdir(part))
        return contents

    def new(self):
        """Return the paths of images and VMs that were not there at first, sorted."""
        return sorted(self._contents() - self._before)


# --- Files: exclusive creation, durable replacement, the lock, temporary files

def create_exclusively(name, mode, directory_fd):
    """Create file `name`, which must not exist, to append to. Returns a descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW
    return os.open(name, flags, mode, dir_fd=directory_fd)


def remove(name, directory_fd):
    """Remove file `name`, which need not exist. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def open_to_read(name, directory_fd):
    """Open our regular file `name`; nothing else that is there can hang it. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, 'is not a file of ours')


class StateFile:
    """The state file of a job, replaced as a whole, and its lock file beside it.

    A job is alive as long as its lock is locked, by a descriptor that guardian and monitor share.
    The lock file holds the path of the job's temporary directory.
    """

    def __init__(self, directory, fd, stem):
        """`directory` is the path, `fd` a descriptor of it; `stem` the name without its ending."""
        self.directory, self.fd, self.stem = directory, fd, stem
        self._name, self._lock_name = stem + '.state', stem + '.lock'
        # Nobody else has this name, so a file that a killed process left there can be removed.
        self._temporary = '.{}.{}.tmp'.format(stem, os.urandom(4).hex())
        self._lock = self._scratch = None

    @property
    def path(self):
        """Where it is."""
        return os.path.join(self.directory, self._name)

    def claim(self, scratch):
        """Claim the name for a new job with temporary directory `scratch` (bytes), and lock it.

        Raises FileExistsError if it is taken; OSError.
        """
        self._scratch = scratch
        try:
            self._create_temporary(scratch, durable=False)
            # Open for reading, so that the file system can still be made read-only.
            self._lock = open_to_read(self._temporary, self.fd)
            # Before it has its name, so that nobody ever sees the lock of a living job unlocked.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.link(self._temporary, self._lock_name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        finally:
            remove(self._temporary, self.fd)
        if os.path.lexists(self.path):      # of a job that has just ended, and gave up its lock
            self.release()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def lock_if_dead(self):
        """Lock the lock file of a job that may be dead.

        Returns its temporary directory (bytes), b'' if there is no lock file. Raises
        BlockingIOError if the job is alive; OSError.
        """
        try:
            self._lock = open_to_read(self._lock_name, self.fd)
        except FileNotFoundError:
            return b''
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(self._lock, MAX_TEXT)

    def release(self):
        """Remove the lock file: the job is over. Raises OSError."""
        remove(self._lock_name, self.fd)

    def close(self):
        """Unlock what lock_if_dead has locked."""
        if self._lock is not None:
            os.close(self._lock)

    def read(self):
        """Return the state published last, None if there is none. Raises OSError."""
        try:
            with open(open_to_read(self._name, self.fd), 'rb') as stream:
                state = json.loads(stream.read().decode('utf-8'))
                return dict(state, disks=list(state['disks']))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            # The host lost its power before a write of mere progress was on the disk.
            return {'started': True, 'disks': [], 'disk_count': 0}

    def write(self, document, durable):
        """Publish `document`. Raises OSError, HostError; then the file is as it was before.

        If it need not be `durable`, the kernel writes it to the disk when it likes.
        """
        text = json.dumps(document, indent=2, ensure_ascii=False) + '\n'
        try:
            self._create_temporary(text.encode('utf-8', 'backslashreplace'), durable)
            os.rename(self._temporary, self._name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            with suppress(OSError):
                remove(self._temporary, self.fd)
            if isinstance(error, FileNotFoundError):
                self._open_anew()
            raise
        try:
            if durable:
                os.fsync(self.fd)
        except OSError as error:        # it is written all the same
            LOG.write('WARNING', 'state directory: {}', os_text(error))

    def _create_temporary(self, data, durable):
        fd = create_exclusively(self._temporary, 0o644, self.fd)
        try:
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _open_anew(self):
        """The directory was removed: make it again, for the next write."""
        fd = open_private_directory(self.directory)
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        with suppress(FileExistsError):
            self.claim(self._scratch)

    def discard(self):
        """Remove state file and lock, of a job that nobody was told of. Raises OSError."""
        remove(self._temporary, self.fd)
        remove(self._name, self.fd)
        self.release()


class OutputLog:
    """The log of virt-v2v's output. A full or failing disk loses output, and nothing else."""

    def __init__(self, fd):
        self._fd = fd
        self._lost = 0

    def write(self, data):
        """Append `data` (bytes); where that fails, say how much is missing when it works again."""
        try:
            if self._lost:
                notice = '\n{}: {} bytes are missing here\n'.format(PROGRAM, self._lost)
                write_all(self._fd, notice.encode('ascii'))
                LOG.write('WARNING', 'virt-v2v log: works again, {} bytes are missing', self._lost)
                self._lost = 0
            write_all(self._fd, data)
        except OSError as error:
            if not self._lost:
                LOG.write('WARNING', 'virt-v2v log: {}', os_text(error))
            self._lost += len(data) - (0 if self._lost else error.written)


def cache_directory(scratch):
    """Return the directory (bytes) for libguestfs' appliance, which only we may write to.

    Its usual place, /var/tmp/.guestfs-UID, can be taken by any user, and then nothing is converted.
    """
    path = os.path.join(TEMPORARY_DIR, 'v2v-cache-{}'.format(os.geteuid()))
    with suppress(OSError):         # there already, or what follows says so
        os.mkdir(path, 0o700)
    with suppress(OSError):
        status = os.lstat(path)
        if (stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
                and not status.st_mode & 0o077):
            return os.fsencode(path)
    LOG.write('WARNING', '{} is not a directory of ours alone, so the appliance of libguestfs is'
                         ' built for this job only', path)
    return scratch


def remove_tree(path):
    """Remove directory `path` (bytes) and all in it, as far as possible. It need not exist."""
    with suppress(ImportError):     # no descriptor left to read the module with
        import shutil       # importing it takes half as long as a start, and that is all over
        # As str: Python 3.6 mixes both kinds when it is given bytes.
        shutil.rmtree(os.fsdecode(path), ignore_errors=True)
    if os.path.lexists(path):
        LOG.write('WARNING', 'temporary files are left in {}', os.fsdecode(path))


# --- Job: what guardian and monitor share

# All that a job needs; made whole, before the monitor is forked. `secret` is the descriptor of the
# password, `output` and `messages` are Pipes, `paths` what the caller is told.
Job = namedtuple('Job', 'request host capability environment secret scratch output messages'
                        ' output_log state paths')


def conclude(job, pid, read_on, document, reason):
    """End what is left of the job, and publish its end; the one ending of guardian and monitor.

    `pid` is virt-v2v's; `read_on` takes in what is left in the pipes; `document` returns the state
    so far, and may raise OSError; `reason` says why the wrapper ended virt-v2v, None if it did not.
    """
    return_code, complain, give_up = None, 0.0, time.monotonic() + FINAL_WRITE_PATIENCE
    while time.monotonic() < give_up:
        try:
            stuck = end_descendants(keep=pid)
            read_on()           # now nobody writes any more
            with suppress(ChildProcessError):
                return_code = ending_of(pid)
            state = document()
            if 'finished' not in state:
                job.state.write(finished_document(state, return_code, reason, stuck), durable=True)
            LOG.write('INFO', 'virt-v2v ended with {}', return_code)
            if stuck:
                LOG.write('WARNING', 'could not be killed: {}', ', '.join(stuck))
            break
        except (OSError, HostError) as error:
            if time.monotonic() >= complain:
                LOG.write('ERROR', 'the end could not be published, trying again: {}', where(error))
                complain = time.monotonic() + 60
        time.sleep(PUBLISH_RETRY)
    else:
        LOG.write('ERROR', 'the end could not be published')
    remove_tree(job.scratch)
    job.state.release()
    # Not before: the export domain may be what hangs.
    if return_code != 0:
        for path in job.host.domain.new():
            LOG.write('WARNING', 'new in the export domain since the start, perhaps left by this'
                                 ' conversion: {}', path)


# The name of a job, without the endings of its files.
_STEM = 'v2v-import-[0-9]{8}T[0-9]{6}-[0-9]+(?:-[0-9]+)?'


def end_dead_jobs(directory, fd):
    """Publish the ending of each job in `directory` that nobody follows any more.

    `fd` is a descriptor of it.
    """
    names = set(os.listdir(fd))
    for name in sorted(names):
        stem, ending = os.path.splitext(name)
        if not re.fullmatch(_STEM, stem) or not (
                ending == '.lock' or ending == '.state' and stem + '.lock' not in names):
            continue
        state_file = StateFile(directory, fd, stem)
        try:
            _end_if_dead(state_file)
        except BlockingIOError:
            pass                    # it is alive
        except Exception as error:
            LOG.write('WARNING', '{}: {}', name, where(error))
        finally:
            state_file.close()


def _end_if_dead(state_file):
    scratch = state_file.lock_if_dead()
    if re.fullmatch(os.fsencode(TEMPORARY_DIR) + rb'/v2v-[0-9a-f]{8}', scratch):
        # What is left of the job has this in its environment, and nothing else has.
        for name in filter(str.isdigit, os.listdir('/proc')):
            with suppress(OSError), open('/proc/{}/environ'.format(name), 'rb') as stream:
                if b'TMPDIR=' + scratch in stream.read().split(b'\0'):
                    kill(int(name), signal.SIGKILL)
        remove_tree(scratch)
    state = state_file.read()
    if state and 'finished' not in state:
        LOG.write('WARNING', 'publishing the ending of a dead job: {}', state_file.path)
        reason = ('all processes of the wrapper were killed, or the host was restarted; the state'
                  ' was last written at {}'.format(state.get('updated_at')))
        state_file.write(finished_document(state, None, reason), durable=True)
        for name in os.listdir(state_file.fd):
            if name.startswith('.{}.'.format(state_file.stem)):     # a write that was cut short
                remove(name, state_file.fd)
    state_file.release()


# --- Monitor: executes virt-v2v, follows it, publishes its end

# Events that a reader of the state file should see at once, and after a power loss.
_TRANSITIONS = {'phase', 'disk', 'opened', 'vm_id', 'error'}


def monitor(job, report, answer):
    """Be the monitor of `job`. Reports the Facts to the guardian, or problems.

    Returns an exit status: 0 if there is nothing left to do.
    """
    os.close(answer.writer)
    os.close(report.reader)
    # What loses its parent becomes ours, as it would become the guardian's, which may be killed.
    system_call('prctl', _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        conversion = Conversion(job)
    except Exception as error:
        report.send(problems_of(error))
        return 1                        # virt-v2v, if it was executed, is killed with us
    with suppress(OSError):             # the guardian is gone: the launcher has us stop
        report.send(conversion.facts._asdict())
    os.close(report.writer)

    def take_signals():
        try:
            conversion.take_signals()
        except Exception as error:      # a mistake of ours: the guardian ends the job
            LOG.write('ERROR', 'internal error: {}', where(error))
            os._exit(1)
    threading.Thread(target=take_signals, daemon=True).start()
    # In a thread, because a job waits for no other; killing what is left of one takes its time.
    search = threading.Thread(target=end_dead_jobs, args=job.host.state_dir, daemon=True)
    search.start()
    conversion.follow()
    search.join(1)
    return 0


class Conversion:
    """virt-v2v at work, and what is known of it."""

    def __init__(self, job):
        """Execute virt-v2v and publish that. Raises HostError."""
        self._job = job
        self._parser = Parser(job.capability.messages)
        self._progress = Progress(job.request.source_disks)
        self._reason = None             # why virt-v2v was told to end
        self._killed = False            # it did not
        self._mishaps = 0
        self._news = self._urgent = self._failing = False
        self._publish_at = 0.0          # not before, unless it is urgent
        self._gather_interval = GATHER_INTERVAL
        self._wake_reader, self._wake_writer = os.pipe()
        self._pid = self._execute()
        self.facts = Facts(self._pid, os.getpid(), job.request.vm_name, job.paths['wrapper_log'],
                           job.paths['v2v_log'], timestamp())
        LOG.write('INFO', 'virt-v2v has process ID {}, wrapper {}', self._pid, os.getpid())
        with blaming('state file'):
            job.state.write(self._document(), durable=True)

    def _document(self):
        return self._progress.document(self.facts)

    def _execute(self):
        """Start virt-v2v and return its process ID. Raises HostError."""
        job, monitor_pid = self._job, os.getpid()

        def prepare_child():
            unblock_signals()
            system_call('prctl', _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != monitor_pid:
                os._exit(1)             # the monitor was killed before that call
        argv = [job.host.virt_v2v] + make_arguments(
            job.capability, job.request, job.host.domain.directory, job.host.libdir,
            job.secret, job.messages.writer)
        LOG.write('INFO', 'executing {}', ' '.join(map(clean, argv)))
        with blaming('virt-v2v'):
            child = subprocess.Popen(
                argv, env=job.environment, stdin=subprocess.DEVNULL, stdout=job.output.writer,
                stderr=job.output.writer, pass_fds=(job.secret, job.messages.writer),
                start_new_session=True, preexec_fn=prepare_child)
        os.close(job.secret)
        child.returncode = 0            # or Popen would reap it: its ID is ours until the very end
        return child.pid

    def take_signals(self):
        """In a thread of its own, which touches no file: no disk that hangs can hold it up."""
        signals, kill_at = _STOP_SIGNALS | {signal.SIGCHLD}, None
        while True:
            if kill_at is None:
                info = signal.sigwaitinfo(signals)
            else:
                info = signal.sigtimedwait(signals, max(0, kill_at - time.monotonic()))
            number = info.si_signo if info else 0
            if not info:
                kill(-self._pid, signal.SIGKILL)
                kill_at, self._killed = None, True
            elif number in _STOP_SIGNALS:
                if self._reason:
                    continue                            # it has been told already
                self._reason = 'the wrapper was told to stop by ' + signal_name(number)
                kill(self._pid, signal.SIGTERM)
                kill(self._pid, signal.SIGCONT)         # it may have been paused
                kill_at = time.monotonic() + STOP_GRACE
            os.write(self._wake_writer, bytes([number]))

    def follow(self):
        """Follow virt-v2v to its end, and publish that."""
        job = self._job
        poll = select.poll()
        for fd in (self._wake_reader, job.output.reader, job.messages.reader):
            poll.register(fd, select.POLLIN)
        ended = more = False
        while not ended:
            wait = self._publish_at - time.monotonic() if self._news else None
            ready = dict(poll.poll(wait and max(0, wait) * 1000))
            if self._wake_reader in ready:
                if _STOP_SIGNALS & set(os.read(self._wake_reader, CHUNK)):
                    LOG.write('INFO', 'stopping virt-v2v: {}', self._reason)
                # A killed one may be asleep on a dead server, and never end.
                ended = self._killed or ending_of(self._pid) is not None
            elif not more:
                time.sleep(self._gather_interval)
            more = self._read()
            self._publish()
        if self._killed:
            LOG.write('WARNING', 'virt-v2v did not end when it was told to, and was killed')
        reason = self._reason           # later signals come too late to be the reason
        conclude(job, self._pid, self._read_on, self._document, reason)

    def _read(self):
        """Take in a chunk of what virt-v2v has written. Says if there may be more."""
        output = self._job.output.read()
        self._job.output_log.write(output)
        # A message is written before the line of its text: the lines need all that are there.
        messages = self._job.messages.read()
        self._apply(self._parser.messages, messages)
        self._apply(self._parser.output, output)
        return CHUNK in (len(output), len(messages))

    def _read_on(self):
        while self._read():
            pass
        self._apply(self._parser.end)

    def _apply(self, parse, *chunk):
        """Take in the events that `parse` finds."""
        try:
            for event in parse(*chunk):
                self._progress.apply(event)
                self._news = True
                self._urgent = self._urgent or event.name in _TRANSITIONS
                if event.name in ('phase', 'warning', 'error'):
                    LOG.write('INFO' if event.name == 'phase' else 'WARNING', 'virt-v2v: {}',
                              event.value)
            self._gather_interval = (GATHER_INTERVAL_COPYING if self._progress.is_copying()
                                     else GATHER_INTERVAL)
        except Exception as error:      # a mistake of ours is no reason to lose a conversion
            self._mishaps += 1
            if self._mishaps <= 10:
                LOG.write('ERROR', 'internal error, the conversion goes on: {}', where(error))

    def _publish(self):
        """Write the state if there is news: transitions at once, mere progress not too often."""
        now = time.monotonic()
        if not self._news or now < self._publish_at and (self._failing or not self._urgent):
            return
        try:
            self._job.state.write(self._document(), durable=self._urgent)
        except Exception as error:      # a full disk or a mistake of ours
            if not self._failing:
                LOG.write('ERROR', 'the state could not be written, trying again: {}',
                          where(error))
            self._failing, self._publish_at = True, now + PUBLISH_RETRY
        else:
            self._news = self._urgent = self._failing = False
            self._publish_at = now + PUBLISH_INTERVAL


# --- Guardian: prepares the job, and ends it if the monitor is killed

def guard(request, options, identity, directory, problems, answer):
    """Be the guardian. Answers with the paths, or with problems. Returns an exit status.

    `directory` is the export domain, None where finding it ended with `problems`.
    """
    os.setsid()
    os.chdir('/')
    os.close(answer.reader)
    try:
        with blaming(os.devnull):
            null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):             # a caller who waits for their end goes on
            os.dup2(null, fd)
        system_call('prctl', _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        report = Channel()
        with ExitStack() as undo:
            with interruptible():
                host = check_host(options, identity, directory, problems, answer)
                job = prepare(undo, request, identity, host, answer)
            with blaming('fork'):
                monitor_pid = fork(lambda: monitor(job, report, answer))
            undo.callback(end_descendants)
            os.close(report.writer)
            os.close(job.secret)
            facts = Facts(**expect_success(report.receive()))
            undo.pop_all()
    except Exception as error:
        with suppress(OSError):
            answer.send(problems_of(error))
        return 1
    try:
        answer.send(job.paths)
    except OSError:
        kill(monitor_pid, signal.SIGTERM)       # the launcher is gone: nobody knows of this job
    os.close(answer.writer)
    while ending_of(monitor_pid) is None:
        number = signal.sigwait(_STOP_SIGNALS | {signal.SIGCHLD})
        if number != signal.SIGCHLD:
            kill(monitor_pid, number)           # which tells virt-v2v
    if ending_of(monitor_pid) != 0:
        end_for_monitor(job, facts, ending_of(monitor_pid))
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass                                # who reaps our children may be no init at all
    return 0


def check_host(options, identity, directory, problems, answer):
    """Find and check all that virt-v2v would miss only after half an hour. Returns the Host.

    Raises HostError with all problems, which begin with `problems`.
    """
    problems, found = list(problems), []

    @contextmanager
    def looking_at(subject):
        answer.send(subject)            # in case it does not answer
        try:
            yield
        except HostError as error:
            problems.extend(error.problems)

    if directory:
        with looking_at('export_domain'):
            found.append(ExportDomain(directory))
    libdir = options.vddk_libdir or VDDK_LIBDIR
    subject = '--vddk-libdir ' + as_text(libdir)
    with looking_at(subject):
        with blaming(subject + '/lib64'):
            names = os.listdir(os.path.join(libdir, 'lib64'))
        if not any(name.startswith('libvixDiskLib.so') for name in names):
            raise HostError((subject, 'expected lib64/libvixDiskLib.so in it'))
    found.append(libdir)
    with looking_at('virt-v2v'):
        candidates = [os.path.join(place, b'virt-v2v') for place in os.environb.get(
            b'PATH', os.fsencode(ADMIN_PATH)).split(b':')]
        programs = [path for path in candidates if os.path.isabs(path) and os.path.isfile(path)
                    and os.access(path, os.X_OK)]
        found += programs[:1]
        if not programs:
            raise HostError(('virt-v2v', 'not found on PATH'))
    for path in job_directories(identity, options):
        with looking_at(as_text(path)):
            found.append((path, open_private_directory(path)))
    if problems:
        raise HostError(*OrderedDict.fromkeys(problems))    # both directories may be the same
    return Host(*found)


def prepare(undo, request, identity, host, answer):
    """Make the files, and ask virt-v2v what it can do. Returns a Job.

    What is made is unmade by `undo`, an ExitStack. Raises HostError.
    """
    answer.send('logs and state file')
    scratch = os.path.join(TEMPORARY_DIR, 'v2v-' + os.urandom(4).hex())
    with blaming(scratch):
        os.mkdir(scratch, 0o700)
    scratch = os.fsencode(scratch)
    undo.callback(remove_tree, scratch)
    state, logs, paths = create_files(undo, scratch, host)
    LOG.fd = logs[0]
    LOG.write('INFO', '{} {}, Python {}, as user {}, temporary files in {}', PROGRAM, VERSION,
              sys.version.split()[0], identity.name, os.fsdecode(scratch))
    LOG.write('INFO', 'request: {}', request)
    answer.send('virt-v2v')
    environment = make_environment(os.environb, identity, scratch, cache_directory(scratch))

    def ask(option):
        status, output = run_program(
            'virt-v2v', [host.virt_v2v, option.encode('ascii')], environment, PROBE_PATIENCE,
            stderr=subprocess.DEVNULL)
        lines = output.decode('utf-8', 'replace').split()
        LOG.write('INFO', 'virt-v2v {}: status {}: {}', option, status, ' '.join(lines))
        return lines if status == 0 else None
    return Job(request=request, host=host, capability=capabilities(ask),
               environment=environment, secret=request.vmware_password.to_descriptor(),
               scratch=scratch, output=Pipe(), messages=Pipe(), output_log=OutputLog(logs[1]),
               state=state, paths=paths)


def create_files(undo, scratch, host):
    """Create both logs and the lock under a name that no other job has.

    Returns the StateFile, the descriptors of both logs, and the paths as the caller is told them.
    Raises HostError.
    """
    (log_dir, log_fd), (state_dir, state_fd) = host.log_dir, host.state_dir
    stem = 'v2v-import-{}-{}'.format(time.strftime('%Y%m%dT%H%M%S', time.gmtime()), os.getpid())
    for name in [stem] + ['{}-{}'.format(stem, number) for number in range(2, 100)]:
        state, logs = StateFile(state_dir, state_fd, name), (name + '-wrapper.log', name + '.log')
        with ExitStack() as made, blaming('logs and state file'):
            try:
                state.claim(scratch)
                made.callback(state.release)
                descriptors = []
                for log in logs:
                    descriptors.append(create_exclusively(log, 0o640, log_fd))
                    made.callback(remove, log, log_fd)
            except FileExistsError:
                continue
            undo.callback(made.pop_all().close)
            undo.callback(state.discard)        # not before: the state may be another job's
        paths = [os.path.join(log_dir, log) for log in logs] + [state.path]
        keys = ('wrapper_log', 'v2v_log', 'state_file')
        return state, descriptors, dict(zip(keys, map(as_text, paths)))
    raise HostError((log_dir, 'all names for a job are taken'))


def end_for_monitor(job, facts, status):
    """End the job, whose monitor was killed or failed with `status`."""
    reason = 'the wrapper failed, see its log'
    if status < 0:
        reason = 'the wrapper was killed by ' + signal_name(-status)
    LOG.write('ERROR', '{}', reason)

    def document():
        return job.state.read() or Progress(job.request.source_disks).document(facts)

    def read_on():
        for data in iter(job.output.read, b''):
            job.output_log.write(data)
    conclude(job, facts.pid, read_on, document, reason)


# --- Launcher: what only root, or only the caller's own process, can do

def launch(request, options):
    """Start the job. Returns what the caller is told, a dict, and the guardian's process ID.

    Raises WrapperError; then nothing is left of the job.
    """
    identity = Identity.find()
    directory, problems = None, ()
    try:
        directory = export_directory(request.export_domain)
    except HostError as error:
        problems = error.problems       # the guardian adds what else is wrong
    identity.become()
    answer = Channel()
    with blaming('fork'):
        guardian_pid = fork(lambda: guard(request, options, identity, directory, problems, answer))
    os.close(answer.writer)
    give_up = time.monotonic() + START_PATIENCE
    told = 'wrapper'                    # or what the guardian looks at, as long as it is a text
    try:
        with interruptible():
            while isinstance(told, str):
                told = answer.receive(give_up)
    except KeyboardInterrupt:
        end_guardian(guardian_pid, END_PATIENCE)
        raise HostError(('start', 'interrupted by a signal')) from None
    except TimeoutError:
        end_guardian(guardian_pid, PRINT_PATIENCE)
        raise HostError((told, 'does not answer')) from None
    if told is None:
        end_guardian(guardian_pid, 0)   # it was killed
    return expect_success(told), guardian_pid


def end_guardian(pid, patience):
    """Have the guardian end the job, and wait for that; kill it if it has not gone in time."""
    kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + patience
    while ending_of(pid) is None and time.monotonic() < give_up:
        time.sleep(0.01)
    if ending_of(pid) != 0:
        kill(pid, signal.SIGKILL)
        kill(-pid, signal.SIGTERM)      # where there is a monitor, it is in this group


# --- Jobs: what administrators do with many of them. They are seen through their files alone.

_CODES = {'converted': EXIT_STARTED, 'failed': EXIT_FAILED, 'cancelled': EXIT_CANCELLED}
# What --list shows. `age` is the seconds since the start, None if that is not known.
Row = namedtuple('Row', 'guest status percent phase age state_file')


def say(text):
    """Print text for people, who may take their time to read it. Raises HostError."""
    with blaming('standard output'):
        write_all(1, text.encode('utf-8', 'replace') + b'\n')


def is_locked(path):
    """Say whether lock file `path` is locked, by a job that is alive."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # Shared, for a moment: at worst a start takes a dead job for a living one.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(fd)
    except OSError as error:            # who cannot look does not say that it is dead
        return error.errno not in (errno.ENOENT, errno.ELOOP)
    return False


def measure(state):
    """Return how many percent are copied, and of how many bytes, 0 if that is not known."""
    disks = [disk for disk in state['disks'] if not disk.get('unknown')]
    count = max(len(disks), state.get('disk_count', 0))
    sizes = [disk.get('bytes') or 0 for disk in disks]
    size = sum(sizes) if len(disks) == count and all(number > 0 for number in sizes) else 0
    done = sum(disk['progress'] * (number if size else 1) for disk, number in zip(disks, sizes))
    return min(100, max(0, done / (size or count or 1))), size


class View:
    """A job as all see it who can read its files, which may hold anything."""

    def __init__(self, path):
        """Raises HostError if `path` is not the state file of a job."""
        self.path, self.name = path, _UNPRINTABLE.sub('?', as_text(path))
        self.lock, self.row = os.path.splitext(path)[0] + '.lock', None
        self._samples = deque(maxlen=int(RATE_PERIOD / LOOK_INTERVAL))
        if not path.endswith('.state') or not self.look():
            raise HostError((self.name, 'is not the state file of a job'))

    def look(self):
        """Look again; return the Row. A file that is gone or damaged changes only the status."""
        is_alive = is_locked(self.lock)         # before the state, whose end comes first
        with suppress(Exception):
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(fd, 'rb') as stream:
                self._take(json.loads(stream.read().decode('utf-8')))
        if self.row and self.row.status == 'running' and not is_alive:
            self.row = self.row._replace(status='failed')
        return self.row

    def _take(self, state):
        import calendar
        percent, self._size = measure(state)
        self.pid = int(state.get('wrapper_pid', 0))
        status, message = 'running', ''
        if state.get('finished'):
            status = ('converted' if not state.get('failed') else
                      'cancelled' if state.get('cancelled') else 'failed')
            message = (state.get('last_message') or {}).get('message', '')
        age = None
        with suppress(ValueError, TypeError):
            began = time.strptime(state.get('started_at'), '%Y-%m-%dT%H:%M:%SZ')
            age = max(0, int(time.time()) - calendar.timegm(began))
        guest, phase, self.message = (
            _UNPRINTABLE.sub('?', clean(str(text)))
            for text in (state.get('vm_name', ''), state.get('phase', ''), message))
        percent = 100 if status == 'converted' else round(percent, 1)
        self._samples.append((time.monotonic(), percent))
        self.row = Row(guest, status, percent, phase, age, self.name)

    def news(self):
        """Return what the job does, or how it ended."""
        if self.row.status == 'running':
            return self.row.phase
        failed = self.row.status == 'failed' and self.message
        return 'failed: ' + self.message if failed else self.row.status

    def speed(self):
        """Return time left and rate as texts, both empty where nobody can know them."""
        (begin, before), (now, percent) = self._samples[0], self._samples[-1]
        if self.row.status != 'running' or percent <= before:
            return '', ''
        rate = (percent - before) / (now - begin)       # percent a second
        return (duration((100 - percent) / rate) + ' left',
                '{:.1f} MiB/s'.format(self._size * rate / 100 / (1 << 20)) if self._size
                else '{:.1f} %/min'.format(rate * 60))


def duration(seconds):
    """Return a number of seconds as a short text."""
    for unit, name in ((86400, 'd'), (3600, 'h'), (60, 'm')):
        if seconds >= 2 * unit:
            return '{}{}'.format(int(seconds / unit), name)
    return '{}s'.format(int(seconds))


def columns(text):
    """Return `text` with a NUL after each character that takes two columns of a terminal."""
    from unicodedata import east_asian_width
    return ''.join(character + '\0' * (east_asian_width(character) in 'WF') for character in text)


def fit(text, width):
    """Return `text` cut or filled to `width` columns."""
    return columns(text)[:width].ljust(width).replace('\0', '')


def list_jobs(rows, as_json):
    """Print a table of jobs."""
    if as_json:
        return say(json.dumps([row._asdict() for row in rows]))
    table = [[name.upper().replace('_', ' ') for name in Row._fields]] + [
        row._replace(percent='{}%'.format(int(row.percent)),
                     age='' if row.age is None else duration(row.age)) for row in rows]
    widths = [min(40, max(len(columns(text)) for text in column)) for column in zip(*table)]
    for row in table:
        say('  '.join(list(map(fit, row[:-1], widths)) + [row[-1]]))


class Screen:
    """Frames on a terminal, each in one write, in the place of the one before."""

    def __init__(self):
        import locale
        utf8 = locale.nl_langinfo(locale.CODESET).upper() == 'UTF-8'
        self._encoding, self._bar = ('utf-8', '\u2588\u2591') if utf8 else ('ascii', '#-')
        self._size, self._height = os.get_terminal_size(1), 0

    def show(self, views, everything):
        """Show jobs: as many as there is room for, those that run first; or `everything`."""
        size = os.get_terminal_size(1)
        width, room = (size.columns or 80) - 1, max(2, (size.lines or 24) - 1)
        count = len(views) if everything or len(views) <= room else room - 1
        shown = views if count == len(views) else sorted(
            views, key=lambda view: view.row.status != 'running')[:count]
        guest = min([24, width // 4] + [max(len(columns(view.row.guest)) for view in views)])
        lines = [fit(self._line(view, guest, width), width).rstrip() for view in shown]
        lines += ['and {} more'.format(len(views) - count)] if count < len(views) else []
        # Where a terminal puts its lines when its size changes, nobody knows.
        start = '\r\x1b[{}A'.format(self._height) if self._height else ''
        frame = '\x1b[H\x1b[J' if size != self._size else start
        frame += ''.join(line + '\x1b[K\n' for line in lines) + '\x1b[J'
        self._size, self._height = size, len(lines)
        with blaming('standard output'):
            write_all(1, frame.encode(self._encoding, 'replace'))

    def _line(self, view, guest, width):
        left, rate = view.speed()
        length = max(5, min(30, width - guest - 65))
        done = int(view.row.percent * length / 100)
        return '  '.join((
            fit(view.row.guest, guest), self._bar[0] * done + self._bar[1] * (length - done),
            '{:3}%'.format(int(view.row.percent)), fit(left, 9), fit(rate, 12), view.news()))


def watch(views):
    """Show jobs until all have ended. Returns an exit status."""
    on_screen = os.isatty(1) and os.environ.get('TERM', 'dumb') != 'dumb'
    screen, said, running = on_screen and Screen(), {}, views
    while running:
        running = [view for view in views if view.look().status == 'running']
        if screen:
            screen.show(views, everything=not running)
        for view in views if not screen else ():
            line = '{}: {}% {}'.format(view.row.guest, int(view.row.percent), view.news())
            if said.get(view) != line:
                say(line)
            said[view] = line
        time.sleep(LOOK_INTERVAL if running else 0)
    codes = {_CODES[view.row.status] for view in views} | {EXIT_STARTED}
    return EXIT_FAILED if EXIT_FAILED in codes else max(codes)


def tell_to_stop(view):
    """Tell the monitor of a job that is alive to stop it. Raises HostError.

    Guardian and monitor are a session of their own. While one of them lives, no other process can
    have its ID; and the guardian has locked the lock file, or who made that anew.
    """
    with blaming(view.name), suppress(FileNotFoundError, ProcessLookupError):   # just ended
        inode = ':{}'.format(os.stat(view.lock).st_ino)
        with open('/proc/locks') as stream:
            locks = [line.split() for line in stream]
        # Not the device: on btrfs and some overlays stat(2) has another one.
        holders = {int(lock[4]) for lock in locks if lock[1:4] == ['FLOCK', 'ADVISORY', 'WRITE']
                   and lock[5].endswith(inode)}
        if not holders and view.look().status != 'running':
            return
        if not holders:
            raise HostError((view.name, 'its processes cannot be seen from here; is it in a'
                                        ' container?'))
        if not (1 < view.pid < 1 << 31 and holders & {view.pid, os.getsid(view.pid)}):
            raise HostError((view.name, 'process {} does not belong to this job'.format(view.pid)))
        os.kill(view.pid, signal.SIGTERM)


def cancel(paths):
    """End jobs, and wait for that. Returns an exit status; raises HostError if some have not."""
    problems, waiting, patience = [], [], STOP_GRACE + END_PATIENCE + 10
    for path in paths:
        try:
            view = View(path)
            if view.row.status == 'running':
                tell_to_stop(view)
                waiting.append(view)
            else:
                say('{}: had ended before: {}'.format(view.name, view.news()))
        except HostError as error:
            problems.extend(error.problems)
    give_up = time.monotonic() + patience
    while waiting and time.monotonic() < give_up:
        time.sleep(0.1)
        for view in [view for view in waiting if view.look().status != 'running']:
            say('{}: {}'.format(view.name, view.news()))
            waiting.remove(view)
    problems += [(view.name, 'has not ended within {:.0f} s'.format(patience)) for view in waiting]
    if problems:
        raise HostError(*problems)
    return EXIT_STARTED


def wait_for_end(path, guardian_pid, ignored):
    """Stay until the end of the job that we have started. Returns an exit status.

    A stop signal ends the job, unless our caller has `ignored` it, as nohup does.
    """
    view = View(os.fsdecode(path.encode('utf-8', 'surrogateescape')))
    signals = _STOP_SIGNALS - ignored | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    while True:
        gone = ending_of(guardian_pid) is not None
        if gone and not is_locked(view.lock):
            return _CODES[view.look().status]
        # If the guardian was killed, the monitor goes on, and is no child of ours.
        info = signal.sigtimedwait(signals, LOOK_INTERVAL if gone else 3600)
        if info and info.si_signo != signal.SIGCHLD:
            kill(guardian_pid, signal.SIGTERM)
            with suppress(HostError):
                tell_to_stop(view)


def look_after_jobs(options, asked):
    """Do what is `asked` of --list, --watch and --cancel. Returns an exit status."""
    if asked['watch']:
        return watch([View(path) for path in asked['watch']])
    identity = Identity.find()
    identity.become()
    if asked['cancel']:
        return cancel(asked['cancel'])
    directory, views = job_directories(identity, options)[1], []
    if os.path.lexists(directory):
        fd = open_private_directory(directory)
        if asked['list']:
            end_dead_jobs(directory, fd)
        for name in sorted(os.listdir(fd)):
            if re.fullmatch(_STEM + '[.]state', name):
                with suppress(HostError):       # somebody's file of that name
                    views.append(View(os.path.join(directory, name)))
    if asked['list']:
        list_jobs([view.row for view in views], asked['json'])
        return EXIT_STARTED
    views = [view for view in views if view.row.status == 'running']
    if not views:
        say('no job is running')
    return watch(views)


# --- Main: arguments, what is printed, exit status

_DESCRIPTION = """\
Start the conversion of a VMware guest for oVirt with virt-v2v. The request is a
JSON object on standard input. The answer, on standard output, is a JSON object
with the paths of the state file and of two logs; the conversion goes on in the
background. It is over when the state file has the key "finished", and has
failed if it has the key "failed".
"""
_EPILOG = """\
exit status: 0 started, or all has been converted; 1 this host cannot do it;
  2 the request or the usage is wrong; 3 failed; 4 cancelled
"""


def parse_arguments(arguments):
    """Return the Options in `arguments`, and what is asked for instead of a start, a dict.

    Raises WrapperError; --help and --version exit.
    """
    if not arguments:
        return Options(None, None, None), {}
    import argparse         # costs a tenth of a start, and few have arguments
    import textwrap

    def directory(value):
        with blaming('working directory'):
            path = os.path.abspath(value)
        if not value or _UNPRINTABLE.search(as_text(path)):
            raise ValueError
        return path

    class ArgumentParser(argparse.ArgumentParser):
        def error(self, message):
            raise RequestError(('usage', clean(message) + '; see --help'))

    keys = [textwrap.fill(('' if default is _MANDATORY else 'optional: ') + expected, 79,
                          initial_indent='  {:20}'.format(key), subsequent_indent=' ' * 22)
            for key, default, _, expected in _RULES]
    parser = ArgumentParser(prog=PROGRAM + '.py', description=_DESCRIPTION,
                            epilog='\n'.join(['keys of the request:'] + keys + ['', _EPILOG]),
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            allow_abbrev=False)
    parser.add_argument('--version', action='version', version='{} {}'.format(PROGRAM, VERSION))
    for option, purpose in (('log-dir', 'for both logs'), ('state-dir', 'for the state file'),
                            ('vddk-libdir', 'of the VDDK, default ' + VDDK_LIBDIR)):
        parser.add_argument('--' + option, metavar='DIR', type=directory,
                            help='directory ' + purpose)
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument('--wait', action='store_true', help='start, and stay until the end;'
                          ' TERM, INT or HUP cancels the job')
    commands.add_argument('--list', action='store_true', help='list the jobs of this user')
    commands.add_argument('--watch', metavar='STATE', nargs='*', help='follow jobs until all have'
                          ' ended; without STATE, those of this user that are running')
    commands.add_argument('--cancel', metavar='STATE', nargs='+', help='end these jobs')
    parser.add_argument('--json', action='store_true', help='with --list: as JSON')
    asked = vars(parser.parse_args(arguments))
    if asked['json'] and not asked['list']:
        raise RequestError(('usage', '--json goes with --list; see --help'))
    return Options(*map(asked.pop, Options._fields)), asked


def print_line(fd, text):
    """Write `text` and a line end to descriptor `fd`. Raises OSError, also if nobody reads."""
    data = text.encode('utf-8', 'backslashreplace') + b'\n'
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if not poll.poll(PRINT_PATIENCE * 1000):
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        # A pipe that can be written to has room for this much.
        data = data[os.write(fd, data[:select.PIPE_BUF]):]


def main(arguments=None):
    """Do what the command does; return its exit status."""
    try:
        ignored = {number for number in _STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
        shed_inheritance()
        options, asked = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if asked.get('list') or asked.get('cancel') or asked.get('watch') is not None:
            return look_after_jobs(options, asked)
        paths, guardian_pid = launch(read_request(0), options)
        try:
            print_line(1, json.dumps(paths))
        except OSError as error:
            end_guardian(guardian_pid, STOP_GRACE + END_PATIENCE)
            raise HostError(('standard output', os_text(error)),
                            ('standard output', 'the conversion was stopped')) from None
        if asked.get('wait'):
            return wait_for_end(paths['state_file'], guardian_pid, ignored)
        return EXIT_STARTED
    except Exception as error:
        status = getattr(error, 'status', EXIT_HOST)
        with suppress(OSError):
            for problem in problems_of(error):
                text = '{}: error: {}: {}'.format(PROGRAM, *problem)
                print_line(2, _UNPRINTABLE.sub('?', text))
        return status


if __name__ == '__main__':
    # All is done, and a tidy end of Python would take as long again.
    os._exit(main())
