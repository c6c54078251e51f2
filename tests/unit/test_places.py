"""Where a job has its files, and what has to be there before it starts."""
import contextlib
import functools
import grp
import itertools
import json
import os
import pwd
import re
import shutil
import tempfile

import pytest

import virt_v2v_wrapper
from blackbox import valid_request
from loopback_engine import Engine, make_certificate
from results import mode, refusal
from virt_v2v_wrapper import (
    NO_OPTIONS, Directory, ExportDomain, HostError, Identity, Upload, WrapperError, check_host,
    check_ssh, find_drivers, find_nfs_mount, open_private_directory, parse_request)

DOMAIN = '0c8d2c6a-0000-4000-8000-0123456789ab'
OTHER = '1c8d2c6a-0000-4000-8000-0123456789AB'


# --- mounts ------------------------------------------------------------------------------

VDSM_POINT = '/rhev/data-center/mnt/host:_path'


NUMBERS = itertools.count(100)


def mount(source, point, kind='nfs', tags='shared:1 ', root='/', options='rw', more='rw',
          number=None, parent=1):
    """Return a line of /proc/self/mountinfo, of a mount on the root of the host by default."""
    return '{} {} 0:31 {} {} {},relatime {}- {} {} {},vers=4.2\n'.format(
        number or next(NUMBERS), parent, root, point, options, tags, kind, source, more)


ROOT = mount('/dev/sda1', '/', 'ext4', number=1, parent=0)


@pytest.mark.parametrize('spec, mountinfo, point', [
    ('host:/path', '', None),
    ('host:/path', mount('host:/path', '/mnt'), '/mnt'),
    ('host:/path', mount('host:/path', '/mnt', 'nfs4'), '/mnt'),
    ('host:/path', mount('host:/path', '/mnt', tags=''), '/mnt'),
    ('host:/path', mount('host:/path', '/mnt', tags='shared:1 master:2 '), '/mnt'),
    ('host:/path', mount('host:/path/', '/mnt'), '/mnt'),
    ('host:/path/', mount('host:/path', '/mnt'), '/mnt'),
    ('host:/path//', mount('host:/path/', '/mnt'), '/mnt'),
    ('host:/', mount('host:/', '/mnt'), '/mnt'),
    ('[::1]:/p', mount('[::1]:/p', '/mnt'), '/mnt'),
    ('[fe80::1%eth0]:/p', mount('[fe80::1%eth0]:/p', '/mnt'), '/mnt'),
    ('host:/path', mount('host:/path', r'/a\040b\011c\134d\012e'), '/a b\tc\\d\ne'),
    ('host:/a b', mount(r'host:/a\040b', '/mnt'), '/mnt'),
    ('host:/a#b', mount(r'host:/a\043b', '/mnt'), '/mnt'),
    ('host:/\u00fc', mount('host:/\u00fc', '/\u00fc'), '/\u00fc'),
    ('host:/path', mount('host:/path', r'/a\040-\040nfs'), '/a - nfs'),
    ('host:/path', mount('host:/path', VDSM_POINT) + mount('host:/path', '/mnt'), VDSM_POINT),
    ('host:/path', mount('host:/path', '/mnt') + mount('host:/path', VDSM_POINT), VDSM_POINT),
    ('host:/path', mount('host:/other', '/other') + mount('host:/path', '/mnt'), '/mnt'),
    ('host:/path', mount('host:/path', '/first') + mount('host:/path', '/last'), '/last'),
    ('host:/path', mount('host:/path2', '/mnt'), None),
    ('host:/path', mount('host:/path/sub', '/mnt'), None),
    ('host:/path', mount('host:/', '/mnt'), None),
    ('host:/path', mount('host2:/path', '/mnt'), None),
    ('host:/path', mount('/path', '/mnt'), None),
    ('host:/path', mount('host:/path', '/mnt', 'fuse.sshfs'), None),
    ('host:/path', mount('host:/path', '/mnt', 'tmpfs'), None),
    ('host:/path', mount('host:/path', '/mnt', 'nfsd'), None),
    ('host:/path', 'nonsense\n\n - nfs host:/path\n36 25 - nfs\n', None),
])
def test_an_export_is_found_where_it_is_mounted(spec, mountinfo, point):
    others = ROOT + mount('proc', '/proc', 'proc')
    assert find_nfs_mount(spec, others + mountinfo) == point


