"""Adam's moments dealt out to processes, each row in one of them, and how rows get to where they are read.

Slots are numbered from 1 in the order in which their rows were first touched, and every process knows that order. Slot
s is kept by process (s − 1) mod G, as its row 1 + (s − 1) // G; row 0 is a row of zeros in each. So no process has more
than one row more than another, whichever rows of the vocabulary a run touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capo_rl.curvature.last_layer import blocks, tile_rows
from capo_rl.curvature.processes import Processes


@dataclass(frozen=True)
class Shard:
    """The part of the stored rows that process `number` of `count` keeps; `fetched` and `whole` are collective."""

    processes: Processes
    number: int
    count: int

    @classmethod
    def of(cls, processes: Processes | None) -> Shard | None:
        """This process's part; None where there is nobody to share with."""
        if processes is None or processes.count == 1:
            return None
        return cls(processes, processes.number, processes.count)

    def held(self, slots: int) -> int:
        """How many rows of 1 + `slots` this process keeps, that of zeros among them.

        >>> [Shard(Processes(), number, 3).held(4) for number in range(3)]
        [3, 2, 2]
        """
        return 1 + len(range(self.number, slots, self.count))

    def places(self, slots: Int[Tensor, "*slots"]) -> Int[Tensor, "*slots"]:
        """Where this process keeps the slots, of 1 and more; -1 for those of others.

        >>> Shard(Processes(), 1, 3).places(torch.tensor([1, 2, 3, 4, 5]))
        tensor([-1,  1, -1, -1,  2])
        """
        before = slots - 1
        return (before // self.count + 1).where(before % self.count == self.number, -1)

    def fetched(
        self, p: Float[Tensor, "held d"], q: Float[Tensor, "held d"], wanted: Int[Tensor, "rows"], alike: bool
    ) -> tuple[Float[Tensor, "rows+1 d"], Float[Tensor, "rows+1 d"]]:
        """P and Q at the slots `wanted`, ascending, behind a row of zeros.

        What any process wants goes through all, a tile at a time; `alike`: all want the same, and need not ask.
        """
        here = [moment.new_zeros(len(wanted) + 1, moment.shape[1]) for moment in (p, q)]
        union = wanted if alike else self.processes.union(wanted)
        at = torch.searchsorted(wanted, union)
        at = (at + 1).where(torch.isin(union, wanted), 0)
        for some in blocks(len(union), tile_rows(2 * p.shape[1], p.device)):
            own = at[some] > 0
            for moment, came in zip(here, self._gathered(p, q, union[some]).unbind(1), strict=True):
                moment[at[some][own]] = came[own]
        return here[0], here[1]

    def whole(
        self, p: Float[Tensor, "held d"], q: Float[Tensor, "held d"], slots: int, here: bool
    ) -> tuple[Float[Tensor, "slots d"], Float[Tensor, "slots d"]]:
        """P and Q of all slots in their order, on the CPU; none where they are not wanted `here`."""
        p_all, q_all = (torch.empty(slots if here else 0, p.shape[1], dtype=p.dtype) for _ in (p, q))
        for some in blocks(slots, tile_rows(2 * p.shape[1], p.device)):
            came = self._gathered(p, q, torch.arange(some.start + 1, some.stop + 1, device=p.device))
            if here:
                p_all[some], q_all[some] = came.cpu().unbind(1)
        return p_all, q_all

    def _gathered(self, p: Tensor, q: Tensor, slots: Tensor) -> Float[Tensor, "slots 2 d"]:
        """P and Q at some slots, the same in all processes, each of which hands in those that it keeps."""
        own = self.places(slots)
        own = own[own > 0]
        came = self.processes.gather(torch.stack([p[own], q[own]], dim=1))
        by_process = ((slots - 1) % self.count).argsort(stable=True)
        return torch.empty_like(came).index_copy_(0, by_process, came)
