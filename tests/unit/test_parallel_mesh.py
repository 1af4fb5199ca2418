"""The grid of ranks and the layouts that are asked for."""

from __future__ import annotations

import pytest

from fanfold.errors import PlanError
from fanfold.parallel.mesh import AXES, Mesh, Split, parse_split
from fanfold.plan.layout import processes_of, product_of


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        ("tensor=2", Split(tensor=2)),
        ("tensor=2,pipeline=3", Split(tensor=2, pipeline=3)),
        ("context=2", Split(context=2)),
        ("context=2:allgather", Split(context=2)),
        ("context=3:ring,tensor=2", Split(context=3, tensor=2, context_method="ring")),
        ("expert=4 context=2:ulysses", Split(expert=4, context=2, context_method="ulysses")),
    ],
)
def test_a_layout_is_read_and_its_text_says_the_same(layout, split):
    assert parse_split(layout) == split
    assert parse_split(str(split)) == split
    assert processes_of(str(split)) == split.units


@pytest.mark.parametrize(
    "layout", ["context", "context=0", "context=2:star", "tensor=2:ring", "context=2:", "data=2", "tensor=2,tensor=2"]
)
def test_layouts_that_cannot_be_read_are_refused_with_the_word(layout):
    with pytest.raises(PlanError) as caught:
        parse_split(layout)
    assert caught.value.found == repr(layout.split(",")[-1])


def test_groups_partition_the_ranks_along_every_axis():
    mesh = Mesh(split=Split(tensor=2, expert=2, context=3, pipeline=2), data=2)
    assert mesh.units == 48
    for axis in AXES:
        groups = {tuple(mesh.group(rank, axis)) for rank in range(mesh.units)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.units))
        for group in groups:
            assert [mesh.place(rank, axis) for rank in group] == list(range(mesh.counts[axis]))
            for other in set(AXES) - {axis}:
                assert len({mesh.place(rank, other) for rank in group}) == 1


def test_ranks_of_a_stage_and_of_a_tensor_group_stand_together():
    split = Split(tensor=2, context=2, pipeline=2)
    mesh = Mesh(split=split)
    assert [mesh.place(rank, "pipeline") for rank in range(8)] == [split.stage_of(rank) for rank in range(8)]
    assert mesh.group(5, "tensor") == [4, 5]
    assert mesh.group(5, "context") == [5, 7]
    assert mesh.group(5, "pipeline") == [1, 5]


def test_the_arithmetic_of_a_layout_is_shown():
    assert product_of("pipeline=2 context=3:ring tensor=2") == "pipeline=2 x context=3:ring x tensor=2 = 12"
    assert product_of("tensor=2") == "tensor=2"
