import subprocess
import sys

import pytest

from tinygrad_bn import testing

WITHOUT_HYPOTHESIS = """
import sys
sys.modules["hypothesis"] = None  # as if it were not installed
import numpy
from tinygrad_bn import testing
from tinygrad_bn.testing import *
testing.check_grad(lambda x: x.exp(), numpy.ones(3))
try:
    testing.strategies
except ModuleNotFoundError as error:
    assert "pip install 'tinygrad_bn[test]'" in str(error), error
else:
    raise SystemExit("no error")
"""


def test_checkers_work_without_hypothesis_and_strategies_say_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HYPOTHESIS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_checkers_do_not_import_hypothesis():
    code = "import sys, tinygrad_bn.testing; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_plugin_loads_none_of_the_checkers():
    code = """
import sys
import tinygrad_bn
before = set(sys.modules)
import tinygrad_bn.testing.pytest_plugin
own = {name for name in set(sys.modules) - before if name.startswith("tinygrad_bn")}
sys.exit(own != {"tinygrad_bn.testing", "tinygrad_bn.testing.pytest_plugin"})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_and_listed():
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    assert {*testing.__all__, "machines", "strategies"} <= set(dir(testing))
    with pytest.raises(AttributeError, match="no attribute 'chek_grad'"):
        _ = testing.chek_grad
