"""The request: what is accepted, and the whole text of every refusal."""
import gc
import json
import os
import pickle
import re
import stat

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blackbox import ABSENT, PASSWORD, valid_request
from results import refusal
from schemas import VALIDATORS, violations
from virt_v2v import DISKS
from virt_v2v_wrapper import RequestError, parse_request, read_request

pytestmark = pytest.mark.promise(7)

SHA1 = ':'.join(['0A'] * 20)
SHA256 = ':'.join(['F7'] * 32)
NAME = 'a non-empty string of at most 4096 bytes without control characters'
EXPECTED = {
    'vm_name': NAME,
    'vmware_uri': 'a libvirt URI esx://USER@HOST... or vpx://USER@HOST... without a password',
    'vmware_password': 'a non-empty string without NUL or line ends',
    'vmware_password_file': 'an absolute path',
    'vmware_fingerprint': '20 or 32 colon-separated pairs of hex digits',
    'transport_method': '"vddk" or "ssh"',
    'output_format': '"raw" or "qcow2"',
    'source_disks': 'a list of different non-empty strings',
    'network_mappings': (
        'a list of {"source": NAME without ":", "destination": NAME, "mac_address": optional},'
        ' each source or address once'),
    'allocation': '"sparse" or "preallocated"',
    'install_drivers': 'true or false',
    'virtio_win': 'the absolute path of an ISO image or a directory',
    'luks_keys': (
        'a list of {"device": "all" or "/dev/...", "key": PASSPHRASE, or "clevis": true}'),
    'root': '"first", "single" or "/dev/..."',
    'new_vm_name': NAME,
    'export_domain': 'HOST:/PATH or an absolute directory, without blanks or control characters',
}
MANDATORY = ['export_domain', 'transport_method', 'vm_name', 'vmware_fingerprint',
             'vmware_password', 'vmware_uri']
# The keys of a request whose guest is read by ssh, or which is uploaded.
OTHERS = {
    'vm_name': 'ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx',
    'ssh_key': 'the text of a private key that needs no passphrase',
    'rhv_url': 'https://[USER@]HOST[:PORT]/ovirt-engine/api without a password',
    'rhv_password': 'a non-empty string without NUL, line ends, or white space at its end',
    'rhv_cluster': 'the name of a cluster',
    'rhv_storage': 'the name of a storage domain: letters, digits, "_" and "-"',
    'rhv_cafile': 'an absolute path',
    'insecure_connection': 'true or false',
}
VALUES = {'true or false': [True, False], 'a number': [0, 7, 1.5], 'a string': ['', 'x', 'true'],
          'a list': [[], ['x']], 'an object': [{}, {'x': 'y'}]}


def encoded(document):
    return json.dumps(document).encode('utf-8')


# What is refused, and no schema can tell.
UNTOLD = [
    # It counts characters, not bytes.
    {'vm_name': '\u00e9' * 2049},
    # It compares whole items of a list.
    {'network_mappings': [{'source': 'a', 'destination': 'b'},
                          {'source': 'a', 'destination': 'c'}]},
]


def told(document):
    """Say if the schema refuses a request; None where that cannot be told."""
    # What a pattern makes of halves of surrogate pairs is a matter of its implementation.
    halves = re.search('[\ud800-\udfff]', json.dumps(document, ensure_ascii=False))
    return violations('request', document) != [] if VALIDATORS and not halves else None


def parsed(**overrides):
    """Return the Request in a request that is valid, to the schema too, but for the overrides."""
    request = valid_request(**overrides)
    assert not told(request)
    return parse_request(encoded(request))


def problems(data):
    """Return the texts of all problems in a request (bytes, or overrides of a valid one)."""
    if not isinstance(data, bytes):
        request = valid_request(**data)
        assert told(request) in (None, data not in UNTOLD)
        data = encoded(request)
    return refusal(parse_request, data, error=RequestError)


def content(request):
    """Return what is in the file that virt-v2v reads the password from."""
    request.vmware_password.store()
    with open(request.vmware_password.path, 'rb') as stream:
        return stream.read()


# --- what is accepted --------------------------------------------------------------------

