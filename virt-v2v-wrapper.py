#!/usr/bin/python3 -I
"""Start the conversion of a VMware guest for oVirt with virt-v2v, and keep its state in a file.

A JSON request on standard input starts one conversion. The command answers at once with one
JSON object, the paths of two logs and of a state file, and leaves. The conversion goes on in the
background; the state file follows it until the key "finished" appears in it.

What it promises:

* Paths are printed if and only if virt-v2v was executed and the state file exists. Otherwise
  standard error has one line for each problem, and the exit status is not 0.
* The state file is complete JSON at every moment, and every ending is published in it, also when
  virt-v2v or the process that follows it is killed.
* The password is in no argument list, environment, log or named file.
* Started as root, it becomes user vdsm before it creates a log, a state file or a secret.

What it cannot do: survive a reboot, or publish an ending when all its processes are killed at
once. It needs Linux, Python 3.6 or newer with its standard library, and virt-v2v.

The rooms of this file, each of which uses only those above it:

    errors and types, request, output, progress, command: pure, what goes in decides what comes out
    places, files: the file system and the user database
    processes: privileges, namespaces, forks, signals, the event loop
    conversion, main: put the others together

    stdin -> Request -> Paths -> Command -> child -> bytes -> lines -> events -> Progress -> state
"""

import ctypes
import errno
import fcntl
import gc
import json
import os
import pwd
import re
import resource
import select
import selectors
import signal
import subprocess
import sys
import time
from collections import OrderedDict, namedtuple
from contextlib import contextmanager

VERSION = '1.0'
PROGRAM = 'virt-v2v-wrapper'

EXIT_STARTED = 0
EXIT_HOST = 1        # the request is right, but this host cannot carry it out
EXIT_REQUEST = 2     # the request, or the command line, is wrong

# ---------------------------------------------------------------------------------------------
# Constants

# A request is some hundred bytes; this leaves room for thousands of disks.
MAX_REQUEST = 1 << 20
# Linux takes no argument above 128 KiB. No name or path in the field comes near this.
MAX_TEXT = 4096
# The longest line that can matter is a nbdkit command of a few KiB. Logs hold lines of hundreds
# of KiB (virt-v2v-facts: a hex dump of the registry); these are skipped.
MAX_LINE = 1 << 16
# What of virt-v2v's own words goes into the state file.
MAX_MESSAGE = 4096

# Below malloc's threshold for mmap, so that the buffer is not mapped anew for each read.
CHUNK = 1 << 16
# Larger than usual for fewer wake-ups, but not by much: a user has 64 MiB for all, pipe(7).
PIPE_SIZE = 1 << 18
F_SETPIPE_SZ = 1031                 # fcntl.F_SETPIPE_SZ is there from Python 3.10 on

PUBLISH_INTERVAL = 0.1              # seconds between two writes of mere progress
PUBLISH_RETRY = 1.0                 # seconds until a failed write is tried again
# virt-v2v 2.x acts on a signal when the current libguestfs call has ended: 8 to 17 s were seen.
STOP_GRACE = 45.0
# A job whose paths nobody got has only just begun: there is nothing to be cleaned up yet.
STOP_GRACE_UNKNOWN = 2.0
PROBE_PATIENCE = 30.0               # for virt-v2v to tell what it can do: it needs 0.05 s
MOUNT_PATIENCE = 60.0
PRINT_PATIENCE = 5.0                # for a caller that does not read what it asked for
FINAL_WRITE_PATIENCE = 3600.0       # how long the final state waits for room on its file system

VDSM_USER = 'vdsm'
VDSM_LOG_DIR = '/var/log/vdsm/import'
VDSM_STATE_DIR = '/run/vdsm/virt-v2v-wrapper'
VDDK_LIBDIR = '/opt/vmware-vix-disklib-distrib'
MOUNT_POINT = '/run/virt-v2v-wrapper'
# Short, because sockets live there (108 bytes for a path, unix(7)); on disk, because overlays do.
SCRATCH_DIR = '/var/tmp'
ADMIN_PATH = '/usr/sbin:/usr/bin:/sbin:/bin'

# The environment that virt-v2v gets of the caller's.
ENVIRONMENT = re.compile(rb'PATH|LIBGUESTFS_\w+|VIRTIO_WIN|(?:https?|ftp|all|no)_proxy'
                         rb'|(?:HTTPS?|FTP|ALL|NO)_PROXY')

CLONE_NEWNS = 0x00020000            # unshare(2)
MS_REC_SLAVE = 0x4000 | 0x80000     # mount(2)
PR_SET_CHILD_SUBREAPER = 36         # prctl(2)
CAPABILITY_VERSION_3 = 0x20080522   # capset(2)


# ---------------------------------------------------------------------------------------------
# Errors

class Problem(namedtuple('Problem', 'subject text')):
    """One thing that is wrong: the key, option or thing, and what was expected or happened."""

    __slots__ = ()

    def __str__(self):
        return '{0.subject}: {0.text}'.format(self)


class WrapperError(Exception):
    """Why no conversion was started: `problems`, each of them one line for the caller."""

    status = EXIT_HOST

    def __init__(self, *problems):
        super().__init__(*[str(problem) for problem in problems])
        self.problems = problems


class HostError(WrapperError):
    """This host cannot do what was asked for."""


class RequestError(WrapperError):
    """The request is wrong."""

    status = EXIT_REQUEST


class UsageError(WrapperError):
    """The command line is wrong."""

    status = EXIT_REQUEST


def os_problem(subject, error):
    """Return the Problem that OSError `error` is for `subject`, without the file's name in it."""
    text = error.strerror or type(error).__name__
    # With Python 3.6, subprocess puts the name behind it.
    known = os.strerror(error.errno) if error.errno else text
    return Problem(subject, text if text.endswith(known) else known)


def internal_problem(error):
    """Return the Problem for exception `error`, a mistake of ours. Its text may be secret."""
    traceback = error.__traceback__
    while traceback.tb_next:
        traceback = traceback.tb_next
    return Problem('internal error', '{} in line {}'.format(type(error).__name__,
                                                            traceback.tb_lineno))


# ---------------------------------------------------------------------------------------------
# Types

class Secret:
    """A text that no message, log or repr shows."""

    __slots__ = ('_text',)

    def __init__(self, text):
        self._text = text

    def reveal(self):
        """Return the text as bytes."""
        return self._text.encode('utf-8')

    def __repr__(self):
        return '***'

    def __reduce__(self):
        raise TypeError('a secret is not to be stored')


# What the caller wants; the names of the fields are the keys of the request. `source_disks` is a
# tuple, `unknown` the keys that this version does not know.
Request = namedtuple('Request', 'vm_name output_format transport_method vmware_uri'
                                ' vmware_password vmware_fingerprint export_domain source_disks'
                                ' unknown')
# The account the conversion runs as. `drop`: we are root and have to become it.
Identity = namedtuple('Identity', 'name uid gid home drop')
# The directories the caller chose, None where he did not.
Options = namedtuple('Options', 'log_dir state_dir vddk_libdir')
# The files of a job, absolute, as str.
Paths = namedtuple('Paths', 'wrapper_log v2v_log state_file')
# Which of its spellings this virt-v2v knows.
Capabilities = namedtuple('Capabilities', 'messages io_option password_option')

# Events in virt-v2v's output. `copying` is (number, count) in "Copying disk 1/3", or None.
Phase = namedtuple('Phase', 'text copying')          # what virt-v2v does now
Reached = namedtuple('Reached', 'number')            # this copy begins; 0: none goes on any more
Percent = namedtuple('Percent', 'value')             # how much of the current disk is copied
Source = namedtuple('Source', 'path')                # the next source disk, in the guest's order
Opened = namedtuple('Opened', 'path')                # the source of the current copy
Error = namedtuple('Error', 'text')                  # virt-v2v's own error
Cause = namedtuple('Cause', 'program text')          # what a program below it complained of
Notice = namedtuple('Notice', 'text')                # a warning
Guest = namedtuple('Guest', 'vm_id')                 # UUID of the VM in the export domain

# One disk being copied; `sure` if virt-v2v said which one it is.
Copy = namedtuple('Copy', 'number name percent sure')
# All that is known of the conversion. `listed` are the request's source_disks, `sources` what
# virt-v2v opened, `current` the number of the copy that percentages belong to, 0 for none.
Progress = namedtuple('Progress', 'listed count sources copies current phase error causes vm_id')
# What is fixed when virt-v2v has been executed.
Start = namedtuple('Start', 'pid wrapper_pid started_at')
# How it ended; `message` says why it failed, None if it did not.
Ending = namedtuple('Ending', 'return_code message finished_at')


# ---------------------------------------------------------------------------------------------
# Request: bytes -> Request, or one error that lists everything that is wrong

# C0, DEL and C1 controls, line separators, and halves of surrogate pairs, which are no text.
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
_URI = re.compile(r'''
    (?:esx|vpx) ://
    (?: (?!%3[aA]) [\w.~!$&'()*+,;=%-] )+ @             # a user, no colon: so no password
    (?: [A-Za-z0-9][A-Za-z0-9._-]* | \[[0-9A-Fa-f:.]+\] )
    (?: : [0-9]{1,5} )?
    (?: / [\w.~!$&'()*+,;=:@%/-]* )?
    (?: \? [\w.~!$&'()*+,;=:@%/?\[\]-]* )?
    ''', re.VERBOSE | re.ASCII)
_FINGERPRINT = re.compile('[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){19}(?:(?::[0-9A-Fa-f]{2}){12})?')
_NFS_EXPORT = re.compile(r'(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):/\S*')
_BLANK = re.compile(r'\s')


def _fits(value):
    """Say whether `value` is a printable text that is not empty and not too long."""
    return (isinstance(value, str) and value != '' and not _UNPRINTABLE.search(value)
            and len(value.encode('utf-8')) <= MAX_TEXT)


