"""The code in the pages runs as it stands there."""

import re
from pathlib import Path

import pytest

BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in [Path("docs/any-model.md")]
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE), 1)
]


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS)
def test_block(code):
    """Each in names of its own, so that any of them can be copied alone. `print(x)  # y` prints y."""
    printed = []
    exec(compile(code, "block", "exec"), {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    expected = re.findall(r"^print\(.*\)  # (\S+)$", code, re.MULTILINE)
    assert [line for line in printed if line in expected] == expected