@pytest.mark.parametrize('key, value', [
    ('vm_name', 'vm'),
    ('vm_name', '-v'),
    ('vm_name', '--help'),
    ('vm_name', ' '),
    ('vm_name', 'my vm (1)'),
    ('vm_name', 'it\'s "quoted" $HOME `id` \\'),
    ('vm_name', '\u00dcbung \u65e5\u672c \U0001f4bf'),
    ('vm_name', 'x' * 4096),
    ('output_format', 'raw'),
    ('output_format', 'qcow2'),
    ('transport_method', 'vddk'),
    ('vmware_uri', 'esx://root@esx.example.com'),
    ('vmware_uri', 'esx://root@esx.example.com/'),
    ('vmware_uri', 'esx://root@esx.example.com:8443/?no_verify=1'),
    ('vmware_uri', 'esx://root@esx.example.com?no_verify=1'),
    ('vmware_uri', 'esx://root@10.0.0.1?no_verify=1'),
    ('vmware_uri', 'esx://root@[2001:db8::1]/?no_verify=1'),
    ('vmware_uri', 'esx://root@[::1]:443'),
    ('vmware_uri', 'vpx://administrator%40vsphere.local@vc/DC/cluster/esx1?no_verify=1'),
    ('vmware_uri', 'vpx://root@vc/R&D.(1)/esx1?no_verify=0'),
    ('vmware_uri', 'vpx://root@vc/DC/2001:db8::10'),
    ('vmware_uri', 'vpx://root@vc/DC/esx1:443'),
    ('vmware_uri', 'vpx://root@[2001:db8::1]:8443/Folder/DC/cluster/esx1/?no_verify=1'),
    ('vmware_uri', 'esx://root@esx.example.com/?proxy=socks5://user@proxy.example.com:1080'),
    ('vmware_uri', 'vpx://DOMAIN%5cuser@vc.example.com/Folder/Data%20Center/10.0.0.2'),
    ('vmware_uri', 'esx://a-b_c.d~e@h?proxy=socks5://proxy.example.com:1080'),
    ('vmware_fingerprint', SHA1),
    ('vmware_fingerprint', SHA256),
    ('export_domain', '/dir'),
    ('export_domain', '/rhev/data-center/mnt/h:_p'),
    ('export_domain', 'host:/path'),
    ('export_domain', 'nfs.example.com:/a/b'),
    ('export_domain', '10.0.0.1:/'),
    ('export_domain', '[::1]:/p'),
    ('export_domain', '[fe80::1%eth0]:/p'),
    ('export_domain', 'host:/\u00fc'),
])
def test_a_value_is_accepted_as_it_is(key, value):
    assert getattr(parsed(**{key: value}), key) == value


@pytest.mark.parametrize('password', [
    'p', ' ', '-x', '\t', '\u00fc\u20ac', 'x' * 100000, '"\\/\'$`', '\x01\x7f'])
def test_a_password_is_passed_on_byte_for_byte(password):
    assert content(parsed(vmware_password=password)) == password.encode('utf-8')


@pytest.mark.promise(1)
def test_a_password_is_forgotten_when_it_is_in_its_file():
    request = parsed()
    content(request)
    assert PASSWORD not in str(gc.get_referents(request.vmware_password))


@pytest.mark.promise(1)
@pytest.mark.parametrize('offered', [True, False])
def test_the_file_of_a_password_is_only_for_its_user_to_read(monkeypatch, offered):
    if not offered:                     # before Python 3.8, or where a system lacks it
        monkeypatch.delattr(os, 'memfd_create', raising=False)
    password = parsed().vmware_password
    password.store()
    status = os.fstat(password.fd)
    password.close()
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o400, 0)


@pytest.mark.parametrize('disks', [[], DISKS, DISKS[::-1], ['\u00fc'], ['[ds] a', '[ds] A']])
def test_source_disks_keep_their_order_and_spelling(disks):
    assert parsed(source_disks=disks).source_disks == tuple(disks)


@pytest.mark.parametrize('fingerprint', [SHA1, SHA256])
def test_a_fingerprint_is_passed_on_in_upper_case(fingerprint):
    assert parsed(vmware_fingerprint=fingerprint.lower()).vmware_fingerprint == fingerprint


@pytest.mark.parametrize('absent', [ABSENT, None])
@pytest.mark.parametrize('key, default', [('output_format', 'raw'), ('source_disks', ())])
def test_an_optional_key_has_a_default(key, default, absent):
    assert getattr(parsed(**{key: absent}), key) == default


def test_unknown_keys_are_named_and_otherwise_ignored():
    extra = {'z_new': 1, 'a_new': {'b': [None, True, 1.5]}}
    assert parsed(**extra)._replace(ignored=(), vmware_password='') == parsed()._replace(
        vmware_password='')
    assert parsed(**extra).ignored == ('a_new', 'z_new')


def test_a_request_of_the_greatest_length_is_accepted():
    data = encoded(valid_request())
    assert parse_request(data.ljust(1 << 20)).vm_name == 'vm'


def test_null_beside_a_password_is_no_password_file():
    assert parsed(vmware_password_file=None).vmware_password_file is None


def test_a_password_is_not_in_the_repr_of_a_request():
    assert PASSWORD not in repr(parsed()) + str(parsed()) + '{}'.format(parsed())


def test_a_password_cannot_be_pickled():
    with pytest.raises(TypeError, match='^a secret is not to be stored'):
        pickle.dumps(parsed())


# --- what is refused: values -------------------------------------------------------------

@pytest.mark.parametrize('absent', [ABSENT, None])
@pytest.mark.parametrize('key', MANDATORY)
def test_a_mandatory_key_has_to_be_there(key, absent):
    assert problems({key: absent}) == ['{}: missing, expected {}'.format(key, EXPECTED[key])]


CONTROL = ['\0', '\n', '\r', '\t', '\x1b[31m', '\x7f', '\x85', '\x9b', '\u2028', '\u202e', '\u2066',
           '\ud800', '\udfff']


