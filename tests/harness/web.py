"""What simulated servers have in common: HTTPS on loopback, at a port the kernel chooses."""

import http.server
import socketserver
import ssl
import threading


class WebServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A context manager: serves in threads of its own until it is left. Enter it before anything
    leaves the mount namespace: its threads stay in the one they were started in."""

    daemon_threads = True

    def __init__(self, certificate, handler, model):
        """Take the path of a PEM file with certificate and key, a `Handler`, and the object that
        it finds as self.server.model."""
        super().__init__(("127.0.0.1", 0), handler)
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
