"""FedProx: an extra term in the loss keeps the model near the received one."""

import torch
from digits import Digits, Network

import fedpool.client as flare

flare.init()
digits = Digits(flare.get_site_name())
model = Network()
mu = flare.get_config()["fedprox_mu"]

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
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss = loss + flare.prox_loss(model, received.params, mu)  # the one line of FedProx
        loss.backward()
        optimizer.step()
    flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics))
