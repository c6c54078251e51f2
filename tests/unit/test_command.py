"""What virt-v2v is started with, in the words of the version that is there."""
import json
import os

import pytest

import captures
from blackbox import PASSWORD, valid_request
from results import refusal
from virt_v2v import GENERATIONS
from virt_v2v_wrapper import (
    Capabilities, Identity, capabilities, make_arguments, make_environment, parse_request)

MODERN = Capabilities(messages=True, io_option=True, password_option='-ip')
FOCAL = Capabilities(messages=False, io_option=True, password_option='-ip')
RHEL_8_0 = Capabilities(messages=False, io_option=True, password_option='--password-file')
RHEL_7_5 = Capabilities(messages=False, io_option=False, password_option='--password-file')
NO_OVIRT = ('virt-v2v: this version cannot write to an oVirt export domain'
            ' (RHEL 10 has no -o rhv)')
NO_VDDK = 'virt-v2v: this version cannot read disks with VDDK'


# --- what there is -----------------------------------------------------------------------

def answers(json_messages, features, options=()):
    """Return a function that answers as a virt-v2v does; None is a refusal."""
    table = {
        '--machine-readable=fd:1': features if json_messages else None,
        '--machine-readable': features,
        '--short-options': [name for name in options if not name.startswith('--')],
        '--long-options': [name for name in options if name.startswith('--')],
    }
    return table.get


def stand_in(generation):
    """Return answers as that generation gives them, according to virt_v2v.py."""
    known = GENERATIONS[generation]
    return answers(known.json, known.capabilities, known.options)


@pytest.mark.parametrize('version', ['2.2.0', '2.6.0', '2.10.0'])
def test_a_version_with_messages_knows_all_new_options(version):
    assert capabilities(answers(True, captures.capabilities(version))) == MODERN


def test_a_version_with_messages_is_asked_once():
    asked = []

    def ask(option):
        asked.append(option)
        return captures.capabilities('2.2.0')
    capabilities(ask)
    assert asked == ['--machine-readable=fd:1']


def test_1_40_has_the_new_options_but_no_messages():
    options = ['-io', '-ip', '--vddk-libdir', '--password-file']
    assert capabilities(answers(False, captures.capabilities('1.40.2'), options)) == FOCAL


@pytest.mark.parametrize('generation, expected', [
    ('RHEL 7.5', RHEL_7_5), ('RHEL 8.0', RHEL_8_0), ('1.40.2', FOCAL), ('1.44.2', MODERN),
    ('2.2.0', MODERN), ('2.10.0', MODERN)])
def test_each_generation_has_its_spelling(generation, expected):
    assert capabilities(stand_in(generation)) == expected


@pytest.mark.parametrize('ask', [
    answers(False, captures.capabilities('1.36.13'), ['-i', '--password-file']),
    answers(True, [name for name in captures.capabilities('2.2.0') if name != 'vddk']),
    stand_in('1.36.13')])
def test_a_version_without_vddk_is_refused(ask):
    assert refusal(capabilities, ask) == [NO_VDDK]


@pytest.mark.parametrize('ask', [
    answers(True, [name for name in captures.capabilities('2.10.0')
                   if not name.startswith('output:ovirt')]),
    answers(True, [name for name in captures.capabilities('2.2.0') if name != 'output:rhv']),
    stand_in('RHEL 10'),
    answers(False, None),
    answers(False, [])])
def test_a_version_without_output_to_ovirt_is_refused(ask):
    assert refusal(capabilities, ask) == [NO_OVIRT]


# --- arguments ---------------------------------------------------------------------------

FINGERPRINT = ':'.join(['0A'] * 20)
URI = 'esx://root@esx.example.com?no_verify=1'


def arguments(capability=MODERN, directory='/export', libdir='/vddk', **overrides):
    """Return the arguments for a request that is valid but for the overrides."""
    request = parse_request(json.dumps(valid_request(**overrides)).encode('utf-8'))
    return make_arguments(capability, request, directory, libdir, 7, 8)


@pytest.mark.parametrize('capability, before, password, vddk', [
    (MODERN, ['--machine-readable=fd:8'], '-ip',
     ['-io', 'vddk-libdir=/vddk', '-io', 'vddk-thumbprint=' + FINGERPRINT]),
    (FOCAL, [], '-ip',
     ['-io', 'vddk-libdir=/vddk', '-io', 'vddk-thumbprint=' + FINGERPRINT]),
    (RHEL_8_0, [], '--password-file',
     ['-io', 'vddk-libdir=/vddk', '-io', 'vddk-thumbprint=' + FINGERPRINT]),
    (RHEL_7_5, [], '--password-file',
     ['--vddk-libdir', '/vddk', '--vddk-thumbprint', FINGERPRINT]),
])
def test_the_arguments_are_those_of_the_version(capability, before, password, vddk):
    expected = ['-v', '-x'] + before + [
        '--root', 'first', '-i', 'libvirt', '-ic', URI, password, '/proc/self/fd/7', '-it', 'vddk',
    ] + vddk + ['-of', 'raw', '-o', 'rhv', '-os', '/export', '--bridge', 'ovirtmgmt', '--', 'vm']
    assert [argument.decode() for argument in arguments(capability)] == expected


