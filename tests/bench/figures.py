"""The figures of the benchmark: each function measures one and returns its rows of the table.

A value is the median of the rounds, with the lowest and the highest of them.
"""
import collections
import os
import statistics
import time

import captures
import script
from rig import (
    MAY_LOOK, PYTHON, Watch, cpu_seconds, peak_memory, pss, pss_alone, wait_until, wake_ups, writes)

Row = collections.namedtuple('Row', 'figure value reach met')
# How much is measured: rounds, of short and of long figures; how often in a round; bytes of log;
# seconds; conversions at once.
Settings = collections.namedtuple(
    'Settings', 'rounds long_rounds starts ends parsed log_size silence flood load many')

FULL = Settings(rounds=5, long_rounds=3, starts=20, ends=25, parsed=5 * 10 ** 7,
                log_size=3 * 10 ** 8, silence=10, flood=5, load=10, many=100)
QUICK = Settings(rounds=2, long_rounds=1, starts=8, ends=15, parsed=10 ** 7,
                 log_size=10 ** 8, silence=3, flood=3, load=3, many=20)

MB = 10 ** 6
CHUNK = 1 << 16                 # what the wrapper reads at once
LONG_LOG = '2.2.0-vddk-three-disks'
LONG_LINE = 200                 # MB
LAST = 99.99                    # the last percentage of a flood


def row(figure, values, template, most=None, least=None):
    """Return the row of one value for each round: what it is, and whether it reaches its goal."""
    number, _, unit = template.partition(' ')
    median = statistics.median(values)
    numbers = map(number.format, (median, min(values), max(values)))
    value = ' '.join(['{} ({}..{})'.format(*numbers), unit])
    if most is not None:
        return Row(figure, value, '<= {} {}'.format(most, unit), median <= most)
    if least is not None:
        return Row(figure, value, '>= {} {}'.format(least, unit), median >= least)
    return Row(figure, value, '', None)


def delay_rows(figure, rounds, half=None, most=None):
    """Return the rows of rounds of many delays each: half of them, and nearly all of them."""
    halves, mosts = [[quantile(delays, part) for delays in rounds] for part in (.5, .99)]
    return [row(figure + ', median', halves, '{:.1f} ms', half),
            row(figure + ', 99 %', mosts, '{:.1f} ms', most)]


def quantile(values, share):
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# --- start -------------------------------------------------------------------------------

def start(rig, settings):
    """The command until it has ended, with the paths printed, and a bare Python, in turns."""
    bare, ours = [], []
    rig.use()
    for _ in range(settings.rounds):
        pairs = [(bare_python(rig), one_start(rig)) for _ in range(settings.starts)]
        for values, found in zip((bare, ours), zip(*pairs)):
            values.append(statistics.median(found) * 1000)
    return [row('start, a bare Python', bare, '{:.1f} ms'),
            row('start, the wrapper', ours, '{:.1f} ms'),
            row('start, ratio', [our / one for our, one in zip(ours, bare)], '{:.2f} x', 4.5)]


def bare_python(rig):
    """Return how many seconds it takes to start Python."""
    return rig.run([PYTHON, '-I', '-c', 'pass'])[0]


def one_start(rig):
    """Return how many seconds it takes to start a conversion."""
    seconds, job = rig.timed_start()
    job.finish()
    return seconds


# --- progress and end --------------------------------------------------------------------

def progress(rig, settings):
    """From virt-v2v writing a percentage until a reader can see it in the state file."""
    steps = ('phase', b'Copying disk 1/1'), ('wait', 'go'), ('bars', 125)
    rounds = [delays(rig, steps, lambda state, percent: copied(state) >= percent)
              for _ in range(settings.long_rounds)]
    return delay_rows('progress, 8 a second', rounds, 5, 120)


def end(rig, settings):
    """From virt-v2v ending until "finished" can be read."""
    steps = ('phase', b'Finishing off'), ('wait', 'go'), ('note',)
    rounds = [[delay for _ in range(settings.ends)
               for delay in delays(rig, steps, lambda state, _: 'finished' in state)]
              for _ in range(settings.rounds)]
    return delay_rows('end', rounds, most=30)


