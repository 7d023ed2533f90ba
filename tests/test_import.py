"""`import tinygrad_bn` loads NumPy and nothing else that does not come with Python."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What an installation's .pth files load before the import is not the package's doing.
LOADED = """
import sys
before = set(sys.modules)
import tinygrad_bn
new = set(sys.modules) - before
tops = {name.partition(".")[0] for name in new if getattr(sys.modules[name], "__spec__", None)}
print(*sorted(tops - sys.stdlib_module_names))
print(*sorted(name for name in new if name.startswith("tinygrad_bn.")))
"""


def fresh_python(code):
    """Return the lines that `code` prints in a new interpreter in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_loads_numpy_and_no_other_third_party_package():
    tops, _ = fresh_python(LOADED)
    assert tops.split() == ["numpy", "tinygrad_bn"]


def test_import_loads_no_kernels():
    _, own = fresh_python(LOADED)
    assert "tinygrad_bn.op" in own.split()
    assert not [name for name in own.split() if ".kernels.cuda" in name or "numba" in name]


def test_import_starts_no_thread():
    code = "import threading, tinygrad_bn; print(threading.active_count())"
    assert fresh_python(code) == ["1"]


def test_import_does_not_draw_from_or_seed_numpys_own_generator():
    code = "import numpy as np; np.random.seed(0); {}; print(np.random.random())"
    assert fresh_python(code.format("import tinygrad_bn")) == fresh_python(code.format("pass"))
