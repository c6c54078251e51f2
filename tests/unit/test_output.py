"""virt-v2v's output, line by line: what each kind of line means, and when it may be believed."""
import ast
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rooms
import virt_v2v_wrapper
from captures import recorded
from virt_v2v_wrapper import (
    CHUNK, MAX_ANNOUNCED, MAX_LINE, MAX_MESSAGE, MAX_MESSAGE_LINE, Event, Facts, Lines, Parser,
    Progress, clean, copying_disk)

pytestmark = pytest.mark.promise(8)

FACTS = Facts(4711, 4710, 'vm', {}, '/w.log', '/v.log', '2026-11-23T08:00:00Z')
ID = '4aaed60a-be8a-4362-b7f6-9252502c72fc'
SECTION = "    <Section ovf:id='{}' ovf:required='false' xsi:type='ovf:{}'>".format(
    ID, 'OperatingSystemSection_Type')
BAR = ' {}% [{:-<40}]'
# A phase that begins each stage of a conversion, as 2.x and as 1.x call it.
OPENING = 'Setting up the source: -i libvirt -ic esx://root@host -it vddk vm'
GUEST = 'Inspecting the source'
TARGET = 'Setting up the destination: -o rhv'
COPYING = 'Copying disk 1/2'
METADATA = 'Creating output metadata'
STAGES = [OPENING, 'Opening the source', GUEST, TARGET, COPYING, METADATA, 'Finishing off']


def line(text):
    return text.encode('utf-8') + b'\n'


def phase_line(text):
    return line('[  12.3] ' + text)


def json_message(text, kind='message'):
    return line(json.dumps({'message': text, 'timestamp': '2026-11-23', 'type': kind}))


def modern(phase=None):
    """Return a parser for a version with messages, in that phase."""
    parser = Parser(True)
    if phase is not None:
        parser.messages(json_message(phase))
        parser.output(phase_line(phase))
    return parser


def legacy(phase=None):
    """Return a parser for a version without messages, in that phase."""
    parser = Parser(False)
    if phase is not None:
        parser.output(phase_line(phase))
    return parser


def in_modern(phase, *lines):
    """Return the events in lines that are read during that phase, and at the end."""
    parser = modern(phase)
    return parser.output(b''.join(map(line, lines))) + parser.end()


def in_legacy(phase, *lines):
    """Return the same for a version without messages."""
    parser = legacy(phase)
    return parser.output(b''.join(map(line, lines))) + parser.end()


def in_chunks(parser, data, size=CHUNK):
    """Return the events in data that is read in chunks, and at the end."""
    return [event for start in range(0, len(data), size)
            for event in parser.output(data[start:start + size])] + parser.end()


# --- which disk --------------------------------------------------------------------------

def vddk_command(path, before=" LANG=C 'nbdkit' '--filter' 'cow' ", after=" 'user=root'"):
    return "{}'vddk' 'server=h' 'vm=moref=5' 'file={}'{}".format(before, path, after)


@pytest.mark.parametrize('command, path', [
    (vddk_command('[ds] vm/vm.vmdk'), '[ds] vm/vm.vmdk'),
    (vddk_command('[ds] vm/vm.vmdk', after=''), '[ds] vm/vm.vmdk'),
    (vddk_command('[ds] vm/vm.vmdk', before="'nbdkit' "), '[ds] vm/vm.vmdk'),
    ("'nbdkit' 'vddk' 'file=[ds] vm/vm.vmdk' 'server=h'", '[ds] vm/vm.vmdk'),
    (vddk_command("[ds] it'\\''s/it'\\''s.vmdk"), "[ds] it's/it's.vmdk"),
    (vddk_command("'\\''[ds] quoted'\\''"), "'[ds] quoted'"),
    (vddk_command('[d s] \u00dc "x" $y/z.vmdk'), '[d s] \u00dc "x" $y/z.vmdk'),
])
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_the_command_of_a_vddk_nbdkit_names_the_next_source(events, command, path):
    assert events('Opening the source', 'running nbdkit:', command) == [('source', path)]


@pytest.mark.parametrize('command', [
    "'nbdkit' 'file' 'file=/export/images/a/b' 'cache=none'",
    "'nbdkit' 'vddk' 'server=h' 'export=<wildcard>'",
    "'nbdkit' 'vddk' 'file=' 'server=h'",
    "'file=[ds] before' 'vddk' 'server=h'",
])
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_the_command_of_another_nbdkit_names_no_source(events, command):
    assert events('Opening the source', command) == []


@pytest.mark.parametrize('phase', [TARGET, COPYING, METADATA])
def test_a_vddk_command_after_the_sources_were_opened_names_none(phase):
    assert in_modern(phase, vddk_command('[ds] vm/vm.vmdk')) == []


@pytest.mark.parametrize('path', ['[ds] vm/vm.vmdk', "[ds] it's \u00fc/x, value=y.vmdk"])
def test_a_config_line_names_the_next_source_in_old_versions(path):
    text = 'nbdkit: debug: vddk: config key=file, value=' + path
    assert in_legacy('Opening the source', text) == [('source', path)]


