"""What the events of a conversion add up to, and the state that is published of it."""
import calendar
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virt_v2v_wrapper import (
    Event, Facts, Progress, finished_document, signal_name, timestamp)

A, B, C = '[ds] vm/a.vmdk', '[ds] vm/b.vmdk', '[ds] vm/c.vmdk'
FACTS = Facts(pid=4711, wrapper_pid=4710, vm_name='vm', target={}, wrapper_log='/w.log',
              v2v_log='/v.log',
              started_at='2026-11-23T08:00:00Z')
POINTER = 'nbdcopy command failed, see earlier error messages'


def percent(value):
    return Event('percent', value)


def source(path):
    return Event('source', path)


def opened(path):
    return Event('opened', path)


def error(text):
    return Event('error', text)


def cause(text):
    return Event('cause', text)


def vm_id(uuid):
    return Event('vm_id', uuid)


def copying(number, count):
    """Return the events of virt-v2v beginning with a copy."""
    return [Event('phase', 'Copying disk {}/{}'.format(number, count)), Event('disk', number)]


def finishing():
    return [Event('phase', 'Finishing off'), Event('idle', None)]


def document(events, listed=()):
    """Return the state while the conversion goes on."""
    progress = Progress(tuple(listed))
    for event in events:
        progress.apply(event)
    return progress.document(FACTS)


def disks(events, listed=()):
    """Return [(path, progress)] in that state."""
    return [(disk['path'], disk['progress']) for disk in document(events, listed)['disks']]


def message(state):
    """Return the text of the last message in a state, or None."""
    return state.get('last_message', {}).get('message')


# --- which disks there are ---------------------------------------------------------------

def test_there_are_no_disks_until_virt_v2v_names_them():
    assert disks([]) == []


def test_listed_disks_are_there_from_the_start_in_their_order():
    assert disks([], [B, A]) == [(B, 0), (A, 0)]


def test_a_source_is_no_disk_before_it_is_copied():
    assert disks([source(A)]) == []


def test_the_nth_copy_is_the_nth_source():
    events = [source(A), source(B)] + copying(1, 2) + [percent(44)] + copying(2, 2)
    assert disks(events) == [(A, 100), (B, 0)]


def test_the_nth_copy_is_the_nth_source_whatever_is_listed():
    events = [source(A), source(B)] + copying(1, 2) + [percent(44)]
    assert disks(events, [B, A]) == [(B, 0), (A, 44)]


def test_a_source_that_is_opened_twice_is_one_source():
    events = [source(A), source(A), source(B)] + copying(1, 2) + copying(2, 2)
    assert disks(events) == [(A, 100), (B, 0)]


def test_what_is_opened_during_a_copy_is_its_disk():
    events = copying(1, 2) + [opened(B), percent(7)] + copying(2, 2) + [opened(A), percent(8)]
    assert disks(events, [A, B]) == [(A, 8), (B, 100)]


def test_a_disk_that_is_not_listed_is_added_behind_the_list():
    events = copying(1, 1) + [opened(C), percent(44)]
    assert disks(events, [A, B]) == [(A, 0), (B, 0), (C, 44)]


def test_the_nth_copy_is_the_nth_listed_if_nothing_names_it():
    events = copying(1, 2) + [percent(44)] + copying(2, 2) + [percent(55)]
    assert disks(events, [B, A]) == [(B, 100), (A, 55)]


def test_a_listed_disk_copied_already_is_no_other():
    events = copying(1, 2) + [opened(B)] + copying(2, 2) + [percent(44)]
    assert disks(events, [A, B]) == [(A, 44), (B, 100)]


def test_a_copy_that_nothing_names_is_listed_by_its_number():
    events = copying(1, 2) + copying(2, 2) + [percent(44)]
    assert disks(events) == [('disk 1', 100), ('disk 2', 44)]


def test_a_number_stands_for_a_disk_until_its_path_shows():
    events = copying(1, 1) + [percent(44), opened(A)]
    assert disks(events) == [(A, 44)]


def test_what_shows_its_path_once_keeps_it():
    events = [source(A)] + copying(1, 2) + [opened(B), percent(44)]
    assert disks(events) == [(A, 44)]


def test_more_copies_than_listed_disks_are_all_there():
    events = copying(1, 2) + copying(2, 2) + [percent(44)]
    assert disks(events, [A]) == [(A, 100), ('disk 2', 44)]


