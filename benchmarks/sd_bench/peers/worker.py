"""A peer's process: started, asked by JSON lines, and stopped while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sd_bench.killable import Killable
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LOG_HINT = "Its log: {}."


class WorkerError(BackendError):
    """A worker answered with an error, or ended without an answer."""


class Worker(Killable):
    """One process with JSON lines on both sides; its errors and prints go to ``log``.

    It leads a process group of its own, so that `pause` stops its threads and children alike: a
    library's spinning threads then take nothing from the peer whose turn it is, with no setting of
    the library changed. Should this process die, the kernel ends the stopped group.
    """

    def __init__(
        self, command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str]
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self.started_s = perf_counter()
            self._process = subprocess.Popen(  # noqa: S603 - the command is ours
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                text=True,
                encoding="utf-8",
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """The process's number, and its group's."""
        return self._process.pid

    def tell(self, question: Mapping[str, Any]) -> None:
        """Send a question without waiting for its answer. `WorkerError` where it has ended."""
        stream = self._process.stdin
        assert stream is not None  # noqa: S101 - it is a pipe
        try:
            stream.write(json.dumps(question) + "\n")
            stream.flush()
        except (BrokenPipeError, OSError) as error:
            raise self._ended() from error

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer. `WorkerError` where it is an error or there is none."""
        stream = self._process.stdout
        assert stream is not None  # noqa: S101 - it is a pipe
        line = stream.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(answer["error"], _LOG_HINT.format(self._log))
        return answer

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """`tell`, then `answer`."""
        self.tell(question)
        return self.answer()

    def pause(self) -> None:
        """Stop every thread of the worker and its children until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the worker by closing its input, then by force. Twice is allowed."""
        self.resume()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._wait()

    def kill(self) -> None:
        """End it now: it may be in the middle of minutes of work."""
        self._signal(signal.SIGKILL)
        self.close()

    def _wait(self) -> int:
        """Its exit code, once it ended; it is given 10 s for that."""
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            return self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _ended(self) -> WorkerError:
        code = self._wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return WorkerError(f"the worker ended by {how}{said}", _LOG_HINT.format(self._log))
