"""Mistakes that administrators and authors of controllers make: each is told in a line.

That line says what is wrong and how to mend it. All else of the host is as it should be.
"""
import json
import os
import sys

import pytest

from blackbox import ABSENT, DOMAIN, PASSWORD
from results import error_line
from schemas import VALIDATORS, violations

pytestmark = pytest.mark.promise(7)

NAME = 'a non-empty string of at most 4096 bytes without control characters'
SHA1 = ':'.join(['0A'] * 20)
PAIRS = 'vmware_fingerprint: expected 20 or 32 colon-separated pairs of hex digits'
SECRET = 'vmware_password: expected a non-empty string without NUL or line ends'
DOMAIN_KEY = ('export_domain: expected HOST:/PATH or an absolute directory, without blanks or'
              ' control characters')
NETWORKS = ('network_mappings: expected a list of {"source": NAME without ":", "destination": NAME,'
            ' "mac_address": optional}, each source or address once')
KEYS = ('luks_keys: expected a list of {"device": "all" or "/dev/...", "key": PASSPHRASE, or'
        ' "clevis": true}')
DISKS = 'source_disks: expected a list of different non-empty strings'
VMX = 'vm_name: expected ssh://USER@HOST[:PORT]/vmfs/volumes/STORE/DIRECTORY/NAME.vmx'
HOW = 'give the request on standard input: virt-v2v-wrapper.py < request.json'

UPLOAD = {'export_domain': ABSENT, 'rhv_url': 'https://engine.example.com/ovirt-engine/api',
          'rhv_password': PASSWORD, 'rhv_cluster': 'Default', 'rhv_storage': 'data'}
SSH = {'transport_method': 'ssh', 'vm_name': 'ssh://root@esx/vmfs/volumes/ds/vm/vm.vmx'}


def rows(*table):
    """Return the parameters of a test, whose first column is the mistake in words."""
    return pytest.mark.parametrize('given, lines', [
        pytest.param(given, lines, id=mistake) for mistake, given, *lines in table])


def assert_told(wrapper, status, lines, request, *arguments):
    """Assert that a start ends with this status and these lines, and that nothing is left."""
    job = wrapper.start(request, *arguments)
    expected = b''.join(error_line(line.replace('HERE', wrapper.directory)) for line in lines)
    assert (job.status, job.stdout, job.stderr) == (status, b'', expected)
    assert wrapper.processes() == {} and wrapper.virt_v2v.runs() == []
    # A host that is looked at gets its two directories.
    assert set(wrapper.files()) <= {'log', 'state'}


# --- a value of the request --------------------------------------------------------------

