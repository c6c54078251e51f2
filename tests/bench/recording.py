"""Gigabytes of virt-v2v's output, made of what was recorded."""
import re

import captures

# What a run says once, or once for each disk, however long it takes; the rest is the chatter of
# the programs below virt-v2v, and that is what makes a log long.
ONCE = re.compile(rb"\[ *[0-9]+\.[0-9]\] |.*% \[|nbdcopy |.*Opening file \["
                  rb"|.*OperatingSystem| LANG=C 'nbdkit' ")
BLOCK = 1 << 18             # the least that is written at once


def sections(name):
    """Return the recording `name` as (message, what was printed until the next one) each."""
    recording = captures.load(name)
    starts = [(0, b'')] + recording.messages
    ends = [offset for offset, _ in recording.messages] + [len(recording.output)]
    return [(message, recording.output[start:end]) for (start, message), end in zip(starts, ends)]


def stretched(name, size):
    """Return the steps of a run like recording `name`, but with about `size` bytes of output.

    A step is (message, output, how often the output comes). Each section is stretched alike.
    """
    recording = sections(name)
    factor = size / sum(len(output) for _, output in recording)
    steps = []
    for message, output in recording:
        steps += stretched_section(message, output, factor)
    return steps


def stretched_section(message, output, factor):
    """Return the steps of one section: what comes once, amid that much of the rest."""
    lines = re.findall(rb'[^\r\n]*[\r\n]|[^\r\n]+\Z', output)
    once = [line for line in lines if ONCE.match(line)]
    chatter = b''.join(line for line in lines if not ONCE.match(line))
    block = chatter * (BLOCK // max(1, len(chatter)) + 1) if chatter else b''
    count = round(len(chatter) * factor / max(1, len(block)) / max(1, len(once)))
    steps = [(message, b''.join(once[:1]), 1), (b'', block, count)]
    for line in once[1:]:
        steps += [(b'', line, 1), (b'', block, count)]
    return steps


def length(steps):
    """Return how many bytes of output there are in steps."""
    return sum(len(output) * count for _, output, count in steps)
