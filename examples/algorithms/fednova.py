"""FedNova: sites train for as long as they like, and report how far they went."""

import torch
from digits import Digits, Network

import fedpool.client as flare

flare.init()
site = flare.get_site_name()
digits = Digits(site)
model = Network()
epochs = int(site.split("-")[1])  # site-3 does three times the work of site-1

while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    metrics = {"accuracy": digits.accuracy(model)}
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics=metrics))
        continue
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    steps = flare.LocalSteps(optimizer)
    for _ in range(epochs):
        for images, labels in digits.batches():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    # The weight of an update is its number of rows; it doesn't depend on how far the steps went.
    meta = {"NUM_STEPS_CURRENT_ROUND": len(digits.labels), "LOCAL_STEPS": steps.count}
    flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics, meta=meta))
