"""Recorded output of real conversions, and what the state file has to say about each."""
import collections
import re

import pytest

from captures import Recording, condensed, load
from schemas import valid_state
from virt_v2v_wrapper import Facts, Parser, Progress, finished_document

FACTS = Facts(4711, 4710, 'vm', {'type': 'export_domain', 'directory': '/export/UUID'}, '/w.log',
              '/v.log', '2026-11-23T08:00:00Z')


# --- playing it --------------------------------------------------------------------------

# The last state of a conversion that goes on, without the time, and the events, sorted: how far
# messages are ahead of the output depends on how it is read. Progress is in the state.
Replayed = collections.namedtuple('Replayed', 'state events')


def play(recording, cuts, messages, listed=()):
    """Return the Replayed of a recording whose output is read in pieces.

    Before each piece all messages are read that virt-v2v had written by then.
    """
    parser, progress, found = Parser(messages), Progress(listed), []

    def apply(events):
        for event in events:
            progress.apply(event)
            found.append(event)
    waiting = list(recording.messages)
    edges = [0] + list(cuts) + [len(recording.output)]
    for start, end in zip(edges, edges[1:]):
        while waiting and waiting[0][0] <= end:
            apply(parser.messages(waiting.pop(0)[1]))
        apply(parser.output(recording.output[start:end]))
    apply(parser.end())
    state = valid_state(progress.document(FACTS))
    del state['updated_at']
    return Replayed(state, sorted((event for event in found if event.name != 'percent'), key=repr))


def in_pieces(recording, size):
    """Return where to cut the output for pieces of that size; None for one piece."""
    return range(size, len(recording.output), size) if size else ()


# --- what is in them ---------------------------------------------------------------------

Conversion = collections.namedtuple('Conversion', 'messages disks count phase error vm_id')
LOGIN = ("exception: libvirt: VIR_ERR_INTERNAL_ERROR: VIR_FROM_ESX: internal error: HTTP response"
         " code 500 for call to 'Login'. Fault: ServerFaultCode - Cannot complete login due to an"
         " incorrect user name or password.")
FULL = ('nbdcopy command failed, see earlier error messages (nbdkit: file.{}: error: pwrite: No'
        ' space left on device; nbdcopy: write at offset {} failed: No space left on device)')
# In 2.10 of another wording, and nbdkit 1.48 names the file.
FULL_2_10 = (
    'nbdcopy exited with non-zero error code 1 (nbdkit: file.13: error: pwrite: /var/cache/virt-v2v'
    '-wrapper-lab/run-mfbmlval/exports/tmp0pxzqcfu/2226da9f-7011-4a97-88ad-bef65e9e0be9/images/'
    '13ff25c7-d50f-48ce-8695-0918b5f9cbf1/5b98c902-7cb4-40c7-a597-2561ac648e04: offset=137547776,'
    ' count=77824: No space left on device; nbdcopy: write at offset 137363456 failed: No space'
    ' left on device)')
THUMBPRINT = ('libguestfs error: guestfs_launch failed, see earlier error messages (nbdkit[in0]:'
              ' vddk[1]: error: VixDiskLib_Open: the thumbprint does not match the server)')
REFUSED_1_44 = (
    'qemu-img command failed, see earlier errors (ConnectionRefusedError: [Errno 111] Connection'
    ' refused; qemu-img: error while writing at byte 133693440: Input/output error;'
    ' ConnectionResetError: [Errno 104] Connection reset by peer)')
NO_SERVER = (
    'nbdcopy command failed, see earlier error messages (BrokenPipeError: [Errno 32] Broken pipe;'
    ' ssl.SSLError: [SSL: UNEXPECTED_EOF_WHILE_READING] unexpected eof while reading'
    ' (_ssl.c:2650); nbdcopy: write at offset 406847488 failed: Input/output error;'
    ' nbdkit: python.7: error: write reply: NBD_CMD_WRITE: Broken pipe)')
