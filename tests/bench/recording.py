"""Gigabytes of virt-v2v's output, made of what was recorded."""
import json
import lzma
import os
import re

CAPTURES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'captures')
# A message among the lines of the log: a write of its own, so it may follow a bar ended by CR.
INLINE_MESSAGE = re.compile(rb'(?<![^\r\n])\{ "message": [^\n]*\n')
# What a run says once, or once for each disk, however long it takes; the rest is the chatter of
# the programs below virt-v2v, and that is what makes a log long.
ONCE = re.compile(rb"\[ *[0-9]+\.[0-9]\] |.*% \[|nbdcopy |.*Opening file \["
                  rb"|.*OperatingSystem| LANG=C 'nbdkit' ")
BLOCK = 1 << 18             # the least that is written at once


def recorded(name):
    """Return the bytes of a recording, none if there is no such one."""
    path = os.path.join(CAPTURES, name + '.xz')
    if not os.path.exists(path):
        return b''
    with lzma.open(path) as stream:
        return stream.read()


def sections(name):
    """Return the recording `name` as (message, what was printed until the next one) each."""
    log, messages = recorded(name + '.log'), recorded(name + '.json').splitlines(True)
    if not messages:
        messages = INLINE_MESSAGE.findall(log)
        log = INLINE_MESSAGE.sub(b'', log)
    found, start, message = [], 0, b''
    for following in messages:
        text = json.loads(following.decode('utf-8'))['message'].encode('utf-8')
        end = re.compile(rb'^[^\n]*' + re.escape(text), re.MULTILINE).search(log, start).start()
        found.append((message, log[start:end]))
        message, start = following, end
    return found + [(message, log[start:])]


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
