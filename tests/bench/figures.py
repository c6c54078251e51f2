"""The figures of the benchmark: each function measures one and returns its rows of the table.

The wrapper and its floor are measured in turns, so that whatever else the machine does concerns
both. A value is the median of the rounds, with the lowest and the highest of them.
"""
import collections
import os
import statistics
import subprocess
import time

import recording
from rig import (
    PYTHON, Watch, activity, cpu_seconds, ended, keep_short, memory, memory_alone, run, wait_until,
    written)

Row = collections.namedtuple('Row', 'figure floor ours value reach met')
# How much is measured; `many` is the number of conversions at once.
Settings = collections.namedtuple(
    'Settings', 'rounds starts disks ratios ends log_size flood silence many load')

FULL = Settings(rounds=5, starts=20, disks=1, ratios=800, ends=40, log_size=2 * 10 ** 9,
                flood=10, silence=10, many=100, load=10)
QUICK = Settings(rounds=2, starts=8, disks=1, ratios=300, ends=15, log_size=2 * 10 ** 8,
                 flood=3, silence=3, many=20, load=3)

RECORDINGS = ('2.2.0-vddk-three-disks', '2.10.0')
LONG_LINE = 200 * 10 ** 6
MB = 10 ** 6


class Values:
    """One value for each round."""

    def __init__(self, values, template='{:.1f}', unit=''):
        self.median = statistics.median(values)
        numbers = [template.format(value) for value in (self.median, min(values), max(values))]
        self._text = '{} ({}..{}){}'.format(*numbers, unit and ' ' + unit)

    def __str__(self):
        return self._text


def quantile(values, share):
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def at_most(figure, values, bound, reach, floor='', ours=''):
    """Return the row of a figure whose median must not exceed a bound."""
    return Row(figure, str(floor), str(ours), str(values), reach, values.median <= bound)


def ratios(ours, floors):
    """Return the ratio of each round as Values."""
    return Values([our / floor for our, floor in zip(ours, floors)], '{:.2f}', 'x')


# --- start -------------------------------------------------------------------------------

def start(rig, settings):
    """The command until it has ended, with the paths printed."""
    floors, ours = [], []
    rig.use()
    for _ in range(settings.rounds):
        pairs = [(start_floor(), start_ours(rig)) for _ in range(settings.starts)]
        floors.append(statistics.median(pair[0] for pair in pairs) * 1000)
        ours.append(statistics.median(pair[1] for pair in pairs) * 1000)
    return [at_most('start', ratios(ours, floors), 5, '<= 5 x', Values(floors, unit='ms'),
                    Values(ours, unit='ms'))]


def start_floor():
    """Return how many seconds it takes to start Python."""
    begin = time.perf_counter()
    run([PYTHON, '-I', '-c', 'pass'])
    return time.perf_counter() - begin


def start_ours(rig):
    """Return how many seconds it takes to start a conversion."""
    seconds, job = rig.timed_start()
    job.wait_finished()
    return seconds


# --- progress ----------------------------------------------------------------------------

def progress(rig, settings):
    """From virt-v2v writing a percentage until a reader can see it in the state file."""
    spaced, stream = [], []
    for _ in range(settings.rounds):
        spaced.append(delays(rig, 'bars', settings.disks * 100, 120))
        stream.append(delays(rig, 'ratios', settings.ratios, 10))
    rows = []
    for name, rounds, bound in (('8 a second', spaced, 5), ('100 a second', stream, None)):
        half = Values([quantile(round_, .5) for round_ in rounds], unit='ms')
        most = Values([quantile(round_, .99) for round_ in rounds], unit='ms')
        reach = 'median <= 5 ms' if bound else 'held back to 10 a second'
        rows.append(Row('progress, ' + name, '', 'median', str(half), reach,
                        half.median <= bound if bound else None))
        rows.append(at_most('progress, ' + name, most, 120, '99 % <= 120 ms', ours='99 %'))
    return rows


def delays(rig, name, count, milliseconds):
    """Return the delay of each percentage in ms."""
    rig.use(name, count, milliseconds)
    watch = Watch(rig.state_dir)
    job = rig.start()
    seen = []
    while not seen or 'finished' not in seen[-1][1]:
        watch.wait()
        state = job.state()
        seen.append((time.monotonic(), state))
    watch.close()
    job.wait_finished()
    found = []
    for value, written_at in rig.notes():
        seen_at = next(when for when, state in seen if total(state) >= value)
        found.append((seen_at - written_at) * 1000)
    return found


def total(state):
    """Return the percentages of all disks together."""
    return sum(disk['progress'] for disk in state['disks'])


