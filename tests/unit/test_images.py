"""What a failed job has made in an export domain is removed, and nothing else is."""
import os

import pytest

from virt_v2v_wrapper import ExportDomain, remove_images

DOMAIN = '0c8d2c6a-0000-4000-8000-0123456789ab'
OURS = '11111111-0000-4000-8000-0123456789ab'
OTHER = '22222222-0000-4000-8000-0123456789ab'
VM = '33333333-0000-4000-8000-0123456789ab'

pytestmark = pytest.mark.promise(8)


@pytest.fixture
def root(tmp_path):
    """The directory of an export domain that has images of two jobs."""
    root = tmp_path / DOMAIN
    for image in (OURS, OTHER):
        (root / 'images' / image).mkdir(parents=True)
        for name in (image, image + '.meta'):
            (root / 'images' / image / name).write_bytes(b'data')
    (root / 'master' / 'vms').mkdir(parents=True)
    return root


def write_ovf(root, vm, text):
    """Write the metadata of a VM."""
    directory = root / 'master' / 'vms' / vm
    directory.mkdir()
    (directory / (vm + '.ovf')).write_text(text)


def contents(root):
    """Return the relative paths of everything below root, directories too."""
    return {os.path.relpath(os.path.join(directory, name), str(root))
            for directory, names, files in os.walk(str(root)) for name in names + files}


def removed(root, images, vm=None):
    """Return what remove_images() has removed, and its answer."""
    before = contents(root)
    answer = remove_images(str(root), images, vm)
    return before - contents(root), answer


def image(name):
    """Return the paths of an image."""
    return {os.path.join('images', name, *more) for more in ([], [name], [name + '.meta'])}


def test_the_images_of_the_job_are_removed_and_no_others(root):
    assert removed(root, [OURS]) == (image(OURS), ([], False))


def test_metadata_that_name_no_image_are_removed_with_them(root):
    write_ovf(root, VM, '')
    vm = {'master/vms/' + VM, 'master/vms/%s/%s.ovf' % (VM, VM)}
    assert removed(root, [OURS], VM) == (image(OURS) | vm, ([], False))


def test_what_a_vm_has_is_kept_with_the_vm(root):
    write_ovf(root, VM, '<File ovf:href="%s/%s"/>' % (OURS, OURS))
    assert removed(root, [OURS], VM) == (set(), ([], True))


@pytest.mark.parametrize('spelling', [OURS, OURS.upper()])
@pytest.mark.parametrize('owner', range(3))
def test_what_the_vm_of_another_job_has_is_kept(root, owner, spelling):
    for number in range(3):         # in whatever order they are found
        write_ovf(root, '4444444%d-0000-4000-8000-0123456789ab' % number,
                  '<File ovf:href="%s"/>' % (spelling if number == owner else OTHER))
    assert removed(root, [OURS], VM) == (set(), ([], True))


@pytest.mark.parametrize('name', [
    '', '.', '..', 'images', '../images/' + OTHER, OTHER + '/', '../master', 'x'])
def test_what_is_no_uuid_is_not_removed(root, name):
    assert removed(root, [name])[0] == set()


def test_a_link_in_place_of_an_image_is_not_followed(root):
    link = root / 'images' / VM
    link.symlink_to(OTHER)
    gone, (left, _) = removed(root, [VM])
    assert gone == set()
    assert left == [str(link)]


def test_a_link_in_an_image_is_removed_and_its_target_stays(root):
    (root / 'images' / OURS / 'link').symlink_to('../' + OTHER)
    removed(root, [OURS])
    assert image(OTHER) <= contents(root)
    assert not (root / 'images' / OURS).exists()


def test_what_cannot_be_removed_is_named(root):
    (root / 'images' / OURS / 'directory').mkdir()
    assert removed(root, [OURS])[1] == ([str(root / 'images' / OURS)], False)


def test_what_is_gone_already_is_not_missed(root):
    assert removed(root, [VM]) == (set(), ([], False))


def test_a_link_in_place_of_the_parts_of_the_domain_is_refused(root):
    (root / 'images').rename(root / 'elsewhere')
    (root / 'images').symlink_to('elsewhere')
    with pytest.raises(OSError):
        remove_images(str(root), [OURS], None)


def vast(path):
    """Make a file that is longer than memory."""
    with open(str(path), 'w') as stream:
        stream.truncate(1 << 40)


@pytest.mark.parametrize('make', [vast, lambda path: path.symlink_to('/dev/zero')],
                         ids=['vast', 'endless'])
def test_where_metadata_cannot_be_read_nothing_is_removed(root, make):
    (root / 'master' / 'vms' / VM).mkdir()
    make(root / 'master' / 'vms' / VM / (VM + '.ovf'))
    with pytest.raises(OSError):
        remove_images(str(root), [OURS], None)
    assert image(OURS) <= contents(root)


def test_a_pipe_in_place_of_metadata_holds_up_nothing(root):
    (root / 'master' / 'vms' / VM).mkdir()
    os.mkfifo(str(root / 'master' / 'vms' / VM / (VM + '.ovf')))
    assert removed(root, [OURS]) == (image(OURS), ([], False))


def test_an_image_that_was_there_at_the_start_is_kept(root):
    domain = ExportDomain(str(root.parent))
    assert domain.clean_up({'images': [OURS]}) == ([], False)
    assert image(OURS) <= contents(root)
