"""A soak with an independent checker: many connections do everything at random, then their stories are compared.

    python -m tests.soak --admissions 500000 --connections 16 [--dsn DSN]

plan      what is done: pools, workers, how much
clients   the connections: submit, claim, finish, cancel, ...; each writes down what it was told
changes   one more connection that changes the pools meanwhile
audit     triggers that write down what happened to the tables, and an observer who looks at them
replay    the ledger again, snapshot by snapshot, from the audit: capacity, depth, order of claims
answers   what the clients were told against the outcomes
runner    runs all that in a database; __main__ prints it

No check calls a function of pgpark: the evidence is rows of the tables and what the clients were told.
"""
