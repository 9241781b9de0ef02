"""PyTorch's CIFAR-10 tutorial as a federated client. To run it alone: `python client.py
--synthetic`.
"""

import argparse

import torch
from data import load_cifar10, make_synthetic, part_of
from model import Net
from torch import nn
from torch.utils.data import DataLoader

import fedpool.client as flare

parser = argparse.ArgumentParser()
parser.add_argument("--synthetic", action="store_true", help="generated images instead of CIFAR-10")
parser.add_argument("--download", action="store_true", help="download CIFAR-10 if it is missing")
parser.add_argument("--data", default="~/data", help="folder with CIFAR-10")
parser.add_argument("--num_sites", type=int, default=4)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=32)
args = parser.parse_args()

flare.init()
site = int(flare.get_site_name().split("-")[1]) - 1
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
train, test = make_synthetic() if args.synthetic else load_cifar10(args.data, download=args.download)
train_loader = DataLoader(part_of(train, site, args.num_sites), batch_size=args.batch_size, shuffle=True)
test_loader = DataLoader(test, batch_size=250)
model = Net().to(device)
loss_function = nn.CrossEntropyLoss()


def accuracy() -> float:
    """Share of the test images that the model gets right."""
    correct = total = 0
    with torch.no_grad():
        for images, labels in test_loader:
            correct += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
            total += len(labels)
    return correct / total


while flare.is_running():
    input_model = flare.receive()
    model.load_state_dict(input_model.params)
    score = accuracy()
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"accuracy": score}))
        continue
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(args.epochs):
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = loss_function(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
    flare.log("loss", loss)
    flare.send(
        flare.FLModel(
            params=model.state_dict(),
            metrics={"accuracy": score},
            meta={"NUM_STEPS_CURRENT_ROUND": args.epochs * len(train_loader)},
        )
    )
