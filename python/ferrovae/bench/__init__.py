"""What `ferrovae bench` measures: peers and ourselves, interleaved in one run."""
