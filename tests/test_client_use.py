"""A script that certainly cannot take part in rounds is refused when the recipe is built; in case
of doubt, there is only a note.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fedpool import RecipeError
from fedpool.bundle import Bundle, build_bundle


def built(folder: Path, script: str, others: Mapping[str, str] | None = None) -> Bundle:
    for name, text in {"client.py": script, **(others or {})}.items():
        (folder / name).write_text(text)
    return build_bundle(folder / "client.py", include=[name for name in others or {} if name.startswith("included")])


@pytest.mark.parametrize("script", ["", "\n# to be written\n", '"""My client, which uses fedpool."""\n'])
def test_an_empty_script_is_refused(script: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train_script client\.py is empty: write a loop with fedpool\.client"):
        built(tmp_path, script)


@pytest.mark.parametrize(
    ("script", "others", "where"),
    [
        ("import torch\nimport nvflare.client as flare\n", {}, r"client\.py line 2 imports nvflare\.client"),
        (
            "from nvflare.client.tracking import SummaryWriter\n",
            {},
            r"client\.py line 1 imports nvflare\.client\.tracking",
        ),
        ("from nvflare import client\n", {}, r"client\.py line 1 imports nvflare\.client"),
        (
            "import loop\n",
            {"loop.py": "import nvflare.client.lightning as flare\n"},
            r"loop\.py line 1 imports nvflare\.client",
        ),
    ],
)
def test_a_script_of_nvflare_is_told_the_command_that_migrates_it(
    script: str, others: dict[str, str], where: str, tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=rf"{where}.*, and nothing from fedpool: change its imports with `fedpool migrate \w+\.py`"
    ):
        built(tmp_path, script, others)


@pytest.mark.parametrize(
    "script",
    [
        "print('hello')\n",
        "import json\n",
        "try:\n    import nvflare.client\nexcept ImportError:\n    import installed\n",
        "import nvflare.apis.dxo\n",
        "import nvflare_tools\nfrom my.nvflare import client\n",
    ],
)
def test_a_script_in_which_nothing_names_fedpool_is_noted(script: str, tmp_path: Path) -> None:
    (note,) = built(tmp_path, script).notes
    assert note.startswith("neither client.py nor a file that travels with it names fedpool: ")


@pytest.mark.parametrize(
    ("script", "others"),
    [
        ("import fedpool.client as flare\n", {}),
        ("try:\n    import fedpool.client as flare\nexcept ImportError:\n    import nvflare.client as flare\n", {}),
        ("import nvflare.client\nif True:\n    from fedpool import client\n", {}),
        ("import importlib\nflare = importlib.import_module('fedpool.client')\n", {}),
        ("import loop\n", {"loop.py": "from fedpool.client import init\n"}),
        ("import runpy\nrunpy.run_path('included.py')\n", {"included.py": "import fedpool.client\n"}),
    ],
)
def test_any_other_script_is_left_alone(script: str, others: dict[str, str], tmp_path: Path) -> None:
    assert not [note for note in built(tmp_path, script, others).notes if "names fedpool" in note]
