"""What tests of whole runs share: the settings of a run of seconds, and processes that SIGKILL ends."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SMOKE = [
    "debug=smoke",
    "trainer.precision=32-true",
    "data=files",
    "data.tokenizer=bytes",
    "model.dim=16",
    "model.attention.head_dim=4",
]

BPE = ("data.tokenizer=bpe", "data.vocab_size=300")

DIES = """
import os, pkgutil, runpy, signal, sys
owner, name, left, script, *arguments = sys.argv[1:]
owner, left = pkgutil.resolve_name(owner), int(left)
whole = getattr(owner, name)
def dies(*given, **named):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given, **named)
setattr(owner, name, dies)
sys.argv[:] = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def kill_in_call(owner: str, name: str, calls: int, command: list[str], cwd: Path) -> None:
    """Run a script in a process that SIGKILL ends when `owner`.`name` was called `calls` times and is called again.

    No clock decides when it dies, so that it is at the same place on a machine of any speed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, "-c", DIES, owner, name, str(calls), *command]
    done = subprocess.run(driver, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, f"it was over before it could be killed: {done.stdout}{done.stderr}"


HOLDS = """
import pathlib, sys
from moesaic.files import lock
with lock(pathlib.Path(sys.argv[1]), "busy"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Another process has the lock of a directory within, and is killed at the end."""
    command = [sys.executable, "-c", HOLDS, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
        process.kill()
