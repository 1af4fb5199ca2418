"""How many units a job gets, why, and what is refused."""

from __future__ import annotations

import pytest

from fanfold.errors import PlanError
from fanfold.machine.discover import Gpu, Machine
from fanfold.plan.numerics import Numerics
from fanfold.plan.plan import Cluster, Executor, Unit, Where
from fanfold.planner.units import OVERSUBSCRIPTION, UNIT_BYTES, Job, check_slots, choose, is_remote, parse_where

GB = 10**9
BIG = Job(weights_bytes=90_000_000, input_bytes=10 * GB)
PIECE_BYTES = 4 * Numerics().batch_tokens  # of text in one piece, as the planner guesses


def machine(*, cores=4, memory_bytes=64 * GB, gpus=0):
    return Machine(
        cores=cores,
        core_numbers=tuple(range(cores)),
        cores_reason="affinity",
        total_cores=128,
        cpu_name="a CPU",
        cpu_vendor="a vendor",
        isa="avx2",
        total_memory_bytes=512 * GB,
        memory_bytes=memory_bytes,
        memory_reason="cgroup limit",
        gpus=tuple(Gpu(index=i, name="a GPU", memory_bytes=80 * GB) for i in range(gpus)),
        shm_free_bytes=None,
        system="Linux",
        python_version="3.11",
    )


def plan(on, machine=machine(), job=BIG, **numerics):  # noqa: B008 (a frozen record)
    return choose(parse_where(on), machine, job, Numerics(**numerics))


def names(made):
    return [unit.name for unit in made.units]


def refused(on, *arguments, **options):
    with pytest.raises(PlanError) as error:
        plan(on, *arguments, **options)
    assert error.value.exit_code == 2
    return error.value


# -- --on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("inline", Where(kind="inline")),
        ("cpu", Where(kind="cpu")),
        (" cpu ", Where(kind="cpu")),
        ("cpu:4", Where(kind="cpu", count=4)),
        ("cpu:0", Where(kind="cpu", count=0)),
        ("cpu:007", Where(kind="cpu", count=7)),
        ("cuda", Where(kind="cuda")),
        ("cuda:0", Where(kind="cuda", devices=(0,))),
        ("cuda:3,1", Where(kind="cuda", devices=(3, 1))),
    ],
)
def test_places_are_read(text, where):
    assert parse_where(text) == where


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpu",
        "CPU",
        "cpu:",
        "cpu:x",
        "cpu:-1",
        "cpu:1.5",
        "cpu:1,2",
        "cpu 4",
        "cuda:",
        "cuda:,1",
        "cuda:0,",
        "spark",
    ],
)
def test_other_places_are_refused(text):
    with pytest.raises(PlanError) as error:
        parse_where(text)
    assert error.value.asked == f"--on {text}"
    assert error.value.found == "no such place to run"
    assert error.value.allowed.startswith("inline, cpu, cpu:N, cuda, cuda:0,1, spark://HOST:PORT, ")
    assert error.value.do == "leave --on away to use all allowed cores"


@pytest.mark.parametrize("on", ["cpu:" + "9" * 5000, "cuda:" + "9" * 5000])
def test_a_number_of_thousands_of_digits_is_a_plan_error(on):
    """Python refuses to read more than 4,300 digits as a number."""
    with pytest.raises(PlanError):
        plan(on)


# -- cpu --------------------------------------------------------------------------------------------------


def test_inline_is_one_unit_in_this_process():
    made = plan("inline")
    assert (made.engine, made.units, str(made.layout)) == ("inline", (Unit(name="inline", device="cpu"),), "data=1")
    assert made.reasons == ("inline: one unit in this process, as asked",)


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_a_large_job_gets_every_allowed_core(cores):
    made = plan("cpu", machine(cores=cores))
    assert made.engine == "local"
    assert names(made) == [f"cpu:{i}" for i in range(cores)]
    assert made.layout.data == cores
    assert made.reasons[0] == f"{cores} core(s) allowed: affinity"
    assert made.reasons[-1] == f"data={cores}: each unit holds the whole model and computes its own pieces"
    assert made.warnings == ()


def test_threads_of_a_unit_count_against_the_cores():
    assert len(plan("cpu", machine(cores=16), threads_per_unit=4).units) == 4
    assert len(plan("cpu", machine(cores=2), threads_per_unit=4).units) == 1