@pytest.mark.parametrize('key, value', [
    ('vm_name', ''),
    ('vm_name', 'x' * 4097),
    ('vm_name', '\u00e9' * 2049),       # two bytes each
    ('output_format', ''),
    ('output_format', 'RAW'),
    ('output_format', 'vmdk'),
    ('transport_method', ''),
    ('transport_method', 'VDDK'),
    ('transport_method', 'SSH'),
    ('vmware_uri', 'esx://root%3Apw@host'),
    ('vmware_uri', 'esx://root%3apw@host'),
    ('vmware_uri', 'esx://%3a@host'),
    ('vmware_uri', 'esx://root@'),
    ('vmware_uri', 'esx://root@/path'),
    ('vmware_uri', 'esx://root@?no_verify=1'),
    ('vmware_uri', 'esx://root@-host'),
    ('vmware_uri', 'esx://root@host:'),
    ('vmware_uri', 'esx://root@host:x'),
    ('vmware_uri', 'esx://root@[::1'),
    ('vmware_uri', 'esx://root@::1'),
    ('vmware_uri', 'esx://root@host#fragment'),
    ('vmware_uri', 'esx://root@host/' + 'x' * 4096),
    ('vmware_password', ''),
    ('vmware_password', 'a\0'),
    ('vmware_password', '\ud800'),
    ('vmware_fingerprint', ''),
    ('vmware_fingerprint', SHA1.replace(':', '')),
    ('vmware_fingerprint', SHA1.replace(':', '-')),
    ('vmware_fingerprint', SHA1 + ':'),
    ('vmware_fingerprint', 'G' + SHA1[1:]),
    ('vmware_fingerprint', '\u0660' + SHA1[1:]),
    ('export_domain', ''),
    ('export_domain', '-o x:/y'),
    ('export_domain', '-ox:/y'),
    ('export_domain', '-host:/path'),
    ('export_domain', '-/path'),
    ('export_domain', 'relative'),
    ('export_domain', './relative'),
    ('export_domain', '~/x'),
    ('export_domain', 'host'),
    ('export_domain', 'host:path'),
    ('export_domain', ':/path'),
    ('export_domain', '::1:/path'),
    ('export_domain', '[::1:/path'),
    ('export_domain', '[-x]:/path'),
    ('export_domain', '/with blank'),
    ('export_domain', 'host:/with blank'),
    ('export_domain', '/no\u00a0break'),
    ('export_domain', '/' + 'x' * 4096),
    ('source_disks', ['']),
    ('source_disks', [None]),
    ('source_disks', [7]),
    ('source_disks', [['x']]),
    ('source_disks', [{}]),
    ('source_disks', ['a', True]),
    ('source_disks', ['x' * 4097]),
    ('vmware_uri', 'esx://a\nb@host'),
    ('vmware_uri', 'esx://a@host/\tb'),
] + [(key, 'a' + text + 'b') for key in ('vm_name', 'export_domain') for text in CONTROL] + [
    ('source_disks', ['[ds] ' + text + 'b']) for text in CONTROL],
    ids=lambda value: ascii(value)[:60])
def test_a_wrong_value_is_refused_by_a_text_that_names_the_key(key, value):
    assert problems({key: value}) == ['{}: expected {}'.format(key, EXPECTED[key])]


PAIRS = 'expected 20 or 32 colon-separated pairs of hex digits, found {} pairs'
AROUND = 'has white space around it'
LINE_END = 'has a line end; leave that out'
KIND = 'has to begin with esx:// or vpx://'
USER = 'needs a user: esx://USER@HOST or vpx://USER@HOST'
HAS_PASSWORD = 'has a password; give that as vmware_password'
AT = 'an "@" in the user has to be written %40'
BLANK = 'a blank has to be written %20'
ASCII = 'what is not ASCII has to be percent-encoded'
PORT = 'a port has to follow the server: USER@HOST:PORT'
NO_VERIFY = 'no_verify is 0 or 1'
VPX = 'vpx needs /DATACENTER/HOST or /DATACENTER/CLUSTER/HOST after the server'


