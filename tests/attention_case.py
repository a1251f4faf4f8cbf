"""What the cases of both attention tests share: random inputs and document starts."""

from typing import ClassVar

import torch
from torch import Tensor

BATCH = 2
HEADS = {"single": (1, 1), "multi-query": (3, 1), "grouped": (4, 2), "multi-head": (3, 3)}


class AttentionCase:
    """To be mixed into a frozen dataclass of the fields named here."""

    d_k: ClassVar[int]
    d_v: ClassVar[int]
    heads: str
    window: int
    n_token: int
    document_starts: tuple[int, ...]
    seed: int

    def tensors(self) -> dict[str, Tensor]:
        torch.manual_seed(self.seed)
        (n_head, groups), n_token = HEADS[self.heads], self.n_token
        shapes = dict(
            q=(BATCH, n_head, n_token, self.d_k), k=(BATCH, groups, n_token, self.d_k),
            v=(BATCH, groups, n_token, self.d_v), u=(n_head, self.d_k), w=(n_head, self.d_k),
            rows=(n_head, self.window + 1, self.d_k),
        )  # fmt: skip
        made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        return {name: x.requires_grad_() for name, x in made.items()}

    def starts(self) -> Tensor:
        """Document starts; the second row has its own, so that rows can't be confused."""
        starts = torch.zeros(BATCH, self.n_token, dtype=torch.bool)
        for t in self.document_starts:
            if t < self.n_token:
                starts[0, t] = True
                starts[1, (t * 3 + 1) % self.n_token] = True
        return starts