@pytest.mark.parametrize('how', [{'options': 'ro'}, {'more': 'ro'}, {'root': '/sub'}])
def test_a_mount_that_cannot_be_the_export_domain_does_not_count(how):
    good = mount('host:/path', '/good')
    assert find_nfs_mount('host:/path', ROOT + good + mount('host:/path', '/mnt', **how)) == '/good'
    assert find_nfs_mount('host:/path', ROOT + mount('host:/path', '/mnt', **how)) is None


EXPORT = mount('host:/path', '/a/b', number=7)


@pytest.mark.parametrize('others, point', [
    (mount('tmpfs', '/a/b', 'tmpfs', parent=7), None),
    (mount('tmpfs', '/a', 'tmpfs'), None),
    (mount('tmpfs', '/', 'tmpfs'), None),
    (mount('host:/path', '/a/b', number=8, parent=7), '/a/b'),
    (mount('host:/path', '/a/b', number=8, parent=7) + mount('x', '/a/b', 'tmpfs', parent=8), None),
    (mount('tmpfs', '/a/b/c', 'tmpfs', parent=7), '/a/b'),
    (mount('tmpfs', '/a/bc', 'tmpfs'), '/a/b'),
])
@pytest.mark.parametrize('turned', [False, True])
def test_a_mount_hidden_by_another_does_not_count(others, point, turned):
    lines = (ROOT + EXPORT + others).splitlines(True)
    assert find_nfs_mount('host:/path', ''.join(lines[::-1] if turned else lines)) == point


def test_a_mount_on_another_is_seen():
    mountinfo = (ROOT + mount('tmpfs', '/a', 'tmpfs', number=7)
                 + mount('host:/path', '/a/b', number=8, parent=7))
    assert find_nfs_mount('host:/path', mountinfo) == '/a/b'


@pytest.mark.parametrize('root', [
    mount('/dev/sda1', '/', 'ext4', number=1, parent=4711),     # its parent is outside
    mount('rootfs', '/', 'rootfs', number=1, parent=1),         # it has none
    '',                                                         # a plain directory is the root
])
def test_an_export_is_found_whatever_the_root_is(root):
    others = mount('proc', '/p', 'proc') + mount('tmpfs', '/a', 'tmpfs')
    assert find_nfs_mount('host:/path', root + others + mount('host:/path', '/mnt')) == '/mnt'


# --- the export domain -------------------------------------------------------------------

def make_domain(directory, name=DOMAIN, parts=('images', 'master/vms')):
    """Make an export domain with these parts; return its root."""
    for part in parts:
        os.makedirs(os.path.join(str(directory), name, part))
    os.makedirs(os.path.join(str(directory), name), exist_ok=True)
    return os.path.join(str(directory), name)


# virt-v2v looks at the length and at four dashes only.
@pytest.mark.parametrize('name', [
    DOMAIN, OTHER, '-' * 36, 'xxxxxxxx-yyyy-zzzz-\t   -????????\n???'])
def test_an_export_domain_has_one_directory_named_by_a_uuid(tmp_path, name):
    make_domain(tmp_path, name)
    (tmp_path / '__DIRECT_IO_TEST__').write_text('')
    (tmp_path / ('x' + DOMAIN)).mkdir()
    assert ExportDomain(str(tmp_path)).directory == str(tmp_path)


def test_the_directory_may_be_reached_by_a_link(tmp_path):
    make_domain(tmp_path / 'real')
    (tmp_path / 'link').symlink_to('real')
    assert ExportDomain(str(tmp_path / 'link')).directory == str(tmp_path / 'link')


@pytest.mark.parametrize('names', [
    [], ['images', 'master'], [DOMAIN + 'x'], [DOMAIN[:-1]], [DOMAIN.replace('-', 'x', 1)],
    [DOMAIN.replace('-0', '0-', 1)]])
def test_a_directory_without_a_uuid_is_no_export_domain(tmp_path, names):
    for name in names:
        make_domain(tmp_path, name)
    assert refusal(ExportDomain, str(tmp_path)) == [
        'export_domain: expected exactly one directory named by a UUID in it, found 0']


@pytest.mark.parametrize('second', [OTHER, DOMAIN.replace('0', 'x')])
def test_a_directory_with_two_uuids_is_no_export_domain(tmp_path, second):
    make_domain(tmp_path, DOMAIN)
    make_domain(tmp_path, second)
    assert refusal(ExportDomain, str(tmp_path)) == [
        'export_domain: expected exactly one directory named by a UUID in it, found 2']


