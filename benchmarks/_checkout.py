"""Put this checkout first on the path, so that it is what is measured, installed or not."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))
