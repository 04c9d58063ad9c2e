"""A real S3 server for tests: Ceph's radosgw with one monitor and one disk in a sparse file, on loopback alone.

Debian's packages radosgw, ceph-mon and ceph-osd are needed (tests/run.sh installs them). Starting takes about 15 s,
nearly all of it Ceph's.
"""

import socket
import time
import uuid
from pathlib import Path

from tests.services.daemons import Daemons
from tests.services.ports import free_port

KEY, SECRET = "testkey", "testsecret"

_CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
# cephx, because radosgw does not start without a key
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = {disk_bytes}
bluestore block db create = false
bluestore block wal create = false
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
admin socket = {folder}/$name.asok
pid file =
log file = {folder}/$name.log
crash dir = {folder}
keyring = {folder}/keyring
[client.rgw.t]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {folder}/rgw
rgw enable usage log = false
# small parts, so that a test of several moves little
rgw multipart min part size = 65536
"""


class Rgw(Daemons):
    """``port`` is radosgw's."""

    NAME = "S3 server"
    NEEDS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph")

    def __init__(self, folder: Path, disk_bytes: int = 8 << 30):
        super().__init__(folder)
        self.port = free_port()
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        self._conf = folder / "ceph.conf"
        self._fsid = str(uuid.uuid4())
        self._mon_port = free_port()
        fields = {"fsid": self._fsid, "mon_port": self._mon_port, "port": self.port}
        self._conf.write_text(_CONF.format(**fields, folder=folder, disk_bytes=disk_bytes))

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def _start(self) -> None:
        folder = self.folder
        keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
        self.run("ceph-authtool", keyring, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw.t", "osd.0"):
            caps = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
            self.run("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self.run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, monmap)
        self._ceph("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._ceph_daemon("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        self._ceph("ceph", "osd", "new", disk)  # waits for the monitor
        self._ceph("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._ceph_daemon("ceph-osd", "-i", "0")
        self._ceph_daemon("radosgw", "-n", "client.rgw.t")
        user = ("--uid", "test", "--display-name", "test", "--access-key", KEY, "--secret", SECRET)
        self._ceph("radosgw-admin", "-n", "client.rgw.t", "user", "create", *user)
        wait_for_port(self.port, 300)

    def _ceph(self, program: str, *arguments: str) -> None:
        self.run(program, "-c", str(self._conf), *arguments, timeout=300)

    def _ceph_daemon(self, program: str, *arguments: str) -> None:
        self._daemon(program, program, "-f", "-c", str(self._conf), *arguments)


def environment(port: int) -> dict[str, str]:
    """For the server at ``port``, or a proxy in front of it."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def wait_for_port(port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