@pytest.mark.parametrize('parts, missing', [
    ([], 'images'), (['master/vms'], 'images'), (['images'], 'master/vms'),
    (['images', 'master'], 'master/vms')])
def test_a_domain_without_images_or_vms_is_refused(tmp_path, parts, missing):
    path = os.path.join(make_domain(tmp_path, parts=parts), missing)
    assert refusal(ExportDomain, str(tmp_path)) == [
        'export_domain: ' + path
        + ' is not a directory; is the domain attached to a data center?']


def test_a_file_named_by_a_uuid_is_no_domain(tmp_path):
    (tmp_path / DOMAIN).write_text('')
    assert refusal(ExportDomain, str(tmp_path)) == [
        'export_domain: {} is not a directory; is the domain attached to a data center?'.format(
            tmp_path / DOMAIN)]


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    assert refusal(ExportDomain, str(tmp_path / 'missing')) == [
        'export_domain: No such file or directory']


def test_a_file_is_no_export_domain(tmp_path):
    (tmp_path / 'file').write_text('')
    assert refusal(ExportDomain, str(tmp_path / 'file')) == ['export_domain: Not a directory']


def test_a_path_that_virt_v2v_takes_for_an_export_is_refused(tmp_path):
    (tmp_path / 'host:').mkdir()
    make_domain(tmp_path / 'host:' / 'path')
    assert refusal(ExportDomain, str(tmp_path / 'host:' / 'path')) == [
        'export_domain: virt-v2v takes a path with ":/" in it for an NFS export']


@contextlib.contextmanager
def without_privileges():
    """Be an ordinary user for a while, so that modes of files mean something."""
    if os.getuid() != 0:
        yield
        return
    nobody = pwd.getpwnam('nobody').pw_uid
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_directory():
    """A directory that every user can read, unlike pytest's own."""
    path = tempfile.mkdtemp(dir='/var/tmp')
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize('bits', [0o555, 0o666])
@pytest.mark.parametrize('part', ['', 'images', 'master/vms'])
def test_a_domain_that_cannot_be_written_to_is_refused(open_directory, part, bits):
    root = make_domain(open_directory)
    for name in ('master/vms', 'master', 'images', ''):
        os.chmod(os.path.join(root, name), bits if name == part else 0o777)
    with without_privileges():
        problems = refusal(ExportDomain, open_directory)
        user = pwd.getpwuid(os.geteuid()).pw_name
    os.chmod(os.path.join(root, part), 0o755)
    assert problems == ['export_domain: {} may not write to {}'.format(
        user, os.path.join(root, part).rstrip('/'))]


def test_the_directory_named_by_the_uuid_is_told_apart(tmp_path):
    make_domain(tmp_path, parts=['dom_md'])
    assert refusal(ExportDomain, str(tmp_path / DOMAIN)) == [
        'export_domain: expected exactly one directory named by a UUID in it, found 0; give the'
        ' directory above it']


def test_a_domain_that_cannot_be_read_is_refused(open_directory):
    os.chmod(open_directory, 0)
    with without_privileges():
        problems = refusal(ExportDomain, open_directory)
    os.chmod(open_directory, 0o755)
    assert problems == ['export_domain: Permission denied']


def test_what_is_new_in_a_domain_are_its_images_and_vms(tmp_path):
    root = make_domain(tmp_path, parts=['images/old', 'master/vms/old', 'master/tasks/old'])
    domain = ExportDomain(str(tmp_path))
    make_domain(tmp_path, parts=['master/vms/a', 'images/b', 'images/a', 'master/tasks/a', 'other'])
    assert domain.new_paths() == [
        os.path.join(root, part) for part in ('images/a', 'images/b', 'master/vms/a')]


def test_in_a_domain_that_went_away_nothing_is_new(tmp_path):
    make_domain(tmp_path, parts=['images/old', 'master/vms/old'])
    domain = ExportDomain(str(tmp_path))
    (tmp_path / DOMAIN).rename(tmp_path / 'away')
    assert domain.new_paths() == []


# --- the host ----------------------------------------------------------------------------

USER = Identity('joe', 1000, 1000, '/home/joe')
VDSM = Identity('vdsm', 36, 36, '/var/lib/vdsm')
REQUEST = parse_request(json.dumps(valid_request()).encode())