def delays(rig, steps, shows):
    """Return how many ms after each note of virt-v2v a state could be read that shows it."""
    rig.use(*steps)
    job = rig.start()
    seen = []
    with Watch(rig.state_dir) as watch:
        rig.open('go')
        while not seen or 'finished' not in seen[-1][0]:
            if not watch.wait():
                raise SystemExit('no new state came')
            seen.append((job.state(), time.monotonic()))
    job.finish()
    return [(next(when for state, when in seen if shows(state, value)) - written_at) * 1000
            for value, written_at in rig.notes()]


def copied(state):
    """Return the percentage of the first disk."""
    return state['disks'][0]['progress'] if state['disks'] else 0


# --- parsing -----------------------------------------------------------------------------

def parsing(rig, settings):
    """The parser alone, with the recorded logs of each version; and the whole way of a log."""
    module = script.load(script.SCRIPT)
    logs = [name[:-len('.log.xz')] for name in os.listdir(captures.CAPTURES)
            if name.endswith('.log.xz')]
    versions = sorted({name.partition('-')[0] for name in logs},
                      key=lambda version: [int(part) for part in version.split('.')])
    rows = []
    for version in versions:
        pieces = [in_pieces(captures.load(name)) for name in logs
                  if name.partition('-')[0] == version]
        speeds = [parsing_speed(module.Parser, pieces, settings.parsed)
                  for _ in range(settings.rounds)]
        rows.append(row('parsing, logs of ' + version, speeds, '{:.0f} MB/s', least=100))
    speeds = [whole_pipe(rig, settings.log_size) for _ in range(settings.long_rounds)]
    wall, cpu = zip(*speeds)
    return rows + [row('parsing, whole pipe, by the clock', wall, '{:.0f} MB/s'),
                   row('parsing, whole pipe, by CPU time', cpu, '{:.0f} MB/s')]


def in_pieces(recording):
    """Return a recording as pairs (messages, the chunk of output they came before)."""
    pieces, messages = [], list(recording.messages)
    for start in range(0, len(recording.output), CHUNK):
        ready = [line for offset, line in messages if start <= offset < start + CHUNK]
        pieces.append((b''.join(ready), recording.output[start:start + CHUNK]))
    return pieces


def parsing_speed(parser_class, logs, size):
    """Return MB/s of CPU time for so many bytes at least of logs, each parsed from its start."""
    parsed, begin = 0, time.process_time()
    while parsed < size:
        for pieces in logs:
            parser = parser_class(any(messages for messages, _ in pieces))
            for messages, output in pieces:
                parser.messages(messages)
                parser.output(output)
                parsed += len(output)
            parser.end()
    return parsed / MB / (time.process_time() - begin)


def whole_pipe(rig, size):
    """Return the MB/s of a log through pipe, parser and log file: by the clock, by CPU time."""
    log = captures.load(LONG_LOG).output
    count = size // len(log)
    rig.use(('phase', b'Copying disk 1/1'), ('wait', 'go'), ('write', log, count),
            ('phase', b'Finishing off'), ('wait', 'end'))
    job = rig.start()
    job.wait_phase('Copying disk 1/1')
    cpu, begin = cpu_seconds(job.pids), time.monotonic()
    rig.open('go')
    job.wait_phase('Finishing off')
    seconds = time.monotonic() - begin, cpu_seconds(job.pids) - cpu
    rig.open('end')
    job.finish()
    return [len(log) * count / MB / value for value in seconds]


# --- idle --------------------------------------------------------------------------------

def idle(rig, settings):
    """What the two processes of the wrapper do while virt-v2v says nothing."""
    counts = [wake_ups] + [writes] * MAY_LOOK
    found = []
    for _ in range(settings.long_rounds):
        rig.use(('phase', b'Copying disk 1/1'), ('wait', 'end'))
        job = rig.start()
        time.sleep(1)
        before = [count(job.pids) for count in counts]
        time.sleep(settings.silence)
        found.append([count(job.pids) - old for count, old in zip(counts, before)])
        rig.open('end')
        job.finish()
    return [row('idle, {} s, {}'.format(settings.silence, name), values, '{:.0f}', 0)
            for name, values in zip(('wake-ups', 'writes'), zip(*found))]