@rows(
    ('key in another spelling', {'vm_name': ABSENT, 'vmName': 'vm'},
     'vm_name: missing, expected ' + NAME, 'request: unknown keys: vmName'),
    ('several guests', {'vm_name': ['web', 'db']},
     'vm_name: expected ' + NAME + ', found a list'),
    ('transport in capitals', {'transport_method': 'VDDK'},
     'transport_method: expected "vddk" or "ssh"'),
    ('no transport', {'transport_method': ABSENT},
     'transport_method: missing, expected "vddk" or "ssh"'),
    # The source.
    ('@ in the user', {'vmware_uri': 'vpx://administrator@vsphere.local@vc/DC/esx1'},
     'vmware_uri: an "@" in the user has to be written %40'),
    ('blank in the URI', {'vmware_uri': 'vpx://root@vc/Data Center/esx1'},
     'vmware_uri: a blank has to be written %20'),
    ('backslash in the user', {'vmware_uri': 'esx://EXAMPLE\\admin@esx.example.com'},
     'vmware_uri: a backslash has to be written %5C'),
    ('umlaut in the URI', {'vmware_uri': 'vpx://root@vc/M\u00fcnchen/esx1'},
     'vmware_uri: what is not ASCII has to be percent-encoded'),
    ('URL of the web client', {'vmware_uri': 'https://vc.example.com/ui'},
     'vmware_uri: has to begin with esx:// or vpx://'),
    ('line end after the URI', {'vmware_uri': 'esx://root@esx.example.com\n'},
     'vmware_uri: has white space around it'),
    ('no user in the URI', {'vmware_uri': 'esx://esx.example.com?no_verify=1'},
     'vmware_uri: needs a user: esx://USER@HOST or vpx://USER@HOST'),
    ('password in the URI', {'vmware_uri': 'esx://root:' + PASSWORD + '@esx.example.com'},
     'vmware_uri: has a password; give that as vmware_password'),
    ('option without ?', {'vmware_uri': 'esx://root@esx.example.com/&no_verify=1'},
     'vmware_uri: the first option has to begin with "?"'),
    ('vCenter without a path', {'vmware_uri': 'vpx://root@vc.example.com?no_verify=1'},
     'vmware_uri: vpx needs /DATACENTER/HOST or /DATACENTER/CLUSTER/HOST after the server'),
    ('no_verify=true', {'vmware_uri': 'esx://root@esx.example.com?no_verify=true'},
     'vmware_uri: no_verify is 0 or 1'),
    ('port that cannot be', {'vmware_uri': 'vpx://root@vc.example.com:65536/DC/esx'},
     'vmware_uri: a port is at most 65535'),
    ('port at the end', {'vmware_uri': 'esx://root@esx.example.com?no_verify=1:8443'},
     'vmware_uri: a port has to follow the server: USER@HOST:PORT'),
    ('number as password', {'vmware_password': 12345678}, SECRET + ', found a number'),
    ('no password', {'vmware_password': ''}, SECRET),
    ('line end after the password', {'vmware_password': PASSWORD + '\n'},
     'vmware_password: has a line end; leave that out'),
    ('password in two ways', {'vmware_password_file': '/root/password'},
     'vmware_password: expected either this or vmware_password_file, found both'),
    ('password file with ~',
     {'vmware_password': ABSENT, 'vmware_password_file': '~/password'},
     'vmware_password_file: expected an absolute path, "~" is not expanded'),
    ('fingerprint cut short', {'vmware_fingerprint': SHA1[:-3]}, PAIRS + ', found 19 pairs'),
    ('fingerprint as openssl prints it', {'vmware_fingerprint': 'SHA1 Fingerprint=' + SHA1},
     'vmware_fingerprint: expected the pairs of hex digits alone, without "SHA1 Fingerprint="'),
    ('fingerprint without colons', {'vmware_fingerprint': SHA1.replace(':', '')}, PAIRS),
    ('fingerprint with its kind', {'vmware_fingerprint': 'sha1:' + SHA1},
     'vmware_fingerprint: expected the pairs of hex digits alone, without "sha1:"'),
    ('line end after the fingerprint', {'vmware_fingerprint': SHA1 + '\n'},
     'vmware_fingerprint: has white space around it'),
    ('guest by ssh without a path', {'transport_method': 'ssh'}, VMX),
    ('guest by ssh as for scp',
     dict(SSH, vm_name='root@esx.example.com:/vmfs/volumes/ds/vm/vm.vmx'), VMX),
    ('path of a key', dict(SSH, ssh_key='/root/.ssh/id_rsa'),
     'ssh_key: expected the text of the key, not its path'),
    ('public key', dict(SSH, ssh_key='ssh-ed25519 AAAA root@host'),
     'ssh_key: is a public key, expected the private one'),
    ('key in one line', dict(
        SSH, ssh_key='-----BEGIN PRIVATE KEY----- AAAA/ -----END PRIVATE KEY-----'),
     'ssh_key: is in one line, expected line ends as in its file'),
    # The target.
    ('URL of an export', {'export_domain': 'nfs://nfs.example.com/exports/import'},
     'export_domain: expected HOST:/PATH, without "nfs://"'),
    ('blank before the directory', {'export_domain': ' /export'},
     'export_domain: has white space around it'),
    ('relative directory', {'export_domain': 'exports/import'}, DOMAIN_KEY),
    ('no target', {'export_domain': ABSENT}, DOMAIN_KEY.replace('expected', 'missing, expected')),
    ('two targets', dict(UPLOAD, export_domain='/export'),
     'request: expected either export_domain or rhv_url, found both'),
    ('engine by http', dict(UPLOAD, rhv_url='http://engine.example.com/ovirt-engine/api'),
     'rhv_url: has to begin with https://'),
    ('engine without a path', dict(UPLOAD, rhv_url='https://engine.example.com'),
     'rhv_url: has to end with /ovirt-engine/api'),
    ('password in the engine\'s URL', dict(
        UPLOAD, rhv_url='https://admin@internal:' + PASSWORD + '@engine/ovirt-engine/api'),
     'rhv_url: has a password; give that as rhv_password'),
    ('%40 in the engine\'s URL', dict(
        UPLOAD, rhv_url='https://admin%40internal@engine/ovirt-engine/api'),
     'rhv_url: an "@" in the user has to be written as it is, not %40'),
    ('blank after the engine\'s URL', dict(UPLOAD, rhv_url=UPLOAD['rhv_url'] + ' '),
     'rhv_url: has white space around it'),
    ('blank after the engine\'s password', dict(UPLOAD, rhv_password=PASSWORD + ' '),
     'rhv_password: expected a non-empty string without NUL, line ends, or white space at its end'),
    ('line end after the engine\'s password', dict(UPLOAD, rhv_password=PASSWORD + '\n'),
     'rhv_password: has a line end; leave that out'),
    ('no cluster', dict(UPLOAD, rhv_cluster=ABSENT),
     'rhv_cluster: missing, expected the name of a cluster'),
    ('string for true', dict(UPLOAD, insecure_connection='true'),
     'insecure_connection: expected true or false, found a string'),
    # The conversion.
    ('format of VMware', {'output_format': 'vmdk'}, 'output_format: expected "raw" or "qcow2"'),
    ('allocation of oVirt', {'allocation': 'thin'},
     'allocation: expected "sparse" or "preallocated"'),
    ('disk without a list', {'source_disks': '[datastore1] web/web.vmdk'},
     DISKS + ', found a string'),
    ('disk with its size', {'source_disks': [{'path': '[datastore1] web/web.vmdk'}]}, DISKS),
    ('disk twice', {'source_disks': ['[datastore1] web/web.vmdk'] * 2},
     'source_disks: a disk is listed twice'),
    ('networks as an object', {'network_mappings': {'VM Network': 'ovirtmgmt'}},
     NETWORKS + ', found an object'),
    ('network without a destination', {'network_mappings': [{'source': 'VM Network'}]}, NETWORKS),
    ('network twice', {'network_mappings': [
        {'source': 'a', 'destination': 'b'}, {'source': 'a', 'destination': 'c'}]},
     'network_mappings: a network is mapped twice'),
    ('address with dashes', {'network_mappings': [
        {'source': 'a', 'destination': 'b', 'mac_address': '00-50-56-ab-cd-ef'}]},
     'network_mappings: mac_address: expected six pairs of hex digits with colons'),
    ('keys as an object', {'luks_keys': {'/dev/sda2': PASSWORD}}, KEYS + ', found an object'),
    ('device without /dev', {'root': 'sda1'}, 'root: expected "first", "single" or "/dev/..."'),
    ('yes for true', {'install_drivers': 'yes'},
     'install_drivers: expected true or false, found a string'),
)
def test_a_mistake_in_a_value_is_told(wrapper, given, lines):
    request = wrapper.request(**given)
    # A schema cannot tell that a network is mapped twice, and not how large a port is.
    assert (not VALIDATORS or violations('request', request) or 'mapped twice' in lines[0]
            or 'at most 65535' in lines[0])
    assert_told(wrapper, 2, lines, request)