def _text(value):
    if not _fits(value):
        raise ValueError
    return value


def _matching(pattern):
    def check(value):
        if not pattern.fullmatch(_text(value)):
            raise ValueError
        return value
    return check


def _one_of(*values):
    def check(value):
        if not isinstance(value, str) or value not in values:
            raise ValueError
        return value
    return check


def _fingerprint(value):
    return _matching(_FINGERPRINT)(value).upper()


def _password(value):
    # virt-v2v reads the first line of the file (virt-v2v-facts).
    if not isinstance(value, str) or not value or re.search('[\x00\n\r\ud800-\udfff]', value):
        raise ValueError
    return Secret(value)


def _export_domain(value):
    if _BLANK.search(_text(value)) or not (value.startswith('/') or _NFS_EXPORT.fullmatch(value)):
        raise ValueError
    return value


def _disks(value):
    if not isinstance(value, list) or not all(map(_fits, value)) or len(set(value)) < len(value):
        raise ValueError
    return tuple(value)


_MANDATORY = object()

# Key, default, validator (raises ValueError), what is expected.
_RULES = (
    ('vm_name', _MANDATORY, _text,
     'a non-empty string of at most 4096 bytes without control characters'),
    ('output_format', 'raw', _one_of('raw', 'qcow2'), '"raw" or "qcow2"'),
    ('transport_method', _MANDATORY, _one_of('vddk'), '"vddk"'),
    ('vmware_uri', _MANDATORY, _matching(_URI),
     'a libvirt URI esx://USER@HOST... or vpx://USER@HOST... without a password'),
    ('vmware_password', _MANDATORY, _password, 'a non-empty string without NUL or line ends'),
    ('vmware_fingerprint', _MANDATORY, _fingerprint,
     '20 or 32 colon-separated pairs of hex digits'),
    ('export_domain', _MANDATORY, _export_domain,
     'HOST:/PATH or an absolute directory, without blanks or control characters'),
    ('source_disks', (), _disks, 'a list of different non-empty strings'),
)


def _checked(document, problems):
    """Return the values of all keys in `document`; append to `problems` what is wrong."""
    values = {}
    for key, default, check, expected in _RULES:
        value = document.get(key)
        if value is None:
            values[key] = default
            if default is _MANDATORY:
                problems.append(Problem(key, 'missing, expected ' + expected))
            continue
        try:
            values[key] = check(value)
        except ValueError:
            problems.append(Problem(key, 'expected ' + expected))
    return values


def _number(text):
    """Numbers mean nothing to us, but 1e999 would be Infinity, and JSON has no such thing."""
    number = float(text)
    if number in (float('inf'), float('-inf')):
        raise RequestError(Problem('request', 'a number is out of range'))
    return number


def _no_number(text):
    raise RequestError(Problem('request', text + ' is not JSON'))


def _object(pairs):
    document = dict(pairs)
    if len(document) < len(pairs):
        known = [rule[0] for rule in _RULES]
        seen = [key for key, _ in pairs]
        twice = [key for key in known if seen.count(key) > 1] or ['a key']
        raise RequestError(*[Problem('request', name + ' is given twice') for name in twice])
    return document


def _decoded(data):
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError:
        raise RequestError(Problem('request', 'is not UTF-8')) from None


def _document(data):
    """Return the JSON object in `data`."""
    if len(data) > MAX_REQUEST:
        raise RequestError(Problem('request', 'is longer than {} bytes'.format(MAX_REQUEST)))
    if not data.strip():
        raise RequestError(Problem('request', 'is empty, expected a JSON object'))
    if data.startswith(b'\xef\xbb\xbf'):
        raise RequestError(Problem('request', 'begins with a byte order mark'))
    try:
        document = json.loads(_decoded(data), object_pairs_hook=_object, parse_int=_number,
                              parse_float=_number, parse_constant=_no_number)
    except RecursionError:
        raise RequestError(Problem('request', 'is nested too deeply')) from None
    except ValueError as error:
        where = 'line {0.lineno} column {0.colno}'.format(error)
        raise RequestError(Problem('request', 'is not JSON: {}, {}'.format(
            error.msg.partition(':')[0], where))) from None
    if not isinstance(document, dict):
        raise RequestError(Problem('request', 'expected a JSON object'))
    return document


def parse_request(data):
    """Return the Request in `data` (bytes). Raises RequestError with all its problems."""
    document = _document(data)
    problems = []
    values = _checked(document, problems)
    if problems:
        raise RequestError(*problems)
    unknown = tuple(sorted(set(document) - set(values)))
    return Request(unknown=unknown, **values)


def read_request(fd):
    """Read descriptor `fd` to its end and return the Request in it. Raises RequestError."""
    if os.isatty(fd):
        raise RequestError(Problem('request', 'expected as JSON on standard input, which is a'
                                              ' terminal; see --help'))
    data = b''
    while len(data) <= MAX_REQUEST:
        try:
            piece = os.read(fd, CHUNK)
        except BlockingIOError:
            select.select([fd], [], [])
            continue
        except OSError as error:
            raise RequestError(os_problem('request', error)) from None
        if not piece:
            break
        data += piece
    return parse_request(data)


# ---------------------------------------------------------------------------------------------
# Output: chunks -> lines -> events. Bytes until a field is taken out, and bounded memory.

# The stages of a conversion by what may be believed in the output. While virt-v2v looks into the
# guest (_GUEST), what the guest says stands in the log too, so nothing there is believed.
_OPENING, _GUEST, _TARGET, _COPYING, _METADATA, _OVER = range(6)
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

_PHASE_LINE = re.compile(rb'\[ *[0-9]{1,9}\.[0-9]\] (.+)')      # "[%6.1f] %s"
_COPYING_DISK = re.compile(r'Copying disk ([0-9]{1,3})/([0-9]{1,3})(?![0-9])')
_BAR = re.compile(rb'[^%]{0,12}?([0-9]{1,3})% \[[*-]{40}\]')    # nbdcopy, 2.x
_RATIO = re.compile(rb' {4}\(([0-9]{1,3}(?:\.[0-9]+)?)/100%\)')  # qemu-img, 1.x
_NBDKIT_COMMAND = re.compile(rb" *(?:LANG=C )?'?nbdkit'? ")
_NBDKIT_FILE = re.compile(rb"'file=((?:[^']|'\\'')+)'")
_NBDKIT_CONFIG = b'vddk: config key=file, value='
_OPENING_FILE = re.compile(rb'Opening file (\[[^]]*\] .+?) \([a-z-]+://')
_NBDCOPY_URI = re.compile(rb"'nbd\+unix:///(%5[bB][^?']*)\?socket=")
_ERROR_LINE = b'virt-v2v: error: '
_NBDKIT_ERROR = re.compile(rb'nbdkit(?:\[[\w.-]+\])?: (?:[\w.-]+(?:\[[0-9]+\])?: )?error: .+')
_OVF_ID = re.compile(rb"""ovf:id=['"]([0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})['"]""")


def clean(data):
    """Return `data` (bytes or str) as a text that may be shown on a terminal, of bounded length."""
    text = data.decode('utf-8', 'replace') if isinstance(data, bytes) else data
    lines = text[:MAX_MESSAGE].strip('\n').split('\n')
    return '\n'.join(_UNPRINTABLE.sub('?', line) for line in lines)


def phase(text):
    """Return the Phase that virt-v2v's message `text` announces."""
    match = _COPYING_DISK.match(text)
    copying = (int(match.group(1)), int(match.group(2))) if match else None
    if copying and not 1 <= copying[0] <= copying[1]:
        copying = None
    return Phase(clean(text), copying)


def parse_message(line):
    """Return the event in one JSON message of virt-v2v (bytes), or None."""
    try:
        message = json.loads(line.decode('utf-8'))
        kind, text = message['type'], message['message']
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(text, str) or not isinstance(kind, str):
        return None
    make = {'message': phase, 'error': lambda text: Error(clean(text)),
            'warning': lambda text: Notice(clean(text))}.get(kind)
    return make(text) if make else None


def _percent(line):
    match = _BAR.fullmatch(line)
    if match:
        return Percent(min(100, int(match.group(1))))
    match = _RATIO.fullmatch(line)
    return Percent(min(100, float(match.group(1)))) if match else None


def _nbdkit_source(line):
    # The appliance shows the labels of the guest's file systems, but not at the start of a line.
    plugin = line.find(b"'vddk'")
    if plugin < 0 or not _NBDKIT_COMMAND.match(line):
        return None
    match = _NBDKIT_FILE.search(line, plugin)
    return Source(clean(match.group(1).replace(b"'\\''", b"'"))) if match else None


def _nbdkit_config(line):
    return Source(clean(line.partition(_NBDKIT_CONFIG)[2]))


def _vddk_opening(line):
    match = _OPENING_FILE.match(line, line.find(b'Opening file ['))
    return Opened(clean(match.group(1))) if match else None


def _nbdcopy_source(line):
    if not line.startswith(b'nbdcopy '):
        return None
    match = _NBDCOPY_URI.search(line)
    if not match:
        return None
    path = re.sub(rb'%([0-9A-Fa-f]{2})', lambda m: bytes([int(m.group(1), 16)]), match.group(1))
    return Opened(clean(path))


def _nbdkit_cause(line):
    return Cause('nbdkit', clean(line)) if _NBDKIT_ERROR.match(line) else None


def _cause_of(*programs):
    def cause(line):
        program = line.partition(b': ')[0]
        return Cause(program.decode('ascii'), clean(line)) if program in programs else None
    return cause


def _plain_error(line):
    return Error(line[len(_ERROR_LINE):]) if line.startswith(_ERROR_LINE) else None


def _guest_id(line):
    match = _OVF_ID.search(line)
    return Guest(match.group(1).decode('ascii').lower()) if match else None


