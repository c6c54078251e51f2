"""The request: what is accepted, and the whole text of every refusal."""
import gc
import json
import os
import pickle
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox import ABSENT, PASSWORD, valid_request
from results import refusal
from virt_v2v import DISKS
from virt_v2v_wrapper import RequestError, parse_request, read_request

pytestmark = pytest.mark.promise(7)

SHA1 = ':'.join(['0A'] * 20)
SHA256 = ':'.join(['F7'] * 32)
EXPECTED = {
    'vm_name': 'a non-empty string of at most 4096 bytes without control characters',
    'output_format': '"raw" or "qcow2"',
    'transport_method': '"vddk" or "ssh"',
    'vmware_uri': 'a libvirt URI esx://USER@HOST... or vpx://USER@HOST... without a password',
    'vmware_password': 'a non-empty string without NUL or line ends',
    'vmware_fingerprint': '20 or 32 colon-separated pairs of hex digits',
    'export_domain': 'HOST:/PATH or an absolute directory, without blanks or control characters',
    'source_disks': 'a list of different non-empty strings',
}
OPTIONAL = ['output_format', 'source_disks']
MANDATORY = sorted(set(EXPECTED) - set(OPTIONAL))
NO_STRINGS = [True, False, 0, 7, 1.5, [], ['x'], {}, {'x': 'y'}]


def encoded(document):
    return json.dumps(document).encode('utf-8')


def parsed(**overrides):
    """Return the Request in a request that is valid but for the overrides."""
    return parse_request(encoded(valid_request(**overrides)))


def problems(data):
    """Return the texts of all problems in a request (bytes, or overrides of a valid one)."""
    if not isinstance(data, bytes):
        data = encoded(valid_request(**data))
    return refusal(parse_request, data, error=RequestError)


def content(request):
    """Return what is in the file that virt-v2v reads the password from."""
    request.vmware_password.store()
    with open(request.vmware_password.path, 'rb') as stream:
        data = stream.read()
    assert request.vmware_password.read().encode('utf-8') == data
    request.vmware_password.close()
    return data


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


def test_keys_of_another_target_or_transport_are_ignored():
    assert parsed(rhv_password='p', ssh_key=1).ignored == ('rhv_password', 'ssh_key')


def test_a_request_of_the_greatest_length_is_accepted():
    data = encoded(valid_request())
    assert parse_request(data.ljust(1 << 20)).vm_name == 'vm'


def test_a_password_is_not_in_the_repr_of_a_request():
    assert PASSWORD not in repr(parsed()) + str(parsed()) + '{}'.format(parsed())


def test_a_password_cannot_be_pickled():
    with pytest.raises(TypeError, match='^a secret is not to be stored$'):
        pickle.dumps(parsed())


# --- what is refused: values -------------------------------------------------------------

@pytest.mark.parametrize('absent', [ABSENT, None])
@pytest.mark.parametrize('key', MANDATORY)
def test_a_mandatory_key_has_to_be_there(key, absent):
    assert problems({key: absent}) == ['{}: missing, expected {}'.format(key, EXPECTED[key])]


