"""The flows that deployments load, one for each recipe. Apart from the recipes, which cost no Prefect."""

from fedpool.flows.deployed import deployed
from fedpool.flows.fedavg import FedAvgRecipe

fedavg = deployed(FedAvgRecipe)