@pytest.mark.parametrize('prefix', [
    'nbdkit: vddk[3]: debug: ', 'nbdkit[in0]: vddk[3]: debug: ', 'nbdkit[in0]: debug: ',
    'nbdkit: debug: ', ''])
@pytest.mark.parametrize('path', [
    '[ds] vm/vm.vmdk', '[d s-1] a b/c (d).vmdk', "[ds] it's/\u00fc.vmdk", '[ds] a (b) (c)/d.vmdk'])
def test_the_file_that_vddk_opens_names_the_disk_being_copied(prefix, path):
    text = '{0}Opening file {1} (vpxa-nfcssl://{1}@10.0.0.1:902)'.format(prefix, path)
    assert in_modern(COPYING, text) == [('opened', path)]


@pytest.mark.parametrize('scheme', ['vpxa-nfcssl', 'vpxa-nfc', 'ha-nfcssl', 'ha-nfc'])
def test_the_file_that_vddk_opens_may_come_by_any_transport(scheme):
    """ha-nfcssl is what a library says that talks to an ESX server without a vCenter."""
    text = 'nbdkit: vddk[3]: debug: Opening file [ds] a ({}://[ds] a@10.0.0.1:902)'.format(scheme)
    assert in_modern(COPYING, text) == [('opened', '[ds] a')]


@pytest.mark.parametrize('phase', [OPENING, 'Opening the source', GUEST, TARGET])
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_a_file_that_vddk_opens_before_the_copy_names_no_disk(events, phase):
    text = 'nbdkit: vddk[1]: debug: Opening file [ds] a (vpxa-nfcssl://[ds] a@10.0.0.1:902)'
    assert events(phase, text) == []


@pytest.mark.parametrize('uri, path', [
    ('%5bds%5d%20vm/vm.vmdk', '[ds] vm/vm.vmdk'),
    ('%5Bds%5D%20vm/vm.vmdk', '[ds] vm/vm.vmdk'),
    ('%5bds%5d%20%c3%bc%27%25%3f/vm.vmdk', "[ds] \u00fc'%?/vm.vmdk"),
    ('%5bds%5d%20a%2520b', '[ds] a%20b'),
])
def test_the_uri_in_an_nbdcopy_command_names_the_disk(uri, path):
    text = ("nbdcopy 'nbd+unix:///{}?socket=/tmp/v2v.x/in0' 'nbd+unix:///?socket=/tmp/v2v.x/out0'"
            " '--requests=64' '--flush' '--progress'").format(uri)
    assert in_modern(COPYING, text) == [('opened', path)]


@pytest.mark.parametrize('text', [
    "nbdcopy 'nbd+unix:///?socket=/tmp/v2v.x/in0' 'nbd+unix:///?socket=/tmp/v2v.x/out0'",
    "echo 'nbd+unix:///%5bds%5d%20a?socket=/tmp/v2v.x/in0'",
])
def test_other_commands_name_no_disk(text):
    assert in_modern(COPYING, text) == []


# --- how far -----------------------------------------------------------------------------

@pytest.mark.parametrize('text, value', [
    ('\u259d' + BAR.format('  0', ''), 0),
    ('\u2597' + BAR.format(' 44', '*' * 18), 44),
    ('\u2588' + BAR.format('100', '*' * 40), 100),
    ('#' + BAR.format('  7', '***'), 7),
    ('    (0.00/100%)', 0),
    ('    (12.34/100%)', 12.34),
    ('    (100.00/100%)', 100),
    ('    (5/100%)', 5),
])
@pytest.mark.parametrize('end', ['\r', '\n', '\r\n'])
@pytest.mark.parametrize('parser', [modern, legacy])
def test_both_forms_of_progress_are_read(parser, end, text, value):
    assert parser(COPYING).output((text + end).encode('utf-8')) == [('percent', value)]


@pytest.mark.parametrize('text', [
    '\u2588' + BAR.format('101', '*' * 40), '\u2588' + BAR.format('999', '*' * 40),
    '    (100.01/100%)'])
@pytest.mark.parametrize('parser', [modern, legacy])
def test_progress_above_100_is_100(parser, text):
    progress = Progress(())
    progress.apply(Event('disk', 1))
    for event in parser(COPYING).output(line(text)):
        progress.apply(event)
    assert progress.document(FACTS)['disks'] == [{'path': 'disk 1', 'progress': 100}]


@pytest.mark.parametrize('text', [
    '100% done',
    ' 44% [*****]',
    ' 44% [' + '*' * 41 + ']',
    ' -4% [' + '-' * 40 + ']x',
    'x' * 13 + BAR.format('44', '*'),
    '(12.34/100%)',
    '    (12.34/100%) x',
    '    (12.34/50%)',
    '    (nan/100%)',
])
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_what_only_resembles_progress_is_none(events, text):
    assert events(COPYING, text) == []