@pytest.mark.parametrize('value', NO_STRINGS, ids=json.dumps)
@pytest.mark.parametrize('key', sorted(set(EXPECTED) - {'source_disks'}))
def test_what_is_no_string_is_refused(key, value):
    assert problems({key: value}) == ['{}: expected {}'.format(key, EXPECTED[key])]


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
    ('transport_method', 'scp'),
    ('transport_method', 'VDDK'),
    ('vmware_uri', ''),
    ('vmware_uri', 'esx.example.com'),
    ('vmware_uri', 'qemu:///system'),
    ('vmware_uri', 'qemu+ext:///system?command=/tmp/x'),
    ('vmware_uri', 'esx+ext://root@host/?command=/tmp/x'),
    ('vmware_uri', 'ESX://root@host'),
    ('vmware_uri', 'gsx://root@host'),
    ('vmware_uri', 'xesx://root@host'),
    ('vmware_uri', '-esx://root@host'),
    ('vmware_uri', ' esx://root@host'),
    ('vmware_uri', 'esx://root@host '),
    ('vmware_uri', 'esx://root:pw@host'),
    ('vmware_uri', 'esx://root:@host'),
    ('vmware_uri', 'esx://root%3Apw@host'),
    ('vmware_uri', 'esx://root%3apw@host'),
    ('vmware_uri', 'esx://%3a@host'),
    ('vmware_uri', 'esx://host'),
    ('vmware_uri', 'esx://host/a@b'),
    ('vmware_uri', 'esx://host?a=b@c'),
    ('vmware_uri', 'esx://@host'),
    ('vmware_uri', 'esx://root@'),
    ('vmware_uri', 'esx://root@/path'),
    ('vmware_uri', 'esx://root@?no_verify=1'),
    ('vmware_uri', 'esx://root@-host'),
    ('vmware_uri', 'esx:///'),
    ('vmware_uri', 'esx://a@b@c'),
    ('vmware_uri', 'esx://root@host:'),
    ('vmware_uri', 'esx://root@host:x'),
    ('vmware_uri', 'esx://root@host:123456'),
    ('vmware_uri', 'esx://root@[::1'),
    ('vmware_uri', 'esx://root@::1'),
    ('vmware_uri', 'esx://root@host/a b'),
    ('vmware_uri', 'esx://root@host/\u00fc'),
    ('vmware_uri', 'esx://root@host#fragment'),
    ('vmware_uri', 'esx://DOMAIN\\user@host'),
    ('vmware_uri', 'esx://root@host/' + 'x' * 4096),
    ('vmware_password', ''),
    ('vmware_password', 'a\nb'),
    ('vmware_password', 'a\r'),
    ('vmware_password', 'a\0'),
    ('vmware_password', '\ud800'),
    ('vmware_fingerprint', ''),
    ('vmware_fingerprint', SHA1.replace(':', '')),
    ('vmware_fingerprint', SHA1.replace(':', '-')),
    ('vmware_fingerprint', SHA1[:-3]),
    ('vmware_fingerprint', SHA1 + ':'),
    ('vmware_fingerprint', SHA1 + ':0A'),
    ('vmware_fingerprint', SHA256[:-3]),
    ('vmware_fingerprint', SHA256 + ':0A'),
    ('vmware_fingerprint', SHA256 + ':0A' * 12),
    ('vmware_fingerprint', 'G' + SHA1[1:]),
    ('vmware_fingerprint', '\u0660' + SHA1[1:]),
    ('vmware_fingerprint', ' ' + SHA1),
    ('vmware_fingerprint', SHA1 + '\n'),
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
    ('export_domain', ' /dir'),
    ('export_domain', '/dir '),
    ('export_domain', '/no\u00a0break'),
    ('export_domain', '/' + 'x' * 4096),
    ('source_disks', ''),
    ('source_disks', '[ds] vm/vm.vmdk'),
    ('source_disks', {}),
    ('source_disks', {'[ds] vm/vm.vmdk': 1}),
    ('source_disks', True),
    ('source_disks', 0),
    ('source_disks', 7),
    ('source_disks', ['']),
    ('source_disks', [None]),
    ('source_disks', [7]),
    ('source_disks', [['x']]),
    ('source_disks', [{}]),
    ('source_disks', ['a', True]),
    ('source_disks', ['a', 'b', 'a']),
    ('source_disks', ['x' * 4097]),
] + [(key, 'a' + text + 'b') for key in ('vm_name', 'vmware_uri', 'export_domain')
     for text in CONTROL] + [('source_disks', ['[ds] ' + text + 'b']) for text in CONTROL],
    ids=lambda value: ascii(value)[:60])
def test_a_wrong_value_is_refused_by_a_text_that_names_the_key(key, value):
    assert problems({key: value}) == ['{}: expected {}'.format(key, EXPECTED[key])]


