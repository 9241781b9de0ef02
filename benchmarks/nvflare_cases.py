"""What `nvflare_scripts.py` knows of single scripts of NVFlare's: their arguments, their data, and why some cannot run here."""

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
    r'accelerator="gpu"|^\s*DEVICE = "cuda[^"]*"\s*$|^\s*device = "cuda[^"]*"\s*$|is_available\(\) else None',
    re.MULTILINE,
)
"""How scripts ask for a GPU, whether there is one or not."""


@dataclass(frozen=True)
class Case:
    """How to run the scripts whose path matches a pattern.

    Attributes:
        pattern: of the path in the checkout.
        arguments: of the script; `{data}` is the folder that `prepare` fills.
        prepare: makes the data that a script expects.
        beside: folders of the checkout that its modules lie in, beside its own.
        gpu: whether it needs one.
        reason: why it is not run.
    """

    pattern: str
    arguments: str = ""
    prepare: Callable[[Path], None] | None = None
    beside: tuple[str, ...] = ()
    gpu: bool = False
    reason: str = ""


def case_of(path: str) -> Case:
    """The first case that fits; one without settings when none does."""
    return next((case for case in CASES if fnmatch(path, case.pattern)), Case(path))


def _site_indices(data: Path) -> None:
    for site in range(1, NUM_SITES + 1):
        np.save(data / f"site-{site}.npy", np.arange(64))


def _language_model(data: Path) -> None:
    """A language model of some thousand parameters, its tokenizer, and sentences for each site."""
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


SERVER = "needs code of the server's that the example brings along: "
_CIFAR10 = Case(
    "examples/advanced/cifar10/pt/cifar10-*/*/client.py",
    "--train_idx_root {data} --aggregation_epochs 1 --num_workers 0",
    _site_indices,
    ("examples/advanced/cifar10/pt/src",),
)
_MODEL = "--model_name_or_path {data}/model"
_SENTENCES = f"{_MODEL} --data_path_train {{data}}/site-1/train.jsonl --data_path_valid {{data}}/site-1/valid.jsonl"
CASES = (
    Case("examples/hello-world/hello-pt/client.py", "--epochs 1 --synthetic_data --train_size 32 --test_size 16 --num_workers 0"),
    Case("examples/hello-world/hello-lightning/client.py", "--synthetic_data"),
    Case("examples/hello-world/hello-huggingface/client.py", _MODEL + " --data_root {data}", _language_model),
    Case(
        "examples/advanced/llm_hf/client.py",
        _SENTENCES + " --output_path {data}/out --train_mode PEFT",
        _language_model,
        gpu=True,
    ),
    Case(
        "examples/tutorials/*/08.*/client.py",
        _SENTENCES + " --output_path {data}/out",
        _language_model,
    ),
    Case("examples/hello-world/hello-lr/client.py", reason=SERVER + "it sends gradients and a Hessian, not a model"),
    Case("*/newton_raphson_train.py", reason=SERVER + "it sends gradients and a Hessian, not a model"),
    Case("*/kaplan_meier_train*.py", reason=SERVER + "it sends histograms, not a model"),
    Case("*kaplan-meier-he/client*.py", reason=SERVER + "it sends histograms, not a model"),
    Case("*/fedbpt_train.py", reason=SERVER + "it sends what an evolution strategy asks for"),
    Case("examples/*/hello-dp/client.py", reason="needs a download: the data set of OpenML"),
    Case("*/codon-fm/*", reason="needs data that the example downloads"),
    Case("*torchrun*", reason="is started by torchrun"),
    Case("*pt-ddp*", reason="is started by torchrun"),
    Case("*multi-gpu/pt/*", reason="is started by torchrun"),
    Case("*/bionemo/task_fitting/*", reason="needs data that the example downloads"),
    Case("skills/*", reason="is a template without a model"),
    Case("docs/*", reason="is a fragment of the documentation"),
    Case("*/cifar10_fedavg_he/client.py", reason=SERVER + "homomorphic encryption"),
    _CIFAR10,
)  # fmt: skip


def reason_of(path: str, text: str, modules: set[str], missing: list[str]) -> str:
    """Why a script cannot run here; empty when it can.

    Args:
        modules: all that it imports.
        missing: those of them that are not installed, and not its own.
    """
    case = case_of(path)
    if case.reason:
        return case.reason
    if "torch.utils.tensorboard" in text and find_spec("tensorboard") is None:
        missing = [*missing, "tensorboard"]
    if missing:
        return f"needs a library that is not installed: {', '.join(missing)}"
    if (case.gpu or _GPU.search(text)) and not torch.cuda.is_available():
        return "needs a GPU"
    if "from_pretrained" in text and case.prepare is None:
        return "needs a hub"
    if modules & {"tensorflow", "jax", "flwr"}:
        return "is of another framework"
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
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)
