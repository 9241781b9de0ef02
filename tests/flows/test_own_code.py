"""A custom recipe's code: what travels, where it may run, and what is refused."""

import importlib
import json
import runpy
import shutil
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool import ConfigError, FedAvgRecipe, IntegrityError, Recipe, RecipeError, SimEnv, Store
from fedpool.allowed_code import VARIABLE, Request, by_environment
from fedpool.flows import deployed
from fedpool.flows.own_code import check_travels, code_of, why_it_stays
from fedpool.flows.staging import check_unchanged, stage
from fedpool.flows.stored import recipe_of
from fedpool.paths import JobPaths
from fedpool.user_code import build_code, find_home, is_installed, load_code
from tests.own_algorithm import ROOT, forget, importable, job_code_forgotten, run

SITES = ("site-1", "site-2")
HALVES = """
    from fedpool import FedAvgRecipe

    class FedAvgRecipe(FedAvgRecipe):
        share: float = 0.5
"""


class Folder:
    """A user's folder, first on sys.path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(path / "store")
        (path / "client.py").write_text("import fedpool.client\n")

    def write(self, name: str, text: str) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def kind(self, full: str) -> type[Recipe]:
        importlib.invalidate_caches()
        module, _, name = full.partition(":")
        kind: type[Recipe] = getattr(importlib.import_module(module), name)
        return kind

    def recipe(self, kind: type[Recipe], **fields: Any) -> Recipe:
        defaults: dict[str, Any] = {"name": "job", "min_clients": 2, "num_rounds": 2, "model": {"w": np.zeros(3)}}
        return kind(**defaults | {"train_script": str(self.path / "client.py")} | fields)

    def stage(self, full: str, job_id: str = "job-1", **fields: Any) -> dict[str, Any]:
        """Stage a job and make this process forget its class; returns its job.json."""
        stage(self.recipe(self.kind(full), **fields), job_id, self.store, SITES)
        forget(self.path)
        described: dict[str, Any] = self.store.read_json(JobPaths(job_id).job)
        return described


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.delenv(VARIABLE, raising=False)
    path = tmp_path / "mine"
    path.mkdir()
    with importable(path), job_code_forgotten():
        yield Folder(path)


def allow(request: Request) -> None:
    """Allows everything."""


def test_a_class_named_as_ours_is_not_taken_for_ours(folder: Folder) -> None:
    folder.write("halves.py", HALVES)
    job = folder.stage("halves:FedAvgRecipe", share=0.25)
    assert job["recipe"]["type"] == "halves:FedAvgRecipe" and job["code"]["modules"] == ["halves"]
    found = recipe_of("job-1", folder.store, allow=allow)
    assert type(found) is not FedAvgRecipe and found.share == 0.25  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"has a halves:FedAvgRecipe, not a fedpool\.flows\.fedavg:FedAvgRecipe"):
        recipe_of("job-1", folder.store, FedAvgRecipe, allow=allow)
    stage(folder.recipe(FedAvgRecipe), "job-2", folder.store, SITES)
    with pytest.raises(
        RecipeError, match=r"type: fedpool\.flows\.fedavg:FedAvgRecipe in the job, halves:FedAvgRecipe here"
    ):
        check_unchanged(found.revise(share=0.5), "job-2", folder.store, SITES)


def test_a_job_of_a_recipe_of_ours_has_no_code(folder: Folder) -> None:
    stage(folder.recipe(FedAvgRecipe, aggregator="median"), "job-1", folder.store, SITES)
    assert "code" not in folder.store.read_json("job-1/job.json")
    assert not list((folder.path / "store/job-1").glob("code-*"))


def test_a_package_travels_with_what_it_imports_and_names_and_with_nothing_else(folder: Folder) -> None:
    folder.write("algos/__init__.py", "SHARE = 0.5\n")
    folder.write("algos/deep/__init__.py", "")
    folder.write(
        "algos/deep/halves.py",
        """
        import json
        from pathlib import Path

        from fedpool import FedAvgRecipe
        from .. import SHARE
        from ..helper import twice
        import beside

        DEFAULTS = json.loads((Path(__file__).parent / "defaults.json").read_text())

        class HalvesRecipe(FedAvgRecipe):
            share: float = twice(SHARE) * beside.ONE * DEFAULTS["share"]
        """,
    )
    folder.write("algos/deep/defaults.json", '{"share": 0.125}')
    folder.write("algos/helper.py", "def twice(value):\n    return 2 * value\n")
    folder.write("algos/unused.py", "")
    folder.write("beside.py", "ONE = 1\n")
    job = folder.stage("algos.deep.halves:HalvesRecipe")
    (zipped,) = (folder.path / "store/job-1").glob("code-*.zip")
    assert zipped.name == f"code-{job['code']['sha256']}.zip"
    assert sorted(zipfile.ZipFile(zipped).namelist()) == [
        "algos/__init__.py",
        "algos/deep/__init__.py",
        "algos/deep/defaults.json",
        "algos/deep/halves.py",
        "algos/helper.py",
        "beside.py",
    ]
    shutil.move(folder.path / "algos", folder.path / "gone")
    (folder.path / "beside.py").unlink()
    found = recipe_of("job-1", folder.store, allow=allow)
    assert found.share == 0.125  # type: ignore[attr-defined]
    check_unchanged(found, "job-1", folder.store, SITES)  # the unpacked code has the same hash
    stage(found, "job-2", folder.store, SITES)
    assert folder.store.read_json("job-2/job.json")["code"] == job["code"]


def test_a_module_of_another_folder_of_the_users_travels_too(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    (other / "lib").mkdir(parents=True)
    (other / "lib" / "shares.py").write_text("HALF = 0.5\n")
    monkeypatch.syspath_prepend(str(other))
    folder.write("halves.py", "import lib.shares\n" + textwrap.dedent(HALVES).replace("0.5", "lib.shares.HALF"))
    try:
        assert code_of(folder.recipe(folder.kind("halves:FedAvgRecipe"))).files == ["halves.py", "lib/shares.py"]  # type: ignore[union-attr]
    finally:
        forget(other)


def test_a_function_that_aggregates_travels_as_well(folder: Folder) -> None:
    folder.write("rules.py", "def largest(values, weights):\n    return values.max(dim=0).values\n")
    importlib.invalidate_caches()
    largest = importlib.import_module("rules").largest
    recipe = folder.recipe(FedAvgRecipe, aggregator=largest)
    stage(recipe, "job-1", folder.store, SITES)
    forget(folder.path)
    (folder.path / "rules.py").unlink()
    with pytest.raises(ConfigError, match=r"fedpool\.flows\.fedavg:FedAvgRecipe \(rules\.py\)"):
        recipe_of("job-1", folder.store, FedAvgRecipe)
    found = recipe_of("job-1", folder.store, FedAvgRecipe, allow=allow)
    assert found.rule.path == "rules:largest"  # type: ignore[attr-defined]
    assert sys.modules["rules"].largest(torch.eye(2), None).tolist() == [1, 1]
    plain = folder.recipe(FedAvgRecipe, aggregator="fedpool.tasks.robust:median")
    assert code_of(plain) is None and why_it_stays(plain) is None  # installed where the coordinator runs


def test_a_changed_class_is_refused_by_its_hash(folder: Folder) -> None:
    folder.write("halves.py", HALVES)
    folder.stage("halves:FedAvgRecipe")
    check_unchanged(folder.recipe(folder.kind("halves:FedAvgRecipe")), "job-1", folder.store, SITES)
    forget(folder.path)
    folder.write("halves.py", textwrap.dedent(HALVES) + "# changed\n")
    with pytest.raises(
        RecipeError, match=r"another recipe: fork it.*\ncode: [0-9a-f]{64} in the job, [0-9a-f]{64} here$"
    ):
        check_unchanged(folder.recipe(folder.kind("halves:FedAvgRecipe")), "job-1", folder.store, SITES)


def test_a_job_of_an_earlier_version_goes_on_with_the_class_of_the_user(folder: Folder) -> None:
    folder.write("halves.py", HALVES.replace("class FedAvgRecipe", "class HalvesRecipe"))
    recipe = folder.recipe(folder.kind("halves:HalvesRecipe"))
    stage(recipe, "job-1", folder.store, SITES)
    described = folder.store.read_json("job-1/job.json")
    del described["code"]
    described["recipe"]["type"] = "HalvesRecipe"
    folder.store.remove("job-1/job.json")
    folder.store.write_json("job-1/job.json", described)
    check_unchanged(recipe, "job-1", folder.store, SITES)
    with pytest.raises(
        IntegrityError,
        match=r"recipe of the unknown class 'HalvesRecipe': known classes are FedAvgRecipe.*beside the script",
    ):
        recipe_of("job-1", folder.store)


def test_code_that_this_process_has_loaded_already_is_used_without_asking(folder: Folder) -> None:
    folder.write("halves.py", HALVES)
    kind = folder.kind("halves:FedAvgRecipe")
    stage(folder.recipe(kind), "job-1", folder.store, SITES)
    assert type(recipe_of("job-1", folder.store)) is kind


@pytest.mark.parametrize("name", ["halves", "helper"])
def test_a_module_of_the_same_name_that_is_another_is_not_mixed_with_it(folder: Folder, name: str) -> None:
    folder.write("helper.py", "HALF = 0.5\n")
    folder.write("halves.py", "from helper import HALF\n" + textwrap.dedent(HALVES))
    folder.stage("halves:FedAvgRecipe")
    folder.write(f"{name}.py", "HALF = 0.25\n")
    importlib.invalidate_caches()
    importlib.import_module(name)
    before = list(sys.path)
    with pytest.raises(
        ConfigError, match=f"a module '{name}', but this process has another module of that name .*mine/{name}.py"
    ):
        recipe_of("job-1", folder.store, allow=allow)
    assert sys.path == before


@pytest.mark.parametrize("edited", ["halves.py", "helper.py"])
def test_a_module_that_was_edited_after_it_was_imported_does_not_travel_until_it_is_reloaded(
    folder: Folder, edited: str
) -> None:
    folder.write("helper.py", "SHARE = 0.5\n")
    folder.write("halves.py", "from helper import SHARE\n" + textwrap.dedent(HALVES).replace("0.5", "SHARE"))
    recipe = folder.recipe(folder.kind("halves:FedAvgRecipe"))
    text = (folder.path / edited).read_text()
    folder.write(edited, text + "# other\n")
    words = rf"mine/{edited} has changed since this process imported it, .*: restart Python .* or reload the module"
    for refuse in (
        lambda: check_travels(recipe),
        lambda: stage(recipe, "job-1", folder.store, SITES),
        lambda: recipe.execute(SimEnv(workspace=folder.path / "runs", progress=False)),
    ):
        with pytest.raises(RecipeError, match=words):
            refuse()
    assert not folder.store.exists(JobPaths("job-1").job)
    folder.write(edited, text)
    check_travels(recipe)
    folder.write(edited, text + "# other\n")
    for name in ("helper", "halves"):
        importlib.reload(sys.modules[name])
    check_travels(folder.recipe(folder.kind("halves:FedAvgRecipe")))


def test_a_class_that_is_defined_later_does_not_hide_that_its_module_was_edited(folder: Folder) -> None:
    inside = """
    def later():
        class Inner(FedAvgRecipe):
            pass
    """
    folder.write("halves.py", textwrap.dedent(HALVES) + textwrap.dedent(inside))
    recipe = folder.recipe(folder.kind("halves:FedAvgRecipe"))
    folder.write("halves.py", HALVES)
    sys.modules["halves"].later()
    with pytest.raises(RecipeError, match="has changed since this process imported it"):
        check_travels(recipe)


def test_a_function_that_was_edited_after_it_was_imported_is_refused_when_the_recipe_is_built(folder: Folder) -> None:
    folder.write("mine.py", "def first(values, weights):\n    return values[0]\n")
    function: Any = folder.kind("mine:first")
    folder.recipe(FedAvgRecipe, aggregator=function)
    folder.write("mine.py", "def first(values, weights):\n    return values[-1]\n")
    for given in (function, "mine:first"):
        with pytest.raises(RecipeError, match=r"mine\.py has changed since this process imported it"):
            folder.recipe(FedAvgRecipe, aggregator=given)
    importlib.reload(sys.modules["mine"])
    check_travels(folder.recipe(FedAvgRecipe, aggregator="mine:first"))


def test_of_modules_that_are_taken_the_one_that_differs_is_named(folder: Folder) -> None:
    folder.write("helper.py", "SHARE = 0.5\n")
    folder.write("halves.py", "from helper import SHARE\n" + textwrap.dedent(HALVES))
    folder.stage("halves:FedAvgRecipe")
    folder.write("helper.py", "SHARE = 0.25\n")
    folder.kind("halves:FedAvgRecipe")
    with pytest.raises(
        ConfigError, match=r"a module 'helper', but .* another module of that name \(.*mine/helper\.py\)"
    ):
        recipe_of("job-1", folder.store, allow=allow)


def test_code_that_cannot_be_imported_says_why_and_leaves_nothing(folder: Folder) -> None:
    folder.write("helper.py", "")
    code = build_code_of(folder, "import helper\nimport no_such_package\n")
    before = list(sys.path)
    with pytest.raises(
        ConfigError, match="'halves' of the job's code cannot be imported here: ModuleNotFoundError: No module"
    ):
        load_code(code)
    assert sys.path == before and not {"helper", "halves"} & set(sys.modules)


def test_code_that_exits_when_it_is_imported_does_not_end_this_process(folder: Folder) -> None:
    folder.write("helper.py", "")
    with pytest.raises(ConfigError, match="'halves' of the job's code cannot be imported here: SystemExit: 3"):
        load_code(build_code_of(folder, "import helper\nraise SystemExit(3)\n"))


def build_code_of(folder: Folder, text: str) -> Any:
    """The code of a module `halves` that this process cannot import."""
    folder.write("halves.py", "import helper\n")
    folder.kind("halves:helper")
    folder.write("halves.py", text)
    code = build_code(["halves"])  # no class of fedpool has noted the text that was imported
    forget(folder.path)
    return code


@pytest.mark.parametrize("value", [None, "", "none", "0" * 64])
def test_code_is_not_run_where_it_is_not_allowed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    folder.write("halves.py", HALVES)
    sha256 = folder.stage("halves:FedAvgRecipe")["code"]["sha256"]
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    words = (
        rf"job job-1 .*halves:FedAvgRecipe \(halves\.py\), sha256 {sha256}.*set FEDPOOL_ALLOWED_CODE={sha256} .*worker"
    )
    with pytest.raises(ConfigError, match=words):
        recipe_of("job-1", folder.store)
    assert "halves" not in sys.modules


@pytest.mark.parametrize("value", ["any", "{}", f"{'0' * 64}, {{}}"])
def test_code_is_run_where_it_is_allowed(folder: Folder, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    folder.write("halves.py", HALVES)
    sha256 = folder.stage("halves:FedAvgRecipe")["code"]["sha256"]
    monkeypatch.setenv(VARIABLE, value.format(sha256))
    assert type(recipe_of("job-1", folder.store)).__module__ == "halves"


@pytest.mark.parametrize("value", ["yes", "ANY", "any,none", "0" * 63, f"{'0' * 64},"])
def test_a_value_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=r"FEDPOOL_ALLOWED_CODE has '.*': give sha256 hashes .*, 'any' or 'none'"):
        by_environment(Request("job-1", "m:C", ("m",), ("m.py",), "0" * 64, "store/code.zip"))


def rewritten(folder: Folder, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder.path / "store/job-1/job.json"
    described = json.loads(path.read_text())
    change(described)
    path.chmod(0o600)
    path.write_text(json.dumps(described))


def test_a_zip_that_was_tampered_with_is_not_run_wherever_it_is_allowed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("halves.py", HALVES)
    folder.stage("halves:FedAvgRecipe")
    monkeypatch.setenv(VARIABLE, "any")
    (path,) = (folder.path / "store/job-1").glob("code-*.zip")
    path.chmod(0o600)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sitecustomize.py", "raise SystemExit\n")
    with pytest.raises(IntegrityError, match=r"code-[0-9a-f]{64}\.zip does not match the hash in its name"):
        recipe_of("job-1", folder.store)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"code-[0-9a-f]{64}\.zip is missing"):
        recipe_of("job-1", folder.store)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job: job["code"].update(sha256="../../x"), "does not describe a job: code.sha256: "),
        (lambda job: job["code"].pop("modules"), "does not describe a job: code.modules: "),
        (lambda job: job.update(code=[]), "does not describe a job: code"),
        (lambda job: job["recipe"].update(type="halves:Path"), "halves:Path, which is None, not a recipe"),
        (
            lambda job: job["recipe"].update(type="os:system"),
            "recipe of the unknown class 'os:system': known classes are",
        ),
        (
            lambda job: job["recipe"].update(type="antigravity:Recipe"),
            "recipe of the unknown class 'antigravity:Recipe'",
        ),
    ],
)
def test_a_job_that_names_something_else_is_refused_and_nothing_is_imported(
    folder: Folder, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    folder.write("halves.py", HALVES)
    folder.stage("halves:FedAvgRecipe")
    rewritten(folder, change)
    with pytest.raises(IntegrityError, match=words):
        recipe_of("job-1", folder.store, allow=allow)
    assert "antigravity" not in sys.modules


def test_what_is_installed_and_not_registered_stays_and_says_how_to_register_it(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "acme_algos"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(HALVES))
    monkeypatch.syspath_prepend(str(package.parent))
    try:
        recipe = folder.recipe(folder.kind("acme_algos:FedAvgRecipe"))
        register = r"fedpool\.recipes\"\] acme_algos = \"acme_algos:FedAvgRecipe\""
        with pytest.raises(
            RecipeError, match=rf"installed module acme_algos, which does not register it: .*{register}"
        ):
            check_travels(recipe)
        stage(recipe, "job-1", folder.store, SITES)
        assert "code" not in folder.store.read_json("job-1/job.json")
        with pytest.raises(IntegrityError, match="recipe of the unknown class 'acme_algos:FedAvgRecipe'"):
            recipe_of("job-1", folder.store, allow=allow)
    finally:
        forget(package)


def test_a_class_of_a_script_that_is_run_stays_and_says_where_to_put_it(folder: Folder) -> None:
    folder.write("job.py", HALVES)
    of_script = folder.recipe(runpy.run_path(str(folder.path / "job.py"))["FedAvgRecipe"])
    with pytest.raises(
        RecipeError, match="class FedAvgRecipe is defined in the script itself: put it into a module beside"
    ):
        check_travels(of_script)

    class InsideRecipe(FedAvgRecipe):
        pass

    with pytest.raises(
        RecipeError, match=r"defined inside a function of .*test_own_code: define it at the top of a module"
    ):
        check_travels(folder.recipe(InsideRecipe))


def test_the_command_stages_a_class_of_a_module_and_refuses_one_of_the_file_itself(folder: Folder) -> None:
    folder.write("halves.py", HALVES)
    fields = "name='job', min_clients=2, num_rounds=2, model={'w': np.zeros(3)}, train_script='client.py'"
    folder.write("job.py", f"import numpy as np\nfrom halves import FedAvgRecipe\nrecipe = FedAvgRecipe({fields})\n")
    folder.write("all.py", f"import numpy as np\n{textwrap.dedent(HALVES)}\nrecipe = FedAvgRecipe({fields})\n")
    words = ("-m", "fedpool.cli", "job", "stage")
    options = ("--sites", "site-1", "--sites", "site-2", "--store", str(folder.path / "store"))
    done = run(folder.path, *words, "job.py", *options)
    assert done.returncode == 0, done.stdout
    template = done.stdout.split()[-1]
    assert folder.store.read_json(JobPaths(template).job)["code"]["modules"] == ["halves"]
    done = run(folder.path, *words, "all.py", *options)
    assert done.returncode == 1 and "defined in the script itself: put it into a module" in done.stdout


def test_what_is_installed_is_told_from_what_is_the_users() -> None:
    assert all(is_installed(name) for name in ("os", "json.decoder", "sys", "torch", "fedpool.flows.fedavg", "pytest"))
    assert not any(is_installed(name) for name in ("no_such_module", "tests.own_algorithm"))
    assert find_home("__main__") is None and find_home("sys") is None and find_home("no_such_module") is None
    home = find_home("tests.own_algorithm")
    assert home is not None and home.root == ROOT and home.file == ROOT / "tests/own_algorithm.py"


def test_what_is_asked_for_shows_names_as_they_are_and_moves_no_cursor() -> None:
    files = ("a.py", "b\x1b[2K\r.py", *(f"{number}.py" for number in range(30)))
    asked = str(Request("job-1", "m:C\nallowed", ("m",), files, "0" * 64, "store/code.zip"))
    assert asked.isprintable() and r"m:C\nallowed (a.py, b\x1b[2K\r.py, 0.py" in asked and "17.py and 12 more)" in asked


def test_a_run_of_an_own_class_that_leaves_fields_out_goes_by_the_template(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("halves.py", HALVES)
    folder.stage("halves:FedAvgRecipe", site_patience_s=7.5)
    assert deployed._needs(folder.store, "job-1", {}) == (2, 7.5)
    assert deployed._needs(folder.store, "job-1", {"min_clients": 1}) == (1, 7.5)
    with pytest.raises(RecipeError, match=r"there is no staged job 'job-9' in .*: deploy the recipe again"):
        deployed._needs(folder.store, "job-9", {})
    monkeypatch.setenv(VARIABLE, "any")
    made = deployed._remade(None, "job-1", folder.store, ["a", "b"], False, {"share": 0.125})
    assert (made.site_patience_s, made.share) == (7.5, 0.125)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="share"):
        deployed._remade(None, "job-1", folder.store, ["a", "b"], False, {"share": "much"})