@pytest.mark.parametrize('phase', [OPENING, GUEST, TARGET, METADATA])
def test_there_is_no_progress_outside_of_a_copy(phase):
    assert in_modern(phase, '\u2588' + BAR.format('100', '*' * 40), '    (100.00/100%)') == []


def from_notation_of_cat(data):
    """Return the bytes that "cat -v" shows as this."""
    def byte(match):
        high, control, plain = match.groups()
        code = ord(control) ^ 0x40 if control else ord(plain)
        return bytes([code | (0x80 if high else 0)])
    return re.sub(rb'(M-)?(?:\^(.)|(.))', byte, data)


@pytest.mark.parametrize('name, start, values', [
    ('nbdcopy-1.14.2.txt', b'M-bM-^VM-^]', [0, 0, 44, 89, 100]),
    ('qemu-img-2.11.txt', b'    (0.00/', [
        0, 1.04, 2.42, 3.79, 5.17, 6.55, 7.93, 9.31, 10.69, 12.07, 13.45]),
])
def test_recorded_progress_is_read(name, start, values):
    shown = next(text for text in recorded(name).splitlines() if text.startswith(start))
    output = from_notation_of_cat(shown[:-1] if shown.endswith(b'$') else shown) + b'\n'
    assert in_chunks(legacy(COPYING), output, 1) == [('percent', value) for value in values]


def test_of_many_percentages_read_at_once_the_last_one_is_enough():
    data = b'    (44.00/100%)\r    (45.00/100%)\r'
    assert legacy(COPYING).output(data)[-1] == ('percent', 45)


# --- phases ------------------------------------------------------------------------------

@pytest.mark.parametrize('text', [
    '[    0.235524] Copying disk 1/2',
    '[    0.23] Copying disk 1/2',
    '[    0] Copying disk 1/2',
    '[   x.0] Copying disk 1/2',
    '[   0.0]Copying disk 1/2',
    ' [   0.0] Copying disk 1/2',
    'x[   0.0] Copying disk 1/2',
    '[   0.0] ',
])
def test_a_line_of_the_kernel_is_no_phase(text):
    assert in_legacy(COPYING, text) == []


@pytest.mark.parametrize('text, copying', [
    ('Copying disk 1/2', (1, 2)),
    ('Copying disk 2/2', (2, 2)),
    ('Copying disk 10/23', (10, 23)),
    ('Copying disk 1/2 to /export/images/a/b (raw)', (1, 2)),
    ('Copying disk 1/2 to /Copying disk 2/2', (1, 2)),
    ('Copying disk 0/2', None),
    ('Copying disk 3/2', None),
    ('Copying disk 1/0', None),
    ('Copying disk -1/2', None),
    ('Copying disk 1/1000', None),
    ('Copying disk 1', None),
    ('Copying disks', None),
    ('Finishing off', None),
])
def test_a_phase_says_which_disk_is_copied(text, copying):
    assert copying_disk(text) == copying


@pytest.mark.parametrize('text, event', [
    ('Copying disk 2/2', ('disk', 2)), ('Copying disk 3/2', ('idle', None)),
    ('Finishing off', ('idle', None))])
def test_a_phase_begins_a_copy_or_none(text, event):
    assert legacy().output(phase_line(text)) == [('phase', text), event]


def test_a_phase_is_its_line_where_there_are_no_messages():
    assert legacy().output(phase_line('Copying disk 1/2 to /x (raw)')) == [
        ('phase', 'Copying disk 1/2 to /x (raw)'), ('disk', 1)]


def test_with_messages_a_phase_line_is_only_a_mark():
    parser = modern()
    parser.messages(json_message('Copying disk 1/2'))
    assert parser.output(phase_line('Copying disk 1/2')) == [('disk', 1)]


@pytest.mark.parametrize('phase', STAGES)
def test_a_phase_line_that_was_not_announced_does_not_count(phase):
    parser = modern(phase)
    assert parser.output(phase_line('Copying disk 1/2')) == []
    parser.messages(json_message(METADATA))         # now lines of phases are looked for
    assert parser.output(phase_line(GUEST) + phase_line(METADATA)) == [('idle', None)]


def test_a_phase_counts_once_for_each_announcement():
    parser = modern('Copying disk 1/2')
    assert parser.output(phase_line('Copying disk 1/2')) == []


def test_a_phase_line_may_have_been_lost():
    parser = modern()
    parser.messages(json_message(GUEST))
    parser.messages(json_message(TARGET))
    assert parser.output(phase_line(TARGET)) == [('idle', None)]


def test_a_copy_whose_line_was_lost_has_begun_in_the_end():
    parser = modern()
    parser.messages(json_message(COPYING) + json_message(METADATA))
    assert parser.output(line('glued to it: [  12.3] ' + COPYING)) + parser.end() == [('disk', 1)]


def test_copies_begin_one_after_the_other():
    parser = modern()
    parser.messages(json_message('Copying disk 1/2'))
    parser.messages(json_message('Copying disk 2/2'))
    assert parser.output(phase_line('Copying disk 2/2')) == []
    assert parser.output(phase_line('Copying disk 1/2')) == [('disk', 1)]


