"""A thread per group that notices a rank that died, failed or stays away, and ends this process with a named error.

For CUDA, where this process may wait in a kernel that nothing interrupts; gloo notices by itself. Every rank writes a
count, and what it does, to the store and reads the others'. Limit: a rank that holds Python's lock for MISSED beats
(a debugger that stops it) looks dead; a collective in a replayed CUDA graph is not counted, only its rank's life is.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NamedTuple

import torch.distributed as dist

from tp_attention.comm.checks import Call

PERIOD = 1.0  # seconds from beat to beat; with MISSED, a death ends the others within 10 s
MISSED = 7
MARGIN = 15.0  # seconds by which NCCL and our kernels are more patient than this, whose error says more
EXIT_CODE = 1

State = Literal["running", "left", "failed"]


class Beat(NamedTuple):
    """What a rank says of itself: how often it has said so, its number of collectives and the last one's text."""

    turn: int = 0
    number: int = 0
    state: State = "running"
    call: str = "none"


@dataclass
class Peer:
    """Another rank as seen from here, in our own beats: a whole job that was stopped for a while is not dead."""

    beat: Beat = field(default_factory=Beat)
    still: int = 0  # beats of ours since its last one
    behind: int = 0  # beats of ours since its last collective, while we are in a later one

    def judge(self, beat: Beat, number: int, limit: float) -> str | None:
        """Its next beat, or the same one again; what is wrong with it, if anything. limit: in beats, for `behind`."""
        self.still = self.still + 1 if beat.turn == self.beat.turn > 0 else 0  # 0: it has yet to make its group
        self.behind = self.behind + 1 if beat.number == self.beat.number < number else 0
        self.beat = beat
        last = f"its last collective: call {beat.number}, {beat.call}"
        if self.still > MISSED and beat.state == "running":
            return f"died or cannot be reached; {last}"
        if self.still > MISSED and beat.state == "failed":
            return f"left after an error; {last}"
        if self.behind > limit:
            return f"{'left before' if beat.state == 'left' else 'did not come to'} call {beat.number + 1}; {last}"
        return None


class Heartbeat:
    """Beats and watches until stop(). store: one for this group alone. latest: this rank's last call."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        name: str,
        latest: Callable[[], Call],
        *,
        period: float,
        timeout: float,
    ) -> None:
        own = store.clone()  # type: ignore[attr-defined]  # not in the stub. On a shared connection others may wait
        self._store = dist.PrefixStore("beats", own)
        self._store.set_timeout(timedelta(seconds=MISSED * period))
        self._rank, self._name, self._latest, self._period, self._timeout = rank, name, latest, period, timeout
        self._whose = f"rank {rank} of {size} of group {name}"
        self._peers = {other: Peer() for other in range(size) if other != rank}
        self._met: set[int] = set()  # peers whose key is there: reading any other would wait for it
        self._turn = 0
        self._state: State = "running"
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {name}", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def leave(self, *, failed: bool = False) -> None:
        """Tells the others that this rank is about to go: in good order, or after an error. It still watches them."""
        self._state = "failed" if failed else "left"
        with suppress(RuntimeError):  # the store may have gone with its process
            self._beat()

    def stop(self) -> None:
        """Ends the thread, after leave(). Safe to call twice."""
        self._stopped.set()
        self._thread.join()
        self.leave(failed=self._state == "failed")  # again: the thread may have said "running" a moment later
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        if self._thread.is_alive():  # not in a fork of this process
            self.leave(failed=hasattr(sys, "last_value"))  # set by an exception that ends the program
            self.stop()

    def _beat(self) -> None:
        self._turn += 1
        call = self._latest()
        self._store.set(str(self._rank), json.dumps((self._turn, call.number, self._state, str(call))))

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._stopped.wait(self._period):
            try:
                self._beat()
                trouble = self._watch()
                heard = time.monotonic()
            except RuntimeError as error:
                if all(peer.beat.state == "left" for peer in self._peers.values()):
                    return  # nobody is left to wait for
                gone = time.monotonic() - heard > MISSED * self._period
                reason = str(error).splitlines()[0]
                trouble = f"the store's process (rank 0 or the launcher) cannot be reached: {reason}" if gone else None
            if trouble and not self._stopped.is_set():
                self._end(trouble)

    def _watch(self) -> str | None:
        self._met.update(other for other in self._peers if other not in self._met and self._store.check([str(other)]))
        met = sorted(self._met)
        said = self._store.multi_get([str(other) for other in met]) if met else []
        beats = {other: Beat(*json.loads(text)) for other, text in zip(met, said, strict=True)}
        number, limit = self._latest().number, self._timeout / self._period
        for other, peer in self._peers.items():
            if trouble := peer.judge(beats.get(other, peer.beat), number, limit):
                return f"rank {other} {trouble}"
        return None

    def _end(self, trouble: str) -> None:
        call = self._latest()
        text = f"tp_attention: {self._whose}: {trouble}; here: call {call.number}, {call}. This process exits.\n"
        with suppress(OSError):
            os.write(2, text.encode())  # not sys.stderr: the main thread may hold its lock
        os._exit(EXIT_CODE)
