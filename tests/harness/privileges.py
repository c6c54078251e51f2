"""What a caller may leave to the wrapper: capabilities. For "prepare" of Wrapper.popen."""
import ctypes
import os

import processes

PR_SET_SECUREBITS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 28, 47, 2
# SECBIT_NO_SETUID_FIXUP and SECBIT_KEEP_CAPS: a change of user leaves all capabilities.
KEEP_ALL = 1 << 2 | 1 << 4
CAPABILITY_VERSION_3 = 0x20080522
CAP_NET_RAW = 13
libc = ctypes.CDLL(None, use_errno=True)


def capabilities_of_this_process():
    """Return the permitted ones as a number."""
    return int(processes.status(os.getpid())['CapPrm'], 16)


def set_capabilities(effective, permitted, inheritable):
    """Have these sets of capabilities (numbers)."""
    sets = effective, permitted, inheritable
    halves = [number & 0xffffffff for number in sets] + [number >> 32 for number in sets]
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)(*halves)) != 0:
        raise OSError(ctypes.get_errno(), 'capset')


def prctl(*arguments):
    """Do what prctl(2) does."""
    if libc.prctl(*(arguments + (0,) * (5 - len(arguments)))) != 0:
        raise OSError(ctypes.get_errno(), 'prctl')


def make_inheritable(kept=~0):
    """Have those capabilities of this process that are kept in its inheritable and ambient set."""
    permitted = capabilities_of_this_process()
    set_capabilities(permitted, permitted, permitted & kept)
    for number in range(permitted.bit_length()):
        if permitted & kept & 1 << number:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


def keep_all():
    """Have a change of user leave all capabilities."""
    prctl(PR_SET_SECUREBITS, KEEP_ALL)


def ambient(user, kept=~0):
    """Return a preparation: to be the user, with ambient capabilities as a service may have."""
    def prepare():
        keep_all()
        os.setgroups([])
        os.setresgid(*[user.pw_gid] * 3)
        os.setresuid(*[user.pw_uid] * 3)
        permitted = capabilities_of_this_process() & kept
        set_capabilities(permitted, permitted, permitted)
        make_inheritable()
    return prepare
