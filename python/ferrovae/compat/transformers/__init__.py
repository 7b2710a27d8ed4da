"""Quantizers of `transformers`: EnCodec, DAC and Mimi, one file each."""
