"""Settings for `nvflare_scripts.py`: arguments and data of NVFlare's scripts, and why some can't
run here.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

NUM_SITES = 2

_GPU = re.compile(
    r'accelerator="gpu"(?! if)|^\s*DEVICE = "cuda[^"]*"\s*$|^\s*device = "cuda[^"]*"\s*$|is_available\(\) else None'
    r'|init_process_group\("nccl"\)|optim="paged_',
    re.MULTILINE,
)
"""Lines with which scripts ask for a GPU even if there is none."""


@dataclass(frozen=True)
class Case:
    """How to run the scripts whose path matches a pattern.

    Attributes:
        pattern: of the path in the checkout.
        arguments: of the script; `{data}` is the folder that `prepare` fills.
        prepare: makes the data that a script expects.
        beside: folders of the checkout with its modules, in addition to its own.
        model: an expression in one of its modules, such as "net:Net()"; if empty, the model that
            the script has when it runs alone.
        images: size of the generated data set; 0 gives a few images.
        shape: of the one array that NumPy scripts exchange.
        gpu: whether it needs one.
        reason: why it isn't run.
    """

    pattern: str
    arguments: str = ""
    prepare: Callable[[Path], None] | None = None
    beside: tuple[str, ...] = ()
    model: str = ""
    images: int = 0
    shape: tuple[int, ...] = (3, 3)
    gpu: bool = False
    reason: str = ""


def case_of(path: str) -> Case:
    """The first case that matches a path; if none does, one without settings."""
    return next((case for case in CASES if fnmatch(path, case.pattern)), Case(path))


def _site_indices(data: Path) -> None:
    for site in range(1, NUM_SITES + 1):
        np.save(data / f"site-{site}.npy", np.arange(64))


def _folders(data: Path) -> None:
    """Make the folders, with absolute paths, in which scripts save their best models."""
    for site in range(1, NUM_SITES + 1):
        Path(f"/tmp/nvflare/data/site-{site}").mkdir(parents=True, exist_ok=True)


def _transactions(data: Path) -> None:
    """Make a graph of transactions: features, edges, and which are illicit."""
    import pandas

    generator, size = np.random.default_rng(0), 60
    features = pandas.DataFrame(generator.normal(size=(size, 4)), columns=[f"feature_{n}" for n in range(4)])
    features.insert(0, "txId", range(size))
    features.to_csv(data / "txs_features.csv", index=False)
    pandas.DataFrame({"txId": range(size), "class": [1, 2, 3] * (size // 3)}).to_csv(
        data / "txs_classes.csv", index=False
    )
    ends = generator.integers(0, size, (2, 3 * size))
    pandas.DataFrame({"txId1": ends[0], "txId2": ends[1]}).to_csv(data / "txs_edgelist.csv", index=False)


def _texts(data: Path) -> None:
    """Make the language model, and data sets of its words as `datasets` saves them."""
    from datasets import Dataset

    _language_model(data)
    for name in ("validation", *(f"site-{site}/train" for site in range(1, NUM_SITES + 1))):
        Dataset.from_dict({"text": [f"w{n} w{n + 1} w{n + 2}" for n in range(16)]}).save_to_disk(data / name)


def _language_model(data: Path) -> None:
    """Make a language model of some thousand parameters, its tokenizer, and sentences for each
    site.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(60)), "###", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(data / "model")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(data / "model")
    for site in range(1, NUM_SITES + 1):
        folder = data / f"site-{site}"
        folder.mkdir()
        rows = [json.dumps(dict.fromkeys(("instruction", "input", "output"), f"w{n} w{n + site}")) for n in range(8)]
        for name in ("train", "valid"):
            (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


SERVER = "needs server code that is part of the example: "
DOWNLOAD = "needs data that the example downloads"
HUB = "needs a hub"
_BRIEF = "--train_idx_root {data} --aggregation_epochs 1 --num_workers 0"
_CIFAR10 = Case(
    "examples/advanced/cifar10/pt/cifar10-*/*/client.py",
    _BRIEF,
    _site_indices,
    ("examples/advanced/cifar10/pt/src",),
)
_E2E = "examples/devops/multicloud/e2e/jobs/cifar10"
_LAYER = "torch:nn.ModuleDict({'model': nn.Linear(2, 1)})"
CASES = (
    Case("examples/hello-world/hello-pt/client.py", "--epochs 1 --synthetic_data --train_size 32 --test_size 16 --num_workers 0"),
    Case("examples/hello-world/hello-lightning/client.py", "--synthetic_data"),
    Case("*/hello-huggingface/client.py", "--model_name_or_path {data}/model --data_root {data}", _language_model),
    Case("*/swarm_external_process_pass_through/*", shape=(1024, 1024)),
    Case("*/swarm_pt/client.py", "--model_path {data}/model --data_dir {data} --local_steps 2 --max_seq_len 8", _texts),
    Case("*/llm_hf/client.py", gpu=True),
    Case("*/gnn/finance/client.py", "--data_path {data} --epochs 1", _transactions),
    Case("*/gnn/protein/client.py", reason="needs a library that is not installed: pyg_lib"),
    Case("*/05.2_differential_privacy/src/cifar10_fl.py", model="net:Net()"),
    Case("*/amplify/*", beside=("examples/advanced/amplify/src",)),
    Case("*/edge/baselines/*", images=6250),
    Case("*/multi-gpu/lightning/client.py", model="model:LitNet()"),
    Case("*/recipe-k8s/client.py", "--site-index 0 --num-sites 2 --download"),
    Case("*/client-api-attach/trainer.py", "--config unused.json"),
    Case("*/hello-ccwf-attach/*", "--config unused.json"),
    Case("*/hello-pt-cse/*", prepare=_folders),
    Case("*/e2e/jobs/cifar10/*", "--data-root {data} --sites site-1,site-2", beside=(f"{_E2E}/app_server/custom",)),
    Case("*/automodel_*_client.py", "--backend mock --train_file none", lambda _: None, model=_LAYER),
    Case("*/pt_client_api_torchrun_cpu/*", reason="requires that receive() returns None at ranks above 0"),
    Case("*/auto-fl-research/tasks/cifar10/client.py", _BRIEF + " --scaffold", _site_indices, ("research/auto-fl-research",)),
    Case("*/hello-lr/client.py", reason=SERVER + "it sends gradients and a Hessian, not a model"),
    Case("*/newton_raphson_train.py", reason=SERVER + "it sends gradients and a Hessian, not a model"),
    Case("*/kaplan_meier_train*.py", reason=SERVER + "it sends histograms, not a model"),
    Case("*kaplan-meier-he/client*.py", reason=SERVER + "it sends histograms, not a model"),
    Case("*/fedbpt_train.py", reason=SERVER + "it sends the values of an evolution strategy"),
    Case("*/sklearn-kmeans/client.py", reason=SERVER + "it starts from settings, and sends centres and counts"),
    Case("*/kmeans_fl.py", reason=SERVER + "it starts from settings, and sends centres and counts"),
    Case("*/sklearn-svm/client.py", reason=SERVER + "it starts from settings, and sends support vectors"),
    Case("*/sklearn-linear/client.py", reason=SERVER + "it starts from settings"),
    Case("*/12.1_end_to_end_federated_fraud_detection/nvflare/[!g]*", reason=SERVER + "it prepares data, without a model"),
    Case("*/12.1_end_to_end_federated_fraud_detection/nvflare/graph_*", reason=SERVER + "it prepares data, without a model"),
    Case("*/cifar10_fedavg_he/client.py", reason=SERVER + "homomorphic encryption"),
    Case("*/hello-dp/client.py", reason=DOWNLOAD),
    Case("*/codon-fm/*", reason=DOWNLOAD),
    Case("*/bionemo/task_fitting/*", reason=DOWNLOAD),
    Case("*/monai/*", reason=DOWNLOAD),
    Case("*/monai_mednist_train.py", reason=DOWNLOAD),
    Case("research/brats18/*", reason=DOWNLOAD),
    Case("research/fed-ce/*", reason=DOWNLOAD),
    Case("research/fsi-fraud-detection/*", reason=DOWNLOAD),
    Case("research/fedumm/*", reason=HUB),
    Case("*/tensor-stream/client.py", reason=HUB),
    Case("*/08.1_fed_bert/client.py", reason=HUB),
    Case("skills/*", reason="is a template without a model"),
    Case("docs/*", reason="is a fragment of the documentation"),
    _CIFAR10,
)  # fmt: skip
"""Settings of single scripts; the first case that matches counts."""


def reason_of(path: str, text: str, modules: set[str], missing: list[str]) -> str:
    """Why a script can't run here; empty if it can.

    Args:
        path: in the checkout.
        text: of the script.
        modules: all that it imports.
        missing: the imported modules that are neither installed nor its own.
    """
    case = case_of(path)
    if case.reason:
        return case.reason
    if modules & {"tensorflow", "jax", "flwr"}:
        return "uses another framework"
    if "torch.utils.tensorboard" in text and find_spec("tensorboard") is None:
        missing = [*missing, "tensorboard"]
    if missing:
        return f"needs a library that is not installed: {', '.join(missing)}"
    if (case.gpu or _GPU.search(text)) and not torch.cuda.is_available():
        return "needs a GPU"
    if "from_pretrained" in text and case.prepare is None:
        return HUB
    return ""


def kind_of(modules: set[str], text: str) -> str:
    """PyTorch, Lightning, Hugging Face, NumPy, or another framework."""
    for kind, names in {
        "TensorFlow, JAX": {"tensorflow", "jax"},
        "MONAI, BioNeMo, NeMo": {"monai", "bionemo", "nemo"},
        "Lightning": {"pytorch_lightning", "lightning"},
        "Hugging Face": {"transformers", "trl"},
        "PyTorch": {"torch"},
        "scikit-learn": {"sklearn"},
    }.items():
        if modules & names:
            return kind
    return "NumPy"


def note(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)
