"""A script written for NVFlare works after `fedpool migrate` has changed its imports, and
nothing else.
"""

from collections.abc import Callable

import pytest
import torch

from fedpool import Run
from fedpool.migration.remarks import remarks
from fedpool.migration.rewrite import rewrite
from fedpool.migration.source import Source

# The shape of NVFlare's hello-pt client: argparse, system_info, SummaryWriter, all three tasks.
NVFLARE_CLIENT = """
import argparse

import torch
from torch import nn
from torch.optim import SGD

import nvflare.client as flare
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import ModelName
from nvflare.client.tracking import SummaryWriter


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    model = nn.Linear(4, 2)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    loss = nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    labels = (inputs.sum(1) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), args.batch_size, shuffle=True)

    flare.init()
    sys_info = flare.system_info()
    client_name = sys_info["site_name"]
    last_params = None
    summary_writer = SummaryWriter()

    while flare.is_running():
        input_model = flare.receive()
        print(f"site = {client_name}, current_round={input_model.current_round}")
        if flare.is_submit_model():
            assert input_model.meta[FLMetaKey.SUBMIT_MODEL_NAME] == ModelName.BEST_MODEL
            flare.send(FLModel(params_type=ParamsType.FULL, params=last_params))
            continue
        model.load_state_dict(input_model.params)
        model.to(device)
        accuracy = 100 * (model(inputs.to(device)).argmax(1).cpu() == labels).sum().item() // 64
        if flare.is_evaluate():
            output_model = flare.FLModel(metrics={"accuracy": accuracy})
            flare.send(output_model)
            continue
        steps = args.epochs * len(loader)
        for epoch in range(args.epochs):
            for i, batch in enumerate(loader):
                images, targets = batch[0].to(device), batch[1].to(device)
                optimizer.zero_grad()
                cost = loss(model(images), targets)
                cost.backward()
                optimizer.step()
            global_step = input_model.current_round * steps + epoch * len(loader) + i
            summary_writer.add_scalar(tag="loss", scalar=cost.item(), global_step=global_step)
        last_params = {name: param.detach().cpu().clone() for name, param in model.state_dict().items()}
        output_model = flare.FLModel(
            params=last_params,
            metrics={"accuracy": accuracy},
            meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: steps},
        )
        flare.send(output_model)


if __name__ == "__main__":
    main()
"""


def test_only_the_imports_change(run_job: Callable[..., Run]) -> None:
    """The script trains, its score and its scalars arrive, its steps are its weight."""
    torch.manual_seed(0)
    script = rewrite(Source(NVFLARE_CLIENT))
    assert remarks(script) == []
    changed = [(a, b) for a, b in zip(NVFLARE_CLIENT.splitlines(), script.text.splitlines(), strict=True) if a != b]
    assert [before.split()[0] for before, _ in changed] == ["import", "from", "from", "from", "from"]
    run = run_job(
        script.text,
        model=torch.nn.Linear(4, 2),
        num_rounds=3,
        train_args="--epochs 3 --batch_size 32",
        cross_site_eval=True,
    )
    result = run.get_result()
    assert result.metrics[-1]["accuracy"] > 90
    assert result.rounds[0]["accepted"][0]["weight"] == 6
    assert result.rounds[0]["logged"]["loss"] == pytest.approx(0.5, abs=0.5)
