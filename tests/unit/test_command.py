"""What virt-v2v is started with, in the words of the version that is there."""
import functools
import json
import os
import re

import pytest

import captures
from blackbox import PASSWORD, valid_request
from results import refusal
from virt_v2v import GENERATIONS
from virt_v2v_wrapper import (
    Capabilities, Identity, capabilities, make_arguments, make_environment, parse_request,
    secrets_of)

OVIRT = {'output:rhv', 'output:rhv-upload', 'mac-option', 'vddk'}


def knows(messages, *options):
    """Return what a virt-v2v with these options tells of itself."""
    return Capabilities(messages, frozenset(OVIRT), frozenset(options))


MODERN = knows(True, '-io', '-ip')
FOCAL = knows(False, '-io', '-ip', '--vddk-libdir', '--password-file')
RHEL_8_0 = knows(False, '-io', '--vddk-libdir', '--password-file')
RHEL_7_5 = knows(False, '--vddk-libdir', '--password-file')
NO_OVIRT = ('virt-v2v: this version cannot write to an oVirt export domain'
            ' (RHEL 10 has no -o rhv)')
NO_UPLOAD = 'virt-v2v: this version cannot upload to oVirt (RHEL 10 has no -o rhv-upload)'
NO_VDDK = 'virt-v2v: this version cannot read disks with VDDK'
NO_MAC = 'network_mappings: this version of virt-v2v cannot map a network by mac_address'


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
def test_a_version_with_messages_is_asked_once(version):
    asked = []

    def ask(option):
        asked.append(option)
        return captures.capabilities(version)
    found = capabilities(ask)
    assert asked == ['--machine-readable=fd:1']
    assert found.messages and found.options == {'-io', '-ip'}


def test_a_version_without_messages_is_asked_for_its_options():
    options = ['-io', '-ip', '--vddk-libdir', '--password-file']
    found = capabilities(answers(False, captures.capabilities('1.40.2'), options))
    assert found == (False, set(captures.capabilities('1.40.2')), set(options))


def test_a_version_that_answers_nothing_knows_nothing():
    assert capabilities(answers(False, None)) == (False, set(), set())


# --- arguments ---------------------------------------------------------------------------

FINGERPRINT = ':'.join(['0A'] * 20)
URI = 'esx://root@esx.example.com?no_verify=1'


def arguments(capability=MODERN, directory='/export', libdir='/vddk', **overrides):
    """Return the arguments for a request that is valid but for the overrides.

    A path in /proc/self/fd is replaced by what is to be read there.
    """
    request = parse_request(json.dumps(valid_request(**overrides)).encode('utf-8'))
    files = {}
    for secret in secrets_of(request):
        secret.store()
        files[secret.path.encode('ascii')] = b'(%s)' % secret.read().encode('utf-8')
    given = make_arguments(capability, request, directory, libdir, 8)
    for secret in secrets_of(request):
        secret.close()
    return [re.sub(rb'/proc/self/fd/[0-9]+', lambda match: files[match.group()], argument)
            for argument in given]


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
        '--root', 'first', '-i', 'libvirt', '-ic', URI, password, '(%s)' % PASSWORD, '-it', 'vddk',
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
    request = parse_request(json.dumps(valid_request()).encode('utf-8'))
    request.vmware_password.store()
    given = make_arguments(MODERN, request, '/export', '/vddk', 8)
    request.vmware_password.close()
    assert PASSWORD.encode() not in b'\n'.join(given)


@pytest.mark.parametrize('generation', [
    'RHEL 7.5', 'RHEL 8.0', '1.40.2', '1.44.2', '2.2.0', '2.10.0'])
def test_each_generation_is_given_only_what_it_knows(generation):
    capability = capabilities(stand_in(generation))
    known = set(GENERATIONS[generation].options) | {'--', '-io', '-ip'} & capability.options
    given = [word.decode().partition('=')[0] for word in arguments(capability)]
    assert {word for word in given if word.startswith('-')} <= known | {'--', '--machine-readable'}


@pytest.mark.parametrize('capability', [
    capabilities(answers(False, captures.capabilities('1.36.13'), ['-i', '--password-file'])),
    MODERN._replace(features=frozenset(OVIRT - {'vddk'})),
    capabilities(stand_in('1.36.13'))])
def test_a_version_without_vddk_is_refused(capability):
    assert refusal(arguments, capability) == [NO_VDDK]


@pytest.mark.parametrize('generation', ['RHEL 10'])
def test_a_version_without_output_to_ovirt_is_refused(generation):
    capability = capabilities(stand_in(generation))
    assert refusal(arguments, capability) == [NO_OVIRT]
    assert refusal(functools.partial(arguments, **UPLOAD), capability) == [NO_UPLOAD]


# --- what a request may ask for ----------------------------------------------------------

UPLOAD = {
    'export_domain': None, 'rhv_url': 'https://engine.example.com/ovirt-engine/api',
    'rhv_password': 'pass word', 'rhv_cluster': 'Default', 'rhv_storage': 'data-1'}


def between(given, first, last):
    """Return the arguments from the first of a value on, up to another."""
    words = [word.decode() for word in given]
    return words[words.index(first):words.index(last)]


