"""The benchmarks at tiny sizes: designs compute the same thing, counts are what the workload says,
nothing is timed.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex
import typing

import jax
import jax.numpy as jnp
import pytest

from envs.api import GameId
from envs.pool import WorkerPool
from envs.registry import load_environment
from experiments import (
    bench,
    bench_cache,
    bench_envs,
    bench_models,
    bench_peers,
    bench_products,
    bench_rollout,
    bench_run,
    bench_sampler,
    bench_trl,
    estimate,
    roofline,
)
from experiments.command import parse_subcommand
from experiments.commands import bench as flags
from experiments.commands.bench import CacheBench, ProductsBench, SamplerBench
from experiments.machines import GPUS
from ictjax.models.attention import Seen, attend_rows, plan
from tests.test_cli import refused

pytestmark = pytest.mark.usefixtures("optimised")

ROOT = pathlib.Path(__file__).parent.parent
ROWS, PROMPT, TURNS, OBSERVED, REPLY = 3, 20, 2, 4, 5


def quiet(_text: str) -> None:
    pass


@pytest.fixture
def tiny(monkeypatch):
    shape = dataclasses.replace(
        bench_models.SHAPES["pocket"],
        vocab_size=50,
        num_layers=1,
        d_model=16,
        d_ff=16,
        num_heads=2,
        head_dim=8,
    )
    for module in (bench_models, bench_sampler):
        monkeypatch.setattr(module, "SHAPES", {"pocket": shape})
    # products of 2,048 x 2,048 take seconds on a busy machine
    monkeypatch.setattr(roofline, "_sizes", lambda: roofline._Sizes(64, 2**16))


def test_every_shape_can_be_asked_for_by_name():
    assert set(typing.get_args(flags._Shape)) == set(bench_models.SHAPES)
    assert bench_models.SHAPES["qwen2.5-7b"].num_params == 7_615_616_512


def test_interleaving_is_fair():
    order = []
    times = {"ours": [9.0, 1.0, 2.0, 1.0], "peer": [9.0, 3.0, 2.0, 50.0]}

    def design(name):
        def run():
            order.append(name)
            return times[name][order.count(name) - 1], f"{name} {order.count(name)}"

        return run

    seconds, first = bench_run.interleave({name: design(name) for name in times}, 3, quiet)
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert seconds == {"ours": [1.0, 2.0, 1.0], "peer": [3.0, 2.0, 50.0]}  # without the first run
    assert first == {"ours": "ours 1", "peer": "peer 1"}
    assert bench_run.ratio(seconds, "ours", "peer") == 3.0  # of the ratios 3, 1, 50
    assert bench_run.ratio(seconds, "peer", "peer") == 1.0


def sampler_cell(task, rows=ROWS):
    settings = bench_sampler.SamplerBench(
        rows=(rows,),
        tasks=(task,),
        prompt=PROMPT,
        turns=TURNS,
        observed=OBSERVED,
        said=REPLY,
        reply=REPLY,
        repetitions=2,
        decode_steps=4,
    )
    return settings, bench_sampler.Cell("pocket", rows, task)


def test_sampler_designs_agree_and_compute_what_they_claim(tiny):
    settings, cell = sampler_cell("episode")
    config = bench_models.SHAPES["pocket"]
    work, shared = bench_sampler.workload(settings, cell, config.vocab_size)
    assert (shared, work.longest) == (PROMPT, PROMPT + TURNS * (OBSERVED + REPLY))
    params = bench_sampler.init_params(config, jax.random.key(0))
    sizes = bench_sampler.sizes_of(settings, cell)
    with bench_sampler.Sampler(config, params, sizes, pad_id=0) as sampler:

        def run(design, **options):
            before = sampler.stats
            played = design(sampler, lambda: sampler.set_params(params), work, **options)
            after = sampler.stats
            assert 0 < played.spent.first < played.spent.total
            assert after.padded_tokens == before.padded_tokens or options.get("share")
            return played.replies, after.prefilled_tokens - before.prefilled_tokens

        alone, kept = run(bench_sampler.keep_cache, share=False)
        together, once = run(bench_sampler.keep_cache, share=True)
        again, whole = run(bench_sampler.prefill_again)
    assert alone == together == again
    assert {len(replies) for replies in alone} == {TURNS * REPLY}
    # In later turns the last token of the reply has no cache position yet and is computed with the
    # observation.
    later = ROWS * (TURNS - 1) * (OBSERVED + 1)
    assert kept == ROWS * (PROMPT + OBSERVED) + later
    # the first row is computed before the others come, and keeps its last token for its reply
    assert once == PROMPT + ROWS * OBSERVED + later - 1
    assert whole == ROWS * sum(
        PROMPT + OBSERVED + turn * (OBSERVED + REPLY) for turn in range(TURNS)
    )


def test_sampler_cells(tiny):
    settings, _ = sampler_cell("generate", rows=2)
    settings = dataclasses.replace(settings, tasks=("generate", "group"), mixed=True)
    prefill, decode, group = bench_sampler.bench_sampler(settings, quiet).rows
    assert [row["cell"] for row in (prefill, decode, group)] == [
        "pocket x 2 prefill",
        "pocket x 2 decode",
        "pocket x 2 group",
    ]
    for row, tokens in ((prefill, 2 * PROMPT), (decode, 2 * (REPLY - 1)), (group, 2 * REPLY)):
        assert row["seconds"] * row["tokens_per_s"] == pytest.approx(tokens)
        assert row["same"] == 1.0
        assert row["of_roofline"] > 0
        assert row["over_mixed"] > 0
    assert (prefill["over_again"], group["over_again"] > 0) == (None, True)


def test_sampler_cells_in_bfloat16_and_pages(tiny):
    settings, _ = sampler_cell("generate", rows=2)
    settings = dataclasses.replace(
        settings, tasks=("generate", "group"), dtype="bfloat16", page_size=8, piece=6
    )
    result = bench_sampler.bench_sampler(settings, quiet)
    assert result.title == "Sampler, greedy, bfloat16, random weights, pages of 8, against again"
    assert [row["cell"] for row in result.rows] == [
        "pocket x 2 prefill",
        "pocket x 2 decode",
        "pocket x 2 group",
    ]
    for row in result.rows:
        assert row["seconds"] > 0 and row["of_roofline"] > 0 and "same" not in row
        assert 0 < row["agreement"] <= 1  # here and there another token is as likely
    assert "agreement: of all tokens" in " ".join(result.notes)


def test_pages_and_pieces_hold_every_conversation():
    settings = bench_sampler.SamplerBench(page_size=128, piece=100, prompt=250, rows=(64,))
    sizes = bench_sampler.sizes_of(settings, bench_sampler.Cell("pocket", 64, "generate"))
    assert (sizes.max_len, sizes.extend_buckets) == (314, (50, 100))
    assert sizes.num_pages == 64 * (3 + 1)  # with 64 x 3 the last ones wait for others to end
    whole = dataclasses.replace(settings, page_size=0, piece=0)
    sizes = bench_sampler.sizes_of(whole, bench_sampler.Cell("pocket", 64, "generate"))
    assert (sizes.extend_buckets, sizes.page_size, sizes.num_pages) == ((250,), 0, 0)


def test_a_sampler_with_these_pages_suspends_nobody(tiny):
    settings, cell = sampler_cell("group")
    settings = dataclasses.replace(settings, page_size=8, piece=6)
    config = bench_models.SHAPES["pocket"]
    work, _ = bench_sampler.workload(settings, cell, config.vocab_size)
    params = bench_sampler.init_params(config, jax.random.key(0))
    sizes = bench_sampler.sizes_of(settings, cell)
    with bench_sampler.Sampler(config, params, sizes, pad_id=0) as sampler:
        played = bench_sampler.keep_cache(
            sampler, lambda: sampler.set_params(params), work, share=True
        )
        assert sampler.stats.suspensions == 0
        assert {len(reply) for reply in played.replies} == {REPLY}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_sample_as_they_are_and_are_there_once(tiny, dtype):
    config = bench_models.SHAPES["pocket"].with_dtype(dtype)
    stacked, kept = (bench_sampler.init_params(config, jax.random.key(0)) for _ in range(2))
    found = bench_sampler._unstacked(stacked)
    assert all(leaf.is_deleted() for leaf in stacked["layers"].values())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {dtype}
    expected = bench_sampler.sampling_weights(config, kept)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))
    again = bench_sampler.sampling_weights(config, found)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, again, found))


def test_the_7b_cell_leaves_room_on_a_gpu_of_80_gb(monkeypatch):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    command = re.search(
        r"^export XLA_PYTHON_CLIENT_MEM_FRACTION=([\d.]+)\b.*\n\S+/ictjax bench (sampler .+)$",
        page,
        re.MULTILINE,
    )
    argv = shlex.split(command[2], comments=True)
    settings = parse_subcommand({"sampler": SamplerBench}, "bench", "", argv)
    assert (settings.rows, settings.dtype, settings.prompt) == ((64,), "bfloat16", 2048)
    kept = []
    monkeypatch.setattr(bench_sampler, "check_fits", lambda what, uses, remedy: kept.extend(uses))
    bench_sampler._check(settings, bench_sampler.Cell("qwen2.5-7b", 64, "generate"))
    weights, cache, _ = (use.device_bytes / 2**30 for use in kept)
    assert f"{weights:.1f} GiB of weights, {cache:.1f} of pages and 3.0 of temporaries" in page
    # 2 GiB are what the rate of reading is measured with
    assert weights + cache + 3.0 + 2 < float(command[1]) * GPUS["h100-80gb"].memory_bytes / 2**30


def test_the_roofline_of_sampling_counts_what_must_be_computed():
    config = bench_models.SHAPES["pocket"]
    layers = estimate.matrix_weights(config) - config.vocab_size * config.d_model
    head = config.vocab_size * config.d_model
    pair = 4 * config.num_layers * config.num_heads * config.head_dim
    position = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim

    def floor(machine, *, shared=0):
        work = bench_peers.Workload([[1, 2, 3]] * 2, [[[4]] * 2], reply=2)
        return roofline.least_seconds(config, work, shared, machine)

    products = roofline.Rates(flops=1.0, bandwidth=float("inf"))
    first, rest = floor(products)
    assert first == 2 * (2 * 3 * layers + 6 * pair + 2 * head)
    # one more token of the reply at position 3; then its last token and what is observed; then one
    seen = 4 + (5 + 6) + 7
    assert rest == 2 * (2 * 4 * layers + seen * pair + 3 * 2 * head)
    assert floor(products, shared=2)[0] == first - (2 * 2 * layers + 3 * pair)
    reading = roofline.Rates(flops=float("inf"), bandwidth=1.0)
    weights = 4 * (layers + head)
    assert floor(reading) == (weights, 3 * weights + 2 * (3 + 4 + 6) * position)
    whole = floor(reading)
    config = config.with_dtype("bfloat16")
    assert floor(reading) == tuple(part / 2 for part in whole)
    assert floor(products) == (first, rest)


def test_rates_are_of_the_type_that_is_asked_for():
    assert str(roofline.jax_product(4, "bfloat16")().dtype) == "bfloat16"
    machine = roofline.rates(products_s=2.0, reading_s=4.0)
    assert machine == (roofline.product_flops() / 2, 256 * 2**20 / 4)
    assert roofline.product_flops(4) == 4 * 2 * 4**3


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")
@pytest.mark.parametrize("task", ["generate", "episode"])
def test_transformers_generates_the_same_tokens(tiny, task):
    settings, _ = sampler_cell(task, rows=2)
    settings = dataclasses.replace(settings, repetitions=1, against=("transformers",))
    row = bench_sampler.bench_sampler(settings, quiet).rows[-1]
    assert row["same"] == 1.0
    assert row["over_transformers"] > 0


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")
def test_transformers_computes_in_bfloat16_too(tiny):
    settings, _ = sampler_cell("generate", rows=2)
    settings = dataclasses.replace(
        settings, repetitions=1, against=("transformers",), dtype="bfloat16", page_size=8
    )
    for row in bench_sampler.bench_sampler(settings, quiet).rows:
        assert row["over_transformers"] > 0 and row["agreement"] >= 0.5


@pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="compares with Tunix")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Tunix imports
def test_tunix_generates_the_same_tokens(tiny):
    settings, _ = sampler_cell("episode", rows=2)
    settings = dataclasses.replace(settings, repetitions=1, against=("tunix",))
    with jax.numpy_rank_promotion("allow"):  # Tunix promotes
        assert bench_sampler.bench_sampler(settings, quiet).rows[-1]["same"] == 1.0


def test_a_peer_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    refused(
        capsys,
        bench.main,
        ["sampler", "--against", "tunix"],
        "--against tunix",
        "pip install google-tunix",
    )


def test_a_rollout_is_accounted_for():
    """Of hand-made games, whose replies are the same either way."""
    settings = bench_rollout.RolloutBench(preset="fake-tiny", games=2, repetitions=1, decode_rows=0)
    single, ahead = bench_rollout.bench_rollout(settings, quiet).rows
    assert (single["design"], ahead["design"]) == ("games, one at a time", "games, launched ahead")
    for row in (single, ahead):
        shares = [row[name] for name in ("busy", "idle_host", "idle_workers")]
        assert sum(shares) == pytest.approx(1) and all(0 <= share <= 1 for share in shares)
        assert row["same_replies"] and row["rows"] >= 1 and row["cores"] > 0


def test_seconds_that_spans_cover():
    spans = [(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75), (9.0, 20.0)]
    assert bench_rollout.covered(spans, 0.0, 10.0) == 3 + 1 + 1
    assert bench_rollout.covered(spans, 2.0, 5.5) == 2 + 0.5
    assert bench_rollout.covered([], 0.0, 1.0) == 0


def test_update_equals_its_peer(tiny):
    result = bench_models.bench_update(
        bench_models.UpdateBench(
            repetitions=1, groups=2, group_size=3, prompt=9, reply=5, microbatches=2
        ),
        quiet,
    )
    *ours, peer = result.rows
    assert [row["design"] for row in result.rows] == [
        "shared prompt",
        "separate rows",
        "all positions",
    ]
    for row in ours:
        assert row["loss"] == pytest.approx(peer["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-3)
        assert row["grad_norm"] > 0 and row["memory_mib"] > 0
        assert row["gflop_per_s"] > 0 and row["of_products"] is None


def test_pages_hold_three_times_the_games_of_slots(monkeypatch):
    """At the paper's preset, with games of recorded lengths."""
    games = bench_cache.shipped()
    assert len(games) == 320
    monkeypatch.setattr(bench_cache, "shipped", lambda: games[:80])
    slots, pages = bench_cache.bench_cache(CacheBench(slots=2, rounds=1), quiet).rows
    assert (slots["in_flight"], slots["gib_held"]) == (2, 2 * 32_768 * 57_344 / 2**30)
    assert pages["gib_held"] <= slots["gib_held"]
    assert pages["times_slots"] >= 3
    assert 1 < pages["bytes_over_tokens"] <= 1.15 < slots["bytes_over_tokens"]
    assert pages["evicted"] > 0
    with pytest.raises(ValueError, match="80 games do not fill .* 3 slots: give --rounds 2 or"):
        bench_cache.bench_cache(CacheBench(slots=3, rounds=1), quiet)
    with pytest.raises(ValueError, match="ends at .* tokens, and a conversation has 160: take"):
        bench_cache.bench_cache(CacheBench(preset="fake-tiny"), quiet)


