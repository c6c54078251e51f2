"""Output that a guest, or a broken program, can bring into what the wrapper reads."""
import os
import signal

import pytest

import processes
from eventually import eventually
from virt_v2v import (
    DISKS, GENERATIONS, bar, copying, error, fill, json_message, leave, machine, old_bar, phase,
    reach, source, stderr, stdout, wait)

pytestmark = pytest.mark.promise(8)

VM_ID = b'11111111-2222-4333-8444-555555555555'
USABLE = sorted(set(GENERATIONS) - {'1.36.13', 'RHEL 10'})
WITH_MESSAGES = [name for name in USABLE if GENERATIONS[name].json]
MEGABYTES = [20, pytest.param(200, marks=pytest.mark.long)]


# --- lines without an end ----------------------------------------------------------------

def step_of(stream, data):
    """Return the step that writes bytes to a stream."""
    return ('write', stream, data)


@pytest.mark.parametrize('megabytes', MEGABYTES)
@pytest.mark.parametrize('stream, byte', [
    ('stdout', b'x'), ('stderr', b'\0'), ('stdout', b'\xff'), ('machine', b'x')])
def test_a_line_without_an_end_takes_no_memory(wrapper, megabytes, stream, byte):
    wrapper.virt_v2v.play(
        phase('Opening the source'), source(DISKS[0]), copying(1, 1), bar(10), wait('go'),
        fill(stream, byte, megabytes << 20), step_of(stream, b'\n'), bar(55),
        json_message('error', 'the next message'), wait('end'))
    job = wrapper.start()
    before = job.wait_state(lambda state: state.get('phase') == 'Copying disk 1/1',
                            'it is copying')
    process = before['wrapper_pid']
    memory = processes.peak_memory(process)
    wrapper.virt_v2v.let('go')
    job.wait_state(lambda state: state['disks'] == [{'path': DISKS[0], 'progress': 55}],
                   'the next line is parsed')
    job.wait_state(lambda state: 'last_message' in state, 'the next message is parsed')
    grown = processes.peak_memory(process) - memory
    wrapper.virt_v2v.let('end')
    assert job.wait_finished()['return_code'] == 0
    # Some buffers of 64 KiB, and what Python itself takes.
    assert grown < 4096


def test_many_short_lines_take_no_memory(wrapper):
    line = b'[   0.0] Copying disk 9/9 of somebody else\n'
    wrapper.virt_v2v.play(phase('Inspecting the source'), wait('go'),
                          ('repeat', 200, [stdout(line * 2000)]), phase('Finishing off'),
                          wait('end'))
    job = wrapper.start()
    process = job.wait_state(lambda state: 'phase' in state, 'it has begun')['wrapper_pid']
    memory = processes.peak_memory(process)
    wrapper.virt_v2v.let('go')
    job.wait_state(lambda state: state['phase'] == 'Finishing off', 'all was read')
    grown = processes.peak_memory(process) - memory
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert grown < 8192


@pytest.mark.parametrize('rubbish', [
    b'\0' * 5000 + b'\n', b'\xff\xfe\xc3\n', b'\xe2\x96\n', b'\x1b]0;title\x07\x1b[2J\n',
    b'\r\r\n\n\r', b'\xed\xa0\x80\n', b'%s%d%%(name)s{0}\n', bytes(range(256)) + b'\n'],
    ids=lambda rubbish: repr(rubbish[:20]))
@pytest.mark.parametrize('stream', ['stdout', 'stderr', 'machine'])
def test_rubbish_is_passed_over(wrapper, stream, rubbish):
    wrapper.virt_v2v.play(step_of(stream, rubbish), copying(1, 1), step_of(stream, rubbish),
                          bar(55), step_of(stream, rubbish), reach('printed'), wait('end'))
    job = wrapper.start(wrapper.request(source_disks=DISKS[:1]))
    job.wait_state(lambda state: state['disks'] == [{'path': DISKS[0], 'progress': 55}],
                   'the progress is parsed')
    wrapper.virt_v2v.let('end')
    state = job.wait_finished()
    assert (state['return_code'], 'failed' in state, state['disk_count']) == (0, False, 1)


