"""The digits data set, split over sites by label with a Dirichlet distribution: the same rows for
the same arguments on every machine.

The split is that of https://arxiv.org/abs/1909.06335: a large alpha gives every site the same mix
of labels, a small one gives each site only a few labels. Every site computes the whole split and
keeps its own part, so nothing has to be distributed. That works in a benchmark, where the data is
public; real sites have their own rows.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

NUM_CLASSES = 10
NUM_FEATURES = 65
NUM_TRAIN_ROWS = 1437  # rows 0-1436 train, 1437-1796 test, in the order of the data set
MAX_DRAWS = 1_000


@dataclass(frozen=True)
class Digits:
    """Features (rows, 65) as float64, where the last column is 1 for the bias, and labels
    (rows,).
    """

    features: np.ndarray
    labels: np.ndarray

    def rows(self, index: np.ndarray | slice) -> "Digits":
        """Return the chosen rows."""
        return Digits(self.features[index], self.labels[index])


def load_train_and_test() -> tuple[Digits, Digits]:
    """Return the train and the test rows, pixels scaled from 0-16 to 0-1."""
    pixels, labels = load_digits(return_X_y=True)
    features = np.hstack([pixels / 16, np.ones((len(pixels), 1))])
    digits = Digits(features, labels)
    return digits.rows(slice(NUM_TRAIN_ROWS)), digits.rows(slice(NUM_TRAIN_ROWS, None))


def split_rows(labels: np.ndarray, *, alpha: float, num_sites: int, seed: int, min_rows: int = 10) -> list[np.ndarray]:
    """Return the row numbers of each site; every row goes to exactly one site.

    Each class's shuffled rows are cut in proportions drawn from Dirichlet(alpha). The whole split
    is drawn again until every site has at least `min_rows` rows.

    Raises ValueError if none of `MAX_DRAWS` draws does.
    """
    rng = np.random.default_rng(seed)
    for _ in range(MAX_DRAWS):
        by_class = []
        for label in range(NUM_CLASSES):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(num_sites, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            by_class.append(np.split(rows, cuts))
        sites = [np.concatenate(parts) for parts in zip(*by_class, strict=True)]
        if min(len(rows) for rows in sites) >= min_rows:
            return sites
    raise ValueError(
        f"no split of {len(labels)} rows with alpha {alpha} leaves each of {num_sites} sites {min_rows} rows: "
        "raise alpha or lower the number of sites"
    )
