"""The part of oVirt's engine that is asked before an upload: over TLS, on loopback.

    with Engine(directory, 'password') as engine:
        ... engine.keys                 # what a request needs for an upload through it

It has the data center "dc" with the storage domain "data", the clusters "Default" and "other", a VM
"taken", and any disk until that is removed; transfers are what the test says. Its certificate is
its own CA.
"""
import json
import os
import shutil
import subprocess
import urllib.parse

import pytest

import web
from blackbox import ABSENT

API = '/ovirt-engine/api/'
FOUND = {
    'datacenters?search=storage.name=data': {'dc': 'dc-id'},
    'datacenters/dc-id/clusters': {'Default': 'id-1', 'other': 'id-2'},
    'vms?search=name="taken"': {'taken': 'vm-id'},
    'storagedomains?search=name=data': {'data': 'storage-id'},
}


class Handler(web.Handler):
    """Answers one request; the model is the Engine."""

    def do_POST(self):
        """Answer whoever logs in."""
        form = urllib.parse.parse_qs(self.body())
        transfer = self.path[len(API + 'imagetransfers/'):-len('/cancel')]
        if self.path == API + 'imagetransfers/%s/cancel' % transfer:
            self.server.model.transfers.discard(transfer)
            self.answer(200, 'application/xml', '<action/>')
        elif self.path != '/ovirt-engine/sso/oauth/token':
            self.answer(404, 'text/plain', 'not here')
        elif (form['username'], form['password']) == (
                ['admin@internal'], [self.server.model.password]):
            self.answer(200, 'application/json', json.dumps({'access_token': 'token'}))
        else:
            self.answer(400, 'application/json', json.dumps({
                'error': 'access_denied',
                'error_description': 'Cannot authenticate user ' + form['username'][0]}))

    def do_GET(self):
        """Answer with what there is of that name."""
        name = urllib.parse.unquote_plus(self.path[len(API):])
        if self.headers['Authorization'] != 'Bearer token':
            self.answer(401, 'application/xml', '<fault><reason>no token</reason></fault>')
        elif name.startswith('vms/') or self.server.model.vm_status not in (200, 404):
            self.answer(self.server.model.vm_status, 'application/xml', '<x/>')
        elif name.endswith('?all_content=true') and self.server.model.vm_status == 200:
            self.answer(200, 'application/xml', '<disk><vms><vm id="vm-id"/></vms></disk>')
        elif name in self.server.model.removed:
            self.answer(404, 'application/xml', '<fault/>')
        else:
            self.answer(200, 'application/xml', '<all>%s</all>' % ''.join(
                '<one id="%s"><name>%s</name><available>5368709120</available></one>'
                % (identity, found)
                for found, identity in sorted(FOUND.get(name, {}).items())))

    def do_DELETE(self):
        """Remove a disk; it is locked as long as there is a transfer."""
        model = self.server.model
        status = 409 if model.transfers else model.refusals.pop(0) if model.refusals else 200
        if status == 200:
            model.removed.append(self.path[len(API):])
        self.answer(status, 'application/xml', '<action/>')


def make_certificate(directory):
    """Make a certificate that is its own CA; return the path of the file with it and its key."""
    if not shutil.which('openssl'):
        pytest.skip('needs openssl')
    path = os.path.join(directory, 'ca.pem')
    subprocess.check_call(
        ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1',
         '-nodes', '-subj', '/CN=engine', '-addext', 'subjectAltName=IP:127.0.0.1', '-out', path,
         '-keyout', path], stderr=subprocess.DEVNULL)
    os.chmod(path, 0o644)       # the wrapper's user reads the certificate
    return path


def provide(wrapper, password='needle-engine'):
    """Have all that an upload of the wrapper needs; return the Engine for it, to be entered."""
    for name in ('python3', 'nbdkit'):
        wrapper.add_program(name, '#!/bin/sh\n')
    return Engine(wrapper.directory, password)


class Engine(web.WebServer):
    """The server; the directory is where its certificate is made."""

    def __init__(self, directory, password):
        certificate = make_certificate(directory)
        super().__init__(certificate, Handler, self)
        self.password, self.removed = password, []
        self.vm_status = 404            # of the answer for any VM, which has all disks
        self.transfers = set()
        self.refusals = []          # statuses, one for each disk that is not removed
        self.keys = {
            'export_domain': ABSENT, 'rhv_cafile': certificate, 'rhv_password': password,
            'rhv_url': 'https://127.0.0.1:%d/ovirt-engine/api' % self.port,
            'rhv_cluster': 'Default', 'rhv_storage': 'data'}
