"""The NVFlare names that client scripts use, and their counterparts in fedpool."""

from collections.abc import Mapping

import fedpool.client
from fedpool.client import compat, tracking

_CLIENT = (
    "AnalyticsDataType", "FLModel", "ParamsType", "evaluate", "get_config", "get_job_id", "get_site_name", "get_task_name",
    "init", "is_evaluate", "is_running", "is_submit_model", "is_train", "log", "receive", "send", "shutdown", "system_info",
    "train",
)  # fmt: skip


def _in(module: str, *names: str, **renamed: str) -> dict[str, tuple[str, str]]:
    return {name: (module, name) for name in names} | {old: (module, new) for old, new in renamed.items()}


_HERE = "fedpool.client"
_COMPAT = f"{_HERE}.compat"
_LIGHTNING = f"{_HERE}.lightning"
_HUGGINGFACE = f"{_HERE}.huggingface"

NAMES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "nvflare.client": _in(_HERE, *_CLIENT),
    "nvflare.client.api": _in(_HERE, *_CLIENT),
    "nvflare.client.config": _in(_COMPAT, "ConfigKey", "ExchangeFormat", "TransferType"),
    "nvflare.client.decorator": _in(_HERE, "evaluate", "train"),
    "nvflare.client.hf": _in(_HUGGINGFACE, *_CLIENT, "patch"),
    "nvflare.client.lightning": _in(_LIGHTNING, *_CLIENT, "logger", "patch"),
    "nvflare.client.tracking": _in(f"{_HERE}.tracking", "MLflowWriter", "SummaryWriter", "WandBWriter"),
    "nvflare.apis.analytix": _in(_COMPAT, "AnalyticsDataType", "LogWriterName"),
    "nvflare.apis.fl_constant": _in(_COMPAT, "FLMetaKey"),
    "nvflare.app_common.abstract.fl_model": _in(
        _COMPAT, "FLMetaKey", "FLModel", "FLModelConst", "MetaKey", "ParamsType"
    ),
    "nvflare.app_common.app_constant": _in(_COMPAT, "AlgorithmConstants", "ModelName", "ValidateType"),
    "nvflare.app_common.np.constants": _in(_COMPAT, "NPConstants"),
    "nvflare.app_common.utils.fedprox_utils": _in(_COMPAT, "get_fedprox_mu"),
    "nvflare.app_opt.hf": _in(_HUGGINGFACE, "patch"),
    "nvflare.app_opt.hf.api": _in(_HUGGINGFACE, "patch"),
    "nvflare.app_opt.lightning": _in(_LIGHTNING, "patch"),
    "nvflare.app_opt.lightning.api": _in(_LIGHTNING, "patch"),
    "nvflare.app_opt.lightning.loggers.client_logger": _in(_LIGHTNING, ClientLogger="logger"),
    "nvflare.app_opt.pt.fedproxloss": _in(f"{_HERE}.proximal", "PTFedProxLoss"),
    "nvflare.app_opt.pt.scaffold": _in(f"{_HERE}.scaffold_helper", "PTScaffoldHelper", "get_lr_values"),
}
"""NVFlare module -> name -> (fedpool module, name there)."""

MODULES: Mapping[str, str] = {"nvflare": "fedpool"} | {
    module: targets.pop()
    for module, names in NAMES.items()
    if len(targets := {target for target, _ in names.values()}) == 1 and all(n == new for n, (_, new) in names.items())
}
"""NVFlare module -> the fedpool module that has the same names."""

EXPORTS: Mapping[str, frozenset[str]] = {
    _HERE: frozenset(fedpool.client.__all__),
    _COMPAT: frozenset(compat.__all__),
    f"{_HERE}.tracking": frozenset(tracking.__all__),
    _LIGHTNING: frozenset({*fedpool.client.__all__, "logger", "patch"}),
    _HUGGINGFACE: frozenset({*fedpool.client.__all__, "patch"}),
}
"""fedpool module -> its names, for scripts that were migrated before."""

_ADVICE = (
    (
        ("nvflare.recipe", "nvflare.job_config", "nvflare.app_opt.pt.job_config", "nvflare.app_opt.pt.recipes",
         "nvflare.app_common.np.recipes", "nvflare.app_opt.sklearn.recipes", "nvflare.app_opt.tf.recipes", "nvflare.FedJob",
         "nvflare.app_common.np.np_model_persistor", "nvflare.app_opt.pt.file_model_persistor", "nvflare.tool",
         "nvflare.private.fed.app.simulator"),
        "this describes a job: write a fedpool recipe and run it in an environment, see docs/recipe.md",
    ),
    (
        ("nvflare.app_common.executors", "nvflare.apis.executor", "nvflare.app_common.abstract.learner_spec",
         "nvflare.app_common.abstract.model_learner", "nvflare.client.in_process"),
        "an executor or learner: make its training a script with the six lines of README.md",
    ),
    (
        ("nvflare.app_common.workflows", "nvflare.app_common.aggregators", "nvflare.app_common.abstract.aggregator",
         "nvflare.app_common.shareablegenerators", "nvflare.apis.impl", "nvflare.apis.controller_spec",
         "nvflare.app_common.widgets", "nvflare.app_common.ccwf", "nvflare.app_opt.tracking", "nvflare.widgets",
         "nvflare.app_common.abstract.model"),
        "server code: use a recipe's fields, an aggregator or a strategy, see docs/recipes and CONTRIBUTING.md",
    ),
    (
        ("nvflare.apis.dxo_filter", "nvflare.apis.filter", "nvflare.app_common.filters"),
        "a filter: change the update in the script before flare.send(), or use the recipe's exclude_vars",
    ),
    (
        ("nvflare.fuel.utils.fobs", "nvflare.app_opt.pt.decomposers", "nvflare.app_common.decomposers",
         "nvflare.app_opt.monai", "nvflare.apis.utils.decomposers"),
        "not needed, because tensors and arrays travel as they are: remove the import and the calls that register it",
    ),
    (("nvflare.fuel.utils.log_utils",), "use the standard library's logging: its output goes to the site's log"),
    (
        ("nvflare.client.ipc", "nvflare.client.cell", "nvflare.client.flare_agent", "nvflare.client.IPCAgent"),
        "fedpool starts the script itself: use the six lines of README.md",
    ),
    (("nvflare.app_opt.tf", "nvflare.app_opt.xgboost"), "fedpool has no counterpart for this library"),
)  # fmt: skip


def advice(name: str) -> str:
    """Advice about a dotted NVFlare name that has no counterpart in fedpool."""
    for prefixes, text in _ADVICE:
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return text
    return "fedpool has no counterpart: see docs/from-nvflare.md"
