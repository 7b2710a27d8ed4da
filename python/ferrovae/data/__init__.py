"""Datasets and the loader over Rust."""
