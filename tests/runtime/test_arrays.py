"""What is written into an engine's array fills it, once."""

from __future__ import annotations

import numpy as np
import pytest

from sd_engines.errors import BundleError
from sd_runtime.arrays import copy_into


def test_an_array_of_another_shape_is_not_repeated() -> None:
    target = np.zeros((1, 4, 2, 2), np.float32)
    for shape in ((1, 1, 2, 2), (4, 2, 2), (1, 4, 2, 1), (), (1, 3, 2, 2)):
        with pytest.raises(BundleError, match="has no place in one of"):
            copy_into(target, np.ones(shape, np.float32))
    copy_into(target, np.ones(target.shape, np.float16))
    assert (target == 1).all()
