"""Who asks, in a closed loop? Clients in a process of their own, each with a socket.

``clients.py BEGIN END SOCKET ...``, with moments of the monotonic clock and inherited
file descriptors: each client sends a byte, and another one as soon as it has an answer,
until the end. The latencies of the answers between the two moments are written to
standard output, as doubles.

Greenlets that ask again in the same breath would not do: one outcome resumes them all
in one go, and every linger would see its whole wave again before it can decide.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from array import array


def main(begin: float, end: float, sockets: list[int]) -> None:
    """Ask until the end, then until all is answered."""
    clock = time.monotonic
    taken = array("d")
    with selectors.DefaultSelector() as selector:
        for number in sockets:
            client = socket.socket(fileno=number)
            client.send(b"?")
            selector.register(client, selectors.EVENT_READ, [clock()])
        while selector.get_map():
            for key, _ in selector.select():
                client, sent = key.fileobj, key.data  # type: ignore[assignment]
                answered, now = client.recv(1), clock()
                if begin <= now < end:
                    taken.append(now - sent[0])
                if answered and now < end:
                    sent[0] = now
                    client.send(b"?")
                else:
                    selector.unregister(client)
                    client.close()
    sys.stdout.buffer.write(taken.tobytes())


if __name__ == "__main__":
    begin, end, *sockets = sys.argv[1:]
    main(float(begin), float(end), [int(number) for number in sockets])
