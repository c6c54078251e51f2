#!/usr/bin/python3 -IS
"""Start the conversion of a VMware guest for oVirt with virt-v2v, and keep its state in a file.

A JSON request on standard input starts one conversion, a job. The command answers at once with one
JSON object, the paths of two logs and of a state file, and exits. The job goes on in the
background; the state file follows it until the key "finished" appears.

What a start promises:

* Paths are printed if and only if virt-v2v was executed and the state file exists. Otherwise
  standard error has one line for each problem, and the exit status is not 0.
* The state file is complete JSON at every moment, and every ending is published in it: if any
  process of the job is left, as soon as it can be written (an hour is given to that); else by the
  next job in the same state directory, or --list.
* A job is alive exactly as long as its lock file is locked.
* No password or key is in an argument list, environment, log or named file.
* virt-v2v runs without privileges, whoever starts it: as user vdsm if root does.

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

The launcher does what only root or the caller's own process can do, and waits with a limit: a file
system that hangs cannot hang the caller. Before it forks the monitor, the guardian makes all that
both need: lock, logs, pipes. Afterwards it touches no file while the monitor lives. Answer and
report are pipes for lines of JSON: paths and Facts are objects, problems are lists. Before them,
the answer has texts that name what the guardian looks at, so that the launcher knows what hangs.
With --check, the guardian answers with what look_at_source() finds, and starts nothing.

How a job ends:

    virt-v2v ends, or is killed    the monitor publishes that
    TERM, INT or HUP               to guardian or monitor: virt-v2v gets TERM, 45 s later KILL
    the monitor is killed          the kernel kills virt-v2v, the guardian publishes that; the same
                                   if a bug makes the monitor fail
    the guardian is killed         the monitor goes on; during the start the job is stopped
    all are killed                 the next start, or --list, by the same user publishes that
    the answer cannot be printed   the launcher stops the job, and waits for its end
    the launcher is killed         before the answer the job is stopped, after it nothing happens

Processes that virt-v2v leaves become children of the monitor, or of the guardian, and are ended.
Whoever publishes the end removes what a failed job has made in its target, in a child of its own:
see clean_up(). The monitor has two more threads, for take_signals() and end_dead_jobs(). With
--wait, the launcher stays until the end.

Words: a phase is what virt-v2v says that it does, a stage the kind of it that decides what may be
believed. Messages are virt-v2v's lines of JSON. In texts, "the wrapper" is the monitor. The stem is
the name that all files of a job share; scratch is its directory for temporary files; a twin is
another job of the same guest.

Each room of this file uses only what is above it, so the processes come last:

    errors and log
    request; output; causes; progress; command: what goes in decides what comes out
    processes; places; source; target; files: thin layers above the kernel and other hosts
    job: what guardian and monitor share: the files, and the ending; and the ending of dead jobs
    monitor, guardian, launcher: the three processes; each reads from top to bottom
    jobs: --list, --watch, --cancel and --wait, which see jobs through their files
    main: arguments, what is printed, exit status

A new key of the request takes a row in _COMMON, or in its transport or target, and its use, mostly
in make_arguments(); a secret one goes into secrets_of() too. A new transport or target has its keys
in _SOURCE_KEYS or _TARGET_KEYS, its arguments in _SOURCE_ARGUMENTS or _TARGET_ARGUMENTS, its checks
in SOURCES or TARGETS; a target is a class like ExportDomain, and _remove_of_dead() knows it. A new
line of virt-v2v's output takes a row in _TABLE; a new kind of Event is described there, takes a
method of Progress, and belongs in _TRANSITIONS if readers should see it at once. The code and hint
of an error are a row of _CAUSES. A check of the host belongs in check_host().

It needs Linux 4.10, Python 3.6 or newer with its standard library, and virt-v2v.
"""

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
from collections import deque, namedtuple
from contextlib import ExitStack, contextmanager, suppress

VERSION = '1.0'
PROGRAM = 'virt-v2v-wrapper'

EXIT_STARTED = 0
EXIT_HOST = 1        # the request is right, but this host cannot carry it out
EXIT_REQUEST = 2     # the request, or the command line, is wrong
EXIT_FAILED = 3      # the job was started, and has failed
EXIT_CANCELLED = 4   # somebody ended it

# A request has a few hundred bytes; this leaves room for thousands of disks.
MAX_REQUEST = 1 << 20
# Linux takes no argument above 128 KiB. No name or path in the field comes near this.
MAX_TEXT = 4096
# The longest line of output that can matter is an nbdkit command of a few KiB. Logs hold lines of
# hundreds of KiB, such as a hex dump of a registry; of these the beginning is enough.
MAX_LINE = 1 << 13
# A message is one line of JSON, which is of no use without its end.
MAX_MESSAGE_LINE = 1 << 20
# How much of virt-v2v's own text goes into the state file: of its error, and of its warnings.
MAX_MESSAGE = 4096
MAX_WARNING = 1024
MAX_WARNINGS = 20
# Messages whose line in the output has not come yet. One is usual; a pipe holds about that many.
MAX_ANNOUNCED = 1000
# The longest OVF of a VM that is read, about a hundred times the usual length.
MAX_OVF = 1 << 22
# The most a program may answer. The longest answer in the field, virt-v2v's options, is 2 KiB long.
MAX_ANSWER = 1 << 16
CHUNK = 1 << 16             # what is read at once
PIECE = 1 << 10             # what is parsed line by line, if anything in it can matter

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
SERVER_PATIENCE = 10.0      # for an answer of oVirt's engine, or of VMware's server
SOURCE_PATIENCE = 60.0      # for virt-v2v to tell what a guest has: it needs seconds
CLEAN_PATIENCE = 60.0       # for what a failed job has made to be removed from its target
CANCEL_PATIENCE = STOP_GRACE + END_PATIENCE + CLEAN_PATIENCE + 10       # for a job to end
PRINT_PATIENCE = 5.0        # for a caller that does not read what it asked for
FINAL_WRITE_PATIENCE = 3600.0       # how long the final state waits for room on its file system
LOOK_INTERVAL = 0.5         # between two looks at jobs that somebody watches or waits for
RATE_PERIOD = 180.0         # the time left follows from the progress within this period

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
    """Return what OSError `error` says, without any file name."""
    known = os.strerror(error.errno) if error.errno else type(error).__name__
    # system_call() puts a name before the text, Python 3.6's subprocess a file's name after it.
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


def quoted(text):
    """Return `text` as one word for a shell."""
    import shlex        # not needed by a start that succeeds
    return shlex.quote(text)


def timestamp():
    """Return the time, UTC in ISO 8601."""
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def write_all(fd, data):
    """Write all of `data` (bytes). Raises OSError; its `written` counts the bytes written."""
    written = 0
    try:
        while written < len(data):
            try:
                written += os.write(fd, data[written:])
            except BlockingIOError:     # a slow reader's pipe, made non-blocking by the caller
                select.select([], [fd], [])
    except OSError as error:
        error.written = written
        raise


class Log:
    """The wrapper's own log, one line for each record. Its errors are ignored.

    Not the module logging: importing that takes longer than all that is done before virt-v2v runs.
    """

    fd = None       # of the job's log, as soon as there is one

    def write(self, level, template, *values):
        """Add a record: `template` with `values` in the places of its {}."""
        with suppress(Exception):       # a full disk, no log yet, or a bug
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

    __slots__ = ('_text', 'fd')

    def __init__(self, text):
        self._text = text
        self.fd = None          # of the file in memory that holds it, as soon as there is one

    def __repr__(self):
        return '***'

    def __reduce__(self):
        raise TypeError('a secret is not to be stored')

    def store(self):
        """Move the text into a file in memory, which has no name. Raises HostError."""
        with blaming('memory for a password'):
            if hasattr(os, 'memfd_create'):                 # Python 3.8
                self.fd = os.memfd_create(PROGRAM)         # novm: vermin(1) is to accept it
            else:
                self.fd = os.open('/dev/shm', os.O_RDWR | os.O_TMPFILE, 0o400)
            os.fchmod(self.fd, 0o400)
            write_all(self.fd, self._text.encode('utf-8'))
        self._text = None

    @property
    def path(self):
        """Where we, and programs that inherit the descriptor, can open that file."""
        return '/proc/self/fd/{}'.format(self.fd)

    def read(self):
        """Return the text."""
        if self.fd is None:
            return self._text
        return os.pread(self.fd, MAX_REQUEST, 0).decode('utf-8')

    def close(self):
        """Close the descriptor."""
        os.close(self.fd)
        self.fd = None


_HOST = r"(?: [A-Za-z0-9][A-Za-z0-9._-]* | \[[0-9A-Fa-f:.]+\] ) (?: : [0-9]{1,5} )?"
_URI = r"""(?ax)
    (?:esx|vpx) ://
    (?: (?!%3[aA]) [\w.~!$&'()*+,;=%-] )+ @             # a user, no colon: so no password
    """ + _HOST + r"""
    (?: / [\w.~!$&'()*+,;=:@%/-]* )?
    (?: \? [\w.~!$&'()*+,;=:@%/?\[\]-]* )?
    """
# Some versions give the user to scp(1), which must not take it for an option.
_VMX_URI = r"(?ax) ssh:// \w[\w.-]* @" + _HOST + r" /[\w.~!$&'()*+,;=:@%/-]* \.vmx"
_ENGINE_URL = r'(?ax) https:// (?: [\w.@-]+ @ )? ' + _HOST + r' (?: /[\w.-]+ )+'
_FINGERPRINT = '[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){19}(?:(?::[0-9A-Fa-f]{2}){12})?'
_EXPORT_DOMAIN = (r'/\S*|(?:[A-Za-z0-9][A-Za-z0-9._-]*'
                  r'|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):/\S*')
_DEVICE = '/dev/[A-Za-z0-9_/.+-]+'
_MAC = '[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}'

# How to give the request.
_HOW = 'give the request on standard input: {}.py < request.json'.format(PROGRAM)


class _Wrong(ValueError):
    """Says more about a wrong value than what its key expects; it never shows the value."""


# Patterns are compiled when a request needs them. A function that turns a value into a field raises
# ValueError if the value is wrong, and TypeError if its type is.


def _text(value, pattern='.*'):
    """Return `value` if it is printable, not empty, not too long, and as `pattern` says."""
    if _UNPRINTABLE.search(value) or not value or len(value.encode('utf-8')) > MAX_TEXT:
        raise ValueError
    if not re.fullmatch(pattern, value):
        raise ValueError
    return value


def _like(pattern):
    return lambda value: _text(value, pattern)


def _address(pattern):
    """Return what takes a URI that fits `pattern`, with a valid port."""
    def take(value):
        port = re.match('[^/?]*//[^/?]*:([0-9]{1,9})([/?]|$)', value)
        if port and int(port.group(1)) > 0xffff:
            raise _Wrong('a port is at most 65535')
        if '[' in value:
            from urllib.parse import urlsplit
            urlsplit(value)         # newer Pythons accept only IPv6 in brackets
        return _text(value, pattern)
    return take


def _bool(value):
    if not isinstance(value, bool):
        raise TypeError
    return value


def _list(make):
    """Return what turns a list into a tuple, and each item with `make`."""
    def make_all(value):
        if not isinstance(value, list):
            raise TypeError
        try:
            return tuple(map(make, value))
        except (TypeError, AttributeError, KeyError):
            raise ValueError from None
    return make_all


def _disks(value):
    disks = _list(_text)(value)
    if len(set(disks)) < len(disks):
        raise _Wrong('a disk is listed twice')
    return disks


def _fingerprint(value):
    if re.fullmatch('[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2})+', value) and len(value) not in (59, 95):
        raise _Wrong('expected 20 or 32 colon-separated pairs of hex digits, found {} pairs'.format(
            value.count(':') + 1))
    return _text(value, _FINGERPRINT).upper()


def _secret(value):
    """A password: virt-v2v reads the first line of a file."""
    if re.search('[\x00\n\r\ud800-\udfff]', value) or not value:
        raise ValueError
    return Secret(value)


def _engine_password(value):
    """The upload scripts strip white space from its end."""
    if value != value.rstrip():
        raise ValueError
    return _secret(value)


def _private_key(value):
    value = value.replace('\r\n', '\n').rstrip() + '\n'
    if not re.fullmatch('-----BEGIN [A-Z ]*PRIVATE KEY-----\n[\n -~]*-----\n', value):
        raise ValueError
    return Secret(value)


def _mapping(value):
    """Where a network goes: (source, destination, MAC address or None)."""
    mac = value.get('mac_address')
    if isinstance(mac, str) and not re.fullmatch(_MAC, mac):
        raise _Wrong('mac_address: expected six pairs of hex digits with colons')
    return (_text(value['source'], '.*' if mac else '[^:]*'), _text(value['destination']),
            None if mac is None else mac.lower())


def _mappings(value):
    mappings = tuple(dict.fromkeys(_list(_mapping)(value)))
    if len({mac or source for source, _, mac in mappings}) < len(mappings):
        raise _Wrong('a network is mapped twice')       # virt-v2v takes one destination for each
    return mappings


def _key(value):
    """What opens an encrypted device: (device, Secret or None for clevis)."""
    key = value.get('key')
    if (key is None) != (value.get('clevis') is True):
        raise ValueError
    return (_text(value['device'], 'all|' + _DEVICE), None if key is None else _secret(key))


