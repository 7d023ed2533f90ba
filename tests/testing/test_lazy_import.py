import subprocess
import sys

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