@pytest.mark.parametrize('key, value, text', [('vmware_uri', value, text) for value, text in [
    ('', KIND),
    ('esx.example.com', KIND),
    ('qemu:///system', KIND),
    ('qemu+ext:///system?command=/tmp/x', KIND),
    ('esx+ext://root@host/?command=/tmp/x', KIND),
    ('ESX://root@host', KIND),
    ('gsx://root@host', KIND),
    ('xesx://root@host', KIND),
    ('-esx://root@host', KIND),
    ('a\nesx://root@host', KIND),
    (' esx://root@host', AROUND),
    ('esx://root@host ', AROUND),
    ('esx://root@host\n', AROUND),
    ('esx://root@host\r\n', AROUND),
    ('esx://root:pw@host', HAS_PASSWORD),
    ('esx://root:1234@host', HAS_PASSWORD),
    ('esx://root:p@w@host', HAS_PASSWORD),
    ('esx://root:p/w@host', HAS_PASSWORD),
    ('esx://root:p?w@host', HAS_PASSWORD),
    ('esx://root:@host', HAS_PASSWORD),
    ('esx://host', USER),
    ('esx://host:443/a@b', USER),
    ('esx://[::1]/a@b', USER),
    ('esx://host/a@b', USER),
    ('esx://host?a=b@c', USER),
    ('esx://@host', USER),
    ('esx:///', USER),
    ('esx://a@b@c', AT),
    ('esx://the root@host', BLANK),
    ('esx://root@host/\u00fc', ASCII),
    ('esx://root@host:8443/&no_verify=1', 'the first option has to begin with "?"'),
    ('esx://root@host/:8443', PORT),
    ('esx://root@host/?a=b&no_verify=1:8443', PORT),
    ('vpx://root@vc', VPX),
    ('vpx://root@vc/', VPX),
    ('vpx://root@vc/DC', VPX),
    ('vpx://root@vc/DC/?no_verify=1', VPX),
    ('esx://root@h?no_verify=', NO_VERIFY),
    ('esx://root@h?no_verify=10', NO_VERIFY),
    ('vpx://root@vc/DC/h?a=b&no_verify=2', NO_VERIFY),
]] + [
    ('vmware_uri', 'esx://a@host/' + text + 'b', ASCII) for text in CONTROL if text > '\x7f'
] + [
    ('vmware_password', 'a\nb', LINE_END),
    ('vmware_password', 'a\r', LINE_END),
    ('vmware_password', '\n', LINE_END),
    ('vmware_fingerprint', ' ' + SHA1, AROUND),
    ('vmware_fingerprint', SHA1 + '\n', AROUND),
    ('vmware_fingerprint', SHA1 + ':0A', PAIRS.format(21)),
    ('vmware_fingerprint', SHA256[:-3], PAIRS.format(31)),
    ('vmware_fingerprint', SHA256 + ':0A', PAIRS.format(33)),
    ('vmware_fingerprint', SHA256 + ':0A' * 12, PAIRS.format(44)),
    ('vmware_fingerprint', 'sha256 Fingerprint=' + SHA256 + '\n',
     'expected the pairs of hex digits alone, without "sha256 Fingerprint="'),
    ('export_domain', ' /dir', AROUND),
    ('export_domain', '/dir ', AROUND),
    ('export_domain', 'host:/dir\n', AROUND),
    ('source_disks', ['a', 'b', 'a'], 'a disk is listed twice'),
], ids=lambda value: ascii(value)[:60])
def test_a_variant_of_a_usual_mistake_is_told_apart(key, value, text):
    assert problems({key: value}) == ['{}: {}'.format(key, text)]


def test_all_problems_are_reported_in_the_order_of_the_table():
    assert problems(b'{"source_disks": "x", "vmware_uri": "x", "vm_name": ""}') == [
        'vm_name: expected ' + EXPECTED['vm_name'],
        'vmware_uri: ' + KIND,
        'vmware_password: missing, expected ' + EXPECTED['vmware_password'],
        'vmware_fingerprint: missing, expected ' + EXPECTED['vmware_fingerprint'],
        'transport_method: missing, expected ' + EXPECTED['transport_method'],
        'source_disks: expected ' + EXPECTED['source_disks'] + ', found a string',
        'export_domain: missing, expected ' + EXPECTED['export_domain'],
    ]


def test_on_a_refusal_unknown_keys_are_named():
    assert problems({'vm_name': ABSENT, 'vmname': 1, 'a-key': 1, 'hunter2': 1, 'ssh_key': 1}) == [
        'vm_name: missing, expected ' + NAME, 'request: unknown keys: a-key, vmname']


# --- other transports and targets --------------------------------------------------------

KEY = '-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n'
VMX = 'ssh://root@esx.example.com/vmfs/volumes/ds/vm/vm.vmx'
SSH = {'transport_method': 'ssh', 'vm_name': VMX, 'vmware_uri': ABSENT, 'vmware_password': ABSENT,
       'vmware_fingerprint': ABSENT}
UPLOAD = {'export_domain': ABSENT, 'rhv_url': 'https://engine.example.com/ovirt-engine/api',
          'rhv_password': PASSWORD, 'rhv_cluster': 'Default', 'rhv_storage': 'data'}
BASES = {'plain': {}, 'ssh': SSH, 'upload': UPLOAD}


@pytest.mark.parametrize('base, key, value', [
    ('ssh', 'vm_name', 'ssh://root@[::1]:2222/vmfs/volumes/a-b/my%20vm/x.vmx'),
    ('ssh', 'vm_name', "ssh://root@10.0.0.1/vmfs/volumes/ds(1)/it's/x.vmx"),
    ('upload', 'rhv_url', 'https://admin@internal@engine.example.com:8443/ovirt-engine/api'),
    ('upload', 'rhv_url', 'https://admin@internal@[2001:db8::1]:8443/ovirt-engine/api/v4'),
    ('upload', 'rhv_cluster', 'my cluster'),
    ('upload', 'rhv_storage', 'my_data-1'),
    ('upload', 'rhv_cafile', '/ca.pem'),
    ('upload', 'insecure_connection', True),
    ('plain', 'allocation', 'preallocated'),
    ('plain', 'allocation', 'sparse'),
    ('plain', 'install_drivers', True),
    ('plain', 'virtio_win', '/usr/share/virtio win.iso'),
    ('plain', 'root', 'single'),
    ('plain', 'root', '/dev/mapper/vg-root'),
    ('plain', 'new_vm_name', '-x \u00fc'),
])
def test_another_value_is_accepted_as_it_is(base, key, value):
    assert getattr(parsed(**dict(BASES[base], **{key: value})), key) == value


