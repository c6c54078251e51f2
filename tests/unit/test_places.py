"""Directories: where a job puts its files, and what has to be there before it starts."""
import contextlib
import os
import pwd

import pytest

from results import mode, refusal
from virt_v2v_wrapper import (
    Identity, Options, check_vddk_libdir, domain_contents, export_domain_root,
    find_identity, find_nfs_mount, job_directories, make_first_missing, make_scratch,
    open_private_directory, remove_tree)

DOMAIN = '0c8d2c6a-0000-4000-8000-0123456789ab'
OTHER = '1c8d2c6a-0000-4000-8000-0123456789AB'
NOT_OURS = ('expected a directory that belongs to the user who runs the conversion, and that nobody'
            ' else may write to')


# --- mounts ------------------------------------------------------------------------------

VDSM_POINT = '/rhev/data-center/mnt/host:_path'


def mount(source, point, kind='nfs', tags='shared:1 '):
    """Return a line of /proc/self/mountinfo."""
    return '36 25 0:31 / {} rw,relatime {}- {} {} rw,vers=4.2\n'.format(point, tags, kind, source)


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
    others = mount('/dev/sda1', '/', 'ext4') + mount('proc', '/proc', 'proc')
    assert find_nfs_mount(spec, others + mountinfo) == point


# --- the export domain -------------------------------------------------------------------

def make_domain(directory, name=DOMAIN, parts=('images', 'master/vms')):
    """Make an export domain with these parts; return its root."""
    for part in parts:
        os.makedirs(os.path.join(str(directory), name, part))
    os.makedirs(os.path.join(str(directory), name), exist_ok=True)
    return os.path.join(str(directory), name)


@pytest.mark.parametrize('name', [DOMAIN, OTHER])
def test_an_export_domain_has_one_directory_named_by_a_uuid(tmp_path, name):
    root = make_domain(tmp_path, name)
    (tmp_path / '__DIRECT_IO_TEST__').write_text('')
    (tmp_path / ('x' + DOMAIN)).mkdir()
    assert export_domain_root(str(tmp_path)) == root


def test_the_directory_may_be_reached_by_a_link(tmp_path):
    make_domain(tmp_path / 'real')
    (tmp_path / 'link').symlink_to('real')
    assert export_domain_root(str(tmp_path / 'link')) == str(tmp_path / 'link' / DOMAIN)


@pytest.mark.parametrize('names', [[], ['images', 'master'], [DOMAIN + 'x'], [DOMAIN[:-1]]])
def test_a_directory_without_a_uuid_is_no_export_domain(tmp_path, names):
    for name in names:
        make_domain(tmp_path, name)
    assert refusal(export_domain_root, str(tmp_path)) == [
        'export_domain: expected exactly one directory named by a UUID in it, found 0']


def test_a_directory_with_two_uuids_is_no_export_domain(tmp_path):
    make_domain(tmp_path, DOMAIN)
    make_domain(tmp_path, OTHER)
    assert refusal(export_domain_root, str(tmp_path)) == [
        'export_domain: expected exactly one directory named by a UUID in it, found 2']


@pytest.mark.parametrize('parts, missing', [
    ([], 'images'), (['master/vms'], 'images'), (['images'], 'master/vms'),
    (['images', 'master'], 'master/vms')])
def test_a_domain_without_images_or_vms_is_refused(tmp_path, parts, missing):
    path = os.path.join(make_domain(tmp_path, parts=parts), missing)
    assert refusal(export_domain_root, str(tmp_path)) == [
        'export_domain: ' + path
        + ' is not a directory; is the domain attached to a data center?']


def test_a_file_named_by_a_uuid_is_no_domain(tmp_path):
    (tmp_path / DOMAIN).write_text('')
    assert refusal(export_domain_root, str(tmp_path)) == [
        'export_domain: {} is not a directory; is the domain attached to a data center?'.format(
            tmp_path / DOMAIN)]


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    assert refusal(export_domain_root, str(tmp_path / 'missing')) == [
        'export_domain: No such file or directory']


def test_a_file_is_no_export_domain(tmp_path):
    (tmp_path / 'file').write_text('')
    assert refusal(export_domain_root, str(tmp_path / 'file')) == ['export_domain: Not a directory']


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
    path = os.fsdecode(make_scratch())
    os.chmod(path, 0o755)
    yield path
    remove_tree(path)


@pytest.mark.parametrize('part', ['', 'images', 'master/vms'])
def test_a_domain_that_cannot_be_written_to_is_refused(open_directory, part):
    root = make_domain(open_directory)
    for name in ('', 'images', 'master', 'master/vms'):
        os.chmod(os.path.join(root, name), 0o555 if name == part else 0o777)
    with without_privileges():
        problems = refusal(export_domain_root, open_directory)
    os.chmod(os.path.join(root, part), 0o755)
    assert problems == ['export_domain: may not write to ' + os.path.join(root, part).rstrip('/')]


def test_a_domain_that_cannot_be_read_is_refused(open_directory):
    os.chmod(open_directory, 0)
    with without_privileges():
        problems = refusal(export_domain_root, open_directory)
    os.chmod(open_directory, 0o755)
    assert problems == ['export_domain: Permission denied']


def test_the_contents_of_a_domain_are_its_images_and_vms(tmp_path):
    root = make_domain(tmp_path, parts=['images/a', 'images/b', 'master/vms/c', 'master/tasks/d'])
    assert domain_contents(root) == {'images/a', 'images/b', 'master/vms/c'}


def test_a_domain_that_went_away_has_no_contents(tmp_path):
    assert domain_contents(str(tmp_path / 'missing')) == set()


