"""PyTorch: a step of SGD of a linear classifier over many classes, and of a small network on small batches."""

from .case import FASTCE, Case

NAME = "PyTorch"
PACKAGES = ("torch",)
BUILT_IN = "F.cross_entropy"
# Rows, features, classes. A step multiplies matrices of 6 rows x features x classes operations, which no loss changes.
LINEAR = ((512, 64, 32000), (512, 256, 32000), (4096, 64, 1000), (32, 64, 10))
QUICK_LINEAR = ((16, 8, 300), (32, 64, 10))


def cases(quick, threads):
    import torch

    torch.set_num_threads(threads)
    for rows, features, classes in QUICK_LINEAR if quick else LINEAR:
        aims = {BUILT_IN: 1.5} if classes == 32000 and features == 64 else {}
        yield Case(
            f"SGD step, {rows} rows of {features} features, {classes:,} classes",
            {name: step(loss, rows, features, classes) for name, loss in losses().items()},
            relative=1e-4,
            aims=aims,
        )


def losses():
    import torch

    from fastce.integrations.torch import cross_entropy

    return {BUILT_IN: torch.nn.functional.cross_entropy, FASTCE: cross_entropy}


def step(loss, rows, features, classes):
    """Return a function that does one step; the learning rate of 0 lets each repeat the same one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    model = torch.nn.Linear(features, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run():
        optimizer.zero_grad()
        value = loss(model(x), target)
        value.backward()
        optimizer.step()
        return value.item(), model.bias.grad.numpy()

    return run