@pytest.mark.parametrize('base, key, value', [
    ('ssh', 'vm_name', 'vm'),
    ('ssh', 'vm_name', 'ssh://-oProxyCommand@host/x.vmx'),
    ('ssh', 'vm_name', 'ssh://root:pw@host/x.vmx'),
    ('ssh', 'vm_name', 'ssh://root@host/x.vmdk'),
    ('ssh', 'vm_name', 'ssh://root@host/my vm.vmx'),
    ('ssh', 'vm_name', 'ssh://host/x.vmx'),
    ('ssh', 'vm_name', 'https://root@host/x.vmx'),
    ('ssh', 'ssh_key', ''),
    ('ssh', 'ssh_key', KEY.replace('b3', '\0')),
    ('ssh', 'ssh_key', KEY.replace('b3', '\ud800')),
    ('upload', 'rhv_url', 'https://-engine/ovirt-engine/api'),
    ('upload', 'rhv_password', ''),
    ('upload', 'rhv_password', 'pw '),
    ('upload', 'rhv_cluster', ''),
    ('upload', 'rhv_storage', 'my data'),
    ('upload', 'rhv_storage', 'x" or name="y'),
    ('upload', 'rhv_cafile', 'ca.pem'),
    ('plain', 'allocation', 'thin'),
    ('plain', 'virtio_win', 'virtio-win.iso'),
    ('plain', 'root', 'ask'),
    ('plain', 'root', 'sda1'),
    ('plain', 'root', '/dev/sda1 x'),
    ('plain', 'new_vm_name', ''),
    ('plain', 'vmware_password_file', 'password'),
] + [('plain', 'network_mappings', value) for value in (
    [1], [[]], [{}], [{'source': 'a'}], [{'destination': 'b'}],
    [{'source': '', 'destination': 'b'}], [{'source': 'a', 'destination': ['b']}],
    [{'source': 'a:b', 'destination': 'c'}],
    [{'source': 'a', 'destination': 'b', 'mac_address': 0}])
] + [('plain', 'luks_keys', value) for value in (
    [1], ['key'], [{}], [{'device': 'all'}], [{'key': 'x'}], [{'device': 'sda', 'key': 'x'}],
    [{'device': 'all', 'key': 'x', 'clevis': True}], [{'device': 'all', 'clevis': 1}],
    [{'device': 'all', 'key': ''}], [{'device': 'all', 'key': 'x\ny'}],
    [{'device': '/dev/sda:key:x', 'key': 'x'}], [{'device': 'all', 'key': ['x']}])
], ids=lambda value: ascii(value)[:50])
def test_another_wrong_value_is_refused(base, key, value):
    assert problems_with(base, key, value) == ['{}: expected {}'.format(key, expected(base, key))]


def expected(base, key):
    """Return what has to be the value of a key in such a request."""
    return (EXPECTED if base == 'plain' else OTHERS)[key]


def problems_with(base, key, value):
    """Return the texts of all problems in such a request with this value."""
    instead = {'vmware_password': ABSENT} if key == 'vmware_password_file' else {}
    return problems(dict(BASES[base], **dict(instead, **{key: value})))


def right_kind(key):
    """Return what kind of value a key has."""
    return ('a list' if key in ('source_disks', 'network_mappings', 'luks_keys') else
            'true or false' if key in ('install_drivers', 'insecure_connection') else 'a string')


@pytest.mark.parametrize('kind', sorted(VALUES))
@pytest.mark.parametrize('base, key', [('plain', key) for key in sorted(EXPECTED)] + [
    ('ssh' if key in ('vm_name', 'ssh_key') else 'upload', key) for key in sorted(OTHERS)])
def test_a_value_of_another_kind_is_refused(base, key, kind):
    for value in VALUES[kind] if kind != right_kind(key) else []:
        assert problems_with(base, key, value) == [
            '{}: expected {}, found {}'.format(key, expected(base, key), kind)]


URL = 'https://engine.example.com/ovirt-engine/api'
END = 'has to end with /ovirt-engine/api'
TWICE = 'a network is mapped twice'
NO_MAC = 'mac_address: expected six pairs of hex digits with colons'


@pytest.mark.parametrize('base, key, value, text', [
    ('ssh', 'ssh_key', '/root/.ssh/id_rsa', 'expected the text of the key, not its path'),
    ('ssh', 'ssh_key', './id-rsa\n', 'expected the text of the key, not its path'),
    ('ssh', 'ssh_key', 'ssh-ed25519 AAAA/', 'is a public key, expected the private one'),
    ('ssh', 'ssh_key', 'ecdsa-sha2-nistp256 AAAA', 'is a public key, expected the private one'),
    ('ssh', 'ssh_key', KEY.replace('\n', ' /'),
     'is in one line, expected line ends as in its file'),
] + [('upload', 'rhv_url', value, text) for value, text in [
    ('', 'has to begin with https://'),
    (URL.replace('https', 'http'), 'has to begin with https://'),
    (URL.replace('//', '//admin:pw@'), 'has a password; give that as rhv_password'),
    (URL.replace('//', '//admin@internal:p/w@'), 'has a password; give that as rhv_password'),
    (URL.replace('//', '//admin%40internal@'),
     'an "@" in the user has to be written as it is, not %40'),
    (' ' + URL, AROUND),
    (URL + '\n', AROUND),
    (URL + '/', END),
    (URL + 's', END),
    ('https://engine.example.com', END),
    ('https://engine.example.com/ovirt-engine/webadmin', END),
]] + [
    ('upload', 'rhv_password', 'pw\n', LINE_END),
    ('plain', 'network_mappings', [
        {'source': 'a', 'destination': 'b'}, {'source': 'a', 'destination': 'c'}], TWICE),
    ('plain', 'network_mappings', [
        {'source': 'a', 'destination': 'b', 'mac_address': '00:11:22:33:44'}], NO_MAC),
    ('plain', 'network_mappings', [
        {'source': 'a', 'destination': 'b', 'mac_address': ''}], NO_MAC),
], ids=lambda value: ascii(value)[:50])
def test_another_variant_of_a_usual_mistake_is_told(base, key, value, text):
    assert problems_with(base, key, value) == ['{}: {}'.format(key, text)]