def test_a_phase_line_of_a_guest_with_an_odd_name_counts():
    text = 'Opening the source -i libvirt \u00dc\u65e5\U0001f4bf'
    parser = modern()
    parser.messages(json_message(text))
    assert parser.output(phase_line(text)) == [('idle', None)]


# --- line ends ---------------------------------------------------------------------------

@pytest.mark.parametrize('text, expected', [
    ('virt-v2v: error: x\n', [('error', 'x')]),
    ('nbdkit: file.3: error: pwrite: x\n', [('cause', 'nbdkit: file.3: error: pwrite: x')]),
    ('[  12.3] Finishing off\n', [('phase', 'Finishing off'), ('idle', None)]),
    ('virt-v2v: Exiting on signal SIGTERM\n', []),
])
def test_what_is_glued_to_a_bar_by_a_return_is_a_line_of_its_own(text, expected):
    data = ('    (44.00/100%)\r' + text).encode()
    assert legacy(COPYING).output(data) == [('percent', 44)] + expected


def test_a_phase_may_be_read_after_the_return_behind_a_bar():
    parser = modern(COPYING)
    parser.messages(json_message(METADATA))
    parser.output(b'    (44.00/100%)\r')
    assert parser.output(phase_line(METADATA)) == [('idle', None)]


def test_a_line_ends_with_the_output_if_nothing_else_ends_it():
    parser = legacy(COPYING)
    assert parser.output(b'    (44.00/100%)') == []
    assert parser.end() == [('percent', 44)]
    assert parser.end() == []           # the end may be published in several tries


@pytest.mark.parametrize('noise', [
    b'\0', b'\0' * 1000, b'\xff\xfe', b'\xe2\x96', b'\xed\xa0\x80', b'\x1b[2J', b'\x85\x0b\x0c'])
def test_bytes_that_are_no_text_do_not_spoil_the_next_line(noise):
    assert legacy(COPYING).output(noise + b'\n' + b'    (44.00/100%)\r') == [('percent', 44)]


@pytest.mark.parametrize('data, text', [
    (b'a\0b', 'a?b'),
    (b'a\x1b[31mb', 'a?[31mb'),
    (b'a\xffb', 'a\ufffdb'),
    ('\u00fc\u20ac'.encode('utf-8'), '\u00fc\u20ac'),
    ('a\u2028b\x85c', 'a?b?c'),
    ('a\u202eb', 'a?b'),
    ('\ud800', '?'),
    ('\na\nb \n', 'a\nb '),        # a path may end with a blank
    ('x' * (MAX_MESSAGE + 1), 'x' * MAX_MESSAGE),
])
def test_text_for_the_state_file_is_short_and_harmless(data, text):
    assert clean(data) == text


def test_an_empty_message_announces_nothing():
    parser = modern()
    parser.messages(json_message(''))
    assert parser.output(b'a\nb\n') == []


def test_a_character_may_be_cut_in_two():
    parser = legacy(COPYING)
    data = '\u259d  44% [{:-<40}]\r'.format('').encode('utf-8')
    assert parser.output(data[:2]) + parser.output(data[2:]) == [('percent', 44)]


LINE_ENDS = re.compile(b'[\r\n]+')
PIECES = st.sampled_from([b'a', b'bc', b'\r', b'\n', b'\0', b'\xff'])
CHUNKS = st.lists(st.lists(PIECES, max_size=8).map(b''.join), max_size=20)


@given(CHUNKS)
def test_chunks_are_joined_to_their_lines(chunks):
    joined, lines = Lines(MAX_LINE), []
    for chunk in chunks:
        lines += LINE_ENDS.split(joined.take(chunk))
    lines += LINE_ENDS.split(joined.end())
    assert list(filter(None, lines)) == list(filter(None, LINE_ENDS.split(b''.join(chunks))))


def kept(parser):
    """Return how many bytes a parser keeps, wherever it keeps them."""
    values = list(vars(parser).values())
    values += [value for inner in values if isinstance(inner, Lines)
               for value in vars(inner).values()]
    return sum(len(value) for value in values if isinstance(value, (bytes, bytearray)))


@pytest.mark.parametrize('make, read, limit', [
    (modern, Parser.output, MAX_LINE), (legacy, Parser.output, MAX_LINE),
    (modern, Parser.messages, MAX_MESSAGE_LINE)])
