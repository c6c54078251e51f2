"""What virt-v2v is started with, in the words of the version that is there."""
import functools
import json
import os

import pytest

import captures
from blackbox import ABSENT, PASSWORD, valid_request
from results import refusal
from virt_v2v import GENERATIONS
from virt_v2v_wrapper import (
    Capabilities, Identity, capabilities, make_arguments, make_environment, parse_request,
    secrets_of)

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
    features = captures.capabilities(version)
    assert capabilities(answers(True, features)) == Capabilities(
        messages=True, features=frozenset(features), options={'-io', '-ip'})


def test_a_version_with_messages_is_asked_once():
    asked = []

    def ask(option):
        asked.append(option)
        return captures.capabilities('2.2.0')
    capabilities(ask)
    assert asked == ['--machine-readable=fd:1']


def test_an_older_version_is_asked_for_its_options():
    options = ['-io', '-ip', '--vddk-libdir', '--password-file']
    features = captures.capabilities('1.40.2')
    assert capabilities(answers(False, features, options)) == Capabilities(
        messages=False, features=frozenset(features), options=frozenset(options))


# --- arguments ---------------------------------------------------------------------------

FINGERPRINT = ':'.join(['0A'] * 20)
URI = 'esx://root@esx.example.com?no_verify=1'


def made(ask, directory='/export', libdir='/vddk', **overrides):
    """Return the arguments (bytes) for a request that is valid but for the overrides."""
    request = parse_request(json.dumps(valid_request(**overrides)).encode('utf-8'))
    for number, secret in enumerate(secrets_of(request), 7):
        secret.fd = number              # no file is opened
    return make_arguments(capabilities(ask), request, directory, libdir, 5)


def arguments(generation='2.2.0', **overrides):
    """Return the arguments (texts) for this generation."""
    return [argument.decode() for argument in made(stand_in(generation), **overrides)]


@pytest.mark.parametrize('ask', [
    answers(False, captures.capabilities('1.36.13'), ['-i', '--password-file']),
    answers(True, [name for name in captures.capabilities('2.2.0') if name != 'vddk']),
    stand_in('1.36.13')])
def test_a_version_without_vddk_is_refused(ask):
    assert refusal(made, ask) == [NO_VDDK]


@pytest.mark.parametrize('ask', [
    answers(True, [name for name in captures.capabilities('2.10.0')
                   if not name.startswith('output:ovirt')]),
    answers(True, [name for name in captures.capabilities('2.2.0') if name != 'output:rhv']),
    stand_in('RHEL 10'),
    answers(False, None, ['-io']),
    answers(False, [], ['-io'])])
def test_a_version_without_output_to_ovirt_is_refused(ask):
    assert refusal(made, ask) == [NO_OVIRT]


# What a request with no other than the mandatory keys becomes, by the generation of virt-v2v.
LINES = {
    'RHEL 7.5': (
        '-v -x --root first -i libvirt -ic {uri} --password-file /proc/self/fd/7 -it vddk'
        ' --vddk-libdir /vddk --vddk-thumbprint {fingerprint}'
        ' -of raw -o rhv -os /export --bridge ovirtmgmt -- vm'),
    'RHEL 8.0': (
        '-v -x --root first -i libvirt -ic {uri} --password-file /proc/self/fd/7 -it vddk'
        ' -io vddk-libdir=/vddk -io vddk-thumbprint={fingerprint}'
        ' -of raw -o rhv -os /export --bridge ovirtmgmt -- vm'),
    '1.40.2': (
        '-v -x --root first -i libvirt -ic {uri} -ip /proc/self/fd/7 -it vddk'
        ' -io vddk-libdir=/vddk -io vddk-thumbprint={fingerprint}'
        ' -of raw -o rhv -os /export --bridge ovirtmgmt -- vm'),
    '1.44.2': (
        '-v -x --machine-readable=fd:5 --root first -i libvirt -ic {uri} -ip /proc/self/fd/7'
        ' -it vddk -io vddk-libdir=/vddk -io vddk-thumbprint={fingerprint}'
        ' -of raw -o rhv -os /export --bridge ovirtmgmt -- vm'),
}
LINES['2.2.0'] = LINES['2.10.0'] = LINES['1.44.2']
UNFIT = {'1.36.13', 'RHEL 10'}


@pytest.mark.parametrize('generation', sorted(set(GENERATIONS) - UNFIT))
def test_the_arguments_are_those_of_the_version(generation):
    assert arguments(generation) == LINES[generation].format(
        uri=URI, fingerprint=FINGERPRINT).split()


def value_of(option, generation='2.2.0', **overrides):
    """Return what follows an option that is given once, None if it is not given."""
    given = arguments(generation, **overrides)
    assert given.count(option) <= 1
    return given[given.index(option) + 1] if option in given else None


