"""What a guest that is read by SSH needs: OpenSSH's programs, a key, and hosts that are known."""
import os
import shutil
import subprocess
import tempfile

import pytest

import namespaces
from blackbox import ABSENT

PROGRAMS = ('ssh-agent', 'ssh-add')
HOST_KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGrL2B4sOAsNmyHCc6JxF0Qjd3d9vPQ1P9E1b3nWZs3f'
GUEST = {'transport_method': 'ssh', 'vm_name': 'ssh://root@esx.example.com/vmfs/volumes/ds/v/v.vmx',
         'vmware_uri': ABSENT, 'vmware_password': ABSENT, 'vmware_fingerprint': ABSENT}


def make_key(passphrase=''):
    """Return the text of a private key, and its fingerprint."""
    directory = tempfile.mkdtemp()
    try:
        path = os.path.join(directory, 'key')
        subprocess.check_call(['ssh-keygen', '-q', '-t', 'ed25519', '-N', passphrase, '-f', path])
        shown = subprocess.check_output(['ssh-keygen', '-l', '-f', path]).decode()
        with open(path) as stream:
            return stream.read(), shown.split()[1]
    finally:
        shutil.rmtree(directory)


def provide(wrapper, host='esx.example.com'):
    """Put OpenSSH on the wrapper's PATH; return a preparation: that the host's key is known."""
    namespaces.need_namespaces()
    if not all(map(shutil.which, PROGRAMS + ('ssh-keygen',))) or not os.path.isdir('/etc/ssh'):
        pytest.skip('needs openssh-client')
    for name in PROGRAMS:
        wrapper.add_program(name, '#!/bin/sh\nexec %s "$@"\n' % shutil.which(name))
    empty = namespaces.empty('/etc/ssh')

    def prepare():
        empty()
        with open('/etc/ssh/ssh_known_hosts', 'w') as stream:
            stream.write('%s %s\n' % (host, HOST_KEY))
    return prepare