def test_all_problems_are_reported_in_the_order_of_the_table():
    assert problems(b'{"source_disks": "x", "vm_name": "", "output_format": "x"}') == [
        'vm_name: expected ' + EXPECTED['vm_name'],
        'vmware_uri: missing, expected ' + EXPECTED['vmware_uri'],
        'vmware_password: missing, expected ' + EXPECTED['vmware_password'],
        'vmware_fingerprint: missing, expected ' + EXPECTED['vmware_fingerprint'],
        'transport_method: missing, expected ' + EXPECTED['transport_method'],
        'output_format: expected ' + EXPECTED['output_format'],
        'source_disks: expected ' + EXPECTED['source_disks'],
        'export_domain: missing, expected ' + EXPECTED['export_domain'],
    ]


# --- what is refused: the keys that few requests have ------------------------------------

SSH = {'transport_method': 'ssh', 'vm_name': 'ssh://root@esx/vmfs/volumes/ds/vm/vm.vmx'}
UPLOAD = {'export_domain': ABSENT, 'rhv_url': 'https://engine/ovirt-engine/api',
          'rhv_password': 'p', 'rhv_cluster': 'c', 'rhv_storage': 's'}
KEY = '-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----'
NETWORKS = ('a list of {"source": NAME without ":", "destination": NAME, "mac_address": optional},'
            ' each source or address once')
LUKS = 'a list of {"device": "all" or "/dev/...", "key": PASSPHRASE, or "clevis": true}'
PATH = 'the absolute path of an ISO image or a directory'
NETWORK = {'source': 'a', 'destination': 'b'}
BOOL = 'true or false'


@pytest.mark.parametrize('base, key, value, expected', [
    ({}, 'network_mappings', {}, NETWORKS),
    ({}, 'network_mappings', ['a:b'], NETWORKS),
    ({}, 'network_mappings', [NETWORK, {'source': 'a'}], NETWORKS),
    ({}, 'network_mappings', [{'destination': 'a'}], NETWORKS),
    ({}, 'network_mappings', [dict(NETWORK, source='a:b')], NETWORKS),
    ({}, 'network_mappings', [dict(NETWORK, source='')], NETWORKS),
    ({}, 'network_mappings', [dict(NETWORK, destination='a\nb')], NETWORKS),
    ({}, 'network_mappings', [dict(NETWORK, mac_address='00:50:56:ab:cd')], NETWORKS),
    ({}, 'network_mappings', [dict(NETWORK, mac_address=7)], NETWORKS),
    ({}, 'network_mappings', [dict(NETWORK, mac_address='')], NETWORKS),
    ({}, 'network_mappings', [NETWORK, dict(NETWORK, destination='c')], NETWORKS),
    ({}, 'allocation', 'thin', '"sparse" or "preallocated"'),
    ({}, 'install_drivers', 'yes', BOOL),
    ({}, 'install_drivers', 1, BOOL),
    ({}, 'virtio_win', 'virtio-win.iso', PATH),
    ({}, 'virtio_win', True, PATH),
    ({}, 'luks_keys', {'device': 'all', 'key': 'k'}, LUKS),
    ({}, 'luks_keys', [{'device': 'all'}], LUKS),
    ({}, 'luks_keys', [{'key': 'k'}], LUKS),
    ({}, 'luks_keys', [{'device': 'all', 'key': 'k', 'clevis': True}], LUKS),
    ({}, 'luks_keys', [{'device': 'all', 'clevis': False}], LUKS),
    ({}, 'luks_keys', [{'device': 'all:file:/etc/shadow', 'clevis': True}], LUKS),
    ({}, 'luks_keys', [{'device': 'sda2', 'key': 'k'}], LUKS),
    ({}, 'luks_keys', [{'device': 'all', 'key': 'a\nb'}], LUKS),
    ({}, 'luks_keys', [{'device': 'all', 'key': 7}], LUKS),
    ({}, 'root', 'ask', '"first", "single" or "/dev/..."'),
    ({}, 'root', 'sda', '"first", "single" or "/dev/..."'),
    ({}, 'new_vm_name', '', EXPECTED['vm_name']),
    (SSH, 'vm_name', 'vm', 'ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx'),
    (SSH, 'vm_name', 'ssh://esx/a.vmx',
     'ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx'),
    (SSH, 'vm_name', 'ssh://root@-oProxyCommand=x/a.vmx',
     'ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx'),
    (SSH, 'vm_name', 'ssh://-oProxyCommand@esx/a.vmx',
     'ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx'),
    (SSH, 'ssh_key', '/root/.ssh/id_rsa', 'the text of a private key that needs no passphrase'),
    (SSH, 'ssh_key', '', 'the text of a private key that needs no passphrase'),
    (UPLOAD, 'rhv_url', 'http://engine/ovirt-engine/api',
     'https://[USER@]HOST[:PORT]/ovirt-engine/api without a password'),
    (UPLOAD, 'rhv_url', 'https://engine/ovirt-engine/api/',
     'https://[USER@]HOST[:PORT]/ovirt-engine/api without a password'),
    (UPLOAD, 'rhv_url', 'https://admin@internal:needle@engine/ovirt-engine/api',
     'https://[USER@]HOST[:PORT]/ovirt-engine/api without a password'),
    (UPLOAD, 'rhv_password', 'p ',
     'a non-empty string without NUL, line ends, or white space at its end'),
    (UPLOAD, 'rhv_password', 7,
     'a non-empty string without NUL, line ends, or white space at its end'),
    (UPLOAD, 'rhv_storage', 'a*',
     'the name of a storage domain: letters, digits, "_" and "-"'),
    (UPLOAD, 'rhv_cafile', 'ca.pem', 'an absolute path'),
    (UPLOAD, 'insecure_connection', 'true', BOOL),
])
def test_a_wrong_value_of_a_rare_key_is_refused(base, key, value, expected):
    assert problems(dict(base, **{key: value})) == ['{}: expected {}'.format(key, expected)]


