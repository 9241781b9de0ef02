"""Tools to break a job on purpose, for your tests and ours: kill a process at a named point, a store that fails, a client that
misbehaves. Nothing in fedpool itself imports them.
"""

from fedpool.testing.killer import kill_at

__all__ = ["kill_at"]
