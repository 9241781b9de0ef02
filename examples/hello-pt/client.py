"""A local PyTorch training script plus six lines. Each site trains on a third of scikit-learn's
digits.
"""

import argparse

import torch
from model import SimpleNetwork
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedpool.client as flare  # (1)

parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--num_sites", type=int, default=3)
args = parser.parse_args()

flare.init()  # (2)
site = int(flare.get_site_name().split("-")[1]) - 1

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train = TensorDataset(images[:1437][site :: args.num_sites], labels[:1437][site :: args.num_sites])
loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
model = SimpleNetwork()
loss_function = nn.CrossEntropyLoss()


def accuracy() -> float:
    """Share of the test images that the model gets right."""
    model.eval()
    with torch.no_grad():
        return (model(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()


while flare.is_running():  # (3)
    input_model = flare.receive()  # (4)
    model.load_state_dict(input_model.params)  # (5)
    score = accuracy()
    if flare.is_evaluate():  # the final model is only scored
        flare.send(flare.FLModel(metrics={"accuracy": score}))
        continue

    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(args.epochs):
        for batch, targets in loader:
            optimizer.zero_grad()
            loss = loss_function(model(batch), targets)
            loss.backward()
            optimizer.step()
    flare.log("loss", loss.item())
    print(
        f"round {input_model.current_round}: received a model of accuracy {score:.3f}, trained to loss {loss.item():.3f}"
    )

    steps = args.epochs * len(loader)
    flare.send(  # (6)
        flare.FLModel(params=model.state_dict(), metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": steps})
    )
