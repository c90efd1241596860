"""The attentive probe: a learned query gathers the patches, a linear map tells the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentiveHead(nn.Module):
    """Cross-attention of one learned query to a picture's tokens, then a linear classifier.

    Shapes: tokens [B, N, D] -> logits [B, classes]. Source: Chen et al. 2022 (arXiv 2202.03026), attentive probing.
    """

    def __init__(self, width: int, classes: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.out_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tell the classes of pictures."""
        batch, count, width = tokens.shape
        kv = self.kv(self.norm(tokens)).view(batch, count, 2, self.num_heads, -1)
        key, value = kv.permute(2, 0, 3, 1, 4)
        query = self.query.expand(batch, -1, -1).view(batch, 1, self.num_heads, -1).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, width)
        return self.head(self.out_norm(self.proj(pooled)))


class AttentiveHeads:
    """K attentive heads trained at once by AdamW on the same batches, each with its own learning rate and decay.

    Learning rates rise for a tenth of the steps and fall to 0 along a cosine.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        num_heads: int,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        device: torch.device,
        seed: int = 0,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = [AttentiveHead(width, classes, num_heads).to(device) for _ in lr]
        groups = [
            {"params": list(head.parameters()), "lr": rate, "weight_decay": decay, "peak": rate}
            for head, rate, decay in zip(self.heads, lr, weight_decay, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups)

    def fit(
        self, batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]], epochs: int, steps_an_epoch: int
    ) -> AttentiveHeads:
        """`batches(epoch)` gives batches of tokens [B, N, D] and labels int64 [B], `steps_an_epoch` of them."""
        step, total = 0, epochs * steps_an_epoch
        for epoch in range(epochs):
            for x, y in batches(epoch):
                part = min(1.0, 10 * (step + 1) / total) * (0.5 + 0.5 * math.cos(math.pi * step / total))
                for group in self.optimizer.param_groups:
                    group["lr"] = part * group["peak"]
                with torch.enable_grad():
                    loss = torch.stack([F.cross_entropy(head(x), y) for head in self.heads]).sum()
                    loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                step += 1
        return self

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Shapes: [B, N, D] -> int64 [K, B]."""
        return torch.stack([head(tokens).argmax(dim=1) for head in self.heads])
