"""The logs: what is wrong with them disturbs nothing, and nobody forges a record."""
import json
import os
import re
import resource

import pytest

from blackbox import DOMAIN, valid_request
from faults import FailingCall, disk, tamper
from virt_v2v import (
    GENERATIONS, bar, copying, flat, json_message, leave, phase, reach, source, stdout, wait)
from virt_v2v_wrapper import RequestError, parse_request

pytestmark = pytest.mark.promise(10)

PATH = '[ds1] vm/vm.vmdk'
RECORD = re.compile(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (?:INFO|WARNING|ERROR) .+')
MISSING = re.compile(rb'\nvirt-v2v-wrapper: (\d+) bytes are missing here\n')
PART = b''.join(b'%06d a line of the output\n' % number for number in range(20000))
SUCCESS = {'return_code': 0, 'finished': True}


# Prints a lot while the log fails, some more when it works again.
STEPS = [source(PATH), copying(1, 1), bar(10), wait('failing'), stdout(PART), bar(50),
         wait('working'), stdout(b'the last line\n'), wait('end')]


def output_of(steps):
    """Return what steps print."""
    return b''.join(step[2] for step in flat(steps) if step[1] in ('stdout', 'stderr'))


PRINTED = output_of(STEPS)


def outcome(state):
    """Return what of a final state tells success."""
    return {key: state[key] for key in ('return_code', 'finished', 'failed') if key in state}


def with_progress(percent):
    """Return a condition on the state: that the only disk has so much progress."""
    return lambda state: [disk['progress'] for disk in state['disks']] == [percent]


class Conversion:
    """A job that plays STEPS while its log fails and works again."""

    def __init__(self, wrapper):
        self._virt_v2v = wrapper.virt_v2v
        self._virt_v2v.play(STEPS)
        self.job = wrapper.start()
        self.job.wait_state(with_progress(10), 'it is copying')

    def fail(self, fault):
        """Print while the log fails; the state has to go on."""
        fault()
        self._virt_v2v.let('failing')
        self.job.wait_state(with_progress(50), 'the state goes on')

    def work(self, repair):
        """Print when the log works again; return the log of virt-v2v."""
        repair()
        self._virt_v2v.let('working')
        self._virt_v2v.let('end')
        assert outcome(self.job.wait_finished()) == SUCCESS
        return self.job.log('v2v_log')


def assert_complete_but_for_what_it_says(log):
    """The log says how many bytes are missing in it, and those are all that are."""
    missing = sum(map(int, MISSING.findall(log)))
    assert missing > 0
    assert len(MISSING.sub(b'', log)) + missing == len(PRINTED)
    start, *_ = MISSING.split(log)
    assert PRINTED.startswith(start)
    assert log.endswith(b' bytes are missing here\nthe last line\n')


def test_a_full_log_disk_costs_output_only(wrapper):
    with disk(wrapper.log_dir, wrapper.user) as log_disk:
        conversion = Conversion(wrapper)
        conversion.fail(log_disk.fail)
        assert_complete_but_for_what_it_says(conversion.work(log_disk.work))


def test_a_failing_log_disk_costs_output_only(wrapper):
    conversion = Conversion(wrapper)
    job = conversion.job
    writing = FailingCall(job.state()['wrapper_pid'], 'write', 'EIO',
                          paths=[job.paths.v2v_log, job.paths.wrapper_log])
    conversion.fail(writing.fail)
    assert_complete_but_for_what_it_says(conversion.work(writing.work))


def test_a_log_disk_that_goes_on_failing_is_one_record(wrapper):
    conversion = Conversion(wrapper)
    job = conversion.job
    writing = FailingCall(job.state()['wrapper_pid'], 'write', 'EIO', paths=[job.paths.v2v_log])
    conversion.fail(writing.fail)
    conversion.work(writing.work)
    assert job.log('wrapper_log').count(b'virt-v2v log: Input/output error') == 1


def test_a_log_at_its_size_limit_costs_output_only(wrapper):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
    wrapper.virt_v2v.play(stdout(PART), reach('printed'), wait('go'), stdout(b'the last line\n'))
    job = wrapper.start(prepare=limit)
    wrapper.virt_v2v.wait_for('printed')
    wrapper.virt_v2v.let('go')
    assert outcome(job.wait_finished()) == SUCCESS
    assert job.log('v2v_log') == PART[:1 << 18]
    assert b'virt-v2v log: File too large' in job.log('wrapper_log')


def test_what_is_missing_at_the_end_is_said_too(wrapper):
    """There is room again, but nothing more comes."""
    last = [source(PATH), copying(1, 1), bar(50)]
    with disk(wrapper.log_dir, wrapper.user) as log_disk:
        wrapper.virt_v2v.play(wait('failing'), stdout(PART), last, wait('end'))
        job = wrapper.start()
        log_disk.fail()
        wrapper.virt_v2v.let('failing')
        job.wait_state(with_progress(50), 'the state goes on')
        log_disk.work()
        wrapper.virt_v2v.let('end')
        assert outcome(job.wait_finished()) == SUCCESS
        wrapper.wait_gone()
        log = job.log('v2v_log')
    missing = sum(map(int, MISSING.findall(log)))
    assert missing > 0
    assert missing + len(MISSING.sub(b'', log)) == len(PART + output_of(last))


def test_a_full_log_disk_does_not_hide_a_failure(wrapper):
    with disk(wrapper.log_dir, wrapper.user) as log_disk:
        wrapper.virt_v2v.play(wait('failing'), stdout(PART), json_message('error', 'no route'),
                              leave(1))
        job = wrapper.start()
        log_disk.fail()
        wrapper.virt_v2v.let('failing')
        state = job.wait_finished()
    assert (state['return_code'], state['failed']) == (1, True)
    assert state['last_message']['message'] == 'no route'


def test_without_room_for_any_record_the_conversion_runs(wrapper):
    with disk(wrapper.log_dir, wrapper.user) as log_disk:
        log_disk.fail()
        wrapper.virt_v2v.play(stdout(PART))
        job = wrapper.start()
        assert outcome(job.wait_finished()) == SUCCESS
        assert job.log('wrapper_log') == b''


def test_deleted_logs_disturb_nothing(wrapper):
    conversion = Conversion(wrapper)

    def delete():
        os.unlink(conversion.job.paths.wrapper_log)
        os.unlink(conversion.job.paths.v2v_log)
    with pytest.raises(FileNotFoundError):
        conversion.fail(delete)
        conversion.work(lambda: None)
    assert outcome(conversion.job.state()) == SUCCESS


def test_a_truncated_log_goes_on_at_its_new_end(wrapper):
    conversion = Conversion(wrapper)

    def truncate():
        os.truncate(conversion.job.paths.wrapper_log, 0)
        os.truncate(conversion.job.paths.v2v_log, 0)
    conversion.fail(lambda: None)
    assert conversion.work(truncate) == b'the last line\n'
    wrapper.wait_gone()
    wrapper_log = conversion.job.log('wrapper_log')
    assert wrapper_log.endswith(b' INFO virt-v2v ended with 0\n')
    assert len(wrapper_log.splitlines()) == 1


def test_the_log_of_virt_v2v_is_what_it_printed(wrapper):
    conversion = Conversion(wrapper)
    conversion.fail(lambda: None)
    assert conversion.work(lambda: None) == PRINTED


# --- forged records ----------------------------------------------------------------------

FORGED = '2026-01-01T00:00:00Z ERROR forged'
# All that anything takes for the end of a line.
LINE_ENDS = ['\n', '\r', '\r\n', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\x85', '\u2028', '\u2029']
EVIL = 'name' + ''.join(end + 'forged' for end in LINE_ENDS) + '\n' + FORGED + '\n'


def assert_no_forged_record(job):
    """Each line is a record, and "forged" stands at the start of none, whatever ends a line."""
    text = job.log('wrapper_log').decode('utf-8')
    assert 'forged' in text
    for line in text.splitlines():
        assert RECORD.fullmatch(line.encode('utf-8')), line
        assert not line.startswith(FORGED), line


@pytest.mark.parametrize('kind', ['message', 'warning', 'error'])
def test_messages_of_virt_v2v_forge_no_record(wrapper, kind):
    wrapper.virt_v2v.play(json_message(kind, EVIL), leave(1))
    job = wrapper.start()
    job.wait_finished()
    assert_no_forged_record(job)


def test_unknown_keys_of_the_request_forge_no_record(wrapper):
    job = wrapper.start(wrapper.request(**{EVIL: 1}))
    job.wait_finished()
    assert b'forged' not in job.log('wrapper_log')


def test_what_is_left_in_the_export_domain_forges_no_record(wrapper):
    wrapper.virt_v2v.play(reach('../../export/%s/images/%s' % (DOMAIN, EVIL)), leave(1))
    job = wrapper.start()
    job.wait_finished()
    wrapper.wait_gone()
    assert_no_forged_record(job)


def test_answers_of_virt_v2v_forge_no_record(wrapper):
    capabilities = ' '.join(GENERATIONS['2.2.0'].capabilities)
    wrapper.virt_v2v.answer('--machine-readable=fd:1', capabilities + '\n' + EVIL)
    job = wrapper.start()
    job.wait_finished()
    assert_no_forged_record(job)


def test_a_mistake_of_ours_forges_no_record(wrapper):
    """What it says is not logged; even its kind may be anything."""
    tamper(wrapper, 'def mistake(*_):\n    raise type(%r, (ValueError,), {})(%r)\n'
                    'module.Progress.apply = mistake' % (EVIL, FORGED))
    wrapper.virt_v2v.play(phase('Opening the source'))
    job = wrapper.start()
    job.wait_finished()
    assert_no_forged_record(job)


@pytest.mark.parametrize('end', LINE_ENDS)
@pytest.mark.parametrize('key', ['vm_name', 'export_domain', 'source_disks'])
def test_names_with_line_ends_are_refused(key, end):
    name = '/name' + end + FORGED
    request = valid_request(**{key: [name] if key == 'source_disks' else name})
    with pytest.raises(RequestError) as caught:
        parse_request(json.dumps(request).encode('utf-8'))
    assert [subject for subject, _ in caught.value.problems] == [key]


def test_a_request_with_a_name_with_a_line_end_leaves_nothing(wrapper):
    job = wrapper.start(wrapper.request(vm_name='name\n' + FORGED))
    assert (job.status, job.stdout, job.stderr.count(b'\n')) == (2, b'', 1)
    assert wrapper.files() == []
