"""What the last-layer model is worth in nats: the KL that updates really have, over the shift it predicts for them."""

from __future__ import annotations

import math


class Ratio:
    """Measured over predicted, a regression of log KL on log shift with slope one that forgets: the moving mean of
    log(measured / predicted), weight 0.8 on what was known before.

    `value` is 1 until something was measured: the model at its word.

    >>> ratio = Ratio()
    >>> ratio.update(measured=2e-3, predicted=1e-5)
    >>> ratio.update(measured=8e-3, predicted=1e-5)
    >>> round(ratio.value, 1)
    263.9
    """

    def __init__(self) -> None:
        self._log: float | None = None

    @property
    def value(self) -> float:
        return 1.0 if self._log is None else math.exp(self._log)

    def update(self, measured: float, predicted: float) -> None:
        """Learn from one update, both in nats a token; where either is zero or not finite there is nothing to learn."""
        if 0 < measured < math.inf and 0 < predicted < math.inf:
            new = math.log(measured / predicted)
            self._log = new if self._log is None else 0.8 * self._log + 0.2 * new

    def state_dict(self) -> dict[str, float]:
        return {} if self._log is None else {"log": self._log}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._log = state.get("log")
