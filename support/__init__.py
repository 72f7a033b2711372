"""The machinery below the reading core: nothing here has to be opened to understand the paper.

Commands import support.errors before anything that loads PyTorch, and with it OpenMP, which reads here how long its
threads spin while they wait for each other. By default that is so long that a step beside one busy process, which
keeps a thread from its core, takes up to twenty times as long as alone.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
