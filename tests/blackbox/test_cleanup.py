"""After any ending but success, nothing that a job has made is left in its target."""
import os
import shutil
import signal

import pytest

import loopback_engine
from blackbox import DOMAIN
from commands import command
from eventually import eventually
from jobs import kill_wrapper, wait_ended
from virt_v2v import error, leave, phase, reach, stdout, wait

pytestmark = pytest.mark.promise(3)

IMAGE = '11111111-0000-4000-8000-0123456789ab'
OTHER = '22222222-0000-4000-8000-0123456789ab'
VM = '33333333-0000-4000-8000-0123456789ab'
DISK = '44444444-0000-4000-8000-0123456789ab'
TARGET = 'Setting up the destination: -o rhv -os /export'


def image_of(name):
    """Say where the disk of an image will be."""
    return stdout(b'RHV: disk: /export/%s/images/%s/%s\n' % (
        DOMAIN.encode(), name.encode(), VM.encode()))


def make_image(wrapper, name):
    """Make an image as virt-v2v does; return its path."""
    path = os.path.join(wrapper.export_domain, DOMAIN, 'images', name)
    os.mkdir(path)
    with open(os.path.join(path, VM), 'wb') as stream:
        stream.write(b'disk')
    os.chown(path, wrapper.user.pw_uid, wrapper.user.pw_gid)
    return path


def start_copying(wrapper, *steps):
    """Start a job that has made an image; then it waits, and plays steps. Return both."""
    wrapper.virt_v2v.play(phase(TARGET), image_of(IMAGE), reach('target'), wait('on'), *steps)
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('target')
    eventually(lambda: job.state().get('images') == [IMAGE], 'the image is in the state')
    return job, make_image(wrapper, IMAGE)


def test_what_a_failed_job_has_made_is_removed(wrapper):
    job, path = start_copying(wrapper, error('no more room'))
    wrapper.virt_v2v.let('on')
    state = job.wait_finished()
    assert not os.path.exists(path)
    assert 'left_behind' not in state


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('target', ['pid', 'wrapper_pid'])
def test_what_an_ended_job_has_made_is_removed(wrapper, target, number):
    job, path = start_copying(wrapper, wait('never'))
    os.kill(job.state()[target], number)
    job.wait_finished()
    assert not os.path.exists(path)


def test_what_a_dead_job_has_made_is_removed_by_the_next(wrapper):
    job, path = start_copying(wrapper, wait('never'))
    virt_v2v = job.state()['pid']
    kill_wrapper(job)
    wait_ended(virt_v2v)
    wrapper.virt_v2v.play(leave(0))
    wrapper.start()
    job.wait_finished()
    assert not os.path.exists(path)


@pytest.mark.parametrize('endings', [('.state',), ('.state', '.lock')], ids=' '.join)
@pytest.mark.parametrize('is_alive', [False, True])
def test_a_copy_of_the_files_of_a_job_is_not_the_job(wrapper, endings, is_alive):
    """Somebody looks at one, or has restored it: the job goes on, and what it has made stays."""
    job, path = start_copying(wrapper, leave(0))
    copy = os.path.join(wrapper.home, 'copy')
    os.mkdir(copy)
    for ending in endings:
        shutil.copy(job.lock_file.replace('.lock', ending), copy)
    for name in [copy] + [os.path.join(copy, name) for name in os.listdir(copy)]:
        os.chown(name, wrapper.user.pw_uid, wrapper.user.pw_gid)
    if is_alive:
        command(wrapper, '--list', '--state-dir', copy)
    wrapper.virt_v2v.let('on')
    assert job.wait_finished()['return_code'] == 0
    wrapper.wait_gone()
    command(wrapper, '--list', '--state-dir', copy)
    assert os.path.exists(path)


def test_what_a_successful_job_has_made_stays(wrapper):
    job, path = start_copying(wrapper, leave(0))
    wrapper.virt_v2v.let('on')
    job.wait_finished()
    assert os.path.exists(path)


def test_the_image_of_another_job_stays(wrapper):
    job, path = start_copying(wrapper, error('no more room'))
    other = make_image(wrapper, OTHER)
    wrapper.virt_v2v.let('on')
    job.wait_finished()
    assert os.path.exists(other) and not os.path.exists(path)