def test_a_listed_disk_called_like_a_number_is_no_other():
    events = copying(1, 2) + [percent(44)] + copying(2, 2)
    assert disks(events, ['disk 2'])[0] == ('disk 2', 100)


def test_what_is_opened_outside_of_a_copy_is_no_disk():
    assert disks([opened(A)] + copying(1, 1) + finishing() + [opened(B)]) == [('disk 1', 0)]


# --- how many ----------------------------------------------------------------------------

@pytest.mark.parametrize('events, listed, count', [
    ([], [], 0),
    ([], [A, B], 2),
    ([source(A)], [], 0),
    (copying(1, 3), [], 3),
    (copying(1, 3), [A], 3),
    (copying(1, 1), [A, B], 1),
    (copying(1, 2) + copying(2, 2) + finishing(), [], 2),
])
def test_the_count_is_the_list_s_until_virt_v2v_has_its_own(events, listed, count):
    assert document(events, listed)['disk_count'] == count


# --- how far -----------------------------------------------------------------------------

def test_progress_is_that_of_the_copy_it_follows():
    assert disks(copying(1, 2) + [percent(12.34)]) == [('disk 1', 12.34)]


def test_progress_never_goes_backwards():
    assert disks(copying(1, 1) + [percent(44), percent(12)]) == [('disk 1', 44)]


@pytest.mark.parametrize('value', [101, 250, 999])
def test_progress_is_never_above_100(value):
    assert disks(copying(1, 1) + [percent(value)]) == [('disk 1', 100)]


def test_a_copy_that_is_announced_again_goes_on():
    assert disks(copying(1, 1) + [percent(44)] + copying(1, 1)) == [('disk 1', 44)]


def test_a_disk_is_complete_when_the_next_one_starts():
    assert disks(copying(1, 2) + [percent(44)] + copying(2, 2), [A, B]) == [(A, 100), (B, 0)]


def test_disks_that_were_not_copied_yet_are_not_complete():
    assert disks(copying(1, 3) + copying(2, 3), [A, B, C]) == [(A, 100), (B, 0), (C, 0)]


def test_progress_outside_of_a_copy_is_nobodys():
    assert disks([percent(7)] + copying(1, 1) + finishing() + [percent(44)]) == [('disk 1', 0)]


# --- messages ----------------------------------------------------------------------------

def test_the_phase_is_the_latest_one():
    assert document(copying(1, 1) + finishing())['phase'] == 'Finishing off'


def test_the_id_of_the_vm_is_the_last_one():
    """The OVF is the last that virt-v2v prints; what came before may be the guest's."""
    assert document([vm_id('first'), vm_id('second')])['vm_id'] == 'second'


def test_a_copy_does_not_begin_after_a_later_one():
    events = [Event('disk', 2), percent(10), Event('disk', 1)]
    assert [disk['progress'] for disk in document(events)['disks']] == [10]


def test_a_warning_is_no_error():
    assert 'last_message' not in document([Event('warning', 'careful')])


def test_an_error_is_the_last_message():
    assert document([error('no such guest')])['last_message'] == {
        'type': 'error', 'message': 'no such guest', 'code': 'unknown'}


NBDKIT = cause('nbdkit: file.3: error: pwrite: No space left on device')
NBDCOPY = cause('nbdcopy: write at offset 7 failed: No space left on device')
CAUSE = NBDKIT.value + '; ' + NBDCOPY.value