# --- memory ------------------------------------------------------------------------------

def memory(rig, settings):
    """Memory after a long log and a very long line."""
    log = captures.load(LONG_LOG).output
    tenth = settings.log_size // 10 // len(log)
    growth, shared, alone = [], [], []
    for _ in range(settings.long_rounds):
        rig.use(('phase', b'Copying disk 1/2'), ('write', log, tenth),
                ('phase', b'Copying disk 2/2'), ('wait', 'go'), ('write', log, tenth * 9),
                ('write', b'x' * MB, LONG_LINE), ('write', b'\n'), ('phase', b'Finishing off'),
                ('wait', 'end'))
        job = rig.start()
        job.wait_phase('Copying disk 2/2')
        before = peak_memory(job.pids)
        rig.open('go')
        job.wait_phase('Finishing off')
        growth.append(peak_memory(job.pids) - before)
        if MAY_LOOK:
            shared.append(pss(job.pids))
            alone.append(pss_alone(job.pids))
        rig.open('end')
        job.finish()
    rows = [row('memory, growth of the peak after a tenth of the log: flat', growth, '{:.2f} MiB',
                1)]
    if MAY_LOOK:
        rows = [row('memory, PSS of both processes', shared, '{:.1f} MiB', 18),
                row('memory, the same if no other Python ran', alone, '{:.1f} MiB')] + rows
    return rows


# --- state writes ------------------------------------------------------------------------

def state_writes(rig, settings):
    """A hundred thousand lines of progress a second."""
    rates, last = [], []
    count = settings.flood * 100000
    for _ in range(settings.long_rounds):
        rig.use(('phase', b'Copying disk 1/1'), ('wait', 'go'), ('flood', count, settings.flood),
                ('wait', 'end'))
        job = rig.start()
        job.wait_phase('Copying disk 1/1')
        times = []
        with Watch(rig.state_dir) as watch:
            rig.open('go')
            while copied(job.state()) != LAST:
                replaced = watch.wait(5)
                times += replaced * [time.monotonic()]
                if not replaced:
                    break
        rates.append((len(times) - 1) / (times[-1] - times[0]))
        last.append(copied(job.state()))
        rig.open('end')
        job.finish()
    figure = 'state writes, {:,} lines in {} s'.format(count, settings.flood)
    return [row(figure, rates, '{:.1f} a second', 10),
            row(figure + ', last value', [min(last)], '{:.2f} %', least=LAST)]


# --- many --------------------------------------------------------------------------------

def many(rig, settings):
    """Many conversions at once: CPU of all wrappers together, as a share of one core."""
    rig.use(('phase', b'Copying disk 1/1'), ('wait', 'go'), ('steady', settings.load, 50),
            ('wait', 'end'))
    jobs = [rig.start() for _ in range(settings.many)]
    for job in jobs:
        job.wait_phase('Copying disk 1/1')
    time.sleep(1)
    silent = share(jobs, settings.silence)
    rig.open('go')
    loaded = share(jobs, settings.load)
    wait_until(lambda: all(job.log_size() >= settings.load * MB for job in jobs), 0.5)
    rig.open('end')
    for job in jobs:
        job.finish()
    figure = 'many, {} conversions, '.format(settings.many)
    return [row(figure + 'silent', [silent], '{:.3f} cores', 0.1),
            row(figure + '1 MB/s of log each', [loaded], '{:.2f} cores')]


def share(jobs, seconds):
    """Return how many cores all processes of the wrappers use in the next seconds."""
    pids = [pid for job in jobs for pid in job.pids]
    before, begin = cpu_seconds(pids), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(pids) - before) / (time.monotonic() - begin)


FIGURES = collections.OrderedDict((
    ('start', start), ('progress', progress), ('end', end), ('parsing', parsing), ('idle', idle),
    ('memory', memory), ('state-writes', state_writes), ('many', many)))
