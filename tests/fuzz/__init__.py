"""Calls with generated arguments, right ones and hostile ones, to everything that strangers can reach.

    python -m tests.fuzz --calls 100000 [--seed N] [--dsn DSN]

values      arguments: by name what a caller would give, by type what nobody should
statements  every public function of the schema, found in its catalog, called on several connections at once
commands    every command and option, found in the click group, run as `pgpark` runs them
parsers     the pieces of Python that read JSON and YAML of strangers
checks      what must hold afterwards: the accounts, capacity, the server
runner      runs all that in a database, round by round; __main__ prints it

What may come back is read from docs/errors.md: a result, or an error with a SQLSTATE or an exit code of its tables,
raised on purpose and in one line. Everything else is a finding, printed as the statement or command that repeats it.
"""