@pytest.mark.parametrize('events, text', [
    ([], None),
    ([NBDKIT], None),
    ([error('no such guest')], 'no such guest'),
    ([NBDKIT, error('no such guest')], 'no such guest'),
    ([error(POINTER)], POINTER),
    ([NBDKIT, NBDCOPY, error(POINTER)], '{} ({})'.format(POINTER, CAUSE)),
    ([error(POINTER), NBDKIT, NBDCOPY], '{} ({})'.format(POINTER, CAUSE)),
    ([NBDKIT, NBDCOPY, cause('nbdkit: file.1: error: later'), error(POINTER)],
     '{} ({})'.format(POINTER, CAUSE)),
    ([NBDKIT, error('libguestfs error: guestfs_launch failed, see earlier error messages')],
     'libguestfs error: guestfs_launch failed, see earlier error messages (' + NBDKIT.value + ')'),
    ([cause('mount: bad option'), error('mount command failed, see earlier errors.')],
     'mount command failed, see earlier errors. (mount: bad option)'),
    ([cause('nbdkit: error: x'),
      error('nbdkit did not start up.  See previous debugging messages for problems.')],
     'nbdkit did not start up.  See previous debugging messages for problems. (nbdkit: error: x)'),
    ([NBDKIT, NBDCOPY, error('nbdcopy exited with non-zero error code 1')],
     'nbdcopy exited with non-zero error code 1 ({})'.format(CAUSE)),
    ([cause('nbdkit[in0]: error: x'), NBDKIT, error(POINTER)],
     POINTER + ' (nbdkit[in0]: error: x)'),
    ([NBDKIT] + finishing() + [error(POINTER)], POINTER),
    ([NBDKIT] + copying(1, 1) + [error(POINTER)], POINTER),
])
def test_an_error_that_points_back_is_followed_by_its_cause(events, text):
    assert message(document(events)) == text


@pytest.mark.parametrize('return_code, said, reason, text', [
    (0, None, None, None),
    (0, 'e', None, None),
    (0, 'e', 'r', None),
    (1, 'e', None, 'e'),
    (1, None, None, 'virt-v2v ended with status 1 and no error message'),
    (2, '', None, 'virt-v2v ended with status 2 and no error message'),
    (1, None, 'r', 'r'),
    (1, 'e', 'r', 'r (e)'),
    (-9, None, None, 'virt-v2v was killed by SIGKILL'),
    (-15, 'e', None, 'virt-v2v was killed by SIGTERM (e)'),
    (-15, 'e', 'r', 'r (e)'),
    (-33, None, None, 'virt-v2v was killed by signal 33'),
    (None, None, None, 'virt-v2v is gone, and nobody knows how it ended'),
    (None, None, 'r', 'r'),
    (None, 'e', 'r', 'r (e)'),
])
def test_a_failure_says_what_is_known_of_it(return_code, said, reason, text):
    state = document([error(said)] if said is not None else [])
    assert message(finished_document(state, return_code, reason)) == text


def test_of_several_errors_the_last_one_counts():
    assert message(document([error('first'), error('second')])) == 'second'


@pytest.mark.parametrize('return_code, reason, begin', [
    (-9, None, 'virt-v2v was killed by SIGKILL'), (1, 'r', 'r'), (None, 'r', 'r')])
def test_a_failure_names_the_processes_that_cannot_be_ended(return_code, reason, begin):
    state = finished_document(document([]), return_code, reason, ['nbdkit (7)', 'nbdcopy (8)'])
    assert message(state) == begin + (
        '; could not be killed, as they wait for storage: nbdkit (7), nbdcopy (8)')


@pytest.mark.parametrize('reason', [None, 'r'])
@pytest.mark.parametrize('events', [[], [Event('error', 'e')]])
def test_success_keeps_no_message_whatever_cannot_be_ended(events, reason):
    state = finished_document(document(events), 0, reason, ['nbdkit (7)'])
    assert (message(state), 'failed' in state) == (None, False)


@pytest.mark.parametrize('number, name', [(9, 'SIGKILL'), (15, 'SIGTERM'), (33, 'signal 33')])
def test_a_signal_has_a_name(number, name):
    assert signal_name(number) == name


# --- the published document --------------------------------------------------------------

FULL = [source(A)] + copying(1, 1) + [percent(44.5), vm_id('id'), error('e')]
FIRST_KEYS = ['started', 'pid', 'wrapper_pid', 'vm_name', 'target', 'wrapper_log', 'v2v_log',
              'started_at', 'disks', 'disk_count', 'updated_at']
FULL_KEYS = FIRST_KEYS + ['phase', 'vm_id', 'last_message']
TIME = re.compile('[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z')


def published(state):
    """Return the state as its readers get it."""
    return json.loads(json.dumps(state))


def finished(events, return_code, reason=None, listed=()):
    """Return the final state of a conversion whose state was written long ago."""
    state = dict(document(events, listed), updated_at='2026-11-23T08:00:01Z')
    return finished_document(state, return_code, reason)


@pytest.mark.parametrize('events, keys', [([], FIRST_KEYS), (FULL, FULL_KEYS)])
def test_the_keys_have_an_order(events, keys):
    assert list(document(events)) == keys


