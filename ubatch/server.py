"""How does one model serve all processes of a host?

The server is a batcher whose callers are in other processes, and whose handler is in
another one again: it only passes on, and imports nothing of the model's.
"""

from __future__ import annotations

import logging
import os
import signal
from _socket import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from ubatch import address
from ubatch.channel import Channel
from ubatch.errors import BackendError
from ubatch.forward import ForwardingExecutor
from ubatch.log import tell
from ubatch.processes import Processes
from ubatch.session import STALLED, Session
from ubatch.ubatch import UBatch
from ubatch.wire import LARGEST_FRAME, Kind, WireError

if TYPE_CHECKING:
    from ubatch.collector import Collector

logger = logging.getLogger(__name__)

ACCEPT_AGAIN = 0.1
"""Seconds until it is tried again, when no client can be accepted."""

LOOK = 0.01
"""Seconds between two looks whether all is answered, while the server ends."""

GOODBYE = 1.0
"""Seconds that clients have to leave, once they were told to and have their answers."""


class Server:
    """One model, for whoever connects to its socket.

    Owner: the thread that runs it, which is the only one here.
    """

    def __init__(
        self,
        executor: ForwardingExecutor,
        path: str,
        batcher: UBatch[Any, Any],
        *,
        largest: int = LARGEST_FRAME,
        grace: float = 30.0,
    ) -> None:
        """Take what is to be served. Starts nothing.

        Args:
            path: Where to listen.
            batcher: One of *executor*'s.
            largest: Bytes that a client may send in one frame.
            grace: Seconds in which to answer what was accepted, once it is to end.
        """
        self._label = executor.label
        self._path = path
        self._batcher = batcher
        self._largest = largest
        self._grace = grace
        self._began = monotonic()
        self._sessions: set[Session] = set()
        executor.clients = self._clients
        self._told = Event()  # to end

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Blocks.

        Raises:
            BackendError: The socket cannot be had, or others could reach it.
            OSError: The same.
        """
        listener = address.listen(self._path)
        mine = os.stat(self._path)
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                gevent.signal_handler(number, self._told.set)
            gevent.signal_handler(signal.SIGHUP, self._reload)
            # Who started us may have had it wait, as until now it would have killed.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
            self._batcher.start()
            self._processes().begin()
            accepting = gevent.spawn(self._accept, listener)
            accepting.link_exception(lambda _: self._told.set())  # it would be deaf
            self._log(
                "process %d serves %s at %s", os.getpid(), self._label, self._path
            )
            self._told.wait()
            accepting.kill()
        finally:
            with suppress(OSError):  # somebody may have put another one there
                if os.path.samestat(os.stat(self._path), mine):
                    os.unlink(self._path)
            listener.close()  # last: until then no other server takes the path
        self._drain()

    def status(self) -> dict[str, Any]:
        """Return what ``ubatch status`` tells, as JSON has it."""
        seen, trouble = self._batcher.stats(), self._processes().trouble
        return {
            "factory": self._label,
            "pid": os.getpid(),
            "uptime_seconds": round(monotonic() - self._began, 3),
            "clients": self._clients(),
            "pending": seen.pending,
            "running": seen.running,
            "calls_total": seen.calls_total,
            "results_total": seen.results_total,
            "failures_total": seen.failures_total,
            "cancelled_total": seen.cancelled_total,
            "expired_total": seen.expired_total,
            "rejected_total": seen.rejected_total,
            "reruns_total": seen.reruns_total,
            "stuck_total": seen.stuck_total,
            "batches_total": seen.batches_total,
            "mean_batch_size": round(seen.mean_batch_size, 2),
            "handler_seconds": round(seen.handler_seconds, 3),
            "memory_bytes": memory_of(os.getpid()),
            "trouble": trouble and str(trouble),
            "models": [
                {"pid": pid, "memory_bytes": memory_of(pid)}
                for pid in self._processes().pids()
            ],
        }

    def _clients(self) -> int:
        return sum(session.has_asked for session in self._sessions)

    def _collector(self) -> Collector:
        return self._batcher._here()

    def _processes(self) -> Processes:
        places = self._collector().places
        assert isinstance(places, Processes)
        return places

    def _reload(self) -> None:
        self._log("reloads %s", self._label)
        self._processes().reload()

    def _accept(self, listener: socket) -> None:
        wait_for = self._collector().backend.wait_for
        while wait_for(listener.fileno()):
            try:
                fd, _ = listener._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                continue
            except OSError as error:  # too many files are open, say
                self._log("cannot accept a client: %s", error, level=logging.ERROR)
                gevent.sleep(ACCEPT_AGAIN)
                continue
            gevent.spawn(self._serve, socket(fileno=fd))

    def _serve(self, sock: socket) -> None:
        """Serve one client, until it is gone or has to go."""
        collector = self._collector
        wait_for = collector().backend.wait_for
        channel = Channel(sock, wait_for, self._largest, STALLED)
        pid = 0
        try:
            pid = address.check_peer(sock)
            with self._watched(pid, channel):
                if self._greet(channel):
                    self._serve_session(pid, channel)
        except (BackendError, WireError) as error:
            self._drop(pid, str(error))
            with suppress(OSError):
                channel.send(Kind.REFUSE, 0, str(error), timeout=STALLED)
        except TimeoutError as error:
            self._drop(pid, str(error))
        except OSError:
            pass  # it is gone
        finally:
            channel.end()
            channel.close()

    def _greet(self, channel: Channel) -> bool:
        """Have the client say who it is, and say who this is."""
        frame = channel.receive(STALLED)
        if frame is None:
            return False
        if frame.kind is not Kind.HELLO:
            raise WireError(f"a {frame.kind.name} from one who has not said hello")
        hello = {
            "pid": os.getpid(),
            "name": self._label,
            "largest": self._largest,
            "max_size": self._batcher.max_size,
        }
        channel.send(Kind.HELLO, 0, hello, timeout=STALLED)
        return True

    def _serve_session(self, pid: int, channel: Channel) -> None:
        backend = self._collector().backend
        session = Session(
            *(channel, pid, backend, self._collector, self.status),
            self._batcher._deadline,
        )
        self._sessions.add(session)
        writer = gevent.spawn(self._write, session)
        try:
            session.read()
        except WireError as error:
            self._drop(pid, str(error))
            session.refuse(str(error))
            writer.join()
        finally:
            session.close()
            self._sessions.discard(session)
            writer.join()

    @contextmanager
    def _watched(self, pid: int, channel: Channel) -> Iterator[None]:
        """End a client's channel when its process ends, though a child holds it, too.

        Where that cannot be seen, in another pid namespace say, whose pids are 0 here,
        the end of the socket has to do.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            pidfd = -1
        watcher = gevent.spawn(self._watch, pidfd, channel) if pidfd >= 0 else None
        try:
            yield
        finally:
            if watcher is not None:
                watcher.kill()
                os.close(pidfd)

    def _watch(self, pidfd: int, channel: Channel) -> None:
        self._collector().backend.wait_idly(pidfd)
        channel.end()

    def _write(self, session: Session) -> None:
        try:
            session.write()
        except TimeoutError as error:
            self._drop(session.pid, str(error))
        except OSError:
            pass  # it is gone
        finally:
            session.close()

    def _drain(self) -> None:
        """Answer what was accepted, within the grace."""
        end = monotonic() + self._grace
        self._log("ends, once what was accepted is answered")
        for session in self._sessions:
            session.say_goodbye()
        self._batcher._stop_soon()
        while monotonic() < end and not all(each.idle for each in self._sessions):
            gevent.sleep(LOOK)
        left = self._batcher.stats().pending + self._batcher.stats().running
        self._batcher.stop(max(0.0, end - monotonic()))
        end = monotonic() + GOODBYE  # for what is on its way, in both directions
        while monotonic() < end and self._sessions:
            gevent.sleep(LOOK)
        for session in list(self._sessions):
            session.close()
        level = logging.WARNING if left else logging.INFO
        self._log("has ended; calls that got Stopped: %d", left, level=level)

    def _drop(self, pid: int, why: str) -> None:
        self._log("client %d is dropped: %s", pid, why, level=logging.WARNING)

    def _log(self, message: str, *args: object, level: int = logging.INFO) -> None:
        tell(logger, level, f"{self._batcher.name}: {message}", *args)


def memory_of(pid: int) -> int | None:
    """Return how many bytes of memory a process has; None if that cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
