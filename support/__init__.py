"""Machinery under the core. It is imported before PyTorch, everywhere (see isort in pyproject.toml), for this:

OpenMP's threads spin while they wait for each other. Beside other work on the machine a thread that they wait for may
have no core, and a step then takes up to twenty times as long. GNU's OpenMP reads how long to spin when it is loaded.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