class Answer:
    """What the launcher is told while the host is looked at."""

    def __init__(self):
        self.told = []

    def send(self, value):
        """Note it."""
        self.told.append(value)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The directory of a host with all that a job needs. No directory is made on it."""
    make_domain(tmp_path / 'export')
    make_vddk(tmp_path / 'vddk', 'libvixDiskLib.so')
    for name in ('bin', 'other'):
        make_program(tmp_path / name)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    monkeypatch.delenv('XDG_STATE_HOME', raising=False)
    monkeypatch.setattr(virt_v2v_wrapper, 'open_private_directory',
                        lambda subject, path, make: Directory(path, 7))
    return tmp_path


def make_vddk(directory, *names):
    """Make a directory with these files in its lib64."""
    (directory / 'lib64').mkdir(parents=True)
    for name in names:
        (directory / 'lib64' / name).write_text('')


def make_program(directory, bits=0o755):
    """Make a directory with a virt-v2v in it."""
    directory.mkdir()
    (directory / 'virt-v2v').write_text('')
    (directory / 'virt-v2v').chmod(bits)


def checked(host, identity=USER, libdir='vddk', directories=(None, None), problems=()):
    """Return the Host of a job on a host."""
    options = NO_OPTIONS._replace(
        log_dir=directories[0], state_dir=directories[1], vddk_libdir=str(host / libdir))
    directory = None if problems else str(host / 'export')
    return check_host(REQUEST, options, identity, directory, problems, Answer())


def test_the_launcher_is_told_what_is_looked_at(host):
    answer = Answer()
    options = NO_OPTIONS._replace(
        log_dir='/l', state_dir='/s', vddk_libdir=str(host / 'vddk'))
    check_host(REQUEST, options, USER, str(host / 'export'), (), answer)
    assert answer.told == [
        'export_domain', '--vddk-libdir %s' % (host / 'vddk'), 'virtio_win', 'virt-v2v',
        '--log-dir /l', '--state-dir /s']


def test_all_that_is_wrong_with_a_host_is_told_at_once(host, monkeypatch):
    def refuse(subject, path, make):
        raise HostError((subject, 'not ours'))
    monkeypatch.setattr(virt_v2v_wrapper, 'open_private_directory', refuse)
    monkeypatch.setenv('PATH', '/nonexistent')
    problems = refusal(checked, host, USER, 'export', ('/d', '/d'), (('export_domain', 'wrong'),))
    assert problems == [
        'export_domain: wrong',
        '--vddk-libdir {}/export/lib64: No such file or directory'.format(host),
        'virt-v2v: not found on PATH',
        '--log-dir and --state-dir /d: not ours']


@pytest.mark.parametrize('name', ['libvixDiskLib.so', 'libvixDiskLib.so.7', 'libvixDiskLib.so.8.0'])
def test_the_vddk_is_there_if_its_library_is(host, name):
    make_vddk(host / 'good', name)
    assert checked(host, libdir='good').libdir == str(host / 'good')


@pytest.mark.parametrize('names', [[], ['libvixMntapi.so.7', 'xlibvixDiskLib.so.7']])
def test_a_directory_without_the_library_is_refused(host, names):
    make_vddk(host / 'bad', *names)
    assert refusal(checked, host, USER, 'bad') == [
        '--vddk-libdir {}/bad: expected lib64/libvixDiskLib.so in it'.format(host)]


def make_search_path(host, names):
    """Return a search path of directories in which there may be a virt-v2v that can be executed."""
    make_program(host / 'plain', 0o644)
    (host / 'directory' / 'virt-v2v').mkdir(parents=True)
    (host / 'empty').mkdir()
    return ':'.join(str(host / name) for name in names)


@pytest.mark.parametrize('names', [
    ['bin'], ['empty', 'bin'], ['plain', 'bin'], ['directory', 'bin'], ['missing', 'bin'],
    ['bin', 'other']])
def test_the_first_virt_v2v_on_path_that_can_run_is_taken(host, monkeypatch, names):
    monkeypatch.setenv('PATH', make_search_path(host, names))
    assert checked(host).virt_v2v == os.fsencode(str(host / 'bin' / 'virt-v2v'))


@pytest.mark.parametrize('names', [[], ['empty'], ['plain'], ['directory'], ['missing', 'empty']])
def test_without_a_virt_v2v_that_can_run_there_is_an_error(host, monkeypatch, names):
    monkeypatch.setenv('PATH', make_search_path(host, names))
    assert refusal(checked, host) == ['virt-v2v: not found on PATH']


@pytest.mark.parametrize('path', ['', '.', 'bin', ':', './bin'])
def test_the_current_directory_is_not_searched(host, monkeypatch, path):
    monkeypatch.setenv('PATH', path)
    monkeypatch.chdir(str(host if 'bin' in path else host / 'bin'))
    assert refusal(checked, host) == ['virt-v2v: not found on PATH']


# --- an engine ---------------------------------------------------------------------------

@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine, and a host that has what an upload needs."""
    for name in ('python3', 'nbdkit'):
        (tmp_path / name).write_text('#!/bin/sh\n')
        (tmp_path / name).chmod(0o755)
    with Engine(str(tmp_path), 'p\u00e4ss&word') as running:
        monkeypatch.setenv('PATH', str(tmp_path))
        yield running