# A pattern that tries all ways to divide such a value takes hours.
@pytest.mark.parametrize('base, key, value, text', [
    ('plain', 'vmware_uri', 'esx://' + ':' * 10**6, USER),
    ('plain', 'vmware_uri', 'esx://a' + '@' * 10**6, AT),
    ('plain', 'vmware_uri', 'esx://a@h/' + ':1' * 400000 + ':', None),
    ('plain', 'vmware_uri', 'esx://a@h' + '?' * 10**6, None),
    ('plain', 'vmware_fingerprint', ' ' * 10**6, AROUND),
    ('plain', 'vmware_fingerprint', '0A:' * 300000, None),
    ('plain', 'export_domain', ':' + ' ' * 10**6 + ':', None),
    ('ssh', 'ssh_key', '/' * 10**6 + '\nx', None),
    ('upload', 'rhv_url', 'https://' + ':' * 10**6, END),
    ('upload', 'rhv_url', 'https://' + '%40' * 300000, END),
], ids=lambda value: ascii(value)[:20])
def test_a_very_long_value_is_refused_at_once(base, key, value, text):
    request = valid_request(**dict(BASES[base], **{key: value}))
    assert refusal(parse_request, encoded(request), error=RequestError) == [
        '{}: {}'.format(key, text or 'expected ' + expected(base, key))]


@pytest.mark.parametrize('base, key', [('ssh', 'vm_name')] + [('upload', key) for key in (
    'rhv_url', 'rhv_password', 'rhv_cluster', 'rhv_storage')])
def test_another_mandatory_key_has_to_be_there(base, key):
    assert problems(dict(BASES[base], **{key: ABSENT})) == [
        '{}: missing, expected {}'.format(key, OTHERS[key])]


def test_the_names_of_target_and_ignored_keys_are_told():
    request = parsed(ssh_key=KEY, rhv_cafile='/x')
    assert (request.target, request.ignored) == ('export_domain', ('rhv_cafile', 'ssh_key'))
    assert parsed(**UPLOAD).target == 'rhv_upload'


def test_a_name_of_a_key_that_may_be_a_password_is_not_told():
    assert parsed(vmname='x', **{'hunter2': 'x', 'top secret': 'x'}).ignored == ('vmname',)


@pytest.mark.parametrize('text', [KEY, KEY.rstrip(), KEY.replace('\n', '\r\n'), KEY + '\n\n'])
def test_a_private_key_ends_with_one_line_end(text):
    assert parsed(ssh_key=text, **SSH).ssh_key.read() == KEY


def test_networks_are_mapped_by_name_or_address():
    mapping = {'source': 'VM Network', 'destination': 'ovirtmgmt', 'ip_address': '10.0.0.1'}
    mac = {'source': 'a:b', 'destination': 'lan', 'mac_address': '00:50:56:AB:cd:ef'}
    assert parsed(network_mappings=[mapping, mac, mapping]).network_mappings == (
        ('VM Network', 'ovirtmgmt', None), ('a:b', 'lan', '00:50:56:ab:cd:ef'))


def test_encrypted_devices_have_a_key_or_clevis():
    (first, key), second = parsed(luks_keys=[
        {'device': '/dev/sda2', 'key': PASSWORD},
        {'device': 'all', 'key': None, 'clevis': True}]).luks_keys
    assert (first, key.read(), second) == ('/dev/sda2', PASSWORD, ('all', None))


@pytest.mark.promise(1)
def test_no_secret_is_in_the_repr_of_a_request():
    request = parsed(ssh_key=KEY.replace('b3', PASSWORD), luks_keys=[
        {'device': 'all', 'key': PASSWORD}], **dict(UPLOAD, **SSH))
    assert PASSWORD not in repr(request)


# --- what is refused: JSON ---------------------------------------------------------------

VALID = encoded(valid_request())
OUT_OF_RANGE = 'has a number out of range, or NaN'
MORE = 'is not JSON: there is more after the request, line '
NO_OBJECT = ('does not begin with "{"; give the request on standard input: virt-v2v-wrapper.py'
             ' < request.json')
UTF_16 = 'is UTF-16, which ">" of PowerShell writes; expected UTF-8'


def with_value(text):
    """Return a valid request with one more key, of a value given as JSON."""
    return VALID[:-1] + b', "more": ' + text + b'}'


