"""The machinery below the reading core: nothing here has to be opened to understand the paper."""
