"""The thread that steps the engine, and whether it answers.

A failure is remembered until something has been answered again; while there is nothing to answer,
the thread asks for a token itself, so that a server which nobody asks any more recovers too. What
no process recovers from, such as a CUDA context that is broken, needs another process.
"""

import logging
import os
import signal
import threading
import time

from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request, TokenEvent

logger = logging.getLogger(__name__)

FIRST_PROBE = 0.05  # seconds after a failure; doubled after each probe that failed
LAST_PROBE = 5.0
IDLE = 0.1  # seconds between two looks at whether the server stops


class EngineThread(threading.Thread):
    """Steps the engine while there is something to do, whatever goes wrong.

    stall_timeout  seconds after which a step that has not ended counts as a failure.
    give_up_after  seconds of failures after which the process is ended; 0 is never.
    """

    def __init__(self, engine: Engine, stall_timeout: float, give_up_after: float = 0.0) -> None:
        super().__init__(daemon=True, name="engine")
        self.engine = engine
        self.stall_timeout, self.give_up_after = stall_timeout, give_up_after
        self.stopping = threading.Event()
        self.num_failures = 0
        self._error = ""
        self._step_began = self._failing_since = 0.0
        self._pause = FIRST_PROBE
        self._next_probe = 0.0

    @property
    def error(self) -> str:
        """Why requests are not answered at the moment; "" if they are."""
        if not self.is_alive():
            return self._error or "the engine's thread has ended"
        began = self._step_began
        if began and time.monotonic() - began > self.stall_timeout:
            return f"a step of the engine has taken more than {self.stall_timeout:g} seconds"
        return self._error

    def observe(self, event: TokenEvent) -> None:
        """Every event of every request comes by here."""
        if event.finish_reason == "error":
            self._failed(event.error)
        elif event.finish_reason != "cancelled":
            self._error, self._pause = "", FIRST_PROBE

    def run(self) -> None:
        while not self.stopping.is_set():
            self.engine.wait(self._pause if self._error else IDLE)
            if self._error and time.monotonic() > self._next_probe:
                self._probe()
            try:
                while not self.stopping.is_set() and self._step():
                    pass
            except Exception as error:  # the engine has ended what it concerns; the rest continues
                logger.exception("a step of the engine failed")
                self._failed(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        """End the thread after its step."""
        self.stopping.set()
        self.join()

    def _step(self) -> bool:
        self._step_began = time.monotonic()
        try:
            return self.engine.step()
        finally:
            self._step_began = 0.0

    def _failed(self, error: str) -> None:
        now = time.monotonic()
        if not self._error:
            self._next_probe, self._failing_since = now + self._pause, now
        elif 0 < self.give_up_after < now - self._failing_since:
            logger.error(
                "nothing but failures for %g seconds: the process ends", self.give_up_after
            )
            os.kill(os.getpid(), signal.SIGTERM)
        self.num_failures += 1
        self._error = error

    def _probe(self) -> None:
        self._pause = min(2 * self._pause, LAST_PROBE)
        self._next_probe = time.monotonic() + self._pause
        bos = self.engine.tokenizer.get_bos_token_id()
        self.engine.submit(Request([bos], 1, calculator=False), self.observe)
