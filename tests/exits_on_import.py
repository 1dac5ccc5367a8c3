"""A module that is no handler's: importing it ends the program."""

raise SystemExit(0)
