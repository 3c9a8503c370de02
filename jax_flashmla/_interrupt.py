"""Ctrl-C in the command `jax-flashmla`: one line and exit status 130, at any moment.

Python would raise KeyboardInterrupt in the main thread: wherever it is, a traceback of JAX's or
XLA's; not before a compilation in C++ has ended; and threads of XLA that still run at exit may
crash. So the command, before it imports JAX, blocks SIGINT in all threads that there will be and
waits for it in one of its own, which ends the process without further ado.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

STATUS = 130  # exit status of a command that Ctrl-C ended, as shells have it
MODULE = "jax_flashmla.cli"

_watching = False
_keeps = False  # whether the main thread wants the next Ctrl-C as a KeyboardInterrupt


def is_command() -> bool:
    """Whether this process is `jax-flashmla` or `python -m jax_flashmla.cli`."""
    name = sys.argv[0] if sys.argv else ""
    # Python sets argv[0] to "-m" until it has found the module, whose package it imports first.
    return os.path.basename(name) == "jax-flashmla" or (name == "-m" and MODULE in sys.orig_argv)


def watch() -> None:
    """From now on Ctrl-C ends the process. To be called while there are no other threads.

    Where SIGINT is ignored, as in a shell script's background jobs, it stays so.
    """
    global _watching
    if _watching or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    _watching = True
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_wait, name="ctrl-c", daemon=True).start()


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """In it the first Ctrl-C raises KeyboardInterrupt, once the main thread is back in Python.

    The second one ends the process.
    """
    global _keeps
    _keeps = True
    try:
        yield
    finally:
        _keeps = False


def leave(status: int = STATUS) -> None:
    """Ends the process where `watch` was called; threads of XLA may still be running."""
    if _watching:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _wait() -> None:
    global _keeps
    while True:
        signal.sigwait({signal.SIGINT})
        if not _keeps:
            _say("interrupted")
            os._exit(STATUS)
        _keeps = False
        _say("interrupted: keeping what was measured; Ctrl-C again stops at once")
        _thread.interrupt_main()


def _say(line: str) -> None:
    """Straight to the terminal: the main thread may hold the locks of Python's streams."""
    # On a terminal a progress bar may have hidden the cursor and begun a line.
    line = f"\r\x1b[K\x1b[?25h{line}\n" if os.isatty(2) else f"{line}\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


if is_command():
    watch()
