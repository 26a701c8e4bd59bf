"""Findings: each one is made where it should be, and is not made on rows that only come near it."""

import math

import numpy as np
import pytest

import fastce
from fastce.findings import CODES, SUSPICIONS

ROWS, CLASSES = 600, 6


def good_rows(rng, rows=ROWS, classes=CLASSES):
    """Logits whose softmax is right as often as it says: ids are drawn from it."""
    logits = rng.normal(0, 2, (rows, classes))
    ids = (np.cumsum(fastce.softmax(logits), axis=1) > rng.random((rows, 1))).argmax(axis=1)
    return logits, ids


def sharp_rows(rng, rows=ROWS, classes=CLASSES):
    """Logits that lead at the target by about 8, and the ids."""
    ids = np.arange(rows) % classes
    logits = rng.normal(0, 1, (rows, classes))
    logits[np.arange(rows), ids] += 8
    return logits, ids


def with_entry(value, *, at_target=False):
    def make(rng):
        logits, ids = good_rows(rng)
        logits[3, ids[3] if at_target else (ids[3] + 1) % CLASSES] = value
        return logits, ids

    return make


def changed(change, rows=good_rows):
    def make(rng):
        return change(*rows(rng))

    return make


PERMUTATION = np.array([1, 0, 2, 4, 3, 5])
MASKED = changed(lambda z, t: (np.where(np.arange(CLASSES) == (t[:, None] + 1) % CLASSES, -np.inf, z), t))
# Soft targets that leave class 2 out, and those that give it something, but never the most.
WITHOUT_ONE = np.eye(CLASSES)[[0, 1, 3, 4, 5] * (ROWS // 5)]
SMALL_SHARE = 0.6 * WITHOUT_ONE + 0.4 * np.eye(CLASSES)[2]
ONE_LEADS = 50.0 * (np.arange(CLASSES) == 2)
# code -> (makers of rows that have it, makers of rows that come near and do not).
CASES = {
    "nonfinite_logits": (
        [with_entry(np.nan), with_entry(np.inf), changed(lambda z, t: (np.where(t[:, None] == 1, -np.inf, z), t))],
        [with_entry(-np.inf), MASKED, with_entry(-np.inf, at_target=True)],
    ),
    "infinite_loss": ([with_entry(-np.inf, at_target=True)], [with_entry(-np.inf), with_entry(np.nan, at_target=True)]),
    "probabilities_as_logits": (
        [
            changed(lambda z, t: (fastce.softmax(z), t)),
            changed(lambda z, t: (fastce.softmax(z.astype(np.float16)), t)),
            changed(lambda z, t: (np.eye(CLASSES)[t], t)),
        ],
        [
            changed(lambda z, t: (fastce.softmax(z) * 1.1, t)),
            changed(lambda z, t: (fastce.log_softmax(z), t)),
            changed(lambda z, t: (fastce.softmax(z) - np.eye(CLASSES)[0] * 0.5 + 0.5 / CLASSES, t)),
        ],
    ),
    "labels_start_at_1": (
        [changed(lambda z, t: (np.pad(z, ((0, 0), (1, 0))), t + 1))],
        [
            good_rows,
            changed(lambda z, t: (z[(t > 0) & (t != 4)], t[(t > 0) & (t != 4)])),
            changed(lambda z, t: (z[:5, :3], np.array([1, 2, 1, 2, 2]))),  # in so few rows a class may be missing
        ],
    ),
    "labels_shifted": (
        [
            changed(lambda z, t: (z, (t + 1) % CLASSES), sharp_rows),
            changed(lambda z, t: (z, (t - 2) % CLASSES), sharp_rows),
            changed(lambda z, t: (4 * z, (t + 2) % CLASSES)),  # overconfident even with right labels
        ],
        [sharp_rows, changed(lambda z, t: (z, PERMUTATION[t]), sharp_rows), changed(lambda z, t: (-z, t), sharp_rows)],
    ),
    "labels_permuted": (
        [changed(lambda z, t: (z, PERMUTATION[t]), sharp_rows)],
        [
            sharp_rows,
            changed(lambda z, t: (z, (t + 1) % CLASSES), sharp_rows),
            changed(lambda z, t: (z, np.minimum(t, 2)), sharp_rows),
        ],
    ),
    "worse_than_uniform": (
        [changed(lambda z, t: (-z, t)), changed(lambda z, t: (20 * z, t))],
        [
            good_rows,
            changed(lambda z, t: (0 * z, t)),
            changed(lambda z, t: (z, (t + 1) % CLASSES), sharp_rows),
            with_entry(-np.inf, at_target=True),  # an infinite mean says that of one row
        ],
    ),
    "equal_rows": (
        [
            changed(lambda z, t: (0 * z, t)),
            changed(lambda z, t: (0 * z + [1, 2, 3, 0, 0, 0], t)),
            changed(lambda z, t: (0 * z + t[:, None], t)),  # a constant a row is no information either
        ],
        [good_rows, changed(lambda z, t: (0.01 * z, t)), changed(lambda z, t: (np.sort(z[:1]) + 0.1 * z, t))],
    ),
    "one_class_predicted": (
        [changed(lambda z, t: (z + ONE_LEADS, t))],
        [good_rows, changed(lambda z, t: (z + ONE_LEADS * (t[:, None] > 0), t)), changed(lambda z, t: (z * 0, t))],
    ),
    "huge_logits": (
        [changed(lambda z, t: (z + 3e4, t)), changed(lambda z, t: (z - 3e4, t)), changed(lambda z, t: (1e3 * z, t))],
        [good_rows, changed(lambda z, t: (np.where(np.eye(CLASSES, dtype=bool)[(t + 1) % CLASSES], -1e9, z), t))],
    ),
    "class_never_predicted": (
        [changed(lambda z, t: (z - ONE_LEADS, t))],
        [good_rows, changed(lambda z, t: ((z - ONE_LEADS)[t != 2], t[t != 2]))],
    ),
    "class_never_seen": (
        [changed(lambda z, t: (z[t != 2], t[t != 2])), changed(lambda z, t: (z, WITHOUT_ONE))],
        [good_rows, changed(lambda z, t: (z[:3], t[:3])), changed(lambda z, t: (z, SMALL_SHARE))],
    ),
    "overconfident": (
        [changed(lambda z, t: (2 * z, t))],
        [
            good_rows,
            changed(lambda z, t: (0.5 * z, t)),
            changed(lambda z, t: (2 * z[:20], t[:20])),
            changed(lambda z, t: (np.where(np.arange(ROWS)[:, None] % 5, 1.05 * z, np.nan), t)),  # those are not right
        ],
    ),
    "log_probabilities": (
        [changed(lambda z, t: (fastce.log_softmax(z), t)), changed(lambda z, t: (np.log(fastce.softmax(z)), t))],
        [
            good_rows,
            changed(lambda z, t: (fastce.log_softmax(z) + 0.1, t)),
            changed(lambda z, t: (fastce.softmax(z), t)),
        ],
    ),
}


def codes_of(make, rng):
    return [finding.code for finding in fastce.report(*make(rng)).findings]


def test_every_finding_has_its_cases():
    assert set(CASES) == set(CODES)
    assert len(SUSPICIONS) <= len(CODES)


@pytest.mark.parametrize(("code", "number"), [(code, n) for code in CASES for n in range(len(CASES[code][0]))])
def test_it_is_found(code, number, rng):
    report = fastce.report(*CASES[code][0][number](rng))
    found = [finding for finding in report.findings if finding.code == code]
    assert len(found) == 1, [finding.code for finding in report.findings]
    code, message, fix = found[0]
    assert len(message) > 20 and len(fix) > 20 and "nan is" not in message
    text = " ".join(str(report).split())
    assert message in text and fix in text


@pytest.mark.parametrize(("code", "number"), [(code, n) for code in CASES for n in range(len(CASES[code][1]))])
def test_it_is_not_found(code, number, rng):
    assert code not in codes_of(CASES[code][1][number], rng)


@pytest.mark.parametrize("kind", ["ids", "soft"])
def test_nothing_is_found_on_good_rows(kind, rng):
    logits, ids = good_rows(rng, 5000)
    targets = ids if kind == "ids" else fastce.softmax(logits)
    assert fastce.report(logits, targets).findings == []
    assert fastce.report(logits.astype(np.float16), targets).findings == []


def test_messages_name_what_was_found(rng):
    def message(make, code):
        return next(f.message for f in fastce.report(*make(rng)).findings if f.code == code)

    floor = math.log(1 + (CLASSES - 1) / math.e)
    assert f"{floor:.4f}" in message(CASES["probabilities_as_logits"][0][0], "probabilities_as_logits")
    eye = np.eye(CLASSES)
    assert fastce.report(eye, np.arange(CLASSES)).loss == pytest.approx(floor, rel=1e-12)
    logits, ids = sharp_rows(rng)
    for shift in (1, 2, -2):
        report = fastce.report(logits, (ids + shift) % CLASSES)
        assert f"(targets {-shift:+d}) % {CLASSES}" in report.findings[0].message
        assert f"about {fastce.cross_entropy(logits, ids):.4f}" in report.findings[0].message
    permuted = message(CASES["labels_permuted"][0][0], "labels_permuted")
    assert "0 -> 1, 1 -> 0, 3 -> 4, 4 -> 3" in permuted
    names = ["ant", "bee", "cat", "dog", "elk", "fox"]
    report = fastce.report(np.delete(logits, np.flatnonzero(ids == 2), 0), ids[ids != 2], class_names=names)
    assert any(f.code == "class_never_seen" and f.message.endswith(": cat") for f in report.findings)
    logits[5] = np.nan
    weight, sample_weight = rng.random(CLASSES), rng.random(ROWS)
    others = [np.delete(array, 5, 0) for array in (logits, ids, sample_weight)]
    finite = fastce.cross_entropy(others[0], others[1], weight=weight, sample_weight=others[2])
    report = fastce.report(logits, ids, weight=weight, sample_weight=sample_weight)
    assert f"finite loss: {finite:.4f})" in report.findings[0].message


def test_a_shift_of_many_classes_is_found_on_a_part_of_the_sample(rng):
    logits, ids = sharp_rows(rng, 3000, 1000)
    report = fastce.report(logits.astype(np.float32), (ids + 7) % 1000)
    assert report.findings[0].code == "labels_shifted" and "(targets -7) % 1000" in report.findings[0].message
