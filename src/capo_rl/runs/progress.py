"""How far a command is: a line that is drawn again on a terminal, and a plain line every tenth in a log."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm


class Progress:
    """`done` of `total` so far; with `shown=False` nothing is written."""

    def __init__(self, total: int, name: str, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self._total, self._name, self._unit, self._done = total, name, unit, done
        self._shown = shown
        self._start = time.perf_counter()
        terminal = shown and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True, file=sys.stderr)
            if terminal
            else None
        )

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` are done, and what is worth a note."""
        before, self._done = self._done, done
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - before)
        elif self._shown and 10 * done // self._total > 10 * before // self._total:
            seconds = time.perf_counter() - self._start
            parts = [f"{self._name}: {self._unit} {done:,} of {self._total:,}", f"{seconds:.0f} s", note]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line; a second time does nothing."""
        if self._bar is not None:
            self._bar.close()