@pytest.mark.parametrize('key', ['rhv_password', 'rhv_cluster', 'rhv_storage'])
def test_an_upload_needs_all_its_keys(key):
    text, = problems(dict(UPLOAD, **{key: ABSENT}))
    assert text.startswith(key + ': missing, expected ')


def test_networks_given_twice_alike_are_one():
    assert len(parsed(network_mappings=[NETWORK, NETWORK]).network_mappings) == 1


def test_without_its_url_an_upload_misses_that():
    assert [text.partition(':')[0] for text in problems(dict(UPLOAD, rhv_url=ABSENT))] == [
        'rhv_url']


def test_two_targets_are_refused():
    assert problems(dict(UPLOAD, export_domain='/dir')) == [
        'request: expected either export_domain or rhv_url, found both']


def test_a_request_for_an_upload_needs_no_export_domain():
    request = parsed(**UPLOAD)
    assert (request.target, request.export_domain) == ('rhv_upload', None)
    assert request.rhv_cafile == '/etc/pki/vdsm/certs/cacert.pem'


def test_a_request_for_ssh_needs_nothing_of_vddk():
    request = parsed(vmware_uri=ABSENT, vmware_password=ABSENT, vmware_fingerprint=ABSENT,
                     ssh_key=KEY, **SSH)
    assert request.ssh_key.read() == KEY + '\n'
    assert request.vmware_uri is None


@pytest.mark.promise(1)
@pytest.mark.parametrize('overrides', [
    dict(UPLOAD, rhv_password='needle'), {'luks_keys': [{'device': 'all', 'key': 'needle'}]},
    dict(SSH, ssh_key=KEY.replace('AAAA', 'needle'))])
def test_no_secret_is_in_the_repr_of_a_request(overrides):
    assert 'needle' not in repr(parsed(**overrides))


