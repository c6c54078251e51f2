"""The export domain: what virt-v2v would refuse after the conversion, and the right mount."""
import os

import pytest

from blackbox import DOMAIN
from faults import tamper

SPEC = 'nfs.example.com:/export'


def assert_refused(wrapper, job):
    """Assert that nothing was started because of the export domain, in one line."""
    assert (job.status in (1, 2), job.stdout) == (True, b'')
    assert job.stderr.startswith(b'virt-v2v-wrapper: error: export_domain: ')
    assert job.stderr.count(b'\n') == 1
    wrapper.wait_gone()
    assert wrapper.virt_v2v.runs() == []


# --- what virt-v2v refuses ---------------------------------------------------------------

@pytest.mark.parametrize('name', ['nfs:', 'a:/b', 'x::'])
def test_a_directory_that_virt_v2v_takes_for_a_server_is_refused(wrapper, name):
    """It splits what it gets at ":/"."""
    place = os.path.join(wrapper.directory, name)
    os.makedirs(place)
    os.rename(wrapper.export_domain, os.path.join(place, 'export'))
    job = wrapper.start(wrapper.request(export_domain=os.path.join(place, 'export')))
    assert_refused(wrapper, job)


@pytest.mark.parametrize('name', ['xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx',
                                  'lost+fou-nd  -it i-s no-UUID at all!'])
def test_a_second_name_that_virt_v2v_takes_for_a_uuid_is_refused(wrapper, name):
    """It looks at the length and at the places of the dashes."""
    assert len(name) == len(DOMAIN)
    os.mkdir(os.path.join(wrapper.export_domain, name))
    assert_refused(wrapper, wrapper.start())


# --- the mount ---------------------------------------------------------------------------

# There is no NFS here that could be mounted, so the kernel's list of mounts is made up.
OTHER_LIST = """
import builtins


def reading(original):
    def opened(path, *arguments, **keywords):
        listed = path in ('/proc/self/mountinfo', b'/proc/self/mountinfo')
        return original({path!r} if listed else path, *arguments, **keywords)
    return opened


os.open, builtins.open = reading(os.open), reading(builtins.open)
"""


def device(path):
    """Return the number of the device that a path is on, as the list of mounts has it."""
    number = os.stat(path).st_dev
    return '%d:%d' % (os.major(number), os.minor(number))


ROOT = '25 1 0:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n'
GOOD = '98 25 {device} / {point} rw,relatime shared:1 - nfs4 {spec} rw,vers=4.2\n'
# What lies under another mount is on another device than what is seen there.
BELOW = '98 25 0:987654 / {point} rw,relatime shared:1 - nfs4 {spec} rw,vers=4.2\n'


def start_with_mounts(wrapper, *templates):
    """Start a job on a host whose list of mounts has these lines."""
    path = os.path.join(wrapper.directory, 'mountinfo')
    with open(path, 'w') as stream:
        stream.write(ROOT + ''.join(templates).format(
            device=device(wrapper.export_domain), point=wrapper.export_domain, spec=SPEC,
            above=os.path.dirname(wrapper.export_domain)))
    os.chmod(path, 0o644)
    tamper(wrapper, OTHER_LIST.format(path=path))
    return wrapper.start(wrapper.request(export_domain=SPEC))


def test_an_export_that_is_mounted_is_used_where_it_is(wrapper):
    start_with_mounts(wrapper, GOOD).wait_finished()
    assert wrapper.recorded().option(b'-os') == wrapper.export_domain.encode()


@pytest.mark.parametrize('templates', [
    [GOOD.replace(' / ', ' /sub ')],
    [GOOD.replace('rw,relatime', 'ro,relatime')],
    [BELOW, '99 25 {device} / {above} rw,relatime shared:1 - tmpfs tmpfs rw\n']],
    ids=['a part of it', 'read-only', 'covered'])
def test_a_mount_that_is_not_the_export_domain_is_not_used(wrapper, templates):
    assert_refused(wrapper, start_with_mounts(wrapper, *templates))
