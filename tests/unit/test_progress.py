"""What the events of a conversion add up to, and the state that is published of it."""
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virt_v2v_wrapper import (
    Cause, Ending, Error, Guest, Notice, Opened, Percent, Phase, Reached, Source, Start, error_text,
    failure_text, finished_document, fold, no_progress, signal_name, state_document, timestamp)

A, B, C = '[ds] vm/a.vmdk', '[ds] vm/b.vmdk', '[ds] vm/c.vmdk'
START = Start(pid=4711, wrapper_pid=4710, started_at='2026-11-23T08:00:00Z')
END = '2026-11-23T09:00:00Z'
POINTER = 'nbdcopy command failed, see earlier error messages'


def folded(events, listed=()):
    """Return the Progress that the events add up to."""
    progress = no_progress(tuple(listed))
    for event in events:
        progress = fold(progress, event)
    return progress


def copying(number, count):
    """Return the events of virt-v2v beginning with a copy."""
    text = 'Copying disk {}/{}'.format(number, count)
    return [Phase(text, (number, count)), Reached(number)]


def finishing():
    return [Phase('Finishing off', None), Reached(0)]


def document(events, listed=()):
    """Return the state while the conversion goes on."""
    return state_document(START, folded(events, listed))


def disks(events, listed=()):
    """Return [(path, progress)] in that state."""
    return [(disk['path'], disk['progress']) for disk in document(events, listed)['disks']]


# --- which disks there are ---------------------------------------------------------------

def test_there_are_no_disks_until_virt_v2v_names_them():
    assert disks([]) == []


def test_listed_disks_are_there_from_the_start_in_their_order():
    assert disks([], [B, A]) == [(B, 0), (A, 0)]


def test_a_source_is_no_disk_before_it_is_copied():
    assert disks([Source(A)]) == []


def test_the_nth_copy_is_the_nth_source():
    events = [Source(A), Source(B)] + copying(1, 2) + [Percent(44)] + copying(2, 2)
    assert disks(events) == [(A, 100), (B, 0)]


def test_the_nth_copy_is_the_nth_source_whatever_is_listed():
    events = [Source(A), Source(B)] + copying(1, 2) + [Percent(44)]
    assert disks(events, [B, A]) == [(B, 0), (A, 44)]


def test_a_source_that_is_opened_twice_is_one_source():
    events = [Source(A), Source(A), Source(B)] + copying(1, 2) + copying(2, 2)
    assert disks(events) == [(A, 100), (B, 0)]


def test_what_is_opened_during_a_copy_is_its_disk():
    events = copying(1, 2) + [Opened(B), Percent(7)] + copying(2, 2) + [Opened(A), Percent(8)]
    assert disks(events, [A, B]) == [(A, 8), (B, 100)]


def test_a_disk_that_is_not_listed_is_added_behind_the_list():
    events = copying(1, 1) + [Opened(C), Percent(44)]
    assert disks(events, [A, B]) == [(A, 0), (B, 0), (C, 44)]


def test_the_nth_copy_is_the_nth_listed_if_nothing_names_it():
    events = copying(1, 2) + [Percent(44)] + copying(2, 2) + [Percent(55)]
    assert disks(events, [B, A]) == [(B, 100), (A, 55)]


def test_a_listed_disk_copied_already_is_no_other():
    events = copying(1, 2) + [Opened(B)] + copying(2, 2) + [Percent(44)]
    assert disks(events, [A, B]) == [(A, 44), (B, 100)]


def test_a_copy_that_nothing_names_is_listed_by_its_number():
    events = copying(1, 2) + copying(2, 2) + [Percent(44)]
    assert disks(events) == [('disk 1', 100), ('disk 2', 44)]


def test_a_number_stands_for_a_disk_until_its_path_shows():
    events = copying(1, 1) + [Percent(44), Opened(A)]
    assert disks(events) == [(A, 44)]


def test_what_shows_its_path_once_keeps_it():
    events = [Source(A)] + copying(1, 2) + [Opened(B), Percent(44)]
    assert disks(events) == [(A, 44)]


def test_more_copies_than_listed_disks_are_all_there():
    events = copying(1, 2) + copying(2, 2) + [Percent(44)]
    assert disks(events, [A]) == [(A, 100), ('disk 2', 44)]


def test_a_listed_disk_called_like_a_number_is_no_other():
    events = copying(1, 2) + [Percent(44)] + copying(2, 2)
    assert disks(events, ['disk 2'])[0] == ('disk 2', 100)


def test_what_is_opened_outside_of_a_copy_is_no_disk():
    assert disks([Opened(A)] + copying(1, 1) + finishing() + [Opened(B)]) == [('disk 1', 0)]


# --- how many ----------------------------------------------------------------------------

@pytest.mark.parametrize('events, listed, count', [
    ([], [], 0),
    ([], [A, B], 2),
    ([Source(A)], [], 0),
    (copying(1, 3), [], 3),
    (copying(1, 3), [A], 3),
    (copying(1, 1), [A, B], 1),
    (copying(1, 2) + copying(2, 2) + finishing(), [], 2),
])
def test_the_count_is_the_list_s_until_virt_v2v_has_its_own(events, listed, count):
    assert document(events, listed)['disk_count'] == count


