"""A linear classifier of digits at a site that lacks some of them. It keeps its best local model
and submits it when asked.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fedpool.client as flare

flare.init()
site = int(flare.get_site_name().split("-")[1])

digits = load_digits()
labels = torch.tensor(digits.target)
mine = labels % 3 != site % 3  # each site lacks every third digit, and each lacks different ones
inputs = torch.tensor(digits.data, dtype=torch.float32)[mine] / 16
labels = labels[mine]
rows = torch.arange(len(labels)) % 5 > 0  # one row in five is for scoring
model = nn.Linear(64, 10)
loss_function = nn.CrossEntropyLoss()


def accuracy() -> float:
    """Share of this site's test rows that the model gets right."""
    with torch.no_grad():
        return (model(inputs[~rows]).argmax(1) == labels[~rows]).float().mean().item()


def train() -> None:
    """Ten steps on this site's training rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        loss_function(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()


best_score, best_params = -1.0, None
while flare.is_running():
    model.load_state_dict(flare.receive().params)
    score = accuracy()
    if flare.is_evaluate():  # score the global model or another site's
        meta = {"NUM_EVAL_EXAMPLES": int((~rows).sum())}
        flare.send(flare.FLModel(metrics={"accuracy": score}, meta=meta))
    elif flare.is_submit_model():  # without earlier training, the site has no model of its own yet
        if best_params is None:
            train()
            best_params = model.state_dict()
        flare.send(flare.FLModel(params=best_params))
    else:
        train()
        if (local_score := accuracy()) > best_score:
            best_score = local_score
            best_params = {name: value.clone() for name, value in model.state_dict().items()}
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": score},
                meta={"NUM_STEPS_CURRENT_ROUND": int(rows.sum()), "NUM_EVAL_EXAMPLES": int((~rows).sum())},
            )
        )