# --- end ---------------------------------------------------------------------------------

def end(rig, settings):
    """From virt-v2v ending until "finished" can be read."""
    rounds = []
    for _ in range(settings.rounds):
        rounds.append([end_once(rig) for _ in range(settings.ends)])
    return [Row('end', '', 'median', str(Values([quantile(values, .5) for values in rounds],
                                                unit='ms')), '', None),
            at_most('end', Values([quantile(values, .99) for values in rounds], unit='ms'), 30,
                    '99 % <= 30 ms', ours='99 %')]


def end_once(rig):
    """Return how many ms it took to publish the end."""
    rig.use('brief')
    job = rig.start()
    watch = Watch(rig.state_dir)
    rig.open('go')
    while 'finished' not in job.state():
        watch.wait()
    seen_at = time.monotonic()
    watch.close()
    job.wait_finished()
    return (seen_at - rig.notes()[0][1]) * 1000


# --- throughput --------------------------------------------------------------------------

def throughput(rig, settings):
    """A long log through pipe, parser and log file; tee does as much but for the parser."""
    rows = []
    for name in RECORDINGS:
        steps = recording.stretched(name, settings.log_size)
        size = recording.length(steps)
        rig.plan(steps)
        floors, ours = [], []
        for _ in range(settings.rounds):
            floors.append(tee(rig))
            ours.append(copied(rig, size))
        name = 'throughput, log of ' + name.partition('-')[0]
        speeds = Values([size / MB / seconds for seconds in ours], '{:.0f}', 'MB/s')
        rows += [at_most(name + ', CPU', ratios(ours, floors), 2, '<= 2 x tee',
                         Values(floors, '{:.2f}', 's'), Values(ours, '{:.2f}', 's')),
                 Row(name + ', of one core', str(Values([size / MB / seconds for seconds in floors],
                                                        '{:.0f}', 'MB/s')), str(speeds),
                     str(speeds), '>= 400 MB/s', speeds.median >= 400)]
    return rows


def tee(rig):
    """Return the CPU seconds of tee."""
    rig.use('recorded')
    path = os.path.join(rig.directory, 'tee')
    open(path, 'w').close()
    feeder = subprocess.Popen(rig.stand_in('recorded'), stdout=subprocess.PIPE)
    process = subprocess.Popen(['tee', path], stdin=feeder.stdout, stdout=subprocess.DEVNULL)
    feeder.stdout.close()
    rig.open('go')
    rig.open('end')
    wait_until(lambda: keep_short(path) or ended(process.pid))
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = 0
    feeder.wait()
    os.unlink(path)
    return usage.ru_utime + usage.ru_stime


def copied(rig, size):
    """Return the CPU seconds of the monitor for so many bytes."""
    rig.use('recorded')
    job = rig.start()
    before = cpu_seconds(job.monitor)
    rig.open('go')
    wait_logged(job, size)
    seconds = cpu_seconds(job.monitor) - before
    rig.open('end')
    job.wait_finished()
    return seconds


def wait_logged(job, size):
    """Wait until the monitor has dealt with so many bytes of output."""
    wait_until(lambda: keep_short(job.log) or written(job.monitor) >= size)
    time.sleep(0.1)         # for the last chunk to go through the parser


# --- idle --------------------------------------------------------------------------------

def idle(rig, settings):
    """What the two processes of the wrapper do while virt-v2v says nothing."""
    wakes, writes = [], []
    for _ in range(min(2, settings.rounds)):
        rig.use('silent')
        job = rig.start()
        time.sleep(1)
        before = [activity(process) for process in (job.guardian, job.monitor)]
        time.sleep(settings.silence)
        after = [activity(process) for process in (job.guardian, job.monitor)]
        wakes.append(sum(new[0] - old[0] for old, new in zip(before, after)))
        writes.append(sum(new[1] - old[1] for old, new in zip(before, after)))
        rig.open('end')
        job.wait_finished()
    name = 'idle, {} s'.format(settings.silence)
    return [at_most(name + ', wake-ups', Values(wakes, '{:.0f}'), 0, 'none', 0),
            at_most(name + ', writes', Values(writes, '{:.0f}'), 0, 'none', 0)]


# --- memory ------------------------------------------------------------------------------

