"""`python -m fedpool.cli` is the command `fedpool`."""

from fedpool.cli import main

main()
