"""The cost model against what can be said without measuring: identities, limits, and calibration tables."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from fanfold.errors import PlanError
from fanfold.plan.workload import from_catalogue, from_dimensions
from fanfold.planner import cluster as clusters
from fanfold.planner.collectives import Group, allreduce_s, bus_bytes_per_s, gather_s, group
from fanfold.planner.degrees import Degrees
from fanfold.planner.framework import framework
from fanfold.planner.gemm import gemm_s, sustained_flop_per_s
from fanfold.planner.layer import Run, layer_s
from fanfold.planner.memory import just_enough, memory
from fanfold.planner.methods.pipeline import step_s
from fanfold.planner.prediction import predict
from fanfold.planner.search import best_training, why_worse
from fanfold.planner.training import Training, step

A100 = clusters.accelerator("A100-80GB-SXM")
GPT3 = from_catalogue("gpt3-175b")


def test_a_large_product_reaches_the_sustained_rate_and_never_more():
    flop = 2 * 16384**3
    rate = flop / gemm_s(A100, "bf16", 16384, 16384, 16384)
    assert 0.9 * sustained_flop_per_s(A100, "bf16") < rate <= sustained_flop_per_s(A100, "bf16")


def test_one_tile_more_than_a_wave_costs_another_wave():
    full = gemm_s(A100, "bf16", 128 * 108, 4096, 256)
    over = gemm_s(A100, "bf16", 128 * 108 + 1, 4096, 256)
    assert over > 1.2 * full


def test_a_product_of_one_row_takes_what_reading_the_weights_takes():
    seconds = gemm_s(A100, "bf16", 1, 8192, 8192)
    assert seconds >= 2 * 8192 * 8192 / A100.memory_bytes_per_s


def test_a_group_across_nodes_has_its_members_share_of_the_cards():
    whole = clusters.cluster("16xA100-80GB-SXM")
    one = group(whole, 2, 8)  # a data group under tensor=8: one card
    eight = group(whole, 16, 1)  # tensor=16 over two nodes: eight cards
    assert bus_bytes_per_s(whole, eight) == pytest.approx(8 * bus_bytes_per_s(whole, one))


def test_gathering_and_reducing_take_what_an_all_reduce_takes():
    whole = clusters.cluster("8xA100-80GB-SXM")
    of = Group(size=8, per_node=8)
    assert 2 * gather_s(whole, of, 1e9) == pytest.approx(allreduce_s(whole, of, 1e9), rel=0.01)


def test_the_published_bus_bandwidth_is_what_an_all_reduce_of_a_gigabyte_shows():
    whole = clusters.cluster("8xA100-80GB-SXM")
    seconds = allreduce_s(whole, Group(size=8, per_node=8), 1e9)
    assert 2 * 7 / 8 * 1e9 / seconds == pytest.approx(230e9, rel=0.02)


@pytest.mark.parametrize(("m", "p", "v"), [(8, 1, 1), (8, 4, 1), (64, 8, 3), (1, 8, 1)])
def test_the_bubble_is_that_of_narayanan(m, p, v):
    busy, bubble = step_s([1.0] * p, m, v)
    assert busy == m
    assert bubble / busy == pytest.approx((p - 1) / (v * m))


@pytest.mark.parametrize(
    ("words", "recompute", "forward_ms", "backward_ms"),
    [  # Korthikanti 2022, table 4: a calibration source
        ("Megatron-LM 2022 no SP", "none", 7.7, 11.9),
        ("Megatron-LM 2022 SP", "none", 7.2, 11.8),
        ("Megatron-LM 2022 no SP", "full", 7.7, 19.5),
        ("Megatron-LM 2022 no SP", "selective", 7.7, 13.2),
        ("Megatron-LM 2022 SP", "selective", 7.2, 13.1),
    ],
)
def test_a_layer_takes_what_was_published_for_it(words, recompute, forward_ms, backward_ms):
    model = from_dimensions("22B", layers=48, hidden=6144, heads=64, ffn=24576, vocab=51200, gated=False)
    degrees = Degrees(tensor=8, micro_batch=4, recompute=recompute)
    run = Run(
        cluster=clusters.cluster("8xA100-80GB-SXM"),
        degrees=degrees,
        framework=framework(words),
        precision="fp16",
        length=2048,
    )
    forward, backward = layer_s(model.blocks[0].layer, run)
    assert forward.total * 1e3 == pytest.approx(forward_ms, rel=0.03)
    assert backward.total * 1e3 == pytest.approx(backward_ms, rel=0.03)


def training(batch=1536, **more):
    return Training(model=GPT3, global_batch=batch, length=2048, **more)


def test_terms_of_a_step_add_up_to_it():
    whole = clusters.cluster("1024xA100-80GB-SXM")
    for degrees in (Degrees(data=8, tensor=8, pipeline=16), Degrees(data=128, tensor=8, zero=3)):
        found = step(training(), whole, degrees)
        assert sum(found.terms.values()) == pytest.approx(found.seconds, rel=1e-6)


def test_states_are_18_bytes_a_parameter_with_gradients_of_32_bits():
    work = replace(framework("NeMo"), gradient_bytes=4)
    model = from_catalogue("llama-3-8b")
    held = memory(
        Training(model=model, global_batch=8, length=2048, framework=work), clusters.cluster("1xH100"), Degrees()
    )
    assert held.weights + held.gradients + held.optimizer == pytest.approx(18 * model.num_params)


def test_activations_are_those_of_korthikanti():
    """Section 4.1: s b h (34 + 5 a s / h) a layer, without parallelism."""
    model = from_dimensions("22B", layers=48, hidden=6144, heads=64, ffn=24576, vocab=51200, gated=False)
    work = framework("Megatron-LM 2022 no SP")
    from fanfold.planner.memory import layer_bytes

    one = Training(model=model, global_batch=4, length=2048, precision="fp16", framework=work)
    found = layer_bytes(model.blocks[0].layer, one, Degrees(micro_batch=4))
    s, b, h, a = 2048, 4, 6144, 64
    assert found == pytest.approx(s * b * h * (34 + 5 * a * s / h), rel=0.05)


def test_as_few_layers_are_recomputed_as_fit():
    whole = clusters.cluster("64xA100-80GB-SXM")
    chosen = just_enough(training(64), whole, Degrees(data=1, tensor=8, pipeline=8, micro_batch=1))
    held = memory(training(64), whole, chosen).total
    assert held <= whole.memory_bytes
    if chosen.recompute == "full":
        less = replace(chosen, recompute_share=chosen.recompute_share - 1 / 12)
        assert memory(training(64), whole, less).total > whole.memory_bytes


def test_more_of_anything_that_is_fast_is_never_slower():
    whole = clusters.cluster("64xA100-80GB-SXM")
    degrees = Degrees(data=1, tensor=8, pipeline=8)
    base = step(training(64), whole, degrees).seconds
    network = replace(whole, network_bytes_per_s=2 * whole.network_bytes_per_s)
    assert step(training(64), network, degrees).seconds <= base
    link = replace(whole, link_allreduce_bytes_per_s=2 * whole.link_allreduce_bytes_per_s)
    assert step(training(64), link, degrees).seconds <= base


@pytest.mark.parametrize(("devices", "limit_s"), [(1024, 2.0), (16384, 10.0)])
def test_the_search_ends_in_time_and_what_it_finds_fits(devices, limit_s):
    whole = clusters.cluster(f"{devices}xH100-80GB-SXM")
    started = time.perf_counter()
    found = best_training(replace(training(), global_batch=2 * devices), whole)
    assert time.perf_counter() - started < limit_s
    assert found.best.fits
    assert all(other.step_time_s >= found.best.step_time_s for other in found.others)
    assert all(why_worse(found.best, other) for other in found.others)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        (Degrees(data=8, tensor=8, pipeline=8), "8 x 8 x 8 x 1 = 512"),
        (Degrees(data=2, tensor=64, pipeline=8), "96 heads"),
        (Degrees(data=8, tensor=8, pipeline=16, interleave=5), "96 layers"),
        (Degrees(data=128, tensor=8, micro_batch=16), "128 x 16 = 2048"),
    ],
)
def test_a_layout_that_cannot_be_shows_its_arithmetic(degrees, words):
    with pytest.raises(PlanError) as caught:
        predict(training(), clusters.cluster("1024xA100-80GB-SXM"), degrees)
    assert words in str(caught.value)


def test_a_model_that_fits_nowhere_says_by_how_much_and_what_would_do():
    with pytest.raises(PlanError) as caught:
        best_training(training(8), clusters.cluster("8xA100-80GB-SXM"))
    assert "too much" in str(caught.value)
    assert "use at least" in str(caught.value)


def test_words_of_a_table_go_before_the_catalogue():
    found = clusters.from_words("A100-80GB-SXM (Selene, 8x100Gb/s NIC)", 64)
    assert found.network_bytes_per_s == 12.5e9
    assert clusters.from_words("A100 (8 per node, NVLink, 800 Gb/s IB per node)", 64).network_bytes_per_s == 12.5e9
    assert clusters.from_words("H100-80GB-SXM (cloud, 200Gb/s per GPU)", 64).network_bytes_per_s == 25e9
    assert clusters.from_words("H100-80GB-SXM (NVLink 900GB/s)", 64).network_bytes_per_s == 50e9
    assert clusters.from_words("A100-80GB-SXM (4 per node, 4x200Gb)", 64).network_bytes_per_s == 25e9
    assert clusters.from_words("Q100", 8) is None
    assert clusters.from_words("A101", 8) is None


def test_a_device_with_less_power_per_flop_clocks_down():
    assert clusters.accelerator("H100-80GB-SXM").clock_share == 1
    assert clusters.accelerator("A100-80GB-PCIe").clock_share == pytest.approx((300 / 400) ** 0.5)
