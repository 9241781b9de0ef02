"""The client bundle: what travels with a script, its address, and what is refused when it is built
or unpacked.
"""

import hashlib
import io
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedpool import bundle as module
from fedpool import stored_code as stored_code_module
from fedpool.bundle import Bundle, build_bundle, unpack_bundle
from fedpool.errors import IntegrityError, RecipeError
from fedpool.messages import NamedCode
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.stored_code import stored_code
from fedpool.user_code import Code, load_code


def folder_with(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def built(root: Path, files: Mapping[str, str], include: tuple[str, ...] = ()) -> Bundle:
    return build_bundle(folder_with(root, files) / "client.py", include)


def names(bundle: Bundle) -> list[str]:
    assert bundle.data is not None
    return zipfile.ZipFile(io.BytesIO(bundle.data)).namelist()


def zip_of(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


def test_a_lone_script_is_bundled_under_its_name(tmp_path: Path) -> None:
    bundle = built(tmp_path, {"client.py": "x = 1\n", "data.csv": "1,2", "other.py": "y = 2\n"})
    assert bundle.entry == "client.py"
    assert names(bundle) == ["client.py"]


def test_the_address_is_the_hash_of_the_zip(tmp_path: Path) -> None:
    bundle = built(tmp_path, {"client.py": "x = 1\n"})
    assert bundle.data is not None
    assert bundle.sha256 == hashlib.sha256(bundle.data).hexdigest()


def test_the_same_files_have_the_same_address_wherever_and_whenever_they_were_made(tmp_path: Path) -> None:
    files = {"client.py": "import b, a\n", "a.py": "x = 1\n", "b.py": "y = 1\n"}
    first = built(tmp_path / "here", files)
    second = built(tmp_path / "there", dict(reversed(files.items())))
    for name in files:
        os.utime(tmp_path / "there" / name, (1, 1))
    (tmp_path / "there" / "client.py").chmod(0o600)
    third = build_bundle(tmp_path / "there" / "client.py")
    assert first == second == third
    assert first.data == third.data


def test_another_byte_or_another_name_gives_another_address(tmp_path: Path) -> None:
    addresses = {
        built(tmp_path / str(number), files).sha256
        for number, files in enumerate(
            [
                {"client.py": "import a\n", "a.py": "x = 1\n"},
                {"client.py": "import a\n", "a.py": "x = 2\n"},
                {"client.py": "import a\n", "a/__init__.py": "x = 1\n"},
            ]
        )
    }
    assert len(addresses) == 3


@pytest.mark.parametrize(
    ("script", "others", "travels"),
    [
        pytest.param("import net", {"net.py": ""}, ["net.py"], id="import"),
        pytest.param("from net import Net", {"net.py": ""}, ["net.py"], id="from import"),
        pytest.param("from net import *", {"net.py": ""}, ["net.py"], id="star"),
        pytest.param("import net as n, torch", {"net.py": ""}, ["net.py"], id="alias, beside an installed package"),
        pytest.param("def f():\n    import net", {"net.py": ""}, ["net.py"], id="inside a function"),
        pytest.param(
            "try:\n    import net\nexcept ImportError:\n    pass", {"net.py": ""}, ["net.py"], id="inside try"
        ),
        pytest.param("import a", {"a.py": "import b", "b.py": "import a"}, ["a.py", "b.py"], id="in a circle"),
        pytest.param("import lib", {"lib/__init__.py": "", "lib/x.py": ""}, ["lib/__init__.py"], id="a package alone"),
        pytest.param(
            "import lib.x",
            {"lib/__init__.py": "", "lib/x.py": ""},
            ["lib/__init__.py", "lib/x.py"],
            id="module of a package",
        ),
        pytest.param(
            "from lib import x",
            {"lib/__init__.py": "", "lib/x.py": ""},
            ["lib/__init__.py", "lib/x.py"],
            id="from a package",
        ),
        pytest.param("from lib import x", {"lib/x.py": ""}, ["lib/x.py"], id="a folder without __init__"),
        pytest.param("import lib.sub.x", {"lib/sub/x.py": ""}, ["lib/sub/x.py"], id="nested folders without __init__"),
        pytest.param(
            "import lib",
            {"lib/__init__.py": "from . import x\nfrom .y import value", "lib/x.py": "", "lib/y.py": "value = 1"},
            ["lib/__init__.py", "lib/x.py", "lib/y.py"],
            id="relative imports",
        ),
        pytest.param(
            "import lib.sub",
            {
                "lib/__init__.py": "",
                "lib/sub/__init__.py": "from .leaf import x",
                "lib/sub/leaf.py": "from ..top import x\nfrom ... import nothing",
                "lib/top.py": "x = 1",
            },
            ["lib/__init__.py", "lib/sub/__init__.py", "lib/sub/leaf.py", "lib/top.py"],
            id="relative imports of the package above",
        ),
        pytest.param(
            "import net",
            {"net.py": "", "net/notes.py": ""},
            ["net.py"],
            id="a module beside a plain folder of its name",
        ),
        pytest.param(
            "import net",
            {"net.py": "", "net/__init__.py": ""},
            ["net/__init__.py"],
            id="a package beside a module of its name",
        ),
    ],
)
def test_what_a_script_imports_from_its_own_folder_travels(
    script: str, others: dict[str, str], travels: list[str], tmp_path: Path
) -> None:
    assert names(built(tmp_path, {"client.py": script, **others})) == sorted(["client.py", *travels])


def test_an_unpacked_bundle_runs_as_the_folder_did(tmp_path: Path) -> None:
    files = {
        "client.py": "import lib\nfrom plain import thing\nprint(lib.value + thing.value)\n",
        "lib/__init__.py": "from .part import value\n",
        "lib/part.py": "from .more import value\n",
        "lib/more.py": "value = 40\n",
        "plain/thing.py": "def late():\n    import util\n    return util.value\n\nvalue = late()\n",
        "util.py": "value = 2\n",
    }
    bundle = built(tmp_path / "home", files)
    assert bundle.data is not None
    away = tmp_path / "away"
    away.mkdir()
    unpack_bundle(bundle.data, away, sha256=bundle.sha256)
    ran = subprocess.run([sys.executable, str(away / bundle.entry)], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("42\n", "")


def test_imports_from_elsewhere_are_named_for_preloading(tmp_path: Path) -> None:
    bundle = built(
        tmp_path,
        {
            "client.py": "import torch.nn, net\nfrom torchvision.transforms import Compose\nimport fedpool.client as flare\n",
            "net.py": "def f():\n    import sklearn\n",
        },
    )
    assert bundle.imports == ("fedpool.client", "sklearn", "torch.nn", "torchvision.transforms.Compose")


def test_a_linked_script_brings_what_lies_beside_its_target(tmp_path: Path) -> None:
    folder_with(tmp_path / "real", {"client.py": "import net\n", "net.py": ""})
    link = tmp_path / "link.py"
    link.symlink_to(tmp_path / "real" / "client.py")
    assert names(build_bundle(link)) == ["client.py", "net.py"]


def test_includes_are_files_and_whole_folders_without_caches(tmp_path: Path) -> None:
    bundle = built(
        tmp_path,
        {
            "client.py": "import fedpool.client\n",
            "labels.txt": "a",
            "conf/a.json": "{}",
            "conf/deep/b.json": "{}",
            "conf/__pycache__/x.pyc": "",
            "other.txt": "",
        },
        include=("labels.txt", "conf"),
    )
    assert names(bundle) == ["client.py", "conf/a.json", "conf/deep/b.json", "labels.txt"]


def test_an_included_path_that_winds_back_into_the_folder_can_be_unpacked(tmp_path: Path) -> None:
    bundle = built(
        tmp_path / "home",
        {"client.py": "import fedpool.client\n", "conf/a.json": "{}", "labels.txt": "a"},
        include=("conf/../labels.txt",),
    )
    assert bundle.data is not None
    unpack_bundle(bundle.data, tmp_path / "away", sha256=bundle.sha256)
    assert (tmp_path / "away" / "labels.txt").read_text() == "a"


def test_an_included_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"include='labels\.txt' does not exist .*relative to the client script's folder"
    ):
        built(tmp_path, {"client.py": "import fedpool.client\n"}, include=("labels.txt",))


@pytest.mark.parametrize(
    "item", ["../secret.txt", "{root}/secret.txt", "link.txt", "linked", "conf/../../secret.txt", ".."]
)
def test_an_include_that_leads_outside_the_folder_is_refused(item: str, tmp_path: Path) -> None:
    folder_with(tmp_path, {"secret.txt": "s", "elsewhere/a.txt": "s", "home/client.py": "", "home/conf/a.json": "{}"})
    (tmp_path / "home" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "home" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="leads outside the client script's folder"):
        build_bundle(tmp_path / "home" / "client.py", (item.format(root=tmp_path),))


@pytest.mark.parametrize("script", ["nowhere.py", ".", ""])
def test_a_script_that_is_no_file_is_refused_with_where_it_was_sought(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="is not a file") as refused:
        build_bundle(script)
    assert repr(script) in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("broken", ["def f(:\n", "return 1\n", "x = '\n", "\0"])
def test_a_script_or_module_that_does_not_compile_is_refused_by_name(broken: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"client\.py does not compile"):
        built(tmp_path / "a", {"client.py": broken})
    with pytest.raises(RecipeError, match=r"lib/net\.py does not compile"):
        built(tmp_path / "b", {"client.py": "import lib.net", "lib/net.py": broken})


def test_too_large_a_bundle_is_refused_with_its_largest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUNDLE_BYTES", 2 << 20)
    folder_with(tmp_path, {"client.py": "import fedpool.client\n", "small.bin": "x", "large.bin": "x" * (5 << 19)})
    with pytest.raises(
        RecipeError, match=r"2\.5 MiB, over the limit of 2 MiB \(largest: large\.bin, 2\.5 MiB\).*train_args"
    ):
        build_bundle(tmp_path / "client.py", ("small.bin", "large.bin"))
    assert names(build_bundle(tmp_path / "client.py", ("small.bin",))) == ["client.py", "small.bin"]


def test_too_large_an_include_is_refused_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUNDLE_BYTES", 1 << 20)
    folder_with(tmp_path, {"client.py": "import fedpool.client\n"})
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(32 << 20)
    tracemalloc.start()
    with pytest.raises(RecipeError, match="over the limit of 1 MiB"):
        build_bundle(tmp_path / "client.py", ("data.bin",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_the_limit_is_64_mib() -> None:
    assert module.MAX_BUNDLE_BYTES == 64 * 1024 * 1024


def test_a_bundle_with_another_hash_is_not_unpacked(tmp_path: Path) -> None:
    data, _ = zip_of({"client.py": b""})
    with pytest.raises(IntegrityError, match=f"the bundle has sha256 .* but its job names {'0' * 64}"):
        unpack_bundle(data, tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "..", "a\\..\\evil.py", "sub/", "..\\evil.py"]
)
def test_a_bundle_that_would_write_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    data, sha256 = zip_of({name: b"evil"})
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(IntegrityError, match="is not a file inside its folder"):
        unpack_bundle(data, folder, sha256=sha256)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_in_a_bundle_is_unpacked_as_a_plain_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    unpack_bundle(buffer.getvalue(), tmp_path, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "/etc/passwd"


def test_a_bundle_that_would_unpack_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUNDLE_BYTES", 1 << 20)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(str(number), bytes(1 << 19))
    with pytest.raises(IntegrityError, match="unpack to more than 1 MiB"):
        unpack_bundle(buffer.getvalue(), tmp_path, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_bytes_of_the_right_hash_that_are_no_zip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="bundle"):
        unpack_bundle(b"no zip", tmp_path, sha256=hashlib.sha256(b"no zip").hexdigest())


def zip_that_declares(size: int, contents: int, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip whose only member, of zeros, says that it is smaller than it is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive, archive.open("client.py", "w") as member:
        for _ in range(contents >> 20):
            member.write(bytes(1 << 20))
    data = bytearray(buffer.getvalue())
    directory = data.rindex(b"PK\x01\x02")
    for at in (22, directory + 24):  # in the member's header, and in the directory
        data[at : at + 4] = size.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_is_larger_than_it_declares_is_refused_before_it_fills_the_memory(
    kind: int, tmp_path: Path
) -> None:
    data = zip_that_declares(10, 128 << 20, kind)
    assert len(data) < 1 << 20
    tracemalloc.start()
    with pytest.raises(IntegrityError, match=r"client\.py"):
        unpack_bundle(data, tmp_path, sha256=hashlib.sha256(data).hexdigest())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_too_many_files_is_refused_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 3)
    files = {"client.py": "import fedpool.client\n", **{f"conf/{number}.json": "{}" for number in range(3)}}
    with pytest.raises(RecipeError, match=r"would contain 4 files, over the limit of 3: .*include"):
        built(tmp_path, files, include=("conf",))
    data, sha256 = zip_of({str(number): b"" for number in range(4)})
    with pytest.raises(IntegrityError, match="contains 4 files, but only 3 are allowed"):
        unpack_bundle(data, tmp_path / "away", sha256=sha256)


def test_the_code_of_a_job_is_unpacked_as_carefully(tmp_path: Path) -> None:
    data = zip_that_declares(10, 128 << 20)
    tracemalloc.start()
    with pytest.raises(IntegrityError, match=r"client\.py"):
        load_code(Code(("client",), hashlib.sha256(data).hexdigest(), data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_zip_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, named = Store(tmp_path), NamedCode(sha256="a" * 64, modules=("m",))
    store.write_bytes(JobPaths("job-1").code(named.sha256), bytes(101))
    monkeypatch.setattr(stored_code_module, "MAX_ZIP_BYTES", 100)
    with pytest.raises(IntegrityError, match=r"code-a*\.zip has 101 bytes, but only 100 are allowed"):
        stored_code("job-1", store, named)
