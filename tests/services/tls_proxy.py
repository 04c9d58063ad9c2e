"""What a company puts before its MLflow: TLS with a certificate of its own CA, and a login. On loopback, in threads."""

import datetime
import http.client
import ipaddress
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "host"}


class TlsProxy:
    """A context manager. ``uri`` is where it listens, ``ca`` the certificate to trust; ``allowed`` holds the values of
    the Authorization header that it lets through, ``refusal`` is what the others are answered with."""

    def __init__(self, folder: Path, target_port: int, allowed: set[str]):
        self.ca, self.allowed, self.refusal = folder / "ca.pem", allowed, 401
        chain = _certificates(self.ca, folder / "server.pem")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, target_port))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.uri = f"https://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "TlsProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: TlsProxy, target_port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") not in proxy.allowed:
                return self._answer(proxy.refusal, {}, b"who are you?")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP | {"authorization"}}
            connection = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
            connection.request(self.command, self.path, body, headers)
            reply = connection.getresponse()
            self._answer(reply.status, dict(reply.getheaders()), reply.read())
            connection.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in _HOP_BY_HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args) -> None:
            pass

    return Handler


def _certificates(ca: Path, server: Path) -> Path:
    """Writes the CA's certificate, and key and certificate of a server at 127.0.0.1 that it vouches for."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("a private CA", "127.0.0.1")]
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)

    def signed(subject: int, extension: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder().subject_name(names[subject]).issuer_name(names[0])
        builder = builder.public_key(keys[subject].public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(begin).not_valid_after(begin + datetime.timedelta(days=30))
        builder = builder.add_extension(extension, critical=False)
        return builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca.write_bytes(signed(0, x509.BasicConstraints(ca=True, path_length=None)))
    key = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server.write_bytes(
        key + signed(1, x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]))
    )
    return server