def looked_at(engine, **overrides):
    """Look at the engine for a request that is valid but for the overrides; return the Upload."""
    return Upload(request_for(**dict(engine.keys, **overrides)))


@pytest.mark.parametrize('overrides', [
    {}, {'rhv_cluster': 'other'}, {'vm_name': 'taken', 'new_vm_name': 'vm'},
    {'insecure_connection': True, 'rhv_cafile': '/nonexistent'}])
def test_an_engine_that_has_all_is_accepted(engine, overrides):
    looked_at(engine, **overrides)


CLUSTER = 'not in data center dc, where the storage is; found: Default, other'


@pytest.mark.parametrize('overrides, problem', [
    ({'rhv_password': 'wrong'},
     'rhv_password: the engine does not accept it: Cannot authenticate user admin@internal'),
    ({'rhv_storage': 'x'}, 'rhv_storage: no data center has a storage domain of this name'),
    ({'rhv_cluster': 'x'}, 'rhv_cluster: ' + CLUSTER),
    ({'vm_name': 'taken'}, 'new_vm_name: the engine has a VM taken already'),
    ({'new_vm_name': 'taken'}, 'new_vm_name: the engine has a VM taken already'),
    ({'rhv_cafile': '/nonexistent'}, 'rhv_cafile: No such file or directory')])
def test_what_an_engine_lacks_is_named(engine, overrides, problem):
    assert refusal(functools.partial(looked_at, engine, **overrides)) == [problem]


def test_another_server_is_no_engine(engine):
    url = engine.keys['rhv_url'].replace('ovirt-engine', 'other')
    assert refusal(functools.partial(looked_at, engine, rhv_url=url)) == [
        'rhv_url: expected an oVirt engine there, got HTTP status 404']


def test_a_server_that_is_not_there_is_named(engine):
    url = re.sub(':[0-9]+/', ':1/', engine.keys['rhv_url'])
    assert refusal(functools.partial(looked_at, engine, rhv_url=url)) == [
        'rhv_url: [Errno 111] Connection refused']


@pytest.mark.parametrize('name', ['a..b', 'a' * 64 + '.b', '[::1::]'])
def test_what_can_be_no_name_of_a_host_is_refused(engine, name):
    url = 'https://%s/ovirt-engine/api' % name
    problem, = refusal(functools.partial(looked_at, engine, rhv_url=url), error=WrapperError)
    assert problem.startswith('rhv_url: ')


def test_a_server_that_is_not_trusted_is_refused(engine, tmp_path, monkeypatch):
    (tmp_path / 'other').mkdir()
    monkeypatch.undo()          # openssl is where PATH was
    other = make_certificate(str(tmp_path / 'other'))
    monkeypatch.setenv('PATH', str(tmp_path))
    problem, = refusal(functools.partial(looked_at, engine, rhv_cafile=other))
    assert re.match('rhv_url: .*certificate verify failed', problem)


@pytest.mark.parametrize('program, missing', [
    ('python3', 'the Python module ovirtsdk4'), ('nbdkit', 'the Python plugin of nbdkit')])
def test_what_a_host_lacks_for_an_upload_is_named(engine, tmp_path, program, missing):
    (tmp_path / program).write_text('#!/bin/sh\nexit 1\n')
    assert refusal(looked_at, engine) == ['this host: needs {} for an upload'.format(missing)]


MADE = {'upload': {'disks': ['d'], 'transfers': ['t']}}


