"""The initial model: whatever the user gives becomes independent plain tensors, or is refused."""

import io
import os
import sys
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fedpool.arrays import save_and_hash
from fedpool.errors import RecipeError
from fedpool.initial import InitialModel, initial_model
from fedpool.tensors import Digest, TensorSpec


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)


def plain(model: InitialModel) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.params.items()}


def saved(path: Path, params: dict[str, Any]) -> Path:
    with path.open("wb") as file:
        save_and_hash(file, params)
    return path


def test_a_module_gives_its_state_dict_with_buffers() -> None:
    net = Net()
    model = initial_model(net)
    assert model.spec["fc.weight"] == TensorSpec("F32", (2, 3))
    assert model.spec["norm.num_batches_tracked"] == TensorSpec("I64", ())
    assert plain(model) == {name: value.tolist() for name, value in net.state_dict().items()}
    assert model.num_parameters == sum(value.numel() for value in net.state_dict().values())


def test_training_the_module_afterwards_does_not_change_the_initial_model() -> None:
    net = Net()
    model = initial_model(net)
    before = plain(model)
    with torch.no_grad():
        net.fc.weight += 1
    assert plain(model) == before


def test_changing_a_numpy_state_dict_afterwards_does_not_change_the_initial_model() -> None:
    state = {"w": np.zeros(2)}
    model = initial_model(state)
    state["w"] += 1
    assert plain(model) == {"w": [0.0, 0.0]}


def test_a_state_dict_may_hold_torch_tensors_numpy_arrays_and_scalars() -> None:
    model = initial_model(
        OrderedDict(
            t=torch.ones(2, dtype=torch.bfloat16),
            n=np.ones(2, dtype=ml_dtypes.bfloat16),
            s=np.float32(3),
            b=np.array(True),
        )
    )
    assert {name: str(entry) for name, entry in model.spec.items()} == {
        "t": "BF16 [2]",
        "n": "BF16 [2]",
        "s": "F32 []",
        "b": "BOOL []",
    }
    assert float(model.params["s"]) == 3.0


def test_a_parameter_that_requires_gradients_is_detached() -> None:
    model = initial_model({"w": torch.nn.Parameter(torch.ones(2))})
    assert not model.params["w"].requires_grad


@pytest.mark.parametrize("as_text", [True, False])
def test_the_path_of_a_safetensors_file_gives_its_tensors(as_text: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", {"w": np.array([1.0, 2.0], dtype=np.float32)})
    assert plain(initial_model(str(path) if as_text else path)) == {"w": [1.0, 2.0]}


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}], ids=["plain", "nested"]
)
def test_the_path_of_a_torch_checkpoint_gives_its_state_dict(wrap: Any, tmp_path: Path) -> None:
    net = Net()
    torch.save(wrap(net.state_dict()), tmp_path / "model.pt")
    assert plain(initial_model(tmp_path / "model.pt")) == {
        name: value.tolist() for name, value in net.state_dict().items()
    }


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_a_pickled_object_is_refused_and_nothing_in_it_runs(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "trap": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(RecipeError, match=r"(?s)cannot be read as tensors.*torch\.save\(model\.state_dict\(\), path\)"):
        initial_model(tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(RecipeError, match="Save a state dict"):
        initial_model(tmp_path / "model.pt")


def test_a_checkpoint_that_is_not_there_is_refused_with_where_it_was_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"checkpoint 'model\.pt' is not a file") as refused:
        initial_model("model.pt")
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(("name", "kind"), [("model.pt", "tensors"), ("model.safetensors", "safetensors")])
def test_a_broken_checkpoint_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(RecipeError, match=f"{name}' cannot be read as {kind}"):
        initial_model(tmp_path / name)


def test_a_checkpoint_that_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "model.pt")
    with pytest.raises(RecipeError, match="contains a list, not a state dict"):
        initial_model(tmp_path / "model.pt")


@pytest.mark.parametrize("model", [None, 3, [torch.ones(1)], torch.ones(1)])
def test_anything_else_is_refused(model: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"model must be a torch\.nn\.Module, a state dict, or the path of a checkpoint"
    ):
        initial_model(model)


def test_a_class_where_an_instance_belongs_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"model is the class Net: give an instance, Net\(\)"):
        initial_model(Net)


@pytest.mark.parametrize("model", [{}, torch.nn.ReLU()])
def test_a_model_without_parameters_is_refused(model: Any) -> None:
    with pytest.raises(RecipeError, match="model has no parameters"):
        initial_model(model)


