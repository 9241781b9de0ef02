"""Softmax regression on one site's digits: a local training script and the lines that make it a federated client.

It reports the accuracy of the global model it received, on the shared test rows, and trains from there: in plain numpy, or
with torch where the recipe's algorithm has a helper for torch (FedProx, SCAFFOLD).
The batch order follows from (seed, site, round) alone, so a run can be repeated on any number of threads.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from split import NUM_CLASSES, Digits, load_train_and_test, split_rows

import fedpool.client as flare


def train(
    weight: np.ndarray, data: Digits, *, epochs: int, batch_size: int, lr: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the (10, 65) weight after `epochs` of SGD on the mean cross-entropy; `weight` is left as it was.

    The gradient is written out: at this size autograd would cost more than the arithmetic. Rows are shuffled every
    epoch, and the last batch is what remains.
    """
    weight = weight.copy()
    targets = np.eye(NUM_CLASSES, dtype=weight.dtype)
    for x, labels in batches(data, epochs, batch_size, rng):
        logits = x @ weight.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = odds / odds.sum(axis=1, keepdims=True) - targets[labels]
        weight -= lr / len(x) * (error.T @ x)
    return weight


def batches(
    data: Digits, epochs: int, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the features and labels of each batch of each epoch."""
    for _ in range(epochs):
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield data.features[chosen], data.labels[chosen]


def train_with_torch(
    weight: np.ndarray, data: Digits, *, epochs: int, batch_size: int, lr: float, rng: np.random.Generator
) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Return the trained weight, and what goes beside it: the same steps as `train`, with what the recipe asks for."""
    model = torch.nn.Linear(weight.shape[1], NUM_CLASSES, bias=False)
    received = {"weight": torch.tensor(weight)}
    model.load_state_dict(received)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    mu = flare.get_config().get("fedprox_mu")
    control = flare.Scaffold(model, optimizer) if mu is None else None
    for x, labels in batches(data, epochs, batch_size, rng):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(labels))
        if mu is not None:
            loss = loss + flare.prox_loss(model, received, mu)
        loss.backward()
        optimizer.step()
    return model.weight.detach().numpy(), control.extras() if control else {}


def accuracy(weight: np.ndarray, data: Digits) -> float:
    """Return the share of rows whose label is the model's first choice."""
    return float(((data.features @ weight.T).argmax(axis=1) == data.labels).mean())


def main() -> None:
    """Train for as long as the job lasts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpha", type=float, default=1.0, help="Dirichlet parameter of the label split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the batch order")
    parser.add_argument("--sites", type=int, default=10, help="number of sites, named site-1 to site-N")
    parser.add_argument("--epochs", type=int, default=5, help="local epochs a round")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--hostile", type=int, default=0, help="so many sites, the first ones, send their update times -10"
    )
    parser.add_argument(
        "--torch", action="store_true", help="train with torch, for the recipes that have helpers for it"
    )
    args = parser.parse_args()

    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    train_data, test_data = load_train_and_test()
    rows = split_rows(train_data.labels, alpha=args.alpha, num_sites=args.sites, seed=args.seed)[site]
    data = train_data.rows(rows)

    while flare.is_running():
        input_model = flare.receive()
        weight = np.asarray(input_model.params["weight"])
        metrics = {"accuracy": accuracy(weight, test_data)}
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        rng = np.random.default_rng([args.seed, site, input_model.current_round])
        work = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "rng": rng}
        trained, extras = train_with_torch(weight, data, **work) if args.torch else (train(weight, data, **work), {})
        if site < args.hostile:
            trained = weight - 10 * (trained - weight)
        meta = {"NUM_STEPS_CURRENT_ROUND": len(rows)}  # the weight of this update in the mean: its rows
        flare.send(flare.FLModel(params={"weight": trained}, metrics=metrics, meta=meta, extras=extras))


if __name__ == "__main__":
    main()