def test_memory_bounds_the_units_and_says_so():
    job = Job(weights_bytes=GB, input_bytes=10 * GB)
    made = plan("cpu", machine(cores=16, memory_bytes=GB + 3 * UNIT_BYTES + 1), job)
    assert len(made.units) == 3
    assert made.reasons[1] == "memory for 3: 1.90 GB allowed (cgroup limit)"


def test_a_model_larger_than_the_memory_still_gets_one_unit():
    made = plan("cpu", machine(memory_bytes=GB), Job(weights_bytes=2 * GB, input_bytes=10 * GB))
    assert len(made.units) == 1


@pytest.mark.parametrize(
    ("input_bytes", "count"), [(0, 1), (1, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (3 * PIECE_BYTES, 3), (GB, 4)]
)
def test_a_tiny_input_gets_no_more_units_than_pieces(input_bytes, count):
    made = plan("cpu", job=Job(weights_bytes=1, input_bytes=input_bytes))
    assert len(made.units) == count
    if count < 4:
        assert made.reasons[1] == (
            f"the input holds about {count} piece(s) of work: more units would only load the model"
        )


def test_a_stream_gets_every_core_as_its_size_is_unknown():
    assert len(plan("cpu", job=Job(weights_bytes=1, input_bytes=None)).units) == 4


@pytest.mark.parametrize("count", [1, 3, 4])
def test_as_many_units_as_asked(count):
    made = plan(f"cpu:{count}", job=Job(weights_bytes=1, input_bytes=10))  # even for a tiny input
    assert names(made) == [f"cpu:{i}" for i in range(count)]
    assert made.reasons == (f"data={count}: as asked",)
    assert made.warnings == ()


def test_more_units_than_cores_are_given_with_a_warning():
    made = plan("cpu:5")
    assert len(made.units) == 5
    assert made.warnings == ("cpu:5 is more than the 4 allowed core(s): units will share cores",)
    assert len(plan(f"cpu:{4 * OVERSUBSCRIPTION}").units) == 32


@pytest.mark.parametrize("count", [0, 33, 9999])
def test_no_units_or_too_many_are_refused(count):
    error = refused(f"cpu:{count}")
    assert error.asked == f"--on cpu:{count}"
    assert error.found == f"4 allowed core(s), memory for {(64 * GB - BIG.weights_bytes) // UNIT_BYTES} units"
    assert error.allowed == "cpu:1 to cpu:32"
    assert error.do == "leave the number away to use cpu:4"


def test_more_units_than_fit_in_memory_are_refused():
    small = machine(memory_bytes=BIG.weights_bytes + 2 * UNIT_BYTES)
    assert len(plan("cpu:2", small).units) == 2
    error = refused("cpu:3", small)
    assert error.found == "4 allowed core(s), memory for 2 units"
    assert error.allowed == "cpu:1 to cpu:2"
    assert error.do == "leave the number away to use cpu:2"


@pytest.mark.parametrize("on", ["inline", "cpu", "cpu:3", "cuda"])
def test_a_unit_may_hold_an_equal_share_of_what_the_weights_leave(on):
    made = plan(on, machine(gpus=2))
    assert made.unit_memory_bytes == (64 * GB - BIG.weights_bytes) // len(made.units)


def test_a_share_is_never_less_than_a_unit_needs():
    assert plan("cpu", machine(memory_bytes=GB // 10)).unit_memory_bytes == UNIT_BYTES


def test_memory_asked_for_a_unit_is_kept_and_bounds_the_units():
    job = Job(weights_bytes=GB, input_bytes=10 * GB, unit_memory_bytes=2 * GB)
    made = plan("cpu", machine(cores=16, memory_bytes=8 * GB), job)
    assert (len(made.units), made.unit_memory_bytes) == (3, 2 * GB)
    error = refused("cpu:4", machine(cores=16, memory_bytes=8 * GB), job)
    assert error.allowed == "cpu:1 to cpu:3"


def test_the_number_of_units_never_changes_the_numerics():
    records = {
        repr(plan(on, machine(cores=cores, memory_bytes=memory)).numerics.record())
        for on, cores, memory in [("cpu", 1, 2 * GB), ("cpu", 64, 64 * GB), ("cpu:3", 4, 4 * GB), ("inline", 8, GB)]
    }
    assert len(records) == 1


# -- cuda -------------------------------------------------------------------------------------------------


def test_each_gpu_is_a_unit():
    made = plan("cuda", machine(gpus=3), device="cuda")
    assert made.units == tuple(Unit(name=f"cuda:{i}", device=f"cuda:{i}") for i in range(3))
    assert made.reasons == ("data=3: one worker per GPU, as asked",)


def test_the_named_gpus_are_taken_in_the_order_named():
    assert names(plan("cuda:2,0", machine(gpus=3))) == ["cuda:2", "cuda:0"]


@pytest.mark.parametrize("on", ["cuda", "cuda:0"])
def test_cuda_without_a_gpu_is_refused(on):
    error = refused(on)
    assert error.asked == f"--on {on}"
    assert error.found == "no GPU with a working driver"
    assert error.allowed == "each GPU of this machine once"
    assert error.do == "leave --on away to use the CPU"


@pytest.mark.parametrize("on", ["cuda:0,0", "cuda:2", "cuda:0,7", "cuda:1,0,1"])
def test_a_gpu_twice_or_one_that_is_not_there_is_refused(on):
    error = refused(on, machine(gpus=2))
    assert error.asked == f"--on {on}"
    assert error.found == "GPUs [0, 1]"
    assert error.do == "choose among [0, 1]"


# -- what run.json stores ---------------------------------------------------------------------------------


def test_a_plan_is_plain_values():
    assert plan("cpu:5").record() == {
        "engine": "local",
        "units": [f"cpu:{i}" for i in range(5)],
        "layout": "data=5",
        "numerics": Numerics().record(),
        "unit_memory_bytes": (64 * GB - BIG.weights_bytes) // 5,
        "reasons": ["data=5: as asked"],
        "warnings": ["cpu:5 is more than the 4 allowed core(s): units will share cores"],
    }


# -- Spark ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "master",
    [
        "local[2]",
        "local[*]",
        "local-cluster[2,1,1024]",
        "spark://host:7077",
        "spark://a:7077,b:7077",
        "yarn",
        "k8s://https://host:6443",
    ],
)
def test_a_spark_master_is_a_place(master):
    assert parse_where(master) == Where(kind="spark", master=master)
    assert is_remote(parse_where(master)) == (not master.startswith("local"))


@pytest.mark.parametrize("text", ["local[0]", "local[x]", "local-cluster[2,1]", "spark://host", "spark://", "k8s://"])
def test_what_is_no_spark_master_is_refused(text):
    with pytest.raises(PlanError, match="no such place to run"):
        parse_where(text)


def test_spark_connect_is_for_data_frames():
    with pytest.raises(PlanError) as caught:
        parse_where("sc://host:15002")
    assert "fanfold.spark.embed" in caught.value.do


def cluster(*cores, unsafe=""):
    executors = tuple(Executor(name=str(i), host=f"h{i % 2}", cores=c, memory_bytes=GB) for i, c in enumerate(cores))
    return Cluster(master="spark://h:1", slots=sum(cores), executors=executors, unsafe=unsafe)


def test_every_slot_of_a_cluster_is_a_unit_with_its_share_of_its_machine():
    made = choose(parse_where("spark://h:1"), machine(memory_bytes=13 * GB), BIG, Numerics(), cluster(2, 2, 2))
    assert names(made) == [f"spark:{i}" for i in range(6)]
    assert made.engine == "spark"
    assert made.unit_memory_bytes == (13 * GB - BIG.weights_bytes) // 4  # two executors of two cores share a host
    assert made.reasons[0] == "3 executor(s) with 6 slot(s) of 1 core(s)"


def test_a_small_job_does_not_use_every_slot():
    job = Job(weights_bytes=1, input_bytes=2 * PIECE_BYTES)
    assert len(choose(parse_where("yarn"), machine(), job, Numerics(), cluster(8)).units) == 2


def test_a_cluster_without_authentication_is_warned_of():
    assert choose(parse_where("yarn"), machine(), BIG, Numerics(), cluster(1, unsafe="off")).warnings == ("off",)


def test_more_slots_than_this_machine_can_bear_are_refused():
    check_slots(parse_where("local[32]"), machine())
    with pytest.raises(PlanError) as caught:
        check_slots(parse_where("local-cluster[11,3,1024]"), machine())
    assert caught.value.found == "33 slots on 4 allowed core(s)"
