"""A guest that is read by SSH: the key is in an agent of the job, and the host's key is known."""
import os
import re
import signal

import pytest

import openssh
from eventually import eventually
from jobs import kill_wrapper
from results import error_line
from virt_v2v import leave, reach, stdout, wait


@pytest.fixture
def start(wrapper):
    """A function that starts a job with a key, and returns it."""
    prepare = openssh.provide(wrapper)

    def start_with(key, *options):
        request = wrapper.request(ssh_key=key, **openssh.GUEST)
        arguments = wrapper.arguments + list(options) if options else ()
        return wrapper.start(request, *arguments, prepare=prepare)
    return start_with


def agents(wrapper):
    """Return the process IDs of ssh agents of the wrapper's jobs."""
    return [pid for pid, command in wrapper.processes().items()
            if 'ssh-agent' in str(command)]


@pytest.fixture
def running(wrapper, start):
    """A job whose virt-v2v waits, and the fingerprint of its key."""
    key, fingerprint = openssh.make_key()
    wrapper.virt_v2v.play(reach('running'), wait('end'), leave(0))
    job = start(key)
    assert (job.status, job.stderr) == (0, b'')
    wrapper.virt_v2v.wait_for('running')
    return job, fingerprint


def test_the_key_is_in_an_agent_as_long_as_the_job(wrapper, running):
    job, fingerprint = running
    assert fingerprint in wrapper.recorded().agent
    assert len(agents(wrapper)) == 1
    wrapper.virt_v2v.let('end')
    assert 'failed' not in job.wait_finished()
    wrapper.wait_gone()


@pytest.mark.promise(4)
def test_the_agent_ends_with_a_job_that_is_killed(wrapper, running):
    job, _ = running
    kill_wrapper(job)
    wrapper.wait_gone()


def test_check_has_the_key_in_an_agent_too(wrapper, start):
    key, fingerprint = openssh.make_key()
    wrapper.virt_v2v.play(stdout(b'    source name: vm\n'))
    job = start(key, '--check', '--json')
    assert (job.status, job.stderr) == (0, b'')
    run = wrapper.recorded()
    assert fingerprint in run.agent
    assert not [name for name in run.descriptors.values() if 'memfd:' in name]
    wrapper.wait_gone()


@pytest.mark.promise(4)
def test_an_agent_that_dies_ends_no_job(wrapper, running):
    job, _ = running
    agent, = agents(wrapper)
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: not agents(wrapper), 'the agent has ended')
    wrapper.virt_v2v.let('end')
    assert 'failed' not in job.wait_finished()


def test_a_key_with_a_passphrase_is_refused(wrapper, start):
    key, _ = openssh.make_key('secret')
    job = start(key)
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr == error_line('ssh_key: expected a key that needs no passphrase')
    wrapper.wait_gone()


def test_a_damaged_key_is_refused(wrapper, start):
    key, _ = openssh.make_key()
    job = start(re.sub('\n.{10}', '\n', key, count=1))
    assert (job.status, job.stdout) == (1, b'')
    # OpenSSH says what is wrong, each version in its own words.
    assert re.fullmatch(error_line('ssh_key: cannot be used: [^\n]+').decode(), job.stderr.decode())
    wrapper.wait_gone()


def test_a_host_without_an_agent_is_named(wrapper, start):
    os.unlink(os.path.join(wrapper.virt_v2v.bin, 'ssh-agent'))
    job = start(openssh.make_key()[0])
    assert (job.status, job.stderr) == (1, error_line('ssh-agent: No such file or directory'))
    wrapper.wait_gone()


def test_a_host_whose_key_is_not_known_is_refused(wrapper):
    prepare = openssh.provide(wrapper, host='other.example.com')
    job = wrapper.start(wrapper.request(**openssh.GUEST), prepare=prepare)
    assert (job.status, job.stderr) == (1, error_line(
        'vm_name: the host key of esx.example.com is not known; have root check and add it:'
        ' ssh-keyscan -p 22 esx.example.com >> /etc/ssh/ssh_known_hosts'))


def test_without_a_key_the_callers_agent_is_used(wrapper):
    wrapper.virt_v2v.play()
    job = wrapper.start(wrapper.request(**openssh.GUEST), prepare=openssh.provide(wrapper),
                        environment={'SSH_AUTH_SOCK': '/nonexistent/agent'})
    job.wait_finished()
    assert wrapper.recorded().environment[b'SSH_AUTH_SOCK'] == b'/nonexistent/agent'
