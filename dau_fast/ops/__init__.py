"""Operations that any PyTorch project can use; nothing here imports the rest of the package."""

from dau_fast.ops.barlow_twins import barlow_twins_loss
from dau_fast.ops.batch_norm import batch_norm
from dau_fast.ops.image_batch import image_batch
from dau_fast.ops.linear_sensitivity import linear_sensitivity
from dau_fast.ops.packed_masks import apply_masks_, count_kept, pack_mask, unpack_mask
from dau_fast.ops.per_sample_grad_norms import input_grad_norms, per_sample_grad_norms, register_layer
from dau_fast.ops.selection import mask_smallest
from dau_fast.ops.sensitivity import attack_features, sensitivity

__all__ = [
    "apply_masks_",
    "attack_features",
    "barlow_twins_loss",
    "batch_norm",
    "count_kept",
    "image_batch",
    "input_grad_norms",
    "linear_sensitivity",
    "mask_smallest",
    "pack_mask",
    "per_sample_grad_norms",
    "register_layer",
    "sensitivity",
    "unpack_mask",
]
