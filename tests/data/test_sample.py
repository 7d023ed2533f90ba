from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tinygrad_bn import data
from tinygrad_bn.data import make_sample

FOLDER = Path(data.__file__).parent


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, ...]:
    try:
        return data.fashion_mnist(download=False)
    except FileNotFoundError:
        pytest.skip("the real data set is not on this machine")


def test_the_sample_is_stratified_uint8_and_small() -> None:
    train_images, train_labels, test_images, test_labels = data.fashion_mnist_sample()
    assert train_images.shape == (2000, 28, 28)
    assert test_images.shape == (500, 28, 28)
    assert {a.dtype for a in (train_images, train_labels, test_images, test_labels)} == {
        np.dtype("uint8")
    }
    assert np.bincount(train_labels).tolist() == [200] * 10
    assert np.bincount(test_labels).tolist() == [50] * 10
    assert (FOLDER / "fashion_mnist_sample.npz").stat().st_size < 1_200_000


def test_the_sample_is_the_one_that_was_shipped_first() -> None:
    digest = hashlib.sha256()
    for array in data.fashion_mnist_sample():
        digest.update(array.tobytes())
    assert digest.hexdigest() == "6914940c79195b304e7833224eac6a17193d76131ad844c09ccb3738495cb111"


def test_no_class_comes_in_one_run() -> None:  # a batch from the front must not be one class
    _, train_labels, _, test_labels = data.fashion_mnist_sample()
    assert len(np.unique(train_labels[:100])) == len(np.unique(test_labels[:100])) == 10


def test_the_sample_is_real(real: tuple[np.ndarray, ...]) -> None:
    with np.load(FOLDER / "fashion_mnist_sample.npz") as sample:
        train, test = sample["train_index"], sample["test_index"]
    assert len(np.unique(train)) == 2000
    assert len(np.unique(test)) == 500
    expected = real[0][train], real[1][train], real[2][test], real[3][test]
    for array, original in zip(data.fashion_mnist_sample(), expected, strict=True):
        np.testing.assert_array_equal(array, original)


def test_the_script_makes_the_shipped_sample(
    real: tuple[np.ndarray, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.npz"
    make_sample.main(["--out", str(out)])
    assert str(out) in capsys.readouterr().out
    with np.load(out) as again, np.load(FOLDER / "fashion_mnist_sample.npz") as shipped:
        assert set(again) == set(shipped)
        for name in shipped:
            np.testing.assert_array_equal(again[name], shipped[name])


def test_the_real_data_has_its_published_mean_and_deviation(real: tuple[np.ndarray, ...]) -> None:
    pixels = real[0] / 255.0
    assert [a.shape for a in real] == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    assert round(float(pixels.mean()), 5) == 0.28604
    assert round(float(pixels.std()), 5) == 0.35302
    assert np.bincount(real[1]).tolist() == [6000] * 10
    assert np.bincount(real[3]).tolist() == [1000] * 10


def test_the_licence_stands_beside_the_sample() -> None:
    text = (FOLDER / "FASHION_MNIST_LICENSE.txt").read_text(encoding="utf-8")
    assert "MIT License" in text
    assert "Zalando SE" in text


def test_a_class_with_too_few_members_is_an_error() -> None:
    with pytest.raises(ValueError, match="larger sample"):
        make_sample.stratified_index(np.array([0, 0, 1]), 2, seed=0)
