"""What simulated servers have in common: HTTPS on loopback."""

import hashlib
import http.server
import re
import secrets
import socket
import socketserver
import ssl
import threading


def own_address():
    """Return an address on loopback for a server whose port is always the same."""
    return "127.%d.%d.%d" % tuple(1 + secrets.randbelow(250) for _ in range(3))


class WebServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A context manager: serves in threads of its own until it is left. Enter it before anything
    leaves the mount namespace: its threads stay in the one they were started in."""

    daemon_threads = True

    def __init__(self, certificate, handler, model, address="127.0.0.1", port=0):
        """Take the path of a PEM file with certificate and key, a `Handler`, and the object that
        it finds as self.server.model. Port 0: one that the kernel chooses."""
        super().__init__((address, port), handler)
        self.model = model
        self.port = self.server_address[1]
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def finish_request(self, request, client_address):
        """Do the TLS handshake in the connection's own thread, so that none waits for it."""
        with self._tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request, client_address):
        """Say nothing: a killed virt-v2v tears its connection."""


class VmwareServer(WebServer):
    """A server of VMware, as far as its certificate and its ports go; needs root."""

    def __init__(self, certificate, handler, model):
        self.address = own_address()    # the port of the disks is always the same
        super().__init__(certificate, handler, model, self.address)
        self.disks = socket.socket()
        self.disks.bind((self.address, 902))
        self.disks.listen(1000)     # nobody takes them
        self.thumbprint = thumbprint(certificate)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.disks.close()

    def uri(self):
        """Return the libvirt URI of the server."""
        return "esx://root@%s:%d?no_verify=1" % (self.address, self.port)


class Handler(http.server.BaseHTTPRequestHandler):
    """To be derived from, with do_GET() and so on."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *args):
        """Say nothing on stderr."""

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

    def answer(self, status, kind, text, **headers):
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


def thumbprint(certificate, kind="sha1"):
    """Return the fingerprint of the PEM file's certificate, as VMware shows it."""
    with open(certificate) as pem:
        found = re.search("-----BEGIN CERT.*END CERTIFICATE-----", pem.read(), re.S)
    digest = hashlib.new(kind, ssl.PEM_cert_to_DER_cert(found.group(0))).hexdigest().upper()
    return ":".join(digest[i:i + 2] for i in range(0, len(digest), 2))