NO_SERVER_2_2 = (
    'nbdcopy command failed, see earlier error messages (ssl.SSLEOFError: EOF occurred in violation'
    ' of protocol (_ssl.c:2393); nbdcopy: write at offset 402653184 failed: Input/output error;'
    ' nbdkit: python.6: error: read data: NBD_CMD_WRITE: Connection reset by peer)')
NO_SERVER_2_10 = (
    'nbdcopy exited with non-zero error code 1 (nbdcopy: write at offset 541065216 failed:'
    ' Input/output error; BrokenPipeError: [Errno 32] Broken pipe; ssl.SSLError: [SSL:'
    ' UNEXPECTED_EOF_WHILE_READING] unexpected eof while reading (_ssl.c:2778);'
    ' nbdkit: python.7: error: write reply: NBD_CMD_WRITE: Broken pipe)')
STOPPED = 'virt-v2v was told to stop by SIGTERM'
LAB3 = [('[ds] lab3/lab3.vmdk', 100), ('[ds] lab3/lab3_1.vmdk', 100),
        ('[ds] lab3/lab3_2.vmdk', 100)]


def lab3(vm_id):
    """Return the Conversion of the guest with three disks, which succeeded."""
    return Conversion(True, LAB3, 3, 'Finishing off', None, vm_id)