@pytest.mark.parametrize(
    ("value", "words"), [([1.0], r"params\['w'\] is a list"), (np.array([1j]), "dtype complex128"), (None, "NoneType")]
)
def test_a_state_dict_with_something_else_than_arrays_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=f"model: .*{words}"):
        initial_model({"w": value})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_values_of_a_checkpoint_replace_those_of_the_model(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"ckpt{suffix}"
    values = {"w": torch.tensor([5.0, 6.0])}
    if suffix == ".pt":
        torch.save(values, path)
    else:
        saved(path, values)
    model = initial_model({"w": torch.zeros(2)}, path)
    assert plain(model) == {"w": [5.0, 6.0]}
    assert model.spec == {"w": TensorSpec("F32", (2,))}


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({"w": torch.zeros(2)}, "b is missing"),
        ({"w": torch.zeros(2), "b": torch.zeros(1), "x": torch.zeros(1)}, "x is not in the model"),
        ({"w": torch.zeros(3), "b": torch.zeros(1)}, r"w: expected F32 \[2\], got F32 \[3\]"),
        ({"w": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(1)}, r"w: expected F32 \[2\], got I64 \[2\]"),
        ({f"layer{n}": torch.zeros(1) for n in range(9)}, r"\(and 6 more\)"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "many"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_parameters(
    checkpoint: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(RecipeError, match=rf"initial_ckpt '.*ckpt\.pt' does not fit the model: .*{words}"):
        initial_model({"w": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "ckpt.pt")


def test_the_digest_is_that_of_the_file_that_would_be_written() -> None:
    model = initial_model(Net())
    file = io.BytesIO()
    assert model.digest == save_and_hash(file, model.params)
    assert model.digest.size == len(file.getvalue())


def test_the_same_tensors_have_the_same_digest_as_torch_or_numpy() -> None:
    state = {"w": torch.arange(4.0), "n": torch.tensor(3)}
    digests: set[Digest] = {
        initial_model(state).digest,
        initial_model({name: state[name].numpy() for name in reversed(state)}).digest,
    }
    assert len(digests) == 1


def test_the_file_behind_the_values_has_no_name_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = initial_model({"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []
    assert plain(model) == {"w": [1.0, 1.0]}


NET = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
        lambda state: {"state_dict": state, "hyper_parameters": {}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_the_forms_in_which_training_loops_save_are_understood(wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(NET), tmp_path / "ckpt.pt")
    expected = {name: value.tolist() for name, value in NET.items()}
    assert plain(initial_model(tmp_path / "ckpt.pt")) == expected
    assert (
        plain(initial_model({name: torch.zeros_like(value) for name, value in NET.items()}, tmp_path / "ckpt.pt"))
        == expected
    )
    assert plain(initial_model(wrap(NET))) == expected


def test_a_parameter_may_be_called_model() -> None:
    assert plain(initial_model({"model": torch.ones(1), "state_dict": torch.zeros(1)})) == {
        "model": [1.0],
        "state_dict": [0.0],
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefixes_of_wrappers_do_not_matter_to_a_checkpoint(prefix: str, tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 1)
    torch.save({f"{prefix}{name}": value for name, value in net.state_dict().items()}, tmp_path / "wrapped.pt")
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    expected = {name: value.tolist() for name, value in net.state_dict().items()}
    assert plain(initial_model(torch.nn.Linear(2, 1), tmp_path / "wrapped.pt")) == expected
    wrapped = {f"{prefix}{name}": torch.zeros_like(value) for name, value in net.state_dict().items()}
    assert plain(initial_model(wrapped, tmp_path / "bare.pt")) == {f"{prefix}{name}": v for name, v in expected.items()}


def test_real_wrappers_give_checkpoints_that_fit(tmp_path: Path) -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager")
    assert isinstance(compiled, torch.nn.Module)  # its static type is only a callable
    wrappers: list[torch.nn.Module] = [torch.nn.DataParallel(net), compiled]
    for number, wrapped in enumerate(wrappers):
        torch.save(wrapped.state_dict(), tmp_path / f"{number}.pt")
        assert initial_model(Net(), tmp_path / f"{number}.pt").digest == initial_model(net).digest


def test_a_layer_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    state = {"module.w": torch.ones(1), "w": torch.zeros(1)}
    torch.save(state, tmp_path / "ckpt.pt")
    assert plain(initial_model(state, tmp_path / "ckpt.pt")) == {"module.w": [1.0], "w": [0.0]}
    with pytest.raises(RecipeError, match="does not fit the model"):  # which of the two is meant?
        initial_model({"w": torch.zeros(1)}, tmp_path / "ckpt.pt")


def test_numpys_files_are_understood(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", w=np.array([1.0, 2.0], np.float32), b=np.array([3.0], np.float32))
    np.save(tmp_path / "model.npy", np.array([1.0, 2.0]))
    assert plain(initial_model(tmp_path / "model.npz")) == {"w": [1.0, 2.0], "b": [3.0]}
    assert plain(initial_model({"w": np.zeros(2)}, tmp_path / "model.npy")) == {"w": [1.0, 2.0]}
    with pytest.raises(RecipeError, match=r"one array without a name: save it with one, numpy\.savez\(path, w=array\)"):
        initial_model(tmp_path / "model.npy")


def test_a_numpy_file_with_objects_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "model.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(RecipeError, match="cannot be read as a numpy array"):
        initial_model({"w": np.zeros(1)}, tmp_path / "model.npy")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("key", ["class_path", "path"])
def test_the_path_of_a_class_and_its_arguments_make_the_model(key: str) -> None:
    torch.manual_seed(3)
    model = initial_model({key: "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1}})
    torch.manual_seed(3)
    assert model.digest == initial_model(torch.nn.Linear(2, 1)).digest


def test_a_class_is_found_beside_the_client_script(tmp_path: Path) -> None:
    (tmp_path / "net_beside_the_script.py").write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
    form = {"class_path": "net_beside_the_script.Net", "args": {"in_features": 2, "out_features": 1}}
    with pytest.raises(RecipeError, match="cannot be imported"):
        initial_model(form)
    before = list(sys.path)
    assert set(initial_model(form, folder=tmp_path).spec) == {"weight", "bias"}
    assert sys.path == before


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (
            {"class_path": "torch.nn.Linaer"},
            r"'torch\.nn\.Linaer' cannot be imported .*write it as 'package\.module\.Class'",
        ),
        ({"class_path": "Net"}, "cannot be imported"),
        (
            {"class_path": "torch.nn.Linear", "args": {"in_features": 2}},
            "cannot be created here: TypeError: .*out_features",
        ),
        ({"class_path": "torch.nn.Linear", "in_features": 2}, "also in_features: put the class's arguments in 'args'"),
        ({"class_path": "torch.nn.Linear", "args": [2, 1]}, r"model\['args'\] is a list"),
    ],
)
def test_a_path_of_a_class_that_does_not_work_is_refused(form: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        initial_model(form)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_model_that_needs_cuda_when_it_is_made_is_refused_with_the_remedy() -> None:
    form = {"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1, "device": "cuda"}}
    with pytest.raises(
        RecipeError, match=r"cannot be created here: .*give a model that can be created on the CPU, or a state dict"
    ):
        initial_model(form)


def test_a_model_on_the_meta_device_needs_a_checkpoint(tmp_path: Path) -> None:
    net, empty = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1, device="meta")
    with pytest.raises(
        RecipeError, match=r"params\['weight'\] is on the meta device, .*give a checkpoint as initial_ckpt"
    ):
        initial_model(empty)
    torch.save(net.state_dict(), tmp_path / "ckpt.pt")
    assert initial_model(empty, tmp_path / "ckpt.pt").digest == initial_model(net).digest


def quantised() -> Any:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: torch.nn.LazyLinear(2).weight, "has no shape yet, because its module is lazy: run a batch"),
        (lambda: torch.ones(2).to_sparse(), r"is sparse \(torch\.sparse_coo\): make it dense with to_dense\(\)"),
        (quantised, r"is quantised \(torch\.quint8\): exchange the model from before quantisation"),
        (lambda: torch.ones(2, dtype=torch.complex64), r"is complex .*torch\.view_as_real\(\)"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), r"dtype torch\.float8_e4m3fn: convert it to one of"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "is a nested tensor"),
    ],
    ids=["lazy", "sparse", "quantised", "complex", "float8", "nested"],
)
def test_a_kind_of_tensor_that_cannot_travel_is_refused_by_name_with_the_remedy(value: Any, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that such tensors are new or deprecated
        tensor = value()
    with pytest.raises(RecipeError, match=rf"model: params\['w'\] .*{words}"):
        initial_model({"w": tensor})
