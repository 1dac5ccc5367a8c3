"""Everything that can break is broken on purpose, under load, with a real server and real worker processes; then the
accounts must balance.

postmaster.py has the server, lot.py the load, the workers and the audit, proxy.py a network that fails. Each test_*.py
breaks one kind of thing. Short in CI; `pytest -n 0 -s tests/chaos --chaos-minutes 5` breaks things for five minutes in
each scenario and prints what was survived.
"""
