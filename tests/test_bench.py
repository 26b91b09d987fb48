"""The benchmarks at tiny sizes: designs compute the same thing, counts are what the workload says, nothing is timed."""

import dataclasses
import importlib.util
import json

import pytest

from experiments import bench
from tests.test_cli import refused

ROWS, PROMPT, TURNS, OBSERVED, REPLY = 3, 20, 2, 4, 5


def quiet(_text: str) -> None:
    pass


@pytest.fixture
def tiny(monkeypatch):
    shape = dataclasses.replace(bench.SHAPES["pocket"], vocab_size=50, num_layers=1, d_model=16, d_ff=16, num_heads=2, head_dim=8)
    monkeypatch.setattr(bench, "SHAPES", {"pocket": shape})


def test_interleaving_is_fair():
    order = []
    times = {"ours": [9.0, 1.0, 2.0, 1.0], "peer": [9.0, 3.0, 2.0, 50.0]}

    def design(name):
        def run():
            order.append(name)
            return times[name][order.count(name) - 1], f"{name} {order.count(name)}"

        return run

    seconds, first = bench.interleave({name: design(name) for name in times}, 3, quiet)
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert seconds == {"ours": [1.0, 2.0, 1.0], "peer": [3.0, 2.0, 50.0]}  # without the first run
    assert first == {"ours": "ours 1", "peer": "peer 1"}
    assert bench.ratio(seconds, "ours", "peer") == 3.0  # of the ratios 3, 1, 50
    assert bench.ratio(seconds, "peer", "peer") == 1.0


def test_sampler_designs_agree_and_compute_what_they_claim(tiny):
    settings = bench.SamplerBench(
        repetitions=2, rows=ROWS, prompt=PROMPT, turns=TURNS, observed=OBSERVED, reply=REPLY, decode_steps=4, transformers=False
    )
    result = bench.bench_sampler(settings, quiet)
    found = {row["design"]: row for row in result.rows}
    assert [row["same_tokens"] for row in result.rows] == [1.0, 1.0, 1.0]
    # In later turns the last token of the reply has no cache position yet and is computed with the observation.
    later = ROWS * (TURNS - 1) * (OBSERVED + 1)
    assert found["keep cache"]["prefilled"] == ROWS * (PROMPT + OBSERVED) + later
    assert found["keep cache, shared prompt"]["prefilled"] == PROMPT + ROWS * OBSERVED + later - 1  # one row waits with 1 token
    lengths = [PROMPT + OBSERVED + turn * (OBSERVED + REPLY) for turn in range(TURNS)]
    assert found["prefill again"]["prefilled"] == ROWS * sum(lengths)
    assert found["prefill again"]["padding"] == found["keep cache"]["padding"] == 0
    assert found["prefill again"]["speedup"] == 1.0
    assert "0 programs compiled" in result.notes[-1]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")
def test_transformers_generates_the_same_tokens(tiny):
    settings = bench.SamplerBench(repetitions=1, rows=2, prompt=9, turns=2, observed=3, reply=4, decode_steps=4)
    result = bench.bench_sampler(settings, quiet)
    last = result.rows[-1]
    assert (last["design"], last["same_tokens"], last["speedup_hf"]) == ("transformers", 1.0, 1.0)


def test_update_equals_its_peer(tiny):
    result = bench.bench_update(bench.UpdateBench(repetitions=1, rows=4, prompt=9, reply=5, microbatches=2), quiet)
    ours, peer = result.rows
    assert ours["loss"] == pytest.approx(peer["loss"], abs=1e-5) and ours["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-3)
    assert ours["grad_norm"] > 0
    assert ours["memory_mib"] > 0


def test_update_that_cannot_be(tiny):
    with pytest.raises(ValueError, match="--rows 4 do not divide into --microbatches 3"):
        bench.bench_update(bench.UpdateBench(rows=4, microbatches=3), quiet)
    with pytest.raises(ValueError, match="--prompt"):
        bench.bench_update(bench.UpdateBench(prompt=10**6), quiet)
    with pytest.raises(ValueError, match="--prompt"):
        bench.bench_sampler(bench.SamplerBench(prompt=10**6), quiet)


def test_environments(tmp_path, capsys):
    path = tmp_path / "bench.json"
    bench.main(
        f"envs --family lava_cross --workers 1 2 --episodes 3 --steps 4 --repetitions 1 --json {path}".split(),
    )
    report = json.loads(path.read_text())
    assert report["machine"]["packages"]["jax"] and report["machine"]["cores"] >= 1
    assert report["results"]["envs"]["settings"] == {
        "repetitions": 1,
        "family": ["lava_cross"],
        "workers": [1, 2],
        "episodes": 3,
        "steps": 4,
    }
    rows = report["results"]["envs"]["rows"]
    assert [(row["game"], row["design"]) for row in rows] == [
        ("fake door", "pool, 1 worker"),
        ("fake door", "pool, 2 workers"),
        ("minihack lava_cross", "pool, 1 worker"),
        ("minihack lava_cross", "pool, 2 workers"),
        ("minihack lava_cross", "gym.make per episode"),
    ]
    assert [row["steps_per_episode"] for row in rows[:2]] == [4, 4]
    assert all(0 < row["steps_per_episode"] <= 4 and row["resets_per_s"] > 0 for row in rows)
    assert rows[2]["steps_per_episode"] == rows[3]["steps_per_episode"]
    assert [row["speedup"] for row in (rows[0], rows[4])] == [None, 1.0]
    printed = capsys.readouterr().out
    assert "gym.make per episode" in printed and "lava_cross" in printed


def test_a_game_that_fails_ends_the_measurement():
    with bench.WorkerPool("fake", num_workers=1, options={"raise_on": "look"}) as pool:
        games = [bench.GameId(env="fake", family="door", key="0")]
        with pytest.raises(ValueError, match="raise"):
            bench.play_in_pool(pool, games, [["walk", "look"]])


def test_bad_input(capsys, tmp_path):
    refused(capsys, bench.main, ["reflector"], "'reflector'", "sampler, update, envs, all")
    refused(capsys, bench.main, ["sampler", "--rowz", "3"], "--rowz")
    refused(capsys, bench.main, ["update", "--rows", "0"], "--rows", "0")
    refused(capsys, bench.main, ["envs", "--family", "castle"], "'castle'")
    refused(capsys, bench.main, ["envs", "--workers", "0"], "--workers")
    refused(capsys, bench.main, ["--json", str(tmp_path)], "--json", "folder")
    refused(capsys, bench.main, ["all", "--json", str(tmp_path / "no" / "b.json")], "--json", "no")
    assert not list(tmp_path.iterdir())


def test_cells():
    assert [bench._cell(value) for value in (None, 0.0, 0.01234, 2.5, 123.4, 12345.6, 1200, "x")] == [
        *("-", "0.00", "0.0123", "2.50", "123", "12,346", "1,200", "x"),
    ]
