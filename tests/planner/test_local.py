"""The local job's time and memory from measured rates: what must follow whatever the machine is."""

from __future__ import annotations

import pytest

from fanfold.machine.rates import Link, Point, Rates, work
from fanfold.plan.workload import from_config
from fanfold.planner.local import Held, Work, batch_terms, local_model, predict_local

BERT = {
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512, "hidden_act": "gelu",
}  # fmt: skip
GEMM, ATTENTION, NUMBERS = 1e11, 5e8, 1e9
HELD = Held(parent_bytes=100_000_000, zygote_bytes=300_000_000, unit_bytes=50_000_000)


def machine(cores=2, crowded=1.0, threads_gain=None):
    """Every operator at one rate; `crowded`: the share of it that is left while all cores compute."""
    numbers = ("add", "gelu", "gelu_tanh", "silu", "relu", "layer_norm")
    shapes = {"gemm": (512, 1024, 1024), "attention": (8, 4, 256, 32), **dict.fromkeys(numbers, (2048, 384))}
    rate = {"gemm": GEMM, "attention": ATTENTION}
    points = []
    for kind, shape in shapes.items():
        seconds = work(kind, shape) / rate.get(kind, NUMBERS)
        points.append(Point(kind=kind, shape=shape, seconds=seconds))
        points.append(Point(kind=kind, shape=shape, busy=cores, seconds=seconds / crowded))
        if threads_gain:
            points.append(Point(kind=kind, shape=shape, threads=cores, seconds=seconds / threads_gain))
    return Rates(
        cores=cores, by="test", points=tuple(points), copy_bytes_per_s=1e10, copy_all_bytes_per_s=2e10, issue_s=0.0,
        own_share=1.0, zygote_bytes=0, unit_bytes=0, import_s=5.0, links={"pipe": Link(start_s=1e-5, bytes_per_s=1e9)},
    )  # fmt: skip


def bert(**changes):
    config = {**BERT, **changes}
    return local_model(from_config(config), config, 90_000_000)


def job(batches=40, scale=1.0, prepare_s=1.0):
    return Work(
        batches=((8, 256),) * batches, scale=scale, rows=round(8 * batches * scale), prepare_s=prepare_s,
        first_prepare_s=prepare_s, windows=1,
    )  # fmt: skip


def test_a_batch_by_hand():
    terms = batch_terms(machine(), bert(), 8, 256)
    tokens, h, layers = 2048, 384, 6
    assert terms["products"] == pytest.approx(layers * 2 * tokens * 12 * h * h / GEMM)
    assert terms["attention"] == pytest.approx(layers * 8 * 12 * 256 * 256 / ATTENTION)
    # activation over 4h, two norms, two residuals and one copy a layer; tables and pooling once
    assert terms["elementwise"] == pytest.approx((layers * (4 + 2 + 2 + 1) + 8) * tokens * h / NUMBERS)


def test_products_of_other_families_are_those_of_their_matrices():
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
              "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 128, "hidden_act": "silu"}  # fmt: skip
    terms = batch_terms(machine(), local_model(from_config(config), config, 0), 1, 100)
    weights = 256 * 256 * 2 + 2 * 256 * 64 + 3 * 256 * 512
    assert terms["products"] == pytest.approx(2 * 2 * 100 * weights / GEMM)


def test_terms_add_up_to_the_elapsed_time():
    found = predict_local(machine(), bert(), job(), HELD, units=2)
    assert found.elapsed_s == pytest.approx(sum(found.terms.values()))
    assert sum(found.operators.values()) == pytest.approx(1.0)


def test_two_units_share_the_computing_and_not_the_start():
    one = predict_local(machine(), bert(), job(), HELD, units=1)
    two = predict_local(machine(), bert(), job(), HELD, units=2)
    assert two.terms["start"] == one.terms["start"]
    assert two.terms["prepare"] == one.terms["prepare"]
    assert 0.5 * one.terms["compute"] <= two.terms["compute"] < 0.52 * one.terms["compute"]


def test_units_that_fight_for_the_memory_gain_less():
    free = predict_local(machine(), bert(), job(), HELD, units=2)
    fought = predict_local(machine(crowded=0.5), bert(), job(), HELD, units=2)
    alone = predict_local(machine(crowded=0.5), bert(), job(), HELD, units=1)
    assert fought.terms["compute"] == pytest.approx(2 * free.terms["compute"])
    assert fought.terms["compute"] > 0.99 * alone.terms["compute"]


def test_more_units_than_cores_compute_no_faster():
    two = predict_local(machine(), bert(), job(), HELD, units=2)
    eight = predict_local(machine(), bert(), job(), HELD, units=8)
    assert eight.terms["compute"] >= 0.97 * two.terms["compute"]
    assert eight.memory_bytes > two.memory_bytes


def test_a_unit_adds_its_own_memory_and_no_weights():
    one = predict_local(machine(), bert(), job(), HELD, units=1)
    two = predict_local(machine(), bert(), job(), HELD, units=2)
    heavier = predict_local(machine(), local_model(from_config(BERT), BERT, 190_000_000), job(), HELD, units=2)
    assert two.memory_bytes - one.memory_bytes > HELD.unit_bytes
    assert heavier.memory_bytes - two.memory_bytes == 100_000_000


def test_small_tensors_leave_holes_in_the_heap_and_large_ones_do_not():
    """[2048, 384] in float32 is below malloc's threshold for mapping, [2048, 768] above."""
    alike = Work(batches=((8, 256),) * 20, scale=1.0, rows=160, prepare_s=0.0, first_prepare_s=0.0, windows=1)
    mixed = ((8, 256), *((8, length) for length in range(230, 249)))
    varied = Work(batches=mixed, scale=1.0, rows=160, prepare_s=0.0, first_prepare_s=0.0, windows=1)
    for hidden, more in ((384, True), (768, False)):
        model = bert(hidden_size=hidden, intermediate_size=4 * hidden)
        same, other = (predict_local(machine(), model, work, HELD, units=1).memory_bytes for work in (alike, varied))
        assert (other > same) is more


def test_a_sample_stands_for_the_whole_input():
    small = predict_local(machine(), bert(), job(), HELD, units=1)
    large = predict_local(machine(), bert(), job(scale=10.0), HELD, units=1)
    assert large.terms["compute"] == pytest.approx(10 * small.terms["compute"])
    assert large.memory_bytes == small.memory_bytes


def test_an_input_without_rows_takes_the_start_only():
    nothing = Work(batches=(), scale=0.0, rows=0, prepare_s=0.0, first_prepare_s=0.0, windows=0)
    found = predict_local(machine(), bert(), nothing, HELD, units=2)
    assert found.terms["compute"] == 0
    assert found.elapsed_s < 7
