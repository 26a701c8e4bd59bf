"""LossMeter: any cut of the rows into batches and workers gives the report of one call, to the bit."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reports import random_rows, targets_of_every_kind

import fastce
from fastce import LossMeter, SparseTargets, _row_facts, _row_sample
from fastce._exact_sums import ExactSums


def part_of(targets, rows):
    if isinstance(targets, SparseTargets):
        return SparseTargets(targets.indices[rows], targets.values[rows])
    return targets[rows]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 2), st.sampled_from(["float32", "float64"]))
def test_any_batches_give_the_report_of_one_call(cuts, kind, name):
    rng = np.random.default_rng(len(cuts))
    logits = rng.normal(0, 3, (300, 8)).astype(name)
    logits[17] *= 1e-4
    targets, _ = list(targets_of_every_kind(rng, 300, 8))[kind]
    weights = rng.random(300) * (rng.random(300) < 0.9)
    options = {"weight": rng.random(8)}
    meter = LossMeter(**options)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True):
        rows = slice(start, stop)
        meter.update(logits[rows], part_of(targets, rows), weights[rows])
    assert meter.compute().to_json() == fastce.report(logits, targets, sample_weight=weights, **options).to_json()


@pytest.mark.parametrize("most", [1 << 16, 50])
def test_meters_of_several_workers_give_the_report_of_one_call(most, monkeypatch, rng):
    monkeypatch.setattr(_row_sample, "MOST", most)  # also where the sample does not hold all rows
    logits, ids, _ = random_rows(rng, 900)
    expected = fastce.report(logits, ids)
    workers = [LossMeter() for _ in range(3)]
    for start in range(0, 900, 50):
        workers[start // 300].update(logits[start : start + 50], ids[start : start + 50])
    first, second, third = (pickle.loads(pickle.dumps(worker)) for worker in workers)
    assert first.merge(second).merge(third).compute() == expected
    assert workers[0].compute().n_rows == 300
    # In another order only the numbers of rows differ.
    turned = LossMeter().merge(workers[2]).merge(workers[0]).merge(workers[1]).compute().to_dict()
    numbers = expected.to_dict()
    assert [row["loss"] for row in turned.pop("worst_rows")] == [row["loss"] for row in numbers.pop("worst_rows")]
    assert turned == numbers


def test_blocks_within_a_batch_change_nothing(monkeypatch, rng):
    logits, ids, weights = random_rows(rng, 500, 40)
    soft = rng.random((500, 40))
    expected = [fastce.report(logits, targets, sample_weight=weights).to_json() for targets in (ids, soft)]
    monkeypatch.setattr(_row_facts, "LOGITS_AT_ONCE", 333)
    monkeypatch.setattr(_row_facts, "BLOCK_ELEMENTS", 1000)
    cube = (5, 100)
    for targets, text in zip((ids.reshape(cube), soft.reshape(*cube, 40)), expected, strict=True):
        report = fastce.report(logits.reshape(*cube, 40), targets, sample_weight=weights.reshape(cube))
        assert report.to_json() == text


def test_computing_changes_nothing_and_batches_are_not_kept(rng):
    logits, ids, _ = random_rows(rng)
    meter = LossMeter()
    given_logits, given_ids = logits[:200].copy(), ids[:200].copy()
    meter.update(given_logits, given_ids)
    first = meter.compute()
    given_logits[:], given_ids[:] = 0, 0
    assert meter.compute() == first == fastce.report(logits[:200], ids[:200])
    other = copy.deepcopy(meter)
    meter.update(logits[200:], ids[200:])
    assert meter.compute() == fastce.report(logits, ids)
    assert other.compute() == first


def test_a_refused_batch_adds_nothing(rng):
    logits, ids, weights = random_rows(rng)
    meter = LossMeter().update(logits, ids)
    before = meter.compute()
    for error, arguments in [
        (IndexError, (logits, ids + 12)),
        (ValueError, (logits[:, :5], ids % 5)),
        (ValueError, (logits, np.eye(12)[ids])),
        (ValueError, (logits, ids, -weights)),
        (TypeError, (ids[:, None], ids)),
    ]:
        with pytest.raises(error):
            meter.update(*arguments)
    assert meter.compute() == before


def test_meters_that_do_not_belong_together_are_not_merged(rng):
    logits, ids, _ = random_rows(rng)
    meter = LossMeter().update(logits, ids)
    before = meter.compute()
    for other in (
        LossMeter(n_bins=3).update(logits, ids),
        LossMeter(weight=np.arange(12.0)).update(logits, ids),
        LossMeter().update(logits[:, :5], ids % 5),
        LossMeter().update(logits, np.eye(12)[ids]),
        LossMeter(ignore_index=1).update(logits, ids),
        LossMeter(ignore_index=[-100, 1]),
        LossMeter(ignore_index=None),
    ):
        with pytest.raises(ValueError, match="must"):
            meter.merge(other)
    with pytest.raises(TypeError, match="LossMeter"):
        meter.merge(before)
    named = [LossMeter(class_names=names).update(logits, ids) for names in (list("abcdefghijkl"), list("bacdefghijkl"))]
    with pytest.raises(ValueError, match="same class_names"):
        named[0].merge(named[1])
    assert meter.merge(LossMeter()).compute() == before
    with pytest.raises(ValueError, match="at least one update"):
        LossMeter().compute()


def test_a_meter_without_rows_keeps_its_weight_and_its_names_when_it_is_merged(rng):
    logits, ids, _ = random_rows(rng)
    weight, names = rng.random(12), list("abcdefghijkl")
    for mine, theirs in ((None, weight), (weight, None), (weight, 2 * weight)):
        with pytest.raises(ValueError, match="same weight"):
            LossMeter(weight=mine).merge(LossMeter(weight=theirs).update(logits, ids))
    with pytest.raises(ValueError, match="class_names"):
        LossMeter(class_names=names[:5]).merge(LossMeter().update(logits, ids))
    with pytest.raises(ValueError, match="weight"):
        LossMeter(weight=weight[:5]).merge(LossMeter(weight=weight).update(logits, ids))
    merged = LossMeter(weight=list(weight), class_names=names).merge(LossMeter(weight=weight).update(logits, ids))
    assert merged.compute() == fastce.report(logits, ids, weight=weight, class_names=names)
    assert LossMeter().merge(LossMeter(class_names=names).update(logits, ids)).compute().per_class[1].name == "b"


@pytest.mark.parametrize("kind", [iter, list, np.array, tuple])
def test_ids_to_ignore_are_the_meter_s_own(kind, rng):
    logits, ids, _ = random_rows(rng)
    given = kind([0, 3])
    meter = LossMeter(ignore_index=given).update(logits[:100], ids[:100])
    if hasattr(given, "append"):
        given.append(1)
    assert meter.update(logits[100:], ids[100:]).compute() == fastce.report(logits, ids, ignore_index=[0, 3])
    for ignored, error in (([0.5], TypeError), (2**70, ValueError)):
        with pytest.raises(error, match="ignore_index"):
            LossMeter(ignore_index=ignored)
    soft = LossMeter(ignore_index=None).update(logits, np.eye(12)[ids])
    assert soft.compute().loss == pytest.approx(fastce.report(logits, ids).loss, rel=1e-12)


@pytest.mark.parametrize("kind", [iter, lambda names: dict.fromkeys(names).keys(), np.array])
def test_names_of_any_kind_go_to_another_process(kind, rng):
    logits, ids, _ = random_rows(rng)
    names = list("abcdefghijkl")
    meter = pickle.loads(pickle.dumps(LossMeter(class_names=kind(names))))
    meter = pickle.loads(pickle.dumps(meter.update(logits, ids)))
    assert meter.compute() == fastce.report(logits, ids, class_names=names)


def test_weights_that_change_later_change_nothing(rng):
    logits, ids, _ = random_rows(rng)
    weight, names = rng.random(12), list("abcdefghijkl")
    expected = fastce.report(logits, ids, weight=weight, class_names=names)
    meter = LossMeter(weight=weight, class_names=names).update(logits[:100], ids[:100])
    weight[:], names[0] = 1.0, "z"
    assert meter.update(logits[100:], ids[100:]).compute() == expected


def test_a_meter_merged_with_itself_has_seen_everything_twice(rng):
    logits, ids, _ = random_rows(rng)
    meter = LossMeter().update(logits, ids)
    report = meter.merge(meter).compute()
    assert report.n_rows == 2 * len(ids)
    assert report.loss == fastce.report(np.tile(logits, (2, 1)), np.tile(ids, 2)).loss


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40), st.integers(0, 40), st.integers(1, 4))
def test_sums_are_exact_in_any_parts(numbers, cut, n_groups):
    values, groups = np.array(numbers), np.arange(len(numbers)) % n_groups
    whole, part, rest = ExactSums(n_groups), ExactSums(n_groups), ExactSums(n_groups)
    whole.add(values, groups)
    part.add(values[cut:][::-1], groups[cut:][::-1])
    rest.add(values[:cut], groups[:cut])
    part.merge(rest)
    # What is below 2**-992 is dropped.
    allowed = Fraction(len(numbers), 2**992)
    assert abs(Fraction(whole.total()) - Fraction(math.fsum(numbers))) <= allowed
    assert part.total() == whole.total()
    np.testing.assert_array_equal(part.totals(), whole.totals())
    for group, total in enumerate(whole.totals()):
        assert total == pytest.approx(math.fsum(values[groups == group]), rel=3e-16, abs=1e-290)


def test_sums_of_many_large_numbers_carry(rng):
    sums, count = ExactSums(2), 3000
    for _ in range(count):
        sums.add(np.full(3, 2.0**32 - 1), np.array([0, 1, 1]))
    np.testing.assert_array_equal(sums.totals(), [count * (2.0**32 - 1), 2 * count * (2.0**32 - 1)])
    assert all((digits >= 0).all() and (digits < 2**32).all() for digits in sums.digits.values())
    columns = rng.random((50, 2)) * [1e-200, 1e200]
    sums, turned = ExactSums(2), ExactSums(2)
    sums.add(columns)
    turned.add(columns[::-1])
    np.testing.assert_array_equal(sums.totals(), turned.totals())
    sums.add(np.array([np.inf, np.nan]), np.array([0, 1]))
    assert sums.totals()[0] == math.inf and math.isnan(sums.totals()[1]) and math.isnan(sums.total())