@pytest.mark.promise(8)
def test_an_image_that_the_guest_speaks_of_stays(wrapper):
    wrapper.virt_v2v.play(phase('Inspecting the source'), image_of(OTHER), reach('guest'),
                          wait('on'), error('no operating system'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('guest')
    path = make_image(wrapper, OTHER)
    wrapper.virt_v2v.let('on')
    assert 'images' not in job.wait_finished()
    assert os.path.exists(path)


def test_a_vm_that_is_complete_is_kept(wrapper):
    job, path = start_copying(wrapper, wait('never'))
    vm = os.path.join(wrapper.export_domain, DOMAIN, 'master', 'vms', VM)
    os.mkdir(vm)
    with open(os.path.join(vm, VM + '.ovf'), 'w') as stream:
        stream.write('<File ovf:href="%s/%s"/>' % (IMAGE, VM))
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    message = job.wait_finished()['last_message']['message']
    assert os.path.exists(path)
    assert message.endswith('; but the new VM is complete, and was kept')


def test_what_cannot_be_removed_is_named(wrapper):
    job, path = start_copying(wrapper, error('no more room'))
    os.mkdir(os.path.join(path, 'directory'))
    wrapper.virt_v2v.let('on')
    assert job.wait_finished()['left_behind'] == [path]


def test_the_state_tells_the_target(wrapper):
    job = wrapper.start_waiting()
    assert job.state()['target'] == {
        'type': 'export_domain', 'directory': os.path.join(wrapper.export_domain, DOMAIN)}
    wrapper.virt_v2v.let('end')
    job.wait_finished()


@pytest.fixture
def uploading(wrapper):
    """An engine, and a job that uploads to it and whose processes have all been killed."""
    with loopback_engine.provide(wrapper) as engine:
        wrapper.virt_v2v.play(phase('Setting up the destination: -o rhv-upload'),
                              stdout(b"disk.id = '%s'\n" % DISK.encode()), wait('never'))
        job = wrapper.start(wrapper.request(**engine.keys))
        job.wait_state(lambda state: 'upload' in state, 'the disk is in the state')
        virt_v2v = job.state()['pid']
        kill_wrapper(job)
        wait_ended(virt_v2v)
        wrapper.virt_v2v.play(leave(0))
        yield engine, job


def test_what_a_dead_upload_has_made_is_removed_by_the_next(wrapper, uploading):
    engine, job = uploading
    wrapper.start(wrapper.request(**engine.keys))
    assert 'left_behind' not in job.wait_finished()
    assert engine.removed == ['disks/' + DISK]


def test_what_an_engine_that_is_gone_has_is_named(wrapper):
    with loopback_engine.provide(wrapper) as engine:
        job = wrapper.start_waiting(
            phase('Setting up the destination: -o rhv-upload'),
            stdout(b"disk.id = '%s'\n" % DISK.encode()), request=wrapper.request(**engine.keys))
        job.wait_state(lambda state: 'upload' in state, 'the disk is in the state')
    os.kill(job.state()['pid'], signal.SIGTERM)
    assert job.wait_finished()['left_behind'] == [DISK]


def test_without_its_password_a_dead_upload_is_named(wrapper, uploading):
    engine, job = uploading
    wrapper.start()
    assert job.wait_finished()['left_behind'] == [DISK]
    assert engine.removed == []


@pytest.mark.parametrize('is_known', [False, True])
@pytest.mark.parametrize('status, left', [(404, False), (503, True), (200, False)])
def test_disks_are_removed_only_if_their_vm_is_not_there(wrapper, status, left, is_known):
    """An engine that is starting says neither; the ID of the VM may not have been read yet."""
    ovf = stdout(b"<OperatingSystemSection ovf:id='%s'>\n" % VM.encode())
    with loopback_engine.provide(wrapper) as engine:
        wrapper.virt_v2v.play(
            phase('Setting up the destination: -o rhv-upload'),
            stdout(b"disk.id = '%s'\n" % DISK.encode()), phase('Creating output metadata'),
            [ovf] if is_known else [], reach('end'), wait('never'))
        job = wrapper.start(wrapper.request(**engine.keys))
        wrapper.virt_v2v.wait_for('end')
        pid = job.wait_state(lambda state: 'upload' in state and ('vm_id' in state) is is_known,
                             'what was made is in the state')['pid']
        engine.vm_status = status
        os.kill(pid, signal.SIGKILL)
        state = job.wait_finished()
    assert engine.removed == (['disks/' + DISK] if status == 404 else [])
    assert ('left_behind' in state) is left
