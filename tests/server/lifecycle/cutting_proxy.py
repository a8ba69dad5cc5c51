"""Stands between clients and a PostgreSQL server, and cuts the line at a COMMIT, on either side of it.

Before the server gets it, or after it has answered: to the client both look the same.
"""

import socket
import threading
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Literal

Cut = Literal["never", "before the commit", "after the commit"]

_CHUNK = 65536
_COMMIT = b"COMMIT\0"  # the statement; there is also BEGIN … READ COMMITTED
_SOCKET = ".s.PGSQL.5432"


class CuttingProxy:
    """`folder` is the host of its URL. `stays_cut`: once it has cut a line it takes no other."""

    def __init__(self, folder: Path, server_folder: Path) -> None:
        self.folder = folder
        self.cut: Cut = "never"
        self.stays_cut = False
        self.num_cut = 0
        self._server_path = str(server_folder / _SOCKET)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / _SOCKET))
        self._listening.listen()
        self._clients: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        for line in (self._listening, *self._clients):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if self.stays_cut and self.num_cut:
                    client.close()
                    continue
                self._clients.append(client)
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(self._server_path)
            while True:
                for source in select([client, server], [], [])[0]:
                    data = source.recv(_CHUNK)
                    if not data or (source is client and _COMMIT in data and self._cuts(server, data)):
                        return
                    (server if source is client else client).sendall(data)

    def _cuts(self, server: socket.socket, data: bytes) -> bool:
        if self.cut == "never":
            return False
        if self.cut == "after the commit":
            server.sendall(data)
            server.recv(_CHUNK)
        self.num_cut += 1
        return True
