"""What can be broken in one line of the script without any other test noticing."""
import fcntl
import os
import re
import signal

import pytest

import processes
from eventually import eventually
from faults import FailingCall, last_message, tamper, traced
from jobs import wait_ended
from virt_v2v import (
    DISKS, bar, copying, daemon, error, flat, fork, json_message, leave, phase, reach,
    source, stderr, stdout, wait)

VM_ID = '6f6a3c2e-3b7f-4d0c-9a0b-1f0a5f2c8f11'
OVF = ("<Section ovf:id='%s' ovf:required='false'"
       " xsi:type='ovf:OperatingSystemSection_Type'>\n" % VM_ID)
IMAGE = 'export/0c8d2c6a-0000-4000-8000-0123456789ab/images/new'


# --- the order to stop -------------------------------------------------------------------

# A virt-v2v that needs two seconds to clean up.
SLOW = """\
#!/bin/sh
case $1 in --*) exec "${0%/*}/../bin.real/virt-v2v" "$@" ;; esac
trap 'echo cleaning up; /bin/sleep 2; echo clean; exit 1' TERM
: > "${0%/*}/../home/ready"
while :; do /bin/sleep 0.05; done
"""


@pytest.mark.promise(11)
def test_virt_v2v_has_time_to_clean_up_after_the_order_to_stop(wrapper):
    os.rename(wrapper.virt_v2v.bin, wrapper.virt_v2v.bin + '.real')
    os.mkdir(wrapper.virt_v2v.bin, 0o755)
    wrapper.add_program('virt-v2v', SLOW)
    job = wrapper.start()
    eventually(lambda: 'ready' in wrapper.files(), 'virt-v2v runs')
    os.kill(job.state()['wrapper_pid'], signal.SIGTERM)
    assert job.wait_finished()['return_code'] == 1
    assert job.log('v2v_log') == b'cleaning up\nclean\n'


# --- descendants -------------------------------------------------------------------------

@pytest.mark.promise(4)
def test_a_chain_of_daemons_is_gone_when_the_end_is_published(wrapper):
    """Each becomes the wrapper's own child only when the one above it is gone."""
    chain = daemon(daemon(daemon(reach('deepest'), wait('never')), wait('never')), wait('never'))
    job = wrapper.start_waiting(chain)
    wrapper.virt_v2v.wait_for('deepest')
    found = job.state()
    started = set(wrapper.processes()) - {found['wrapper_pid']}
    guardian_s = int(processes.status(found['wrapper_pid'])['PPid'])
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert [process for process in started - {guardian_s} if processes.is_running(process)] == []


@pytest.mark.promise(4)
def test_descendants_that_may_not_be_killed_hold_up_no_end(wrapper):
    tamper(wrapper, 'module.END_PATIENCE = 1.0')
    job = wrapper.start_waiting(daemon(reach('daemon'), wait('never')))
    wrapper.virt_v2v.wait_for('daemon')
    call = FailingCall(job.state()['wrapper_pid'], 'kill,?pidfd_send_signal,?tgkill', 'EPERM')
    call.fail()
    wrapper.virt_v2v.let('end')
    state = job.wait_finished()
    call.work()
    for process in wrapper.processes():
        os.kill(process, signal.SIGKILL)
    assert state['return_code'] == 0
    assert b'internal error' not in job.log('wrapper_log')


# --- the last output ---------------------------------------------------------------------

F_GETPIPE_SZ = 1032


def pipe_size(process):
    """Return how much fits into the pipe that is the stdout of a process."""
    end = os.open('/proc/%d/fd/1' % process, os.O_WRONLY)
    try:
        return fcntl.fcntl(end, F_GETPIPE_SZ)
    finally:
        os.close(end)


