"""A machine that has other things to do: processes that spin while something else is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

# It looks for its parent every few milliseconds, so that it ends even where the parent was killed outright.
_SPIN = """
import os, sys
os.sched_setaffinity(0, [int(sys.argv[1])])
print(flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range(100_000):
        pass
"""


@contextmanager
def spinning(processors: Sequence[int]) -> Iterator[list[int]]:
    """One spinning process bound to each of the processors; gives their ids. None is left at the end."""
    with ExitStack() as stack:
        spinners = []
        for processor in processors:
            spinner = subprocess.Popen([sys.executable, "-S", "-E", "-c", _SPIN, str(processor), str(os.getpid())],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            stack.callback(_end, spinner)
            spinners.append(spinner)
        for spinner in spinners:
            if not spinner.stdout.readline():
                raise RuntimeError("a process that should keep a processor busy did not start")
        yield [spinner.pid for spinner in spinners]


def _end(spinner: subprocess.Popen) -> None:
    spinner.kill()
    spinner.wait()
    spinner.stdout.close()
