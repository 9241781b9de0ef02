"""Upload a file as a new remote object, even if requests fail and answers are lost."""

from pathlib import Path

from fedpool import s3
from fedpool.backend import Backend

_CHUNK_BYTES = 16 << 20


class Upload:
    """The upload of a file: call it until it succeeds. It recognises what its earlier calls left.

    Args:
        backend: the remote file system.
        local: the file.
        target: full path of the object.
    """

    def __init__(self, backend: Backend, local: Path, target: str) -> None:
        self._backend = backend
        self._fs = backend.fs
        self._local = local
        self._target = target
        self._tried = False

    def __call__(self, *, conditional: bool) -> bool:
        """Try once; see `s3.put_new` for `conditional` and the return value.

        Raises:
            FileExistsError: another writer's object exists.
        """
        if self._backend.is_there(self._target):
            if not self._tried or not self._is_beginning():
                raise FileExistsError(self._target)
            if self._size_there() == self._size():
                return conditional
            self._fs.rm_file(self._target)  # our own, but truncated
        self._tried = True
        try:
            return s3.put_new(self._fs, self._local, self._target, conditional=conditional)
        except FileExistsError:
            # Another writer was faster, or the answer to our request was lost and the backend
            # repeated the request.
            if self._size_there() != self._size() or not self._is_beginning():
                raise
            return conditional

    def _size(self) -> int:
        return self._local.stat().st_size

    def _size_there(self) -> int:
        return int(self._fs.info(self._target)["size"])

    def _is_beginning(self) -> bool:
        """Whether our own try may have left the object: another writer's may be as long as ours."""
        size = self._size_there()
        if size > self._size():
            return False
        with self._local.open("rb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                ours = file.read(min(_CHUNK_BYTES, size - start))
                theirs = self._fs.cat_file(self._target, start=start, end=start + len(ours))
                if len(theirs) < len(ours):
                    raise OSError(f"{self._target} was truncated while it was read")
                if theirs != ours:
                    return False
        return True
