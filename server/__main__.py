"""`python -m server` is the command `loramux`."""

from server.cli import main

main()
