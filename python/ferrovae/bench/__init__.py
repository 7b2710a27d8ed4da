"""What `ferrovae bench` measures: peers and ourselves, interleaved in one run.

A module an operation (`case.py` says what it holds), and what they share. The committed figures are made by

    ferrovae bench --json benchmarks              # measure: a file an operation, a rerun replaces its rows
    ferrovae bench --plot                         # draw them
    python -m ferrovae.bench.tables README.md     # and write the README's tables anew
"""
