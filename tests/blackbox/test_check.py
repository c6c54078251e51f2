"""What --check tells of a guest and its server, and that nothing comes of it."""
import json
import os
import pwd
import re
import shutil
import signal

import pytest

import loopback_engine
import processes
import web
from commands import command
from faults import tamper
from loopback_engine import make_certificate
from virt_v2v import DISKS, error, leave, reach, source, stdout, wait, warning

GUEST = b"""\
Source guest information (--print-source option):

    source name: vm
hypervisor type: vmware
         memory: 1073741824 (bytes)
disks:
\t0 [scsi]
\t1 [scsi]
NICs:
\tBridge "VM Network" mac: 00:50:56:82:03:0A [vmxnet3]
\tNetwork "Back \xe2\x82\xac"
\tNetwork "\x1b[2J"
"""


def simulated(wrapper):
    """Return a server of VMware."""
    return web.VmwareServer(make_certificate(wrapper.directory), web.Handler, None)


@pytest.fixture
def server(wrapper):
    if os.getuid() != 0:
        pytest.skip('port 902 needs root')
    with simulated(wrapper) as server:
        yield server


def check(wrapper, server, *words, **overrides):
    """Check a request for a guest of the server; return (status, stdout, stderr)."""
    keys = dict({'vmware_uri': server.uri(), 'vmware_fingerprint': server.thumbprint},
                **overrides)
    return command(wrapper, '--check', *words, request=wrapper.request(**keys))


def problems(result):
    """Return the lines that it was refused with."""
    status, stdout, stderr = result
    assert (status, stdout) == (1, '')
    prefix = 'virt-v2v-wrapper: error: '
    lines = stderr.splitlines()
    assert all(line.startswith(prefix) for line in lines)
    return [line[len(prefix):] for line in lines]


def test_check_shows_the_guest_and_where_it_would_go(wrapper, server):
    wrapper.virt_v2v.play([source(disk) for disk in DISKS], warning('may not boot'), stdout(GUEST))
    status, shown, stderr = check(wrapper, server, unheard_of=1, network_mappings=[
        {'source': 'VM Network', 'destination': 'lan'},
        {'source': 'VM Network', 'destination': 'other', 'mac_address': '00:50:56:82:03:0a'},
        {'source': 'Back \u20ac', 'destination': 'wan'}])
    assert (status, stderr) == (0, '')
    lines = shown.splitlines()
    target = lines.pop(6)
    assert lines == [
        'guest:    vm',
        'disk:     [ds1] vm/vm.vmdk',
        'disk:     [ds1] vm/vm_1.vmdk',
        'network:  VM Network 00:50:56:82:03:0A goes to other',
        'network:  Back \u20ac  goes to wan',
        'network:  ?[2J  goes to ovirtmgmt',
        'warning:  may not boot',
        'ignored:  unheard_of']
    assert target.startswith('target:   export_domain, %s/' % wrapper.export_domain)
    assert target.endswith(' GiB free')


def test_with_json_it_is_one_object(wrapper, server):
    wrapper.virt_v2v.play(source(DISKS[0]), warning('may not boot'), stdout(GUEST))
    found = json.loads(check(wrapper, server, '--json', unheard_of=1)[1])
    free, status = found.pop('free_bytes'), os.statvfs(wrapper.export_domain)
    assert isinstance(free, int) and 0 < free < status.f_blocks * status.f_frsize
    assert os.path.dirname(found['target'].pop('directory')) == wrapper.export_domain
    assert found == {
        'vm_name': 'vm', 'disks': [DISKS[0]], 'warnings': ['may not boot'],
        'networks': [
            {'source': 'VM Network', 'mac_address': '00:50:56:82:03:0A',
             'destination': 'ovirtmgmt'},
            {'source': 'Back \u20ac', 'mac_address': '', 'destination': 'ovirtmgmt'},
            {'source': '\x1b[2J', 'mac_address': '', 'destination': 'ovirtmgmt'}],
        'target': {'type': 'export_domain'}, 'ignored_keys': ['unheard_of']}