CONVERSIONS = {
    '2.2.0-vddk-three-disks': Conversion(
        True, [('[ds] slow3/slow3.vmdk', 100), ('[ds] slow3/slow3_1.vmdk', 100),
               ('[ds] slow3/slow3_2.vmdk', 100)], 3, 'Finishing off', None,
        '4aaed60a-be8a-4362-b7f6-9252502c72fc'),
    '2.2.0-vddk-one-disk': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 100)], 1, 'Finishing off', None,
        'da425721-8c5c-43f7-bc6b-5feaae7f3311'),
    '2.2.0-vddk-bad-password': Conversion(
        True, [], 0, 'Setting up the source: -i libvirt -ic'
        ' esx://root@127.0.0.1:8989?no_verify=1 -it vddk lab1', LOGIN, None),
    '2.2.0-vddk-disk-full': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 0)], 1, 'Copying disk 1/1',
        FULL.format(3, 51904512), None),
    '2.2.0-vddk-sigterm': Conversion(
        True, [('[ds] slow1/slow1.vmdk', 12)], 1, 'Copying disk 1/1', STOPPED, None),
    '2.2.0-vddk-sigkill': Conversion(
        True, [('[ds] slow1/slow1.vmdk', 12)], 1, 'Copying disk 1/1', None, None),
    '2.2.0-vddk-upload': lab3('81abfe53-dbcc-440f-b1d8-2e47de8ba81a'),
    '2.2.0-vddk-upload-no-server': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 62)], 1, 'Copying disk 1/1', NO_SERVER_2_2, None),
    '2.2.0': Conversion(
        True, [('disk 1', 100), ('disk 2', 100)], 2, 'Finishing off', None,
        '3f14867f-454f-4214-ae97-19a114110527'),
    '2.10.0': Conversion(
        True, [('disk 1', 100), ('disk 2', 100)], 2, 'Finishing off', None,
        '290bb2e7-8dcf-4f20-820d-16947ed1bbda'),
    '2.10.0-vddk-three-disks': lab3('d4e859c7-cbec-48c8-8124-5de9b1a2f6b9'),
    '2.10.0-vddk-bad-thumbprint': Conversion(True, [], 0, 'Opening the source', THUMBPRINT, None),
    '2.10.0-vddk-disk-full': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 62)], 1, 'Copying disk 1/1', FULL_2_10, None),
    '2.10.0-vddk-sigterm': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 25)], 1, 'Copying disk 1/1', STOPPED, None),
    '2.10.0-vddk-upload': lab3('cc722f9e-f2f4-4444-bace-6783f7dcc3ac'),
    '2.10.0-vddk-upload-no-server': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 62)], 1, 'Copying disk 1/1', NO_SERVER_2_10, None),
    '1.44.2-vddk-three-disks': lab3('eac6978b-e59b-4abd-83f4-d6bdc164d74e'),
    '1.44.2-vddk-qcow2': lab3('696b8021-3478-481c-9684-697d1469d1ab'),
    '1.44.2-vddk-bad-password': Conversion(
        True, [], 0, 'Opening the source -i libvirt -ic'
        ' esx://root@127.88.232.78:46457?no_verify=1 lab1 -it vddk  -io vddk-libdir=/var/cache/'
        'virt-v2v-wrapper-lab/run-3q91mrhm/vddk-0 -io vddk-thumbprint='
        'A8:6C:98:41:34:37:99:A9:10:5E:18:43:7E:19:48:BD:80:AF:9B:61', LOGIN, None),
    '1.44.2-vddk-bad-thumbprint': Conversion(
        True, [], 0, 'Creating an overlay to protect the source from being modified',
        'qemu-img command failed, see earlier errors (nbdkit: vddk[1]: error: VixDiskLib_Open: the'
        ' thumbprint does not match the server)', None),
    '1.44.2-vddk-disk-full': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 39.62)], 1, 'Copying disk 1/1',
        'qemu-img command failed, see earlier errors (qemu-img: error while writing at byte'
        ' 136314880: No space left on device)', None),
    '1.44.2-vddk-upload': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 100)], 1, 'Finishing off', None,
        '584d2ae2-5c23-411b-80e2-08cd9964c344'),
    '1.44.2-vddk-upload-no-server': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 27.55)], 1, 'Copying disk 1/1', REFUSED_1_44, None),
    '2.6.0-vddk-three-disks': lab3('82730728-8336-4488-aacd-f0f1fa4188d4'),
    '2.6.0-vddk-qcow2': lab3('cca4ca4e-d39a-41d9-b5d8-58e2c33510c7'),
    '2.6.0-vddk-bad-password': Conversion(
        True, [], 0, 'Setting up the source: -i libvirt -ic'
        ' esx://root@127.43.133.181:44001?no_verify=1 -it vddk lab1', LOGIN, None),
    '2.6.0-vddk-bad-thumbprint': Conversion(
        True, [], 0, 'Opening the source', THUMBPRINT.replace('[in0]', ''), None),
    '2.6.0-vddk-disk-full': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 62)], 1, 'Copying disk 1/1', FULL.format(7, 137887744),
        None),
    '2.6.0-vddk-sigterm': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 25)], 1, 'Copying disk 1/1', STOPPED, None),
    '2.6.0-vddk-upload': lab3('6f23dfdf-6043-4ba8-be26-de6b24616d69'),
    '2.6.0-vddk-upload-no-server': Conversion(
        True, [('[ds] lab1/lab1.vmdk', 62)], 1, 'Copying disk 1/1', NO_SERVER, None),
    '1.40.2': Conversion(
        False, [('disk 1', 100), ('disk 2', 100)], 2, 'Finishing off', None,
        '9a070ebc-048f-4e3b-a412-e2f72f8fdbc1'),
    '1.36.13': Conversion(False, [], 0, 'Opening the overlay', None, None),
}
# The disks and the transfers of an upload.
UPLOADS = {
    '1.44.2-vddk-upload': (
        ['558032ae-29e7-4205-bd07-8b2195d7fa7a'], ['97203c1f-0570-4f84-9bb6-a5ed575a82a1']),
    '1.44.2-vddk-upload-no-server': (
        ['44d1188a-a1ee-43b0-a7e5-7b7bf9cf4a62'], ['e80153b5-7a3f-4789-a82c-bbdffc72a4b8']),
    '2.2.0-vddk-upload': (
        ['7c522d56-6ff3-4f90-b763-c4e83c9e05d1', '63822088-f431-4826-8ee4-e8e3314fcbcc',
         '7d8332d8-2582-42f2-af1f-6f3c98d6f6dd'],
        ['2309de3d-3f71-4552-b04f-05c86f129f19', 'dd7dcf94-1184-4d28-9f39-d3df8313622a',
         'e3273811-784c-47c6-bf05-29790ccf5a8d']),
    '2.2.0-vddk-upload-no-server': (
        ['2c69fe46-d549-4440-ad34-16bc05bb72ae'], ['9eb50a25-bd7e-4662-803f-485a2e18e117']),
    '2.6.0-vddk-upload': (
        ['63013d98-7710-42ea-94c7-0ec4df69b3e7', '59193262-1a8d-407d-9e02-ca9d082d753f',
         'bc667464-ad08-4211-b719-0af46713606f'],
        ['d9c866cb-374d-4e12-9244-4b0f95e820c7', '298b5420-85a6-4b60-b6af-d35ab4750fee',
         '3cb8c9de-0c78-4e98-947b-dfd40f71a8f8']),
    '2.6.0-vddk-upload-no-server': (
        ['fa027605-4d60-488c-9ac3-3116c912bb16'], ['f0f4579e-1b7f-4596-9b9c-d37a94696d28']),
    '2.10.0-vddk-upload': (
        ['dc35374b-1de2-4c97-bd4d-08ddc470bb11', '58bae058-6444-4011-844a-c4c6b078fddc',
         '6a4a2fdb-da04-41fb-afa0-dbea51fa5283'],
        ['49144304-4998-4b53-8aa1-d4c09ac1c949', 'dbb47f84-8124-47ea-acd1-2fafc282cce9',
         '01717aa5-8cf9-424e-9daf-e79281aa101c']),
    '2.10.0-vddk-upload-no-server': (
        ['dcc25cf7-46b1-446c-be2f-a9f7dfe5ec1f'], ['42e06372-9b19-4076-a94f-e9e97e2d0a04']),
}
NAMES = sorted(CONVERSIONS)
LOADED = {name: load(name) for name in NAMES}


