"""Text as rows of tokens."""

import numpy as np
import pytest

from xlathe.models import demo
from xlathe.tools.source import DEMO, DEMO_LENGTH
from xlathe.tools.text import find_calibration


@pytest.mark.parametrize(("asked", "rows"), [(1, 1), (2, 2), (100, 3)])
def test_calibration_is_the_first_rows_of_a_text(tiny, tmp_path, asked, rows):
    """Before: a text of three rows and a half. Expected: as many rows as were asked for, or all that are whole."""
    ids = np.asarray(demo.tokenizer().encode("def read_file(path):\n    return path\n" * 20).ids)
    ids = ids[: 3 * tiny.max_len + tiny.max_len // 2]
    text = tmp_path / "text"
    text.write_text(demo.tokenizer().decode(ids.tolist()))
    found = find_calibration({"calibration": str(text), "calibration_rows": asked}, "somewhere", tiny)
    np.testing.assert_array_equal(np.concatenate(found), ids[: rows * tiny.max_len].reshape(rows, -1))


def test_the_demo_has_as_many_rows_as_asked_for(tiny):
    found = find_calibration({"calibration": None, "calibration_rows": 20}, DEMO, tiny)
    assert len(found) > 8 and {row.shape for row in found} == {(1, DEMO_LENGTH)}
    assert len({row.tobytes() for row in found}) == len(found)
