"""Tools to break a job on purpose, for your tests and ours: kill a process at a named point, a
store that fails, a client that misbehaves. Nothing else in fedpool imports them.
"""

from pathlib import Path

from fedpool.testing.faults import Fault, Faults
from fedpool.testing.killer import kill_at

MISBEHAVING_CLIENT = Path(__file__).with_name("client.py")
"""The client script of `fedpool.testing.client`."""

__all__ = ["MISBEHAVING_CLIENT", "Fault", "Faults", "kill_at"]
