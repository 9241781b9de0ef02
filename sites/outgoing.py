"""What leaves a site of an update: the host's own steps, which no script can get round, then the
recipe's filters.

The host drops what the recipe excludes and subtracts the global model where the recipe asks for
differences. A script's own process drops excluded parameters, too, because it keeps them; that
saves writing them here, and nothing relies on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpool.arrays import as_bytes, numpy_dtype, torch_block
from fedpool.errors import FilterError, SiteError
from fedpool.exclude import excluded
from fedpool.filters import ComputedTensors, Filter, Passage
from fedpool.inspection import Inspection, inspect_tensors, write_and_inspect
from fedpool.local_file import LocalFile
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.sites.output import LogLine
from fedpool.store import Store
from fedpool.tensors import BlockBytes, TensorReader, Tensors, TensorSpec, is_beside, split_beside

ParamsKind = Literal["FULL", "DIFF"]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is done to the updates of a site in a round before they leave it."""

    job: ClientJob
    assignment: SiteAssignment
    filters: Sequence[Filter]
    log: LogLine

    def deliver(
        self, written: Path, model: Path, said: ParamsKind, store: Store, path: str
    ) -> tuple[Inspection, ParamsKind]:
        """Put what a script has written into the store, as it is to leave; it is hashed here, and
        not in the script.

        Args:
            written: the script's file, which is gone after that.
            model: the round's global model.
            said: what the script says that it holds.
            path: in the store.

        Returns: what was seen of it, and what it holds now.

        Raises:
            SiteError: a filter failed; the message names it.
        """
        found = _open(written)
        try:
            made, kind = self._made(found, model, said)
            if made is found:  # as nearly always: it is moved, and not written once more
                seen = inspect_tensors(found, store.block_elements)
                store.adopt(written, path)
                return seen, kind
            leaving = written.with_name(f"leaving-{written.name}")
            with leaving.open("wb") as file:
                seen = write_and_inspect(file, made, store.block_elements)
        except FilterError as error:
            raise SiteError(self.assignment.site, self.assignment.round, f"its update cannot leave: {error}") from error
        store.adopt(leaving, path)
        written.unlink()
        return seen, kind

    def _made(self, update: Tensors, model: Path, kind: ParamsKind) -> tuple[Tensors, ParamsKind]:
        asked = self.assignment
        made = self._without_excluded(update)
        # A site's own model is to be scored at other sites, as it is.
        if self.job.transfer == "DIFF" and kind == "FULL" and asked.task != "submit_model":
            made, kind = difference(made, _open(model)), "DIFF"
        if self.filters:
            made = Passage(asked.site, asked.round, self.job.seed, _open(model)).send(self.filters, made)
        return made, kind

    def _without_excluded(self, update: Tensors) -> Tensors:
        homes = {name: split_beside(name)[1] if is_beside(name) else name for name in update.spec}
        staying = excluded(self.job.exclude, set(homes.values()))
        if not staying:
            return update
        kept_back = sorted(name for name, home in homes.items() if home in staying)
        self.log(f"kept here, because the recipe excludes it: {', '.join(kept_back[:8])}")
        spec = {name: entry for name, entry in update.spec.items() if homes[name] not in staying}
        return ComputedTensors(spec, update.read_block)


def difference(update: Tensors, base: Tensors) -> Tensors:
    """An update as its difference to the global model; integers as int64, because unsigned ones
    would wrap around.

    A boolean has no difference and stays as it is; so does what lies beside parameters, and what
    does not fit the model, which is for the gate to judge.
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
    """value - base of a block: of floating point numbers in the value's dtype, of integers in
    int64.
    """
    if spec.kind == "float":
        mine = torch_block(value, spec.dtype)
        return as_bytes(mine - torch_block(base, base_spec.dtype).to(mine.dtype))
    import numpy as np  # torch cannot do this for all of its unsigned integers

    ours, theirs = np.frombuffer(value, numpy_dtype(spec.dtype)), np.frombuffer(base, numpy_dtype(base_spec.dtype))
    return as_bytes(ours.astype(np.int64) - theirs.astype(np.int64))


def _open(path: Path) -> TensorReader:
    return TensorReader(LocalFile(path), path.stat().st_size, where=path.name)