def test_a_disk_is_removed_that_was_locked_by_its_transfer(engine):
    engine.transfers, engine.refusals = {'t'}, [409]
    assert looked_at(engine).clean_up(MADE) == ([], False)
    assert engine.removed == ['disks/d']


def test_a_disk_that_the_engine_keeps_is_left(engine, monkeypatch):
    monkeypatch.setattr(virt_v2v_wrapper, 'CLEAN_PATIENCE', virt_v2v_wrapper.SERVER_PATIENCE + 0.5)
    engine.refusals = [403]
    assert looked_at(engine).clean_up(MADE) == (['d'], False)


def test_the_disks_of_a_vm_that_the_engine_has_are_kept(engine):
    engine.vm_status, engine.transfers = 200, {'t'}
    assert looked_at(engine).clean_up(dict(MADE, vm_id='v')) == ([], True)
    assert (engine.removed, engine.transfers) == ([], {'t'})


# --- drivers and host keys ---------------------------------------------------------------

def request_for(**overrides):
    """Return a Request that is valid but for the overrides."""
    return parse_request(json.dumps(valid_request(**overrides)).encode('utf-8'))


@pytest.mark.parametrize('name', ['x.iso', 'x'])
def test_drivers_that_are_named_are_taken(tmp_path, name):
    (tmp_path / 'x.iso').write_text('')
    (tmp_path / 'x').mkdir()
    path = str(tmp_path / name)
    assert find_drivers(request_for(virtio_win=path)) == os.fsencode(path)


def test_drivers_that_are_named_and_missing_are_a_problem(host):
    path = str(host / '\u00fc.iso')
    options = NO_OPTIONS._replace(vddk_libdir=str(host / 'vddk'))
    assert refusal(check_host, request_for(virtio_win=path), options, USER, str(host / 'export'),
                   (), Answer()) == ['virtio_win: No such file or directory']


@pytest.mark.parametrize('names, best', [
    (['virtio-win-1.iso', 'rhv-tools-1.iso', 'rhv-tools-2.iso'], 'rhv-tools-2.iso'),
    (['oVirt-toolsSetup-4.iso', 'RHV-toolsSetup_4.4.iso'], 'RHV-toolsSetup_4.4.iso'),
    (['virtio-win.iso', 'other.iso'], 'virtio-win.iso'),
    (['virtio-win-0.1.96.iso', 'virtio-win-0.1.248.iso'], 'virtio-win-0.1.248.iso'),
    (['other.iso'], None)])
def test_the_best_drivers_are_looked_for(tmp_path, monkeypatch, names, best):
    for name in names:
        (tmp_path / name).write_text('')
    monkeypatch.setattr(virt_v2v_wrapper, '_DRIVERS', [
        str(tmp_path / os.path.basename(pattern)) for pattern in virt_v2v_wrapper._DRIVERS[:5]])
    assert find_drivers(request_for(install_drivers=True)) == (
        best and os.fsencode(str(tmp_path / best)))


SSH_KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGrL2B4sOAsNmyHCc6JxF0Qjd3d9vPQ1P9E1b3nWZs3f'


def ask_for(host_part, home):
    """Check whether the key of the host of this URI is known to a user with that home."""
    request = request_for(transport_method='ssh', vm_name='ssh://root@%s/vm.vmx' % host_part)
    check_ssh('vm_name', request, None, USER._replace(home=str(home)))


@pytest.fixture
def home(tmp_path):
    """A home in which the keys of some hosts are known."""
    if not shutil.which('ssh-keygen', path='/usr/bin:/bin'):
        pytest.skip('needs ssh-keygen')
    (tmp_path / '.ssh').mkdir()
    (tmp_path / '.ssh' / 'known_hosts').write_text(''.join(
        '%s %s\n' % (name, SSH_KEY) for name in ('esx.example', '[esx.example]:2222', '::1')))
    return tmp_path


@pytest.mark.parametrize('host_part', [
    'esx.example', 'esx.example:22', 'esx.example:2222', '[::1]', '[::1]:22'])
def test_a_host_whose_key_is_known_is_accepted(home, host_part):
    ask_for(host_part, home)


@pytest.mark.parametrize('host_part, name, port, host', [
    ('other.example', 'other.example', 22, 'other.example'),
    ('esx.example:23', '[esx.example]:23', 23, 'esx.example'),
    ('[::2]:2222', '[::2]:2222', 2222, '::2')])
