"""What others say is bounded, and does nothing to who reads it."""
import json
import re
import resource

import pytest

from virt_v2v import (
    json_message, leave, phase, reach, source, stderr, stdout, wait)

LINE = re.compile(rb'virt-v2v-wrapper: error: [^\n]+\n')
# More than any question is answered with, and less than this machine has.
MEMORY = 1 << 29
LOG = b''.join(b'%07d a line of the log\n' % number for number in range(80000))
BIDIRECTIONAL = ''.join(map(chr, list(range(0x202a, 0x202f)) + list(range(0x2066, 0x206a))))


# --- answers -----------------------------------------------------------------------------

@pytest.mark.promise(8)
@pytest.mark.parametrize('command', ['/bin/cat /dev/zero', '/usr/bin/yes virt-v2v'])
def test_an_endless_answer_of_virt_v2v_is_refused(wrapper, command):
    wrapper.add_program('virt-v2v', '#!/bin/sh\nexec %s\n' % command)
    job = wrapper.start(
        prepare=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)))
    assert (job.status, job.stdout) == (1, b'')
    assert LINE.fullmatch(job.stderr)
    assert job.stderr.startswith(b'virt-v2v-wrapper: error: virt-v2v: ')
    wrapper.wait_gone()


# --- messages ----------------------------------------------------------------------------

@pytest.mark.promise(8)
def test_announced_phases_that_never_come_cost_no_time(wrapper):
    announced = [json_message('message', 'Phase %d of many' % number) for number in range(20000)]
    wrapper.virt_v2v.play(phase('Opening the source'), *announced, stdout(LOG), leave(0))
    job = wrapper.start()
    assert job.wait_finished()['return_code'] == 0


@pytest.mark.promise(8)
def test_a_phase_is_found_behind_many_that_never_come(wrapper):
    announced = [json_message('message', 'Phase %d of many' % number) for number in range(2000)]
    wrapper.virt_v2v.play(*announced, stdout(LOG[:1000]), phase('Finishing off'),
                          reach('said'), wait('end'))
    job = wrapper.start()
    wrapper.virt_v2v.wait_for('said')
    state = job.wait_state(lambda state: state.get('phase') == 'Finishing off', 'it is published')
    wrapper.virt_v2v.let('end')
    assert 'finished' in job.wait_finished() and 'finished' not in state


@pytest.mark.promise(8)
@pytest.mark.parametrize('generation, say', [
    ('2.2.0', lambda text: json_message('error', text)),
    ('1.40.2', lambda text: stderr(b'virt-v2v: error: ' + text.encode() + b'\n'))],
    ids=['message', 'line'])
def test_an_error_of_any_length_has_its_beginning_in_the_state(wrapper, generation, say):
    wrapper.use(generation)
    wrapper.virt_v2v.play(say('it is broken: ' + 'x' * 100000), leave(1))
    message = wrapper.start().wait_finished()['last_message']['message']
    assert message.startswith('it is broken: xxx')
    assert len(message) < 10000


# --- what changes the direction of a text ------------------------------------------------

def is_clean(job):
    """Say whether nothing in state and log of the wrapper changes the direction of a text."""
    text = json.dumps(job.state(), ensure_ascii=False) + job.log('wrapper_log').decode('utf-8')
    return not set(text) & set(BIDIRECTIONAL)


@pytest.mark.promise(8)
@pytest.mark.parametrize('kind', ['message', 'warning', 'error'])
def test_a_message_changes_the_direction_of_no_text(wrapper, kind):
    text = 'disk ' + BIDIRECTIONAL + 'gpj.exe'
    wrapper.virt_v2v.play(json_message(kind, text), stdout(b'[   0.0] %s\n' % text.encode()),
                          leave(1))
    job = wrapper.start()
    job.wait_finished()
    assert b'gpj.exe' in job.log('wrapper_log')
    assert is_clean(job)


@pytest.mark.promise(8)
def test_the_name_of_a_disk_changes_the_direction_of_no_text(wrapper):
    wrapper.virt_v2v.play(phase('Opening the source'), source('[ds] ' + BIDIRECTIONAL + '.vmdk'),
                          phase('Copying disk 1/1'), leave(0))
    job = wrapper.start()
    assert job.wait_finished()['disks']
    assert is_clean(job)


@pytest.mark.promise(7)
def test_an_unknown_key_changes_the_direction_of_no_text(wrapper):
    job = wrapper.start(wrapper.request(**{'key' + BIDIRECTIONAL: 1}))
    job.wait_finished()
    assert b'key' in job.log('wrapper_log')
    assert is_clean(job)
