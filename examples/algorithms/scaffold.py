"""SCAFFOLD: corrects each step by the difference between this site's gradients and everyone's."""

import torch
from digits import Digits, Network

import fedpool.client as flare

flare.init()
digits = Digits(flare.get_site_name())
model = Network()

while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    metrics = {"accuracy": digits.accuracy(model)}
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics=metrics))
        continue
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = flare.Scaffold(model, optimizer)  # corrects the optimizer's steps from here on
    for images, labels in digits.batches():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    params, extras = model.state_dict(), control.extras()
    flare.send(flare.FLModel(params=params, metrics=metrics, extras=extras))
