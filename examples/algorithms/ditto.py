"""Ditto: in addition to the global model, each site trains a personal one, which it keeps."""

import torch
from digits import Digits, Network

import fedpool.client as flare

flare.init()
digits = Digits(flare.get_site_name())
model, personal = Network(), Network()
strength = flare.get_config()["ditto_lambda"]


def train(network: torch.nn.Module, anchor: dict, pull: float) -> None:
    """One epoch of SGD, with the network held near the anchor."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for images, labels in digits.batches():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        (loss + flare.prox_loss(network, anchor, pull)).backward()
        optimizer.step()


while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    personal.load_state_dict(flare.kept("personal", initial=True))
    metrics = {"accuracy": digits.accuracy(model), "personal_accuracy": digits.accuracy(personal)}
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics=metrics))
        continue
    train(personal, received.params, strength)
    train(model, received.params, 0.0)
    flare.keep("personal", personal.state_dict())
    flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics))
