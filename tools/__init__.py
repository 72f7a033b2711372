"""Programs that are run now and then: `python -m tools.NAME`."""