def test_half_a_character_at_the_end_of_a_read_is_no_damage(wrapper):
    text = 'Inspecting the caf\u00e9 \U0001f4bf'
    message, line = [step[2] for step in phase(text)]
    pieces = []
    for cut in range(len(message) - 24, len(message)):
        pieces += [machine(message[:cut]), stdout(b'.\n'), machine(message[cut:])]
    wrapper.virt_v2v.play(pieces, stdout(line))
    state = wrapper.start().wait_finished()
    assert state['phase'] == text


@pytest.mark.parametrize('message', [
    b'{"type": "error", "message": "\xff"}', b'{"type": "error"}', b'[]', b'null', b'{',
    b'{"type": ["error"], "message": "x"}', b'{"type": "error", "message": {"x": 1}}',
    b'[' * 60000, b'{"type": "error", "message": ' + b'9' * 6000 + b'}',
    b'{"type": "progress", "message": "x"}'], ids=lambda message: repr(message[:40]))
def test_a_message_that_is_none_changes_nothing(wrapper, message):
    wrapper.virt_v2v.play(machine(message + b'\n'), json_message('error', 'the real one'),
                          machine(message + b'\n'), leave(1))
    job = wrapper.start()
    state = job.wait_finished()
    assert state['last_message']['message'] == 'the real one'
    assert b'internal error' not in job.log('wrapper_log')


def test_a_message_is_published_without_control_characters(wrapper):
    wrapper.virt_v2v.play(json_message('message', 'Opening \x1b[2J\x9b31m the source'),
                          error('cannot \x1b]0;x\x07 log in'))
    job = wrapper.start()
    job.wait_finished()
    with open(job.paths.state_file, 'rb') as stream:
        published = stream.read() + job.log('wrapper_log')
    assert not set(published) & set(b'\x1b\x07\x9b')
    assert job.state()['last_message']['message'] == 'cannot ?]0;x? log in'


# --- what a guest can put into the log ---------------------------------------------------

# Real versions pass on what the guest has: its kernel's messages, file names, hostnames, labels.
FORGED = [
    b'[   1.0] Opening the source', b'[   2.0] Setting up the destination',
    b'[  12.0] Copying disk 9/9', b'[  12.0] Copying disk 2/2', b'Copying disk 9/9',
    bar(99)[2], old_bar(99)[2], b'nbdcopy: error: forged', b'qemu-img: error: forged',
    b'virt-v2v: error: forged', b'virt-v2v: warning: forged', b'nbdkit: error: forged',
    b'nbdkit: vddk[1]: error: forged', b'mount: forged',
    source('[forged] forged.vmdk')[2],
    b"nbdkit: debug: vddk: config key=file, value=[forged] forged.vmdk",
    b'Opening file [forged] forged.vmdk (vpxa-nfcssl://x:902)',
    b"nbdcopy 'nbd+unix:///%5bforged%5d%20forged.vmdk?socket=/tmp/x' 'nbd://y'",
    b'{ "message": "forged", "timestamp": "", "type": "error" }',
    b'{ "message": "Copying disk 9/9", "timestamp": "", "type": "message" }',
    b"<Section ovf:id='99999999-2222-4333-8444-555555555555'"
    b" xsi:type='ovf:OperatingSystemSection_Type'>",
    b'[  99.0] Creating output metadata', b'[  99.9] Finishing off', b'[ 100.0] Converting forged',
    b'\x1b[2J\x1b]0;forged\x07', b'virt-v2v: Exiting on signal SIGTERM', b'\0forged', b'\xff\xfe',
]
HOSTILE = [stdout(b'\n' + b'\n'.join(FORGED) + b'\n'),
           stderr(b'\r' + b'\r'.join(FORGED) + b'\r'),
           [step for line in FORGED for step in (stdout(line + b'\n'), stderr(line))],
           stdout(b'\n')]
HONEST = stdout(b'libguestfs: nothing special\n')
MARK = b'--- the guest was inspected\n'
OVF = (b"<Section ovf:id='%s' ovf:required='false' xsi:type='ovf:OperatingSystemSection_Type'>\n"
       % VM_ID)


def inspection(in_the_guest, modern):
    """Return the steps until a guest, which adds to the output, was inspected."""
    return [
        phase('Setting up the source' if modern else 'Opening the source -i libvirt'),
        [source(disk) for disk in DISKS],
        phase('Inspecting the source'), in_the_guest,
        phase('Converting the guest to run on KVM'), in_the_guest, stdout(MARK)]


