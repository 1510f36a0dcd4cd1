"""Waiting on a 32-bit word that processes share; proto/twilight/v1/ARMED.md is the protocol."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Callable

from .errors import Unsupported

WORD_BYTES = 4

_WAIT, _WAKE = 0, 1  # operations that reach other processes
_ALL = 2**31 - 1
_SLICE = 1.0  # seconds that a wait sleeps without looking again, should a wake be lost
_SPINS = 64  # looks before it sleeps: some microseconds

_MACHINE = platform.machine()
_SYSCALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(_MACHINE)
_ORDERED = _MACHINE == "x86_64"  # stores are seen in order without a barrier, and loads made in order
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Word:
    """A word at an offset of a memory that is mapped shared, which the word keeps mapped."""

    def __init__(self, memory: memoryview, offset: int) -> None:
        if _SYSCALL is None or sys.byteorder != "little" or os.name != "posix":
            raise Unsupported(f"armed steps on a CPU need Linux on x86-64, ARM64 or RISC-V, not {_MACHINE}")
        self._word = ctypes.c_uint32.from_buffer(memory, offset)

    def load(self) -> int:
        """Read the word. What was written before its value was rung is then seen."""
        value = self._word.value
        if not _ORDERED:
            self._futex(_WAKE, 0)  # the kernel's barrier
        return value

    def store(self, value: int) -> None:
        """Write the word, behind all that was written before, and wake nobody."""
        if not _ORDERED:
            self._futex(_WAKE, 0)
        self._word.value = value

    def ring(self, value: int) -> None:
        """Write the word, behind all that was written before, and wake who waits for it."""
        self.store(value)
        self.wake()

    def wake(self) -> None:
        """Make all waiters look."""
        self._futex(_WAKE, _ALL)

    def stop(self) -> None:
        """Make a waiter look whose ``stopped`` has just become true. It need not be there any more."""
        self.wake()
        for delay in (0.001, 0.02):  # it may have looked just before, and be about to sleep
            timer = threading.Timer(delay, self.wake)
            timer.daemon = True
            timer.start()

    def wait(self, value: int, timeout: float, stopped: Callable[[], bool]) -> bool:
        """Wait until the word is ``value``; False if the time passed or, at a look, ``stopped`` said so."""
        for _ in range(_SPINS):
            if self.load() == value:
                return True
        deadline = time.monotonic() + timeout
        while True:
            now = self.load()
            if now == value:
                return True
            left = deadline - time.monotonic()
            if left <= 0 or stopped():
                return False
            seconds = min(left, _SLICE)
            pause = _Timespec(int(seconds), int(seconds % 1 * 1e9))
            self._futex(_WAIT, now, ctypes.byref(pause))  # however it returns, the next look tells

    def _futex(self, operation: int, value: int, timeout: object = None) -> None:
        _libc.syscall(
            ctypes.c_long(_SYSCALL or 0),
            ctypes.byref(self._word),
            ctypes.c_int(operation),
            ctypes.c_uint32(value),
            timeout,
            None,
            ctypes.c_int(0),
        )
