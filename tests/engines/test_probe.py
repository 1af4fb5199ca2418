"""The probe on this machine: what it holds, that it is kept, and how long it takes."""

from __future__ import annotations

import json

import pytest

from fanfold.cli.main import run
from fanfold.job import probing
from fanfold.machine.discover import discover
from fanfold.machine.measure import core_shapes
from fanfold.machine.rates import from_record


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.torch
@pytest.mark.slow
def test_this_machine_is_measured_once_and_then_known(own_cache, monkeypatch):
    machine = discover()
    assert probing.rates_for(machine, measure=False) is None
    found = probing.rates_for(machine)
    # The time is kept by leaving points out; only the imports cannot be shortened.
    assert found.elapsed_s < 10 or found.import_s > 4 or found.own_share < 0.9
    assert found.elapsed_s < 90
    for kind, shape in core_shapes():
        assert found.seconds(kind, shape) > 0
    assert 1e8 < found.rate("gemm", (2048, 1024, 1024)) < 1e13
    assert found.rate("gemm", (1, 1024, 1024)) < found.rate("gemm", (2048, 1024, 1024))
    if machine.cores > 1:
        assert {point.busy for point in found.points} == {1, min(machine.cores, 16)}
    assert found.copy_bytes_per_s > 1e8
    assert 1e6 < found.unit_bytes < found.zygote_bytes  # a fork shares what its parent has imported
    assert 0.5 < found.import_s < 60
    assert 0.0 < found.own_share <= 1.0
    assert set(found.links) >= {"pipe"}
    for link in found.links.values():
        assert 1e-7 < link.start_s < 0.1
        assert link.bytes_per_s > 1e6
    monkeypatch.setattr(probing, "measured", lambda *_: pytest.fail("measured twice"))
    assert probing.rates_for(machine) == found


@pytest.mark.torch
def test_a_damaged_cache_is_measured_again(own_cache, monkeypatch):
    machine = discover()
    path = probing.cache_path(machine)
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 2, "points": [')
    assert probing.rates_for(machine, measure=False) is None
    monkeypatch.setattr(probing, "measured", lambda cores: pytest.fail("as wanted"))
    with pytest.raises(pytest.fail.Exception, match="as wanted"):
        probing.rates_for(machine)


@pytest.mark.torch
@pytest.mark.slow
def test_the_command_shows_and_prints_what_was_measured(own_cache, capsys):
    assert run(["machine", "--probe", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    measured = record["probe"]
    rates = from_record({key: measured[key] for key in rates_keys(measured)})
    assert measured["gemm_one_thread_flop_per_s"] == pytest.approx(rates.rate("gemm", (2048, 1024, 1024)))
    assert run(["machine"]) == 0
    text = capsys.readouterr().out
    for word in ("gemm:", "copy:", "shapes:", "pipe:", "imports:"):
        assert word in text


def rates_keys(measured):
    return [key for key in measured if not key.startswith("gemm_")]
