"""What real programs printed, as it is recorded in tests/captures."""
import json
import lzma
import os
import re

from script import TESTS

CAPTURES = os.path.join(TESTS, 'captures')
# A message among the lines of the log: a write of its own, so it may follow a bar that ended in CR.
INLINE_MESSAGE = re.compile(rb'(?<![^\r\n])\{ "message": [^\n]*\n')
# What a condensed recording keeps, with the line before and the line after each; of the hundreds of
# steps of qemu-img's progress only the ends.
OF_INTEREST = re.compile(
    rb"\[ *[0-9]+\.[0-9]\] |virt-v2v: error|% \[|\((0|100)\.00/100%|'vddk'|'file=|Opening file"
    rb"|nbdcopy|OperatingSystemSection|kit(?:\[.*\])?: .*error: |virt-v2v: warning"
    rb"|virt-v2v: Exiting on|nbd_get_size: leave|virtual disk size"
    rb"|^qemu-img: |^(RHV|ovirt): |^disk\.id|^transfer\.id|Error: ")
VERY_LONG = 2000


def recorded(name):
    """Return the bytes of a recording."""
    with lzma.open(os.path.join(CAPTURES, name + '.xz')) as stream:
        return stream.read()


def capabilities(version):
    """Return the capabilities that this version of virt-v2v printed."""
    with open(os.path.join(CAPTURES, 'capabilities-{}.txt'.format(version))) as stream:
        return stream.read().split()


# --- a recording, as virt-v2v wrote it ---------------------------------------------------

class Recording:
    """Output, and messages as (offset in the output where each was written, bytes)."""

    def __init__(self, output, messages):
        self.output = output
        self.messages = messages


def with_inline_messages(log):
    """Return the Recording in a log with the messages among its lines."""
    messages, taken = [], 0
    for match in INLINE_MESSAGE.finditer(log):
        messages.append((match.start() - taken, match.group()))
        taken += len(match.group())
    return Recording(INLINE_MESSAGE.sub(b'', log), messages)


def with_separate_messages(log, lines):
    """Return the Recording of a log and of messages that went elsewhere.

    Each was written just before the line of the same text, which 1.x wraps.
    """
    messages, offset = [], 0
    for line in lines.splitlines(True):
        words = json.loads(line.decode('utf-8'))['message'].encode('utf-8').split()
        line_start = re.compile(rb'^[^\n]*' + rb'\s+'.join(map(re.escape, words)), re.MULTILINE)
        offset = line_start.search(log, offset).start()
        messages.append((offset, line))
    return Recording(log, messages)


def load(name):
    """Return the Recording of that name."""
    log = recorded(name + '.log')
    if os.path.exists(os.path.join(CAPTURES, name + '.json.xz')):
        return with_separate_messages(log, recorded(name + '.json'))
    return with_inline_messages(log)


def condensed(recording):
    """Return the Recording with the lines that matter and their neighbours only."""
    lines = re.findall(rb'[^\r\n]*[\r\n]|[^\r\n]+\Z', recording.output)
    matters = [bool(OF_INTEREST.search(line)) and len(line) < VERY_LONG for line in lines]
    messages, kept, offset = list(recording.messages), [], 0
    result = []
    for number, line in enumerate(lines):
        while messages and messages[0][0] <= offset:
            result.append((sum(map(len, kept)), messages.pop(0)[1]))
        if any(matters[max(0, number - 1):number + 2]) and len(line) < VERY_LONG:
            kept.append(line)
        offset += len(line)
    return Recording(b''.join(kept), result + [(len(b''.join(kept)), m) for _, m in messages])
