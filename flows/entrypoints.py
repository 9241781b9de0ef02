"""The flows that deployments load, one for each recipe. Apart from the recipes, which cost no Prefect."""

from fedpool.flows.cross_site import CrossSiteEvalRecipe
from fedpool.flows.deployed import deployed
from fedpool.flows.fedavg import FedAvgRecipe
from fedpool.flows.fedeval import FedEvalRecipe

cross_site = deployed(CrossSiteEvalRecipe)
fedavg = deployed(FedAvgRecipe)
fedeval = deployed(FedEvalRecipe)