def test_a_host_whose_key_is_not_known_is_refused(home, host_part, name, port, host):
    assert refusal(ask_for, host_part, home) == [
        'vm_name: the host key of {} is not known; have root check and add it: ssh-keyscan -p {} {}'
        ' >> /etc/ssh/ssh_known_hosts'.format(name, port, host)]


# --- who and where -----------------------------------------------------------------------

VDSM_PLACES = ('/var/log/vdsm/import', '/run/vdsm/virt-v2v-wrapper')


@pytest.mark.parametrize('identity, given, xdg_state_home, directories', [
    (VDSM, (None, None), None, VDSM_PLACES),
    (VDSM, (None, None), '/x', VDSM_PLACES),
    (USER, (None, None), None, ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (USER, (None, None), '', ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (USER, (None, None), 'x/y', ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (USER, (None, None), '/x/y', ('/x/y/virt-v2v-wrapper',) * 2),
    (USER._replace(home=''), (None, None), None, ('/.local/state/virt-v2v-wrapper',) * 2),
    (VDSM, ('/l', None), None, ('/l', '/run/vdsm/virt-v2v-wrapper')),
    (VDSM, (None, '/s'), None, ('/var/log/vdsm/import', '/s')),
    (USER, ('/l', '/s'), '/x', ('/l', '/s')),
])
def test_the_directories_are_those_of_the_user_unless_given(
        host, monkeypatch, identity, given, xdg_state_home, directories):
    monkeypatch.setenv('HOME', '/elsewhere')
    if xdg_state_home is not None:
        monkeypatch.setenv('XDG_STATE_HOME', xdg_state_home)
    places = checked(host, identity, directories=given)
    assert (places.logs, places.states) == (Directory(directories[0], 7),
                                            Directory(directories[1], 7))


def test_an_ordinary_user_stays_who_he_is():
    with without_privileges():
        entry, identity = pwd.getpwuid(os.geteuid()), Identity.find()
        group = os.getegid() or entry.pw_gid
    assert identity == Identity(entry.pw_name, entry.pw_uid, group, entry.pw_dir)


def test_a_directory_that_is_missing_is_made(tmp_path):
    os.close(open_private_directory('--log-dir', str(tmp_path / 'a' / 'b')).fd)
    assert mode(tmp_path / 'a' / 'b') == 0o755


@pytest.mark.parametrize('bits', [0o755, 0o700, 0o750])
def test_a_directory_of_our_own_is_used_as_it_is(tmp_path, bits):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd').chmod(bits)
    fd = open_private_directory('--log-dir', str(tmp_path / 'd')).fd
    try:
        assert os.path.samestat(os.fstat(fd), os.stat(str(tmp_path / 'd')))
    finally:
        os.close(fd)
    assert mode(tmp_path / 'd') == bits


@pytest.mark.parametrize('bits', [0o775, 0o757, 0o777, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path, bits):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd').chmod(bits)
    assert refusal(open_private_directory, '--log-dir', str(tmp_path / 'd')) == [
        '--log-dir: others may write to it (mode {:04o}), expected {} alone: chmod go-w {}'.format(
            bits, pwd.getpwuid(os.geteuid()).pw_name, tmp_path / 'd')]


def test_a_directory_of_somebody_else_is_refused():
    with without_privileges():
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
        assert refusal(open_private_directory, '--log-dir', '/') == [
            '--log-dir: belongs to root, expected a directory of {0}; one in it will do: install -d'
            ' -o {0} -g {1} /virt-v2v-wrapper'.format(user, group)]


def test_a_link_to_a_directory_is_refused(tmp_path):
    (tmp_path / 'link').symlink_to(str(tmp_path))
    assert refusal(open_private_directory, '--log-dir', str(tmp_path / 'link')) == [
        '--log-dir: Not a directory']


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    assert refusal(open_private_directory, '--log-dir', str(tmp_path / 'file')) == [
        '--log-dir: File exists']


def test_what_only_root_can_make_comes_with_the_command(open_directory):
    os.chmod(open_directory, 0o555)
    path = os.path.join(open_directory, "it's", 'new')
    with without_privileges():
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
        problems = refusal(open_private_directory, '--log-dir', path)
    assert problems == [
        '--log-dir: is missing, and may only be made by root: install -d -o {} -g {} {}'.format(
            user, group, "'{}/it'\"'\"'s/new'".format(open_directory))]