# Usual mistakes in a key's value: how a wrong one begins, and what is said; {} is the match.
# A dot is any character. Values may be long: no part of a pattern may match in many ways.
_AROUND = (r'\s|.*\s\Z', 'has white space around it')
_LINE_END = ('.*[\r\n]', 'has a line end; leave that out')
_MISTAKES = {
    'vmware_uri': (
        _AROUND,
        ('(?!(esx|vpx)://)', 'has to begin with esx:// or vpx://'),
        (r'...://[^/?@:[]*:(?![0-9]*([/?]|\Z)).*@', 'has a password; give that as vmware_password'),
        ('...://(?![^/?@]+@)', 'needs a user: esx://USER@HOST or vpx://USER@HOST'),
        ('...://[^/?]*@[^/?]*@', 'an "@" in the user has to be written %40'),
        ('.* ', 'a blank has to be written %20'),
        (r'.*\\', 'a backslash has to be written %5C'),
        ('.*[^\0-\x7f]', 'what is not ASCII has to be percent-encoded'),
        ('[^?]*&no_verify=', 'the first option has to begin with "?"'),
        # For vpx that may be the name of a host, an IPv6 address too.
        (r'esx://[^/?]*/[^?]*:[0-9]+/?\Z|.*[?&;]no_verify=[01]:[0-9]',
         'a port has to follow the server: USER@HOST:PORT'),
        (r'.*[?&;]no_verify=(?![01]([&;]|\Z))', 'no_verify is 0 or 1'),
        (r'vpx://[^/?]*(?!/[^/?]+/[^/?])([/?]|\Z)',
         'vpx needs /DATACENTER/HOST or /DATACENTER/CLUSTER/HOST after the server')),
    'vmware_fingerprint': (
        ('(?i)SHA-?[0-9]{1,3}( Fingerprint=|:)',
         'expected the pairs of hex digits alone, without "{}"'),
        _AROUND),
    'vmware_password': (_LINE_END,),
    'vmware_password_file': (('~', 'expected an absolute path, "~" is not expanded'),),
    'ssh_key': (
        ('(ssh|ecdsa)-', 'is a public key, expected the private one'),
        (r'-----[^\n]*\Z', 'is in one line, expected line ends as in its file'),
        (r'[^\n/]*/[^\n]*\n?\Z', 'expected the text of the key, not its path')),
    'export_domain': (
        _AROUND,
        ('nfs://', 'expected HOST:/PATH, without "nfs://"')),
    'rhv_url': (
        _AROUND,
        ('(?!https://)', 'has to begin with https://'),
        ('https://[^/:]*:.*@', 'has a password; give that as rhv_password'),
        ('https://(?=[^/]*%40)[^/]*@', 'an "@" in the user has to be written as it is, not %40'),
        (r'(?!.*/api(/v4)?\Z)', 'has to end with /ovirt-engine/api')),
    'rhv_password': (_LINE_END,),
}
_KINDS = {float: 'a number', bool: 'true or false', str: 'a string', list: 'a list',
          dict: 'an object'}
_MANDATORY = object()

# `make` turns the value into the field, `expected` says what it has to be.
_Rule = namedtuple('_Rule', 'key default make expected')


def _rules(*rows):
    return tuple(_Rule(*row) for row in rows)


# The keys of each way to read the guest, which transport_method names.
_SOURCE_KEYS = dict(
    vddk=_rules(
        ('vm_name', _MANDATORY, _text,
         'a non-empty string of at most 4096 bytes without control characters'),
        ('vmware_uri', _MANDATORY, _address(_URI),
         'a libvirt URI esx://USER@HOST... or vpx://USER@HOST... without a password'),
        ('vmware_password', _MANDATORY, _secret, 'a non-empty string without NUL or line ends'),
        ('vmware_password_file', None, _like('/.*'), 'an absolute path'),
        ('vmware_fingerprint', _MANDATORY, _fingerprint,
         '20 or 32 colon-separated pairs of hex digits')),
    ssh=_rules(
        ('vm_name', _MANDATORY, _address(_VMX_URI),
         'ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx'),
        ('ssh_key', None, _private_key, 'the text of a private key that needs no passphrase')))
# The keys of each target. The first one tells which target is meant.
_TARGET_KEYS = dict(
    export_domain=_rules(
        ('export_domain', _MANDATORY, _like(_EXPORT_DOMAIN),
         'HOST:/PATH or an absolute directory, without blanks or control characters')),
    rhv_upload=_rules(
        ('rhv_url', _MANDATORY, _address(_ENGINE_URL),
         'https://[USER@]HOST[:PORT]/ovirt-engine/api without a password'),
        ('rhv_password', _MANDATORY, _engine_password,
         'a non-empty string without NUL, line ends, or white space at its end'),
        ('rhv_cluster', _MANDATORY, _text, 'the name of a cluster'),
        ('rhv_storage', _MANDATORY, _like('[A-Za-z0-9_-]*'),
         'the name of a storage domain: letters, digits, "_" and "-"'),
        ('rhv_cafile', '/etc/pki/vdsm/certs/cacert.pem', _like('/.*'), 'an absolute path'),
        ('insecure_connection', False, _bool, 'true or false')))
# The keys of every request.
_COMMON = _rules(
    ('transport_method', _MANDATORY, _like('|'.join(_SOURCE_KEYS)),
     ' or '.join('"{}"'.format(name) for name in _SOURCE_KEYS)),
    ('output_format', 'raw', _like('raw|qcow2'), '"raw" or "qcow2"'),
    ('source_disks', (), _disks, 'a list of different non-empty strings'),
    ('network_mappings', (), _mappings,
     'a list of {"source": NAME without ":", "destination": NAME, "mac_address": optional},'
     ' each source or address once'),
    ('allocation', None, _like('sparse|preallocated'), '"sparse" or "preallocated"'),
    ('install_drivers', False, _bool, 'true or false'),
    ('virtio_win', None, _like('/.*'), 'the absolute path of an ISO image or a directory'),
    ('luks_keys', (), _list(_key),
     'a list of {"device": "all" or "/dev/...", "key": PASSPHRASE, or "clevis": true}'),
    ('root', 'first', _like('first|single|' + _DEVICE), '"first", "single" or "/dev/..."'),
    ('new_vm_name', None, _text,
     'a non-empty string of at most 4096 bytes without control characters'))
# Key: the one, of the same rules, that may be given in its place.
_INSTEAD = {'vmware_password': 'vmware_password_file'}
# All of them by key.
_RULES = {}
for _rule in sum(list(_SOURCE_KEYS.values()) + [_COMMON] + list(_TARGET_KEYS.values()), ()):
    _RULES.setdefault(_rule.key, _rule)
# What the caller wants: a field for each key, None if it is of another transport or target; the
# name of the target; the names of the keys that mean nothing here.
Request = namedtuple('Request', list(_RULES) + ['target', 'ignored'])


def secrets_of(request):
    """Return the Secrets in a Request."""
    values = [request.vmware_password, request.rhv_password, request.ssh_key]
    return [secret for secret in values + [secret for _, secret in request.luks_keys] if secret]


def close_secrets(request):
    """Close those that only virt-v2v needs; cleaning up needs the engine's password."""
    for secret in secrets_of(request):
        if secret is not request.rhv_password:
            secret.close()


def _number(text):
    """Numbers mean nothing to us, but JSON has no NaN, nor Infinity, which 1e999 would become."""
    number = float(text)
    if not float('-inf') < number < float('inf'):
        raise RequestError(('request', 'has a number out of range, or NaN'))
    return number