@pytest.mark.parametrize('data, text', [
    (b' \t\r\n', 'is empty, expected a JSON object'),
    (VALID.decode().encode('utf-16-be'), UTF_16),
    (VALID.decode().encode('utf-16-le'), UTF_16),
    (with_value(b'"\xff"'), 'is not UTF-8'),
    (with_value(b'"\xed\xa0\x80"'), 'is not UTF-8'),
    (with_value(b'"\xc0\xaf"'), 'is not UTF-8'),
    (VALID + b' ' * (1 << 20), 'is longer than 1048576 bytes'),
    (b'[' * ((1 << 20) + 1), 'is longer than 1048576 bytes'),
    (b'null', NO_OBJECT),
    (b'true', NO_OBJECT),
    (b'7', NO_OBJECT),
    (b'"needle"', NO_OBJECT),
    (b'[]', 'expected one request, not a list'),
    (with_value(b'NaN'), OUT_OF_RANGE),
    (with_value(b'Infinity'), OUT_OF_RANGE),
    (with_value(b'-Infinity'), OUT_OF_RANGE),
    (with_value(b'1e999'), OUT_OF_RANGE),
    (with_value(b'-1e999'), OUT_OF_RANGE),
    (with_value(b'9' * 5000), OUT_OF_RANGE),
    (b'[' * 100000, 'is nested too deeply'),
    (with_value(b'[' * 100000 + b']' * 100000), 'is nested too deeply'),
    (with_value(b'{"a":' * 100000 + b'1' + b'}' * 100000), 'is nested too deeply'),
    (VALID[:-1] + b', "vm_name": "needle"}', 'vm_name is given twice'),
    (VALID[:-1] + b', "vmware_password": "needle"}', 'vmware_password is given twice'),
    (VALID[:-1] + b', "needle": 1, "needle": 1}', 'a key is given twice'),
    (with_value(b'{"needle": 1, "needle": 1}'), 'a key is given twice'),
    (VALID + VALID, MORE + '1 column {}'.format(len(VALID) + 1)),
    (VALID + b'\nneedle', MORE + '2 column 1'),
    (VALID + b'\0', MORE + '1 column {}'.format(len(VALID) + 1)),
    (VALID[:-1], 'is not JSON: Expecting \',\' delimiter, line 1 column {}'.format(len(VALID))),
    (b'needle', NO_OBJECT),
    (b'\0', NO_OBJECT),
    (b'\xef\xbb\xbf', NO_OBJECT),
    (b'\xff{', NO_OBJECT),
    (b'{needle}',
     'is not JSON: Expecting property name enclosed in double quotes, line 1 column 2'),
    (b'{"vm_name": "needle', 'is not JSON: Unterminated string starting at, line 1 column 13'),
    (b'{"vm_name": "a\nb"}', 'is not JSON: Invalid control character at, line 1 column 15'),
], ids=lambda value: ascii(value)[:40])
def test_what_is_not_one_proper_json_object_is_refused(data, text):
    assert problems(data) == ['request: ' + text]


def test_several_keys_given_twice_are_all_named():
    assert problems(VALID[:-1] + b',' + VALID[1:]) == [
        'request: {} is given twice'.format(key) for key in (
            'vm_name', 'vmware_uri', 'vmware_password', 'vmware_fingerprint', 'transport_method',
            'export_domain')]


# --- where it is read from ---------------------------------------------------------------

def read(data):
    """Return the Request in a pipe that holds these bytes and ends then."""
    reading, writing = os.pipe()
    with open(reading, 'rb'):
        with open(writing, 'wb') as stream:
            stream.write(data)
        return read_request(reading)


def refused(fd):
    """Return the texts of all problems in the request that a descriptor is open on."""
    return refusal(read_request, fd, error=RequestError)


def test_a_request_is_read_up_to_the_end_of_a_pipe():
    assert read(VALID).vm_name == 'vm'


def test_a_request_is_read_from_a_file_of_more_than_one_piece(tmp_path):
    (tmp_path / 'request').write_bytes(VALID.ljust(1 << 20))
    with open(str(tmp_path / 'request'), 'rb') as stream:
        assert read_request(stream.fileno()).vm_name == 'vm'


def test_a_byte_order_mark_is_no_harm():
    assert read(b'\xef\xbb\xbf' + VALID).vm_name == 'vm'


def test_an_endless_request_is_refused():
    with open('/dev/zero', 'rb') as stream:
        assert refused(stream.fileno()) == ['request: is longer than 1048576 bytes']


def test_a_directory_is_no_request():
    fd = os.open('/', os.O_RDONLY)
    try:
        assert refused(fd) == [
            'request: Is a directory; give the request on standard input: virt-v2v-wrapper.py'
            ' < request.json']
    finally:
        os.close(fd)


def test_a_terminal_is_refused_without_reading_it():
    outer, terminal = os.openpty()
    try:
        assert refused(terminal) == [
            'request: is a terminal; give the request on standard input: virt-v2v-wrapper.py'
            ' < request.json']
    finally:
        os.close(outer)
        os.close(terminal)


# --- a password in a file ----------------------------------------------------------------

FILE = 'vmware_password_file: '


@pytest.fixture
def password_file(tmp_path):
    """A file with a password that only its owner can read."""
    path = tmp_path / 'pass word'
    path.write_text(PASSWORD + '\nmore\n')
    path.chmod(0o600)
    return path


