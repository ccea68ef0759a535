"""How a rank failed, and which of several failures came first. Shared by spawn and the pytest plugin."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from tp_attention.comm.group import echoes_peer


@dataclass(frozen=True)
class Failure:
    """A rank's end. `echo`: it only says that another rank is gone. `at`: time.monotonic(), comparable on one host."""

    rank: int
    cause_type: str
    cause_message: str
    at: float
    traceback: str = ""
    echo: bool = False
    exit_code: int | None = None  # -9 for SIGKILL, as in multiprocessing

    @classmethod
    def of_exception(cls, rank: int, error: BaseException) -> Failure:
        text = "".join(traceback.format_exception(error))
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        return cls(rank, type(error).__name__, str(error), time.monotonic(), text, echoes_peer(error), code)

    @classmethod
    def of_exit(cls, rank: int, exit_code: int) -> Failure:
        if exit_code < 0:
            name = {item.value: item.name for item in signal.Signals}.get(-exit_code, f"signal {-exit_code}")
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return cls(rank, name, f"killed by {name}{hint}", time.monotonic(), exit_code=exit_code)
        text = f"exited with code {exit_code} before it returned"
        return cls(rank, "exit", text, time.monotonic(), exit_code=exit_code)


class RankError(RuntimeError):
    """A rank failed: the first one, not those that then lost their connection to it.

    rank; exit_code, negative for the signal that killed it; cause_type and cause_message, those of its exception (or
    the signal's name); traceback, its text, "" for a rank that was killed. failures: of all ranks whose end was seen.
    """

    def __init__(self, failures: Sequence[Failure], ranks: int) -> None:
        self.failures = sorted(failures, key=lambda failure: (failure.echo, failure.at))
        first = self.failures[0]
        self.rank, self.exit_code, self.traceback = first.rank, first.exit_code, first.traceback
        self.cause_type, self.cause_message = first.cause_type, first.cause_message
        text = f"rank {first.rank} of {ranks}: {first.cause_type}: {first.cause_message}"
        if first.traceback:
            text += f"\n\nIts traceback:\n{first.traceback}"
        super().__init__(text)