def replayed(name, listed=()):
    """Return the Replayed of that recording, read in one piece."""
    return play(LOADED[name], (), CONVERSIONS[name].messages, listed)


# --- the facts ---------------------------------------------------------------------------

@pytest.mark.parametrize('name', NAMES)
def test_a_recording_has_its_disks_with_their_progress(name):
    disks = replayed(name).state['disks']
    assert [(disk['path'], disk['progress']) for disk in disks] == CONVERSIONS[name].disks


@pytest.mark.parametrize('name', NAMES)
def test_a_recording_has_its_number_of_disks(name):
    assert replayed(name).state['disk_count'] == CONVERSIONS[name].count


@pytest.mark.parametrize('name', NAMES)
def test_a_recording_has_its_last_phase(name):
    phase = replayed(name).state['phase']
    assert re.sub(' -o rhv.*| to (?:/|qemu).*', '', phase) == CONVERSIONS[name].phase


@pytest.mark.parametrize('name', NAMES)
def test_a_recording_has_its_error(name):
    text = CONVERSIONS[name].error
    assert replayed(name).state.get('last_message', {}).get('message') == text


@pytest.mark.parametrize('name', NAMES)
def test_a_recording_has_the_id_of_its_vm(name):
    assert replayed(name).state.get('vm_id') == CONVERSIONS[name].vm_id


@pytest.mark.parametrize('name', sorted(UPLOADS))
def test_a_recording_has_what_was_made_for_its_upload(name):
    disks, transfers = UPLOADS[name]
    assert replayed(name).state['upload'] == {'disks': disks, 'transfers': transfers}


