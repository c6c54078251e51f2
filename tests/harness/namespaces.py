"""Other file systems for the wrapper alone: functions for Wrapper.popen's "prepare"."""
import ctypes
import os
import subprocess

import pytest

SCRATCH = '/var/tmp'

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_SLAVE = 1, 32, 4096, 8192, 16384, 1 << 19
libc = ctypes.CDLL(None, use_errno=True)


def need_namespaces():
    """Skip the test where a process cannot have mounts of its own."""
    command = ['unshare', '--mount', '--propagation', 'slave', 'true']
    if os.getuid() != 0 or subprocess.call(command, stderr=subprocess.DEVNULL) != 0:
        pytest.skip('needs root and a mount namespace')


def call(name, *arguments):
    """Call a function of the C library that returns 0. Raises OSError."""
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def mount(source, target, kind=None, flags=0, options=None):
    """Do what mount(2) does."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    call('mount', *texts, ctypes.c_ulong(flags), options and options.encode())


def own_mounts():
    """Have mounts of one's own from now on."""
    call('unshare', CLONE_NEWNS)
    mount(None, '/', flags=MS_REC | MS_SLAVE)


def empty(directory, mode='0755'):
    """Return a preparation: that a directory is empty."""
    def prepare():
        own_mounts()
        mount('none', directory, 'tmpfs', options='mode=' + mode)
    return prepare


def scratch_covered(wrapper, cover, then=lambda: None):
    """Return a preparation: another SCRATCH, in which only the wrapper's directory is the same.

    cover(directory) mounts it there, then() does something to it in its final place.
    """
    def prepare():
        own_mounts()
        stage = os.path.join(wrapper.directory, 'stage')
        os.makedirs(stage, exist_ok=True)
        cover(stage)
        inner = os.path.join(stage, os.path.basename(wrapper.directory))
        os.makedirs(inner, exist_ok=True)
        mount(wrapper.directory, inner, flags=MS_BIND)
        mount(stage, SCRATCH, flags=MS_MOVE)
        then()
    return prepare


def own_scratch(wrapper):
    """Return (directory, preparation): the directory is SCRATCH for the wrapper."""
    directory = os.path.join(wrapper.directory, 'scratch')
    os.mkdir(directory)
    os.chmod(directory, 0o1777)
    return directory, scratch_covered(
        wrapper, lambda stage: mount(directory, stage, flags=MS_BIND))


def small_scratch(wrapper, options='', then=lambda: None):
    """Return a preparation: SCRATCH is a file system in memory with these options."""
    return scratch_covered(
        wrapper, lambda stage: mount('none', stage, 'tmpfs', options='mode=1777' + options), then)
