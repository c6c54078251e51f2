"""Limits, core dumps and scheduling that the caller leaves, and what becomes of them."""
import os
import re
import resource
import subprocess

import pytest

from faults import guardian

# What is limited, as /proc/PID/limits has it, and a limit that does not disturb the wrapper.
LIMITS = {
    'Max file size': (resource.RLIMIT_FSIZE, 1 << 24),
    'Max cpu time': (resource.RLIMIT_CPU, 3600),
    'Max open files': (resource.RLIMIT_NOFILE, 100),
    'Max address space': (resource.RLIMIT_AS, 1 << 36),
}


def limits(text, name):
    """Return the soft and the hard limit of that name in /proc/PID/limits."""
    return re.search(r'^%s +(\S+) +(\S+)' % name, text, re.MULTILINE).groups()


def read(process, name):
    """Return the text of a file of a process."""
    with open('/proc/%d/%s' % (process, name)) as stream:
        return stream.read()


def all_of(job):
    """Return the process IDs of guardian, monitor and virt-v2v."""
    state = job.state()
    return guardian(job), state['wrapper_pid'], state['pid']


# --- limits ------------------------------------------------------------------------------

def soft(number, limit):
    """Return a preparation: to have a soft limit."""
    return lambda: resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))


@pytest.mark.parametrize('name', sorted(LIMITS))
def test_a_soft_limit_of_the_caller_does_not_bind_virt_v2v(wrapper, name):
    number, limit = LIMITS[name]
    wrapper.start(prepare=soft(number, limit)).wait_finished()
    found = limits(wrapper.recorded().limits, name)
    assert found[0] == found[1] != str(limit)


def test_a_hard_limit_of_the_caller_binds_virt_v2v(wrapper):
    wrapper.start(prepare=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))).wait_finished()
    assert limits(wrapper.recorded().limits, 'Max file size') == (str(1 << 24),) * 2


# --- core dumps --------------------------------------------------------------------------

def no_core():
    """Have a hard limit of 0 for core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def any_core():
    """Have no limit for core dumps, or the highest there is."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def has_nothing_to_dump(process):
    """Say whether a core dump of a process would be without its memory.

    A limit of 1 keeps it from being written and from being piped to a program, one of 0 only from
    being written (fs/coredump.c). The filter says what of the memory goes into it.
    """
    limited = limits(read(process, 'limits'), 'Max core file size') == ('1', '1')
    return limited or int(read(process, 'coredump_filter'), 16) == 0


@pytest.mark.promise(1)
@pytest.mark.parametrize('prepare', [no_core, any_core])
@pytest.mark.parametrize('kind', ['wrapper', 'root_wrapper'])
def test_no_core_dump_has_the_memory_of_a_job_in_it(request, kind, prepare):
    wrapper = request.getfixturevalue(kind)
    job = wrapper.start_waiting(prepare=prepare)
    found = [has_nothing_to_dump(process) for process in all_of(job)]
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert found == [True, True, True]


@pytest.mark.promise(1)
def test_core_dumps_are_off_for_a_program_at_the_end_of_a_pipe(wrapper):
    """A limit of 0 would not do that."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip('has a hard limit of 0 itself')
    wrapper.start(prepare=any_core).wait_finished()
    assert limits(wrapper.recorded().limits, 'Max core file size') == ('1', '1')


# --- scheduling --------------------------------------------------------------------------

def oom(score):
    """Return a preparation: to have this oom_score_adj."""
    def prepare():
        with open('/proc/self/oom_score_adj', 'w') as stream:
            stream.write(str(score))
    return prepare


@pytest.mark.parametrize('before, after', [(-500, 0), (300, 300)])
def test_virt_v2v_is_not_spared_when_memory_runs_out(wrapper, before, after):
    try:
        subprocess.check_call(['true'], preexec_fn=oom(before))
    except (OSError, subprocess.SubprocessError):
        pytest.skip('needs CAP_SYS_RESOURCE, to be spared')
    job = wrapper.start_waiting(prepare=oom(before))
    found = int(read(job.state()['pid'], 'oom_score_adj'))
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert found == after


def test_the_caller_s_scheduling_goes_with_the_job(wrapper):
    cpu = min(os.sched_getaffinity(0))

    def prepare():
        os.nice(7)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.sched_setaffinity(0, {cpu})
    job = wrapper.start_waiting(prepare=prepare)
    process = job.state()['pid']
    found = (os.getpriority(os.PRIO_PROCESS, process), os.sched_getscheduler(process),
             os.sched_getaffinity(process))
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert found == (min(os.nice(0) + 7, 19), os.SCHED_BATCH, {cpu})
