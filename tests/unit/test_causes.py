"""What went wrong, in a word that never changes, and what to do about it."""
import re

import pytest

import virt_v2v_wrapper
from virt_v2v_wrapper import error_message, finished_document

# Each as virt-v2v, or the wrapper, says it: recorded, but for those of other systems.
SAID = [
    ('the wrapper was told to stop by SIGTERM', 'cancelled'),
    ('virt-v2v was told to stop by SIGINT', 'cancelled'),
    ('virt-v2v was killed by SIGTERM', 'cancelled'),
    ('virt-v2v was killed by SIGKILL', 'virt_v2v.killed'),
    ('virt-v2v was killed by SIGSEGV', 'unknown'),
    ('the wrapper was killed by SIGKILL', 'wrapper.killed'),
    ('all processes of the wrapper were killed, or the host was restarted; the state was last'
     ' written at 2026-11-23T09:05:59Z', 'wrapper.killed'),
    ("exception: libvirt: VIR_ERR_INTERNAL_ERROR: VIR_FROM_ESX: internal error: HTTP response code"
     " 500 for call to 'Login'. Fault: ServerFaultCode - Cannot complete login due to an incorrect"
     " user name or password.", 'source.login'),
    ('could not copy the VMX file from the remote server, see earlier error messages (Host key'
     ' verification failed.)', 'source.host_key'),
    ('libguestfs error: guestfs_launch failed, see earlier error messages (nbdkit: vddk[1]: error:'
     ' VixDiskLib_Open: [ds] nodisk/gone.vmdk: You do not have access rights to this file)',
     'source.disk'),
    ("exception: libvirt: VIR_ERR_NO_DOMAIN: cannot find libvirt domain 'x'",
     'source.guest_missing'),
    ('inspection could not detect the source guest (or physical machine).', 'guest.no_root'),
    ('unable to mount the disk image for writing. This has probably happened because Windows'
     ' Hibernation or Fast Restart is being used in this guest.', 'guest.hibernated'),
    ('multi-boot operating systems are not supported by virt-v2v.', 'guest.multiboot'),
    ('nbdcopy command failed, see earlier error messages (nbdcopy: write at offset 51904512 failed:'
     ' No space left on device)', 'target.full'),
    ('mount command failed, see earlier errors. (mount.nfs: access denied by server while mounting'
     ' h:/p)', 'target.mount'),
    ('failed server prechecks, see earlier errors (ovirtsdk4.AuthError: Error during SSO'
     ' authentication access_denied : Cannot authenticate user)', 'target.auth'),
    ('failed server prechecks, see earlier errors (RuntimeError: The storage domain \u2018x\u2019'
     ' does not exist)', 'target.storage_missing'),
    ('nbdcopy command failed, see earlier error messages (ssl.SSLError: [SSL: UNEXPECTED_EOF_WHILE'
     '_READING] unexpected eof while reading)', 'target.unreachable'),
    ('nbdcopy command failed, see earlier error messages (BrokenPipeError: [Errno 32] Broken pipe)',
     'target.unreachable'),
    ("failed to create virtual machine, see earlier errors (RuntimeError: Failed to create a VM!"
     " Failed jobs: [('Importing VM x from configuration to Cluster Default', 'failed')])",
     'target.import'),
    ("failed server prechecks, see earlier errors (ValueError: Invalid format specifier"
     " 'parsed.port' for object of type 'str')", 'target.port'),
    ('nbdkit did not start up.  See previous debugging messages for problems. (nbdkit: error:'
     ' /vddk/lib64/libvixDiskLib.so.8: cannot open shared object file: No such file)',
     'vddk.library'),
    ('could not find key to open LUKS encrypted /dev/sda2.', 'guest.encrypted'),
    ('no such thing was ever seen', 'unknown'),
]


@pytest.mark.parametrize('text, code', SAID)
def test_a_message_has_its_code_and_keeps_its_text(text, code):
    message = error_message(text)
    assert (message['type'], message['message'], message['code']) == ('error', text, code)


def test_each_known_cause_but_a_stop_has_a_hint():
    hinted = {code for _, code in SAID if 'hint' in error_message(
        next(text for text, other in SAID if other == code))}
    assert hinted == {code for _, code in SAID} - {'cancelled', 'unknown'}


def test_hints_are_whole_sentences():
    for _, _, hint in virt_v2v_wrapper._CAUSES:
        assert hint is None or re.fullmatch(r'[A-Z].*[.]', hint)


def finished(return_code, reason, error=None):
    """Return the last state of a job whose virt-v2v has said an error."""
    state = {'started': True, 'disks': [], 'disk_count': 0}
    if error:
        state['last_message'] = error_message(error)
    return finished_document(state, return_code, reason)


@pytest.mark.parametrize('return_code, reason, error, cancelled', [
    (1, 'the wrapper was told to stop by SIGTERM', None, True),
    (1, None, 'virt-v2v was told to stop by SIGTERM', True),
    (-15, None, None, True),
    (-9, None, None, None),
    (1, None, 'No space left on device', None),
    (None, 'the wrapper was killed by SIGKILL', None, None),
    (0, 'the wrapper was told to stop by SIGTERM', None, None)])
def test_who_is_told_to_stop_is_cancelled(return_code, reason, error, cancelled):
    assert finished(return_code, reason, error).get('cancelled') is cancelled


def test_that_virt_v2v_does_as_it_is_told_is_not_told():
    state = finished(1, 'the wrapper was told to stop by SIGTERM',
                     'virt-v2v was told to stop by SIGTERM')
    assert state['last_message']['message'] == 'the wrapper was told to stop by SIGTERM'