def test_check_of_an_upload_tells_the_room_in_its_storage(wrapper, server):
    wrapper.virt_v2v.play(stdout(GUEST))
    with loopback_engine.provide(wrapper) as engine:
        _, found, stderr = check(wrapper, server, '--json', **engine.keys)
    assert (stderr, json.loads(found)['free_bytes']) == ('', 5368709120)


@pytest.mark.parametrize('kind, count', [('sha1', 20), ('sha256', 32)])
def test_another_thumbprint_is_refused_and_the_right_one_told(wrapper, server, kind, count):
    real = web.thumbprint(os.path.join(wrapper.directory, 'ca.pem'), kind)
    assert problems(check(wrapper, server, vmware_fingerprint=':'.join(['0A'] * count))) == [
        'vmware_fingerprint: the server has ' + real]
    assert check(wrapper, server, vmware_fingerprint=real)[0] == 0


def test_a_server_that_cannot_be_reached_is_told(wrapper, server):
    uri = server.uri().replace(':%d?' % server.port, ':901?')
    assert problems(check(wrapper, server, vmware_uri=uri)) == [
        'vmware_uri: port 901 of %s cannot be reached: [Errno 111] Connection refused'
        % server.address]
    assert wrapper.virt_v2v.runs() == []


@pytest.mark.parametrize('name', ['a..b', 'a' * 64 + '.b', '[::1::]'])
def test_what_can_be_no_name_of_a_host_is_told(wrapper, server, name):
    status, _, stderr = check(wrapper, server, vmware_uri='esx://root@' + name)
    assert status in (1, 2)         # older Pythons let such an address pass
    assert re.fullmatch('virt-v2v-wrapper: error: vmware_uri: .*\n', stderr)


def test_a_name_of_a_vcenter_s_host_that_can_be_none_is_told(wrapper, server):
    uri = server.uri().replace('esx', 'vpx', 1).replace('?', '/DC/%FF?')
    problem, = problems(check(wrapper, server, vmware_uri=uri))
    assert problem.startswith('vmware_uri: port 902 of \ufffd, where disks are read, ')


def test_a_closed_port_of_the_disks_is_told(wrapper, server):
    server.disks.close()
    assert problems(check(wrapper, server)) == [
        'vmware_uri: port 902 of %s, where disks are read, cannot be reached: [Errno 111] '
        'Connection refused' % server.address]


def test_of_a_vcenter_the_port_of_the_host_is_looked_at(wrapper, server):
    """Which is the last part of the path; the vCenter itself has no disks."""
    host = server.address
    uri = server.uri().replace('esx', 'vpx', 1).replace('?', '/D%%20C/cluster/%s?' % host)
    assert check(wrapper, server, vmware_uri=uri)[0] == 0
    assert problems(check(wrapper, server, vmware_uri=uri.replace(host + '?', '127.0.0.2?'))) == [
        'vmware_uri: port 902 of 127.0.0.2, where disks are read, cannot be reached: [Errno 111] '
        'Connection refused']


def test_all_that_virt_v2v_refuses_is_told_with_a_hint(wrapper, server):
    wrapper.virt_v2v.play(error("cannot find libvirt domain 'vm'"))
    assert problems(check(wrapper, server)) == [
        "source: cannot find libvirt domain 'vm'. Give vm_name as the server spells it, and in"
        ' vmware_uri the host that has it.']


def test_a_virt_v2v_that_fails_without_a_word_is_told(wrapper, server):
    wrapper.virt_v2v.play(leave(1))
    assert problems(check(wrapper, server)) == ['source: virt-v2v ended with status 1.']


def test_listed_disks_are_accepted_where_none_are_named(wrapper, server):
    wrapper.virt_v2v.play(stdout(GUEST))
    assert check(wrapper, server, source_disks=DISKS)[0] == 0


