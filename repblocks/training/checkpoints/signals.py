"""Signals that ask a run to stop: it goes on to the next place where nothing is lost, and leaves there."""

import signal
import threading
from types import FrameType

import pytorch_lightning as pl

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""What cluster managers and ``kill`` send, and what Ctrl-C sends."""


class StopRequest:
    """Whether one of the `STOPPING` signals has come, to this process or to another of the job.

    The first only leaves a note; the second ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        """Take the place of the handlers that are there; Lightning puts the former ones back after a fit."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, self._note)

    def came(self, trainer: pl.Trainer) -> bool:
        """Whether to stop; the same on all processes, each of which has to ask."""
        return trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)

    def leave(self) -> None:
        """End the process as its signal would have.

        Raises:
            SystemExit: With 128 and the number of the signal, 143 for SIGTERM, which is also what processes of a
                job leave with when another of it got the signal.
        """
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, signal.Signals(number)
        if again:
            self.leave()
