"""The HTTP gateway: pgpark for callers without a connection to Postgres. `pgpark serve` runs it; docs/gateway.md.

app.py puts it together. Each family of routes is a module with an APIRouter; what a caller may do is decided in SQL, by
the token that it carries (sql/functions/tokens.sql). Needs the extra `gateway`; nothing outside this package imports
it, but the command line when it is asked to serve.
"""
