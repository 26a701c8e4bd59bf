"""Train a linear classifier over thousands of classes with PyTorch, with its own cross-entropy and with fastce's.

Usage: python examples/torch_linear.py [--quick] [--seed S]
Needs: pip install ".[torch]" (the data are made up; nothing is downloaded)

Every class has a point in space, and the samples of a class lie around it. One line tells the two trainings apart.
"""

import argparse
import math
from time import perf_counter

import torch

from fastce.integrations.torch import replace_cross_entropy

FEATURES = 64
ROWS = 512
LEARNING_RATE = 100.0


class Classifier(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = torch.nn.Linear(FEATURES, classes)
        self.criterion = torch.nn.CrossEntropyLoss()

    def forward(self, x, target):
        return self.criterion(self.linear(x), target)


def train(name, model, points, steps, seed):
    """Train the model in place; return its losses and the seconds of a step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses, seconds = [], []
    for _ in range(steps):
        target = torch.randint(0, len(points), (ROWS,), generator=generator)
        x = points[target] + 0.3 * torch.randn(ROWS, FEATURES, generator=generator)
        begin = perf_counter()
        optimizer.zero_grad()
        loss = model(x, target)
        loss.backward()
        optimizer.step()
        seconds.append(perf_counter() - begin)
        losses.append(loss.item())
    step = sorted(seconds)[len(seconds) // 2]
    print(f"{name:8s} loss {losses[0]:.4f} -> {losses[-1]:.4f} nats, {1e3 * step:.1f} ms a step")
    return losses, step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the classes and of the steps")
    parser.add_argument("--seed", type=int, default=0, help="of the points, the classifier and the samples")
    arguments = parser.parse_args()
    classes, steps = (3200, 20) if arguments.quick else (32000, 200)

    torch.manual_seed(arguments.seed)
    points = torch.randn(classes, FEATURES)
    print(f"No knowledge: log {classes:,} = {math.log(classes):.4f} nats.")
    trainings = {}
    for name in ("PyTorch", "fastce"):
        torch.manual_seed(arguments.seed)
        model = Classifier(classes)
        if name == "fastce":
            replace_cross_entropy(model)
        trainings[name] = train(name, model, points, steps, arguments.seed)

    (losses, step), (fast_losses, fast_step) = trainings.values()
    apart = max(abs(one - other) for one, other in zip(losses, fast_losses, strict=True))
    print(f"A whole step takes {step / fast_step:.1f} times as long with PyTorch's own loss; ", end="")
    print(f"the losses of the two trainings are at most {apart:.0e} nats apart.")


if __name__ == "__main__":
    main()
