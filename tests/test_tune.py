"""The dispatch table from records, and the cuts that are timed for them."""

import json

import pytest

from benchmarks import tune
from vllm_b200_plugin import small_m_table


def row(num_tokens, impl, us, us_chained):
    return {
        "kind": "bf16", "m": num_tokens, "n": 64, "k": 128, "case": "", "impl": impl, "us": us, "us_chained": us_chained
    }  # fmt: skip


def test_table_takes_ours_where_it_clearly_beats_every_peer(tmp_path):
    rows = [
        row(1, "cublas", 5.0, 6.0), row(1, "ours 1 8 1 0", 2.0, 4.0), row(1, "ours q 2 8 1 0", 1.0, 5.0),
        row(2, "cublas", 5.0, 6.0), row(2, "ours 1 8 1 0", 3.0, 4.0),
        row(4, "cublas", 5.0, 6.0), row(4, "ours 1 8 1 0", 3.0, 5.9),
        row(8, "cublas", 5.0, 6.0), row(8, "ours q 2 8 1 0", 3.0, 3.0), row(8, "other", 9.0, 3.1),
        row(16, "cublas", 5.0, 6.0), row(16, "ours q 2 8 1 0", 3.0, 5.0), {"kind": "bf16", "m": 16, "n": 64, "k": 128,
        "case": "", "impl": "gone", "missing": "not installed"},
        row(32, "cublas", 5.0, 6.0), row(32, "ours 1 8 1 0", 8.0, 8.0),
    ]  # fmt: skip
    record = tmp_path / "record.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in [{"env": {"capability": [9, 0]}}, *rows]))
    names = {}
    exec(tune.make_table([record]), names)
    table = names["TABLE"]
    expected = ((2, (1, 8, 1, 0), False), (8, None, False), (16, (2, 8, 1, 0), True))
    assert table[((9, 0), "bf16")].pop((64, 128)) == expected
    assert table == small_m_table.TABLE, "shapes that are not in the record keep their rows"


def test_a_record_without_peers_makes_no_table():
    with pytest.raises(ValueError, match="no peer was timed"):
        tune._thresholds([row(1, "ours 1 8 1 0", 2.0, 4.0)])


@pytest.mark.parametrize("kind", tune.KINDS)
@pytest.mark.parametrize("num_tokens", tune.NUM_TOKENS)
def test_every_shape_has_cuts_that_the_kernel_takes(kind, num_tokens):
    _, shapes, size = tune.KINDS[kind]
    for n, k in (shape for shape in shapes if shape[0] * shape[1] * size <= tune.MAX_WEIGHT_BYTES):
        cuts = list(tune.likely_cuts(n, int(k * size), num_tokens))
        assert 1 <= len(cuts) <= 20
        assert len(set(cuts)) == len(cuts)
        for cut in cuts:
            assert cut.warps <= (16 if cut.row_tiles * -(-num_tokens // 8) <= 4 else 8)
            assert not cut.chunks or cut.warps % cut.chunks == 0
