"""A plain training loop, for the recipes that need nothing else of a client: FedAvg, FedOpt,
DiLoCo, cyclic and FedBN.

With FedBN, the received model already has this site's own batch normalisation.
"""

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
    for images, labels in digits.batches():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics))
