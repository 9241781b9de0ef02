"""The flows that deployments load, one for each recipe. Apart from the recipes, which cost no Prefect."""

from fedpool.flows.cross_site import CrossSiteEvalRecipe
from fedpool.flows.cyclic import CyclicRecipe
from fedpool.flows.deployed import deployed
from fedpool.flows.diloco import DiLoCoRecipe
from fedpool.flows.ditto import DittoRecipe
from fedpool.flows.fedavg import FedAvgRecipe
from fedpool.flows.fedbn import FedBNRecipe
from fedpool.flows.fedeval import FedEvalRecipe
from fedpool.flows.fednova import FedNovaRecipe
from fedpool.flows.fedopt import FedOptRecipe
from fedpool.flows.fedprox import FedProxRecipe
from fedpool.flows.scaffold import ScaffoldRecipe

cross_site = deployed(CrossSiteEvalRecipe)
cyclic = deployed(CyclicRecipe)
diloco = deployed(DiLoCoRecipe)
ditto = deployed(DittoRecipe)
fedavg = deployed(FedAvgRecipe)
fedbn = deployed(FedBNRecipe)
fedeval = deployed(FedEvalRecipe)
fednova = deployed(FedNovaRecipe)
fedopt = deployed(FedOptRecipe)
fedprox = deployed(FedProxRecipe)
scaffold = deployed(ScaffoldRecipe)
