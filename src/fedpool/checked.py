"""Tensors that are read in checked blocks, so that what is used is what was hashed.

The file of an update or a global model can change after it was hashed, and it is used block by
block, some blocks more than once. So whoever hashes it also takes a *tag* of each block, and every
later read has to fit the tags.

A tag is GMAC (NIST SP 800-38D) under a key that nobody else ever has: twenty times as fast as
sha256. Tags stay in memory and are shown to nobody. So one nonce serves all blocks: two blocks have
the same tag with a probability below 2^-100, whoever chooses them.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from fedpool.digest import mismatch
from fedpool.errors import IntegrityError, ModelChanged
from fedpool.tensors import ITEM_SIZES, BlockBytes, Digest, Spec, TensorReader, blocks_of

_TAG_BYTES = 16
_NONCE = bytes(12)


class BlockTags:
    """The tags of a file of tensors: 16 bytes for each block. Thread-safe.

    Args:
        spec: of the tensors.
        block_elements: elements of a block; the last of a tensor may have fewer.
    """

    __slots__ = ("_cipher", "_tags", "block_elements", "spec")

    def __init__(self, spec: Spec, block_elements: int) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # client scripts needn't wait for it

        self.spec = dict(spec)
        self.block_elements = block_elements
        self._cipher: Any = AESGCM(AESGCM.generate_key(128))
        self._tags = {
            name: bytearray(-(-entry.num_elements // block_elements) * _TAG_BYTES) for name, entry in spec.items()
        }

    def take(self, name: str, start: int, data: BlockBytes) -> None:
        """Take the tag of the block of `name` that begins at element `start`."""
        self._tags[name][self._at(start)] = self._tag(data)

    def fit(self, name: str, start: int, data: BlockBytes) -> bool:
        """Whether a block is the one whose tag was taken."""
        return self._tags[name][self._at(start)] == self._tag(data)

    def _at(self, start: int) -> slice:
        index, rest = divmod(start, self.block_elements)
        assert rest == 0, "a block begins at a multiple of its size"
        return slice(index * _TAG_BYTES, (index + 1) * _TAG_BYTES)

    def _tag(self, data: BlockBytes) -> bytes:
        tag: bytes = self._cipher.encrypt(_NONCE, b"", data)
        return tag


def take_tags(
    reader: TensorReader, block_elements: int, look: Callable[[str, str, int, BlockBytes], object] | None = None
) -> tuple[Digest, BlockTags]:
    """Read a file once: its digest, and the tags of its blocks.

    Args:
        look: called with the name, dtype and first element of each block, and its bytes.
    """
    tags, digest, size = BlockTags(reader.spec, block_elements), hashlib.sha256(reader.head), len(reader.head)
    for name, start, stop in blocks_of(reader.spec, block_elements):
        data = reader.read_block(name, start, stop)
        digest.update(data)
        tags.take(name, start, data)
        size += len(data)
        if look is not None:
            look(name, reader.spec[name].dtype, start, data)
    return Digest(digest.hexdigest(), size), tags


def tags_of(reader: TensorReader, digest: Digest, block_elements: int) -> BlockTags:
    """The tags of a global model or a strategy's state, from one pass over its file.

    Raises:
        ModelChanged: it doesn't match its digest, or is gone.
    """
    try:
        found, tags = take_tags(reader, block_elements)
    except (IntegrityError, FileNotFoundError) as error:
        raise ModelChanged(str(error)) from error
    if found != digest:
        raise ModelChanged(mismatch(reader.where, found, digest))
    return tags


class CheckedTensors:
    """Tensors whose blocks fit their tags whenever they are read. Thread-safe.

    Args:
        reader: reads the file.
        tags: returns the tags; called when the first block is read.
        changed: makes the error to raise for a block that doesn't fit, from the reason.
    """

    def __init__(
        self,
        reader: TensorReader,
        tags: Callable[[], BlockTags],
        changed: Callable[[str], IntegrityError] = IntegrityError,
    ) -> None:
        self.spec: Spec = reader.spec
        self._reader = reader
        self._take = tags
        self._tags: BlockTags | None = None
        self._changed = changed

    def read_block(self, name: str, start: int, stop: int) -> BlockBytes:
        """See `Tensors.read_block`.

        Raises:
            IntegrityError: the block isn't the one whose tag was taken.
        """
        if start == stop:
            return bytearray()
        tags = self.take_tags()
        size, num_elements = tags.block_elements, self.spec[name].num_elements
        first = start - start % size
        if start == first and stop == min(first + size, num_elements):  # the usual case
            return self._block(tags, name, start, stop)
        item = ITEM_SIZES[self.spec[name].dtype]
        whole = bytearray().join(self._around(tags, name, first, stop))
        return whole[(start - first) * item : (stop - first) * item]

    def take_tags(self) -> BlockTags:
        """The tags, taken now unless they were before."""
        if self._tags is None:
            tags = self._take()
            if tags.spec != self.spec:
                where = self._reader.where
                raise self._changed(f"{where} was changed after it was checked: its names or shapes differ")
            self._tags = tags
        return self._tags

    def check(self) -> None:
        """Read all blocks; raises `IntegrityError` for the first that doesn't fit."""
        tags = self.take_tags()
        for name, start, stop in blocks_of(self.spec, tags.block_elements):
            self._block(tags, name, start, stop)

    def _around(self, tags: BlockTags, name: str, first: int, stop: int) -> Iterator[BlockBytes]:
        size, num_elements = tags.block_elements, self.spec[name].num_elements
        for start in range(first, stop, size):
            yield self._block(tags, name, start, min(start + size, num_elements))

    def _block(self, tags: BlockTags, name: str, start: int, stop: int) -> BlockBytes:
        try:
            data = self._reader.read_block(name, start, stop)
        except (IntegrityError, FileNotFoundError) as error:  # it is shorter now, or gone
            raise self._changed(f"{self._reader.where} was changed after it was checked: {error}") from error
        if not tags.fit(name, start, data):
            raise self._changed(f"{self._reader.where} was changed after it was checked: {name!r} differs")
        return data
