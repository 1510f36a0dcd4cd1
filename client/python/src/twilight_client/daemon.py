"""A daemon for the life of a script or test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from .errors import Error, Unreachable
from .session import dial

_DRAIN = 15.0  # seconds, more than the daemon takes to drain


class Daemon:
    """A ``twilightd`` that runs while the context lasts::

        with Daemon() as daemon, dial(daemon.target) as client:
            ...

    ``program`` is found on PATH, if it is no path. Further arguments are the daemon's flags. Its log goes to stderr.
    """

    def __init__(self, *flags: str, program: str | os.PathLike[str] = "twilightd") -> None:
        found = shutil.which(program)
        if found is None:
            raise Unreachable(f"{program} is not on PATH; build it by 'make build' and name it: program=PATH")
        self._command = [found, *flags]
        self._folder = tempfile.mkdtemp(prefix="twilight-")
        self.target = f"unix://{self._folder}/twilightd.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 30.0) -> None:
        """Start it and wait until it serves."""
        self._process = subprocess.Popen([*self._command, "--listen", self.target])  # noqa: S603 - the user's program
        with dial(self.target) as client:
            try:
                client.wait_serving(timeout)
            except Error:
                self.kill()
                raise

    def stop(self) -> None:
        """Let it drain and end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(_DRAIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(Path(self._folder), ignore_errors=True)
