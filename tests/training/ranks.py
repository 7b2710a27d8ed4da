"""Run by torchrun in `test_distributed`: trains, and writes what this rank heard to a file of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ferrovae.training.loop import train
from ferrovae.training.progress import Silent
from ferrovae.training.serialization import from_dict

heard: list[dict] = []


class Listener(Silent):
    def metrics(self, record) -> None:
        heard.append(record)


folder = Path(sys.argv[1])
train(from_dict(json.loads((folder / "config.json").read_text())), Listener())
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(heard))
