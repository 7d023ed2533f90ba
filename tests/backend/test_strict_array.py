"""The stand-in itself refuses what it must, or the tests that lean on it would prove nothing."""

import numpy as np
import pytest

from tests.backend.strict_array import ImplicitConversionError, StrictArray, plain, strict, xp

REFUSED = {
    "numpy.asarray": lambda a: np.asarray(a),
    "numpy.array": lambda a: np.array(a),
    "a ufunc": lambda a: np.exp(a),
    "a function": lambda a: np.concatenate([a, a]),
    "ndarray on the left": lambda a: np.ones(3) + a,
    "ndarray on the right": lambda a: a + np.ones(3),
    "ndarray in place": lambda a: a.__iadd__(np.ones(3)),
    "an ndarray's in-place operator": lambda a: np.ones(3).__iadd__(a),
    "a NumPy scalar": lambda a: a * np.float64(2),
    "comparison with ndarray": lambda a: a == np.ones(3),
    "an ndarray assigned": lambda a: a.__setitem__(0, np.ones(())),
    "assigned into an ndarray": lambda a: np.ones(3).__setitem__(0, a[0]),
    "an ndarray as index": lambda a: a[np.array([0])],
    "a list": lambda a: a * [1, 2, 3],
    "a list in place": lambda a: a.__iadd__([1, 2, 3]),
    "a list assigned": lambda a: a.__setitem__(slice(None), [1, 2, 3]),
    "a ufunc of its module on a list": lambda a: xp.maximum(a, [1, 2, 3]),
    "its module on ndarray": lambda a: xp.exp(np.ones(3)),
    "its module on a list of ndarrays": lambda a: xp.stack([np.ones(3), np.ones(3)]),
    "bool": lambda a: bool(a[0] > 0),
    "float": lambda a: float(a[0]),
    "an index": lambda a: [1, 2][a[0].astype("int64")],
}


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(attempt):
    with pytest.raises((ImplicitConversionError, ValueError)) as caught:
        attempt(strict(np.arange(3.0)))
    # ValueError only where NumPy wraps ours: "setting an array element with a sequence".
    causes = [caught.value, caught.value.__cause__]
    assert any(isinstance(cause, ImplicitConversionError) for cause in causes)


def test_results_are_strict_arrays_and_reductions_are_zero_dimensional():
    a = strict(np.arange(6.0).reshape(2, 3))
    results = [
        a + 1,
        1 - a,
        a @ a.T,
        -a,
        a > 0,
        a[0, 0],
        a[:, 1],
        a.sum(),
        a.max(axis=0),
        xp.exp(a),
    ]
    assert [type(result) for result in results] == [StrictArray] * len(results)
    assert a.sum().shape == ()
    assert a.sum().item() == 15.0


def test_base_says_whose_memory_a_view_has():
    a = strict(np.arange(6.0))
    assert a.base is None
    assert a[1:].base is a
    assert a[0].base is a
    assert a.reshape(2, 3)[0].base is a
    assert xp.broadcast_to(a, (2, 6)).base is a
    assert a.copy().base is None
    assert (a + 1).base is None
    assert xp.asarray(a) is a


def test_in_place_operators_and_at_write_into_the_array():
    a = strict(np.zeros(3))
    b = a
    b += 2
    xp.add.at(a, [0, 0], 1)
    assert a is b
    np.testing.assert_array_equal(plain(a), [4, 2, 2])
