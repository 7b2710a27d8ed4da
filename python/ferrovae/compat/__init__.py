"""Other libraries' quantizers over ours: `accelerate` a model that holds them, or import their names from here.

One file, or folder, a library; `known.py` lists the classes.
"""

from ferrovae.compat.swap import AccelerateWarning, Left, Report, Swapped, accelerate, report, restore

__all__ = ["AccelerateWarning", "Left", "Report", "Swapped", "accelerate", "report", "restore"]