def values_of(option, generation='2.2.0', **overrides):
    """Return what follows an option, each time that it is given."""
    given = arguments(generation, **overrides)
    return [value for name, value in zip(given, given[1:]) if name == option]


UPLOAD = {'export_domain': ABSENT, 'rhv_url': 'https://engine.example.com/ovirt-engine/api',
          'rhv_password': PASSWORD, 'rhv_cluster': 'My Cluster', 'rhv_storage': 'data'}
SSH = {'transport_method': 'ssh', 'vm_name': 'ssh://root@esx.example.com/ds/vm.vmx',
       'vmware_uri': ABSENT, 'vmware_password': ABSENT, 'vmware_fingerprint': ABSENT}


def tail(first, generation, **overrides):
    """Return the arguments from the first of this name on."""
    given = arguments(generation, **overrides)
    return given[given.index(first):]


@pytest.mark.parametrize('generation, name', [
    ('RHEL 8.0', 'rhv-upload'), ('1.40.2', 'rhv-upload'), ('2.2.0', 'rhv-upload'),
    ('2.10.0', 'ovirt-upload')])
def test_an_upload_is_spelt_as_the_version_has_it(generation, name):
    assert tail('-o', generation, **UPLOAD) == [
        '-o', name, '-oc', 'https://engine.example.com/ovirt-engine/api',
        '-op', '/proc/self/fd/8', '-os', 'data', '-oo', 'rhv-cluster=My Cluster',
        '-oo', 'rhv-direct=true', '-oo', 'rhv-verifypeer=true',
        '-oo', 'rhv-cafile=/etc/pki/vdsm/certs/cacert.pem',
        '--bridge', 'ovirtmgmt', '--', 'vm']


def test_the_usual_port_of_an_engine_is_left_out():
    url = 'https://admin@internal@[::1]:{}/ovirt-engine/api'
    assert [values_of('-oc', **dict(UPLOAD, rhv_url=url.format(port)))[0]
            for port in (443, 4443)] == ['https://admin@internal@[::1]/ovirt-engine/api',
                                         url.format(4443)]


@pytest.mark.parametrize('host', ['engine', '[::1]'])
def test_another_port_is_refused_where_it_fails_late(host):
    url = 'https://admin@internal@{}:4443/ovirt-engine/api'.format(host)
    assert refusal(functools.partial(arguments, '2.10.0', **dict(UPLOAD, rhv_url=url))) == [
        'rhv_url: this version of virt-v2v takes no port there but 443']
    url = url.replace(':4443', '')
    assert values_of('-oc', '2.10.0', **dict(UPLOAD, rhv_url=url)) == [url]


def test_an_engine_is_not_verified_if_the_caller_says_so():
    assert values_of('-oo', insecure_connection=True, **UPLOAD) == [
        'rhv-cluster=My Cluster', 'rhv-direct=true', 'rhv-verifypeer=false']


@pytest.mark.parametrize('generation', ['RHEL 7.5', 'RHEL 10'])
def test_a_version_that_cannot_upload_is_refused(generation):
    assert refusal(functools.partial(arguments, generation, **UPLOAD)) == [
        'virt-v2v: this version cannot upload to oVirt (RHEL 10 has no -o rhv-upload)']


@pytest.mark.parametrize('generation', ['1.36.13', 'RHEL 8.0', '2.2.0'])
def test_a_guest_is_read_by_ssh_without_vddk(generation):
    given = arguments(generation, **SSH)
    assert given[given.index('-i'):] == (
        '-i vmx -it ssh -of raw -o rhv -os /export --bridge ovirtmgmt'
        ' -- ssh://root@esx.example.com/ds/vm.vmx').split()


@pytest.mark.parametrize('overrides, option, value', [
    ({'allocation': 'sparse'}, '-oa', 'sparse'),
    ({'allocation': 'preallocated'}, '-oa', 'preallocated'),
    ({}, '-oa', None),
    ({'new_vm_name': '-x y'}, '-on', '-x y'),
    ({}, '-on', None),
    ({'root': 'single'}, '--root', 'single'),
    ({'root': '/dev/sda2'}, '--root', '/dev/sda2')])
def test_what_a_key_becomes(overrides, option, value):
    assert value_of(option, **overrides) == value


def test_the_keys_of_encrypted_devices_are_files():
    assert values_of('--key', luks_keys=[
        {'device': '/dev/sda2', 'key': 'a'}, {'device': '/dev/sdb', 'clevis': True},
        {'device': 'all', 'key': 'b'}]) == [
        '/dev/sda2:file:/proc/self/fd/8', '/dev/sdb:clevis', 'all:file:/proc/self/fd/9']