def test_a_misspelt_key_is_named_beside_the_one_that_is_missing():
    assert problems({'vm_name': ABSENT, 'vmname': 'vm', 'Pa55': 1}) == [
        'vm_name: missing, expected ' + EXPECTED['vm_name'], 'request: unknown keys: vmname']


# --- what is refused: JSON ---------------------------------------------------------------

VALID = encoded(valid_request())
OUT_OF_RANGE = 'a number is out of range, or none'


def with_value(text):
    """Return a valid request with one more key, of a value given as JSON."""
    return VALID[:-1] + b', "more": ' + text + b'}'


@pytest.mark.parametrize('data, text', [
    (b'', 'is empty, expected a JSON object'),
    (b' \t\r\n', 'is empty, expected a JSON object'),
    (b'\xef\xbb\xbf' + VALID, 'begins with a byte order mark'),
    (VALID.decode().encode('utf-16'), 'is not UTF-8'),
    (with_value(b'"\xff"'), 'is not UTF-8'),
    (with_value(b'"\xed\xa0\x80"'), 'is not UTF-8'),
    (with_value(b'"\xc0\xaf"'), 'is not UTF-8'),
    (VALID + b' ' * (1 << 20), 'is longer than 1048576 bytes'),
    (b'[' * ((1 << 20) + 1), 'is longer than 1048576 bytes'),
    (b'null', 'expected a JSON object'),
    (b'true', 'expected a JSON object'),
    (b'7', 'expected a JSON object'),
    (b'"needle"', 'expected a JSON object'),
    (b'[]', 'expected a JSON object'),
    (b'[' + VALID + b']', 'expected a JSON object'),
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
    (VALID + VALID, 'is not JSON: Extra data, line 1 column {}'.format(len(VALID) + 1)),
    (VALID + b'\nneedle', 'is not JSON: Extra data, line 2 column 1'),
    (VALID + b'\0', 'is not JSON: Extra data, line 1 column {}'.format(len(VALID) + 1)),
    (VALID[:-1], 'is not JSON: Expecting \',\' delimiter, line 1 column {}'.format(len(VALID))),
    (b'needle', 'is not JSON: Expecting value, line 1 column 1'),
    (b'\0', 'is not JSON: Expecting value, line 1 column 1'),
    (b'{needle}',
     'is not JSON: Expecting property name enclosed in double quotes, line 1 column 2'),
    (b'{"vm_name": "needle', 'is not JSON: Unterminated string starting at, line 1 column 13'),
    (b'{"vm_name": "a\nb"}', 'is not JSON: Invalid control character at, line 1 column 15'),
], ids=lambda value: ascii(value)[:40])
def test_what_is_not_one_proper_json_object_is_refused(data, text):
    assert problems(data) == ['request: ' + text]


def test_several_keys_given_twice_are_all_named():
    assert problems(VALID[:-1] + b',' + VALID[1:])[:2] == [
        'request: vm_name is given twice', 'request: vmware_uri is given twice']


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


def test_an_endless_request_is_refused():
    with open('/dev/zero', 'rb') as stream:
        assert refused(stream.fileno()) == ['request: is longer than 1048576 bytes']


def test_a_directory_is_no_request():
    fd = os.open('/', os.O_RDONLY)
    try:
        assert refused(fd) == ['request: Is a directory']
    finally:
        os.close(fd)


def test_a_terminal_is_refused_without_reading_it():
    outer, terminal = os.openpty()
    try:
        assert refused(terminal) == [
            'request: expected as JSON on standard input, which is a terminal; see --help']
    finally:
        os.close(outer)
        os.close(terminal)


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


@pytest.mark.long
@given(st.binary(max_size=2000) | mutated_requests() | damaged_requests())
@settings(max_examples=10000)
def test_10000_requests_are_refused_and_not_echoed(data):
    check_complaints(data)


def test_the_request_that_is_mutated_is_a_good_one():
    """So the tests above are about what was done to it."""
    assert complaints(encoded(NEEDLES)) == []
