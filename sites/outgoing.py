"""What happens to an update before it leaves a site: the host's own steps, then the filters.

The host drops the parameters that the recipe excludes, and subtracts the global model if the recipe
asks for differences. A script cannot bypass these steps. Its own process drops excluded parameters
as well, because it keeps them; that saves writing them here, but nothing relies on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fedpool.arrays import as_bytes, numpy_dtype, torch_block
from fedpool.checked import CheckedTensors, tags_of
from fedpool.errors import FilterError, IntegrityError, ModelChanged, SiteError
from fedpool.exclude import excluded
from fedpool.filters import ComputedTensors, Filter, Passage
from fedpool.inspection import Inspection, inspect_tensors, write_and_inspect
from fedpool.local_file import LocalFile, open_file
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.sites.output import LogLine
from fedpool.store import Store
from fedpool.tensors import BlockBytes, Digest, TensorReader, Tensors, TensorSpec, is_beside, split_beside

ParamsKind = Literal["FULL", "DIFF"]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Prepares a site's update of one round, and puts it into the store.

    Attributes:
        trusted: nobody else can change the global model, so its bytes are not hashed again.
    """

    job: ClientJob
    assignment: SiteAssignment
    filters: Sequence[Filter]
    log: LogLine
    trusted: bool = False

    def deliver(
        self, written: Path, leaving: Path, model: Path, said: ParamsKind, store: Store, path: str
    ) -> tuple[Inspection, ParamsKind]:
        """Hash the update that a script has written, and put it into the store.

        Args:
            written: the script's file, which is removed.
            leaving: path of the host's own file. The script must not be able to write there, or the
                host could be made to overwrite another file.
            model: the round's global model.
            said: what the file contains according to the script.
            path: path in the store.

        Returns: the inspection of the update that leaves, and what it contains now.

        Raises:
            SiteError: a filter failed, which the message names, the script's file isn't one of
                tensors, or the global model isn't the assignment's any more.
        """
        asked = self.assignment
        try:
            found = _open(written)
        except IntegrityError as error:
            raise SiteError(asked.site, asked.round, f"its script has left no usable update: {error}") from error
        try:
            made, kind = self._made(found, model, said, store.block_elements)
            if made is found:  # the usual case: move it instead of writing it again
                seen = inspect_tensors(found, store.block_elements)
                store.adopt(written, path)
                return seen, kind
            with leaving.open("wb") as file:
                seen = write_and_inspect(file, made, store.block_elements)
        except (FilterError, ModelChanged) as error:
            raise SiteError(asked.site, asked.round, f"its update cannot leave: {error}") from error
        store.adopt(leaving, path)
        written.unlink()
        return seen, kind

    def _made(self, update: Tensors, model: Path, kind: ParamsKind, block_elements: int) -> tuple[Tensors, ParamsKind]:
        asked = self.assignment
        made = self._without_excluded(update)
        # A site's own model is scored at other sites, so it has to leave in full.
        if self.job.transfer == "DIFF" and kind == "FULL" and asked.task != "submit_model":
            made, kind = difference(made, self._base(model, block_elements)), "DIFF"
        if self.filters:
            base = self._base(model, block_elements)
            made = Passage(asked.site, asked.round, self.job.seed, base).send(self.filters, made)
        return made, kind

    def _base(self, model: Path, block_elements: int) -> Tensors:
        """The global model. It may be the store's own file, which others can change in place."""
        opened = _open(model)
        if self.trusted:
            return opened
        digest = Digest(self.assignment.base_sha256, self.assignment.base_size)
        return CheckedTensors(opened, partial(tags_of, opened, digest, block_elements), ModelChanged)

    def _without_excluded(self, update: Tensors) -> Tensors:
        homes = {name: split_beside(name)[1] if is_beside(name) else name for name in update.spec}
        staying = excluded(self.job.exclude, set(homes.values()))
        if not staying:
            return update
        kept_back = sorted(name for name, home in homes.items() if home in staying)
        self.log(f"these parameters stay here, because the recipe excludes them: {', '.join(kept_back[:8])}")
        spec = {name: entry for name, entry in update.spec.items() if homes[name] not in staying}
        return ComputedTensors(spec, update.read_block)


def difference(update: Tensors, base: Tensors) -> Tensors:
    """An update as its difference to the global model.

    Integers become int64, because unsigned ones would wrap around. Booleans have no difference and
    stay as they are. So do tensors beside the parameters, and tensors that do not fit the model:
    the gate judges those.
    """
    changed = {
        name: TensorSpec("I64", entry.shape) if entry.kind == "int" else entry
        for name, entry in update.spec.items()
        if entry.kind != "bool" and name in base.spec and base.spec[name].shape == entry.shape
    }

    def read(name: str, start: int, stop: int) -> BlockBytes:
        value = update.read_block(name, start, stop)
        if name not in changed:
            return value
        return _subtracted(value, update.spec[name], base.read_block(name, start, stop), base.spec[name])

    return ComputedTensors({**update.spec, **changed}, read)


def _subtracted(value: BlockBytes, spec: TensorSpec, base: BlockBytes, base_spec: TensorSpec) -> BlockBytes:
    """value - base of a block: floats in the value's dtype, integers in int64."""
    if spec.kind == "float":
        mine = torch_block(value, spec.dtype)
        return as_bytes(mine - torch_block(base, base_spec.dtype).to(mine.dtype))
    import numpy as np  # torch cannot subtract all of its unsigned integers

    ours, theirs = np.frombuffer(value, numpy_dtype(spec.dtype)), np.frombuffer(base, numpy_dtype(base_spec.dtype))
    return as_bytes(ours.astype(np.int64) - theirs.astype(np.int64))


def _open(path: Path) -> TensorReader:
    read = LocalFile(partial(open_file, path, follow=False))
    return TensorReader(read, path.lstat().st_size, where=str(path))
