"""The part of oVirt's engine that is asked before an upload: over TLS, on loopback.

    with Engine(directory, 'password') as engine:
        ... engine.keys                 # what a request needs for an upload through it

It has the data center "dc" with the storage domain "data", the clusters "Default" and "other", and
a VM "taken". Its certificate is its own CA.
"""
import http.server
import json
import os
import shutil
import ssl
import subprocess
import threading
import urllib.parse

import pytest

from blackbox import ABSENT

API = '/ovirt-engine/api/'
FOUND = {
    'datacenters?search=storage.name=data': {'dc': 'dc-id'},
    'datacenters/dc-id/clusters': {'Default': 'id-1', 'other': 'id-2'},
    'vms?search=name="taken"': {'taken': 'vm-id'},
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request; the server knows the password."""

    def log_message(self, *_):
        """Say nothing."""

    def _answer(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        """Answer whoever logs in."""
        form = urllib.parse.parse_qs(
            self.rfile.read(int(self.headers['Content-Length'])).decode())
        if self.path != '/ovirt-engine/sso/oauth/token':
            self._answer(404, 'not here')
        elif (form['username'], form['password']) == (['admin@internal'], [self.server.password]):
            self._answer(200, json.dumps({'access_token': 'token'}))
        else:
            self._answer(400, json.dumps({'error': 'access_denied', 'error_description':
                                          'Cannot authenticate user ' + form['username'][0]}))

    def do_GET(self):
        """Answer with what there is of that name."""
        name = urllib.parse.unquote_plus(self.path[len(API):])
        if self.headers['Authorization'] != 'Bearer token':
            self._answer(401, '<fault><reason>no token</reason></fault>')
        else:
            self._answer(200, '<all>%s</all>' % ''.join(
                '<one id="%s"><name>%s</name></one>' % (identity, found)
                for found, identity in sorted(FOUND.get(name, {}).items())))


def make_certificate(directory):
    """Make a certificate that is its own CA; return its path and that of its key."""
    if not shutil.which('openssl'):
        pytest.skip('needs openssl')
    paths = os.path.join(directory, 'ca.pem'), os.path.join(directory, 'key.pem')
    subprocess.check_call(
        ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1',
         '-nodes', '-subj', '/CN=engine', '-addext', 'subjectAltName=IP:127.0.0.1', '-out',
         paths[0], '-keyout', paths[1]], stderr=subprocess.DEVNULL)
    return paths


class Engine:
    """The server; the directory is where its certificate is made."""

    def __init__(self, directory, password):
        ca, key = make_certificate(directory)
        self._server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        self._server.password = password
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(ca, key)
        # The handshake belongs to the one that is answered, not to all that wait.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._server.handle_error = lambda *_: None     # who does not trust us hangs up
        self.keys = {
            'export_domain': ABSENT, 'rhv_cafile': ca, 'rhv_password': password,
            'rhv_url': 'https://127.0.0.1:%d/ovirt-engine/api' % self._server.server_port,
            'rhv_cluster': 'Default', 'rhv_storage': 'data'}

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
