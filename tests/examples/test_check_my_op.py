import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_example_shows_the_message_and_passes_with_the_fix():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "check_my_op.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with_bug, with_fix = done.stdout.split("With both terms:")
    for part in ("check_grad: unit: the derivative for input 0 ('x') is wrong", "at [", "seed=0"):
        assert part in with_bug
    for check in ("check_grad", "check_double_grad", "check_pure", "check_layouts", "check_dtypes"):
        assert f"{check}(unit): passed" in with_fix
