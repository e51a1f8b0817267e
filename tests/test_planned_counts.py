"""The counts that plan foretells, of samples and of rejects, are exact or within their interval."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from planning import (
    MakeShard,
    annotated_bytes,
    bytes_of,
    no_scratch_left,  # noqa: F401 (a fixture)
    plan_of,
    some_samples,
)

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import DamagedShard
from pseudolabel.estimates import effective, makespan, mean_interval, t_quantile, wilson
from pseudolabel.plan.census import draw, take_census
from pseudolabel.plan.probe import doubling
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard


def _skewed(directory: Path) -> int:
    """Long shards of tiny samples beside short ones of large samples, in no order: densities differ by 20."""
    rng, total = random.Random(3), 0
    for number in range(60):
        rows, size = (rng.randint(40, 120), 100) if number % 3 else (rng.randint(5, 30), 20_000)
        write_shard(directory / f"s-{number:03d}.tar", ((str(row), {"txt": bytes(size)}) for row in range(rows)))
        total += rows
    return total


def test_counts_are_exact_or_within_their_interval(tmp_path: Path) -> None:
    """On a skewed corpus, for many seeds: the interval holds the truth about as often as it says, and isn't idle."""
    total = _skewed(tmp_path / "shards")
    shards = list_shards(tmp_path / "shards")
    counted = take_census(shards, probe_shards=8, seed=0)
    assert (counted.samples, counted.low, counted.high, counted.exact, counted.indexed) == (
        total,
        total,
        total,
        True,
        60,
    )
    assert sum(counted.by_shard) == total
    seeds = [take_census(shards, probe_shards=12, seed=seed, exact=False) for seed in range(40)]
    assert all(not one.exact and one.indexed <= 12 for one in seeds)
    assert sum(one.low <= total <= one.high for one in seeds) >= 36
    assert len({one.samples for one in seeds}) > 20, "the seed draws"
    mean = sum(one.samples for one in seeds) / 40
    assert mean == pytest.approx(total, abs=3 * seeds[0].standard_error / math.sqrt(40)), "unbiased"
    assert all(sum(one.by_shard) == pytest.approx(one.samples, abs=1) for one in seeds)
    for one in seeds:  # what the picks stand for is the corpus
        assert sum(pick.stands_for * pick.samples for pick in one.picks) == pytest.approx(one.samples, abs=1)


def test_an_estimated_corpus_is_said_to_be_estimated(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    for number in range(9):
        make_shard(f"s-{number}", some_samples(30 + 3 * number, start=100 * number))
    found = plan_of(tmp_path / "shards", teacher_dir, probe_shards=4, exact=False, probe_samples=100)
    total = sum(30 + 3 * number for number in range(9))
    assert not found.samples_exact
    assert 0 < found.samples_standard_error < total / 20
    assert found.samples_interval[0] <= total <= found.samples_interval[1]
    assert found.shards_indexed <= 4
    actual = annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store")
    assert found.store_bytes == pytest.approx(actual, rel=0.1)


def test_a_shard_is_drawn_as_often_as_its_size_says() -> None:
    rng = random.Random(0)
    times = [0, 0, 0, 0]
    for _ in range(2000):
        for position in draw([1, 0, 2, 7], 2, rng):
            times[position] += 1
    assert times[1] == 0
    assert [n / 4000 for n in times] == pytest.approx([0.1, 0, 0.2, 0.7], abs=0.02)
    assert draw([5, 5], 2, rng) == [0, 1]
    sizes = [50, 50, 600, 50, 600, 50]  # Horvitz–Thompson: what the draws stand for is as many shards as there are
    stood_for = sum(sum(sizes) / (3 * sizes[position]) for _ in range(4000) for position in draw(sizes, 3, rng))
    assert stood_for / 4000 == pytest.approx(len(sizes), rel=0.05)


def test_intervals() -> None:
    for degrees, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (30, 2.042), (1000, 1.962)):
        assert t_quantile(degrees) == pytest.approx(wanted, rel=2e-3)
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, 1.0, 12.706), rel=1e-4)
    low, high = wilson(0.1, 100)  # Wilson (1927) for 10 of 100
    assert (low, high) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0.0, 1000) == pytest.approx((0.0, 3.84 / 1003.84), abs=1e-5)
    assert wilson(1.0, 10)[1] == 1.0
    assert effective([1.0, 1.0, 1.0]) == 3.0
    assert effective([1.0, 0.0]) == 1.0


def test_makespan() -> None:
    assert makespan([1, 1, 1], 2) == 2
    assert makespan([5, 1, 1, 1], 2) == 5
    assert makespan([1, 1, 1, 5], 2) == 6
    assert makespan([2.5], 4) == 2.5
    assert makespan([], 4) == 0


@pytest.mark.parametrize("total", [1, 7, 8, 23, 24, 100, 512, 513])
def test_pieces_start_small_and_sum_up(total: int) -> None:
    lengths = doubling(total)
    assert sum(lengths) == total
    assert lengths == sorted(lengths)
    assert lengths[0] <= 23


def test_rejects_to_expect(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    """Every tenth sample of one shard of three; the probe sees half of each."""
    for number, bad in enumerate((10, 0, 0)):
        make_shard(f"s-{number}", some_samples(400, bad_every=bad, start=1000 * number))
    found = plan_of(tmp_path / "shards", teacher_dir, probe_samples=600)
    assert found.rejects == pytest.approx(40, abs=2)
    assert found.reject_fraction == pytest.approx(40 / 1200, abs=2e-3)
    assert found.reject_interval[0] < 40 / 1200 < found.reject_interval[1]
    assert found.rows == pytest.approx(1160, abs=2)
    assert found.notes == ()
    actual = annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store")
    assert found.store_bytes == pytest.approx(actual, rel=0.1)
    assert found.reject_interval[1] < 0.1
    (note,) = plan_of(tmp_path / "shards", teacher_dir, probe_samples=600, max_reject_fraction=0.01).notes
    assert "annotate would stop" in note


def test_nothing_that_can_be_labeled(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    make_shard("s", some_samples(12, bad_every=1))
    found = plan_of(tmp_path / "shards", teacher_dir)
    assert (found.samples, found.rejects, found.rows) == (12, 12, 0)
    assert (found.encodings, found.recommended) == ((), None)
    assert found.store_bytes == pytest.approx(
        annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store"), rel=0.1
    )


def test_damaged_shards_are_named_and_the_others_planned(
    tmp_path: Path, make_shard: MakeShard, teacher_dir: Path
) -> None:
    for name in "abcde":
        path = make_shard(name, some_samples(50))
        if name in "bd":
            path.write_bytes(path.read_bytes()[: 3 * 1024 + 100])
    (tmp_path / "shards" / "e.tar").write_bytes(b"")
    found = plan_of(tmp_path / "shards", teacher_dir)
    assert [Path(line.partition(": ")[0]).name for line in found.damaged] == ["b.tar", "d.tar", "e.tar"]
    assert "truncated" in found.damaged[0]
    assert "3 of 5" in found.notes[0]
    assert (found.samples, found.shards) == (100, 5)
    with pytest.raises(DamagedShard):
        annotate(tmp_path / "shards", f"checkpoint:{teacher_dir}", tmp_path / "store", engine=LocalEngine("cpu", 1))
    assert found.store_bytes == pytest.approx(bytes_of(tmp_path / "store"), rel=0.1)


def test_no_whole_shard_is_an_error(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    path = make_shard("a", some_samples(5))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DamagedShard, match=r"a\.tar: this shard is truncated.*\n.*none of the 1 shards"):
        plan_of(tmp_path / "shards", teacher_dir)