# For each stage: literals that are cheap to look for in a whole chunk, and what to make of a line
# that holds one. Measured: they cost less than any regular expression, and with CPython from 3.10
# on, one of at most 5 bytes costs a quarter of a longer one (fastsearch.h).
_ERRORS = ((b': err', _plain_error), (b': err', _nbdkit_cause))
_OVF_LOOK = (b'OperatingSystemSection_Type', _guest_id)
_LOOKS = {
    _OPENING: _ERRORS + ((b"vddk'", _nbdkit_source),),
    _GUEST: (),
    _TARGET: _ERRORS + ((b'mount', _cause_of(b'mount', b'mount.nfs', b'mount.nfs4')),),
    _COPYING: _ERRORS + ((b'%', _percent), (b'%', _nbdcopy_source), (b'ile [', _vddk_opening),
                         (b'copy:', _cause_of(b'nbdcopy')),
                         (b'-img:', _cause_of(b'qemu-img')), _OVF_LOOK),
    _METADATA: _ERRORS + (_OVF_LOOK,),
    _OVER: (),
}
# Versions without JSON messages: their errors may come at any time, the first of them have nbdkits
# whose command is not shown (RHEL 7.5), and any line in brackets may be a phase.
_PLAIN_LOOKS = {stage: looks + ((b': err', _plain_error), (_NBDKIT_CONFIG, _nbdkit_config),
                                (b'\n[', None), (b'\r[', None))
                for stage, looks in _LOOKS.items()}


class LineBuffer:
    """Joins chunks to whole lines, ended by LF or CR. Lines above MAX_LINE are dropped.

    It keeps one buffer for all of them: new ones for each chunk, of ever other sizes, let the heap
    grow by more than 1 MiB in 2 GB of log.
    """

    def __init__(self):
        self.buffer = bytearray(1 + MAX_LINE + CHUNK)
        # In it: lines that are done with, the end of the last of them, a line that has only begun.
        self.buffer[0:1] = b'\n'
        self._done = 0
        self._filled = 1
        self._dropping = False

    def take(self, chunk):
        """Add `chunk` (bytes or the like) to the buffer.

        Returns (start, limit): there the buffer has all complete lines so far, behind the end of
        the one before, until the next call.
        """
        buffer = self.buffer
        rest = self._filled - self._done
        buffer[:rest] = buffer[self._done:self._filled]
        self._filled = rest + len(chunk)
        buffer[rest:self._filled] = chunk
        limit = 1 + max(buffer.rfind(end, rest, self._filled) for end in (b'\n', b'\r'))
        start = self._dropped(limit) if self._dropping else 0
        self._done = max(0, limit - 1)
        self._dropping = (self._filled - self._done > MAX_LINE
                          or self._dropping and limit == 0)
        if self._dropping:
            self._done = self._filled
        return start, limit

    def _dropped(self, limit):
        """Return where the line that is being dropped has ended, `limit` if it has not."""
        ends = [self.buffer.find(end, 0, limit) for end in (b'\n', b'\r')]
        return min([end for end in ends if end >= 0], default=limit)

    def end(self):
        """Return the last line if nothing ended it."""
        return bytes(self.buffer[self._done + 1:self._filled])


def split(lines):
    """Return the lines in `lines` without their ends, LF or CR."""
    return lines.replace(b'\r', b'\n').split(b'\n')


class MessageParser:
    """Makes events of virt-v2v's JSON messages."""

    def __init__(self):
        self._lines = LineBuffer()

    def feed(self, chunk):
        """Return the events in what was read last."""
        start, limit = self._lines.take(chunk)
        lines = split(bytes(self._lines.buffer[start:limit]))
        events = map(parse_message, filter(None, lines))
        return [event for event in events if event is not None]


class OutputParser:
    """Makes events of what virt-v2v and the programs below it print.

    Where there are JSON messages (`messages`), these say what happens, and the output only says
    when: a phase line counts if its text was announced before as a message, and errors count from
    the messages alone. virt-v2v writes a message before the line of the same text.
    """

    def __init__(self, messages):
        self._announced = OrderedDict() if messages else None       # bytes of a phase: its text
        self._looks = _LOOKS if messages else _PLAIN_LOOKS
        self._stage = _OPENING
        self._copies = 0        # how many have begun
        self._lines = LineBuffer()
        self._error = None      # text of an error that goes on in the next line

    def announce(self, text):
        """Tell that virt-v2v has sent the message `text` (as Phase has it)."""
        if text:                # nothing would be found everywhere
            self._announced[text.encode('utf-8')] = text

    def feed(self, chunk):
        """Return the events in what was read last."""
        events = []
        for line in self._candidates(*self._lines.take(chunk)):
            for event in self._line(line):
                # A flood of percentages between two reads is worth no more than its last one.
                if events and isinstance(event, Percent) and isinstance(events[-1], Percent):
                    events.pop()
                events.append(event)
        return events

    def end(self):
        """Return the events that were waiting for more output."""
        events = list(self._line(self._lines.end()))
        if self._error is not None:
            events.append(Error(clean(self._error[len(_ERROR_LINE):])))
        for text in (self._announced or {}).values():
            events.extend(self._enter(text))
        return events

    def _candidates(self, start, limit):
        """Yield the lines that can matter in this part of the buffer; it begins with a line end.

        What matters may change with each line, so they are looked for one after the other; but
        each literal passes over the whole only once.
        """
        found = {}
        end = start
        while True:
            if self._error is None:
                position = self._next_position(end, limit, found)
            else:
                position = end + 1 if end + 1 < limit else None
            if position is None:
                return
            begin, end = self._line_at(position, start, limit)
            yield bytes(self._lines.buffer[begin:end])

    def _line_at(self, position, start, limit):
        lines = self._lines.buffer
        begin = lines.rfind(b'\n', start, position) + 1
        begin = max(begin, lines.rfind(b'\r', begin, position) + 1)
        end = lines.find(b'\n', position, limit)
        end = limit - 1 if end < 0 else end
        carriage = lines.find(b'\r', position, end)
        return begin, end if carriage < 0 else carriage

    def _next_position(self, start, limit, found):
        """Return where in a line the first literal of this stage is, at `start` or later, or None.

        `found` has the results so far, for the next call.
        """
        nearest = None
        literals = [literal for literal, _ in self._looks[self._stage]]
        for literal in literals + list(self._announced or ()):
            position = found.get(literal)
            if position is None or 0 <= position < start:
                position = found[literal] = self._lines.buffer.find(literal, start, limit)
            if position >= 0:
                position += literal[:1] in b'\r\n'
                nearest = position if nearest is None else min(nearest, position)
        return nearest

    def _line(self, line):
        if self._error is not None:
            line = self._error + line
            self._error = None
        text = self._phase_text(line)
        if text is not None:
            return self._enter(text)
        event = self._look(line)
        if isinstance(event, Error):
            return self._plain(event, line)
        return (event,) if event else ()

    def _phase_text(self, line):
        match = _PHASE_LINE.fullmatch(line) if line.startswith(b'[') else None
        if not match:
            return None
        if self._announced is None:
            return clean(match.group(1))
        # Others may be announced before it: their lines come glued to something else at times.
        # But not those of copies, and a guest may know what will be announced after it.
        text = self._announced.get(match.group(1))
        copying = phase(text).copying if text else None
        if copying and copying[0] != self._copies + 1:
            return None
        self._copies += bool(copying)
        return self._announced.pop(match.group(1), None)

    def _enter(self, text):
        """Go to the stage that phase `text` begins."""
        self._stage = next((stage for start, stage in _STAGES if text.startswith(start)), _GUEST)
        event = phase(text)
        reached = (Reached(event.copying[0] if event.copying else 0),)
        return reached if self._announced is not None else (event,) + reached

    def _look(self, line):
        for literal, make in self._looks[self._stage]:
            event = make(line) if make and literal in line else None
            if event is not None:
                return event
        return None

    def _plain(self, event, line):
        """An error line. Up to 1.44 it is wrapped after a blank, so a blank says it goes on."""
        if self._stage != _GUEST:
            self._stage = _OVER         # what nbdkit says from now on is no cause of it
        if self._announced is not None:
            return ()
        if line.endswith(b' ') and len(line) < MAX_MESSAGE:
            self._error = line
            return ()
        return (Error(clean(event.text)),)


# ---------------------------------------------------------------------------------------------
# Progress: folds events into what is known, and this into the state. Only this room knows the
# keys of the state file.

_POINTS_BACK = re.compile(r'see (?:earlier|previous)', re.IGNORECASE)


def no_progress(listed):
    """Return the Progress of a conversion that has just been started."""
    return Progress(listed=listed, count=len(listed), sources=(), copies=(), current=0, phase=None,
                    error=None, causes=(), vm_id=None)


def _guess(progress, number):
    """Return the name of copy `number` where virt-v2v does not tell it."""
    taken = {copy.name for copy in progress.copies}
    nth = progress.listed[number - 1:number]
    name = next((path for path in nth + progress.listed if path not in taken),
                'disk {}'.format(number))
    while name in taken:                # a listed path may read "disk 2"
        name = 'another ' + name
    return name


def _new_copy(progress, number):
    path = ''.join(progress.sources[number - 1:number])
    if path and path not in [copy.name for copy in progress.copies]:
        return Copy(number, path, 0, True)
    return Copy(number, _guess(progress, number), 0, False)


def _on_phase(progress, event):
    count = event.copying[1] if event.copying else progress.count
    return progress._replace(phase=event.text, count=count)


def _on_reached(progress, event):
    progress = progress._replace(current=event.number, causes=())
    if event.number <= max([0] + [copy.number for copy in progress.copies]):
        return progress
    done = tuple(copy._replace(percent=100) for copy in progress.copies)
    return progress._replace(copies=done + (_new_copy(progress, event.number),))


