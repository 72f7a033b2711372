"""What README quotes is what is there."""

import inspect
import textwrap

from standin import ROOT

from controlnet import ControlNet


def test_the_ten_lines_are_the_code():
    code = textwrap.dedent(inspect.getsource(ControlNet.residuals)).splitlines()
    docstring = next(i for i, line in enumerate(code) if '"""' in line)
    block = "\n".join(code[:docstring] + code[docstring + 1 :])
    assert f"```python\n{block}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
