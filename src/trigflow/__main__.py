"""`python -m trigflow` is the command `trigflow`."""

from trigflow.cli import main

main()
