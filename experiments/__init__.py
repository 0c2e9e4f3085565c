"""The experiments: `python -m experiments.NAME`, each with ``--help``.

Imports nothing: what it says, it says before anything is imported that takes seconds.
"""

import sys

if sys.argv[0] == "-m" and not {"-h", "--help", "--quiet"}.intersection(sys.argv):  # Python looks for the experiment
    # a terminal's line is taken by what is said next
    print("importing jax and fnet", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