def test_games_of_a_run_are_read_by_their_words(tmp_path):
    (tmp_path / "episodes").mkdir()
    with pytest.raises(ValueError, match="holds no episodes"):
        bench_cache.recorded(tmp_path)
    turns = [{"observation": "a b c", "reply": "d"}, {"observation": "e", "reply": "f g"}]
    lines = [json.dumps({"turns": turns}), json.dumps({"turns": []})]
    (tmp_path / "episodes" / "iteration_00001.jsonl").write_text("\n".join(lines))
    assert bench_cache.recorded(tmp_path) == [((3, 1), (1, 2))]


def test_flops_of_an_update():
    shape = bench_models.SHAPES["pocket"]
    config = dataclasses.replace(
        shape,
        vocab_size=10,
        num_layers=3,
        d_model=4,
        d_ff=5,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
    )
    weights = 3 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5)
    sizes = bench_models.UpdateSizes(groups=2, group_size=3, prompt=7, reply=5)

    def expected(tokens, pairs):
        return 4 * (2 * weights * tokens + 4 * 3 * 2 * 2 * pairs + 2 * 4 * 10 * 2 * 3 * 5)

    # the last token of a reply is not computed: prompts of 7, replies of 4
    separate, shared = 6 * (11 * 12 // 2), 2 * (7 * 8 // 2) + 6 * (4 * 7 + 4 * 5 // 2)
    found = bench_models.update_flops(config, sizes, copies=3)
    assert found == expected(6 * 11, separate)
    found = bench_models.update_flops(config, sizes, copies=1)
    assert found == expected(2 * 7 + 6 * 4, shared)


def test_products_of_a_program_are_counted_as_often_as_they_are_made():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    once = 2 * 3 * 4 * 4

    def counted(function, *arguments):
        return tuple(bench_products.products(jax.make_jaxpr(function)(*arguments).jaxpr))

    def chained(x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert counted(lambda x: x @ w, x) == (once, 0)
    assert counted(jax.jit(chained), x) == (7 * once, 0)
    assert counted(lambda x: [x @ w, x @ w][0], x) == (once, 0)  # what nobody reads is not made
    branches = [lambda x: x, lambda x: x @ w]
    assert counted(lambda x: jax.lax.switch(1, branches, x), x) == (once, 0)
    heads = jnp.ones((5, 3, 4))
    assert counted(lambda h: jnp.einsum("hqd,hkd->hqk", h, h), heads) == (0, 2 * 5 * 3 * 3 * 4)


def test_blocks_of_keys_are_counted_up_to_the_diagonal():
    rows, length, heads, size, block = 1, 64, 2, 4, 16
    seen = Seen(
        jnp.arange(length)[None], jnp.zeros((rows, length), int), jnp.zeros((rows, length), int)
    )
    q, k = jnp.ones((rows, length, heads, size)), jnp.ones((rows, length, 1, size))

    def attended(q, k):
        return attend_rows(q, k, k, plan(seen, block=block), 1.0)

    found = bench_products.products(jax.make_jaxpr(attended)(q, k).jaxpr)
    blocks = length // block
    pairs = block * block * blocks * (blocks + 1) / 2  # whole blocks, the diagonal included
    assert found == (0, 4 * heads * size * pairs)


def test_what_an_update_multiplies_beside_what_it_needs(monkeypatch):
    devices = jax.devices
    # on whichever machine: calls of kernels are not counted
    monkeypatch.setattr(jax, "devices", lambda *kind: devices(*kind) if kind == ("cpu",) else [])
    model = dataclasses.replace(
        bench_models.SHAPES["pocket"], num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
    )
    # a prompt of 3 sees 1 + 2 + 3, each of two replies of 1 the prompt and itself
    least = bench_products.needed(model, rows=1, tokens=5, replies=2, reply=1)
    assert least.attention == 3 * 4 * 2 * (6 + 2 * 4)
    assert least.weights == 6 * estimate.matrix_weights(model) * 5
    settings = ProductsBench(preset=("fake-tiny",), tokens=(600, 1200), rows=2, replies=2, reply=8)
    short, long = bench_products.bench_products(settings, quiet).rows
    assert short["tokens_of_a_row"] == 600 and short["trained"] == "all weights"
    for row in (short, long):
        assert row["ratio"] > row["without_reference"] >= 0.9
    # the head is needed for replies only, which are as many
    assert 1.9 < long["weights_tflop"] / short["weights_tflop"] < 2
    with pytest.raises(ValueError, match="--tokens 16 has no room .* give more than 16"):
        ProductsBench(tokens=(16,), replies=2, reply=8)


def test_update_beside_trl(tiny):
    pytest.importorskip("trl", reason="TRL is compared in an environment of its own")
    result = bench_models.bench_update(
        bench_models.UpdateBench(
            against="trl",
            shape="pocket",
            repetitions=1,
            groups=2,
            group_size=3,
            prompt=9,
            reply=5,
            microbatches=2,
        ),
        quiet,
    )
    *ours, peer = result.rows
    assert (result.peer, peer["design"], peer["speedup"]) == ("TRL", "TRL", 1.0)
    for row in ours:
        assert row["loss"] == pytest.approx(peer["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-3)
    assert all(row["of_products"] > 0 for row in result.rows)


def test_trl_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(bench_trl.importlib.util, "find_spec", lambda name: None)
    refused(capsys, bench.main, ["update", "--against", "trl"], "--against trl", "pip install trl")


def test_update_that_cannot_be(tiny):
    with pytest.raises(ValueError, match="--groups 4 do not divide into --microbatches 3"):
        bench_models.bench_update(bench_models.UpdateBench(groups=4, microbatches=3), quiet)
    with pytest.raises(ValueError, match="--prompt"):
        bench_models.bench_update(bench_models.UpdateBench(prompt=10**6), quiet)
    with pytest.raises(ValueError, match="--prompt"):
        bench_sampler.bench_sampler(bench_sampler.SamplerBench(prompt=10**6), quiet)


def measured(argv, path):
    bench.main([*argv.split(), "--json", str(path)])
    return json.loads(path.read_text())


def test_environments(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_envs, "play_stock", bench_envs_double)
    argv = (
        "envs --minihack lava_cross eat --alfworld put --data generated --workers 1 2 --episodes 3"
        " --steps 4 --published-games 2 --repetitions 1"
    )
    report = measured(argv, tmp_path / "bench.json")
    assert report["machine"]["packages"]["alfworld"] and report["machine"]["cores"] >= 1
    assert report["results"]["envs"]["settings"]["minihack"] == ["lava_cross", "eat"]
    rows = report["results"]["envs"]["rows"]
    pools = ["pool, 1 worker", "pool, 2 workers"]
    games = {
        game: [row["design"] for row in rows if row["game"] == game]
        for game in dict.fromkeys(row["game"] for row in rows)
    }
    assert games == {
        "fake door": ["in process", *pools],
        "alfworld put": ["in process", *pools, "stock TextWorld"],
        "minihack lava_cross": ["in process", *pools, "gym.make per episode"],
        "minihack eat": ["in process", *pools, "gym.make per episode"],
        "minihack all families": ["in process", *pools, "gym.make per episode"],
    }
    for row in rows:
        assert row["resets_per_s"] * row["reset_ms"] == pytest.approx(1e3) and row[
            "steps_per_s"
        ] * row["step_us"] == pytest.approx(1e6)
        assert 0 < row["episodes_per_s"] < row["resets_per_s"]
        own = row["design"] in ("stock TextWorld", "gym.make per episode")
        assert (row["step_speedup"] is None) == row["game"].startswith("fake") and (
            row["step_speedup"] == pytest.approx(1.0) or not own
        )
    printed = capsys.readouterr().out
    assert "gym.make per episode" in printed and "lava_cross" in printed and "50 us" in printed


def bench_envs_double(_stock, walks):
    """In place of stock TextWorld, whose reset takes seconds: our engine on the same games."""
    game = load_environment("alfworld", {"data": "generated"}).open(walks[0].game.family)
    assert len(walks) == 1 and len(walks[0].actions) <= 8
    return bench_envs.play_here(game, walks)


def test_engines_can_be_left_out(tmp_path):
    argv = (
        "envs --minihack --alfworld look --data generated --no-stock --workers 1 --episodes 2"
        " --steps 3 --repetitions 1"
    )
    rows = measured(argv, tmp_path / "bench.json")["results"]["envs"]["rows"]
    assert [
        (row["game"], row["design"], row["step_speedup"])
        for row in rows
        if row["game"] != "fake door"
    ] == [
        ("alfworld look", "in process", None),
        ("alfworld look", "pool, 1 worker", None),
    ]


def test_all_designs_play_the_same_number_of_steps():
    walks = bench_envs.moving_walks("room_random", 4, 6)
    assert (
        walks == bench_envs.moving_walks("room_random", 4, 6)
        and len({walk.actions for walk in walks}) == 4
    )
    game = load_environment("minihack").open("room_random")
    here = bench_envs.play_here(game, walks)
    game.close()
    with WorkerPool("minihack", num_workers=1) as pool:
        pooled = bench_envs.play_in_pool(pool, walks)
    assert (here.num_resets, here.num_steps) == (pooled.num_resets, pooled.num_steps) == (
        4,
        here.num_steps,
    ) and 4 < here.num_steps <= 24
    assert bench_envs.play_published_way(walks).num_resets == 4


def test_walks_stop_where_a_game_ends():
    for walk in bench_envs.admissible_walks(load_environment("fake"), "door", 5, 30):
        game = load_environment("fake").open("door")
        game.reset(walk.game)
        ends = [game.step(action).outcome is not None for action in walk.actions]
        assert len(ends) <= 30 and not any(ends[:-1]) and (ends[-1] or len(ends) == 30)


def test_ratios_are_of_the_same_round():
    ours = [
        bench_envs.TimedRun(1.0, 2.0, 10, 100),
        bench_envs.TimedRun(2.0, 4.0, 10, 100),
        bench_envs.TimedRun(1.0, 1.0, 10, 100),
    ]
    peer = [
        bench_envs.TimedRun(1.0, 2.0, 1, 10),
        bench_envs.TimedRun(4.0, 8.0, 1, 10),
        bench_envs.TimedRun(1.0, 5.0, 1, 10),
    ]
    row = bench_envs._row("a game", "ours", ours, peer)
    assert row["steps_per_s"] == 50 and row["step_us"] == 20_000 and row["resets_per_s"] == 10
    assert row["step_speedup"] == 20 and row["reset_speedup"] == 10  # of 10, 20, 50; of 10, 20, 10
    assert bench_envs._sum(ours) == (4.0, 7.0, 30, 300)


def test_a_game_that_fails_ends_the_measurement():
    walks = [bench_envs.Walk(GameId(env="fake", family="door", key="0"), ("walk", "look"))]
    with (
        WorkerPool("fake", num_workers=1, options={"raise_on": "look"}) as pool,
        pytest.raises(ValueError, match="raise"),
    ):
        bench_envs.play_in_pool(pool, walks)


def test_bad_input(capsys, tmp_path):
    refused(
        capsys,
        bench.main,
        ["reflector"],
        "'reflector'",
        "update, envs, rollout, cache, products, speculation, int8, false-alarms, all",
    )
    refused(capsys, bench.main, ["sampler", "--rowz", "3"], "--rowz")
    mixed = ["sampler", "--mixed", "--dtype", "bfloat16"]
    refused(capsys, bench.main, mixed, "--mixed", "--dtype is bfloat16")
    refused(capsys, bench.main, ["update", "--groups", "0"], "--groups", "0")
    refused(capsys, bench.main, ["envs", "--minihack", "castle"], "'castle'")
    refused(capsys, bench.main, ["envs", "--alfworld", "castle"], "'castle'")
    refused(
        capsys,
        bench.main,
        ["envs", "--alfworld", "put", "--data", "/no/such/place"],
        "/no/such/place",
    )
    refused(capsys, bench.main, ["envs", "--workers", "0"], "--workers")
    refused(capsys, bench.main, ["--json", str(tmp_path)], "--json", "folder")
    refused(capsys, bench.main, ["all", "--json", str(tmp_path / "no" / "b.json")], "--json", "no")
    assert not list(tmp_path.iterdir())


def test_cells():
    assert [
        bench._cell(value) for value in (None, 0.0, 0.01234, 2.5, 123.4, 12345.6, 1200, "x")
    ] == [
        *("-", "0.00", "0.0123", "2.50", "123", "12,346", "1,200", "x"),
    ]