def memory_use(rig, settings):
    """Memory after a long log and a very long line."""
    rounds = [(memory_of_floor(),) + memory_of_job(rig, settings.log_size)
              for _ in range(min(3, settings.rounds))]
    growth = [monitor['VmHWM'] - early['VmHWM'] for _, early, monitor, _ in rounds]
    return [
        memory_row('peak RSS of the monitor', 1.7, '<= 1.7 x', [
            (floor['VmHWM'], monitor['VmHWM']) for floor, _, monitor, _ in rounds]),
        memory_row('PSS of both processes', 2.7, '<= 2.7 x', [
            (floor['Pss'], monitor['Pss'] + guardian['Pss'])
            for floor, _, monitor, guardian in rounds]),
        memory_row('the same if no other Python ran', 2.7, '<= 2.7 x', [
            (memory_alone(floor), memory_alone(monitor, guardian))
            for floor, _, monitor, guardian in rounds]),
        at_most('memory, growth of the peak after a tenth of it', Values(
            growth, '{:.0f}', 'KiB'), 256, 'flat: <= 256 KiB')]


def memory_row(figure, bound, reach, pairs):
    """Return the row of pairs of (floor, ours) in KiB."""
    floors, ours = [[pair[side] / 1024 for pair in pairs] for side in (0, 1)]
    return at_most('memory, ' + figure, ratios(ours, floors), bound, reach,
                   Values(floors, unit='MiB'), Values(ours, unit='MiB'))


def memory_of_floor():
    """Return the memory of a Python that does nothing."""
    process = subprocess.Popen([PYTHON, '-I', '-c', 'import time; time.sleep(9)'])
    time.sleep(0.5)
    found = memory(process.pid)
    process.kill()
    process.wait()
    return found


def memory_of_job(rig, log_size):
    """Return memory after so long a log and a very long line.

    That of the monitor after a tenth of the log, and of monitor and guardian at the end.
    """
    steps = recording.stretched(RECORDINGS[0], log_size)
    steps.append((b'', b'x' * MB, LONG_LINE // MB))
    rig.plan(steps)
    rig.use('recorded')
    job = rig.start()
    rig.open('go')
    wait_logged(job, log_size // 10)
    found = [memory(job.monitor)]
    wait_logged(job, recording.length(steps))
    found += [memory(job.monitor), memory(job.guardian)]
    rig.open('end')
    job.wait_finished()
    return tuple(found)


# --- state writes ------------------------------------------------------------------------

def state_writes(rig, settings):
    """A million lines of progress in ten seconds."""
    rates, last = [], []
    count = settings.flood * 100000
    for _ in range(min(3, settings.rounds)):
        rig.use('flood', count, settings.flood)
        job = rig.start()
        watch = Watch(rig.state_dir)
        rig.open('go')
        times, percent = [], 0
        while percent != 99.99:
            times += watch.wait() * [time.monotonic()]
            percent = total(job.state())
        rates.append((len(times) - 1) / (times[-1] - times[0]))
        rig.open('end')
        watch.close()
        state = job.wait_finished()
        last.append(percent)
        assert state['finished']
    figure = 'state writes, {:,} lines in {} s'.format(count, settings.flood)
    return [at_most(figure, Values(rates, unit='a second'), 10, '<= 10 a second'),
            Row(figure + ', last value', '99.99', '', str(Values(last, '{:.2f}')), 'never lost',
                set(last) == {99.99})]


# --- many --------------------------------------------------------------------------------

def many(rig, settings):
    """Many conversions at once: CPU of all wrappers together, as a share of one core."""
    rig.use('steady', settings.load, 50)
    jobs = [rig.start() for _ in range(settings.many)]
    wait_until(lambda: all(job.log_size() for job in jobs))
    time.sleep(1)
    silent = share(jobs, settings.silence)
    rig.open('go')
    loaded = share(jobs, settings.load)
    wait_until(lambda: all(job.log_size() >= settings.load * MB for job in jobs), 0.5)
    rig.open('end')
    for job in jobs:
        job.wait_finished()
    name = 'many, {} conversions'.format(settings.many)
    return [at_most(name + ', silent', Values([silent], '{:.3f}', 'cores'), 0.1, '< 0.1 core'),
            Row(name + ', 1 MB/s of log each', '', '', str(Values([loaded], '{:.2f}', 'cores')),
                'to be reported', None)]


def share(jobs, seconds):
    """Return how many cores all processes of the wrappers use in the next seconds."""
    pids = [pid for job in jobs for pid in (job.guardian, job.monitor)]
    before, begin = sum(map(cpu_seconds, pids)), time.monotonic()
    time.sleep(seconds)
    return (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - begin)


FIGURES = collections.OrderedDict((
    ('start', start), ('progress', progress), ('end', end), ('throughput', throughput),
    ('idle', idle), ('memory', memory_use), ('state-writes', state_writes), ('many', many)))