def copies(modern):
    """Return the steps that follow."""
    progress = bar if modern else old_bar
    to = None if modern else '/export/images/a/b'
    return [
        phase('Setting up the destination'),
        [[copying(number, 2, to), progress(44), progress(100)] for number in (1, 2)],
        phase('Creating output metadata'), stdout(OVF), phase('Finishing off')]


def facts(state):
    """Return what of a state does not differ between two runs."""
    differs = ('pid', 'wrapper_pid', 'vm_name', 'wrapper_log', 'v2v_log', 'started_at',
               'updated_at', 'finished_at')
    return {key: value for key, value in state.items() if key not in differs}


def is_modern(generation):
    """Say whether a virt-v2v has the words of version 2."""
    return generation in ('2.2.0', '2.10.0')


def run(wrapper, generation, in_the_guest, end):
    """Run a conversion; return the facts when the guest was inspected, and at the end."""
    modern = is_modern(generation)
    wrapper.use(generation).play(inspection(in_the_guest, modern), wait('copy'), copies(modern),
                                 end)
    job = wrapper.start(wrapper.request(source_disks=DISKS))
    eventually(lambda: job.log('v2v_log').endswith(MARK), 'all that was printed is read')
    inspected = job.wait_state(
        lambda state: state.get('phase', '').startswith('Converting'), 'it is converting')
    wrapper.virt_v2v.let('copy')
    final = job.wait_finished()
    wrapper.wait_gone()
    return facts(inspected), facts(final)


def run_behind(wrapper, generation, in_the_guest):
    """Run a conversion; the wrapper sees nothing of it until all is over. Return the facts."""
    modern = is_modern(generation)
    wrapper.use(generation).play(wait('go'), inspection(in_the_guest, modern), copies(modern),
                                 leave(1))
    job = wrapper.start(wrapper.request(source_disks=DISKS))
    state = job.state()
    os.kill(state['wrapper_pid'], signal.SIGSTOP)
    wrapper.virt_v2v.let('go')
    eventually(lambda: processes.state(state['pid']) == 'Z', 'it is over')
    os.kill(state['wrapper_pid'], signal.SIGCONT)
    final = job.wait_finished()
    wrapper.wait_gone()
    return facts(final)


ENDS = {'succeeds': leave(0), 'fails': error('no space left'), 'says nothing': leave(1)}


@pytest.mark.parametrize('end', sorted(ENDS))
@pytest.mark.parametrize('generation', WITH_MESSAGES)
def test_where_there_are_messages_a_guest_cannot_change_anything(wrapper, generation, end):
    honest = run(wrapper, generation, HONEST, ENDS[end])
    hostile = run(wrapper, generation, HOSTILE, ENDS[end])
    assert hostile == honest
    assert honest[1]['vm_id'].encode() == VM_ID
    assert honest[1]['disks'] == [{'path': disk, 'progress': 100} for disk in DISKS]
    assert 'forged' not in repr(hostile)


@pytest.mark.parametrize('generation', WITH_MESSAGES)
def test_nor_can_it_where_the_wrapper_is_far_behind(wrapper, generation):
    """Messages are there before the lines that came before them are read."""
    honest = run_behind(wrapper, generation, HONEST)
    assert run_behind(wrapper, generation, HOSTILE) == honest
    assert honest['disks'] == [{'path': disk, 'progress': 100} for disk in DISKS]


@pytest.mark.parametrize('end', sorted(ENDS))
@pytest.mark.parametrize('generation', sorted(set(USABLE) - set(WITH_MESSAGES)))
def test_in_no_version_can_a_guest_change_the_result(wrapper, generation, end):
    wrapper.use(generation).play(phase('Inspecting the source'), HOSTILE, ENDS[end])
    state = wrapper.start(wrapper.request(source_disks=DISKS)).wait_finished()
    succeeds = end == 'succeeds'
    assert state['return_code'] == (0 if succeeds else 1)
    assert ('failed' in state) is not succeeds
    assert ('last_message' in state) is not succeeds


@pytest.mark.parametrize('generation', sorted(set(USABLE) - set(WITH_MESSAGES)))
def test_in_no_version_does_a_guest_take_a_disk_off_the_list(wrapper, generation):
    wrapper.use(generation).play(phase('Inspecting the source'), HOSTILE, leave(0))
    state = wrapper.start(wrapper.request(source_disks=DISKS)).wait_finished()
    assert [disk['path'] for disk in state['disks'] if disk['path'] in DISKS] == DISKS
    assert all(disk['progress'] == 100 for disk in state['disks'])
