"""Programs that are run now and then: `python -m tools.NAME`."""

import support  # noqa: F401  # before torch: decides how its threads wait
