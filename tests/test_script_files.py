"""What travels with a script because its source names it, and what does not: code and small
configuration do, data never does.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedpool import JobFailed, Run
from fedpool.bundle import Bundle, build_bundle
from fedpool.script_files import MAX_NAMED_BYTES
from fedpool.sites.missing import missing


def built(root: Path, files: Mapping[str, str], script: str = "client.py") -> Bundle:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with (root / script).open("a") as file:
        file.write("\n# fedpool\n")
    return build_bundle(root / script)


def names(bundle: Bundle) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(bundle.data)).namelist()


HERE = "import os\nfrom pathlib import Path\nHERE = Path(__file__).resolve().parent\n"


@pytest.mark.parametrize(
    "expression",
    [
        "HERE / 'conf' / 'a.json'",
        "HERE.joinpath('conf', 'a.json')",
        "os.path.join(os.path.dirname(os.path.abspath(__file__)), 'conf/a.json')",
        "os.path.dirname(__file__) + '/conf/a.json'",
        "f'{HERE}/conf/a.json'",
        "str(HERE / 'conf') + '/a.json'",
        "Path(__file__).parents[0] / 'conf/../conf/a.json'",
        "Path(__file__).with_name('conf') / 'a.json'",
    ],
)
def test_small_configuration_that_is_named_beside_the_script_travels(expression: str, tmp_path: Path) -> None:
    bundle = built(tmp_path, {"client.py": f"{HERE}open({expression})\n", "conf/a.json": "{}", "conf/b.json": "{}"})
    assert names(bundle) == ["client.py", "conf/a.json"]
    assert bundle.notes == ("conf/a.json travels with client.py, because the script names it",)


@pytest.mark.parametrize(
    "name",
    [
        "data.csv",
        "data.npy",
        "patients.parquet",
        "data",
        "large.json",
        "hf_token.txt",
        "api-key.json",
        "my_secrets.toml",
        "secrets/prod.json",
        "conf/keys/site.txt",
        "apikey.txt",
        "service_account.json",
        "auth.json",
        "kaggle.json",
    ],
)
def test_data_do_not_travel_by_being_named(name: str, tmp_path: Path) -> None:
    text = "x" * (MAX_NAMED_BYTES + 1) if name == "large.json" else "x"
    bundle = built(tmp_path, {"client.py": f"{HERE}open(HERE / {name!r})\n", name: text})
    assert names(bundle) == ["client.py"] and bundle.notes == ()


def test_a_tokenizer_is_not_a_token(tmp_path: Path) -> None:
    files = {
        "client.py": f"{HERE}A = HERE / 'tokenizer.json'\nB = HERE / 'monkeys.txt'\n",
        "tokenizer.json": "{}",
        "monkeys.txt": "x",
    }
    assert names(built(tmp_path, files)) == ["client.py", "monkeys.txt", "tokenizer.json"]


def test_a_link_travels_by_its_own_name_unless_it_leads_to_what_does_not_travel(tmp_path: Path) -> None:
    for name, target in (("now.json", "conf/a.json"), ("b.json", "data.csv"), ("c.json", "secrets/c.json")):
        (tmp_path / name).symlink_to(target)
    script = f"{HERE}for name in (HERE / 'now.json', HERE / 'b.json', HERE / 'c.json'): open(name)\n"
    files = {"client.py": script, "conf/a.json": "{}", "data.csv": "1", "secrets/c.json": "{}"}
    assert names(built(tmp_path, files)) == ["client.py", "now.json"]


@pytest.mark.parametrize(
    "expression",
    [
        "HERE.parent / 'a.json'",
        "HERE / 'link.json'",
        "'a.json'",
        "HERE / name",
        "HERE / 'folder'",
        "HERE / ('x' * 9)",
        f"HERE / '{'x' * 5000}'",
        "__file__ + '\\0'",
        "HERE / HERE.parents[99]",
        "Path(__file__, 3)",
    ],
)
def test_what_lies_elsewhere_or_is_not_certain_does_not_travel(expression: str, tmp_path: Path) -> None:
    (tmp_path / "home" / "folder").mkdir(parents=True)
    (tmp_path / "home" / "link.json").symlink_to(tmp_path / "a.json")
    files = {"home/client.py": f"{HERE}open({expression})\n", "a.json": "{}", "home/a.json": "{}"}
    assert names(built(tmp_path, files, "home/client.py")) == ["client.py"]


@pytest.mark.parametrize(
    "statement",
    [
        "sys.path.insert(0, os.path.dirname(__file__) + '/..')",
        "sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))",
        "sys.path.append(str(Path(__file__).resolve().parent.parent))",
        "sys.path += [str(HERE.parent)]",
    ],
)
def test_modules_of_a_folder_that_the_script_puts_on_its_path_travel_with_their_place(
    statement: str, tmp_path: Path
) -> None:
    files = {
        "apps/client.py": f"{HERE}import sys\n{statement}\nimport common\nfrom lib.net import Net\n",
        "common.py": "import numpy\n",
        "lib/net.py": "from . import parts\nNet = 1\n",
        "lib/parts.py": "",
        "other.py": "",
        "secret.json": "{}",
    }
    bundle = built(tmp_path, files, "apps/client.py")
    assert bundle.entry == "apps/client.py"
    assert names(bundle) == ["apps/client.py", "common.py", "lib/net.py", "lib/parts.py"]
    assert "numpy" in bundle.imports and "common" not in bundle.imports
    assert bundle.notes == (
        "../common.py, ../lib/net.py, ../lib/parts.py travel with client.py, because the script names them",
    )


def test_a_module_may_put_the_folder_on_the_path(tmp_path: Path) -> None:
    files = {
        "apps/client.py": "import paths\nimport common\n",
        "apps/paths.py": "import os, sys\nsys.path.insert(0, os.path.dirname(__file__) + '/..')\n",
        "common.py": "",
    }
    assert names(built(tmp_path, files, "apps/client.py")) == ["apps/client.py", "apps/paths.py", "common.py"]


def test_an_installed_module_comes_before_one_of_a_folder_at_the_end_of_the_path(tmp_path: Path) -> None:
    append = f"{HERE}import sys\nsys.path.append(str(HERE.parent))\nimport numpy\n"
    files = {"apps/client.py": append, "numpy.py": ""}
    bundle = built(tmp_path, files, "apps/client.py")
    assert names(bundle) == ["client.py"] and bundle.imports == ("numpy", "os", "pathlib.Path", "sys")


SCRIPT = """
    import json, sys
    from pathlib import Path

    HERE = Path(__file__).parent
    sys.path.insert(0, str(HERE / ".."))
    from common import STEP
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        step = STEP * json.loads((HERE / "conf.json").read_text())["factor"]
        flare.send(flare.FLModel(params={"w": model.params["w"] + step}))
