"""Evaluation of a run and the report a person looks at."""

from ferrovae.report.evaluation import Evaluation, evaluate
from ferrovae.report.page import write

__all__ = ["Evaluation", "evaluate", "write"]
