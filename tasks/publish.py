"""Makes submitted models, and earlier global models, the global model of a later round that scores
them.

A submitted model is written tensor by tensor, in the dtypes that it came in. Parameters that stay
at the sites (`exclude_vars`) aren't part of it: they are the job's own, as in every global model.
"""

from collections.abc import Sequence
from typing import Any

from fedpool.errors import IntegrityError, ModelChanged
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.gate import Accepted
from fedpool.tasks.record import SubmittedModel
from fedpool.tasks.weighing import UpdateChanged
from fedpool.tensor_stream import Writable, write_and_hash
from fedpool.tensors import Digest, Tensors, block_ranges, file_order


class _Nowhere:
    """A file that discards its data, for computing a hash."""

    def write(self, data: Any, /) -> None:
        """Discard the data."""


def copy_model(store: Store, source: str, digest: Digest, target: str) -> None:
    """Copy a global model, as that of another round.

    Raises:
        IntegrityError: it doesn't match its digest.
        StoreError: the target exists already.
    """
    model = store.tensors(source, digest.size)
    with store.staged(target) as file:
        if (found := _write(file, model, model, store.block_elements)) != digest:
            raise IntegrityError(f"{store.full(source)} has sha256 {found.sha256}, but {digest.sha256} was committed")


def publish_submitted(
    store: Store,
    paths: JobPaths,
    base: Tensors,
    updates: Sequence[Accepted],
    first: int,
    arithmetic: Arithmetic = CURRENT,
) -> tuple[list[SubmittedModel], list[UpdateChanged]]:
    """Write each submitted model as the global model of a round: from `first` on, in site order.

    Returns: an entry of the record's `models` for each; and the updates that have changed since the
    gate checked them.
    """
    models: list[SubmittedModel] = []
    changed: list[UpdateChanged] = []
    for update in arithmetic.by_site(updates, lambda update: update.site):
        if update.tensors is None:  # the site has no model of its own
            continue
        try:
            with store.staged(paths.global_model(first + len(models))) as file:
                digest = _write(file, base, update.tensors, store.block_elements)
        except ModelChanged:
            raise
        except (IntegrityError, FileNotFoundError) as error:
            changed.append(UpdateChanged(update, str(error)))
        else:
            models.append(model_entry(update, digest))
    return models, changed


def model_entry(update: Accepted, digest: Digest) -> SubmittedModel:
    """The record's entry for a model that was submitted in its round."""
    return SubmittedModel(owner=update.site, round=update.manifest.round, sha256=digest.sha256, size=digest.size)


def submitted_digest(base: Tensors, update: Tensors, block_elements: int) -> Digest:
    """Digest of the file that `publish_submitted` writes."""
    return _write(_Nowhere(), base, update, block_elements)


def _write(file: Writable, base: Tensors, update: Tensors, block_elements: int) -> Digest:
    homes: dict[str, Tensors] = {name: update if name in update.spec else base for name in base.spec}
    spec = {name: home.spec[name] for name, home in homes.items()}
    return write_and_hash(
        file,
        spec,
        (
            homes[name].read_block(*block)
            for name in file_order(spec)
            for block in block_ranges(name, spec[name].num_elements, block_elements)
        ),
    )
