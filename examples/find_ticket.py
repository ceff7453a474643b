"""A ticket of an autoencoder: two losses, two optimizers, gradient clipping, a schedule. Nothing here is a classifier.

python examples/find_ticket.py
"""

import torch
from torch import nn

from lth import data, find_ticket

images = data.load("mnist5k")
train, validation = images.train.x.flatten(1), images.validation.x.flatten(1)


def autoencoder() -> nn.Module:
    """Any model. It is made anew for every training, under a seed of the search's."""
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32))
    decoder = nn.Sequential(nn.ReLU(), nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784))
    return nn.Sequential(encoder, decoder)


def step(model: nn.Module, batch: tuple[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leaves gradients in `.grad`; the search checks the losses, then steps the optimizers and clears the gradients."""
    (x,) = batch
    code = model[0](x)
    losses = {"reconstruction": nn.functional.mse_loss(model[1](code), x), "code": 1e-4 * code.abs().mean()}
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return losses


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Takes `parameters()`: a sparse layer holds packed `values` in the place of `weight`."""
    encoder, decoder = model
    return [
        torch.optim.Adam(encoder.parameters(), lr=1e-3, fused=True),
        torch.optim.SGD(decoder.parameters(), lr=0.5, momentum=0.9, fused=True),
    ]


def schedulers(made: list[torch.optim.Optimizer]) -> list[torch.optim.lr_scheduler.LRScheduler]:
    return [torch.optim.lr_scheduler.LinearLR(made[1], start_factor=0.1, total_iters=50)]


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"val_loss": nn.functional.mse_loss(model(validation), validation).item()}


def main(iterations: int = 600, rounds: int = 5) -> None:
    tickets = find_ticket(
        autoencoder, train, step, optimizers,
        scheduler=schedulers, evaluate=evaluate, batch_size=60,
        iterations=iterations, rounds=rounds, rate=0.4,
        example=lambda batch: batch[0],
    )  # fmt: skip
    for ticket in tickets:
        found = ticket.result
        print(f"{found['density']:7.2%} remain: validation loss {found['early_stop']['val_loss']:.4f}")

    model = tickets[-1].plant(autoencoder())  # the sparsest: rewound, masked, sparse where that is faster
    print(model)


if __name__ == "__main__":
    main()