"""


def test_a_job_runs_with_what_its_script_names(
    run_job: Callable[..., Run], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps" / "conf.json").write_text(json.dumps({"factor": 3}))
    (tmp_path / "common.py").write_text("STEP = 2\n")
    script = write_script(SCRIPT, "apps/client.py")
    assert run_job(train_script=script).get_result().params["w"].tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (
            f"{HERE}open(HERE / 'data' / 'a.csv')",
            r"copy of its folder that leaves data out.*include=\('data/a.csv',\).*train_args",
        ),
        (f"{HERE}open(HERE.parent / 'a.csv')", r"copy 'a.csv' into the script's folder .*include="),
        (
            "open('a.csv')",
            r"no 'a.csv'.*include=\('a.csv',\)\. The script then finds it as Path\(__file__\)\.parent / 'a.csv'",
        ),
        ("import fedpool.client\n__import__('mine.net')", r"If 'mine' is a module of yours.*include=\('mine.py',\)"),
    ],
)
def test_what_did_not_travel_is_an_error_with_the_remedy(text: str, remedy: str, run_job: Callable[..., Run]) -> None:
    with pytest.raises(JobFailed, match=remedy):
        run_job(text, site_retries=0).get_result()


def test_files_that_are_missing_elsewhere_are_the_scripts_own_matter(tmp_path: Path) -> None:
    line = "FileNotFoundError: [Errno 2] No such file or directory: '/data/of/the/site.csv'"
    assert missing(["Traceback (most recent call last):", line], tmp_path / ".fedpool-sites-1" / "bundle") == []
    assert missing(["no traceback"], tmp_path) == []