@pytest.mark.parametrize('feature, output', [
    ('output:rhv-upload', 'rhv-upload'), ('output:ovirt-upload', 'ovirt-upload')])
def test_an_upload_goes_to_the_engine(feature, output):
    given = arguments(MODERN._replace(features=frozenset(['vddk', feature])), **UPLOAD)
    assert between(given, '-o', '--bridge') == [
        '-o', output, '-oc', UPLOAD['rhv_url'], '-op', '(pass word)', '-os', 'data-1',
        '-oo', 'rhv-cluster=Default', '-oo', 'rhv-direct=true', '-oo', 'rhv-verifypeer=true',
        '-oo', 'rhv-cafile=/etc/pki/vdsm/certs/cacert.pem']


def test_an_insecure_upload_verifies_nobody():
    given = arguments(insecure_connection=True, rhv_cafile='/ca.pem', **UPLOAD)
    assert between(given, '-oo', '--bridge')[-2:] == ['-oo', 'rhv-verifypeer=false']


def test_networks_are_mapped_before_the_rest_goes_to_ovirtmgmt():
    given = arguments(network_mappings=[
        {'source': 'VM Network', 'destination': 'red: 1'},
        {'source': 'x', 'destination': 'blue', 'mac_address': '00:50:56:AB:CD:EF', 'more': 1}])
    assert between(given, '--bridge', '--') == [
        '--bridge', 'VM Network:red: 1', '--mac', '00:50:56:ab:cd:ef:bridge:blue',
        '--bridge', 'ovirtmgmt']


def test_a_version_without_mac_option_refuses_a_mac_address():
    mapping = {'source': 'x', 'destination': 'y', 'mac_address': '00:50:56:ab:cd:ef'}
    old = MODERN._replace(features=frozenset(OVIRT - {'mac-option'}))
    assert refusal(functools.partial(arguments, network_mappings=[mapping]), old) == [NO_MAC]


@pytest.mark.parametrize('overrides, expected', [
    ({'allocation': 'sparse'}, ['-oa', 'sparse']),
    ({'allocation': 'preallocated'}, ['-oa', 'preallocated']),
    ({'new_vm_name': '-x y'}, ['-on', '-x y']),
    ({'luks_keys': [{'device': 'all', 'key': 'k'}, {'device': '/dev/sda2', 'clevis': True}]},
     ['--key', 'all:file:(k)', '--key', '/dev/sda2:clevis']),
    ({'root': 'single'}, ['--root', 'single']),
    ({'root': '/dev/sda2'}, ['--root', '/dev/sda2'])])
def test_each_key_becomes_its_option(overrides, expected):
    given = [word.decode() for word in arguments(**overrides)]
    start = given.index(expected[0])
    assert given[start:start + len(expected)] == expected


def test_a_guest_is_read_by_ssh():
    given = arguments(transport_method='ssh', vm_name='ssh://root@esx/vmfs/volumes/ds/vm/vm.vmx')
    assert between(given, '-i', '-of') == ['-i', 'vmx', '-it', 'ssh']
    assert given[-1] == b'ssh://root@esx/vmfs/volumes/ds/vm/vm.vmx'


# --- environment -------------------------------------------------------------------------

IDENTITY = Identity('vdsm', 36, 36, '/home/v\u00fc')
OURS = {
    b'LIBGUESTFS_BACKEND': b'direct', b'PATH': b'/usr/sbin:/usr/bin:/sbin:/bin',
    b'LIBGUESTFS_CACHEDIR': b'/cache', b'LC_ALL': b'C', b'TMPDIR': b'/scratch',
    b'VIRT_V2V_TMPDIR': b'/scratch', b'XDG_RUNTIME_DIR': b'/scratch',
    b'HOME': os.fsencode('/home/v\u00fc'), b'USER': b'vdsm', b'LOGNAME': b'vdsm'}


SSH = {'transport_method': 'ssh', 'vm_name': 'ssh://root@esx/vmfs/volumes/ds/vm/vm.vmx'}
KEY = '-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n'


def environment(request=None, drivers=None, **inherited):
    """Return what of these variables virt-v2v gets, and the wrapper's own."""
    given = {name.encode(): value.encode() for name, value in inherited.items()}
    request = parse_request(json.dumps(valid_request(**request or {})).encode('utf-8'))
    return make_environment(given, request, IDENTITY, drivers, b'/scratch', b'/cache')


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
    request = parse_request(json.dumps(valid_request()).encode('utf-8'))
    make_environment(inherited, request, IDENTITY, b'/drivers', b'/scratch', b'/cache')
    assert inherited == {b'PATH': b'/bin', b'HOME': b'/root'}


def test_drivers_that_were_found_replace_the_caller_s():
    assert environment(drivers=b'/iso', VIRTIO_WIN='theirs')[b'VIRTIO_WIN'] == b'/iso'


@pytest.mark.parametrize('more, expected', [
    ({}, b'/theirs'), ({'ssh_key': KEY}, b'/scratch/agent')])
def test_ssh_asks_the_agent_of_the_job_or_of_the_caller(more, expected):
    given = environment(request=dict(SSH, **more), SSH_AUTH_SOCK='/theirs')
    assert given[b'SSH_AUTH_SOCK'] == expected
