"""What `fedpool migrate` changes in a script, what it leaves, and what it says about it."""

import importlib
import textwrap
from pathlib import Path

import pytest

from fedpool.errors import MigrationError
from fedpool.migration.names import EXPORTS, MODULES, NAMES
from fedpool.migration.remarks import remarks
from fedpool.migration.rewrite import rewrite
from fedpool.migration.source import Source


def migrated(text: str) -> str:
    return rewrite(Source(textwrap.dedent(text))).text


def left(text: str) -> list[tuple[int, str]]:
    return [(remark.line, remark.subject) for remark in remarks(rewrite(Source(textwrap.dedent(text))))]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import nvflare.client as flare", "import fedpool.client as flare"),
        ("from nvflare import client as flare", "from fedpool import client as flare"),
        ("import os, nvflare.client as f, sys", "import os, fedpool.client as f, sys"),
        ("import nvflare.client\tas  flare  # noqa: E402", "import fedpool.client\tas  flare  # noqa: E402"),
        ("import nvflare.client.lightning as flare", "import fedpool.client.lightning as flare"),
        ("import nvflare.client.hf as flare", "import fedpool.client.huggingface as flare"),
        ("from nvflare.client import hf, lightning", "from fedpool.client import huggingface as hf, lightning"),
        ("from nvflare.client import hf as flare", "from fedpool.client import huggingface as flare"),
        ("from nvflare.client.api import init, receive", "from fedpool.client import init, receive"),
        (
            "from nvflare.client import (\n    FLModel,  # a\n    send as s,\n)",
            "from fedpool.client import (\n    FLModel,  # a\n    send as s,\n)",
        ),
        (
            "from  nvflare.client.tracking \\\n  import SummaryWriter as W",
            "from  fedpool.client.tracking \\\n  import SummaryWriter as W",
        ),
        (
            "from nvflare.app_common.abstract.fl_model import FLModel, ParamsType",
            "from fedpool.client.compat import FLModel, ParamsType",
        ),
        ("from nvflare.app_common.app_constant import ModelName", "from fedpool.client.compat import ModelName"),
        ("from nvflare.app_common.np.constants import NPConstants", "from fedpool.client.compat import NPConstants"),
        ("from nvflare.apis.fl_constant import FLMetaKey", "from fedpool.client.compat import FLMetaKey"),
        ("from nvflare.apis.analytix import AnalyticsDataType", "from fedpool.client.compat import AnalyticsDataType"),
        (
            "from nvflare.app_opt.pt.fedproxloss import PTFedProxLoss",
            "from fedpool.client.proximal import PTFedProxLoss",
        ),
        (
            "from nvflare.app_opt.lightning.loggers.client_logger import ClientLogger",
            "from fedpool.client.lightning import logger as ClientLogger",
        ),
        ("from nvflare.client import *", "from fedpool.client import *"),
        ("x = 1; from nvflare.client import FLModel; y = 2", "x = 1; from fedpool.client import FLModel; y = 2"),
        ("é = 'ü'; import nvflare.client as flare; ß = 1", "é = 'ü'; import fedpool.client as flare; ß = 1"),
    ],
)
def test_an_import_is_changed_and_nothing_around_it(before: str, after: str) -> None:
    assert migrated(before) == after
    assert left(before) == ([(1, "from fedpool.client import *")] if "*" in before else [])


def test_imports_within_functions_conditions_and_try_are_changed_too() -> None:
    script = '''
    """A script for nvflare.client, as `import nvflare.client as flare` says."""

    try:
        import nvflare.client as flare
    except ImportError:
        flare = None

    if True:
        from nvflare.client.tracking import SummaryWriter


    def main():
        # import nvflare.client as flare
        from nvflare.client import FLModel
        note = "import nvflare.client as flare"
        return FLModel, note
    '''
    lines = script.splitlines()
    for number in (4, 9, 14):
        lines[number] = lines[number].replace("nvflare", "fedpool")
    assert migrated(script).splitlines() == textwrap.dedent("\n".join(lines)).splitlines()
    assert left(script) == []


def test_a_plain_import_is_changed_with_all_its_uses() -> None:
    script = """
    import nvflare.client
    import nvflare.app_common.app_constant
    import nvflare.client.tracking  # the writer

    nvflare.client.init()
    writer = nvflare.client.tracking.SummaryWriter()
    best = nvflare.app_common.app_constant.ModelName.BEST_MODEL
    print("nvflare.client is a name in prose")
    """
    assert migrated(script) == textwrap.dedent(
        """
        import fedpool.client
        import fedpool.client.compat
        import fedpool.client.tracking  # the writer

        fedpool.client.init()
        writer = fedpool.client.tracking.SummaryWriter()
        best = fedpool.client.compat.ModelName.BEST_MODEL
        print("nvflare.client is a name in prose")
        """
    )


@pytest.mark.parametrize(
    "script",
    [
        "import nvflare.client\nprint(nvflare.__version__)\n",
        "import nvflare.client\nnvflare.client.IPCAgent()\n",
        "import nvflare.client\nnvflare = 1\n",
        "import nvflare.client\ndef f(nvflare): return nvflare.client\n",
        "import nvflare.client\nfedpool = 1\n",
        "import nvflare.client\nimport nvflare.recipe\nnvflare.client.init()\n",
    ],
)
def test_a_plain_import_in_doubt_stays_and_is_named(script: str) -> None:
    assert migrated(script) == script
    assert (1, "import nvflare.client") in left(script)