def _change_current(progress, change):
    copies = tuple(change(copy) if copy.number == progress.current else copy
                   for copy in progress.copies)
    return progress._replace(copies=copies)


def _on_percent(progress, event):
    return _change_current(progress, lambda copy: copy._replace(
        percent=max(copy.percent, event.value)))


def _on_source(progress, event):
    if event.path in progress.sources:
        return progress
    return progress._replace(sources=progress.sources + (event.path,))


def _on_opened(progress, event):
    if event.path in [copy.name for copy in progress.copies]:
        return progress

    def name(copy):
        # A listed disk keeps the progress it has shown, so then it is too late for another name.
        fixed = copy.sure or (copy.percent and copy.name in progress.listed)
        return copy if fixed else copy._replace(name=event.path, sure=True)
    return _change_current(progress, name)


def _on_error(progress, event):
    return progress._replace(error=event.text)


def _on_cause(progress, event):
    # The first of each program: what follows are mostly consequences, such as broken connections.
    if event.program in [cause.program for cause in progress.causes]:
        return progress
    return progress._replace(causes=progress.causes + (event,))


def _on_guest(progress, event):
    return progress._replace(vm_id=event.vm_id)


_FOLDS = {Phase: _on_phase, Reached: _on_reached, Percent: _on_percent, Source: _on_source,
          Opened: _on_opened, Error: _on_error, Cause: _on_cause, Guest: _on_guest}


def fold(progress, event):
    """Return what is known after `event`."""
    apply = _FOLDS.get(type(event))
    return apply(progress, event) if apply else progress


def error_text(progress):
    """Return virt-v2v's error, with its cause where it only points at earlier messages, or None."""
    if not progress.error or not progress.causes or not _POINTS_BACK.search(progress.error):
        return progress.error
    return '{} ({})'.format(progress.error, '; '.join(cause.text for cause in progress.causes))


def _disks(progress):
    percents = OrderedDict((path, 0) for path in progress.listed)
    percents.update((copy.name, copy.percent) for copy in progress.copies)
    return [OrderedDict((('path', path), ('progress', percent)))
            for path, percent in percents.items()]


def timestamp(seconds=None):
    """Return a time in seconds since the epoch, now by default, as UTC in ISO 8601."""
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(seconds))


def state_document(start, progress, return_code=None):
    """Return the state of a conversion that goes on, or whose end is being dealt with."""
    state = OrderedDict((
        ('started', True), ('pid', start.pid), ('wrapper_pid', start.wrapper_pid),
        ('disks', _disks(progress)), ('disk_count', progress.count),
        ('started_at', start.started_at), ('updated_at', timestamp())))
    message = error_text(progress)
    optional = (('phase', progress.phase), ('vm_id', progress.vm_id), ('return_code', return_code))
    state.update((key, value) for key, value in optional if value is not None)
    return _with_message(state, message)


def _with_message(state, message):
    if message:
        state['last_message'] = OrderedDict((('type', 'error'), ('message', message)))
    return state


def finished_document(state, ending):
    """Return `state`, the last one published, completed by how the conversion ended."""
    state = OrderedDict(state)
    if ending.return_code is not None:
        state['return_code'] = ending.return_code
    state.pop('last_message', None)
    if ending.message is None:
        state['disks'] = [OrderedDict(disk, progress=100) for disk in state['disks']]
    else:
        state['failed'] = True
    _with_message(state, ending.message)
    state['updated_at'] = state['finished_at'] = ending.finished_at
    state['finished'] = True
    return state


def signal_name(number):
    """Return a name such as SIGTERM for the number of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return 'signal {}'.format(number)


def failure_text(return_code, error, reason):
    """Say why the conversion failed, or return None if it did not: only status 0 is success.

    `return_code` is None if it is not known; `error` what virt-v2v said, `reason` why the wrapper
    stopped it, both None if there is nothing.
    """
    if return_code == 0:
        return None
    if reason:
        return '{} ({})'.format(reason, error) if error else reason
    if return_code is None:
        return 'virt-v2v is gone, and nobody knows how it ended'
    if return_code < 0:
        killed = 'virt-v2v was killed by ' + signal_name(-return_code)
        return '{} ({})'.format(killed, error) if error else killed
    return error or ('virt-v2v ended with status {} and no error message, as it does when a signal'
                     ' tells it to stop'.format(return_code))


# ---------------------------------------------------------------------------------------------
# Command: what to execute, in the words of the version that is there

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
    # Up to 2.7.15 it says rhv, later ovirt, where -o rhv goes on to work (select_output.ml).
    if not {'output:rhv', 'output:ovirt'} & set(features):
        raise HostError(Problem('virt-v2v', 'this version cannot write to an oVirt export domain'
                                            ' (RHEL 10 has no -o rhv)'))
    if not {'-io', '--vddk-libdir'} & options:
        raise HostError(Problem('virt-v2v', 'this version cannot read disks with VDDK'))
    return Capabilities(messages=messages, io_option='-io' in options,
                        password_option='-ip' if '-ip' in options else '--password-file')


def _vddk_options(capability, libdir, thumbprint):
    # 1.39.2 brought -io; the older spelling went in 2.7.13.
    if capability.io_option:
        return ['-io', 'vddk-libdir=' + libdir, '-io', 'vddk-thumbprint=' + thumbprint]
    return ['--vddk-libdir', libdir, '--vddk-thumbprint', thumbprint]


def virt_v2v_arguments(capability, request, directory, libdir, password_fd, message_fd):
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
    arguments += _vddk_options(capability, libdir, request.vmware_fingerprint)
    arguments += ['-of', request.output_format, '-o', 'rhv', '-os', directory,
                  '--bridge', 'ovirtmgmt', '--', request.vm_name]
    return [argument.encode('utf-8', 'surrogateescape') for argument in arguments]


def virt_v2v_environment(inherited, identity, scratch):
    """Return the environment of virt-v2v: what of `inherited` (bytes to bytes) is of use, and ours.

    `scratch` is the directory for its temporary files. libguestfs puts its sockets below
    XDG_RUNTIME_DIR, or /tmp, where a killed run would leave them; and after a change of user the
    caller's XDG_RUNTIME_DIR is somebody else's. Without LIBGUESTFS_CACHEDIR the appliance would be
    built anew in each scratch directory.
    """
    environment = {b'LIBGUESTFS_BACKEND': b'direct', b'PATH': os.fsencode(ADMIN_PATH),
                   b'LIBGUESTFS_CACHEDIR': os.fsencode(SCRATCH_DIR)}
    environment.update((name, value) for name, value in inherited.items()
                       if ENVIRONMENT.fullmatch(name))
    environment.update({
        b'LC_ALL': b'C',                    # its messages are translated
        b'TMPDIR': scratch, b'VIRT_V2V_TMPDIR': scratch, b'XDG_RUNTIME_DIR': scratch,
        b'HOME': os.fsencode(identity.home),
        b'USER': os.fsencode(identity.name), b'LOGNAME': os.fsencode(identity.name)})
    return environment


# ---------------------------------------------------------------------------------------------
# Places: who we are, which directories and files, which export domain

_UUID = re.compile('[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}')
_OCTAL = re.compile(r'\\([0-7]{3})')


def as_text(path):
    """Return `path`, a name that Python made of bytes in its own encoding, as the text it is."""
    return os.fsencode(path).decode('utf-8', 'surrogateescape')


def find_identity():
    """Return the Identity to run as: vdsm for root, else who we are. Raises HostError."""
    drop = os.geteuid() == 0
    try:
        entry = pwd.getpwnam(VDSM_USER) if drop else pwd.getpwuid(os.geteuid())
    except KeyError:
        who = VDSM_USER if drop else 'with ID {}'.format(os.geteuid())
        raise HostError(Problem('user', 'there is no user {} on this host'.format(who))) from None
    if entry.pw_uid == 0:
        raise HostError(Problem('user', 'user {} is root'.format(entry.pw_name)))
    return Identity(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, drop)


def job_directories(options, identity, inherited):
    """Return the directories for logs and for the state, as `options` or the identity say.

    `inherited` is the environment (str to str); XDG_STATE_HOME is as in the XDG base directory
    specification: a relative one does not count.
    """
    log_dir, state_dir = VDSM_LOG_DIR, VDSM_STATE_DIR
    if identity.name != VDSM_USER:
        base = inherited.get('XDG_STATE_HOME', '')
        if not os.path.isabs(base):
            base = os.path.join(identity.home, '.local/state')
        log_dir = state_dir = os.path.join(base, PROGRAM)
    return options.log_dir or log_dir, options.state_dir or state_dir


def make_first_missing(directory, identity):
    """As root: make the first missing directory on the way to `directory`, for `identity`.

    Returns its path, None if nothing was made. Only where nobody but root may write can nothing be
    slipped in between. The account makes the rest itself. Raises HostError.
    """
    parts = directory.strip('/').split('/')
    ancestors = ['/' + '/'.join(parts[:n]) for n in range(1, len(parts) + 1)]
    missing = next((path for path in ancestors if not os.path.lexists(path)), None)
    if missing is None:
        return None
    try:
        parent = os.stat(os.path.dirname(missing))
        if parent.st_uid != 0 or parent.st_mode & 0o022:
            return None
        os.mkdir(missing, 0o755)
        try:
            os.chown(missing, identity.uid, identity.gid, follow_symlinks=False)
        except OSError:
            os.rmdir(missing)
            raise
    except OSError as error:
        raise HostError(os_problem(missing, error)) from None
    return missing


def open_private_directory(directory):
    """Make `directory` if it is missing; return a descriptor of it.

    Raises HostError if it is not ours alone to write to: whoever can rename what is in it could
    have us write to any file of ours.
    """
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise HostError(os_problem(directory, error)) from None
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return fd
    os.close(fd)
    raise HostError(Problem(directory, 'expected a directory that belongs to the user who runs the'
                                       ' conversion, and that nobody else may write to'))


def find_nfs_mount(spec, mountinfo):
    """Return where the NFS export `spec` (HOST:/PATH) is mounted, or None.

    `mountinfo` is the text of /proc/self/mountinfo, proc(5). VDSM's own mount is preferred.
    """
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(' - ')
        fields, kind = left.split(' '), right.split(' ')
        if len(fields) < 6 or len(kind) < 2 or kind[0] not in ('nfs', 'nfs4'):
            continue
        source, point = (_OCTAL.sub(lambda m: chr(int(m.group(1), 8)), text)
                         for text in (kind[1], fields[4]))
        if source.rstrip('/') == spec.rstrip('/'):
            found.append(point)
    preferred = [point for point in found if point.startswith('/rhev/data-center/mnt/')]
    return (preferred or found or [None])[-1]


def export_domain_root(directory):
    """Return the directory named by a UUID in the export domain at `directory`.

    virt-v2v makes these checks only after the whole conversion (output_rhv.ml). Raises HostError.
    """
    try:
        uuids = [name for name in os.listdir(directory) if _UUID.fullmatch(name)]
    except OSError as error:
        raise HostError(os_problem('export_domain', error)) from None
    if len(uuids) != 1:
        raise HostError(Problem('export_domain', 'expected exactly one directory named by a UUID in'
                                                 ' it, found {}'.format(len(uuids))))
    root = os.path.join(directory, uuids[0])
    for path in (root, os.path.join(root, 'images'), os.path.join(root, 'master/vms')):
        if not os.path.isdir(path):
            raise HostError(Problem('export_domain', '{} is not a directory; is the domain attached'
                                                     ' to a data center?'.format(path)))
        if not os.access(path, os.W_OK | os.X_OK):
            raise HostError(Problem('export_domain', 'may not write to ' + path))
    return root


def domain_contents(root):
    """Return the set of what is in the export domain: paths of images and VMs below `root`."""
    contents = set()
    for part in ('images', 'master/vms'):
        try:
            names = os.listdir(os.path.join(root, part))
        except OSError:
            continue
        contents.update(os.path.join(part, name) for name in names)
    return contents


def check_vddk_libdir(libdir):
    """Raise HostError unless the VDDK is in `libdir`: virt-v2v waits 30 s before it says so."""
    subject = '--vddk-libdir'
    try:
        names = os.listdir(os.path.join(libdir, 'lib64'))
    except OSError as error:
        raise HostError(os_problem('{} {}/lib64'.format(subject, libdir), error)) from None
    if not any(name.startswith('libvixDiskLib.so') for name in names):
        raise HostError(Problem('{} {}'.format(subject, libdir),
                                'expected lib64/libvixDiskLib.so in it'))


def find_virt_v2v(path):
    """Return virt-v2v on `path` (bytes, as in PATH). Raises HostError."""
    for directory in path.split(b':'):
        candidate = os.path.join(directory, b'virt-v2v')
        if os.path.isabs(candidate) and os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise HostError(Problem('virt-v2v', 'not found on PATH'))


# ---------------------------------------------------------------------------------------------
# Files: exclusive creation, durable replacement, the secret's descriptor, logs

def create_exclusively(name, mode, directory_fd):
    """Create file `name`, which must not exist, to append to. Returns a descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW
    return os.open(name, flags, mode, dir_fd=directory_fd)


