"""Whether the losses of a loop are finite, and which step's was the first that is not."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor, nn

from dau_fast.engine.batches import Batch
from dau_fast.engine.ranks import Ranks
from dau_fast.errors import Diverged

# A device is asked every so many steps, and its answer read when it is asked again, when it has long come.
# Several processes wait for one another where they ask, so they do it less often.
_ASKED, ASKED_TOGETHER = 8, 64
# Images of a batch that a message names.
_NAMED = 3


class BrokenLoss(Diverged):
    """The loss of a training step is NaN or infinite."""


class Losses:
    """Those of one loop, whose steps are numbered from 1.

    at_once: a CPU alone refuses such a loss before anything is changed by it. Elsewhere the step itself
    counts how many were sound, on the device, and nothing waits for it.
    """

    def __init__(self, device: torch.device, ranks: Ranks, *, at_once: bool = False) -> None:
        self.device, self.ranks = device, ranks
        self.at_once = at_once and ranks.alone and device.type == "cpu"
        self._tainted = torch.zeros((), device=device)  # NaN from the first one on
        self._sound = torch.zeros((), dtype=torch.int64, device=device)
        self._asked: tuple[int, Tensor, torch.cuda.Event] | None = None
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=2 * _ASKED)

    def note(self, loss: Tensor) -> None:
        """Take the loss [] of a part of a batch. Raises BrokenLoss at once, where that is to be."""
        if self.at_once:
            if not math.isfinite(loss.item()):
                raise BrokenLoss("a loss is NaN or infinite")
            return
        self._tainted.add_(loss.detach(), alpha=0)

    def end_step(self) -> None:
        """All parts of a batch are noted."""
        if not self.at_once:
            self._sound.add_(self._tainted == 0)

    def reset(self) -> None:
        """What was noted so far was a rehearsal."""
        self._tainted.zero_()
        self._sound.zero_()

    def keep(self, step: int, batch: Batch) -> None:
        """`step` is about to take `batch`."""
        self._recent.append((step, batch.indices))

    def find_broken(self, steps: int, *, last: bool) -> int | None:
        """The first broken step of `steps`, as far as it is known by now; after the `last`, for sure."""
        if self.at_once:
            return None
        if not self.ranks.alone:
            if not last and steps % ASKED_TOGETHER:
                return None
            every = self.ranks.gather(self._sound[None], [1] * self.ranks.count)
            return _compare(steps, int(every.min()))
        if last or self.device.type != "cuda":
            return _compare(steps, int(self._sound))
        return self._ask(steps) if steps % _ASKED == 0 else None

    def _ask(self, steps: int) -> int | None:
        """Have the device tell how many steps were sound, and read what it told the time before."""
        sound = self._sound.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream(self.device).record_event()
        before, self._asked = self._asked, (steps, sound, event)
        if before is None:
            return None
        before[2].synchronize()
        return _compare(before[0], int(before[1]))

    def require_sound(self, loop: str, steps: int) -> None:
        """BrokenLoss where one of the `steps` of `loop`, which are over, was not."""
        broken = self.find_broken(steps, last=True)
        if broken is not None:
            raise BrokenLoss(describe_loss(loop, broken, steps))

    def describe_batch(self, step: int) -> str:
        """The images that the batch of `step` begins with, in words; nothing where it is too long ago."""
        index = dict(self._recent).get(step)
        return "" if index is None or not self.ranks.alone else f" (a batch of {name_images(index)})"


def describe_loss(loop: str, step: int, steps: int) -> str:
    """What is wrong with the loss of a step, in words."""
    return f"the loss of {loop} is NaN or infinite in step {step} of {steps}"


def _compare(steps: int, sound: int) -> int | None:
    return None if sound == steps else sound + 1


def name_images(index: Tensor) -> str:
    """The images `index` [B] in words."""
    named = ", ".join(map(str, index[:_NAMED].tolist()))
    more = f" and {len(index) - _NAMED} more" if len(index) > _NAMED else ""
    return f"image{'s' if len(index) > 1 else ''} {named}{more}"


@torch.no_grad()
def find_broken_layer(model: nn.Module, images: Tensor) -> tuple[str, list[int]] | None:
    """What gives NaN or infinity for `images` [B, ...] before anything else does, in words, and for which.

    A layer is named as in the model's `network`. The model is called once, in the mode it is in. None where
    all that it gives is finite.
    """
    if rows := _broken_rows(images, len(images)):
        return "the image itself", rows
    broken: list[tuple[str, list[int]]] = []
    hooks = []
    for path, layer in model.named_modules():
        name = path.removeprefix("network").removeprefix(".")
        words = f"layer '{name}'" if name else "its outputs"

        def note(_module: nn.Module, _inputs: object, output: object, words: str = words) -> None:
            if isinstance(output, Tensor) and (rows := _broken_rows(output, len(images))):
                broken.append((words, rows))

        hooks.append(layer.register_forward_hook(note))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(broken), None)


def _broken_rows(values: Tensor, count: int) -> list[int]:
    """Rows of `values` that hold NaN or infinity; all `count` where it has other rows than images."""
    if not values.is_floating_point() or bool(values.isfinite().all()):
        return []
    if not values.ndim or len(values) != count:
        return list(range(count))
    rows: list[int] = values.reshape(count, -1).isfinite().all(1).logical_not().nonzero().flatten().tolist()
    return rows
