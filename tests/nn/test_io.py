"""Files: whole or not there, the same bits back, and of the format that others read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tinygrad_bn import nn

ROOT = Path(__file__).parents[2]
DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_a_model_comes_back_to_the_bit(tmp_path):
    model, path = network(), tmp_path / "model.safetensors"
    model(tg.randn(3, 1, 4, 4))
    nn.save(model, path)
    twin = network()
    twin.load_state_dict(nn.load(path))
    for name, t in model.state_dict().items():
        loaded = nn.load(str(path))[name]
        assert (loaded.shape, loaded.dtype) == (t.shape, t.dtype)
        np.testing.assert_array_equal(twin.state_dict()[name].numpy(), t.numpy())
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_any_layout_come_back_in_their_dtype(tmp_path, dtype):
    base = np.arange(24).reshape(2, 3, 4).astype(dtype)
    state = {
        "plain": base,
        "fortran": np.asfortranarray(base),
        "transposed": tg.Tensor(base.T),
        "strided": base[:, ::-2, 1:],
        "broadcast": np.broadcast_to(base[:1], base.shape),
        "scalar": base[0, 0, 1],
        "empty": base[:0],
    }
    path = tmp_path / "state"
    nn.save(state, path)
    loaded = nn.load(path)
    assert set(loaded) == set(state)
    for name, value in state.items():
        expected = value.numpy() if isinstance(value, tg.Tensor) else np.asarray(value)
        assert (loaded[name].shape, loaded[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(loaded[name].numpy(), expected)


def test_bfloat16_comes_back(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(4).astype(ml_dtypes.bfloat16)
    nn.save({"x": x}, tmp_path / "x")
    loaded = nn.load(tmp_path / "x")["x"]
    assert loaded.dtype == x.dtype
    assert loaded.tolist() == x.tolist()


def test_loaded_tensors_can_be_written_to(tmp_path):
    nn.save({"x": np.ones(3)}, tmp_path / "x")
    x = nn.load(tmp_path / "x")["x"]
    x += 1
    assert x.tolist() == [2, 2, 2]


def test_the_format_is_the_one_that_safetensors_reads_and_writes(tmp_path):
    state = network().state_dict()
    nn.save(state, tmp_path / "ours")
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    for name, t in state.items():
        np.testing.assert_array_equal(theirs[name], t.numpy())
    safetensors.numpy.save_file(theirs, tmp_path / "theirs")
    assert network().load_state_dict(nn.load(tmp_path / "theirs")) == ([], [])


def test_devices(strict_gpu, tmp_path):  # noqa: F811
    model = network().to("cuda")
    nn.save(model, tmp_path / "m")
    assert nn.load(tmp_path / "m")["3.bias"].device == "cpu"
    loaded = nn.load(tmp_path / "m", device="cuda")["3.bias"]
    assert loaded.device == "cuda:0"
    np.testing.assert_array_equal(loaded.numpy(), model[3].bias.numpy())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model"
    nn.save({"x": np.zeros(3)}, path)

    def failing(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        nn.save({"x": np.ones(3)}, path)
    assert os.listdir(tmp_path) == ["model"]
    assert nn.load(path)["x"].tolist() == [0, 0, 0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_writer_leaves_no_partial_file(tmp_path):
    path = tmp_path / "model"
    nn.save({"x": np.zeros(3)}, path)
    # A writer that is stopped for good when the new contents are written but not yet named.
    code = f"""
import os, time
import numpy as np
from tinygrad_bn import nn
def hang(descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = hang
nn.save({{"x": np.ones(1000)}}, {str(path)!r})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as writer:
        assert writer.stdout.readline().strip() == b"writing"
        writer.kill()
        writer.wait()
    assert nn.load(path)["x"].tolist() == [0, 0, 0]
    nn.save({"x": np.ones(3)}, path)
    assert nn.load(path)["x"].tolist() == [1, 1, 1]


def test_readers_never_see_a_partial_file_while_it_is_rewritten(tmp_path):
    path = tmp_path / "model"
    nn.save({"x": np.zeros(100_000)}, path)
    code = f"""
import numpy as np
from tinygrad_bn import nn
print("ready", flush=True)
for i in range(1, 30):
    nn.save({{"x": np.full(100_000, float(i))}}, {str(path)!r})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as writer:
        writer.stdout.readline()
        deadline = time.monotonic() + 60
        while writer.poll() is None and time.monotonic() < deadline:
            assert len(set(nn.load(path)["x"].tolist())) == 1
    assert writer.returncode == 0


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"", lambda b: b"\x80\x02pickle" * 9]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "damaged.safetensors"
    nn.save(network(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"load: .*damaged\.safetensors.*cannot be read"):
        nn.load(path)


def test_what_cannot_be_saved_or_found_is_named(tmp_path):
    with pytest.raises(TypeError, match="save: got a list, expected a Module or a mapping"):
        nn.save([1], tmp_path / "x")
    with pytest.raises(TypeError, match="save: 'step' is a int"):
        nn.save({"step": 1}, tmp_path / "x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "absent")


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        nn.save(network(), tmp_path / "x")
    assert os.listdir(tmp_path) == []