def test_a_statement_of_names_from_several_places_is_split() -> None:
    script = """
    def main():
        from nvflare.client import FLModel, IPCAgent, lightning as pl, hf  # all of it
        import os; from nvflare.client.tracking import SummaryWriter, log
    """
    assert migrated(script) == textwrap.dedent(
        """
        def main():
            from fedpool.client import FLModel, lightning as pl, huggingface as hf
            from nvflare.client import IPCAgent  # all of it
            import os; from fedpool.client.tracking import SummaryWriter; from nvflare.client.tracking import log
        """
    )
    assert left(script) == [(4, "nvflare.client.IPCAgent"), (5, "nvflare.client.tracking.log")]


def test_a_statement_that_would_have_to_be_split_and_has_comments_stays() -> None:
    script = "from nvflare.client import (\n    FLModel,  # mine\n    IPCAgent,\n)\n"
    assert migrated(script) == script
    assert left(script) == [(2, "nvflare.client.FLModel"), (3, "nvflare.client.IPCAgent")]


@pytest.mark.parametrize(
    ("script", "subject", "advice"),
    [
        ("from nvflare.recipe import SimEnv", "nvflare.recipe.SimEnv", "write a fedpool recipe"),
        ("from nvflare import FedJob", "nvflare.FedJob", "write a fedpool recipe"),
        ("from nvflare.apis.executor import Executor", "nvflare.apis.executor.Executor", "the six lines"),
        (
            "from nvflare.app_common.workflows.fedavg import FedAvg",
            "nvflare.app_common.workflows.fedavg.FedAvg",
            "server code",
        ),
        ("from nvflare.apis.dxo_filter import DXOFilter", "nvflare.apis.dxo_filter.DXOFilter", "before flare.send()"),
        ("from nvflare.fuel.utils import fobs", "nvflare.fuel.utils.fobs", "remove the import"),
        ("import nvflare.client as flare\nflare.IPCAgent()", "flare.IPCAgent", "fedpool.client has no IPCAgent"),
        ("import nvflare.client as flare\nflare.init(config_file='a')", "init(config_file=)", "is ignored"),
        (
            "load('nvflare.app_opt.pt.decomposers.TensorDecomposer')",
            "'nvflare.app_opt.pt.decomposers.TensorDecomposer'",
            "a string",
        ),
        ("import nvflare.app_opt.tf.model", "import nvflare.app_opt.tf.model", "no counterpart for this library"),
        ("from nvflare.some.new import thing", "nvflare.some.new.thing", "no counterpart: see docs/from-nvflare.md"),
    ],
)
def test_what_is_left_is_named_with_its_line_and_the_remedy(script: str, subject: str, advice: str) -> None:
    (remark,) = remarks(rewrite(Source(f"\n{script}\n")))
    assert remark.line == 1 + len(script.splitlines())
    assert remark.subject == subject
    assert advice in remark.advice


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_endings_stay_as_they_are(newline: str) -> None:
    script = newline.join(
        ["# x", "from nvflare.client import FLModel, IPCAgent", "import nvflare.client as f", "y = '''", "'''"]
    )
    lines = [
        "# x",
        "from fedpool.client import FLModel",
        "from nvflare.client import IPCAgent",
        "import fedpool.client as f",
    ]
    assert migrated(script) == newline.join([*lines, "y = '''", "'''"])


def test_what_was_migrated_is_not_changed_again_and_says_the_same() -> None:
    script = """
    import nvflare.client as flare
    from nvflare.app_common.abstract.fl_model import FLModel, Strange
    flare.IPCAgent()
    """
    once = rewrite(Source(textwrap.dedent(script)))
    assert rewrite(once) is once
    assert [remark.subject for remark in remarks(once)] == [
        "nvflare.app_common.abstract.fl_model.Strange",
        "flare.IPCAgent",
    ]


@pytest.mark.parametrize(
    "data", [b"# coding: latin-1\nimport nvflare.client as f  # \xe9\n", b"\xef\xbb\xbfimport nvflare.client as f\n"]
)
def test_the_encoding_of_a_file_stays(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_bytes(data)
    result = rewrite(Source.read(tmp_path / "client.py"))
    assert result.text.encode(result.encoding) == data.replace(b"nvflare", b"fedpool")


def test_what_is_not_python_is_an_error_that_names_the_line() -> None:
    with pytest.raises(MigrationError, match=r"client\.py:2 is not Python, so it was left as it is"):
        rewrite(Source("import nvflare.client as flare\nprint 'x'\n", name="client.py"))


@pytest.mark.parametrize("module", sorted(NAMES))
def test_every_name_that_the_table_promises_is_there(module: str) -> None:
    for target, name in NAMES[module].values():
        assert hasattr(importlib.import_module(target), name), f"{target}.{name}"
        assert target not in EXPORTS or name in EXPORTS[target]


@pytest.mark.parametrize("module", sorted(EXPORTS))
def test_what_a_module_is_said_to_export_is_what_it_exports(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == EXPORTS[module]


def test_modules_stand_for_modules() -> None:
    for target in MODULES.values():
        importlib.import_module(target)
