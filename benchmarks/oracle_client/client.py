"""Softmax regression on one site's digits: a local training script plus the lines that make it a
federated client.

It reports the accuracy of the received global model on the shared test rows, and trains from there:
in plain numpy, or with torch for the algorithms that have a helper for torch (FedProx, SCAFFOLD).
The batch order is the oracle's: one generator for the whole job draws a permutation of a site's
rows for each epoch, round after round and site after site. A site skips the permutations of the
other sites, so its model is the oracle's, weight for weight.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from split import NUM_CLASSES, NUM_FEATURES, Digits, load_train_and_test, split_rows

import fedpool.client as flare


class Orders:
    """The oracle's permutations for the whole job: one for each epoch of each site, turn after
    turn.

    Args:
        seed: of the oracle's run.
        sizes: rows of each site.
        epochs: permutations per turn of a site.
        num_hostile: number of sites, the first ones, that draw noise of the model's shape after
            their permutations. The attack in this benchmark doesn't use it.
    """

    def __init__(self, seed: int, sizes: Sequence[int], epochs: int, num_hostile: int) -> None:
        self._rng = np.random.default_rng(seed + 100)
        self._sizes = sizes
        self._epochs = epochs
        self._num_hostile = num_hostile
        self._turn = 0

    def of_turn(self, turn: int) -> list[np.ndarray]:
        """Return the permutations of a turn. Turns count from 0 over sites and rounds, and must
        not decrease.
        """
        while self._turn < turn:
            self._draw()
        return self._draw()

    def _draw(self) -> list[np.ndarray]:
        site = self._turn % len(self._sizes)
        self._turn += 1
        orders = [self._rng.permutation(self._sizes[site]) for _ in range(self._epochs)]
        if site < self._num_hostile:
            self._rng.standard_normal((NUM_FEATURES, NUM_CLASSES))
        return orders


def train(weight: np.ndarray, data: Digits, orders: list[np.ndarray], *, batch_size: int, lr: float) -> np.ndarray:
    """Return the (10, 65) weight after an epoch of SGD on the mean cross-entropy in each of the
    orders.

    The gradient is written out, because at this size autograd would cost more than the arithmetic.
    `weight` isn't changed.
    """
    weight = weight.copy()
    targets = np.eye(NUM_CLASSES)
    for x, labels in batches(data, orders, batch_size):
        logits = x @ weight.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = odds / odds.sum(axis=1, keepdims=True) - targets[labels]
        weight -= lr / len(x) * (error.T @ x)
    return weight


def batches(data: Digits, orders: list[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the features and labels of each batch of each epoch; the last batch of an epoch may
    be smaller.
    """
    for order in orders:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield data.features[chosen], data.labels[chosen]


def train_with_torch(
    weight: np.ndarray, data: Digits, orders: list[np.ndarray], *, batch_size: int, lr: float
) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Return the trained weight and the extras: the steps of `train`, with the additions of the
    recipe's algorithm.
    """
    model = torch.nn.Linear(weight.shape[1], NUM_CLASSES, bias=False, dtype=torch.float64)
    received = {"weight": torch.tensor(weight)}
    model.load_state_dict(received)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    mu = flare.get_config().get("fedprox_mu")
    control = flare.Scaffold(model, optimizer) if mu is None else None
    for x, labels in batches(data, orders, batch_size):
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
    parser.add_argument("--cyclic", action="store_true", help="a round of the job is one site's turn")
    parser.add_argument("--sites", type=int, default=10, help="number of sites, named site-1 to site-N")
    parser.add_argument("--epochs", type=int, default=5, help="local epochs per round")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--hostile", type=int, default=0, help="number of sites, the first ones, that send their update times -10"
    )
    parser.add_argument("--alike", action="store_true", help="weight all updates alike, not by their rows")
    parser.add_argument("--torch", action="store_true", help="train with torch, for recipes with a helper for torch")
    args = parser.parse_args()

    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    train_data, test_data = load_train_and_test()
    rows = split_rows(train_data.labels, alpha=args.alpha, num_sites=args.sites, seed=args.seed)
    data = train_data.rows(rows[site])
    orders = Orders(args.seed, [len(one) for one in rows], args.epochs, args.hostile)

    while flare.is_running():
        input_model = flare.receive()
        weight = np.asarray(input_model.params["weight"])
        metrics = {"accuracy": accuracy(weight, test_data)}
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        number = input_model.current_round
        mine = orders.of_turn(number if args.cyclic else number * args.sites + site)
        work = {"batch_size": args.batch_size, "lr": args.lr}
        if args.torch:
            trained, extras = train_with_torch(weight, data, mine, **work)
        else:
            trained, extras = train(weight, data, mine, **work), {}
        if site < args.hostile:
            trained = weight - 10 * (trained - weight)
        meta = {} if args.alike else {"NUM_STEPS_CURRENT_ROUND": len(rows[site])}  # weight: the number of rows
        flare.send(flare.FLModel(params={"weight": trained}, metrics=metrics, meta=meta, extras=extras))


if __name__ == "__main__":
    main()