@pytest.mark.parametrize('return_code, keys', [
    (0, FULL_KEYS[:-1] + ['return_code', 'finished_at', 'finished']),
    (1, FULL_KEYS[:-1] + ['return_code', 'last_message', 'failed', 'finished_at', 'finished']),
    (None, FULL_KEYS + ['failed', 'finished_at', 'finished'])])
def test_the_keys_of_the_end_come_last(return_code, keys):
    assert list(finished(FULL, return_code)) == keys


def test_the_state_is_json_of_the_published_types():
    state = published(document(FULL))
    updated_at = state.pop('updated_at')
    assert TIME.fullmatch(updated_at) and updated_at != FACTS.started_at
    assert state == {
        'started': True, 'pid': 4711, 'wrapper_pid': 4710, 'vm_name': 'vm', 'target': {},
        'wrapper_log': '/w.log', 'v2v_log': '/v.log', 'started_at': FACTS.started_at,
        'disks': [{'path': A, 'progress': 44.5}], 'disk_count': 1,
        'phase': 'Copying disk 1/1', 'vm_id': 'id',
        'last_message': {'type': 'error', 'message': 'e', 'code': 'unknown'}}


def test_a_disk_has_its_path_first():
    assert [list(disk) for disk in document([], [A])['disks']] == [['path', 'progress']]


@pytest.mark.parametrize('absent', ['finished', 'failed', 'return_code', 'finished_at'])
def test_what_only_the_end_brings_is_absent_before(absent):
    assert absent not in document(FULL)


def test_a_time_is_utc(monkeypatch):
    monkeypatch.setenv('TZ', 'XXX-05:30')
    time.tzset()
    try:
        before = int(time.time()) - 1       # gmtime() takes the clock of the last tick
        told = calendar.timegm(time.strptime(timestamp(), '%Y-%m-%dT%H:%M:%SZ'))
        assert before <= told <= time.time()
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize('return_code, reason, end', [
    (0, None, {'return_code': 0, 'disks': [{'path': A, 'progress': 100}]}),
    (-9, 'r', {'return_code': -9, 'disks': [{'path': A, 'progress': 44.5}], 'failed': True,
               'last_message': {'type': 'error', 'message': 'r (e)', 'code': 'unknown'}}),
    (None, 'r', {'disks': [{'path': A, 'progress': 44.5}], 'failed': True,
                 'last_message': {'type': 'error', 'message': 'r (e)', 'code': 'unknown'}})])
def test_the_last_state_says_how_it_ended(return_code, reason, end):
    state = published(finished(FULL, return_code, reason))
    time_of_end = state.pop('finished_at')
    assert TIME.fullmatch(time_of_end)
    assert state == dict(end, **{
        'started': True, 'pid': 4711, 'wrapper_pid': 4710, 'vm_name': 'vm', 'target': {},
        'wrapper_log': '/w.log', 'v2v_log': '/v.log', 'started_at': FACTS.started_at,
        'disk_count': 1, 'updated_at': time_of_end, 'phase': 'Copying disk 1/1', 'vm_id': 'id',
        'finished': True})


def test_all_disks_are_complete_after_success():
    state = finished(copying(1, 2) + [percent(7)], 0, None, [A, B])
    assert [disk['progress'] for disk in state['disks']] == [100, 100]


def test_the_least_that_is_left_of_a_state_can_be_finished():
    """What is made of a file that a power loss has emptied."""
    state = finished_document({'started': True, 'disks': [], 'disk_count': 0}, None, 'r')
    assert list(state) == ['started', 'disks', 'disk_count', 'last_message', 'failed', 'updated_at',
                           'finished_at', 'finished']


@pytest.mark.parametrize('return_code', [0, 1])
def test_finishing_a_state_leaves_the_given_one_as_it_was(return_code):
    state = document(FULL)
    before = published(state)
    finished_document(state, return_code, None, ['nbdkit (7)'])
    assert published(state) == before


# --- any order of events -----------------------------------------------------------------