def test_the_output_format_is_always_given():
    given = arguments(output_format='qcow2')
    assert given[given.index(b'-of') + 1] == b'qcow2'


@pytest.mark.promise(7)
@pytest.mark.parametrize('name', [
    '-v', '--help', '--', '-', ' ', 'a b', '"a" \'b\' \\ $c `d`', '\u00dc\u65e5 \U0001f4bf', '*'])
def test_a_name_is_the_last_argument_byte_for_byte(name):
    assert arguments(vm_name=name)[-2:] == [b'--', name.encode('utf-8')]


@pytest.mark.promise(7)
@pytest.mark.parametrize('directory, data', [
    ('/\u00fc', b'/\xc3\xbc'), ('/\udcff', b'/\xff')])
def test_a_directory_is_passed_on_byte_for_byte(directory, data):
    given = arguments(directory=directory)
    assert given[given.index(b'-os') + 1] == data


@pytest.mark.promise(7)
def test_a_library_directory_is_passed_on_byte_for_byte():
    assert b'vddk-libdir=/\xc3\xbc' in arguments(libdir='/\u00fc')


@pytest.mark.promise(1)
def test_the_password_is_no_argument():
    assert PASSWORD.encode() not in b'\n'.join(arguments())


# --- environment -------------------------------------------------------------------------

IDENTITY = Identity('vdsm', 36, 36, '/home/v\u00fc')
OURS = {
    b'LIBGUESTFS_BACKEND': b'direct', b'PATH': b'/usr/sbin:/usr/bin:/sbin:/bin',
    b'LIBGUESTFS_CACHEDIR': b'/cache', b'LC_ALL': b'C', b'TMPDIR': b'/scratch',
    b'VIRT_V2V_TMPDIR': b'/scratch', b'XDG_RUNTIME_DIR': b'/scratch',
    b'HOME': os.fsencode('/home/v\u00fc'), b'USER': b'vdsm', b'LOGNAME': b'vdsm'}


def environment(**inherited):
    """Return what of these variables virt-v2v gets, and the wrapper's own."""
    given = {name.encode(): value.encode() for name, value in inherited.items()}
    return make_environment(given, IDENTITY, b'/scratch', b'/cache')


def test_an_empty_environment_is_completed():
    assert environment() == OURS


@pytest.mark.parametrize('name', [
    'PATH', 'LIBGUESTFS_BACKEND', 'LIBGUESTFS_BACKEND_SETTINGS', 'LIBGUESTFS_CACHEDIR',
    'LIBGUESTFS_PATH', 'VIRTIO_WIN', 'http_proxy', 'https_proxy', 'ftp_proxy', 'all_proxy',
    'no_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'FTP_PROXY', 'ALL_PROXY', 'NO_PROXY'])
def test_what_is_on_the_list_is_passed_on(name):
    expected = dict(OURS)
    expected[name.encode()] = b'theirs'
    assert environment(**{name: 'theirs'}) == expected


@pytest.mark.parametrize('name', [
    'LANG', 'LANGUAGE', 'LC_MESSAGES', 'TERM', 'DISPLAY', 'LD_PRELOAD', 'LD_LIBRARY_PATH',
    'PYTHONPATH', 'SUDO_USER', 'SSH_AUTH_SOCK', 'OLDPATH', 'XPATH', 'PATHS', 'XLIBGUESTFS_A',
    'LIBGUESTFS', 'VIRTIO_WIN_X', 'http_proxy_x', 'Http_Proxy', 'VIRT_TOOLS_DATA_DIR', 'path'])
def test_what_is_not_on_the_list_is_not_passed_on(name):
    assert environment(**{name: 'theirs'}) == OURS


@pytest.mark.parametrize('name', [
    'LC_ALL', 'TMPDIR', 'VIRT_V2V_TMPDIR', 'XDG_RUNTIME_DIR', 'HOME', 'USER', 'LOGNAME'])
def test_what_the_wrapper_decides_is_not_overridden(name):
    assert environment(**{name: 'theirs'}) == OURS


def test_the_callers_environment_is_left_alone():
    inherited = {b'PATH': b'/bin', b'HOME': b'/root'}
    make_environment(inherited, IDENTITY, b'/scratch', b'/cache')
    assert inherited == {b'PATH': b'/bin', b'HOME': b'/root'}
