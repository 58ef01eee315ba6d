"""What a rank has not sent yet: the loss of coding one message, added to the next one (error feedback).

Seide et al. 2014 (1-bit SGD), Karimireddy et al., arXiv 1901.09847. Of n numbers put in, sums sent + residuals = sums put
in, over any number of steps; a step that is not taken leaves the residual as it was.
"""

import torch
from torch import Tensor


class Residual:
    """The (n,) numbers that one rank carries over from step to step at one hop; none before the first step."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._next: Tensor | None = None
        self._arriving: list[Tensor] = []

    def plus(self, part_n: Tensor) -> Tensor:
        """`part_n` with what earlier steps did not send; a new tensor."""
        return part_n.clone() if self.value is None else part_n + self.value

    def leave(self, lost_n: Tensor) -> None:
        """This step did not send `lost_n`; it counts once the step is applied."""
        self._next = lost_n

    def applied(self) -> None:
        """The step was taken."""
        if self._next is not None:
            self.value = self._next
        self.dropped()

    def dropped(self) -> None:
        """The step is not taken."""
        self._next = None

    def arriving(self, n: int, device: torch.device) -> Tensor:
        """(n,) zeros to be filled with a saved residual. Of several their sum is carried on, from `arrived` on."""
        self._arriving.append(torch.zeros(n, device=device))
        return self._arriving[-1]

    def arrived(self) -> None:
        """The tensors of `arriving` are filled."""
        if self._arriving:
            self.value = sum(self._arriving[1:], start=self._arriving[0])
        self._arriving = []
