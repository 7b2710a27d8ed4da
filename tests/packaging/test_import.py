"""What `import ferrovae` costs and brings in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

# Each import in a fork of a process that has torch, so that torch is imported once. Measured as an installed package
# has it: from bytecode, which pip compiles, a checkout may lack, and the first fork writes.
PROBE = """
import json, os, sys, time
import torch
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
for _ in range(4):
    if os.fork() == 0:
        start = time.process_time()
        import ferrovae
        for name in ferrovae.__all__:
            getattr(ferrovae, name)
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
        sys.exit()
    assert os.wait()[1] == 0
"""


def test_importing_everything_is_quick_and_brings_no_optional_package(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *runs = map(json.loads, done.stdout.splitlines())
    assert len(runs) == 3
    assert median(run["seconds"] for run in runs) <= 0.3
    optional = {"triton", "matplotlib", "sklearn", "huggingface_hub", "vector_quantize_pytorch", "tyro", "rich"}
    assert optional & set(first["modules"]) == set()


def test_import_alone_brings_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, ferrovae; assert 'torch' not in sys.modules"], check=True)