# --- how far -----------------------------------------------------------------------------

def test_progress_is_that_of_the_copy_it_follows():
    assert disks(copying(1, 2) + [Percent(12.34)]) == [('disk 1', 12.34)]


def test_progress_never_goes_backwards():
    assert disks(copying(1, 1) + [Percent(44), Percent(12)]) == [('disk 1', 44)]


def test_a_copy_that_is_announced_again_goes_on():
    assert disks(copying(1, 1) + [Percent(44)] + copying(1, 1)) == [('disk 1', 44)]


def test_a_disk_is_complete_when_the_next_one_starts():
    assert disks(copying(1, 2) + [Percent(44)] + copying(2, 2), [A, B]) == [(A, 100), (B, 0)]


def test_disks_that_were_not_copied_yet_are_not_complete():
    assert disks(copying(1, 3) + copying(2, 3), [A, B, C]) == [(A, 100), (B, 0), (C, 0)]


def test_progress_outside_of_a_copy_is_nobodys():
    assert disks([Percent(7)] + copying(1, 1) + finishing() + [Percent(44)]) == [('disk 1', 0)]


# --- messages ----------------------------------------------------------------------------

def test_the_phase_is_the_latest_one():
    assert document(copying(1, 1) + finishing())['phase'] == 'Finishing off'


def test_the_id_of_the_vm_is_the_last_one():
    """The OVF is the last that virt-v2v prints; what came before may be the guest's."""
    assert document([Guest('first'), Guest('second')])['vm_id'] == 'second'


def test_a_copy_does_not_begin_after_a_later_one():
    events = [Reached(2), Percent(10), Reached(1)]
    assert [disk['progress'] for disk in document(events)['disks']] == [10]


def test_a_warning_is_no_error():
    assert 'last_message' not in document([Notice('careful')])


def test_an_error_is_the_last_message():
    assert document([Error('no such guest')])['last_message'] == {
        'type': 'error', 'message': 'no such guest'}


NBDKIT = Cause('nbdkit', 'nbdkit: file.3: error: pwrite: No space left on device')
NBDCOPY = Cause('nbdcopy', 'nbdcopy: write at offset 7 failed: No space left on device')
CAUSE = NBDKIT.text + '; ' + NBDCOPY.text


@pytest.mark.parametrize('events, text', [
    ([], None),
    ([NBDKIT], None),
    ([Error('no such guest')], 'no such guest'),
    ([NBDKIT, Error('no such guest')], 'no such guest'),
    ([Error(POINTER)], POINTER),
    ([NBDKIT, NBDCOPY, Error(POINTER)], '{} ({})'.format(POINTER, CAUSE)),
    ([Error(POINTER), NBDKIT, NBDCOPY], '{} ({})'.format(POINTER, CAUSE)),
    ([NBDKIT, NBDCOPY, Cause('nbdkit', 'nbdkit: file.1: error: later'), Error(POINTER)],
     '{} ({})'.format(POINTER, CAUSE)),
    ([NBDKIT, Error('libguestfs error: guestfs_launch failed, see earlier error messages')],
     'libguestfs error: guestfs_launch failed, see earlier error messages (' + NBDKIT.text + ')'),
    ([Cause('mount', 'mount: bad option'), Error('mount command failed, see earlier errors.')],
     'mount command failed, see earlier errors. (mount: bad option)'),
    ([Cause('nbdkit', 'nbdkit: error: x'),
      Error('nbdkit did not start up.  See previous debugging messages for problems.')],
     'nbdkit did not start up.  See previous debugging messages for problems. (nbdkit: error: x)'),
    ([NBDKIT] + finishing() + [Error(POINTER)], POINTER),
])
def test_an_error_that_points_back_is_followed_by_its_cause(events, text):
    assert error_text(folded(events)) == text