# "disk 2" is what the wrapper itself may call a disk.
PATHS = [A, B, C, 'disk 2', '\u00fc']
NUMBERS = st.integers(1, 4)
PHASES = st.tuples(NUMBERS, NUMBERS).map(sorted).map('Copying disk {0[0]}/{0[1]}'.format)
VALUES = {
    'phase': PHASES | st.just('Finishing off'),
    'disk': NUMBERS,
    'idle': st.none(),
    'percent': st.integers(0, 100) | st.floats(0, 100),
    'source': st.sampled_from(PATHS),
    'opened': st.sampled_from(PATHS),
    'error': st.sampled_from(['e', POINTER]),
    'cause': st.sampled_from(['nbdkit: c', 'nbdcopy: c', ': c']),
    'vm_id': st.sampled_from(['x', 'y']),
    'warning': st.just('w'),
    'size': st.integers(0, 1 << 60),
    'image': st.just('i'),
    'upload_disk': st.just('d'),
    'upload_transfer': st.just('t'),
    'farewell': st.just('f'),
    'forged': st.none(),
}
EVENTS = st.lists(st.one_of([st.builds(Event, st.just(name), VALUES[name])
                             for name in sorted(VALUES)]), max_size=25)
LISTED = st.lists(st.sampled_from(PATHS), unique=True, max_size=4)


def states(events, listed):
    """Yield {path: progress} after each event; no path may be there twice."""
    progress = Progress(tuple(listed))
    for event in events:
        progress.apply(event)
        shown = progress.document(FACTS)['disks']
        assert len({disk['path'] for disk in shown}) == len(shown)
        yield {disk['path']: disk['progress'] for disk in shown}


def check_states(events, listed):
    before = dict.fromkeys(listed, 0)
    for state in states(events, listed):
        assert set(listed) <= set(state)
        assert all(0 <= progress <= 100 for progress in state.values())
        # A disk that is not listed may get another name, but a name keeps what it has.
        assert all(state[path] >= before[path] for path in set(state) & set(before))
        before = state


@given(EVENTS, LISTED)
@settings(max_examples=300)
def test_listed_disks_stay_and_progress_does_not_go_backwards(events, listed):
    check_states(events, listed)


@pytest.mark.long
@given(EVENTS, LISTED)
@settings(max_examples=10000)
def test_in_10000_conversions_progress_does_not_go_backwards(events, listed):
    check_states(events, listed)


# --- warnings, sizes, what was made ------------------------------------------------------

def test_warnings_are_shown_once_and_not_too_many_or_too_long():
    texts = ['x' * 5000, 'again', 'again'] + ['number %d' % number for number in range(50)]
    events = [Event('warning', text) for text in texts] + copying(1, 1) + finishing()
    warnings = document(events, [A, B])['warnings']
    assert warnings[:4] == ['the guest has no disk ' + B, 'x' * 1024, 'again', 'number 0']
    assert len(warnings) == 20


def test_a_disk_has_its_size_where_each_has_one():
    events = [source(A), source(B), Event('size', 7), Event('size', 8)]
    assert [disk.get('bytes') for disk in document(events, [B, A])['disks']] == [8, 7]
    events += copying(1, 2)
    assert [disk.get('bytes') for disk in document(events)['disks']] == [7]
    assert [disk.get('bytes') for disk in document(events + copying(2, 2))['disks']] == [7, 8]


def test_a_size_that_may_be_another_disk_s_is_not_shown():
    events = [source(A), Event('size', 7), Event('size', 8)] + copying(1, 1)
    assert 'bytes' not in document(events)['disks'][0]


def test_a_listed_disk_that_the_guest_has_not_is_marked():
    events = [source(A)] + copying(1, 1) + [percent(100), Event('idle', None)]
    state = finished(events, 0, None, [A, B])
    assert state['disks'] == [
        {'path': A, 'progress': 100}, {'path': B, 'progress': 0, 'unknown': True}]
    assert state['warnings'] == ['the guest has no disk ' + B]


def test_what_was_made_is_shown_until_it_proves_forged():
    events = [Event('image', 'i'), Event('upload_disk', 'd'), Event('upload_transfer', 't')]
    state = document(events)
    assert state['images'] == ['i']
    assert state['upload'] == {'disks': ['d'], 'transfers': ['t']}
    forged = document(events + [Event('forged', None)])
    assert 'images' not in forged and 'upload' not in forged


def test_what_could_not_be_removed_is_named():
    state = finished_document(document([]), 1, None, (), ['/images/x'])
    assert state['left_behind'] == ['/images/x']


def test_a_vm_that_is_complete_all_the_same_is_told():
    state = finished_document(document([]), 1, 'r', (), (), True)
    assert message(state) == 'r; but the new VM is complete, and was kept'
