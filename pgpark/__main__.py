"""`python -m pgpark`, the same as the command `pgpark`."""

from pgpark.cli import main

main()