@pytest.mark.parametrize('return_code, error, reason, text', [
    (0, None, None, None),
    (0, 'e', None, None),
    (0, 'e', 'r', None),
    (1, 'e', None, 'e'),
    (1, None, None, 'virt-v2v ended with status 1 and no error message, as it does when a signal'
                    ' tells it to stop'),
    (2, '', None, 'virt-v2v ended with status 2 and no error message, as it does when a signal'
                  ' tells it to stop'),
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
def test_a_failure_says_what_is_known_of_it(return_code, error, reason, text):
    assert failure_text(return_code, error, reason) == text


@pytest.mark.parametrize('number, name', [(9, 'SIGKILL'), (15, 'SIGTERM'), (33, 'signal 33')])
def test_a_signal_has_a_name(number, name):
    assert signal_name(number) == name


# --- the published document --------------------------------------------------------------

FULL = [Source(A)] + copying(1, 1) + [Percent(44.5), Guest('id'), Error('e')]
FIRST_KEYS = ['started', 'pid', 'wrapper_pid', 'disks', 'disk_count', 'started_at', 'updated_at']
TIME = re.compile('[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z')


def published(state):
    """Return the state as its readers get it."""
    return json.loads(json.dumps(state))


@pytest.mark.parametrize('events, more', [
    ([], []),
    (FULL, ['phase', 'vm_id', 'last_message']),
])
def test_the_keys_have_an_order(events, more):
    assert list(document(events)) == FIRST_KEYS + more


def test_the_return_code_is_there_when_virt_v2v_has_ended():
    state = state_document(START, folded(FULL), -15)
    assert list(state) == FIRST_KEYS + ['phase', 'vm_id', 'return_code', 'last_message']
    assert state['return_code'] == -15


def test_the_return_code_may_be_0():
    assert state_document(START, folded([]), 0)['return_code'] == 0


def test_the_state_is_json_of_the_published_types():
    state = published(document(FULL))
    assert TIME.fullmatch(state.pop('updated_at'))
    assert state == {
        'started': True, 'pid': 4711, 'wrapper_pid': 4710,
        'disks': [{'path': A, 'progress': 44.5}], 'disk_count': 1,
        'started_at': START.started_at, 'phase': 'Copying disk 1/1', 'vm_id': 'id',
        'last_message': {'type': 'error', 'message': 'e'}}


def test_a_disk_has_its_path_first():
    assert [list(disk) for disk in document([], [A])['disks']] == [['path', 'progress']]


@pytest.mark.parametrize('absent', ['finished', 'failed', 'return_code', 'finished_at'])
def test_what_only_the_end_brings_is_absent_before(absent):
    assert absent not in document(FULL)


@pytest.mark.parametrize('seconds, text', [
    (0, '1970-01-01T00:00:00Z'), (1e9 + 0.9, '2001-09-09T01:46:40Z')])
def test_a_time_is_utc(seconds, text):
    assert timestamp(seconds) == text


def finished(events, return_code, message, listed=()):
    """Return the final state."""
    return finished_document(document(events, listed), Ending(return_code, message, END))


def test_success_is_finished_without_failed_or_message():
    state = published(finished(FULL, 0, None))
    assert state == {
        'started': True, 'pid': 4711, 'wrapper_pid': 4710,
        'disks': [{'path': A, 'progress': 100}], 'disk_count': 1,
        'started_at': START.started_at, 'updated_at': END, 'finished_at': END,
        'phase': 'Copying disk 1/1', 'vm_id': 'id', 'return_code': 0, 'finished': True}


def test_all_disks_are_complete_after_success():
    state = finished(copying(1, 2) + [Percent(7)], 0, None, [A, B])
    assert [disk['progress'] for disk in state['disks']] == [100, 100]


def test_failure_is_finished_and_failed_with_its_message():
    state = published(finished(FULL, -9, 'killed'))
    assert state == {
        'started': True, 'pid': 4711, 'wrapper_pid': 4710,
        'disks': [{'path': A, 'progress': 44.5}], 'disk_count': 1,
        'started_at': START.started_at, 'updated_at': END, 'finished_at': END,
        'phase': 'Copying disk 1/1', 'vm_id': 'id', 'return_code': -9, 'failed': True,
        'last_message': {'type': 'error', 'message': 'killed'}, 'finished': True}


def test_finished_is_the_last_key():
    assert list(finished(FULL, 1, 'e'))[-1] == 'finished'


def test_a_return_code_that_nobody_knows_is_absent():
    assert 'return_code' not in finished([], None, 'gone')


@pytest.mark.parametrize('return_code, message', [(0, None), (1, 'e')])
def test_finishing_a_state_leaves_the_given_one_as_it_was(return_code, message):
    state = document(FULL)
    before = published(state)
    finished_document(state, Ending(return_code, message, END))
    assert published(state) == before


# --- any order of events -----------------------------------------------------------------

# "disk 2" is what the wrapper itself may call a disk.
PATHS = [A, B, C, 'disk 2', '\u00fc']
NUMBERS = st.integers(1, 4)
PHASES = st.tuples(NUMBERS, NUMBERS).map(sorted).map(
    lambda pair: Phase('Copying disk {}/{}'.format(*pair), tuple(pair)))
EVENTS = st.lists(st.one_of(
    PHASES,
    st.builds(Reached, st.integers(0, 4)),
    st.builds(Percent, st.integers(0, 100) | st.floats(0, 100)),
    st.builds(Source, st.sampled_from(PATHS)),
    st.builds(Opened, st.sampled_from(PATHS)),
    st.builds(Error, st.sampled_from(['e', POINTER])),
    st.builds(Cause, st.sampled_from(['nbdkit', 'nbdcopy']), st.just('c')),
    st.builds(Guest, st.sampled_from(['x', 'y'])),
    st.builds(Notice, st.just('n')),
    st.just(Phase('Finishing off', None)),
), max_size=25)
LISTED = st.lists(st.sampled_from(PATHS), unique=True, max_size=4)


def states(events, listed):
    """Yield {path: progress} after each event; no path may be there twice."""
    progress = no_progress(tuple(listed))
    for event in events:
        progress = fold(progress, event)
        shown = state_document(START, progress)['disks']
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
