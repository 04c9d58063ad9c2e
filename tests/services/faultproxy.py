"""A proxy between an S3 client and its server that does what networks and object stores do on bad days.

Runs in a thread of the test's process, on loopback. ``rules`` is a list that a test may change at any time; the first
rule that fits a request and is not used up fires:

    Rule("status", status=503)       answers SlowDown (403: AccessDenied, 500: InternalError) without asking the server
    Rule("reset")                    resets the connection instead of answering
    Rule("drop_reply")               lets the server do the work, then resets: the lost reply
    Rule("cut", after=1000)          resets after 1000 bytes of the body
    Rule("short", after=1000)        ends the body after 1000 bytes and says it is whole
    Rule("corrupt", after=1000)      flips a bit of byte 1000
    Rule("stall", after=1000)        sends nothing more after 1000 bytes, and keeps the connection open
    Rule("drip", after=1000)         from there on a byte a second: no socket timeout ever fires
"""

import asyncio
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Literal

_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Rule:
    action: Literal["status", "reset", "drop_reply", "cut", "short", "corrupt", "stall", "drip"]
    count: int | None = None  # requests that it still hits; None: all
    skip: int = 0  # fitting requests to let pass before
    every: int = 1  # of those behind, hits one in so many
    method: str = "GET"
    path: str = ""  # regular expression, searched in the path
    status: int = 503
    after: int = 0
    _seen: int = field(default=0, init=False)

    def fits(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path) or self.count == 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self._seen += 1
        if self._seen % self.every:
            return False
        if self.count is not None:
            self.count -= 1
        return True


class FaultProxy:
    """A context manager. ``port`` is where it listens; ``requests`` and ``fired`` count."""

    def __init__(self, target_port: int):
        self._target = target_port
        self.rules: list[Rule] = []
        self.requests: list[str] = []  # "GET /bucket/key?query"
        self.fired: list[str] = []

    def __enter__(self) -> "FaultProxy":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faultproxy", daemon=True)
        self._thread.start()
        serving = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _rule(self, method: str, path: str) -> Rule | None:
        self.requests.append(f"{method} {path}")
        rule = next((rule for rule in list(self.rules) if rule.fits(method, path)), None)
        if rule:
            self.fired.append(rule.action)
        return rule

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            server = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 20)
            while await self._exchange(reader, writer, *server):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # one side has left, or the proxy ends
        finally:
            for end in (writer, server[1] if server else None):
                if end is not None:
                    end.close()

    async def _exchange(self, reader, writer, from_server, to_server) -> bool:
        """One request and its reply. False once the connection is of no more use."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin1").split(" ", 2)
        headers = _headers(head)
        rule = self._rule(method, path)
        if rule and rule.action == "reset":
            return _reset(writer)
        if "100-continue" in headers.get("expect", ""):  # the body comes only after this
            head = re.sub(rb"(?i)expect:[^\r\n]*\r\n", b"", head)
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, headers)
        if rule and rule.action == "status":
            error = f"<Error><Code>{_CODES[rule.status]}</Code><Message>injected</Message></Error>".encode()
            reply = f"HTTP/1.1 {rule.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(error)}"
            writer.write(f"{reply}\r\n\r\n".encode() + (b"" if method == "HEAD" else error))
            await writer.drain()
            return True
        to_server.write(head + body)
        reply = await from_server.readuntil(b"\r\n\r\n")
        answered = _headers(reply)
        status = int(reply.split(b" ", 2)[1])
        bodiless = method == "HEAD" or status in (204, 304)
        body = b"" if bodiless else await _read_body(from_server, answered)
        if rule and rule.action == "drop_reply":
            return _reset(writer)
        if rule and rule.action == "short":
            body = body[: rule.after]
            reply = re.sub(rb"(?i)content-length:[^\r\n]*", b"Content-Length: %d" % len(body), reply)
        if rule and rule.action == "corrupt":
            body = body[: rule.after] + bytes([body[rule.after] ^ 4]) + body[rule.after + 1 :]
        writer.write(reply)
        if rule and rule.action in ("cut", "stall", "drip"):
            writer.write(body[: rule.after])
            await writer.drain()
            if rule.action == "stall":
                await reader.read()  # until the client leaves
            for byte in body[rule.after :] if rule.action == "drip" else b"":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)
            await asyncio.sleep(0.05)  # what was sent arrives before the reset
            return _reset(writer)
        writer.write(body)
        await writer.drain()
        return "close" not in (answered.get("connection", "").lower(), headers.get("connection", "").lower())


def _headers(head: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in head.decode("latin1").split("\r\n")[1:])
    return {key.strip().lower(): value.strip() for key, _, value in lines if key}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A message's body as it stands on the wire."""
    if "chunked" not in headers.get("transfer-encoding", "").lower():
        return await reader.readexactly(int(headers.get("content-length", 0)))
    parts = []
    while True:
        parts.append(await reader.readuntil(b"\r\n"))
        size = int(parts[-1].split(b";")[0], 16)
        parts.append(await reader.readexactly(size + 2))
        if size == 0:
            return b"".join(parts)


def _reset(writer: asyncio.StreamWriter) -> bool:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
