"""
The target of uploads: a simulated engine (engine.py) with a host (host.py), and oVirt's SDK.

virt-v2v's scripts import the real SDK, and the host runs the real image server; both come from
PyPI, since Debian does not have them, and are laid over Debian's Python packages in the lab.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile

from collections import namedtuple

from engine import Engine
from host import Host
from lab import (
    CACHE, ArrivedVm, LabError, Unavailable, lay_over, locked, make_directory, run)
from web import own_address

FROM_PYPI = ["ovirt-engine-sdk-python==4.6.3", "ovirt-imageio==2.5.1"]
DEBIAN_PYTHON = "/usr/lib/python3/dist-packages"


class Target(namedtuple("Target", "path engine host ca")):
    """What a virtual machine is uploaded to: `path` is the directory of the images, `ca` that of
    the CA's certificate."""

    def keys(self, **changes):
        """Return the keys of a request that uploads to it."""
        keys = {
            "rhv_url": self.engine.url,
            "rhv_password": self.engine.password,
            "rhv_cluster": self.engine.cluster["name"],
            "rhv_storage": self.engine.storage["name"],
            "rhv_cafile": self.ca,
        }
        return dict(keys, **changes)

    def files(self):
        """Return the paths of the images."""
        return sorted(os.path.join(self.path, name) for name in os.listdir(self.path))

    def vms(self):
        """Return an `ArrivedVm` for each virtual machine in the engine."""
        return [ArrivedVm(vm["name"], key, len(self.engine.disks_of(key)))
                for key, vm in self.engine.vms.items()]


@contextlib.contextmanager
def upload_target(lab):
    """Have a new, empty `Target` in the lab; Unavailable if its packages cannot be had."""
    if not os.path.isdir(os.path.join(DEBIAN_PYTHON, "ovirtsdk4")):
        lay_over(DEBIAN_PYTHON, packages_from_pypi())
    directory = make_directory(tempfile.mkdtemp(prefix="target-", dir=lab.work))
    address = own_address()
    certificate, ca = make_certificates(directory, address)
    with Host(directory, certificate, ca) as host, \
            Engine(certificate, address, lab.password + "-of-the-engine", host) as engine:
        yield Target(host.images, engine, host, ca)


def packages_from_pypi():
    """Return the directory with the packages, which are built if they are not there."""
    pins = hashlib.sha256(repr(FROM_PYPI).encode()).hexdigest()
    path = os.path.join(CACHE, "packages-" + pins[:12])
    with locked(CACHE):
        if not os.path.isdir(path):
            shutil.rmtree(path + ".new", ignore_errors=True)
            try:
                run(["/usr/bin/python3", "-m", "pip", "install", "--quiet", "--no-deps",
                     "--target", path + ".new"] + FROM_PYPI)
            except LabError as error:
                raise Unavailable("uploads need packages of PyPI: %s" % error)
            os.rename(path + ".new", path)
    return path


def make_certificates(directory, address):
    """Return the paths of a PEM file with key and certificate, and of its CA. The certificate is
    for localhost and the address."""
    ca, key, certificate = [os.path.join(directory, name)
                            for name in ("ca.pem", "ca.key", "localhost.pem")]
    # Python 3.13 and later want to be told that a CA may sign.
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
           "-addext", "keyUsage=keyCertSign,digitalSignature,keyEncipherment"]
    run(new + ["-subj", "/CN=CA of the lab", "-keyout", key, "-out", ca])
    run(new + ["-subj", "/CN=localhost", "-addext",
               "subjectAltName=DNS:localhost,IP:" + address, "-CA", ca, "-CAkey", key,
               "-keyout", certificate, "-out", certificate + ".crt"])
    with open(certificate, "a") as both, open(certificate + ".crt") as crt:
        both.write(crt.read())
    return certificate, ca
