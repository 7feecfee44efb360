"""The code in the pages runs as it stands there, and their numbers are the measured ones."""

import json
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


def test_numbers_of_the_survey():
    summary, *rows = json.loads(Path("docs/convert_timm.json").read_text())
    rows = [row for row in rows if row.get("norms")]
    assert summary["wrong"] == 0 and summary["norms"] == sum(row["norms"] for row in rows)
    said = (
        f"{len(rows)} of {summary['of']} families have such norms, {summary['norms']} in all: {summary['converted']} "
        f"have the groups of their layer, {summary['own_width']} their own width, {summary['left']} were left, "
        "0 were wrong"
    )
    assert said in Path("docs/any-model.md").read_text().replace("\n", " ")
