"""Your own network forgets 50 of its training images, all it knew of the digit 3: some seconds on a CPU.

python examples/own_model.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.api import unlearn


class Net(nn.Module):
    """Any network will do that maps images to logits and ends in a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.norm(self.convolution(images))), 2).flatten(1))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 15) -> None:
    """Plain training, as you may have done it elsewhere."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits)
order = torch.randperm(len(images))
three = labels[order] == 3
forget = order[three][:50]
retain, validation, test = order[~three][:1600].split([800, 300, 500])

model, trained_on = Net(), torch.cat([forget, retain])
train(model, images[trained_on], labels[trained_on])

sets = {"forget": forget, "retain": retain, "validation": validation, "test": test}
result = unlearn(model, **{name: (images[index], labels[index]) for name, index in sets.items()})

print("          error on forget   accuracy on retain   on test   MIA-efficacy")
for when, m in (("before", result.before), ("after", result.after)):
    print(f"{when:10}{m.ua:13.1f} %{m.ra:19.1f} %{m.ta:8.1f} %{m.mia_efficacy:13.1f} %")
print(f"unlearned in {result.seconds:.1f} s; result.model holds the network that forgot")
