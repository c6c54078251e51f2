"""Other kinds of root: IDs, groups, capabilities and keys that do not show in the effective ID."""
import ctypes
import os
import platform
import pwd

import pytest

import processes
from faults import guardian, strace, tamper
from privileges import CAP_NET_RAW, ambient, make_inheritable
from virt_v2v import reach, wait

pytestmark = pytest.mark.promise(5)

IDS = ('Uid', 'Gid', 'Groups')
SETS = ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')
NET_RAW = 1 << CAP_NET_RAW


def need_root():
    """Skip the test unless it runs as root."""
    if os.getuid() != 0:
        pytest.skip('needs root, to give something of root to an ordinary user')


def all_of(job):
    """Return the status of guardian, monitor and virt-v2v."""
    state = job.state()
    return [processes.status(process)
            for process in (guardian(job), state['wrapper_pid'], state['pid'])]


def assert_nothing_of_root(wrapper, **keywords):
    """Assert that a job runs without anything of root, or that it is refused to start it."""
    wrapper.virt_v2v.play(reach('running'), wait('end'))
    job = wrapper.start(**keywords)
    if job.status != 0:
        assert_refused(wrapper, job)
        return
    wrapper.virt_v2v.wait_for('running')
    found = all_of(job)
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    assert [name for status in found for name in IDS if '0' in status[name].split()] == []
    assert [name for status in found for name in SETS if int(status[name], 16)] == []


def assert_refused(wrapper, job):
    """Assert that nothing was started, and that this was said in a line."""
    assert (job.status, job.stdout) == (1, b'')
    assert job.stderr.startswith(b'virt-v2v-wrapper: error: ')
    assert b'internal error' not in job.stderr
    wrapper.wait_gone()
    assert wrapper.virt_v2v.runs() == []


# --- IDs ---------------------------------------------------------------------------------

@pytest.mark.parametrize('groups, group_ids, user_ids', [
    ([], '{gid}, {gid}, {gid}', '0, {uid}, {uid}'),
    ([], '{gid}, {gid}, {gid}', '{uid}, {uid}, 0'),
    ([], '0, {gid}, {gid}', '{uid}, {uid}, {uid}'),
    ([], '{gid}, {gid}, 0', '{uid}, {uid}, {uid}'),
    ([0], '{gid}, {gid}, {gid}', '{uid}, {uid}, {uid}')],
    ids=['real user', 'saved user', 'real group', 'saved group', 'groups'])
def test_no_id_of_root_that_is_not_effective_gets_to_a_job(
        wrapper, groups, group_ids, user_ids):
    need_root()
    user = wrapper.user
    text = 'os.setgroups(%r)\nos.setresgid(%s)\nos.setresuid(%s)' % (groups, group_ids, user_ids)
    tamper(wrapper, text.format(uid=user.pw_uid, gid=user.pw_gid))
    wrapper.caller = pwd.getpwuid(0)
    assert_nothing_of_root(wrapper)


def test_a_group_of_root_that_cannot_be_left_is_named(wrapper):
    need_root()
    user = wrapper.user
    tamper(wrapper, 'os.setgroups([0])\nos.setgid(%d)\nos.setuid(%d)' % (user.pw_gid, user.pw_uid))
    wrapper.caller = pwd.getpwuid(0)
    assert b'group 0' in wrapper.start().stderr


def test_an_ordinary_user_stays_in_the_group_he_changed_to(wrapper):
    """As newgrp changes it; the user database has another one."""
    need_root()
    user, group = wrapper.user, wrapper.user.pw_gid - 1
    tamper(wrapper, 'os.setgroups([])\nos.setgid(%d)\nos.setuid(%d)' % (group, user.pw_uid))
    wrapper.caller = pwd.getpwuid(0)
    wrapper.start().wait_finished()
    assert wrapper.recorded().status['Gid'].split() == [str(group)] * 4


# --- capabilities ------------------------------------------------------------------------

def test_no_ambient_capability_gets_to_a_job(wrapper):
    """As systemd's AmbientCapabilities= gives them to a service."""
    need_root()
    assert_nothing_of_root(wrapper, prepare=ambient(wrapper.user))


@pytest.mark.parametrize('kind', ['wrapper', 'root_wrapper'])
def test_virt_v2v_can_gain_no_privileges(request, kind):
    wrapper = request.getfixturevalue(kind)
    wrapper.start().wait_finished()
    assert wrapper.recorded().status['NoNewPrivs'] == '1'


def without_effect(wrapper, call):
    """Have a system call of the wrapper do nothing, and say that it worked."""
    prefix = [strace(), '-f', '-o', '/dev/null', '-e', 'trace=' + call,
              '-e', 'inject=%s:retval=0' % call, '--']
    command = wrapper.command
    wrapper.command = lambda *arguments: prefix + command(*arguments)


def test_a_user_whose_capabilities_stay_starts_nothing(wrapper):
    """One that does not change the user ID, so only a look at the sets shows it."""
    need_root()
    without_effect(wrapper, 'capset')
    assert_refused(wrapper, wrapper.start(prepare=ambient(wrapper.user, NET_RAW)))


def test_root_whose_capabilities_stay_starts_nothing(root_wrapper):
    without_effect(root_wrapper, 'capset')
    assert_refused(root_wrapper, root_wrapper.start(prepare=lambda: make_inheritable(NET_RAW)))


# --- keys --------------------------------------------------------------------------------

ADD_KEY, KEYCTL = {'x86_64': (248, 250), 'aarch64': (217, 219)}.get(platform.machine(), (0, 0))
SESSION_KEYRING, JOIN_SESSION_KEYRING = -3, 1
LOOK_FOR_KEY = """\
#!/bin/sh
case $1 in --*) ;; *) /usr/bin/python3 -I -c '
import ctypes
search, keyring = 10, -3
print(ctypes.CDLL(None).syscall({keyctl}, search, keyring, b"user", b"{name}", 0))
' > "${{0%/*}}/../home/key" ;; esac
exec "${{0%/*}}/../bin.real/virt-v2v" "$@"
"""


def with_key(name):
    """Return a preparation: to have a session keyring of one's own with a key in it."""
    def prepare():
        libc = ctypes.CDLL(None)
        libc.syscall(KEYCTL, JOIN_SESSION_KEYRING, None)
        if libc.syscall(ADD_KEY, b'user', name.encode(), b'secret', 6, SESSION_KEYRING) < 0:
            os._exit(77)
    return prepare


def test_root_s_session_keyring_does_not_go_with_the_job(root_wrapper):
    if not KEYCTL:
        pytest.skip('the numbers of the system calls are not known here')
    os.rename(root_wrapper.virt_v2v.bin, root_wrapper.virt_v2v.bin + '.real')
    os.mkdir(root_wrapper.virt_v2v.bin, 0o755)
    root_wrapper.add_program('virt-v2v', LOOK_FOR_KEY.format(keyctl=KEYCTL, name=root_wrapper.name))
    job = root_wrapper.start(prepare=with_key(root_wrapper.name))
    assert job.status == 0, 'no keyring here'
    job.wait_finished()
    with open(os.path.join(root_wrapper.home, 'key')) as stream:
        assert stream.read() == '-1\n'