def write_all(fd, data):
    """Write all of `data`. Raises OSError, whose `written` says how much was written before."""
    written = 0
    try:
        while written < len(data):
            written += os.write(fd, data[written:] if written else data)
    except OSError as error:
        error.written = written
        raise


class WrapperLog:
    """The wrapper's own log, one line for each record. Whatever is wrong with it is ignored.

    Not the module logging: importing that takes longer than all that is done before virt-v2v runs.
    """

    def __init__(self):
        self.fd = None

    def info(self, template, *values):
        """Note what happens."""
        self._write('INFO', template % values)

    def warning(self, template, *values):
        """Note what somebody may have to look after."""
        self._write('WARNING', template % values)

    def error(self, template, *values):
        """Note what makes the conversion, or the report of it, fail."""
        self._write('ERROR', template % values)

    def exception(self, text):
        """Note where the exception being handled came from, but not its text: it may be secret."""
        kind, error, trace = sys.exc_info()
        lines = [text + ': ' + (getattr(error, 'strerror', None) or kind.__name__)]
        try:
            import traceback
            lines += traceback.format_tb(trace)
        except Exception:           # whatever is wrong here, it is no reason to stop either
            pass
        self._write('ERROR', '\n'.join(lines))

    def _write(self, level, text):
        # Line ends are escaped, so that no name can forge a record.
        text = _UNPRINTABLE.sub(lambda m: m.group().encode('unicode_escape').decode('ascii'), text)
        line = '{} {} {}\n'.format(timestamp(), level, text)
        try:
            write_all(self.fd, line.encode('utf-8', 'backslashreplace'))
        except (OSError, TypeError):    # a full disk, or no log yet
            pass


LOG = WrapperLog()


class StateFile:
    """The state file: replaced as a whole, so that a reader sees the old or the new one."""

    def __init__(self, directory_fd, name):
        """Take `name`. Raises FileExistsError if it is taken; OSError."""
        self._directory = directory_fd
        self._name = name
        # Nobody else has this name, so what a killed process of this job left there may go.
        self._temporary = '.{}.{}.tmp'.format(name, os.urandom(4).hex())
        try:
            self._create_temporary({})
            os.link(self._temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        finally:
            self._remove_temporary()

    def read(self):
        """Return the state published last, empty if none was. Raises OSError."""
        fd = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._directory)
        with open(fd, encoding='utf-8') as stream:
            return json.load(stream, object_pairs_hook=OrderedDict)

    def write(self, document):
        """Publish `document` durably. Raises OSError; then the file is as it was before."""
        self._remove_temporary()
        try:
            self._create_temporary(document)
            os.rename(self._temporary, self._name, src_dir_fd=self._directory,
                      dst_dir_fd=self._directory)
        except OSError:
            self._remove_temporary()
            raise
        os.fsync(self._directory)

    def remove(self):
        """Remove it. Raises OSError."""
        self._remove_temporary()
        os.unlink(self._name, dir_fd=self._directory)

    def _create_temporary(self, document):
        text = json.dumps(document, indent=2, ensure_ascii=False) + '\n'
        fd = create_exclusively(self._temporary, 0o644, self._directory)
        try:
            write_all(fd, text.encode('utf-8'))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remove_temporary(self):
        try:
            os.unlink(self._temporary, dir_fd=self._directory)
        except FileNotFoundError:
            pass


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
                LOG.warning('virt-v2v log: works again, %d bytes are missing', self._lost)
                self._lost = 0
            write_all(self._fd, data)
        except OSError as error:
            if not self._lost:
                LOG.warning('virt-v2v log: %s', error.strerror)
            self._lost += len(data) - (0 if self._lost else error.written)


def secret_descriptor(secret):
    """Return a descriptor of a file in memory, without a name, that holds `secret`."""
    if hasattr(os, 'memfd_create'):                 # Python 3.8
        fd = os.memfd_create(PROGRAM)       # novm
    else:
        fd = os.open('/dev/shm', os.O_RDWR | os.O_TMPFILE, 0o400)
    os.fchmod(fd, 0o400)
    write_all(fd, secret.reveal())
    return fd


def make_scratch():
    """Make a directory for the temporary files of one job and return its path as bytes."""
    while True:
        path = os.path.join(SCRATCH_DIR, 'v2v-' + os.urandom(4).hex())
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue
        return os.fsencode(path)


def _remove(name, directory_fd):
    try:
        try:
            os.unlink(name, dir_fd=directory_fd)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=directory_fd)
    except OSError as error:
        LOG.warning('temporary file %s: %s', clean(os.fsencode(name)), error.strerror)


def remove_tree(path):
    """Remove directory `path` and all in it, as far as possible. It need not exist."""
    try:
        # As str: Python 3.6 mixes both kinds when it is given bytes.
        for _, directories, names, directory_fd in os.fwalk(os.fsdecode(path), topdown=False):
            for name in names + directories:
                _remove(name, directory_fd)
        _remove(path, None)
    except FileNotFoundError:
        pass
    except OSError as error:
        LOG.warning('temporary files %s: %s', os.fsdecode(path), error.strerror)


# ---------------------------------------------------------------------------------------------
# Processes: privileges, namespaces, forks, signals, the event loop. No JSON, no parsing.

_LIBC = ctypes.CDLL(None, use_errno=True)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _system_call(name, *arguments):
    """Call a function of the C library that returns 0. Raises OSError."""
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, '{}: {}'.format(name, os.strerror(number)))


def _shed_descriptors():
    """Close what the caller left open; have 0 to 2 taken, so that no other file gets them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:             # reading from it, or writing to it, goes on to fail
            os.open(os.devnull, os.O_WRONLY if fd == 0 else os.O_RDONLY)
    for fd in map(int, os.listdir('/proc/self/fd')):
        if fd > 2:
            try:
                os.close(fd)
            except OSError:         # the one that listdir used
                pass


def _shed_signals():
    """Give all signals their default action; but a terminal may hang up before the fork."""
    for number in range(1, signal.NSIG):
        if signal.getsignal(number) == signal.SIG_IGN and number not in (
                signal.SIGPIPE, signal.SIGXFSZ):        # Python ignores these itself
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def shed_inheritance():
    """Free this process of what its caller left to it, and of core dumps."""
    _shed_descriptors()
    _shed_signals()
    os.umask(0o022)
    # A limit of 1 byte also keeps core dumps from being piped to a program, which 0 does not
    # (fs/coredump.c); the hard limit makes it hold for virt-v2v, which has the password too.
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    limit = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def kill_group(pid):
    """Kill process group `pid`, if anything is left of it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def run_program(argv, environment, patience, stderr):
    """Run a program that ends by itself; return its status and its output (bytes).

    `stderr` is as for Popen. Raises OSError; subprocess.TimeoutExpired after `patience` seconds,
    when it has been killed with all that it started.
    """
    child = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
    with child:
        try:
            output = child.communicate(timeout=patience)[0]
        except subprocess.TimeoutExpired:
            kill_group(child.pid)
            raise
    return child.returncode, output


