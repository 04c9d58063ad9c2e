"""Ports for servers that must be told theirs before they start."""

import random
import socket

# Above those of the launcher's rendezvous, and below those that Linux gives to connections, so that the port is still
# free when the server comes to take it.
_PORTS = range(30_000, 32_768)


def free_port() -> int:
    chance = random.SystemRandom()  # tests in other processes draw too
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := chance.choice(_PORTS)))
            except OSError:
                continue
            return port