# --- the VDDK ----------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['libvixDiskLib.so', 'libvixDiskLib.so.7', 'libvixDiskLib.so.8.0'])
def test_the_vddk_is_there_if_its_library_is(tmp_path, name):
    (tmp_path / 'lib64').mkdir()
    (tmp_path / 'lib64' / name).write_text('')
    assert check_vddk_libdir(str(tmp_path)) is None


@pytest.mark.parametrize('names', [[], ['libvixMntapi.so.7', 'xlibvixDiskLib.so.7']])
def test_a_directory_without_the_library_is_refused(tmp_path, names):
    (tmp_path / 'lib64').mkdir()
    for name in names:
        (tmp_path / 'lib64' / name).write_text('')
    assert refusal(check_vddk_libdir, str(tmp_path)) == [
        '--vddk-libdir {}: expected lib64/libvixDiskLib.so in it'.format(tmp_path)]


def test_a_directory_without_lib64_is_refused(tmp_path):
    assert refusal(check_vddk_libdir, str(tmp_path)) == [
        '--vddk-libdir {}/lib64: No such file or directory'.format(tmp_path)]


# --- who and where -----------------------------------------------------------------------

NONE = Options(None, None, None)
VDSM = Identity('vdsm', 36, 36, '/var/lib/vdsm', True)
USER = Identity('joe', 1000, 1000, '/home/joe', False)


@pytest.mark.parametrize('options, identity, environment, directories', [
    (NONE, VDSM, {}, ('/var/log/vdsm/import', '/run/vdsm/virt-v2v-wrapper')),
    (NONE, VDSM._replace(drop=False), {}, ('/var/log/vdsm/import', '/run/vdsm/virt-v2v-wrapper')),
    (NONE, VDSM, {'XDG_STATE_HOME': '/x'}, ('/var/log/vdsm/import', '/run/vdsm/virt-v2v-wrapper')),
    (NONE, USER, {}, ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (NONE, USER, {'XDG_STATE_HOME': ''}, ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (NONE, USER, {'XDG_STATE_HOME': 'x/y'}, ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (NONE, USER, {'XDG_STATE_HOME': '/x/y'}, ('/x/y/virt-v2v-wrapper',) * 2),
    (NONE, USER, {'HOME': '/elsewhere'}, ('/home/joe/.local/state/virt-v2v-wrapper',) * 2),
    (Options('/l', None, None), VDSM, {}, ('/l', '/run/vdsm/virt-v2v-wrapper')),
    (Options(None, '/s', None), VDSM, {}, ('/var/log/vdsm/import', '/s')),
    (Options('/l', '/s', None), USER, {'XDG_STATE_HOME': '/x'}, ('/l', '/s')),
])
def test_the_directories_are_those_of_the_user_unless_given(
        options, identity, environment, directories):
    assert job_directories(options, identity, environment) == directories


def test_an_ordinary_user_stays_who_he_is():
    with without_privileges():
        entry, identity = pwd.getpwuid(os.geteuid()), find_identity()
    assert identity == Identity(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, False)


def test_a_directory_that_is_missing_is_made(tmp_path):
    os.close(open_private_directory(str(tmp_path / 'a' / 'b')))
    assert mode(tmp_path / 'a' / 'b') == 0o755


@pytest.mark.parametrize('bits', [0o755, 0o700, 0o750])
def test_a_directory_of_our_own_is_used_as_it_is(tmp_path, bits):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd').chmod(bits)
    fd = open_private_directory(str(tmp_path / 'd'))
    try:
        assert os.path.samestat(os.fstat(fd), os.stat(str(tmp_path / 'd')))
    finally:
        os.close(fd)
    assert mode(tmp_path / 'd') == bits


@pytest.mark.parametrize('bits', [0o775, 0o757, 0o777, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path, bits):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd').chmod(bits)
    assert refusal(open_private_directory, str(tmp_path / 'd')) == [
        '{}: {}'.format(tmp_path / 'd', NOT_OURS)]


def test_a_directory_of_somebody_else_is_refused():
    with without_privileges():
        assert refusal(open_private_directory, '/') == ['/: ' + NOT_OURS]


def test_a_link_to_a_directory_is_refused(tmp_path):
    (tmp_path / 'link').symlink_to(str(tmp_path))
    assert refusal(open_private_directory, str(tmp_path / 'link')) == [
        '{}: Not a directory'.format(tmp_path / 'link')]


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    assert refusal(open_private_directory, str(tmp_path / 'file')) == [
        '{}: File exists'.format(tmp_path / 'file')]


as_root = pytest.mark.skipif(os.getuid() != 0, reason='needs root')


@as_root
def test_root_makes_the_first_missing_directory_for_the_user(tmp_path):
    make_first_missing(str(tmp_path / 'a' / 'b'), USER)
    status = os.stat(str(tmp_path / 'a'))
    assert (status.st_uid, status.st_gid) == (USER.uid, USER.gid)
    assert not (tmp_path / 'a' / 'b').exists()


@as_root
def test_root_leaves_a_directory_that_is_there_as_it_is(tmp_path):
    make_first_missing(str(tmp_path), USER)
    assert os.stat(str(tmp_path)).st_uid == 0


@as_root
@pytest.mark.parametrize('bits, owner', [(0o777, 0), (0o775, 0), (0o755, 1000)])
def test_root_makes_nothing_where_others_may_write(tmp_path, bits, owner):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd').chmod(bits)
    os.chown(str(tmp_path / 'd'), owner, owner)
    make_first_missing(str(tmp_path / 'd' / 'a'), USER)
    assert os.listdir(str(tmp_path / 'd')) == []