def with_file(path, **overrides):
    """Return a request, as JSON, whose password is in a file."""
    return encoded(valid_request(**dict(
        {'vmware_password': ABSENT, 'vmware_password_file': str(path)}, **overrides)))


@pytest.mark.parametrize('end', ['\n', '\r\n', '', '\nmore\n'])
def test_the_first_line_of_a_file_is_the_password(password_file, end):
    password_file.write_bytes((PASSWORD + end).encode())
    assert content(read(with_file(password_file))) == PASSWORD.encode()


def refused_file(path):
    """Return the problems with a file for the password."""
    return refusal(read, with_file(path))


@pytest.mark.parametrize('bits', [0o640, 0o604, 0o620])
def test_a_password_file_that_others_may_read_is_refused(password_file, bits):
    password_file.chmod(bits)
    assert refused_file(password_file) == [
        FILE + "others may read it: chmod 600 '{}'".format(password_file)]


def test_a_password_file_that_is_a_link_is_refused(password_file):
    link = password_file.with_name('link')
    link.symlink_to(password_file)
    assert refused_file(link) == [
        FILE + 'expected a file, no link, that belongs to who starts it']


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_no_password_file(tmp_path, make):
    make(str(tmp_path / 'x'))
    assert refused_file(tmp_path / 'x') == [
        FILE + 'expected a file, no link, that belongs to who starts it']


def test_a_password_file_of_somebody_else_is_refused(password_file):
    if os.getuid() != 0:
        pytest.skip('needs root')
    os.chown(str(password_file), 1, 1)
    assert refused_file(password_file) == [
        FILE + 'expected a file, no link, that belongs to who starts it']


@pytest.mark.parametrize('data', [b'', b'\n' + PASSWORD.encode(), b'\xff\n', b'a\0b\n'])
def test_a_password_file_without_a_password_is_refused(password_file, data):
    password_file.write_bytes(data)
    assert refused_file(password_file) == [
        FILE + 'expected a password in its first line, in UTF-8']


def test_a_password_file_that_is_missing_is_named(tmp_path):
    assert refused_file(tmp_path / 'x') == [FILE + 'No such file or directory']


# --- anything else -----------------------------------------------------------------------

NEEDLE = 'n33dle'
# A valid request in which every text has the needle in it, but for those with few choices.
NEEDLES = valid_request(
    vm_name=NEEDLE, vmware_uri='esx://{0}@{0}/{0}?{0}={0}'.format(NEEDLE), vmware_password=NEEDLE,
    export_domain='/' + NEEDLE, source_disks=['[ds] ' + NEEDLE])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.text(max_size=20).map(lambda text: NEEDLE + text)
    | st.sampled_from(['\0', '\n', '\ud800', '\u2028', '']).map(lambda text: text + NEEDLE),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@st.composite
def mutated_requests(draw):
    """A valid request with some keys replaced, taken out or added."""
    document = dict(NEEDLES)
    for key in draw(st.lists(st.sampled_from(sorted(EXPECTED)), max_size=4)):
        document[key] = draw(JUNK)
    for key in draw(st.lists(st.sampled_from(sorted(document)), max_size=2, unique=True)):
        del document[key]
    document.update(draw(st.dictionaries(st.text(max_size=5), JUNK, max_size=2)))
    return json.dumps(document, ensure_ascii=draw(st.booleans())).encode('utf-8', 'surrogatepass')


@st.composite
def damaged_requests(draw):
    """The bytes of a mutated request with some of them overwritten, taken out or doubled."""
    data = draw(mutated_requests())
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 5)))
        data = data[:start] + draw(st.binary(max_size=5)) + data[end:]
    return data


def complaints(data):
    """Return the problems of a request, [] for a good one; any other exception goes on."""
    try:
        parse_request(data)
    except RequestError as error:
        assert error.problems
        return [': '.join(problem) for problem in error.problems]
    return []


def check_complaints(data):
    for text in complaints(data):
        assert text.isprintable()
        assert NEEDLE not in text


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_arbitrary_bytes_are_refused_in_single_lines(data):
    check_complaints(data)


@given(mutated_requests())
@settings(max_examples=300)
def test_arbitrary_values_are_refused_and_not_echoed(data):
    check_complaints(data)


@given(damaged_requests())
@settings(max_examples=200)
def test_damaged_json_is_refused_and_not_echoed(data):
    check_complaints(data)


@pytest.mark.skipif(not VALIDATORS, reason='needs jsonschema 4')
@given(mutated_requests())
@settings(max_examples=300)
def test_the_schema_refuses_what_the_script_refuses(data):
    refused = told(json.loads(data.decode('utf-8', 'surrogatepass')))
    said = complaints(data)
    assume(refused is not None and 'request: ' + OUT_OF_RANGE not in said)
    assert refused == (said != [])


@pytest.mark.long
@given(st.binary(max_size=2000) | mutated_requests() | damaged_requests())
@settings(max_examples=10000)
def test_10000_requests_are_refused_and_not_echoed(data):
    check_complaints(data)


def test_the_request_that_is_mutated_is_a_good_one():
    """So the tests above are about what was done to it."""
    assert complaints(encoded(NEEDLES)) == []
