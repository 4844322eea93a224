"""Processes that need not import torch and TRL again: each is forked off one that has imported them and done no more.

What is tested in them comes after the imports. The imports, and a command as a shell starts it, are tested in
interpreters of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path

METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(
    ["capo_rl.cli", "capo_rl.trainers.train", "capo_rl.testbed.held_out", "peft", "matplotlib.figure"]
)


class Process:
    """`python COMMAND`, of a module (`-m`, NAME, ...) or a script; what it has of `subprocess.Popen` is the same."""

    def __init__(self, command: list[str], cwd: Path | None = None, env: Mapping[str, str] = os.environ) -> None:
        self._folder = tempfile.mkdtemp()
        self._said: list[str] = []
        self._outputs = [Path(self._folder, name) for name in ("stdout", "stderr")]
        self._process = CONTEXT.Process(target=_become, args=(command, cwd or Path.cwd(), dict(env), self._outputs))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.sentinel = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the one that forked it knows already
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote on stdout and on stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a warm process", timeout or 0.0)
        if not self._said:
            self._said = [path.read_text() if path.exists() else "" for path in self._outputs]
            shutil.rmtree(self._folder)
        out, err = self._said
        return out, err


def run(command: list[str], cwd: Path | None = None, env: Mapping[str, str] = os.environ):
    """As `subprocess.run` with its output captured as text."""
    process = Process(command, cwd, env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(processes: int, command: list[str], env: Mapping[str, str] = os.environ) -> list[Process]:
    """The processes that torchrun would start on one machine; nothing watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = ({**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes))
    return [Process(command, env={**env, **{name: str(value) for name, value in place.items()}}) for place in places]


def launch(processes: int, command: list[str]) -> None:
    """`start`, and wait for all: the first that fails ends the others, and is an error here."""
    left = {each.sentinel: each for each in start(processes, command)}
    while left:
        for sentinel in connection.wait(left):
            errors = (ended := left.pop(sentinel)).communicate()[1]
            if ended.returncode:
                for other in left.values():
                    other.send_signal(signal.SIGKILL)
                raise AssertionError(errors[-3000:])


def _become(command: list[str], cwd: Path, env: dict[str, str], outputs: list[Path]) -> None:
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    gc.freeze()  # as in conftest.py
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