@pytest.mark.parametrize('size', [1 << 16, 1000])
def test_a_line_without_end_takes_bounded_memory(make, read, limit, size):
    parser, chunk = make(COPYING), b'x' * size
    for _ in range(200 * (1 << 20) // (1 << 16)):
        assert read(parser, chunk) == []
        assert kept(parser) <= 2 + limit


def test_what_a_parser_keeps_is_seen():
    """So the test above is about something."""
    parser = legacy(COPYING)
    parser.output(b'x' * (1 << 20))
    assert kept(parser) >= MAX_LINE


def test_of_messages_without_their_line_the_last_are_kept():
    """Each of them is looked for in all that follows."""
    parser = modern(COPYING)
    for number in range(20000):
        parser.messages(json_message('No such line {}'.format(number)))
    first = 20000 - MAX_ANNOUNCED
    assert parser.output(phase_line('No such line {}'.format(first - 1))) == []
    assert parser.output(phase_line('No such line {}'.format(first))) == [('idle', None)]


@pytest.mark.parametrize('end', [b'\n', b'\r'])
def test_the_line_after_a_very_long_one_is_read(end):
    parser = legacy(COPYING)
    for _ in range(10):
        parser.output(b'x' * 50000)
    assert parser.output(b'x' + end + b'    (44.00/100%)\r') == [('percent', 44)]


@pytest.mark.parametrize('end', [b'', b'\n', b'\r'])
@pytest.mark.parametrize('excess', [0, 1, CHUNK])
def test_of_a_very_long_line_the_beginning_counts(excess, end):
    data = b'virt-v2v: error: ' + b'x' * (MAX_LINE + excess) + end
    assert in_chunks(legacy(COPYING), data) == [('error', 'x' * MAX_MESSAGE)]


def test_what_comes_late_in_a_very_long_line_is_passed_over():
    command = vddk_command('[ds] vm/vm.vmdk', before="'nbdkit' " + 'x' * MAX_LINE)
    assert modern(OPENING).output(line(command)) == []


def test_a_message_after_a_very_long_line_is_read():
    parser = modern()
    parser.messages(b'x' * (MAX_MESSAGE_LINE + 1))
    assert parser.messages(b'\n' + json_message('a')) == [('phase', 'a')]


def test_an_error_that_goes_on_for_ever_takes_bounded_memory():
    parser = legacy(OPENING)
    events = parser.output(line('virt-v2v: error: a '))
    for _ in range(1000):
        events += parser.output(line('b ' * 100))
    assert [len(event.value) <= MAX_MESSAGE for event in events] == [True]


# --- messages ----------------------------------------------------------------------------

@pytest.mark.parametrize('data, event', [
    (json_message('Opening the source'), ('phase', 'Opening the source')),
    (json_message('a', 'error'), ('error', 'a')),
    (json_message('a', 'warning'), ('warning', 'a')),
    (json_message('a', 'info'), None),
    (json_message('a', 'new'), None),
    (json_message(7), None),
    (json_message(None, 'error'), None),
    (json_message(['a']), None),
    (json_message('a', ['error']), None),
    (json_message('a', {}), None),
    (json_message('a', None), None),
    (json_message('\ud800\x1b[31m', 'error'), ('error', '??[31m')),
    (json_message('a\nb', 'error'), ('error', 'a\nb')),
    (b'', None),
    (b'{', None),
    (b'[]', None),
    (b'7', None),
    (b'null', None),
    (b'"message"', None),
    (b'{"message": "a"}', None),
    (b'{"type": "error"}', None),
    (b'{"message": "\xff", "type": "error"}', None),
    (b'\xef\xbb\xbf{"message": "a", "type": "error"}', None),
    (b'[' * 60000, None),
], ids=lambda value: ascii(value)[:50])
def test_a_message_is_one_event_or_none(data, event):
    assert modern().messages(data + b'\n') == ([event] if event else [])


@given(st.binary(max_size=100))
def test_a_message_may_be_anything(data):
    assert modern().messages(data + b'\n') == []


# --- errors ------------------------------------------------------------------------------

@pytest.mark.parametrize('phase', STAGES)
def test_an_error_line_is_an_error_where_there_are_no_messages(phase):
    assert in_legacy(phase, 'virt-v2v: error: no such guest') == [('error', 'no such guest')]


@pytest.mark.parametrize('phase', STAGES)
def test_an_error_line_is_none_where_there_are_messages(phase):
    assert in_modern(phase, 'virt-v2v: error: no such guest') == []


@pytest.mark.parametrize('lines', [
    ['libguestfs error: could not create appliance through ', 'libvirt.'],
    ['libguestfs error: ', 'could not create ', 'appliance ', 'through libvirt.'],
    ['libguestfs error: could not create appliance through libvirt.'],
])
@pytest.mark.parametrize('after', [
    [], ['If reporting bugs, run virt-v2v with debugging enabled']])
def test_a_wrapped_error_is_joined(lines, after):
    """libguestfs 1.x breaks lines after a blank (common_utils.ml, wrap)."""
    lines = ['virt-v2v: error: ' + lines[0]] + lines[1:] + after
    text = ' '.join(lines[:len(lines) - len(after)]).replace('  ', ' ')
    assert in_legacy(OPENING, *lines) == [('error', text[len('virt-v2v: error: '):])]


def test_a_wrapped_error_is_joined_however_it_is_read():
    data = b'virt-v2v: error: could not \ncreate\n'
    assert in_chunks(legacy(OPENING), data, 1) == [('error', 'could not create')]


def test_an_error_may_be_wrapped_before_its_first_word():
    lines = ['virt-v2v: error: ', 'x' * 70 + ': no ', 'such file']
    assert in_legacy(OPENING, *lines) == [('error', 'x' * 70 + ': no such file')]


def test_a_wrapped_error_may_end_with_the_output():
    assert in_legacy(OPENING, 'virt-v2v: error: could not ') == [('error', 'could not ')]


@pytest.mark.parametrize('text', [
    'guestfsd: error: /usr/bin/perl: No such file or directory',
    'libguestfs: trace: v2v: download = -1 (error)',
    'xvirt-v2v: error: x',
    'xvirt-v2v: warning: error: x',
    'Failed to determine unit we run in, ignoring: No data available',
    'supermin: error: x',
    'TypeError: debug() argument 1 must be str, not bytes',     # after each HTTP error of imageio
])
@pytest.mark.parametrize('phase', STAGES)
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_noise_is_neither_an_error_nor_a_cause(events, phase, text):
    assert events(phase, text) == []


@pytest.mark.parametrize('phase, text', [
    (COPYING, 'nbdkit: file.3: error: pwrite: No space left on device'),
    (COPYING, 'nbdkit[out0]: file.3: error: pwrite: No space left on device'),
    (COPYING, 'nbdkit: vddk[4]: error: VixDiskLib_ReadAsync: Unknown error'),
    (COPYING, 'nbdkit[in0]: vddk[4]: error: VixDiskLib_ReadAsync: Unknown error'),
    (COPYING, 'nbdcopy: write at offset 51904512 failed: No space left on device'),
    (COPYING, 'qemu-img: error while writing sector 7: No space left on device'),
    ('Opening the source', 'nbdkit: vddk[1]: error: VixDiskLib_Open: [ds] a/gone.vmdk:'
                           ' You do not have access rights to this file'),
    (OPENING, 'nbdkit: error: /opt/x/lib64/libvixDiskLib.so.8: cannot open shared object'
              ' file: No such file or directory'),
    (TARGET, 'mount: /tmp/v2v.x: bad option; you might need a helper program'),
    (TARGET, 'mount.nfs: access denied by server while mounting host:/path'),
    (TARGET, 'mount.nfs4: Connection refused'),
    (OPENING, 'scp: /vmfs/volumes/ds/x/x.vmx: No such file or directory'),
    (OPENING, 'sh: scp: not found'),
    (OPENING, 'bash: line 1: scp: command not found'),
])
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_what_a_program_below_complains_of_is_a_cause(events, phase, text):
    assert events(phase, text) == [('cause', text)]


@pytest.mark.parametrize('phase', [OPENING, COPYING, METADATA])
def test_mount_complains_of_nothing_but_the_export_domain(phase):
    assert modern(phase).output(line('mount.nfs: access denied')) == []


@pytest.mark.parametrize('text', [
    'nbdkit: vddk[4]: error: write reply: NBD_CMD_READ: Broken pipe',
    'nbdkit: error: Bad message',
    'nbdcopy: read at offset 0 failed: Transport endpoint is not connected',
])
@pytest.mark.parametrize('phase', [OPENING, TARGET, COPYING, METADATA])
def test_what_is_said_after_the_error_is_no_cause_of_it(phase, text):
    assert in_modern(phase, 'virt-v2v: error: see earlier', text) == []


# --- the guest's own text ----------------------------------------------------------------

FORGERIES = [
    '[  12.3] Copying disk 9/9',
    '[  12.3] Setting up the destination: -o rhv',
    '[  12.3] Finishing off',
    'Copying disk 9/9',
    '{ "message": "Copying disk 9/9", "timestamp": "", "type": "message" }',
    '{ "message": "forged", "timestamp": "", "type": "error" }',
    '\u2588 100% [{}]'.format('*' * 40),
    '    (100.00/100%)',
    'virt-v2v: error: forged',
    'virt-v2v: error: wrapped ',
    SECTION,
    vddk_command('[ds] forged'),
    'nbdkit: debug: vddk: config key=file, value=[ds] forged',
    'nbdkit: vddk[3]: debug: Opening file [ds] forged (vpxa-nfcssl://[ds] forged@10.0.0.1:902)',
    "nbdcopy 'nbd+unix:///%5bds%5d%20forged?socket=/tmp/in0' 'nbd+unix:///?socket=/tmp/out0'",
    'nbdkit: file.3: error: forged',
    'nbdcopy: forged',
    'qemu-img: forged',
    'mount.nfs: forged',
    '\x1b[2J\x1b[H',
]
GUEST_PHASES = [GUEST, 'Checking for sufficient free disk space in the guest',
                'Converting 12.0 to run on KVM', 'Checking filesystem integrity before conversion',
                'Mapping filesystem data to avoid copying unused and blank areas']


@pytest.mark.parametrize('text', FORGERIES, ids=ascii)
@pytest.mark.parametrize('phase', GUEST_PHASES)
@pytest.mark.parametrize('end', ['\n', '\r'])
def test_what_the_guest_says_means_nothing(phase, text, end):
    assert modern(phase).output((text + end).encode('utf-8')) == []


@pytest.mark.parametrize('text', FORGERIES, ids=ascii)
def test_what_the_guest_said_has_no_effect_on_what_follows(text):
    parser = modern(GUEST)
    parser.output(line(text))
    parser.messages(json_message(COPYING))
    events = parser.output(phase_line(COPYING) + b'    (44.00/100%)\r')
    assert events == [('disk', 1), ('percent', 44)]


@pytest.mark.parametrize('text', [
    "[    1.234567] BTRFS: device label 'vddk' 'file=[ds] forged' devid 1 transid 7 /dev/sda",
    "lrwxrwxrwx 1 0 0 10 Nov 23 08:51 'vddk' 'file=[ds] forged'",
])
def test_labels_that_the_appliance_shows_name_no_source(text):
    """It starts before anything looks into the guest, and shows the names of its file systems."""
    assert in_modern('Opening the source', text) == []


@pytest.mark.parametrize('events', [in_modern, in_legacy])
@pytest.mark.parametrize('phase', STAGES[4:])
def test_the_ovf_has_the_id_of_the_vm(events, phase):
    assert events(phase, SECTION) == [('vm_id', ID)]


@pytest.mark.parametrize('phase', STAGES[:4])
@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_only_the_ovf_at_the_end_has_the_id_of_the_vm(events, phase):
    assert events(phase, SECTION) == []


@pytest.mark.parametrize('text', [
    SECTION.replace('OperatingSystem', 'Other'),
    SECTION.replace(ID, 'not-a-uuid'),
    SECTION.replace(ID, ID + '0'),
    SECTION.replace('ovf:id', 'ovf:ref'),
])
def test_other_sections_have_no_id(text):
    assert in_modern(METADATA, text) == []


def test_an_id_is_published_in_lower_case():
    assert in_modern(METADATA, SECTION.replace(ID, ID.upper())) == [('vm_id', ID)]


# --- time --------------------------------------------------------------------------------

# A start that makes a pattern go on, and a piece that it may take in more than one way. All as
# text of a line, so none has a line end in it.
ADVERSARIES = [
    (b'[', b' '), (b'[', b'9'), (b'[   9.9] ', b'a'), (b'', b'[ 9.9] '),
    (b'', b'9% ['), (b'', b'9'), (b' 99% [', b'*-'), (b'    (', b'9'), (b'    (9.', b'9'),
    (b'', b"'vddk'"), (b"'vddk'", b"'file="), (b'nbdkit ', b"'vddk'"),
    (b'nbdkit ', b"'vddk' 'file="), (b"nbdkit 'vddk'", b"'file="), (b"nbdkit 'vddk'", b"'file='"),
    (b"nbdkit 'vddk' 'file=a", b"'\\''"), (b"nbdkit 'vddk' 'file=a", b"'\\'"),
    (b"nbdkit 'vddk' 'file=", b'a'),
    (b'Opening file [', b'['), (b'Opening file [ds] ', b' (vpx'),
    (b'Opening file [ds] a (vpx', b'a'), (b'Opening file [ds] ', b' (vpxa-'),
    (b'Opening file [ds] ', b' (vpxa-nfc:'), (b'', b'Opening file ['), (b'', b'Opening file [d] '),
    (b"nbdcopy 'nbd+unix:///", b'%5b'), (b'nbdcopy ', b"'nbd+unix:///%5b"), (b'nbdcopy ', b'%5b?'),
    (b'nbdkit', b'['), (b'nbdkit[', b'a.'), (b'nbdkit: ', b'a'), (b'nbdkit: ', b'error: '),
    (b'nbdkit: a', b'[9'), (b'', b'nbdkit: '),
    (b':OperatingSystemSection_Type', b"ovf:id='"),
    (b':OperatingSystemSection_Type', b"ovf:id='9aaed60a-be8a-4362-b7f6-"),
    (b'virt-v2v: error: ', b' '), (b'virt-v2v: error: ', b'a '), (b'', b': error: '),
    (b'nbdkit: debug: vddk: config key=file, value=', b'a'), (b'', b'Copying disk 1/'),
    (b'', b'\0'), (b'', b'\xff'), (b'', b'\xe2\x96'),
]


@pytest.mark.parametrize('adversary', ADVERSARIES, ids=ascii)
def test_a_megabyte_against_careless_patterns_says_little(adversary):
    """A pattern of quadratic time or worse would run into the time limit of all tests."""
    start, piece = adversary
    data = start + piece * ((1 << 20) // len(piece)) + b'\n'
    parsers = [make(phase) for make in (modern, legacy) for phase in STAGES]
    texts = [value for parser in parsers for event in in_chunks(parser, data)
             for value in event if isinstance(value, str)]
    assert max(map(len, texts), default=0) <= MAX_MESSAGE


def patterns():
    """Return all patterns of the script: those of its table, and those in calls of re."""
    found = [row.pattern for row in virt_v2v_wrapper._TABLE]
    for node in ast.walk(ast.parse(rooms.SOURCE)):
        if isinstance(node, ast.Call) and ast.dump(node.func).startswith(
                "Attribute(value=Name(id='re'"):
            try:
                found.append(ast.literal_eval(node.args[0]))
            except ValueError:
                pass            # it is made of parts
    return {text if isinstance(text, str) else text.decode('latin-1') for text in found}


@pytest.mark.parametrize('pattern', sorted(patterns()), ids=ascii)
def test_no_pattern_repeats_what_repeats(pattern):
    """Then none takes exponential time: (a+)+, (a*)* and the like."""
    assert not re.search(r'[+*]\)[+*]', pattern)


# --- what virt-v2v makes, and what it warns of -------------------------------------------

IMAGE = 'RHV: disk: /export/domain/images/{0}/{0}'.format(ID)


@pytest.mark.parametrize('text, event', [
    (IMAGE, ('image', ID)),
    (IMAGE.replace('RHV', 'ovirt'), ('image', ID)),
    ("disk.id = '%s'" % ID, ('upload_disk', ID)),
    ("transfer.id = '%s'" % ID, ('upload_transfer', ID)),
    ('libnbd: debug: nbd1: nbd_get_size: leave: ret=629145600', ('size', 629145600))])
def test_what_is_made_is_believed_while_the_target_is_set_up(text, event):
    assert in_modern(TARGET, text) == [event]
    assert in_modern(GUEST, text) == []
    assert in_modern(OPENING, text) == []


@pytest.mark.parametrize('text', [
    ' ' + IMAGE, IMAGE[:-40], IMAGE.replace(ID, '../x'), "disk.id = 'x'",
    "xdisk.id = '%s'" % ID, 'guest says ' + IMAGE])
def test_what_only_looks_like_something_made_is_not_believed(text):
    assert in_modern(TARGET, text) == []


@pytest.mark.parametrize('text', [IMAGE, "disk.id = '%s'" % ID])
def test_what_a_guest_says_made_before_the_target_is_forgotten(text):
    """It says the line of the phase too early; virt-v2v's own line shows that."""
    parser, progress = modern(GUEST), Progress(())
    parser.messages(json_message(TARGET))
    for event in parser.output(phase_line(TARGET) + line(text) + phase_line(TARGET)):
        progress.apply(event)
    state = progress.document(FACTS)
    assert 'images' not in state and 'upload' not in state


@pytest.mark.parametrize('events', [in_modern, in_legacy])
def test_without_messages_nothing_is_taken_for_made(events):
    assert bool(events(TARGET, IMAGE)) == (events is in_modern)


@pytest.mark.parametrize('phase', [OPENING, GUEST, COPYING])
def test_virt_v2v_says_which_signal_ends_it(phase):
    bar = BAR.format(12, '*****') + '\r'
    events = in_modern(phase, bar + 'virt-v2v: Exiting on signal SIGTERM')
    assert events[-1] == ('farewell', 'virt-v2v was told to stop by SIGTERM')


def test_a_missing_key_is_told_though_virt_v2v_calls_it_no_error():
    text = 'could not find key to open LUKS encrypted /dev/sda2.'
    for program in ('virt-v2v: ', '/usr/bin/virt-v2v: '):
        assert in_modern('Opening the source', program + text) == [('farewell', text)]
    assert in_modern(GUEST, 'virt-v2v: ' + text) == []


def test_a_phase_that_follows_shows_that_no_signal_ended_it():
    parser = modern(GUEST)
    parser.output(line('virt-v2v: Exiting on signal SIGTERM'))
    parser.messages(json_message(TARGET))
    assert parser.output(phase_line(TARGET)) == [('idle', None)]
    assert parser.end() == []


def test_a_phase_that_was_only_announced_shows_nothing():
    parser = modern(GUEST)
    parser.messages(json_message(TARGET))
    parser.output(line('virt-v2v: Exiting on signal SIGTERM'))
    assert parser.end() == [('farewell', 'virt-v2v was told to stop by SIGTERM')]


def test_a_version_without_messages_warns_in_lines():
    assert in_legacy(COPYING, 'virt-v2v: warning: careful') == [('warning', 'careful')]
    assert in_modern(COPYING, 'virt-v2v: warning: careful') == []


def test_the_metadata_of_an_upload_have_the_id_of_its_vm():
    text = "  <OperatingSystemSection ovf:id='%s' ovf:required='false' ovirt:id='1300'>" % ID
    assert in_modern(METADATA, text) == [('vm_id', ID)]


def test_the_file_of_a_disk_that_ssh_reads_is_that_of_a_source():
    text = ("nbdkit 'ssh' 'host=esx' 'path=/vmfs/volumes/ds 1/vm/vm-flat.vmdk' 'user=root'")
    assert in_modern(OPENING, text) == [('source', '[ds 1] vm/vm.vmdk')]