# --- the text of the request -------------------------------------------------------------

# This one Python says in another way from 3.13 on.
COMMA = ('Illegal trailing comma before end of object, line 2 column 16'
         if sys.version_info >= (3, 13) else
         'Expecting property name enclosed in double quotes, line 3 column 1')


def as_it_is(data):
    """Return a function that makes something else of a request."""
    return lambda request: data


@rows(
    ('nothing', as_it_is(b''), 'request: is empty, expected a JSON object'),
    ('name of a file', as_it_is(b'request.json\n'),
     'request: does not begin with "{"; ' + HOW),
    ('file of PowerShell', lambda request: request.decode().encode('utf-16'),
     'request: is UTF-16, which ">" of PowerShell writes; expected UTF-8'),
    ('Latin-1', lambda request: request.replace(b'"vm"', b'"\xfcbung"'),
     'request: is not UTF-8'),
    ('list of requests', lambda request: b'[' + request + b']',
     'request: expected one request, not a list'),
    ('one request after the other', lambda request: request + b'\n' + request,
     'request: is not JSON: there is more after the request, line 2 column 1'),
    ('single quotes', lambda request: request.replace(b'"', b"'"),
     'request: is not JSON: Expecting property name enclosed in double quotes, line 1 column 2'),
    ('comma at the end', lambda request: b'{\n"root": "first",\n}',
     'request: is not JSON: ' + COMMA),
    ('comment', lambda request: b'{\n# the guest\n' + request[1:],
     'request: is not JSON: Expecting property name enclosed in double quotes, line 2 column 1'),
    ('Python\'s True', lambda request: b'{"install_drivers": True,' + request[1:],
     'request: is not JSON: Expecting value, line 1 column 21'),
    ('key twice', lambda request: b'{"vm_name": "web",' + request[1:],
     'request: vm_name is given twice'),
    ('string with a request', lambda request: json.dumps(request.decode()).encode(),
     'request: does not begin with "{"; ' + HOW),
)
def test_a_mistake_in_the_text_is_told(wrapper, given, lines):
    assert_told(wrapper, 2, lines, given(json.dumps(wrapper.request()).encode()))