def mount_export_domain(spec):
    """As root: mount NFS export `spec` where only this job sees it; return the mount point.

    The mount is in a namespace of our own, so it goes with the last process in it. Propagation is
    one way: what the host unmounts is unmounted here too. Raises HostError.
    """
    try:
        os.makedirs(MOUNT_POINT, mode=0o755, exist_ok=True)
        _system_call('unshare', CLONE_NEWNS)
        _system_call('mount', None, b'/', None, ctypes.c_ulong(MS_REC_SLAVE), None)
        status, output = run_program(
            ['mount', '-t', 'nfs', '-o', 'nosuid,nodev,noexec', '--', spec, MOUNT_POINT],
            {'PATH': ADMIN_PATH, 'LC_ALL': 'C'}, MOUNT_PATIENCE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise HostError(os_problem('export_domain', error)) from None
    except subprocess.TimeoutExpired:
        raise HostError(Problem('export_domain', 'could not be mounted within {:.0f} s'.format(
            MOUNT_PATIENCE))) from None
    if status != 0:
        said = ' '.join(clean(output).split()) or 'status {}'.format(status)
        raise HostError(Problem('export_domain', 'could not be mounted: ' + said))
    return MOUNT_POINT


def _clear_capabilities():
    """Give up all capabilities, the inheritable ones too, which a change of user leaves."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _system_call('capset', header, (ctypes.c_uint32 * 6)())


def _can_get_back():
    """Say whether this process could still become root or has any capability."""
    with open('/proc/self/status') as status:
        sets = re.findall(r'^Cap(?:Inh|Prm|Eff|Amb):\s*([0-9a-f]+)$', status.read(), re.MULTILINE)
    if not sets or any(int(capabilities, 16) for capabilities in sets):
        return True
    try:
        os.setuid(0)
    except PermissionError:
        return False
    return True


def drop_privileges(identity):
    """Become `identity` for good. Raises HostError if anything is left of root."""
    groups = set(os.getgrouplist(identity.name, identity.gid))
    try:
        os.initgroups(identity.name, identity.gid)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
        _clear_capabilities()
    except OSError as error:
        raise HostError(os_problem('cannot become user ' + identity.name, error)) from None
    if (set(os.getresuid()) != {identity.uid} or set(os.getresgid()) != {identity.gid}
            or not set(os.getgroups()) <= groups or _can_get_back()):
        raise HostError(Problem('cannot become user ' + identity.name, 'privileges are left'))


def release_standard_descriptors():
    """Point descriptors 0 to 2 to /dev/null, so that a caller who waits for their end goes on."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)


def fork(child):
    """Fork; the new process runs `child`, a function that returns an exit status, and ends.

    Returns the process ID. The stop signals stay blocked in the child until it unblocks them.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = child()
        except Exception:
            LOG.exception('internal error')
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


# What one side of the start has of the two pipes between the caller's process and the job.
Link = namedtuple('Link', 'reader writer')


def detach(guardian):
    """Start `guardian` as leader of a session of its own, free of the caller's descriptors.

    It is called with a Link; the Link to it is returned.
    """
    (answers, answer), (commands, command) = os.pipe(), os.pipe()

    def lead():
        os.setsid()
        os.chdir('/')
        os.close(answers)
        os.close(command)
        release_standard_descriptors()
        return guardian(Link(commands, answer))
    try:
        fork(lead)
    except OSError as error:
        raise HostError(os_problem('fork', error)) from None
    os.close(commands)
    os.close(answer)
    return Link(answers, command)


def share_memory():
    """Have as little memory as possible, and what there is remain shared with the forks to come.

    What was needed to compile and to import leaves holes that malloc keeps, and the first garbage
    collection would write to each object.
    """
    if hasattr(_LIBC, 'malloc_trim'):   # glibc
        _LIBC.malloc_trim(0)
    if hasattr(gc, 'freeze'):           # Python 3.7
        gc.freeze()     # novm


def read_to_end(fd):
    """Return all that comes until nobody has the other end of `fd` any more."""
    return b''.join(iter(lambda: os.read(fd, CHUNK), b''))


def adopt_orphans():
    """Become the parent of all descendants whose own parent ends. Raises OSError."""
    _system_call('prctl', PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children():
    """Return the IDs of this process's children.

    The kernel's list of them, proc(5), may miss some while others are reaped; but only we do that.
    """
    try:
        with open('/proc/{0}/task/{0}/children'.format(os.getpid())) as stream:
            return [int(pid) for pid in stream.read().split()]
    except FileNotFoundError:           # a kernel without CONFIG_PROC_CHILDREN
        return _children_among_all()


def _children_among_all():
    children = []
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/{}/stat'.format(name), 'rb') as stream:
                # The name in parentheses may hold anything: proc(5).
                parent = stream.read().rpartition(b') ')[2].split()[1]
        except (OSError, IndexError):
            continue
        if int(parent) == os.getpid():
            children.append(int(name))
    return children


def kill_descendants(spared=None):
    """Kill all children but `spared`, and theirs, which come to us (adopt_orphans), to the last."""
    for _ in range(1000):               # each round gets at least one, unless they fork faster
        children = [pid for pid in _children() if pid != spared]
        if not children:
            return
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (PermissionError, ProcessLookupError, ChildProcessError):
                continue            # it has become somebody else, or is gone by itself


def ending_of(pid):
    """Return how child `pid` ended, as subprocess has it, or None while it runs.

    The child stays a zombie, so that its ID names nothing else. Raises ChildProcessError.
    """
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


class Pipe:
    """A pipe whose reading end does not block, and a buffer to read it into."""

    def __init__(self):
        self._buffer = bytearray(CHUNK)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def enlarge(self):
        """Ask for a larger buffer. Each user has a limited amount of these (pipe(7))."""
        try:
            fcntl.fcntl(self.reader, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass

    def close_writer(self):
        """Leave writing to the other processes that have it."""
        os.close(self.writer)

    def read(self):
        """Return what is there, at most CHUNK bytes; b'' at the end, None if there is nothing.

        It is a memoryview that is good until the next read.
        """
        try:
            return memoryview(self._buffer)[:os.readv(self.reader, [self._buffer])]
        except BlockingIOError:
            return None

    def drain(self):
        """Yield what is there now, and not what a process that goes on writing adds for ever."""
        for _ in range(PIPE_SIZE // CHUNK + 1):
            data = self.read()
            if not data:
                return
            yield data


class Loop:
    """Waits for descriptors and times, and calls back. While nothing happens, it sleeps."""

    def __init__(self):
        self._selector = selectors.DefaultSelector()
        self._times = {}
        self._running = True

    def watch(self, fd, callback):
        """Call `callback()` whenever `fd` can be read."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def forget(self, fd):
        """Watch `fd` no longer."""
        self._selector.unregister(fd)

    def call_later(self, callback, seconds):
        """Call `callback()` once after `seconds`, unless it is waiting already."""
        self._times.setdefault(callback, time.monotonic() + seconds)

    def stop(self):
        """Make run return."""
        self._running = False

    def run(self):
        """Call back until one of the callbacks stops it."""
        self._running = True
        while self._running:
            for key, _ in self._selector.select(self._patience()):
                key.data()
            now = time.monotonic()
            for callback in [call for call, when in self._times.items() if when <= now]:
                del self._times[callback]
                callback()

    def _patience(self):
        if not self._times:
            return None
        return max(0, min(self._times.values()) - time.monotonic())


class Signals:
    """SIGCHLD and the stop signals, as something to read."""

    def __init__(self):
        self._pipe = Pipe()
        self.reader = self._pipe.reader
        os.set_blocking(self._pipe.writer, False)
        signal.set_wakeup_fd(self._pipe.writer)
        for number in (signal.SIGCHLD,) + _STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    def read(self):
        """Return the numbers of the signals that came."""
        return {number for numbers in self._pipe.drain() for number in numbers}


class Follower:
    """Follows one child, leader of its process group, to its end, and stops it on request."""

    def __init__(self, loop, signals, pid, pipes):
        """`pipes`: (Pipe, function called with each piece that is read) for each pipe."""
        self.stopped_by = None      # why it was told to end
        self.return_code = None
        self._loop = loop
        self._signals = signals
        self._pid = pid
        self._pipes = pipes
        for pipe, consume in pipes:
            loop.watch(pipe.reader, lambda pipe=pipe, consume=consume: self._read(pipe, consume))
        loop.watch(signals.reader, self._on_signals)

    def run(self):
        """Return when the child has ended and all it wrote has been read. It stays a zombie."""
        self._check_end()
        if self.return_code is None:
            self._loop.run()
        for pipe, consume in self._pipes:
            for data in pipe.drain():
                consume(data)

    def stop(self, reason, grace):
        """Tell the child to end, because of `reason`; kill its group `grace` seconds later."""
        if self.stopped_by is None and self.return_code is None:
            LOG.info('stopping virt-v2v: %s', reason)
            self.stopped_by = reason
            os.kill(self._pid, signal.SIGTERM)
            os.kill(self._pid, signal.SIGCONT)      # it may have been paused
            self._loop.call_later(self._kill, grace)

    def _kill(self):
        LOG.warning('virt-v2v did not end when it was told to, killing it')
        kill_group(self._pid)

    def _read(self, pipe, consume):
        data = pipe.read()
        if data == b'':
            self._loop.forget(pipe.reader)
        elif data is not None:
            consume(data)

    def _on_signals(self):
        for number in self._signals.read():
            if number == signal.SIGCHLD:
                self._check_end()
            else:
                self.stop('the wrapper was told to stop by ' + signal.Signals(number).name,
                          STOP_GRACE)

    def _check_end(self):
        self.return_code = ending_of(self._pid)
        if self.return_code is not None:
            self._loop.stop()


# ---------------------------------------------------------------------------------------------
# Conversion: puts the rooms above together, in three processes

# What a process of the job needs. `directory` is the export domain, `root` the directory named by
# a UUID in it, `contents` what is in that before; `environment` is virt-v2v's.
Job = namedtuple('Job', 'request identity directory root contents libdir virt_v2v environment'
                        ' scratch output_log state')

# Events that a reader of the state file should see at once.
_TRANSITIONS = (Phase, Reached, Opened, Error, Guest)
_READY = b'ready\n'
_GO = b'go'


class Publisher:
    """Writes the state to its file: transitions at once, mere progress not too often."""

    def __init__(self, loop, state, document):
        """`document` is a function that returns the state as it is now."""
        self._loop = loop
        self._state = state
        self._document = document
        self._news = False
        self._written_at = float('-inf')
        self._failing = False

    def publish(self, at_once):
        """Write the state, now if `at_once` or if the last time is long enough ago, else soon."""
        self._news = True
        wait = self._written_at + PUBLISH_INTERVAL - time.monotonic()
        if at_once or wait <= 0:
            self._write()
        else:
            self._loop.call_later(self._write, wait)

    def _write(self):
        if not self._news:
            return
        self._written_at = time.monotonic()
        try:
            self._state.write(self._document())
        except Exception:       # a full disk or a mistake of ours: no reason to lose a conversion
            if not self._failing:
                LOG.exception('the state could not be written, trying again')
            self._failing = True
            self._loop.call_later(self._write, PUBLISH_RETRY)
        else:
            self._news = self._failing = False


def publish_ending(state, document):
    """Write the last state; where that fails, go on trying for FINAL_WRITE_PATIENCE seconds."""
    give_up = time.monotonic() + FINAL_WRITE_PATIENCE
    while True:
        try:
            return state.write(document)
        except OSError as error:
            LOG.error('state file: %s; trying again', error.strerror)
            if time.monotonic() > give_up:
                raise
            time.sleep(PUBLISH_RETRY)


class Monitor:
    """Runs virt-v2v, follows it, and keeps the state file true."""

    def __init__(self, job, output, messages):
        """Start virt-v2v and publish that. Raises HostError."""
        adopt_orphans()     # as the guardian does, which may be killed
        self._job = job
        self._messages = messages
        self._capability = self._ask_virt_v2v()
        self._parser = OutputParser(self._capability.messages)
        self._message_parser = MessageParser()
        self._progress = no_progress(job.request.source_disks)
        self._mishaps = 0
        self._return_code = None
        self._loop = Loop()
        self._publisher = Publisher(self._loop, job.state, self._document)
        signals = Signals()
        self._child = self._execute(output)
        self._start = Start(self._child.pid, os.getpid(), timestamp())
        self._follower = Follower(self._loop, signals, self._child.pid,
                                  ((output, self._on_output), (messages, self._on_messages)))
        LOG.info('virt-v2v has process ID %d, wrapper %d', self._start.pid, os.getpid())
        try:
            job.state.write(self._document())
        except OSError as error:
            raise HostError(os_problem('state file', error)) from None

    def _ask_virt_v2v(self):
        def ask(option):
            argv = [self._job.virt_v2v, option.encode('ascii')]
            try:
                status, output = run_program(argv, self._job.environment, PROBE_PATIENCE,
                                             stderr=subprocess.DEVNULL)
            except OSError as error:
                raise HostError(os_problem('virt-v2v', error)) from None
            except subprocess.TimeoutExpired:
                raise HostError(Problem('virt-v2v', 'does not answer')) from None
            lines = output.decode('utf-8', 'replace').split()
            LOG.info('virt-v2v %s: status %d: %s', option, status, ' '.join(lines))
            return lines if status == 0 else None
        return capabilities(ask)

    def _execute(self, output):
        """Start virt-v2v and return its Popen. Raises HostError."""
        job = self._job
        secret = secret_descriptor(job.request.vmware_password)
        argv = [job.virt_v2v] + virt_v2v_arguments(
            self._capability, job.request, job.directory, job.libdir, secret, self._messages.writer)
        LOG.info('executing %s', ' '.join(clean(argument) for argument in argv))
        try:
            return subprocess.Popen(
                argv, env=job.environment, stdin=subprocess.DEVNULL, stdout=output.writer,
                stderr=output.writer, pass_fds=(secret, self._messages.writer),
                start_new_session=True)
        except OSError as error:
            raise HostError(os_problem('virt-v2v', error)) from None
        finally:
            os.close(secret)
            output.close_writer()
            self._messages.close_writer()

    def run(self, link):
        """Report through `link` that virt-v2v runs; follow it until all is published."""
        self._loop.watch(link.reader, lambda: self._on_command(link))
        try:
            os.write(link.writer, _READY)
        except OSError:
            pass                    # the caller is gone; reading says so too
        self._follower.run()
        self._finish(self._follower.return_code)

    def _on_command(self, link):
        command = os.read(link.reader, len(_GO))
        self._loop.forget(link.reader)
        os.close(link.reader)
        os.close(link.writer)
        if command != _GO:
            self._follower.stop('nobody took the paths of this job', STOP_GRACE_UNKNOWN)

    def _document(self):
        return state_document(self._start, self._progress, self._return_code)

    @contextmanager
    def _surviving(self):
        """A mistake of ours is no reason to lose a conversion: note it and go on."""
        try:
            yield
        except Exception:
            self._mishaps += 1
            if self._mishaps <= 10:
                LOG.exception('internal error, the conversion goes on')

    def _on_output(self, data):
        self._job.output_log.write(data)
        # A message is written before the line of the same text, so what was read so far can only
        # be understood with all messages that are there by now.
        for messages in self._messages.drain():
            self._on_messages(messages)
        with self._surviving():
            self._apply(self._parser.feed(data))

    def _on_messages(self, data):
        with self._surviving():
            events = self._message_parser.feed(data)
            for event in events:
                if isinstance(event, Phase):
                    self._parser.announce(event.text.partition('\n')[0])
            self._apply(events)

    def _apply(self, events):
        for event in events:
            self._progress = fold(self._progress, event)
            if isinstance(event, Phase):
                LOG.info('virt-v2v: %s', event.text)
            elif isinstance(event, (Notice, Error)):
                LOG.warning('virt-v2v: %s', event.text)
        if events:
            self._publisher.publish(any(isinstance(event, _TRANSITIONS) for event in events))

    def _finish(self, return_code):
        """Publish the end of virt-v2v, clean up behind it, and publish that it is all over."""
        kill_group(self._child.pid)
        self._return_code = return_code
        with self._surviving():
            self._apply(self._parser.end())
            self._publisher.publish(at_once=True)
        self._job.output_log.write(b'')
        kill_descendants(spared=self._child.pid)
        with self._surviving():
            remove_tree(self._job.scratch)
        message = failure_text(return_code, error_text(self._progress), self._follower.stopped_by)
        LOG.info('virt-v2v ended with %d: %s', return_code, message or 'success')
        publish_ending(self._job.state, finished_document(
            self._document(), Ending(return_code, message, timestamp())))
        self._child.wait()          # not before: until now nobody else could get its ID
        if message:
            log_leftovers(self._job)


def log_leftovers(job):
    """Name in the log what is in the export domain that was not there before."""
    for path in sorted(domain_contents(job.root) - job.contents):
        LOG.warning('new in the export domain since the start, perhaps left by this conversion: %s',
                    os.path.join(job.root, path))


def monitor(job, link, output, messages):
    """Be the monitor. Returns the exit status: 0 if there is nothing left to do."""
    try:
        follower = Monitor(job, output, messages)
    except Exception as error:
        known = isinstance(error, HostError)
        report = '\n'.join(map(str, error.problems if known else [internal_problem(error)]))
        LOG.error('not started: %s', report)
        write_all(link.writer, report.encode('utf-8', 'backslashreplace'))
        return 1
    follower.run(link)
    return 0


def take_over(job, output, messages, reason):
    """The monitor is gone, because of `reason`: end virt-v2v and publish that."""
    state = job.state.read()
    if 'started' not in state or 'finished' in state:
        return                      # nobody was told of this job, or all is said
    LOG.error('%s', reason)
    return_code = None
    try:
        ending_of(state['pid'])     # raises unless it is our child now
        follower = Follower(Loop(), Signals(), state['pid'], (
            (output, job.output_log.write), (messages, lambda data: None)))
        follower.stop(reason, STOP_GRACE)
        follower.run()
        return_code = follower.return_code
    except ChildProcessError:
        LOG.error('virt-v2v is gone')
    kill_descendants(spared=state['pid'])
    remove_tree(job.scratch)
    error = state.get('last_message', {}).get('message')
    publish_ending(job.state, finished_document(state, Ending(
        return_code, failure_text(return_code, error, reason), timestamp())))
    log_leftovers(job)


def publish_failure(state, reason):
    """Publish the end, unless that is done, without anything that may have failed before."""
    document = state.read()
    if 'started' not in document or 'finished' in document:
        return
    error = document.pop('last_message', {}).get('message')
    if document.get('return_code') == 0:
        document['disks'] = [OrderedDict(disk, progress=100) for disk in document['disks']]
    else:
        document['failed'] = True
        _with_message(document, '{} ({})'.format(reason, error) if error else reason)
    document['updated_at'] = document['finished_at'] = timestamp()
    document['finished'] = True
    publish_ending(state, document)


def _attempt(step, *arguments):
    """Do a step; a mistake of ours in it does not keep us from the next one."""
    try:
        step(*arguments)
    except Exception:
        LOG.exception('internal error')


def guard(job, link):
    """Be the guardian: start the monitor, see to it that its work is ended, leave nothing behind.

    Returns the exit status.
    """
    adopt_orphans()
    share_memory()
    output, messages = Pipe(), Pipe()
    output.enlarge()
    monitor_pid = fork(lambda: monitor(job, link, output, messages))
    output.close_writer()
    messages.close_writer()
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda number, _: os.kill(monitor_pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    end = os.waitid(os.P_PID, monitor_pid, os.WEXITED | os.WNOWAIT)
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    os.waitpid(monitor_pid, 0)
    reason = None
    if end.si_code != os.CLD_EXITED:
        reason = 'the wrapper was killed by ' + signal_name(end.si_status)
    elif end.si_status != 0:
        reason = 'the wrapper failed, see its log'
    if reason:
        _attempt(take_over, job, output, messages, reason)
    _attempt(kill_descendants)
    _attempt(remove_tree, job.scratch)
    if reason:
        _attempt(publish_failure, job.state, reason)
    return 0


def export_directory(spec, identity):
    """Return the directory of export domain `spec`, mounted if need be. Raises HostError."""
    spec = os.fsdecode(spec.encode('utf-8'))    # under LC_ALL=C, Python 3.6 has names in ASCII
    if spec.startswith('/'):
        return spec
    with open('/proc/self/mountinfo', 'rb') as stream:
        mounted = find_nfs_mount(spec, os.fsdecode(stream.read()))
    if mounted:
        return mounted
    if not identity.drop:
        raise HostError(Problem('export_domain', 'is not mounted here, and only root can mount it'))
    return mount_export_domain(spec)


class Files:
    """The files of one job, created exclusively under a name that no other job has."""

    def __init__(self, log_dir, log_fd, state_dir, state_fd):
        """Create them. The descriptors are of the directories. Raises HostError."""
        self._log_fd = log_fd
        self._logs = []
        self._state_fd = state_fd
        stem = 'v2v-import-{}-{}'.format(time.strftime('%Y%m%dT%H%M%S', time.gmtime()), os.getpid())
        for candidate in [stem] + ['{}-{}'.format(stem, n) for n in range(2, 100)]:
            if self._create(candidate):
                break
        else:
            raise HostError(Problem(log_dir, 'all names for a log are taken'))
        self.paths = Paths(os.path.join(log_dir, candidate + '-wrapper.log'),
                           os.path.join(log_dir, candidate + '.log'),
                           os.path.join(state_dir, candidate + '.state'))

    def _create(self, stem):
        """Create the files; return False if any of the three names is taken."""
        self.state = None
        try:
            self.wrapper_log = self._create_log(stem + '-wrapper.log')
            self.v2v_log = self._create_log(stem + '.log')
            self.state = StateFile(self._state_fd, stem + '.state')
        except FileExistsError:
            self.discard()
            return False
        except OSError as error:
            self.discard()
            raise HostError(os_problem('logs and state file', error)) from None
        return True

    def _create_log(self, name):
        fd = create_exclusively(name, 0o640, self._log_fd)
        self._logs.append(name)
        return fd

    def discard(self):
        """Remove all of them, of a job that nobody was told of."""
        for name in self._logs:
            os.unlink(name, dir_fd=self._log_fd)
        self._logs = []
        if self.state:
            self.state.remove()


def _drop_or_undo(identity, made):
    """Become `identity`, or remove the directories `made` for it. Raises HostError."""
    try:
        drop_privileges(identity)
    except HostError:
        for path in filter(None, made):
            os.rmdir(path)
        raise


def prepare(request, options):
    """Find out where and as whom to run, become that, and check what there is to check.

    Returns a Job without environment, scratch, output_log and state, and what Files wants.
    Raises HostError with all problems.
    """
    identity = find_identity()
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except HostError as error:
            problems.extend(error.problems)
            return None

    log_dir, state_dir = job_directories(options, identity, os.environ)
    directory = attempt(export_directory, request.export_domain, identity)
    if identity.drop:
        made = [attempt(make_first_missing, path, identity) for path in (log_dir, state_dir)]
        _drop_or_undo(identity, made)
    root = attempt(export_domain_root, directory) if directory else None
    libdir = options.vddk_libdir or VDDK_LIBDIR
    attempt(check_vddk_libdir, libdir)
    virt_v2v = attempt(find_virt_v2v, os.environb.get(b'PATH', os.fsencode(ADMIN_PATH)))
    log_fd, state_fd = (attempt(open_private_directory, path) for path in (log_dir, state_dir))
    if problems:
        raise HostError(*OrderedDict.fromkeys(problems))    # both directories may be the same
    job = Job(request, identity, directory, root, domain_contents(root), libdir, virt_v2v,
              None, None, None, None)
    return job, (log_dir, log_fd, state_dir, state_fd)


def begin(request, options):
    """Start the job. Returns its Paths and the Link to confirm or stop it by.

    Raises HostError; then nothing is left of the job.
    """
    job, places = prepare(request, options)
    files = Files(*places)
    scratch = None
    try:
        LOG.fd = files.wrapper_log
        LOG.info('%s %s, Python %s, as user %s', PROGRAM, VERSION, sys.version.split()[0],
                 job.identity.name)
        LOG.info('request: %s', request)
        scratch = make_scratch()
        LOG.info('temporary files in %s', os.fsdecode(scratch))
        environment = virt_v2v_environment(os.environb, job.identity, scratch)
        job = job._replace(environment=environment, scratch=scratch, state=files.state,
                           output_log=OutputLog(files.v2v_log))
        link = detach(lambda link: guard(job, link))
        answer = _answer(link)
        if answer != _READY:
            raise HostError(*(answer.decode('utf-8', 'replace').splitlines()
                              or [Problem('wrapper', 'ended before virt-v2v was started')]))
    except BaseException:
        files.discard()
        if scratch:
            remove_tree(scratch)
        raise
    return files.paths, link


def _answer(link):
    """Return what the job says of itself: _READY, or problems, and then it is over."""
    answer = os.read(link.reader, len(_READY))
    return answer if answer == _READY else answer + read_to_end(link.reader)


# ---------------------------------------------------------------------------------------------
# Main: arguments, order, what is printed, exit status

_DESCRIPTION = """\
Start the conversion of a VMware guest for oVirt with virt-v2v. The request is a JSON object on
standard input. The answer, on standard output, is a JSON object with the paths of the state file
and of two logs; the conversion goes on in the background. It is over when the state file has the
key "finished", and has failed if it has the key "failed".
"""
_EPILOG = """\
keys of the request:
  vm_name             name of the guest
  vmware_uri          libvirt URI, esx://USER@HOST... or vpx://USER@HOST..., without a password
  vmware_password     password for it
  vmware_fingerprint  thumbprint of the server's certificate, as SHA-1 or SHA-256
  transport_method    "vddk"
  export_domain       HOST:/PATH, or a directory
  output_format       "raw" (default) or "qcow2"
  source_disks        optional: list of the guest's disks, such as "[datastore] vm/vm.vmdk"

exit status: 0 started, 1 this host cannot do it, 2 the request or the usage is wrong
"""


def directory(value):
    """Return the absolute path for the value of an option. Raises ValueError."""
    path = os.path.abspath(value)
    if not value or _UNPRINTABLE.search(as_text(path)):
        raise ValueError
    return path


def parse_arguments(arguments):
    """Return the Options in `arguments`. Raises UsageError; --help and --version exit."""
    if not arguments:
        return Options(None, None, None)
    import argparse         # costs a tenth of a start, and hardly any has arguments

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(Problem('usage', clean(message) + '; see --help'))

    parser = Parser(prog=PROGRAM + '.py', description=_DESCRIPTION, epilog=_EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--version', action='version', version='{} {}'.format(PROGRAM, VERSION))
    for option, purpose in (('log-dir', 'for both logs'), ('state-dir', 'for the state file'),
                            ('vddk-libdir', 'of the VDDK, default ' + VDDK_LIBDIR)):
        parser.add_argument('--' + option, metavar='DIR', type=directory,
                            help='directory ' + purpose)
    return Options(**vars(parser.parse_args(arguments)))


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


def hand_over(paths, link):
    """Give the caller the paths, and the job the word to go on. Raises HostError."""
    try:
        print_line(1, json.dumps({key: as_text(path) for key, path in paths._asdict().items()}))
    except OSError as error:
        os.close(link.writer)
        read_to_end(link.reader)    # until the last process of the job is gone
        raise HostError(os_problem('standard output', error),
                        Problem('standard output', 'the conversion was stopped')) from None
    try:
        os.write(link.writer, _GO)
    except OSError:
        pass                        # the job is over already, and its state says how


def main(arguments=None):
    """Do what the command does; return its exit status."""
    try:
        shed_inheritance()
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        hand_over(*begin(read_request(0), options))
        return EXIT_STARTED
    except WrapperError as error:
        problems, status = error.problems, error.status
    except Exception as error:
        problems, status = [internal_problem(error)], EXIT_HOST
    for problem in problems:
        try:
            print_line(2, '{}: error: {}'.format(PROGRAM, problem))
        except OSError:
            break
    return status


if __name__ == '__main__':
    # Python keeps the syntax tree of a main script, a quarter of all memory, until the script has
    # ended (pyrun_file in pythonrun.c). So it ends here, with an exception that main deals with.
    # After main there is nothing left to do, and a tidy end would take as long again.
    sys.excepthook = lambda *_: os._exit(main())
    raise Exception('end of the script')
