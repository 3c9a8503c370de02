"""Ctrl-C: one line and exit status 130, at any moment."""

from __future__ import annotations

import os
import signal
import threading


def exit_on_ctrl_c(name: str) -> None:
    """Ends the process on Ctrl-C. To be called before JAX is imported and starts threads.

    Blocks SIGINT in all threads but one that waits for it: the main thread would not hear of it
    while XLA compiles, and would then raise KeyboardInterrupt wherever it is. Where SIGINT is
    ignored, it stays so.
    """

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        os.write(2, f"\n{name}: interrupted\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=wait, daemon=True).start()
