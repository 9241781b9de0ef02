"""Scripts that set environment variables before an import: detected in the source, in execution
order.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedpool import Run
from fedpool.bundle import Bundle, build_bundle

SETS = {
    "assigned": "import os\nos.environ['HF_HOME'] = '/x'\nimport transformers\n",
    "by another name": "from os import environ\nenviron['HF_HOME'] = '/x'\nimport transformers\n",
    "by an alias": "import os as system\nsystem.environ['HF_HOME'] = '/x'\nimport transformers\n",
    "imported by another name": "from os import environ as env\nenv['HF_HOME'] = '/x'\nimport transformers\n",
    "assigned to another name": "import os as o\ne = o.environ\ne['HF_HOME'] = '/x'\nimport transformers\n",
    "assigned with a type": "import os\ne: dict = os.environ\ne.update(HF_HOME='/x')\nimport transformers\n",
    "assigned in an expression": "import os\n(e := os.environ)['HF_HOME'] = '/x'\nprint(e)\ne.pop('X')\nimport transformers\n",
    "merged by another name": "import os\ne = os.environ\ne |= {'HF_HOME': '/x'}\nimport transformers\n",
    "put by another name": "from os import putenv as put\nput('HF_HOME', '/x')\nimport transformers\n",
    "a name from a module": "from names import env as e\ne['HF_HOME'] = '/x'\nimport transformers\n",
    "a name from a module, by a star": "from names import *\nenv['HF_HOME'] = '/x'\nimport transformers\n",
    "in a function of a module, by another name": "from setters import prepare as go\ngo()\nimport transformers\n",
    "from a file, by another name": "from dotenv import load_dotenv as load\nload()\nimport transformers\n",
    "a default": "import os\nos.environ.setdefault('HF_HOME', '/x')\nimport transformers\n",
    "several": "import os\nos.environ.update({'CUDA_VISIBLE_DEVICES': '0', 'HF_HOME': '/x'})\nimport transformers\n",
    "several by keyword": "import os\nos.environ.update(HF_HOME='/x')\nimport transformers\n",
    "merged": "import os\nos.environ |= {'HF_HOME': '/x'}\nimport transformers\n",
    "put": "import os\nos.putenv('HF_HOME', '/x')\nimport transformers\n",
    "removed": "import os\ndel os.environ['HF_HOME']\nimport transformers\n",
    "popped": "import os\nos.environ.pop('HF_HOME', None)\nimport transformers\n",
    "computed": "import os\nfor name in ['HF_HOME']:\n    os.environ[name] = '/x'\nimport transformers\n",
    "from a file": "from dotenv import load_dotenv\nload_dotenv()\nimport transformers\n",
    "under a condition": "import os\nif 'HF_HOME' not in os.environ:\n    os.environ['HF_HOME'] = '/x'\nimport transformers\n",
    "in a function that is called": (
        "import os\ndef prepare():\n    os.environ['HF_HOME'] = '/x'\nprepare()\nimport transformers\n"
    ),
    "by way of another function": (
        "import os\ndef inner():\n    os.environ['HF_HOME'] = '/x'\ndef outer():\n    inner()\nouter()\nimport transformers\n"
    ),
    "imported in a function": (
        "import os\nos.environ['HF_HOME'] = '/x'\ndef main():\n    from transformers import AutoModel\nmain()\n"
    ),
    "both in functions": "import os\ndef main():\n    os.environ['HF_HOME'] = '/x'\n    import transformers\nmain()\n",
    "between two imports": "import os\nimport numpy\nos.environ['HF_HOME'] = '/x'\nfrom transformers import AutoModel\n",
    "in a module beside it": "import settings\nimport transformers\n",
    "in a function of a module": "from setters import prepare\nprepare()\nimport transformers\n",
}
SETS_NOT = {
    "after all imports": "import os\nimport transformers\nos.environ['HF_HOME'] = '/x'\n",
    "in a function, after all imports": "import os\nimport transformers\ndef main():\n    os.environ['HF_HOME'] = '/x'\nmain()\n",
    "in a function that nobody calls before": "from setters import prepare\nimport transformers\nprepare()\n",
    "only read": "import os\nhome = os.environ['HOME']\nimport transformers\n",
    "read when it is used": "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '0'\nimport torch\n",
    "before Python's own": "import os\nos.environ['X'] = '1'\nimport json\nimport fedpool.client as flare\n",
    "before what is imported already": (
        "import os\nimport transformers\nos.environ['X'] = '1'\ndef main():\n    import transformers\n"
    ),
    "in a copy": "import os\ne = os.environ.copy()\ne['HF_HOME'] = '/x'\nimport transformers\n",
    "only read by another name": "from os import environ as env\nhome = env['HOME']\ne = env\nimport transformers\n",
    "a name that becomes another's": "import os\ne = os.environ\ne = {}\nimport transformers\n",
    "in another dict": "environment = {}\nenvironment['HF_HOME'] = '/x'\nimport transformers\n",
}


def built(folder: Path, script: str) -> Bundle:
    (folder / "settings.py").write_text("import os\nos.environ['HF_HOME'] = '/x'\n")
    (folder / "setters.py").write_text("import os\ndef prepare():\n    os.environ['HF_HOME'] = '/x'\n")
    (folder / "names.py").write_text("import os\nenv = os.environ\n")
    (folder / "client.py").write_text(f"{script}\n# fedpool\n")
    return build_bundle(folder / "client.py")


@pytest.mark.parametrize("script", SETS.values(), ids=SETS)
def test_nothing_is_imported_for_a_script_that_sets_a_variable_first(script: str, tmp_path: Path) -> None:
    bundle = built(tmp_path, script)
    assert bundle.imports == ()
    (note,) = bundle.notes
    assert "imports transformers after that" in note
    assert "nothing is imported in advance" in note


def test_the_note_says_where(tmp_path: Path) -> None:
    assert built(tmp_path, SETS["assigned"]).notes == (
        "client.py line 2 sets os.environ['HF_HOME'], and client.py line 3 imports transformers after that: nothing is "
        "imported in advance, so each site takes longer to start",
    )
    assert built(tmp_path, SETS["in a module beside it"]).notes[0].startswith("settings.py line 2 sets")
    assert (
        built(tmp_path, SETS["in a function that is called"])
        .notes[0]
        .startswith("client.py line 4 sets environment variables in prepare()")
    )


@pytest.mark.parametrize("script", SETS_NOT.values(), ids=SETS_NOT)
def test_other_scripts_are_forked_from_a_process_that_has_imported_what_they_need(script: str, tmp_path: Path) -> None:
    bundle = built(tmp_path, script)
    assert bundle.imports and bundle.notes == ()


READS_AT_IMPORT = (
    "import os\nMODE = os.environ.get('MODE_OF_LIBRARY', 'unset')\nNUMBER = __import__('numpy').random.rand()\n"
)
SCRIPT = """
    import os, random
    os.environ["MODE_OF_LIBRARY"] = "mine"
    import a_library
    import numpy as np
    import torch
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        flare.send(flare.FLModel(
            params={"w": np.full(3, a_library.MODE == "mine", np.float32)},
            metrics={f"drawn{n}": value for n, value in enumerate(drawn)},
        ))
"""


def test_a_library_sees_what_the_script_has_set_and_the_draws_are_those_of_every_run(
    run_job: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "installed"
    library.mkdir()
    (library / "a_library.py").write_text(READS_AT_IMPORT)
    monkeypatch.setenv("PYTHONPATH", str(library))
    results = [run_job(SCRIPT, num_rounds=1, env={"num_clients": 2}).get_result() for _ in range(2)]
    assert results[0].params["w"].tolist() == [1, 1, 1]
    assert results[0].site_metrics == results[1].site_metrics
    first, second = results[0].site_metrics.values()
    assert first["drawn1"] != second["drawn1"] and first["drawn2"] != second["drawn2"]
