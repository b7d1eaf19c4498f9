"""Losses as modules, for projects that build their models from them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from dau_fast.ops import barlow_twins_loss


class BarlowTwinsLoss(nn.Module):
    """The Barlow Twins loss of two views [N, D], a scalar; see `dau_fast.ops.barlow_twins_loss`.

    lambda_param: weight of the off-diagonal terms. gather_distributed: the loss of the rows of all
    ranks of the default process group, if there is one, and not of this rank's alone. scale: factor
    in front (solo-learn uses 0.025). eps, precision: as in the function.
    Raises ValueError for gather_distributed where PyTorch was built without torch.distributed.
    """

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        *,
        scale: float = 1.0,
        eps: float = 1e-5,
        precision: str = "tf32x3",
    ) -> None:
        super().__init__()
        if gather_distributed and not dist.is_available():
            raise ValueError(
                "gather_distributed needs torch.distributed, which this PyTorch was built without: "
                "leave it out, or install another build"
            )
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed
        self.scale = scale
        self.eps = eps
        self.precision = precision

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group = dist.group.WORLD if self.gather_distributed and dist.is_initialized() else None
        loss = barlow_twins_loss(z_a, z_b, self.lambda_param, self.eps, group, self.precision)
        return loss if self.scale == 1 else self.scale * loss

    def extra_repr(self) -> str:
        shown = f"lambda_param={self.lambda_param}, gather_distributed={self.gather_distributed}"
        return shown if self.scale == 1 else f"{shown}, scale={self.scale}"
