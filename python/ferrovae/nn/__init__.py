"""Layers: encoders, decoders and quantizers."""
