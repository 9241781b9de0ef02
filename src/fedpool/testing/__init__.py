"""Tools to break a job on purpose, in your tests and ours.

They kill a process at a named point, make a store fail, or make a client misbehave. No other part
of fedpool imports them.
"""

from pathlib import Path

from fedpool.testing.faults import Fault, Faults
from fedpool.testing.killer import kill_at

MISBEHAVING_CLIENT = Path(__file__).with_name("client.py")
"""The client script `fedpool.testing.client`."""

__all__ = ["MISBEHAVING_CLIENT", "Fault", "Faults", "kill_at"]
