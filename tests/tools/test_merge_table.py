"""The table's recipes are ones that merging takes, and weights come back from files' names and turns."""

import jax
import numpy as np
import pytest

from xlathe.models.demo import files
from xlathe.passes.merge.merge import merge
from xlathe.passes.merge.methods import METHODS
from xlathe.passes.merge.recipe import parse_recipe
from xlathe.tools import merge_table


@pytest.fixture(scope="module")
def shipped():
    return files.read(files.FOLDER / "target.safetensors")


def test_weights_come_back(shipped):
    found = merge_table.params_of(merge_table.checkpoint_of(shipped, "shipped"), shipped)
    assert jax.tree.structure(found) == jax.tree.structure(shipped)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(shipped), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_every_method_of_a_recipe_has_a_row(shipped):
    assert {method for method, _ in merge_table.METHODS} == set(METHODS)
    opened = dict.fromkeys(("shipped", *merge_table.PARENTS), merge_table.checkpoint_of(shipped, "shipped"))
    for method, given in merge_table.METHODS:
        merged = merge(parse_recipe(merge_table.recipe_of(method, given), "table"), opened)
        assert merged.tensors.keys() == opened["shipped"].tensors.keys()
