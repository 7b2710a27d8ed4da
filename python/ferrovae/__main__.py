"""`python -m ferrovae`, and so `torchrun -m ferrovae train ...`."""

from ferrovae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
