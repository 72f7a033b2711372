"""The machinery below the reading core: nothing here has to be opened to understand the paper."""

import os

# On a CPU, threads that wait for each other spin, by default long enough to bring two trainings on one machine to a
# standstill. It is read when torch is imported, so programs import something from here first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