def test_listed_disks_are_those_that_are_copied():
    listed = tuple(path for path, _ in CONVERSIONS['2.2.0-vddk-three-disks'].disks[::-1])
    disks = replayed('2.2.0-vddk-three-disks', listed).state['disks']
    assert [(disk['path'], disk['progress']) for disk in disks] == [(path, 100) for path in listed]


@pytest.mark.parametrize('name', ['2.2.0', '2.10.0', '1.40.2'])
def test_listed_disks_stand_in_for_those_that_nothing_names(name):
    disks = replayed(name, ('[ds] b', '[ds] a')).state['disks']
    assert [(disk['path'], disk['progress']) for disk in disks] == [
        ('[ds] b', 100), ('[ds] a', 100)]


@pytest.mark.parametrize('name, return_code, text', [
    (name, 1, conversion.error) for name, conversion in CONVERSIONS.items() if conversion.error
] + [('2.2.0-vddk-sigkill', -9, 'virt-v2v was killed by SIGKILL')])
def test_the_final_state_says_why_it_failed(name, return_code, text):
    state = valid_state(finished_document(replayed(name).state, return_code, None))
    assert state['last_message']['message'] == text
    assert state.get('cancelled') == (True if text == STOPPED else None)


# --- in pieces ---------------------------------------------------------------------------

@pytest.mark.parametrize('size', [1 << 16, 7])
@pytest.mark.parametrize('name', NAMES)
def test_it_does_not_matter_in_what_pieces_output_is_read(name, size):
    pieces = in_pieces(LOADED[name], size)
    assert play(LOADED[name], pieces, CONVERSIONS[name].messages) == replayed(name)


@pytest.mark.long
@pytest.mark.parametrize('name', NAMES)
def test_output_may_be_read_byte_by_byte(name):
    pieces = in_pieces(LOADED[name], 1)
    assert play(LOADED[name], pieces, CONVERSIONS[name].messages) == replayed(name)


@pytest.mark.parametrize('name', NAMES)
def test_a_condensed_recording_says_the_same(name):
    """So the tests that cut it up are about something."""
    assert play(condensed(LOADED[name]), (), CONVERSIONS[name].messages) == replayed(name)


@pytest.mark.parametrize('name', NAMES)
def test_condensed_output_may_be_read_byte_by_byte(name):
    recording = condensed(LOADED[name])
    pieces = in_pieces(recording, 1)
    assert play(recording, pieces, CONVERSIONS[name].messages) == replayed(name)


def wrong_cuts(name, step=1):
    """Return the places where the output, cut in two there, says something else."""
    recording, expected = condensed(LOADED[name]), replayed(name)
    return [cut for cut in range(1, len(recording.output), step)
            if play(recording, (cut,), CONVERSIONS[name].messages) != expected]


@pytest.mark.parametrize('name', [
    '1.36.13', '2.2.0-vddk-bad-password', '2.2.0-vddk-disk-full', '1.40.2'])
def test_output_may_be_cut_in_two_at_any_byte(name):
    assert wrong_cuts(name) == []


@pytest.mark.long
@pytest.mark.parametrize('name', NAMES)
def test_output_of_any_recording_may_be_cut_in_two_at_any_byte(name):
    assert wrong_cuts(name) == []


@pytest.mark.parametrize('name', [name for name in NAMES if CONVERSIONS[name].messages])
def test_messages_may_be_read_byte_by_byte(name):
    lines = b''.join(line for _, line in LOADED[name].messages)
    pieces = Parser(True)
    events = [event for at in range(len(lines)) for event in pieces.messages(lines[at:at + 1])]
    assert events == Parser(True).messages(lines)


@pytest.mark.parametrize('name', [name for name in NAMES if CONVERSIONS[name].messages])
def test_all_messages_may_be_there_before_any_output(name):
    early = [(0, line) for _, line in LOADED[name].messages]
    recording = Recording(LOADED[name].output, early)
    disks = play(recording, (), True).state['disks']
    assert [disk['path'] for disk in disks] == [path for path, _ in CONVERSIONS[name].disks]