def _document(data):
    """Return the JSON object in `data`."""
    def unique(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            # The name of an unknown key may be anything, even a misplaced password.
            twice = [key for key in _RULES if keys.count(key) > 1] or ['a key']
            raise RequestError(*[('request', key + ' is given twice') for key in twice])
        return dict(pairs)

    if len(data) > MAX_REQUEST:
        raise RequestError(('request', 'is longer than {} bytes'.format(MAX_REQUEST)))
    if not data.strip():
        raise RequestError(('request', 'is empty, expected a JSON object'))
    if data.startswith(b'\xef\xbb\xbf'):      # a byte order mark
        data = data[3:]
    if re.match(b'\xff\xfe|\xfe\xff|[{]\0|\0[{]', data):
        raise RequestError(('request', 'is UTF-16, which ">" of PowerShell writes; expected UTF-8'))
    if data.lstrip()[:1] not in (b'{', b'['):
        raise RequestError(('request', 'does not begin with "{"; ' + _HOW))
    try:
        document = json.loads(data.decode('utf-8'), object_pairs_hook=unique, parse_int=_number,
                              parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise RequestError(('request', 'is nested too deeply')) from None
    except UnicodeDecodeError:
        raise RequestError(('request', 'is not UTF-8')) from None
    except ValueError as error:
        raise RequestError(('request', 'is not JSON: {}, line {} column {}'.format(
            error.msg.partition(':')[0].replace('Extra data', 'there is more after the request'),
            error.lineno, error.colno))) from None
    if isinstance(document, list):
        raise RequestError(('request', 'expected one request, not a list'))
    return document


def _rules_for(document):
    """Return the name of the target, and the rules for this request. Raises RequestError."""
    found = {key for key, value in document.items() if value is not None}
    targets = [name for name, rules in _TARGET_KEYS.items() if rules[0].key in found]
    if len(targets) > 1:
        raise RequestError(('request', 'expected either export_domain or rhv_url, found both'))
    # Without one, the other keys tell what was meant, and so what is missing.
    meant = [name for name, rules in _TARGET_KEYS.items() if found & {rule.key for rule in rules}]
    target = (targets + meant + list(_TARGET_KEYS))[0]
    known = document.get('transport_method') in list(_SOURCE_KEYS)
    method = document['transport_method'] if known else 'vddk'
    return target, _SOURCE_KEYS[method] + _COMMON + _TARGET_KEYS[target]


def _plausible(key, value):
    """Return the value of a key. Raises _Wrong if it has a usual mistake."""
    if isinstance(value, str):
        for pattern, text in _MISTAKES.get(key, ()):
            found = re.match(pattern, value, re.DOTALL)
            if found:
                raise _Wrong(text.format(found.group()))
    return value


def parse_request(data):
    """Return the Request in `data` (bytes). Raises RequestError with all its problems."""
    document = _document(data)
    target, rules = _rules_for(document)
    values, problems = dict.fromkeys(_RULES), []
    for key, default, make, expected in rules:
        instead, value = _INSTEAD.get(key), document.pop(key, None)
        has_instead = document.get(instead) is not None
        if value is None:
            values[key] = None if default is _MANDATORY else default
            if default is _MANDATORY and not has_instead:
                problems.append((key, 'missing, expected ' + expected))
            continue
        if has_instead:
            problems.append((key, 'expected either this or {}, found both'.format(instead)))
        try:
            values[key] = make(_plausible(key, value))
        except _Wrong as error:
            problems.append((key, str(error)))
        except (TypeError, AttributeError):
            problems.append((key, 'expected {}, found {}'.format(expected, _KINDS[type(value)])))
        except ValueError:
            problems.append((key, 'expected ' + expected))
    # What has digits in it may be a misplaced password.
    ignored = tuple(key for key in sorted(document) if re.fullmatch('[A-Za-z_-]{1,40}', key))
    if problems:
        unknown = [key for key in ignored if key not in _RULES]
        if unknown:
            problems.append(('request', 'unknown keys: ' + ', '.join(unknown)))
        raise RequestError(*problems)
    return Request(target=target, ignored=ignored, **values)


def _read_password(path):
    """Return the Secret in the first line of a file that only the caller can read.

    Under sudo, the caller is the user who ran it, who must not get at root's files.
    """
    subject, caller = 'vmware_password_file', os.geteuid() or int(os.environ.get('SUDO_UID', 0))
    with blaming(subject):
        # O_PATH does not open it yet: a device may react.
        fd = os.open(path.encode('utf-8'), os.O_PATH | os.O_NOFOLLOW)
        status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != caller:
        raise HostError((subject, 'expected a file, no link, that belongs to who starts it'))
    if status.st_mode & 0o077:
        raise HostError((subject, 'others may read it: chmod 600 ' + quoted(path)))
    with blaming(subject), open('/proc/self/fd/{}'.format(fd), 'rb') as stream:
        line = stream.readline(MAX_REQUEST)
    os.close(fd)
    try:
        return _secret(line.rstrip(b'\r\n').decode('utf-8'))
    except ValueError:
        raise HostError((subject, 'expected a password in its first line, in UTF-8')) from None


def read_request(fd):
    """Read descriptor `fd` to its end and return the Request in it. Raises WrapperError."""
    if os.isatty(fd):
        raise RequestError(('request', 'is a terminal; ' + _HOW))
    data, piece = b'', None
    while piece != b'' and len(data) <= MAX_REQUEST:
        try:
            piece = os.read(fd, CHUNK)
            data += piece
        except BlockingIOError:
            select.select([fd], [], [])
        except OSError as error:
            raise RequestError(('request', '{}; {}'.format(os_text(error), _HOW))) from None
    request = parse_request(data)
    if request.vmware_password_file:
        request = request._replace(vmware_password=_read_password(request.vmware_password_file))
    return request


# --- Output: chunks -> lines -> events. Bytes until a field is taken out, and bounded memory.
#
# From 1.41.1 on virt-v2v sends JSON messages. There, a message says what happens, and the line of
# the same text in the output says when: virt-v2v writes the message first. A phase line counts only
# if a message announced its text, and only once; copies count only in sequence; errors count from
# the messages alone. Without messages, only the lines count.
#
# Nothing is believed while virt-v2v looks into the guest, because then the guest speaks in the log.
# That a signal ends it counts only if no phase follows: at worst, a forgery makes a failure look
# cancelled. A guest that knows what will be announced may say it right before virt-v2v
# does, and be believed until then. So what is to be cleaned up later counts from virt-v2v's own
# line on, which is the last of that text, and only where there are messages. The exit status of
# virt-v2v alone decides on success.

# One thing that happened. The names, and the line or message that each comes from:
#   phase    text     what virt-v2v does now            [   0.0] Setting up the source: -i libvirt
#   disk     number   this disk begins to be copied     [  40.1] Copying disk 2/3
#   idle     None     no disk is being copied           any other phase line
#   percent  0..100   of the disk being copied          a bar of nbdcopy or qemu-img
#   source   path     the next disk of the guest        the command of its nbdkit
#   size     bytes    of the next disk to be copied     virt-v2v asks nbdkit, or shows its overlay
#   opened   path     the disk being copied is this     Opening file [ds] vm/vm.vmdk (vpxa-nfcssl://
#   image    UUID     will be made in the domain        RHV: disk: /domain/images/UUID/UUID
#   upload_disk, upload_transfer
#            UUID     was made in oVirt                 disk.id = 'UUID', transfer.id = 'UUID'
#   forged   None     what was made, or its size,       the phase line of the target, once more
#                     was said by the guest so far
#   vm_id    UUID     of the new VM                     the OVF that -v shows
#   error    text     virt-v2v's own error              virt-v2v: error: ...
#   cause    text     a program below it complains      nbdkit: file.3: error: ...
#   warning  text     virt-v2v's own warning            virt-v2v: warning: ...
#   farewell text     why it ends, if nothing follows   virt-v2v: Exiting on signal SIGTERM
Event = namedtuple('Event', 'name value')

# The stages of a conversion. A stage begins with the phase whose text begins as below; in every
# other phase, virt-v2v looks into the guest.
_SETUP, _OPENING, _GUEST, _TARGET, _COPYING, _METADATA, _OVER = (
    'setup', 'opening', 'guest', 'target', 'copying', 'metadata', 'over')
_STAGES = (
    (b'Setting up the source', _SETUP),         # 2.x
    (b'Opening the source -i', _SETUP),         # 1.x
    (b'Opening the ', _OPENING),                # the appliance starts, and its kernel talks
    (b'Creating an overlay', _OPENING),         # 1.x
    (b'Setting up the destination', _TARGET),   # 2.x
    (b'Initializing the target', _TARGET),      # 1.x
    (b'Copying disk ', _COPYING),
    (b'Creating output metadata', _METADATA),
    (b'Finishing off', _METADATA),
)
# Beside stages: what counts only in versions with messages; what counts at every stage in those
# without, as their errors may come at any time.
_MESSAGES, _LEGACY = 'messages', 'legacy'
_TRUSTED = {_SETUP, _OPENING, _TARGET, _COPYING, _METADATA}

_PHASE_LINE = rb'\[ *[0-9]{1,9}\.[0-9]\] (.+)'      # "[%6.1f] %s"; kernels show more decimals
_UUID = rb'([0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})'


def _uuid(data):
    return data.decode('ascii').lower()


# What is understood: the stages in which a line may be believed, a literal to find it by, the
# pattern of the whole line, the event, and what makes its value from the group in the pattern: None
# if a message tells it, or it may go on in the next line.
_Row = namedtuple('_Row', 'stages literal pattern event make')
_TABLE = tuple(_Row(*row) for row in (
    # 1.38 to 2.7.15: LANG=C 'nbdkit' '--exit-with-parent' ... 'vddk' ... 'file=[ds] vm/vm.vmdk' ...
    ({_SETUP, _OPENING}, b"'vddk'",
     rb" *(?:LANG=C )?'?nbdkit'? .*?'vddk'.*?'file=((?:[^']|'\\'')+)'.*", 'source',
     lambda path: clean(path.replace(rb"'\''", b"'"))),
    # nbdkit 'ssh' 'host=esx' 'path=/vmfs/volumes/ds/vm/vm-flat.vmdk' ...: of [ds] vm/vm.vmdk
    ({_SETUP}, b"'ssh'",
     rb" *(?:LANG=C )?'?nbdkit'? .*?'ssh'.*?'path=((?:[^']|'\\'')+)'.*", 'source',
     lambda path: re.sub('^/vmfs/volumes/([^/]+)/', r'[\1] ', re.sub(
         r'-flat\.vmdk$', '.vmdk', clean(path.replace(rb"'\''", b"'"))))),
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
    # 2.x, each disk in the guest's order: libnbd: debug: nbd1: nbd_get_size: leave: ret=629145600
    ({_TARGET}, b'nbd_get_size: leave: ret=',
     rb'libnbd: debug: nbd[0-9]+: nbd_get_size: leave: ret=([0-9]{1,18})', 'size', int),
    # 1.x, after the line of each copy: overlay virtual disk size: 629145600
    ({_COPYING}, b'overlay virtual disk size: ', rb'overlay virtual disk size: ([0-9]{1,18})',
     'size', int),
    # 1.x: RHV: will export sda to /domain/images/UUID/UUID; 2.x: RHV: disk: ...; 2.10: ovirt: ...
    ({_TARGET, _MESSAGES}, b'/images/',
     rb'(?:RHV|ovirt): (?:disk:|will export [a-z]+ to) /.*/images/' + _UUID + b'/[^/]+', 'image',
     _uuid),
    # disk.id = '65869d9f-34e4-47a5-98c4-2a6dc2e2ec5a'; up to 1.44 nbdkit's plugin says so
    ({_TARGET, _COPYING, _MESSAGES}, b"disk.id = '", rb"disk\.id = '" + _UUID + b"'",
     'upload_disk', _uuid),
    # transfer.id = '5b0b5cc2-ed4f-4b1c-8e2a-77a5f0b8b6c9'
    ({_TARGET, _COPYING, _MESSAGES}, b"transfer.id = '",
     rb"transfer\.id = '" + _UUID + b"'", 'upload_transfer', _uuid),
    # virt-v2v: Exiting on signal SIGTERM, in the line of a bar and after its CR
    (_TRUSTED | {_GUEST, _MESSAGES}, b'virt-v2v: Exiting on signal SIG',
     rb'virt-v2v: Exiting on signal (SIG[A-Z]{3,4})', 'farewell',
     lambda name: 'virt-v2v was told to stop by ' + clean(name)),
    # /usr/bin/virt-v2v: could not find key to open LUKS encrypted /dev/sda2.
    ({_OPENING}, b'find key to open', rb'(?:/.*/)?virt-v2v: (could not find key to open LUKS .*)',
     'farewell', clean),
    # virt-v2v: warning: don't know how to install guest tools on debian-12
    (_TRUSTED, b'virt-v2v: warning: ', rb'virt-v2v: warning: (.*)', 'warning', None),
    # virt-v2v: error: nbdcopy command failed, see earlier error messages
    (_TRUSTED | {_LEGACY}, b': err', rb'virt-v2v: error: (.*)', 'error', None),
    # nbdkit: vddk[4]: error: VixDiskLib_ReadAsync: ...; from 1.46 on: nbdkit[in0]: error: ...
    (_TRUSTED, b': err',
     rb'(nbdkit(?:\[[\w.-]+\])?: (?:[\w.-]+(?:\[[0-9]+\])?: )?error: (?!.*: Traceback ).+)',
     'cause', clean),
    # The last line of a traceback of virt-v2v's scripts and plugin for an upload, except the one
    # that a bug of the plugin adds: ovirtsdk4.AuthError: Error during SSO authentication ...
    ({_TARGET, _COPYING, _METADATA}, b'Error: ', rb' ?((?!TypeError)[\w.]*Error: .+)', 'cause',
     clean),
    # Of imageio, after "could not write sector ...": nbdkit: python.6: debug: 403: Forbidden
    ({_COPYING}, b': debug: 4', rb'(nbdkit.*: debug: 4[0-9]{2}: .+)', 'cause', clean),
    ({_COPYING}, b': debug: 5', rb'(nbdkit.*: debug: 5[0-9]{2}: .+)', 'cause', clean),
    # 2.0 to 2.4, of scp and ssh; then both end with: scp: Connection closed
    ({_SETUP}, b'key verif', rb'(Host key verification failed.*)', 'cause', clean),
    ({_SETUP}, b': Permission denied (', rb'(.*: Permission denied \(.+)', 'cause', clean),
    ({_SETUP}, b'ssh: ', rb'(ssh: .+)', 'cause', clean),
    ({_SETUP}, b'scp: ', rb'((?:[a-z]*sh: .*)?scp: .+)', 'cause', clean),  # sh: scp: not found
    # mount.nfs: access denied by server while mounting ...
    ({_TARGET}, b'mount', rb'(mount(?:\.nfs4?)?: .*)', 'cause', clean),
    # nbdcopy: write at offset 51904512 failed: No space left on device
    ({_COPYING}, b'copy: ', rb'(nbdcopy: .*)', 'cause', clean),
    # 1.x: qemu-img: error while writing sector 1: No space left on device
    ({_COPYING}, b'-img: ', rb'(qemu-img: .*)', 'cause', clean),
    # <Section ovf:id='UUID' ovf:required='false' xsi:type='ovf:OperatingSystemSection_Type'>; for
    # an upload <OperatingSystemSection ovf:id='UUID' ovf:required='false' ovirt:id='1300'>
    ({_COPYING, _METADATA}, b'OperatingSystemSection',
     rb" *<(?:OperatingSystem)?Section ovf:id=['\"]" + _UUID + rb"['\"].*", 'vm_id', _uuid),
))


class Lines:
    """Joins chunks into lines, ended by LF or CR. Of one in many chunks, `limit` bytes are kept."""

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
        """Like take(): return the last line if nothing ended it."""
        rest, self._rest = self._rest, b'\n'
        return rest


def copying_disk(text):
    """Return (number, count) if phase `text` is of a disk being copied, else None."""
    match = re.match(r'Copying disk ([0-9]{1,3})/([0-9]{1,3})(?![0-9])', text)
    number, count = map(int, match.groups()) if match else (0, 0)
    return (number, count) if 1 <= number <= count else None


class Parser:
    """Turns virt-v2v's messages and output, and that of programs below it, into events."""

    def __init__(self, has_messages):
        self._has_messages = has_messages
        # Texts of phases, in bytes, whose message has come and whose line has not.
        self._announced = deque(maxlen=MAX_ANNOUNCED)
        self._go_to(_SETUP)
        self._copies = 0            # how many have begun
        self._message_lines = Lines(MAX_MESSAGE_LINE)
        self._lines = Lines(MAX_LINE)
        self._target_phases = []    # the texts of those that prepare the target
        self._unfinished = None     # an error or warning that goes on: an Event, its text in bytes
        self._farewell = []         # an event that counts if no phase follows

    def messages(self, chunk):
        """Return the events in a chunk from the pipe of messages."""
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
        if name == 'phase' and event.value and self._has_messages:
            self._announced.append(text.strip('\n').partition('\n')[0].encode('utf-8', 'replace'))
        return event

    def output(self, chunk):
        """Return the events in a chunk from the pipe of output."""
        return self._parse(self._lines.take(chunk))

    def end(self):
        """Return the events that were waiting for more output."""
        events = self._parse(self._lines.end() + b'\n')
        if self._unfinished:
            events.append(Event(self._unfinished.name, clean(self._unfinished.value)))
            self._unfinished = None
        # virt-v2v may have ended before their lines came.
        farewell = self._farewell
        for text in list(self._announced):
            events += [event for event in self._enter(text) if event.name == 'disk']
        return events + farewell

    def _parse(self, lines, rows=None):
        """Return the events in whole lines; `rows` are those that their surroundings can match.

        Most of a log cannot matter, and for a whole chunk that is seen fast. A chunk that may
        matter is halved until it is short; each half is searched for what the whole had.
        """
        stage_rows = self._rows
        near = [row for row in (stage_rows if rows is None else rows) if row.literal in lines]
        if not (near or self._unfinished or self._may_have_phase(lines)):
            return []
        middle = lines.find(b'\n', len(lines) // 2)
        if len(lines) > PIECE and middle > 0:
            events = self._parse(lines[:middle], near)
            same_stage = self._rows is stage_rows       # else the second half may match more
            return events + self._parse(lines[middle:], near if same_stage else None)
        self._near = near
        return [event for line in lines.replace(b'\r', b'\n').split(b'\n')
                for event in self._line(line[:MAX_LINE])]

    def _may_have_phase(self, lines):
        if not self._has_messages:
            return (re.search(b'\n' + _PHASE_LINE, lines)          # both at once take twice as long
                    or re.search(b'\r' + _PHASE_LINE, lines))
        return ((b'\n[' in lines or b'\r[' in lines)
                and any(text in lines for text in [*self._announced, *self._target_phases]))

    def _line(self, line):
        """Return the events in one line."""
        if self._unfinished:
            return self._wrapped(self._unfinished.name, line)
        if line[:1] == b'[':
            match = re.fullmatch(_PHASE_LINE, line)
            return self._enter(match.group(1)) if match else []
        for row in self._near:
            match = re.fullmatch(row.pattern, line) if row.literal in line else None
            if not match:
                continue
            if row.event in ('error', 'warning'):
                return self._wrapped(row.event, match.group(1))
            event = Event(row.event, row.make(match.group(1)))
            if row.event != 'farewell':
                return [event]
            self._farewell = [event]
        return []

    def _enter(self, text):
        """The line of phase `text` (bytes) has come: go to its stage, if it may be believed."""
        number, _ = copying_disk(text.decode('utf-8', 'replace')) or (0, 0)
        if self._has_messages:
            # A guest may know what will be announced; but its line never comes before the message.
            if text in self._target_phases:
                return [Event('forged', None)]
            if text not in self._announced or (number and number != self._copies + 1):
                return []
            self._announced.remove(text)
        self._copies += bool(number)
        self._farewell = []
        stage = next((stage for start, stage in _STAGES if text.startswith(start)), _GUEST)
        self._go_to(stage)
        if stage == _TARGET:
            self._target_phases.append(text)
        event = Event('disk', number) if number else Event('idle', None)
        return [event] if self._has_messages else [Event('phase', clean(text)), event]

    def _go_to(self, stage):
        def counts(row):
            if self._has_messages:
                return stage in row.stages
            return _LEGACY in row.stages or (stage in row.stages and _MESSAGES not in row.stages)
        # What is understood now, and of that what may be in these lines.
        self._rows = self._near = list(filter(counts, _TABLE))

    def _wrapped(self, name, text):
        """An error or a warning. Up to 1.40, a blank at its end shows that it goes on."""
        if name == 'error':
            self._go_to(_OVER)          # what nbdkit says from now on is no cause of it
        if self._has_messages:
            return []
        text = (self._unfinished.value if self._unfinished else b'') + text
        goes_on = (not text or text.endswith(b' ')) and len(text) < MAX_MESSAGE
        self._unfinished = Event(name, text) if goes_on else None
        return [] if goes_on else [Event(name, clean(text))]


# --- Causes: what is wrong, in a word that never changes, and what to do

# The first row whose pattern is in the message counts. The tests have the message that each is made
# for. What the wrapper itself says begins a message, so nothing quoted in one can pass for it.
_CAUSES = (
    (r'\A(?:the wrapper|virt-v2v) was told to stop by |\Avirt-v2v was killed by'
     r' SIG(?:TERM|INT|HUP|QUIT)\b', 'cancelled', None),
    (r'\A(?:the wrapper was|all processes of the wrapper were) killed', 'wrapper.killed',
     'Look with journalctl -k whether memory ran out, and start again.'),
    (r'\Avirt-v2v was killed by SIGKILL', 'virt_v2v.killed',
     'Look with journalctl -k whether memory ran out; run fewer jobs at once.'),
    (r'incorrect user name or password|VIR_ERR_AUTH_FAILED|Permission denied \('
     r'|authentication methods failed', 'source.login',
     'Correct user and password, or key; in a URI, an @ in the user is written %40.'),
    (r'Host key verification failed|host key is unknown', 'source.host_key',
     'Add what ssh-keyscan says of this server to /etc/ssh/ssh_known_hosts.'),
    (r'SSL peer certificate or SSH remote key was not OK', 'source.certificate',
     'Install the CA of the VMware server here, or add ?no_verify=1 to vmware_uri.'),
    (r'VixDiskLib_Open.*: Unknown error|thumbprint does not match', 'source.thumbprint',
     'Compare vmware_fingerprint with the thumbprint of the server; see that the guest is off.'),
    (r'NfcNewAuthdConnectionEx: Failed to connect|IP address lookup for host|ssh: connect to host'
     r'|curl_easy_perform\(\) returned an error', 'source.unreachable',
     'Check the name of the server, and that this host reaches its ports 443 and 902 (ssh: 22).'),
    (r'You do not have access rights to this file', 'source.disk',
     'See that the disk is there, and that the user may read it.'),
    (r'cannot find libvirt domain', 'source.guest_missing',
     'Give vm_name as the server spells it, and in vmware_uri the host that has it.'),
    (r'is running or paused', 'guest.running', 'Shut the guest down.'),
    (r'No root device found|inspection could not detect', 'guest.no_root',
     'See whether virt-v2v supports this system, and whether its disks are encrypted.'),
    (r'root device .+ not found', 'guest.root_missing', 'Give one that the message lists.'),
    (r'Windows Hibernation', 'guest.hibernated',
     'Switch hibernation and Fast Startup off in the guest, and shut it down.'),
    (r'multi-boot operating systems', 'guest.multiboot', 'Say which of its systems to convert.'),
    (r'could not find key to open LUKS', 'guest.encrypted', 'Give the keys of its disks.'),
    (r'No space left on device|Low disk space', 'target.full',
     'Make room in the target, and in /var/tmp of this host.'),
    (r'mount command failed', 'target.mount', 'See that this host may mount the export domain.'),
    (r'ovirtsdk4\.AuthError', 'target.auth', 'Correct user and password of the engine.'),
    (r'certificate verif|CA file .+ doesn.t exist', 'target.certificate',
     'Give the file with the CA certificate of the engine.'),
    (r'ovirtsdk4\.ConnectionError|Connection(?:Refused|Reset)Error|BrokenPipeError'
     r'|ssl\.SSL\w*Error', 'target.unreachable',        # the server may die in the copy, too
     'See that engine and image server run, and that this host reaches them.'),
    (r'storage domain .+ does not exist', 'target.storage_missing', 'Give one that is active.'),
    (r'cluster .+ is not part of', 'target.cluster_missing',
     'Give a cluster of the data center that has the storage domain.'),
    (r'ValueError: Invalid format specifier', 'target.port',    # of the scripts of 2.5.2 on
     'Leave the port out of rhv_url.'),
    (r'Failed to create a VM', 'target.import', 'Look at the events in the engine for the reason.'),
    (r'VM already exists', 'target.vm_exists', 'Remove that VM, or name the new one otherwise.'),
    (r'libvixDiskLib[^:]*: cannot open shared', 'vddk.library',
     'Unpack a whole VDDK that this nbdkit knows, and name it by --vddk-libdir.'))


def error_message(text):
    """Return what a state says of error `text`: with a code, and a hint if there is one."""
    code, hint = next(((code, hint) for pattern, code, hint in _CAUSES
                       if re.search(pattern, text)), ('unknown', None))
    message = {'type': 'error', 'message': text, 'code': code}
    return dict(message, hint=hint) if hint else message


# --- Progress: events -> what is known -> the state document, whose keys only this room knows

# What is fixed once virt-v2v is executed. The names of the fields are keys of the state.
Facts = namedtuple('Facts', 'pid wrapper_pid vm_name target wrapper_log v2v_log started_at')


class Disk:
    """A disk that is copied, or has been; `sure` if virt-v2v said which one it is."""

    def __init__(self, number, path, sure):
        self.number, self.path, self.sure = number, path, sure
        self.percent = 0


class Progress:
    """All that is known of a conversion. Each kind of Event is listed, or has a method."""

    def __init__(self, listed):
        """`listed` are the request's source_disks, a tuple."""
        self._listed = listed
        self._count = len(listed)
        self.sources = []           # paths of the guest's disks, in its order
        self._disks = []
        self._current = None        # the disk that is being copied
        self._phase = self._error = self._vm_id = None
        self._causes = {}           # program: what it said
        self.warnings = []
        # The values of these events: sizes in the order of the copies, and what virt-v2v made.
        self._found = {'size': [], 'image': [], 'upload_disk': [], 'upload_transfer': []}

    def apply(self, event):
        """Take in an Event."""
        if event.name in self._found:
            self._found[event.name].append(event.value)
        else:
            getattr(self, event.name)(event.value)

    def phase(self, text):
        self._phase = text
        self._count = (copying_disk(text) or (0, self._count))[1]

    def disk(self, number):
        self.idle(None)
        if number > max([0] + [disk.number for disk in self._disks]):
            for disk in self._disks:
                disk.percent = 100
            self._disks.append(self._new_disk(number))
        self._current = next((disk for disk in self._disks if disk.number == number), None)

    def idle(self, _):
        """No disk is being copied, and what programs said before causes no later error."""
        self._current = None
        self._causes.clear()

    def _new_disk(self, number):
        taken = {disk.path for disk in self._disks}
        source = self.sources[number - 1:number]
        if source and source[0] not in taken:
            return Disk(number, source[0], sure=True)
        # virt-v2v does not say: take the disk of that number in the request, or invent a name.
        nth = self._listed[number - 1:number] + self._listed
        path = next((path for path in nth if path not in taken), 'disk {}'.format(number))
        while path in taken:            # a listed path may read "disk 2"
            path = 'another ' + path
        return Disk(number, path, sure=False)

    def percent(self, value):
        if self._current:
            self._current.percent = min(100, max(self._current.percent, value))

    def source(self, path):
        if path not in self.sources:
            self.sources.append(path)

    def opened(self, path):
        disk = self._current
        if not disk or path in [other.path for other in self._disks]:
            return
        # A listed disk keeps its progress, so once it has some, another path comes too late.
        if not disk.sure and not (disk.percent and disk.path in self._listed):
            disk.path, disk.sure = path, True

    def error(self, text):
        self._error = text

    def cause(self, text):
        """A program complains. The first of each counts: the rest are mostly consequences."""
        self._causes.setdefault(re.match(r'[\w.-]*', text).group(), text)

    def warning(self, text):
        if text not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def farewell(self, text):
        """virt-v2v has ended with these words, which it does not call an error."""
        self._error = self._error or text

    def forged(self, _):
        """A guest may have said what was found so far."""
        self._found = {name: [] for name in self._found}

    def vm_id(self, uuid):
        self._vm_id = uuid

    def message(self):
        """Return the last_message of the state, None if there is no error."""
        error = self._error
        # From 2.10 on: nbdcopy exited with non-zero error code 1
        if error and self._causes and re.search(
                '(?i)see (?:earlier|previous)|^nbdcopy exited with ', error):
            error = '{} ({})'.format(error, '; '.join(self._causes.values()))
        return error and error_message(error)

    def is_copying(self):
        """Say whether a disk is being copied."""
        return self._current is not None

    def _sizes(self):
        """Return {path: bytes} of the disks whose size is certain."""
        sizes, found = {}, self._found['size']
        if len(found) == len(self.sources):
            sizes.update(zip(self.sources, found))
        # The source is not always told, but copies come in the same order.
        sizes.update((disk.path, found[disk.number - 1]) for disk in self._disks
                     if disk.number <= len(found) <= self._count)
        return sizes

    def _disk_states(self):
        percents, sizes = dict.fromkeys(self._listed, 0), self._sizes()
        percents.update((disk.path, disk.percent) for disk in self._disks)
        copied = {disk.path for disk in self._disks}
        over = not self._current and 0 < len(self._disks) == self._count
        for path in percents:
            state = {'path': path, 'progress': percents[path]}
            if path in sizes:
                state['bytes'] = sizes[path]
            if over and path not in copied:
                state['unknown'] = True
            yield state

    def document(self, facts):
        """Return the state of a conversion that goes on."""
        state = dict(started=True, **facts._asdict())
        state['disks'] = list(self._disk_states())
        state['disk_count'] = self._count
        state['updated_at'] = timestamp()
        found = self._found
        upload = {'disks': found['upload_disk'], 'transfers': found['upload_transfer']}
        missing = ['the guest has no disk ' + disk['path'] for disk in state['disks']
                   if 'unknown' in disk]
        state.update((key, value) for key, value in (
            ('phase', self._phase), ('vm_id', self._vm_id), ('images', found['image']),
            ('upload', any(upload.values()) and upload),
            ('warnings', [text[:MAX_WARNING] for text in missing + self.warnings][:MAX_WARNINGS]),
            ('last_message', self.message())) if value)
        return state


def signal_name(number):
    """Return a name such as SIGTERM for the number of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return 'signal {}'.format(number)


def finished_document(state, return_code, reason, stuck=(), left=(), complete=False):
    """Return the last state of a conversion, made from the one before it.

    `return_code` is virt-v2v's, None if it is not known; `reason` why the wrapper ended it, None
    if it did not; `stuck` are the processes that cannot be ended, `left` is what could not be
    removed, `complete` says if the VM is there all the same. Status 0 alone is success.
    """
    state = dict(state)
    said = state.pop('last_message', {})
    if left:
        state['left_behind'] = list(left)
    if return_code is not None:
        state['return_code'] = return_code
    if return_code == 0:
        state['disks'] = [disk if disk.get('unknown') else dict(disk, progress=100)
                          for disk in state['disks']]
    else:
        text = _why_it_failed(said, return_code, reason)
        if stuck:
            text += '; could not be killed, as they wait for storage: ' + ', '.join(stuck)
        if complete:
            text += '; but the new VM is complete, and was kept'
        state['last_message'] = error_message(text)
        if state['last_message']['code'] == 'cancelled':
            state['cancelled'] = True
        state['failed'] = True
    state['updated_at'] = state['finished_at'] = timestamp()
    state['finished'] = True
    return state


def _why_it_failed(said, return_code, reason):
    """Return the text of that; `said` is the last_message so far, {} if there is none."""
    # That virt-v2v ends because the wrapper told it to is no error of its own.
    error = None if reason and said.get('code') == 'cancelled' else said.get('message')
    if reason is None and return_code is None:
        reason = 'virt-v2v is gone, and nobody knows how it ended'
    elif reason is None and return_code < 0:
        reason = 'virt-v2v was killed by ' + signal_name(-return_code)
    elif reason is None and not error:
        reason = 'virt-v2v ended with status {} and no error message'.format(return_code)
    return '{} ({})'.format(reason, error) if reason and error else reason or error


# --- Command: what to execute, in the words of the version that is there

# What this virt-v2v tells of itself: whether it sends messages, its features, its options.
Capabilities = namedtuple('Capabilities', 'messages features options')

AGENT = b'SSH_AUTH_SOCK'        # where ssh(1) finds an agent with keys

# Those of the caller's variables that virt-v2v gets.
_ENVIRONMENT = re.compile(rb'PATH|LIBGUESTFS_\w+|VIRTIO_WIN|(?:https?|ftp|all|no)_proxy'
                          rb'|(?:HTTPS?|FTP|ALL|NO)_PROXY')


def capabilities(ask):
    """Find out what this virt-v2v knows. Returns Capabilities.

    `ask` takes an option and returns the words virt-v2v prints for it, or None if it refuses.
    """
    # JSON messages came together with this spelling (1.41.1), later than -io and -ip.
    features = ask('--machine-readable=fd:1')
    if features is not None:
        return Capabilities(True, frozenset(features), frozenset(['-io', '-ip']))
    options = (ask('--short-options') or []) + (ask('--long-options') or [])
    return Capabilities(False, frozenset(ask('--machine-readable') or ()), frozenset(options))


def _vddk_arguments(capability, request, libdir):
    """The guest is read from an ESXi host or a vCenter, its disks with VMware's library."""
    options = capability.options
    if capability.messages and 'vddk' not in capability.features or (
            not options & {'-io', '--vddk-libdir'}):
        raise HostError(('virt-v2v', 'this version cannot read disks with VDDK'))
    source = ['-i', 'libvirt', '-ic', request.vmware_uri,
              '-ip' if '-ip' in options else '--password-file', request.vmware_password.path,
              '-it', 'vddk']
    # 1.39.2 brought -io; the older spelling went in 2.7.13.
    if '-io' in options:
        return source + ['-io', 'vddk-libdir=' + libdir,
                         '-io', 'vddk-thumbprint=' + request.vmware_fingerprint]
    return source + ['--vddk-libdir', libdir, '--vddk-thumbprint', request.vmware_fingerprint]


def _output_of(capability, purpose, *names):
    """Return the first of the names of an output that this virt-v2v knows. Raises HostError."""
    for name in names:
        if 'output:' + name in capability.features:
            return name
    raise HostError(('virt-v2v', 'this version cannot {} (RHEL 10 has no -o {})'.format(
        purpose, names[-1])))


def _export_arguments(capability, _, directory):
    # From 2.7.15 on it is called ovirt, but rhv works as well (select_output.ml).
    _output_of(capability, 'write to an oVirt export domain', 'ovirt', 'rhv')
    return ['-o', 'rhv', '-os', directory]


def _upload_arguments(capability, request, _):
    output = _output_of(capability, 'upload to oVirt', 'ovirt-upload', 'rhv-upload')
    # From 2.5.2 on, its scripts fail on any port; 2.5.8 brought this feature.
    url = request.rhv_url.replace(':443/', '/')
    if 'customize-ops' in capability.features and re.search(':[0-9]+/', url):
        raise HostError(('rhv_url', 'this version of virt-v2v takes no port there but 443'))
    return ['-o', output, '-oc', url, '-op', request.rhv_password.path,
            '-os', request.rhv_storage, '-oo', 'rhv-cluster=' + request.rhv_cluster,
            '-oo', 'rhv-direct=true',       # the one spelling that all versions take
            # By default, virt-v2v does not verify servers.
            '-oo', 'rhv-verifypeer={}'.format(json.dumps(not request.insecure_connection))] + (
                [] if request.insecure_connection else ['-oo', 'rhv-cafile=' + request.rhv_cafile])


# Over SSH the guest is read from files; vm_name says on which host.
_SOURCE_ARGUMENTS = {'vddk': _vddk_arguments, 'ssh': lambda *_: ['-i', 'vmx', '-it', 'ssh']}
_TARGET_ARGUMENTS = {'export_domain': _export_arguments, 'rhv_upload': _upload_arguments}


def make_arguments(capability, request, directory, libdir, message_fd):
    """Return the arguments of virt-v2v, without its own name, as bytes. Raises HostError.

    `directory` is that of the export domain, `libdir` that of the VDDK. They are encoded here,
    because under LC_ALL=C Python 3.6 would take everything for ASCII.
    """
    arguments = ['-v', '-x']
    if capability.messages:
        arguments += ['--machine-readable=fd:{}'.format(message_fd)]
    arguments += ['--root', request.root]   # else virt-v2v asks if there are two systems
    arguments += _SOURCE_ARGUMENTS[request.transport_method](capability, request, libdir)
    arguments += ['-of', request.output_format]
    arguments += _TARGET_ARGUMENTS[request.target](capability, request, directory)
    arguments += ['-oa', request.allocation] if request.allocation else []
    arguments += ['-on', request.new_vm_name] if request.new_vm_name else []
    for device, secret in request.luks_keys:
        arguments += ['--key', device + (':file:' + secret.path if secret else ':clevis')]
    for source, destination, mac in request.network_mappings:
        if mac and not capability.features & {'mac-option'}:
            raise HostError(('network_mappings', 'this version of virt-v2v cannot map a network by'
                                                 ' mac_address'))
        arguments += (['--mac', '{}:bridge:{}'.format(mac, destination)] if mac else
                      ['--bridge', '{}:{}'.format(source, destination)])
    arguments += ['--bridge', 'ovirtmgmt', '--', request.vm_name]       # for all other networks
    return [argument.encode('utf-8', 'surrogateescape') for argument in arguments]


def make_environment(inherited, request, identity, drivers, scratch, cache):
    """Return virt-v2v's environment: the useful part of `inherited` (bytes to bytes), and ours.

    `drivers` is where those for Windows guests are, or None; `scratch` the directory for temporary
    files, `cache` the one for libguestfs' appliance (all bytes). libguestfs puts its sockets below
    XDG_RUNTIME_DIR, or /tmp, where a killed run would leave them; and after a change of user the
    caller's XDG_RUNTIME_DIR is somebody else's.
    """
    environment = {b'LIBGUESTFS_BACKEND': b'direct', b'PATH': os.fsencode(ADMIN_PATH),
                   b'LIBGUESTFS_CACHEDIR': cache}
    environment.update((name, value) for name, value in inherited.items()
                       if _ENVIRONMENT.fullmatch(name))
    environment.update({
        b'LC_ALL': b'C',                    # else messages are translated
        b'TMPDIR': scratch, b'VIRT_V2V_TMPDIR': scratch, b'XDG_RUNTIME_DIR': scratch,
        b'HOME': os.fsencode(identity.home),
        b'USER': os.fsencode(identity.name), b'LOGNAME': os.fsencode(identity.name)})
    if drivers:
        environment[b'VIRTIO_WIN'] = drivers
    if request.ssh_key:
        environment[AGENT] = scratch + b'/agent'        # see start_agent()
    elif request.transport_method == 'ssh' and AGENT in inherited:
        environment[AGENT] = inherited[AGENT]
    return environment


# --- Processes: thin layers above system calls. No JSON but on our own pipes, no parsing.

# Constants of the kernel that Python 3.6 has no names for.
_CLONE_NEWNS = 0x00020000           # unshare(2)
_MS_REC_SLAVE = 0x4000 | 0x80000    # mount(2)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522  # capset(2)
_KEYCTL = {'x86_64': 250, 'aarch64': 219, 'ppc64le': 271, 's390x': 280}     # syscall(2)
_KEYCTL_JOIN_SESSION_KEYRING = 1    # keyctl(2)
# Enough for virt-v2v, and not too many for old programs that close every possible number.
_MAX_DESCRIPTORS = 1 << 16

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def system_call(name, *arguments):
    """Call a function of the C library that returns -1 where it fails. Raises OSError."""
    # Not at the top: libffi 3.5 keeps a file open, which must not get the number of a descriptor
    # that our caller has closed.
    import ctypes
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, '{}: {}'.format(name, os.strerror(number)))


def shed_inheritance():
    """Drop what the caller left to this process, and core dumps. Raises HostError."""
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
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    # A dump would show the password. A limit of 1 byte also keeps it from being piped to a program,
    # which 0 does not (fs/coredump.c); below a hard limit of 0, it is at least empty.
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open('/proc/self/coredump_filter', 'w') as stream:
        stream.write('0')
    # Limits of a user's shell, or of a service, are not meant for a conversion.
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (hard, hard))
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


def run_and_exit(function):
    """End this process with the exit status that `function` returns; 1 if that fails."""
    status = 1
    try:
        status = function()
    except Exception as error:
        LOG.write('ERROR', 'internal error: {}', where(error))
    finally:
        os._exit(status)


def fork(child):
    """Fork; the new process runs `child`, a function that returns an exit status, and ends.

    Returns the process ID. In the child, SIGCHLD and the stop signals are blocked.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS | {signal.SIGCHLD})
    pid = os.fork()
    if pid == 0:
        run_and_exit(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def leave_output():
    """Put /dev/null in place of what the caller may read to its end. Raises HostError."""
    with blaming(os.devnull):
        null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)


def kill(pid, number):
    """Send a signal to a process, or with a negative `pid` to a group, if there is one of ours."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def can_be_read(stream, patience):
    """Wait at most `patience` seconds (None: for ever) until `stream` can be read; say if so."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(None if patience is None else max(0, patience) * 1000))


def run_program(subject, argv, environment, patience, stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, pass_fds=()):
    """Run a program that ends by itself; return its status and what it printed (bytes).

    The last three are as for Popen. Raises HostError about `subject`, also if it takes more
    than `patience` seconds or prints more than MAX_ANSWER bytes; then it is killed, and all that it
    started.
    """
    with blaming(subject):
        child = subprocess.Popen(argv, env=environment, stdin=stdin, stderr=stderr,
                                 stdout=subprocess.PIPE, pass_fds=pass_fds,
                                 start_new_session=True, preexec_fn=die_with_us())
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


def die_with(parent):
    """Have the kernel kill this process, which `parent` has forked, when that ends."""
    system_call('prctl', _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)             # it ended before that call


def die_with_us():
    """Return what a child runs before exec, so that it is killed when we end."""
    parent = os.getpid()

    def prepare_child():
        signal.pthread_sigmask(signal.SIG_SETMASK, ())      # unblock all
        die_with(parent)
    return prepare_child


def start_agent(key, environment):
    """Start an ssh agent, a child of ours, that holds the Secret `key`. Raises HostError."""
    with blaming('ssh-agent'):
        agent = subprocess.Popen(
            ['ssh-agent', '-D', '-a', environment[AGENT]], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=die_with_us())
        agent.returncode = 0            # end_descendants() reaps it
        agent.stdout.readline()         # it says where it listens
    with open(key.path) as stream:
        status, output = run_program('ssh-add', ['ssh-add', '-q', '-'], environment,
                                     PROBE_PATIENCE, stdin=stream, stderr=subprocess.STDOUT)
    if b'passphrase' in output:         # it asks for one, in vain
        raise HostError(('ssh_key', 'expected a key that needs no passphrase'))
    if status != 0:
        raise HostError(('ssh_key', 'cannot be used: ' + ' '.join(clean(output).split())))


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

    The child stays a zombie, so that its ID is not reused. Raises ChildProcessError.
    """
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def end_descendants(keep=None):
    """Kill all our descendants: orphans come to us, as we are a subreaper.

    All are reaped but child `keep`, which stays a zombie. Returns the names of those that have not
    gone after END_PATIENCE seconds: a process asleep on a dead server cannot be killed.
    """
    give_up = time.monotonic() + END_PATIENCE
    while True:
        # Before the list is read: children of a process come to us when it ends.
        ended = False
        with suppress(ChildProcessError):       # it is no child of ours, or not yet
            ended = keep is not None and ending_of(keep) is not None
        # Of the main thread, to which orphans come; in clean_up() another one may have a child.
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


# --- Places: who we are, which directories, which programs

# What the command line says: None or False for each option that was not given.
Options = namedtuple('Options', 'log_dir state_dir vddk_libdir check wait list watch cancel json')
NO_OPTIONS = Options(*[None] * len(Options._fields))
# What check_host has found: `target` is an ExportDomain or Upload, `libdir` that of the VDDK or
# None, `virt_v2v` a path (bytes), `logs` and `states` are Directories, `drivers` a path (bytes) or
# None.
Host = namedtuple('Host', 'target libdir virt_v2v logs states drivers')
Directory = namedtuple('Directory', 'path fd')


def as_text(path):
    """Return the text of `path`, which Python may have decoded as ASCII: names are UTF-8."""
    return os.fsencode(path).decode('utf-8', 'surrogateescape')


class Identity(namedtuple('Identity', 'name uid gid home')):
    """The account that the conversion runs as."""

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
        own = os.getegid() if uid else 0        # group 0 is left for the account's own
        return cls(entry.pw_name, entry.pw_uid, own or entry.pw_gid, entry.pw_dir)

    def become(self):
        """Become this account, without privileges, for good, whoever we are. Raises HostError."""
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
            # Without permitted ones there are no ambient ones, capabilities(7).
            header = _CAPABILITY_VERSION_3.to_bytes(4, sys.byteorder) + bytes(4)
            system_call('capset', header, bytes(24))
            system_call('prctl', _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            # So that no other process of this user can look into our memory.
            system_call('prctl', _PR_SET_DUMPABLE, 0, 0, 0, 0)
        with blaming('/proc'), open('/proc/self/status') as stream:
            status = dict(line.rstrip('\n').split(':\t', 1) for line in stream if ':\t' in line)
        # What the kernel says counts, not that the calls above returned.
        wanted = {'Uid': {self.uid}, 'Gid': {self.gid}, 'NoNewPrivs': {1}}
        holds = [set(map(int, status[key].split())) == value for key, value in wanted.items()]
        holds += [int(status[key], 16) == 0 for key in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')]
        holds += [set(map(int, status['Groups'].split())) <= groups]
        with suppress(OSError):
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
        log_dir = state_dir = os.path.join('/', base, PROGRAM)      # some have no home
    return options.log_dir or log_dir, options.state_dir or state_dir


def user_name(uid):
    """Return the name of a user, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _command_for(path):
    """Return the command by which root makes directory `path` for us."""
    import grp          # not needed by a start that succeeds
    group = os.getegid()
    with suppress(KeyError):        # a group without a name
        group = grp.getgrgid(group).gr_name
    return 'install -d -o {} -g {} {}'.format(
        user_name(os.geteuid()), group, quoted(as_text(path)))


def open_private_directory(subject, path, make=True):
    """Make directory `path` if it is missing; return it opened, a Directory.

    None if it is missing and could be made, but `make` is false. Raises HostError about `subject`
    if it is not ours alone to write to: whoever can rename what is in it could have us write to any
    file of ours.
    """
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    with blaming(subject):
        try:
            if make:
                os.makedirs(path, mode=0o755, exist_ok=True)
            elif there != path:
                if not os.access(there, os.W_OK | os.X_OK):
                    raise PermissionError
                return None
        except PermissionError:
            raise HostError((subject, 'is missing, and may only be made by root: '
                                      + _command_for(path))) from None
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return Directory(path, fd)
    os.close(fd)
    user = user_name(os.geteuid())
    if status.st_uid != os.geteuid():
        raise HostError((subject, 'belongs to {}, expected a directory of {}; one in it will do: {}'
                         .format(user_name(status.st_uid), user,
                                 _command_for(os.path.join(path, PROGRAM)))))
    raise HostError((subject, 'others may write to it (mode {:04o}), expected {} alone: chmod go-w'
                              ' {}'.format(status.st_mode & 0o7777, user, quoted(as_text(path)))))


def find_virt_v2v():
    """Return the path (bytes) of the first virt-v2v on PATH. Raises HostError."""
    for place in os.environb.get(b'PATH', os.fsencode(ADMIN_PATH)).split(b':'):
        path = os.path.join(place, b'virt-v2v')
        if os.path.isabs(path) and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise HostError(('virt-v2v', 'not found on PATH'))


# Drivers for Windows guests, the best first: those of an ISO domain of oVirt, and the package's.
_ISO_DOMAIN = '/rhev/data-center/mnt/*/*/images/11111111-1111-1111-1111-111111111111/'
_DRIVERS = tuple(_ISO_DOMAIN + name for name in (
    'RHV-toolsSetup*.iso', 'rhv-tools*.iso', 'oVirt-toolsSetup*.iso', 'ovirt-tools*.iso',
    'virtio-win*.iso')) + ('/usr/share/virtio-win/virtio-win.iso', '/usr/share/virtio-win')


def find_drivers(request):
    """Return the path (bytes) of the drivers for Windows guests, None if none are found.

    They are looked for if the request wants them. Raises HostError if those that it names are not
    there.
    """
    if request.virtio_win:
        path = request.virtio_win.encode('utf-8')
        with blaming('virtio_win'):
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return path
    if not request.install_drivers:
        return None
    from glob import glob

    def version(path):
        return [int(number) for number in re.findall('[0-9]+', os.path.basename(path))]
    return next((os.fsencode(max(found, key=version)) for found in map(glob, _DRIVERS) if found),
                None)


# --- Source: what the guest is read from

def check_vddk(subject, _, libdir, __):
    """Return the directory of the VDDK. Raises HostError."""
    with blaming(subject + '/lib64'):
        names = os.listdir(os.path.join(libdir, 'lib64'))
    if not any(name.startswith('libvixDiskLib.so') for name in names):
        raise HostError((subject, 'expected lib64/libvixDiskLib.so in it'))
    return libdir


def check_ssh(subject, request, _, identity):
    """Check that the host of the guest has a known host key: ssh cannot ask. Raises HostError."""
    host, port = re.match(r'[^@]*@\[?([^]:/]+|[^]]+)\]?(?::([0-9]+))?/', request.vm_name).groups()
    name = host if port in (None, '22') else '[{}]:{}'.format(host, port)
    for path in ('/etc/ssh/ssh_known_hosts', os.path.join(identity.home, '.ssh/known_hosts')):
        status, _ = run_program(
            'ssh-keygen', ['ssh-keygen', '-F', name, '-f', path], {'PATH': ADMIN_PATH},
            PROBE_PATIENCE)
        if status == 0:
            return
    raise HostError((subject, 'the host key of {} is not known; have root check and add it:'
                              ' ssh-keyscan -p {} {} >> /etc/ssh/ssh_known_hosts'.format(
                                  name, port or 22, host)))


def reach_vmware(request):
    """Look at thumbprint and port 902 of the server that the guest is read from.

    If one is wrong, virt-v2v only says so during the copy. Returns a list of problems; raises
    HostError if the server does not answer.
    """
    import hashlib
    import socket
    import ssl
    from urllib.parse import unquote, urlsplit
    uri, problems = urlsplit(request.vmware_uri), []
    port = uri.port or 443
    socket.setdefaulttimeout(SERVER_PATIENCE)
    try:
        certificate = ssl.get_server_certificate((uri.hostname, port))
    except (OSError, ValueError) as error:      # ValueError: not a possible host name
        raise HostError(('vmware_uri', 'port {} of {} cannot be reached: {}'.format(
            port, uri.hostname, clean(str(error))))) from None
    kind = 'sha1' if len(request.vmware_fingerprint) == 59 else 'sha256'
    digest = hashlib.new(kind, ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    found = re.sub('(..)(?=.)', r'\1:', digest.upper())
    if found != request.vmware_fingerprint:
        problems.append(('vmware_fingerprint', 'the server has ' + found))
    # A vCenter only knows the disks; the host that has them is the last part of the path.
    host = unquote(uri.path.rpartition('/')[2]) if uri.scheme == 'vpx' else uri.hostname
    try:
        socket.create_connection((host, 902)).close()
    except (OSError, ValueError) as error:
        problems.append(('vmware_uri', 'port 902 of {}, where disks are read, cannot be reached:'
                                       ' {}'.format(host, clean(str(error)))))
    return problems


# How the guest's side is checked: `check` finds the libdir of a Host; `reach` is for --check alone,
# beside what virt-v2v says.
Source = namedtuple('Source', 'subject check reach')
SOURCES = {'vddk': Source('--vddk-libdir {}', check_vddk, reach_vmware),
           'ssh': Source('vm_name', check_ssh, lambda _: [])}


# --- Target: the export domain, or oVirt's engine, and what a failed job has made there

Mount = namedtuple('Mount', 'id parent root point options kind source kind_options')
# How proc(5) writes one in a line: the groups are its fields.
_MOUNT_LINE = '(?m)^{0} {0} [^ \n]+ {0} {0} {0} (?:[^ \n]+ )*?- {0} {0} {0}'.format('([^ \n]*)')


def mount_at(path, mounts):
    """Return the Mount that is seen at `path`, where it may cover others, or None."""
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
    def unescaped(text):
        return re.sub(r'\\([0-7]{3})', lambda match: chr(int(match.group(1), 8)), text)

    mounts = [Mount(*map(unescaped, fields)) for fields in re.findall(_MOUNT_LINE, mountinfo)]
    found = [mount.point for mount in mounts
             if mount.kind in ('nfs', 'nfs4') and mount.source.rstrip('/') == spec.rstrip('/')
             and mount.root == '/'
             and 'ro' not in mount.options.split(',') + mount.kind_options.split(',')
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
        system_call('mount', None, b'/', None, _MS_REC_SLAVE, None)
    status, output = run_program(
        subject, ['mount', '-t', 'nfs', '-o', 'nosuid,nodev,noexec', '--', spec, MOUNT_POINT],
        {'PATH': ADMIN_PATH, 'LC_ALL': 'C'}, MOUNT_PATIENCE, stderr=subprocess.STDOUT)
    if status != 0:
        said = ' '.join(clean(output).split()) or 'status {}'.format(status)
        raise HostError((subject, 'could not be mounted: ' + said))
    return MOUNT_POINT


@contextmanager
def opened_directory(path, parent=None):
    """Give a descriptor of directory `path`, which is no link, below descriptor `parent`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_images(root, images, vm_id):
    """Remove images, and what there is of VM `vm_id`, from the export domain at `root`.

    `images` are names below images/. What the OVF of any VM names is kept: that VM is complete. No
    link is followed. Returns what is left, as paths, and whether a VM has some of it.
    """
    paths = [os.path.join(root, part) for part in ExportDomain.PARTS]
    with opened_directory(paths[0]) as image_fd, opened_directory(paths[1]) as vm_fd:
        free = list(images)
        for name in os.listdir(vm_fd):
            with suppress(FileNotFoundError, NotADirectoryError), open(os.open(
                    '{0}/{0}.ovf'.format(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK,
                    dir_fd=vm_fd), 'rb') as stream:
                ovf = stream.read(MAX_OVF).lower()
                if len(ovf) == MAX_OVF:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
                free = [image for image in free if image.encode('ascii') not in ovf]
        left = [os.path.join(paths[0], image) for image in free
                if not _remove_directory(image, image_fd)]
        # Its metadata come last: they are no VM's as long as they name no image.
        if vm_id and len(free) == len(images) and not _remove_directory(vm_id, vm_fd):
            left.append(os.path.join(paths[1], vm_id))
    return left, len(free) < len(images)


def _remove_directory(name, parent):
    """Remove a directory of files, and say if it is gone. A name that is no UUID leads nowhere."""
    try:
        if re.fullmatch(_UUID, name.encode('utf-8')):
            with opened_directory(name, parent) as fd:
                for entry in os.listdir(fd):
                    os.unlink(entry, dir_fd=fd)
            os.rmdir(name, dir_fd=parent)
            LOG.write('INFO', 'removed from the export domain: {}', name)
    except FileNotFoundError:
        pass
    except OSError as error:
        LOG.write('WARNING', 'in the export domain: {}: {}', name, os_text(error))
        return False
    return True


class ExportDomain:
    """A directory with exactly one in it named by a UUID, which holds images/ and master/vms/."""

    PARTS = ('images', 'master/vms')

    def __init__(self, directory):
        """Check what virt-v2v checks after the conversion (output_rhv.ml). Raises HostError."""
        subject, self.directory = 'export_domain', directory
        if ':/' in directory:
            raise HostError((subject, 'virt-v2v takes a path with ":/" in it for an NFS export'))
        with blaming(subject):
            names = os.listdir(directory)
        uuids = [name for name in names
                 if re.fullmatch('(?s).{8}-.{4}-.{4}-.{4}-.{12}', name)]    # as virt-v2v does
        if len(uuids) != 1:
            raise HostError((subject, 'expected exactly one directory named by a UUID in it, found'
                                      ' {}{}'.format(len(uuids), '; give the directory above it'
                                                     if 'dom_md' in names else '')))
        self.root = os.path.join(directory, uuids[0])
        self._parts = [os.path.join(self.root, part) for part in self.PARTS]
        for path in [self.root] + self._parts:
            if not os.path.isdir(path):
                raise HostError((subject, '{} is not a directory; is the domain attached to a data'
                                          ' center?'.format(path)))
            if not os.access(path, os.W_OK | os.X_OK):
                raise HostError((subject, '{} may not write to {}'.format(
                    user_name(os.geteuid()), path)))
        self._before = self._contents()

    def _contents(self):
        contents = set()
        for part in self._parts:
            with suppress(OSError):
                contents.update(os.path.join(part, name) for name in os.listdir(part))
        return contents

    def free_bytes(self):
        """Return how many bytes it has room for. Raises HostError."""
        with blaming('export_domain'):
            status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def new_paths(self):
        """Return the paths of images and VMs that were not there at first, sorted."""
        return sorted(self._contents() - self._before)

    def document(self):
        """Return what the state tells of it."""
        return {'type': 'export_domain', 'directory': self.root}

    def clean_up(self, state):
        """Remove what the failed job of `state` has made; see remove_images()."""
        return remove_images(self.root, [
            image for image in state.get('images', ())
            if os.path.join(self._parts[0], image) not in self._before], state.get('vm_id'))


class Engine:
    """The REST API of oVirt's engine, as the user of a Request. Its methods raise HostError."""

    def __init__(self, request):
        import ssl          # what is imported here costs more than a start, and is for uploads only
        from urllib.parse import urlencode
        from urllib.request import HTTPSHandler, build_opener
        user, _, host = request.rhv_url[len('https://'):].rpartition('@')
        self._url = 'https://' + host
        with blaming('rhv_cafile'):
            context = ssl.create_default_context(
                cafile=None if request.insecure_connection else request.rhv_cafile)
        if request.insecure_connection:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._opener = build_opener(HTTPSHandler(context=context))
        form = urlencode({
            'grant_type': 'password', 'scope': 'ovirt-app-api',
            'username': user or 'admin@internal', 'password': request.rhv_password.read()})
        status, answer = self._send(
            'POST', '/'.join(self._url.split('/')[:4]) + '/sso/oauth/token', form.encode('ascii'),
            {'Accept': 'application/json'})
        try:
            answer = json.loads(answer.decode('utf-8'))
            token = answer.get('access_token')
        except (ValueError, AttributeError):
            raise HostError(('rhv_url', 'expected an oVirt engine there, got HTTP status {}'.format(
                status))) from None
        if not token:
            raise HostError(('rhv_password', 'the engine does not accept it: {}'.format(clean(str(
                answer.get('error_description') or answer.get('error'))))))
        self._headers = {'Accept': 'application/xml', 'Content-Type': 'application/xml',
                         'Authorization': 'Bearer ' + token, 'Version': '4'}

    def _send(self, method, url, data, headers):
        """Return the HTTP status and the answer (bytes)."""
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.request import Request as HttpRequest
        try:
            with self._opener.open(HttpRequest(url, data, headers, method=method),
                                   timeout=SERVER_PATIENCE) as answer:
                return answer.getcode(), answer.read(MAX_ANSWER * 16)
        except HTTPError as error:
            return error.code, error.read(MAX_ANSWER)
        except (OSError, ValueError, HTTPException) as error:   # as above; URLError is an OSError
            raise HostError(('rhv_url', clean(str(getattr(error, 'reason', error))))) from None

    def do(self, method, path, **query):
        """Return the HTTP status for `path` below the API, and what is there as an XML element."""
        from urllib.parse import urlencode
        from xml.etree import ElementTree
        status, answer = self._send(
            method, '{}/{}{}'.format(self._url, path, '?' + urlencode(query) if query else ''),
            b'<action/>' if method == 'POST' else None, self._headers)
        try:
            return status, ElementTree.fromstring(answer)
        except ElementTree.ParseError:
            return status, ElementTree.Element('none')

    def names(self, path, **query):
        """Return {name: ID} of a collection."""
        status, found = self.do('GET', path, **query)
        if status != 200:
            raise HostError(('rhv_url', 'the engine answers {} with HTTP status {}: {}'.format(
                path, status, clean(found.findtext('detail') or found.findtext('reason') or ''))))
        return {element.findtext('name'): element.get('id') for element in found}


class Upload:
    """A storage domain of oVirt, written to through the engine of a Request."""

    directory = None

    def __init__(self, request):
        """Check what virt-v2v 2.x checks after the conversion (rhv-upload-precheck.py)."""
        self._request = request
        environment = {'PATH': os.environ.get('PATH', ADMIN_PATH)}
        for argv, missing in (
                (['python3', '-c', 'import ovirtsdk4'], 'the Python module ovirtsdk4'),
                (['nbdkit', '--dump-plugin', 'python'], 'the Python plugin of nbdkit')):
            status, _ = run_program(argv[0], argv, environment, PROBE_PATIENCE)
            if status != 0:
                raise HostError(('this host', 'needs {} for an upload'.format(missing)))
        engine, storage = Engine(request), request.rhv_storage
        centers = engine.names('datacenters', search='storage.name=' + storage)
        if not centers:
            raise HostError(('rhv_storage', 'no data center has a storage domain of this name'))
        center, center_id = sorted(centers.items())[0]
        clusters = engine.names('datacenters/{}/clusters'.format(center_id))
        if request.rhv_cluster not in clusters:
            raise HostError(('rhv_cluster', 'not in data center {}, where the storage is;'
                             ' found: {}'.format(center, ', '.join(sorted(clusters)))))
        # A guest that is read by ssh tells its name only later.
        name = request.new_vm_name or request.transport_method != 'ssh' and request.vm_name
        if name and name in engine.names('vms', search='name="{}"'.format(name.replace('"', ''))):
            raise HostError(('new_vm_name', 'the engine has a VM {} already'.format(name)))

    def document(self):
        """Return what the state tells of it."""
        return {'type': 'rhv_upload', 'url': self._request.rhv_url,
                'cluster': self._request.rhv_cluster, 'storage': self._request.rhv_storage}

    def free_bytes(self):
        """Return how many bytes the storage domain has room for. Raises HostError."""
        _, found = Engine(self._request).do(
            'GET', 'storagedomains', search='name=' + self._request.rhv_storage)
        return int(found.findtext('*/available') or 0)

    def new_paths(self):
        """The state names all that can be left."""
        return []

    def clean_up(self, state):
        """Have the engine remove what the failed job of `state` has made. Raises HostError.

        virt-v2v does so itself unless it is killed, or told to stop while one of its scripts runs.
        Returns the IDs that are left, and whether the VM is there: then all belongs to it.
        """
        engine, made = Engine(self._request), state['upload']
        vm = engine.do('GET', 'vms/' + state['vm_id'])[0] if 'vm_id' in state else 404
        # A killed job may not have read the ID of the VM yet; but the disks tell.
        disks = [engine.do('GET', 'disks/' + disk, all_content='true') for disk in made['disks']]
        if vm == 200 or any(disk.find('vms/vm') is not None for _, disk in disks):
            return [], True
        if vm != 404 or not {status for status, _ in disks} <= {200, 404}:
            return made['disks'], False     # an engine that is busy does not tell
        for transfer in made['transfers']:
            engine.do('POST', 'imagetransfers/{}/cancel'.format(transfer))
        left, give_up = made['disks'], time.monotonic() + CLEAN_PATIENCE - SERVER_PATIENCE
        while left and time.monotonic() < give_up:
            # A disk is locked until its transfer has ended: then the engine answers 409.
            left = [disk for disk in left if engine.do('DELETE', 'disks/' + disk)[0] == 409
                    or engine.do('GET', 'disks/' + disk)[0] != 404]
            time.sleep(1 if left else 0)
        return left, False


# How the target is checked; this makes the target of a Host.
TARGETS = {'export_domain': lambda _, directory: ExportDomain(directory),
           'rhv_upload': lambda request, _: Upload(request)}


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


def is_locked(path):
    """Say whether lock file `path` is locked, by a job that is alive."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # Shared, for a moment: at worst a start takes a dead job for a living one.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(fd)
    except OSError as error:            # if it cannot be looked at, it is not called dead
        return error.errno not in (errno.ENOENT, errno.ELOOP)
    return False


class StateFile:
    """The state file of a job, replaced as a whole, and its lock file beside it.

    A job is alive as long as its lock is locked, by a descriptor that guardian and monitor share.
    The lock file holds three lines: the path of the job's temporary directory, its guest, and
    the lock file's own place, so that a copy of it says nothing about a job.
    """

    def __init__(self, directory, stem):
        """`directory` is a Directory, `stem` the name without its ending."""
        self.directory, self.fd, self.stem = directory, directory.fd, stem
        self._name, self._lock_name = stem + '.state', stem + '.lock'
        # Nobody else has this name, so a file that a killed process left there can be removed.
        self._temporary = '.{}.{}.tmp'.format(stem, os.urandom(4).hex())
        self._lock = self._lock_text = None

    @property
    def path(self):
        """Where it is."""
        return os.path.join(self.directory.path, self._name)

    def _place(self):
        return os.path.realpath(os.path.join(os.fsencode(self.directory.path),
                                             os.fsencode(self._lock_name)))

    def claim(self, lock_text):
        """Claim the name for a new job, and lock it; `lock_text` are the first two lines (bytes).

        Raises FileExistsError if it is taken; OSError.
        """
        self._lock_text = lock_text
        try:
            self._create_temporary(lock_text + b'\n' + self._place(), durable=False)
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

        Returns its temporary directory (bytes), b'' if the lock file is missing or a copy.
        Raises BlockingIOError if the job is alive; OSError.
        """
        try:
            self._lock = open_to_read(self._lock_name, self.fd)
        except FileNotFoundError:
            return b''
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lines = os.read(self._lock, MAX_ANSWER).split(b'\n')
        return lines[0] if lines[2:] == [self._place()] else b''

    def twin(self):
        """Return the path of the state file of another job of this guest that runs, or None."""
        for name in os.listdir(self.fd):
            stem, ending = os.path.splitext(name)
            other = StateFile(self.directory, stem)
            if ending != '.lock' or stem == self.stem:
                continue
            with suppress(OSError), open(open_to_read(name, self.fd), 'rb') as stream:
                guest = stream.read(MAX_ANSWER).split(b'\n')[1:2]
                if (guest == self._lock_text.split(b'\n')[1:]
                        and is_locked(os.path.join(self.directory.path, name))
                        and 'finished' not in (other.read() or ())):
                    return other.path
        return None

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

        Unless `durable`, the kernel writes it to the disk when it likes.
        """
        text = json.dumps(document, indent=2, ensure_ascii=False) + '\n'
        try:
            self._create_temporary(text.encode('utf-8', 'backslashreplace'), durable)
            os.rename(self._temporary, self._name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except FileNotFoundError:
            # The directory was removed: make it again, for the next write.
            anew = open_private_directory('state directory', self.directory.path)
            os.dup2(anew.fd, self.fd, inheritable=False)
            os.close(anew.fd)
            with suppress(FileExistsError):
                self.claim(self._lock_text)
            raise
        except OSError:
            with suppress(OSError):
                remove(self._temporary, self.fd)
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

    Its usual place, /var/tmp/.guestfs-UID, can be taken by any user; then nothing is converted.
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
    try:
        os.rmdir(path)      # often it is empty
    except OSError:
        for directory, names, _ in os.walk(path):
            for inner in [os.path.join(directory, name) for name in names]:
                if not os.path.islink(inner):
                    with suppress(OSError):
                        os.chmod(inner, 0o700)      # supermin leaves some that nobody may enter
        with suppress(ImportError):     # no descriptor left to read the module with
            import shutil       # importing it takes half as long as a start, and that is all over
            # As str: Python 3.6 mixes both kinds when it is given bytes.
            shutil.rmtree(os.fsdecode(path), ignore_errors=True)
    if os.path.lexists(path):
        LOG.write('WARNING', 'temporary files are left in {}', os.fsdecode(path))


# --- Job: what guardian and monitor share

# All that a job needs, complete before the monitor is forked. `arguments` are virt-v2v's,
# `output` and `messages` are Pipes, `paths` what the caller is told.
Job = namedtuple('Job', 'request host capability arguments environment scratch output messages'
                        ' output_log state paths')


def inherited_by_virt_v2v(job):
    """Return the descriptors that virt-v2v gets, beside its output: the agent has the ssh key."""
    return [job.messages.writer] + [secret.fd for secret in secrets_of(job.request)
                                    if secret is not job.request.ssh_key]


def clean_up(remove_made, state, leave):
    """Remove what the failed job of `state` has made in its target, with `remove_made(state)`.

    This runs in a process of its own, because storage may hang; with `leave`, not at all. Returns
    what is left, a list of texts, and whether the new VM is complete: then all of it stays.
    """
    made = state.get('images', []) + state.get('upload', {}).get('disks', [])
    if leave or not made:
        return made, False
    answer, parent = Channel(), os.getpid()

    def child():
        try:
            die_with(parent)
            leave_output()              # of --list
            answer.send(remove_made(state))
        except Exception as error:
            LOG.write('WARNING', 'what was made could not be removed: {}', where(error))
        return 0
    pid = fork(child)
    os.close(answer.writer)
    try:
        return answer.receive(time.monotonic() + CLEAN_PATIENCE) or (made, False)
    except TimeoutError:
        return made, False
    finally:
        os.close(answer.reader)
        kill(pid, signal.SIGKILL)


def conclude(job, pid, read_on, document, reason):
    """End what is left of the job, and publish its end; both guardian and monitor end here.

    `pid` is virt-v2v's; `read_on` takes in what is left in the pipes; `document` returns the state
    so far, and may raise OSError; `reason` says why the wrapper ended virt-v2v, None if it did not.
    """
    return_code, complain, give_up = None, 0.0, time.monotonic() + FINAL_WRITE_PATIENCE
    stuck = cleaned = ()
    while time.monotonic() < give_up:
        try:
            stuck = end_descendants(keep=pid)
            read_on()           # now nobody writes any more
            with suppress(ChildProcessError):
                return_code = ending_of(pid)
            state = document()
            if 'finished' not in state:
                if return_code != 0:
                    # Stuck processes mean that storage hangs; they may still write there.
                    cleaned = cleaned or clean_up(job.host.target.clean_up, state, leave=stuck)
                job.state.write(finished_document(state, return_code, reason, stuck, *cleaned),
                                durable=True)
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
    if return_code != 0 and not stuck:
        for path in job.host.target.new_paths():
            LOG.write('WARNING', 'new in the export domain since the start, perhaps left by this'
                                 ' conversion: {}', path)


# The name of a job, without the endings of its files.
_STEM = 'v2v-import-[0-9]{8}T[0-9]{6}-[0-9]+(?:-[0-9]+)?'


def end_dead_jobs(directory, target=None):
    """Publish the ending of each job in a Directory that nobody follows any more.

    `target` is that of the job that calls this, if any.
    """
    names = set(os.listdir(directory.fd))
    for name in sorted(names):
        stem, ending = os.path.splitext(name)
        if not re.fullmatch(_STEM, stem) or not (
                ending == '.lock' or ending == '.state' and stem + '.lock' not in names):
            continue
        state_file = StateFile(directory, stem)
        try:
            _end_if_dead(state_file, target)
        except BlockingIOError:
            pass                    # it is alive
        except Exception as error:
            LOG.write('WARNING', '{}: {}', name, where(error))
        finally:
            state_file.close()


def _remove_of_dead(state, target):
    """As the targets do. A dead job's engine password is gone, but `target` may have it."""
    own = state['target']
    if own['type'] == 'export_domain':
        return remove_images(own['directory'], state['images'], state.get('vm_id'))
    if target and target.document().get('url') == own['url']:
        return target.clean_up(state)
    return state['upload']['disks'], False


def _end_if_dead(state_file, target):
    scratch = state_file.lock_if_dead()
    if re.fullmatch(os.fsencode(TEMPORARY_DIR) + rb'/v2v-[0-9a-f]{8}', scratch):
        # The processes left of the job, and no others, have this in their environment.
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
        # A copy of a state says nothing of what belongs to whom now.
        cleaned = clean_up(lambda state: _remove_of_dead(state, target), state, leave=not scratch)
        state_file.write(finished_document(state, None, reason, (), *cleaned), durable=True)
        for name in os.listdir(state_file.fd):
            if name.startswith('.{}.'.format(state_file.stem)):     # a write that was cut short
                remove(name, state_file.fd)
    state_file.release()


# --- Monitor: executes virt-v2v, follows it, publishes its end

# Events that a reader of the state file should see at once, and after a power loss.
_TRANSITIONS = {'phase', 'disk', 'opened', 'vm_id', 'error', 'farewell', 'image', 'upload_disk',
                'upload_transfer', 'forged'}


def monitor(job, report, answer):
    """Be the monitor of `job`. Reports the Facts to the guardian, or problems.

    Returns an exit status: 0 if there is nothing left to do.
    """
    os.close(answer.writer)
    os.close(report.reader)
    # Orphans come to us; else the guardian would get them, and that may be killed.
    system_call('prctl', _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        conversion = Conversion(job)
    except Exception as error:
        report.send(problems_of(error))
        return 1                        # virt-v2v, if it was executed, is killed with us
    with suppress(OSError):             # the guardian is gone: the launcher has us stop
        report.send(conversion.facts._asdict())
    os.close(report.writer)
    # A bug in that thread ends the whole process, so the guardian ends the job.
    threading.Thread(target=run_and_exit, args=[conversion.take_signals], daemon=True).start()
    # In a thread, so that no job waits for another: killing what is left of one takes time.
    search = threading.Thread(args=[job.host.states, job.host.target],
                              target=end_dead_jobs, daemon=True)
    search.start()
    conversion.follow()
    search.join(END_PATIENCE)           # a short job should end a dead one all the same
    return 0


class Conversion:
    """virt-v2v at work, and what is known of it."""

    def __init__(self, job):
        """Execute virt-v2v and publish that. Raises HostError."""
        self._job = job
        self._parser = Parser(job.capability.messages)
        self._progress = Progress(job.request.source_disks)
        self._reason = None             # why virt-v2v was told to end
        self._killed = False            # it did not do so in time
        self._mishaps = 0
        self._news = self._urgent = self._failing = False
        self._publish_at = 0.0          # not before, unless it is urgent
        self._gather_interval = GATHER_INTERVAL
        self._wake_reader, self._wake_writer = os.pipe()
        self._pid = self._execute()
        if job.request.install_drivers and not job.host.drivers:
            text = 'no drivers for Windows guests were found on this host'
            LOG.write('WARNING', text)
            self._progress.apply(Event('warning', text))
        self.facts = Facts(self._pid, os.getpid(), job.request.vm_name, job.host.target.document(),
                           job.paths['wrapper_log'], job.paths['v2v_log'], timestamp())
        LOG.write('INFO', 'virt-v2v has process ID {}, wrapper {}', self._pid, os.getpid())
        with blaming('state file'):
            job.state.write(self._document(), durable=True)

    def _document(self):
        return self._progress.document(self.facts)

    def _execute(self):
        """Start virt-v2v and return its process ID. Raises HostError."""
        job = self._job
        if job.request.ssh_key:
            start_agent(job.request.ssh_key, job.environment)
        argv = [job.host.virt_v2v] + job.arguments
        LOG.write('INFO', 'executing {}', ' '.join(map(clean, argv)))
        with blaming('virt-v2v'):
            child = subprocess.Popen(
                argv, env=job.environment, stdin=subprocess.DEVNULL, stdout=job.output.writer,
                stderr=job.output.writer, pass_fds=inherited_by_virt_v2v(job),
                start_new_session=True, preexec_fn=die_with_us())
        close_secrets(job.request)
        child.returncode = 0            # or Popen would reap it: its ID is ours until the very end
        return child.pid

    def take_signals(self):
        """In a thread of its own, which touches no file: a disk that hangs cannot delay it."""
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
        # A message comes before the line of its text, so all messages are read first.
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
        except Exception as error:      # a bug of ours is no reason to lose a conversion
            self._mishaps += 1
            if self._mishaps <= 10:
                LOG.write('ERROR', 'internal error, the conversion goes on: {}', where(error))

    def _publish(self):
        """Write the state if there is news: transitions at once, mere progress not too often."""
        now = time.monotonic()
        if not self._news or (now < self._publish_at and (self._failing or not self._urgent)):
            return
        try:
            self._job.state.write(self._document(), durable=self._urgent)
        except Exception as error:      # a full disk or a bug
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

    `directory` is the export domain; None for an upload, or if finding it failed with `problems`.
    For --check it answers with what it has found, and starts nothing. A stop signal before the
    monitor is forked raises KeyboardInterrupt: what was made is unmade, and this process ends.
    """
    os.setsid()
    os.chdir('/')
    os.close(answer.reader)
    try:
        leave_output()
        system_call('prctl', _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with ExitStack() as undo:
            with interruptible():
                host = check_host(request, options, identity, directory, problems, answer)
                job = prepare(undo, request, options, identity, host, answer)
                if options.check:
                    undo.callback(end_descendants)
                    answer.send(look_at_source(job, answer))
                    return 0
            monitor_pid, facts = start_monitor(undo, job, answer)
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
            pass            # else they may stay zombies: not every PID 1 of a container reaps
    return 0


def check_host(request, options, identity, directory, problems, answer):
    """Find and check what virt-v2v would reject only after half an hour. Returns the Host.

    `directory` is the export domain. Raises HostError with all problems, `problems` first.
    """
    problems, found = list(problems), {}

    @contextmanager
    def looking_at(subject):
        answer.send(subject)            # in case it does not answer
        try:
            yield
        except HostError as error:
            problems.extend(error.problems)

    if not problems:
        with looking_at(_TARGET_KEYS[request.target][0].key):
            found['target'] = TARGETS[request.target](request, directory)
    libdir, source = options.vddk_libdir or VDDK_LIBDIR, SOURCES[request.transport_method]
    subject = source.subject.format(as_text(libdir))
    with looking_at(subject):
        found['libdir'] = source.check(subject, request, libdir, identity)
    with looking_at('virtio_win'):
        found['drivers'] = find_drivers(request)
    with looking_at('virt-v2v'):
        found['virt_v2v'] = find_virt_v2v()
    paths, opened = job_directories(identity, options), {}
    for path in dict.fromkeys(paths):       # both may be the same
        named = [option for option, other in zip(('--log-dir', '--state-dir'), paths)
                 if other == path]
        subject = '{} {}'.format(' and '.join(named), as_text(path))
        with looking_at(subject):
            opened[path] = open_private_directory(subject, path, make=not options.check)
            # Where something is started, that tells.
            if options.check and opened[path] and not os.access(path, os.W_OK | os.X_OK):
                raise HostError((subject, 'nothing can be written to it'))
    if problems:
        raise HostError(*problems)
    return Host(logs=opened[paths[0]], states=opened[paths[1]], **found)


def prepare(undo, request, options, identity, host, answer):
    """Make the files, and ask virt-v2v what it can do. Returns a Job; for --check it has no files.

    `undo`, an ExitStack, removes what is made. Raises HostError.
    """
    answer.send('logs and state file')
    scratch = os.path.join(TEMPORARY_DIR, 'v2v-' + os.urandom(4).hex())
    with blaming(scratch):
        os.mkdir(scratch, 0o700)
    scratch = os.fsencode(scratch)
    undo.callback(remove_tree, scratch)
    state, logs, paths, cache = None, (None, None), None, scratch
    if not options.check:
        guest = '{} {}'.format(request.vmware_uri, request.vm_name)
        lock_text = scratch + b'\n' + guest.encode('utf-8')
        state, logs, paths = create_files(undo, lock_text, host)
        twin, cache = state.twin(), cache_directory(scratch)
        if twin:
            raise HostError(('vm_name', 'a job of this guest is running: ' + as_text(twin)))
    LOG.fd = logs[0]
    LOG.write('INFO', '{} {}, Python {}, as user {}, temporary files in {}', PROGRAM, VERSION,
              sys.version.split()[0], identity.name, os.fsdecode(scratch))
    LOG.write('INFO', 'request: {}', request)
    if request.ignored:
        LOG.write('WARNING', 'ignored keys of the request: {}', ', '.join(request.ignored))
    answer.send('virt-v2v')
    environment = make_environment(os.environb, request, identity, host.drivers, scratch, cache)

    def ask(option):
        status, output = run_program(
            'virt-v2v', [host.virt_v2v, option.encode('ascii')], environment, PROBE_PATIENCE)
        words = output.decode('utf-8', 'replace').split()
        LOG.write('INFO', 'virt-v2v {}: status {}: {}', option, status, ' '.join(words))
        return words if status == 0 else None
    capability, messages = capabilities(ask), Pipe()
    for secret in secrets_of(request):
        secret.store()
    arguments = make_arguments(capability, request, host.target.directory, host.libdir,
                               messages.writer)
    return Job(request=request, host=host, capability=capability, arguments=arguments,
               environment=environment, scratch=scratch, output=Pipe(), messages=messages,
               output_log=OutputLog(logs[1]), state=state, paths=paths)


def create_files(undo, lock_text, host):
    """Create both logs and the lock, which holds `lock_text`, under a name that no other job has.

    Returns the StateFile, the descriptors of both logs, and the paths as the caller is told them.
    Raises HostError.
    """
    stem = 'v2v-import-{}-{}'.format(time.strftime('%Y%m%dT%H%M%S', time.gmtime()), os.getpid())
    for name in [stem] + ['{}-{}'.format(stem, number) for number in range(2, 100)]:
        state, logs = StateFile(host.states, name), (name + '-wrapper.log', name + '.log')
        with ExitStack() as made, blaming('logs and state file'):
            try:
                state.claim(lock_text)
                made.callback(state.release)
                descriptors = []
                for log in logs:
                    descriptors.append(create_exclusively(log, 0o640, host.logs.fd))
                    made.callback(remove, log, host.logs.fd)
            except FileExistsError:
                continue
            undo.callback(made.pop_all().close)
            undo.callback(state.discard)        # not before: the state may be another job's
        paths = [os.path.join(host.logs.path, log) for log in logs] + [state.path]
        keys = ('wrapper_log', 'v2v_log', 'state_file')
        return state, descriptors, dict(zip(keys, map(as_text, paths)))
    raise HostError((host.logs.path, 'all names for a job are taken'))


def look_at_source(job, answer):
    """Look at what would be converted, without starting that. Returns what --check tells, a dict.

    Raises HostError with all that is wrong.
    """
    request = job.request
    answer.send('vmware_uri')
    problems = SOURCES[request.transport_method].reach(request)
    answer.send('virt-v2v --print-source')
    if request.ssh_key:
        start_agent(request.ssh_key, job.environment)
    with open(os.path.join(job.scratch, b'output'), 'w+b') as output:
        status, shown = run_program(
            'virt-v2v', [job.host.virt_v2v, b'--print-source'] + job.arguments, job.environment,
            SOURCE_PATIENCE, stderr=output, pass_fds=inherited_by_virt_v2v(job))
        output.seek(0)
        parser, progress = Parser(job.capability.messages), Progress(request.source_disks)
        for event in (parser.messages(job.messages.read()) + parser.output(output.read())
                      + parser.end()):
            progress.apply(event)
    if status != 0:
        said = progress.message() or error_message('virt-v2v ended with status {}'.format(status))
        problems.append(('source', '{}. {}'.format(
            said['message'].rstrip('.'), said.get('hint', '')).rstrip()))
    problems += [('source_disks', 'the guest has no disk {}, but {}'.format(
        path, ', '.join(progress.sources))) for path in request.source_disks
                 if progress.sources and path not in progress.sources]
    if problems:
        raise HostError(*problems)
    # Bridge "VM Network" mac: 00:50:56:82:03:01 [vmxnet3]
    nics = re.findall(r'(?m)^\t(?:Bridge|Network) "(.*)"(?: mac: ([0-9A-Fa-f:]{17}))?',
                      shown.decode('utf-8', 'replace'))
    goes_to = {mac or source: destination
               for source, destination, mac in request.network_mappings}
    return dict(
        vm_name=request.vm_name, disks=progress.sources, warnings=progress.warnings,
        networks=[dict(source=source, mac_address=mac, destination=goes_to.get(
            mac.lower()) or goes_to.get(source) or 'ovirtmgmt') for source, mac in nics],
        target=job.host.target.document(), free_bytes=job.host.target.free_bytes())


def start_monitor(undo, job, answer):
    """Fork the monitor, and wait until virt-v2v is executed. Returns the process ID, and Facts.

    Both are ended by `undo`, an ExitStack. Raises HostError.
    """
    report = Channel()
    with blaming('fork'):
        pid = fork(lambda: monitor(job, report, answer))
    undo.callback(end_descendants)
    os.close(report.writer)
    close_secrets(job.request)
    return pid, Facts(**expect_success(report.receive()))


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
    """Start the job, or check it. Returns what the caller is told, and the guardian's process ID.

    Raises WrapperError; then the job has ended, or ends soon.
    """
    identity = Identity.find()
    directory, problems = None, ()
    try:
        if request.export_domain:
            directory = export_directory(request.export_domain)
    except HostError as error:
        problems = error.problems       # the guardian adds what else is wrong
    identity.become()
    answer = Channel()
    # From here on a signal has to end what was started: it waits for interruptible().
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
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
        told = [('start', 'interrupted by a signal')]
    except TimeoutError:
        told = [(told, 'does not answer')]
    if not isinstance(told, dict):      # it ends, must end, or was killed
        end_guardian(guardian_pid, END_PATIENCE + PRINT_PATIENCE)
    told = expect_success(told)
    if request.ignored:
        told['ignored_keys'] = request.ignored
    return told, guardian_pid


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
JobRow = namedtuple('JobRow', 'guest status percent phase age state_file')


def say(text):
    """Print text for people, who may take their time to read it. Raises HostError."""
    with blaming('standard output'):
        write_all(1, text.encode('utf-8', 'replace') + b'\n')


def measure(state):
    """Return how many percent are copied, and of how many bytes, 0 if that is not known."""
    disks = [disk for disk in state['disks'] if not disk.get('unknown')]
    count = max(len(disks), state.get('disk_count', 0))
    sizes = [disk.get('bytes') or 0 for disk in disks]
    size = sum(sizes) if len(disks) == count and all(number > 0 for number in sizes) else 0
    done = sum(disk['progress'] * (number if size else 1) for disk, number in zip(disks, sizes))
    return min(100, max(0, done / (size or count or 1))), size


class View:
    """A job as seen through its files, which may hold anything."""

    def __init__(self, path):
        """Raises HostError if `path` is not the state file of a job."""
        self.path, self.name = path, _UNPRINTABLE.sub('?', as_text(path))
        self.lock, self.row = os.path.splitext(path)[0] + '.lock', None
        self._samples = deque(maxlen=int(RATE_PERIOD / LOOK_INTERVAL))
        if not path.endswith('.state') or not self.look():
            raise HostError((self.name, 'is not the state file of a job'))

    def look(self):
        """Look again; return the JobRow. A file that is gone or damaged changes only the status."""
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
        if not copying_disk(phase):
            self._samples.clear()       # what comes before the copies tells nothing of their speed
        self._samples.append((time.monotonic(), percent))
        self.row = JobRow(guest, status, percent, phase, age, self.name)

    def news(self):
        """Return what the job does, or how it ended."""
        if self.row.status == 'running':
            return self.row.phase
        failed = self.row.status == 'failed' and self.message
        return 'failed: ' + self.message if failed else self.row.status

    def speed(self):
        """Return time left and rate as texts, both empty if they are unknown."""
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


def show_check(found, as_json):
    """Print what --check has found."""
    if as_json:
        return say(json.dumps(found))
    rows = [('guest', found['vm_name'])] + [('disk', path) for path in found['disks']] + [
        ('network', '{source} {mac_address} goes to {destination}'.format(**network))
        for network in found['networks']] + [
        ('target', '{}, {:.1f} GiB free'.format(', '.join(
            found['target'].values()), found['free_bytes'] / (1 << 30)))] + [
        ('warning', text) for text in found['warnings']] + [
        ('ignored', key) for key in found.get('ignored_keys', ())]
    for name, text in rows:
        say('{:9} {}'.format(name + ':', _UNPRINTABLE.sub('?', text)))


def list_jobs(rows, as_json):
    """Print a table of jobs."""
    if as_json:
        return say(json.dumps([row._asdict() for row in rows]))
    table = [[name.upper().replace('_', ' ') for name in JobRow._fields]] + [
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
        # Nobody knows where a terminal puts its lines when its size changes.
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
        else:
            for view in views:
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
    have its ID; and the lock file was locked by the guardian, or by the monitor if it made it anew.
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
    problems, waiting = [], []
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
    give_up = time.monotonic() + CANCEL_PATIENCE
    while waiting and time.monotonic() < give_up:
        time.sleep(0.1)
        for view in [view for view in waiting if view.look().status != 'running']:
            say('{}: {}'.format(view.name, view.news()))
            waiting.remove(view)
    problems += [(view.name, 'has not ended within {:.0f} s'.format(CANCEL_PATIENCE))
                 for view in waiting]
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
        if gone and view.look().status != 'running':
            return _CODES[view.row.status]
        # If the guardian was killed, the monitor goes on, and is no child of ours.
        info = signal.sigtimedwait(signals, LOOK_INTERVAL if gone else 3600)
        if info and info.si_signo != signal.SIGCHLD:
            kill(guardian_pid, signal.SIGTERM)
            with suppress(HostError):
                tell_to_stop(view)


def look_after_jobs(options):
    """Do what --list, --watch or --cancel asks for. Returns an exit status."""
    if options.watch:
        return watch([View(path) for path in options.watch])
    identity = Identity.find()
    identity.become()
    if options.cancel:
        return cancel(options.cancel)
    directory, views = job_directories(identity, options)[1], []
    if os.path.lexists(directory):
        opened = open_private_directory('--state-dir ' + as_text(directory), directory)
        if options.list:
            end_dead_jobs(opened)
        for name in sorted(os.listdir(opened.fd)):
            if re.fullmatch(_STEM + '[.]state', name):
                with suppress(HostError):       # somebody's file of that name
                    views.append(View(os.path.join(directory, name)))
    if options.list:
        list_jobs([view.row for view in views], options.json)
        return EXIT_STARTED
    views = [view for view in views if view.row.status == 'running']
    if not views:
        say('no job is running')
    return watch(views)


# --- Main: arguments, what is printed, exit status

_USAGE = """\
%(prog)s [OPTION...] [--check | --wait] < request.json
       %(prog)s [OPTION...] --list | --watch [STATE...]
       %(prog)s --cancel STATE...
"""
_DESCRIPTION = """\
Start the conversion of a VMware guest for oVirt with virt-v2v. The request is a
JSON object on standard input. The answer, on standard output, is a JSON object
with the paths of the state file and of two logs; the conversion goes on in the
background. It is over when the state file has the key "finished", and has
failed if it has the key "failed".
"""
_EPILOG = """\
exit status: 0 started, checked or converted; 1 this host cannot do it;
  2 the request or the usage is wrong; 3 failed; 4 cancelled
"""


def _describe_keys():
    """Return what --help says of the keys of a request."""
    import textwrap
    lines = []
    for name, rules in [('every request', _COMMON)] + list(_SOURCE_KEYS.items()) + list(
            _TARGET_KEYS.items()):
        lines += ['', 'keys of {}:'.format(name)] + [
            textwrap.fill(('' if rule.default is _MANDATORY else 'optional: ') + rule.expected, 79,
                          initial_indent='  {:21}'.format(rule.key), subsequent_indent=' ' * 23)
            for rule in rules]
    return '\n'.join(lines)


def _argument_parser():
    import argparse         # costs a tenth of a start, and few have arguments

    def directory(value):
        with blaming('working directory'):
            path = os.path.abspath(value)
        if not value or _UNPRINTABLE.search(as_text(path)):
            raise ValueError
        return path

    class ArgumentParser(argparse.ArgumentParser):
        def error(self, message):
            # It quotes a value at its end, which may be a whole request.
            raise RequestError(('usage', re.split(':? [\'"]', message)[0] + '; see --help'))

    parser = ArgumentParser(prog=PROGRAM + '.py', usage=_USAGE, description=_DESCRIPTION,
                            epilog='{}\n\n{}'.format(_describe_keys(), _EPILOG),
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            allow_abbrev=False)
    parser.add_argument('--version', action='version', version='{} {}'.format(PROGRAM, VERSION))
    for option, purpose in (('log-dir', 'for both logs'), ('state-dir', 'for the state file'),
                            ('vddk-libdir', 'of the VDDK, default ' + VDDK_LIBDIR)):
        parser.add_argument('--' + option, metavar='DIR', type=directory,
                            help='directory ' + purpose)
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument('--check', action='store_true', help='start nothing, but check all, and'
                          ' show what would be converted')
    commands.add_argument('--wait', action='store_true', help='start, and stay until the end;'
                          ' TERM, INT or HUP cancels the job')
    commands.add_argument('--list', action='store_true', help='list the jobs of this user')
    commands.add_argument('--watch', metavar='STATE', nargs='*', help='follow jobs until all have'
                          ' ended; without STATE, those of this user that are running')
    commands.add_argument('--cancel', metavar='STATE', nargs='+', help='end these jobs')
    parser.add_argument('--json', action='store_true', help='with --check or --list: as JSON')
    return parser


def parse_arguments(arguments):
    """Return the Options in `arguments`. Raises WrapperError; --help and --version exit."""
    if not arguments:
        return NO_OPTIONS
    found, unknown = _argument_parser().parse_known_args(arguments)
    if unknown:         # it may be a whole request, too: only names of options are shown
        names = [re.match('--[A-Za-z-]*|-.?', word).group() for word in unknown if word[:1] == '-']
        raise RequestError(('usage', 'unknown option: {}; see --help'.format(', '.join(names))
                            if names else 'the request is no argument; ' + _HOW))
    if found.json and not found.list and not found.check:
        raise RequestError(('usage', '--json goes with --check or --list; see --help'))
    return Options(**vars(found))


def print_line(fd, text):
    """Write `text` and a line end to descriptor `fd`. Raises OSError, also if nobody reads."""
    data = text.encode('utf-8', 'backslashreplace') + b'\n'
    while data:
        if not select.select([], [fd], [], PRINT_PATIENCE)[1]:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        # A pipe that can be written to has room for this much.
        data = data[os.write(fd, data[:select.PIPE_BUF]):]


def main(arguments=None):
    """Do what the command does; return its exit status."""
    try:
        ignored = {number for number in _STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
        shed_inheritance()
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if options.list or options.cancel or options.watch is not None:
            return look_after_jobs(options)
        told, guardian_pid = launch(read_request(0), options)
        if options.check:
            os.waitpid(guardian_pid, 0)         # then nothing is left
            show_check(told, options.json)
            return EXIT_STARTED
        try:
            print_line(1, json.dumps(told))
        except OSError as error:
            end_guardian(guardian_pid, CANCEL_PATIENCE)
            raise HostError(('standard output', os_text(error)),
                            ('standard output', 'the conversion was stopped')) from None
        if options.wait:
            return wait_for_end(told['state_file'], guardian_pid, ignored)
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
