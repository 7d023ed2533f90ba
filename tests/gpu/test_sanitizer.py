"""compute-sanitizer over the kernels: no address out of bounds, no race, no uninitialised read."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import numpy as np
import tinygrad_bn as tg
from tinygrad_bn import functional as F, nn, optim
rng = np.random.default_rng(0)
for axis, shape in ((1, (5, 7, 9, 3)), (-1, (5, 9, 3, 7)), (1, (33, 7))):
    for dtype in ("float32", "float16"):
        x = tg.tensor(rng.normal(size=shape), dtype=dtype, device="cuda", requires_grad=True)
        bn = nn.BatchNorm(7, axis=axis).to("cuda")
        mask = tg.tensor(rng.random((shape[0], *[1] * (len(shape) - 1))) < 0.8, device="cuda")
        (bn(x) + bn(x, mask) + bn.eval()(x)).exp().sum().backward()
model = nn.Sequential(
    nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(20 * 12 * 12, 10),
).to("cuda")
optimizer = optim.Adam(model.parameters())
x = tg.tensor(rng.normal(size=(4, 1, 28, 28)), dtype="float32", device="cuda")
F.cross_entropy(model(x), tg.tensor([0, 1, 2, 3], device="cuda")).backward()
optimizer.step()
print(sum(float(p.sum()) for p in model.parameters()))
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_kernels_of_a_step_pass(cupy, tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", STEP],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
