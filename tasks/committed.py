"""The global models and strategies' states that a job's records name, read in checked blocks.

Whatever a round computes with is what was committed: not one block of a file that someone who can
write to the store has changed in the meantime. The tags of the blocks are taken while a round
writes them. For an object that this process hasn't written, they are taken when its first block is
read, from one pass over all of it.
"""

import threading
from collections import OrderedDict
from functools import partial

from fedpool.checked import BlockTags, CheckedTensors, tags_of
from fedpool.errors import IntegrityError, ModelChanged
from fedpool.store import Store
from fedpool.tensors import Digest, Spec, TensorReader

_NUM_KNOWN = 16
"""Objects whose tags are kept: a round's model and state, and the models that late updates need."""


class Committed:
    """Opens the committed objects of a job. Thread-safe.

    Args:
        store: the job's store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[Digest, BlockTags] = OrderedDict()
        self._lock = threading.Lock()
        self._taking = threading.Lock()

    def note(self, digest: Digest, tags: BlockTags) -> None:
        """Keep the tags of an object from when it was written."""
        with self._lock:
            self._known[digest] = tags
            self._known.move_to_end(digest)
            while len(self._known) > _NUM_KNOWN:
                self._known.popitem(last=False)

    def tensors(self, path: str, digest: Digest, spec: Spec | None = None) -> CheckedTensors:
        """An object's tensors. Their first block may take as long as reading all of them.

        Args:
            digest: from the record.
            spec: names, dtypes and shapes that it must have, if they are known.

        Raises:
            ModelChanged: it is missing or isn't the committed one; reading a block raises this too.
        """
        try:
            reader = self._store.tensors(path, digest.size)
        except FileNotFoundError:
            raise ModelChanged(f"{self._store.full(path)} is missing") from None
        except IntegrityError as error:
            raise ModelChanged(str(error)) from error
        if spec is not None and reader.spec != spec:
            raise ModelChanged(f"{reader.where} is not the model of this job: its names, dtypes or shapes differ")
        opened = CheckedTensors(reader, partial(self._tags, reader, digest), ModelChanged)
        if self._of(digest) is not None:
            opened.take_tags()
        return opened

    def checked(self, path: str, digest: Digest) -> CheckedTensors:
        """An object's tensors, all of which have been read and compared with its digest.

        Raises:
            ModelChanged: it is missing or isn't the committed one.
        """
        is_known = self._of(digest) is not None  # from another file, perhaps
        opened = self.tensors(path, digest)
        if is_known:
            opened.check()
        else:
            opened.take_tags()
        return opened

    def _of(self, digest: Digest) -> BlockTags | None:
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
            return self._known.get(digest)

    def _tags(self, reader: TensorReader, digest: Digest) -> BlockTags:
        with self._taking:  # the gate judges several updates at once
            if (known := self._of(digest)) is not None:
                return known
            tags = tags_of(reader, digest, self._store.block_elements)
            self.note(digest, tags)
            return tags