@pytest.mark.promise(4)
def test_all_that_is_in_the_pipe_at_the_end_is_in_the_log(wrapper):
    job = wrapper.start_waiting()
    found = job.state()
    # As many bytes as fit, so that virt-v2v ends although nobody reads.
    burst = b''.join(b'%07d\n' % number for number in range(pipe_size(found['pid']) // 8 - 512))
    assert len(burst) > 60000
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    wrapper.use('2.2.0')
    wrapper.virt_v2v.play(reach('running'), wait('go'), stdout(burst), leave(0))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('running')
    found = job.state()
    os.kill(found['wrapper_pid'], signal.SIGSTOP)
    wrapper.virt_v2v.let('go')
    wait_ended(found['pid'])
    os.kill(found['wrapper_pid'], signal.SIGCONT)
    job.wait_finished()
    assert job.log('v2v_log') == burst


# --- the state file ----------------------------------------------------------------------

@pytest.mark.promise(2)
def test_a_state_is_flushed_renamed_and_flushed_again(wrapper):
    """First the file, then its name in the directory: so that it survives a power failure."""
    job = wrapper.start_waiting()
    with traced(job.state()['wrapper_pid'], '-y', '-e',
                'trace=fsync,fdatasync,?rename,?renameat,renameat2') as log:
        wrapper.virt_v2v.let('end')
        job.wait_finished()
        wrapper.wait_gone()
        calls = re.findall(r'^(fsync|fdatasync|rename)\w*\((.*)\) += 0$', log(), re.MULTILINE)
    assert [name.replace('data', '') for name, _ in calls[-3:]] == ['fsync', 'rename', 'fsync']
    assert '<%s>' % wrapper.state_dir in calls[-1][1]


@pytest.mark.promise(2)
def test_a_directory_that_cannot_be_flushed_holds_up_no_end(wrapper):
    """The state is in its place by then."""
    job = wrapper.start_waiting()
    call = FailingCall(job.state()['wrapper_pid'], 'fsync,fdatasync', 'EIO',
                       paths=[wrapper.state_dir])
    call.fail()
    wrapper.virt_v2v.let('end')
    try:
        state = job.wait_finished()
        wrapper.wait_gone()
    finally:
        call.work()
    assert (state['return_code'], 'failed' in state) == (0, False)
    assert b' WARNING ' in job.log('wrapper_log')


def start_with_rare_progress(wrapper, *steps):
    """Start a job that plays steps right after some progress, which is not published soon."""
    tamper(wrapper, 'module.PUBLISH_INTERVAL = 600.0')
    wrapper.virt_v2v.play(source(DISKS[0]), copying(1, 1), wait('go'), bar(20), *steps, wait('end'))
    job = wrapper.start()
    job.wait_state(lambda state: 'phase' in state, 'it is copying')
    wrapper.virt_v2v.let('go')
    return job


@pytest.mark.parametrize('generation, steps', [
    ('2.2.0', list(flat([error('no space')]))[:-1]),
    ('1.40.2', [stderr(b'virt-v2v: error: no space\n')])], ids=['message', 'line'])
def test_an_error_right_after_progress_is_published(wrapper, generation, steps):
    wrapper.use(generation)
    job = start_with_rare_progress(wrapper, *steps)
    state = job.wait_state(lambda state: 'last_message' in state, 'the error is published')
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert last_message(state) == 'no space'


def test_the_vm_s_id_right_after_progress_is_published(wrapper):
    job = start_with_rare_progress(wrapper, stdout(OVF.encode()))
    state = job.wait_state(lambda state: 'vm_id' in state, 'the ID is published')
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert state['vm_id'] == VM_ID


# --- the answer --------------------------------------------------------------------------

@pytest.mark.promise(6)
def test_an_answer_nobody_takes_is_over_when_the_job_is_gone(wrapper):
    wrapper.virt_v2v.play(fork(wait('never')), daemon(wait('never')), wait('never'))
    with open('/dev/full', 'wb') as full:
        job = wrapper.start(stdout=full)
    left = wrapper.processes()
    assert job.status == 1
    assert left == {}


@pytest.mark.promise(6)
def test_paths_too_long_for_the_pipe_do_not_hang_the_start(wrapper):
    """There is room for a part of them, and nobody reads."""
    tamper(wrapper, 'module.PRINT_PATIENCE = 0.3')
    deep = os.path.join(wrapper.home, *['d' * 250] * 11)
    wrapper.virt_v2v.play(wait('never'))
    reading, writing = os.pipe()
    try:
        size = fcntl.fcntl(writing, 1031, 8192)        # F_SETPIPE_SZ
        os.write(writing, bytes(size - 4096))
        job = wrapper.start(None, '--log-dir', deep, '--state-dir', deep, '--vddk-libdir',
                            wrapper.vddk_libdir, stdout=writing)
    finally:
        os.close(reading)
        os.close(writing)
    assert job.status == 1
    assert b'standard output' in job.stderr
    wrapper.wait_gone()


def test_a_problem_of_both_directories_is_said_once(wrapper):
    place = os.path.join(wrapper.directory, 'foreign')
    os.mkdir(place)
    os.chmod(place, 0o777)
    job = wrapper.start(None, '--log-dir', place, '--state-dir', place, '--vddk-libdir',
                        wrapper.vddk_libdir)
    assert job.status == 1
    assert job.stderr.count(b'\n') == 1


# --- the wrapper's log -------------------------------------------------------------------

# A mistake at each message of virt-v2v.
MISTAKE = """
import json, types


def loads(text, *arguments, **keywords):
    if '"timestamp"' in (text if isinstance(text, str) else text.decode()):
        raise ZeroDivisionError
    return json.loads(text, *arguments, **keywords)


module.json = types.SimpleNamespace(loads=loads, dumps=json.dumps, load=json.load)
"""


def wait_logged(job, text):
    """Wait until the wrapper has read a text that virt-v2v printed."""
    eventually(lambda: text in job.log('v2v_log'), 'it is read')


@pytest.mark.promise(3)
def test_a_mistake_that_comes_again_and_again_is_a_few_records(wrapper):
    tamper(wrapper, MISTAKE)
    count = 40
    wrapper.virt_v2v.play([[wait(str(number)), json_message('message', 'x'),
                            stdout(b'part %d\n' % number)] for number in range(count)])
    job = wrapper.start()
    for number in range(count):         # so that each is read alone
        wrapper.virt_v2v.let(str(number))
        wait_logged(job, b'part %d\n' % number)
    assert job.wait_finished()['return_code'] == 0
    assert 1 <= job.log('wrapper_log').count(b'internal error') <= count // 2


def test_what_a_success_left_in_the_export_domain_is_no_leftover(wrapper):
    wrapper.virt_v2v.play(phase('Opening the source'), reach('../../' + IMAGE), leave(0))
    job = wrapper.start()
    job.wait_finished()
    wrapper.wait_gone()
    assert os.path.exists(os.path.join(wrapper.directory, IMAGE))
    assert IMAGE.encode() not in job.log('wrapper_log')