# --- the command line --------------------------------------------------------------------

@rows(
    ('name of a file', ['request.json'], 'usage: the request is no argument; ' + HOW),
    ('name of a file with --wait', ['--wait', 'request.json'],
     'usage: the request is no argument; ' + HOW),
    ('the request itself', [json.dumps({'vmware_password': PASSWORD})],
     'usage: the request is no argument; ' + HOW),
    ('the request as a value', ['--check=' + json.dumps({'vmware_password': PASSWORD})],
     'usage: argument --check: ignored explicit argument; see --help'),
    ('option for a file', ['-f', 'request.json'], 'usage: unknown option: -f; see --help'),
    ('option for the password', ['--password=' + PASSWORD, '-p' + PASSWORD],
     'usage: unknown option: --password, -p; see --help'),
    ('option in another spelling', ['--logdir', '/tmp'],
     'usage: unknown option: --logdir; see --help'),
    ('option without its value', ['--log-dir'],
     'usage: argument --log-dir: expected one argument; see --help'),
)
def test_a_mistake_in_the_command_line_is_told(wrapper, given, lines):
    assert_told(wrapper, 2, lines, None, *given)


def test_a_guest_in_place_of_a_job_is_told(wrapper):
    assert_told(wrapper, 1, ['vm: is not the state file of a job'], None, '--cancel', 'vm')


# --- what the request names on the host --------------------------------------------------

UUIDS = 'export_domain: expected exactly one directory named by a UUID in it, found 0'


@rows(
    ('directory of the UUID', {'export_domain': 'HERE/export/' + DOMAIN},
     UUIDS + '; give the directory above it'),
    ('directory of the images', {'export_domain': 'HERE/export/' + DOMAIN + '/images'}, UUIDS),
    ('file', {'export_domain': 'HERE/virt-v2v-wrapper.py'}, 'export_domain: Not a directory'),
    ('no such directory', {'export_domain': 'HERE/exports'},
     'export_domain: No such file or directory'),
    ('drivers that are not there', {'virtio_win': '/nonexistent/virtio-win.iso'},
     'virtio_win: No such file or directory'),
    ('no such password file',
     {'vmware_password': ABSENT, 'vmware_password_file': 'HERE/password'},
     'vmware_password_file: No such file or directory'),
)
def test_a_mistake_about_the_host_is_told(wrapper, given, lines):
    request = json.dumps(wrapper.request(**given)).replace('HERE', wrapper.directory)
    assert_told(wrapper, 1, lines, request.encode())


def test_a_password_file_for_all_to_read_is_told(wrapper):
    path = os.path.join(wrapper.directory, 'password')
    with open(path, 'w') as stream:
        stream.write(PASSWORD)
    os.chmod(path, 0o644)
    os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)
    request = wrapper.request(vmware_password=ABSENT, vmware_password_file=path)
    assert_told(wrapper, 1, ['vmware_password_file: others may read it: chmod 600 HERE/password'],
                request)


def test_the_directory_in_the_vddk_is_told(wrapper):
    arguments = wrapper.arguments[:-1] + [wrapper.vddk_libdir + '/lib64']
    assert_told(wrapper, 1, [
        '--vddk-libdir HERE/vddk/lib64/lib64: No such file or directory'], None, *arguments)
