"""Evaluation of a run and the report a person looks at."""
