"""What `import ferrovae` costs and brings in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

PROBE = """
import json, sys, time
import torch
start = time.process_time()
import ferrovae
for name in ferrovae.__all__:
    getattr(ferrovae, name)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def probe(bytecode: Path) -> dict:
    """One import as an installed package has it: from bytecode, which pip compiles and a checkout may lack."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    command = [sys.executable, "-c", PROBE]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_importing_everything_is_quick_and_brings_no_optional_package(tmp_path: Path) -> None:
    probe(tmp_path)
    runs = [probe(tmp_path) for _ in range(3)]
    assert median(run["seconds"] for run in runs) <= 0.3
    optional = {"triton", "matplotlib", "sklearn", "huggingface_hub", "vector_quantize_pytorch", "tyro", "rich"}
    assert optional & set(runs[0]["modules"]) == set()


def test_import_alone_brings_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, ferrovae; assert 'torch' not in sys.modules"], check=True)