def test_listed_disks_that_the_guest_has_not_are_told(wrapper, server):
    wrapper.virt_v2v.play(source(DISKS[0]), stdout(GUEST))
    assert problems(check(wrapper, server, source_disks=DISKS)) == [
        'source_disks: the guest has no disk %s, but %s' % (DISKS[1], DISKS[0])]


def test_a_virt_v2v_that_hangs_is_ended(wrapper, server):
    tamper(wrapper, 'module.SOURCE_PATIENCE = 0.5')
    wrapper.virt_v2v.play(wait('never'))
    assert problems(check(wrapper, server)) == ['virt-v2v: does not answer']
    assert wrapper.processes() == {}


def test_a_check_that_is_killed_leaves_no_virt_v2v(wrapper, server):
    wrapper.virt_v2v.play(reach('asked'), wait('never'))
    request = wrapper.request(vmware_uri=server.uri(), vmware_fingerprint=server.thumbprint)
    with wrapper.begin(request, *(wrapper.arguments + ['--check'])) as process:
        wrapper.virt_v2v.wait_for('asked')
        for pid in processes.children(process.pid):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 1
    wrapper.wait_gone()
    shutil.rmtree(os.fsdecode(wrapper.recorded().environment[b'TMPDIR']))   # nobody else will


def test_what_is_wrong_with_the_host_is_told_as_by_a_start(wrapper, server):
    os.rmdir(os.path.join(wrapper.export_domain, os.listdir(wrapper.export_domain)[0], 'images'))
    options = ('--vddk-libdir', '/nonexistent')
    checked, started = (problems(command(wrapper, *words, request=wrapper.request()))
                        for words in (options + ('--check',), options))
    assert len(started) == 2
    assert checked == started


def test_a_wrong_request_is_refused_as_by_a_start(wrapper):
    assert command(wrapper, '--check', request=wrapper.request(output_format='vmdk')) == (
        2, '', 'virt-v2v-wrapper: error: output_format: expected "raw" or "qcow2"\n')


@pytest.mark.parametrize('steps', [[stdout(GUEST)], [error('no such guest')]])
def test_check_leaves_nothing_behind(wrapper, server, steps):
    wrapper.virt_v2v.play(*steps)
    check(wrapper, server)
    run = wrapper.recorded()
    assert run.arguments[0] == b'--print-source'
    assert wrapper.processes() == {}
    assert wrapper.files() == []
    assert not os.path.exists(run.environment[b'TMPDIR'])


def test_a_directory_that_is_not_to_be_written_to_is_told(wrapper):
    os.mkdir(wrapper.state_dir)
    os.chown(wrapper.state_dir, wrapper.user.pw_uid, wrapper.user.pw_gid)
    os.chmod(wrapper.state_dir, 0o555)
    found = problems(command(wrapper, '--check', request=wrapper.request()))
    assert found == ['--state-dir %s: nothing can be written to it' % wrapper.state_dir]


def test_directories_that_nobody_could_make_are_told(wrapper, server):
    found = problems(check(wrapper, server, '--log-dir', '/proc/log'))
    assert [line.partition(':')[0] for line in found] == ['--log-dir /proc/log']


def test_root_checks_as_vdsm_does(root_wrapper):
    with simulated(root_wrapper) as server:
        status, _, stderr = check(root_wrapper, server)
    assert (status, stderr) == (0, '')
    vdsm = pwd.getpwnam('vdsm')
    assert set(map(int, root_wrapper.recorded().status['Uid'].split())) == {vdsm.pw_uid}
    assert root_wrapper.files() == []


def test_a_running_job_is_no_reason_to_refuse_a_check(wrapper, server):
    request = wrapper.request(vmware_uri=server.uri(), vmware_fingerprint=server.thumbprint)
    job = wrapper.start_waiting(request=request)
    wrapper.virt_v2v.play()
    assert command(wrapper, '--check', request=request)[0] == 0
    assert job.is_alive()
    wrapper.virt_v2v.let('end')
    job.wait_finished()