BY_NAME = {'source': 'VM Network', 'destination': 'ovirtmgmt'}
BY_MAC = {'source': 'DMZ', 'destination': 'dmz:1', 'mac_address': '00:50:56:AB:CD:EF'}


def test_networks_are_mapped_before_all_others():
    assert tail('--bridge', '2.2.0', network_mappings=[BY_NAME, BY_MAC]) == [
        '--bridge', 'VM Network:ovirtmgmt', '--mac', '00:50:56:ab:cd:ef:bridge:dmz:1',
        '--bridge', 'ovirtmgmt', '--', 'vm']


def test_a_version_without_mac_option_maps_by_name_only():
    assert values_of('--bridge', 'RHEL 7.5', network_mappings=[BY_NAME]) == [
        'VM Network:ovirtmgmt', 'ovirtmgmt']
    assert refusal(functools.partial(arguments, 'RHEL 7.5', network_mappings=[BY_MAC])) == [
        'network_mappings: this version of virt-v2v cannot map a network by mac_address']


def test_the_output_format_is_always_given():
    assert value_of('-of', output_format='qcow2') == 'qcow2'


@pytest.mark.promise(7)
@pytest.mark.parametrize('name', [
    '-v', '--help', '--', '-', ' ', 'a b', '"a" \'b\' \\ $c `d`', '\u00dc\u65e5 \U0001f4bf', '*'])
def test_a_name_is_the_last_argument_byte_for_byte(name):
    assert made(stand_in('2.2.0'), vm_name=name)[-2:] == [b'--', name.encode('utf-8')]


@pytest.mark.promise(7)
@pytest.mark.parametrize('directory, data', [
    ('/\u00fc', b'/\xc3\xbc'), ('/\udcff', b'/\xff')])
def test_a_directory_is_passed_on_byte_for_byte(directory, data):
    given = made(stand_in('2.2.0'), directory=directory)
    assert given[given.index(b'-os') + 1] == data


@pytest.mark.promise(7)
def test_a_library_directory_is_passed_on_byte_for_byte():
    assert b'vddk-libdir=/\xc3\xbc' in made(stand_in('2.2.0'), libdir='/\u00fc')


@pytest.mark.promise(1)
def test_the_password_is_no_argument():
    assert PASSWORD not in '\n'.join(arguments())


# --- environment -------------------------------------------------------------------------

IDENTITY = Identity('vdsm', 36, 36, '/home/v\u00fc')
OURS = {
    b'LIBGUESTFS_BACKEND': b'direct', b'PATH': b'/usr/sbin:/usr/bin:/sbin:/bin',
    b'LIBGUESTFS_CACHEDIR': b'/cache', b'LC_ALL': b'C', b'TMPDIR': b'/scratch',
    b'VIRT_V2V_TMPDIR': b'/scratch', b'XDG_RUNTIME_DIR': b'/scratch',
    b'HOME': os.fsencode('/home/v\u00fc'), b'USER': b'vdsm', b'LOGNAME': b'vdsm'}


REQUEST = parse_request(json.dumps(valid_request()).encode())


def environment(request=REQUEST, drivers=None, **inherited):
    """Return what of these variables virt-v2v gets, and the wrapper's own."""
    given = {name.encode(): value.encode() for name, value in inherited.items()}
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


def test_drivers_that_were_found_go_before_the_callers():
    assert environment(drivers=b'/ours', VIRTIO_WIN='theirs') == {**OURS, b'VIRTIO_WIN': b'/ours'}


def ssh_request(**overrides):
    """Return the Request of a guest that is read by ssh."""
    return parse_request(json.dumps(valid_request(**dict(SSH, **overrides))).encode())


def test_the_callers_agent_is_only_for_ssh():
    assert environment(SSH_AUTH_SOCK='/theirs') == OURS
    assert environment(ssh_request(), SSH_AUTH_SOCK='/theirs') == {
        **OURS, b'SSH_AUTH_SOCK': b'/theirs'}
    assert environment(ssh_request()) == OURS


def test_a_job_with_a_key_has_an_agent_of_its_own():
    key = '-----BEGIN OPENSSH PRIVATE KEY-----\nb3\n-----END OPENSSH PRIVATE KEY-----\n'
    assert environment(ssh_request(ssh_key=key), SSH_AUTH_SOCK='/theirs') == {
        **OURS, b'SSH_AUTH_SOCK': b'/scratch/agent'}


def test_the_callers_environment_is_left_alone():
    inherited = {b'PATH': b'/bin', b'HOME': b'/root'}
    make_environment(inherited, REQUEST, IDENTITY, None, b'/scratch', b'/cache')
    assert inherited == {b'PATH': b'/bin', b'HOME': b'/root'}
