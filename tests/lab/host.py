"""
A host of the simulated oVirt engine: it makes the images of disks and serves them.

Images are files in a directory. They are served as by oVirt: a qemu-nbd opens the file, and the
real ovirt-imageio takes what is uploaded over HTTPS and writes it there, if it has a ticket for it.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import time
import uuid

from lab import LabError, make_directory, poll, run

# What differs from the defaults: no systemd, no user ovirtimg, and ports and sockets of our own.
CONFIGURATION = """
[daemon]
poll_interval = 0.1
systemd_enable = false
drop_privileges = false
run_dir = {directory}
[tls]
key_file = {certificate}
cert_file = {certificate}
ca_file = {ca}
[remote]
host = 127.0.0.1
port = 0
[local]
socket =
[control]
transport = unix
socket = {directory}/control
remove_timeout = 1
[handlers]
keys = stderr
[logger_root]
level = INFO
handlers = stderr
"""

DAEMON = "from ovirt_imageio._internal import server; server.main()"
READY = r"remote\.service listening on \('127\.0\.0\.1', ([0-9]+)(?s:.*)Ready for requests"


class Host:
    """A context manager, which runs until it is left.

    Attributes for others: `images`, their directory; `daemon`, the process of imageio.
    """

    def __init__(self, directory, certificate, ca):
        """Take a directory, a PEM file with certificate and key, and that of its CA."""
        self._directory = directory
        self._log = os.path.join(directory, "imageio.log")
        self._served = {}       # disk: its qemu-nbd, and the ticket
        self.images = make_directory(os.path.join(directory, "images"))
        configuration = os.path.join(make_directory(os.path.join(directory, "conf.d")), "lab.conf")
        with open(configuration, "w") as stream:
            stream.write(CONFIGURATION.format(
                directory=directory, certificate=certificate, ca=ca))

    def __enter__(self):
        with open(self._log, "w") as log:
            self.daemon = subprocess.Popen(
                ["/usr/bin/python3", "-c", DAEMON, "--conf-dir", self._directory],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        with contextlib.suppress(TimeoutError):
            self._port = poll(self._ready, 30)
            return self
        self.__exit__()
        raise LabError("ovirt-imageio is not ready: " + self._log)

    def _ready(self):
        with open(self._log) as log:
            found = re.search(READY, log.read())
        return found and found.group(1)

    def __exit__(self, *exception):
        for process in [self.daemon] + [server for server, _ in self._served.values()]:
            process.kill()
            process.wait()

    def image(self, disk):
        """Return the path of the disk's image."""
        return os.path.join(self.images, disk)

    def create_image(self, disk, kind, size):
        run(["qemu-img", "create", "-q", "-f", kind, self.image(disk), str(size)])

    def delete_image(self, disk):
        os.unlink(self.image(disk))

    def serve_image(self, disk, kind, size, transfer):
        """Let the image be written; return the URL for that."""
        address = os.path.join(self._directory, disk[:8] + ".sock")
        ticket = str(uuid.uuid4())
        self._served[disk] = subprocess.Popen(
            ["qemu-nbd", "--persistent", "--shared=8", "--socket=" + address, "--format=" + kind,
             "--cache=writeback", "--discard=unmap", "--detect-zeroes=unmap", self.image(disk)],
            stdin=subprocess.DEVNULL), ticket
        poll(lambda: os.path.exists(address), 30)
        self._control("PUT", ticket, {
            "uuid": ticket, "size": size, "url": "nbd:unix:" + address, "timeout": 3600,
            "inactivity_timeout": 3600, "ops": ["write"], "sparse": True, "dirty": False,
            "transfer_id": transfer})
        return "https://localhost:%s/images/%s" % (self._port, ticket)

    def stop_serving(self, disk):
        """Take the ticket back, once the requests under way have ended, and stop."""
        server, ticket = self._served[disk]
        # A daemon that is gone has no tickets.
        with contextlib.suppress(ConnectionError):
            while self._control("DELETE", ticket) == 409:
                time.sleep(0.1)
        server.terminate()
        server.wait()
        del self._served[disk]

    def _control(self, method, ticket, document=None):
        """Make a call of imageio's control service; return the HTTP status."""
        connection = http.client.HTTPConnection("localhost")
        with contextlib.closing(connection):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(os.path.join(self._directory, "control"))
            connection.request(method, "/tickets/" + ticket,
                               body=json.dumps(document) if document else None)
            status = connection.getresponse().status
        if status not in (200, 204, 409):
            raise LabError("imageio: %s of a ticket: status %d" % (method, status))
        return status
