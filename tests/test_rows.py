"""Row types and their Parquet schemas say the same."""

from dataclasses import fields

import pyarrow as pa
import pytest

from cluster.errors import BadInputError
from pipeline.rows import SCHEMAS, Sample, from_table, parse_kind, to_table


@pytest.mark.parametrize("row_type", SCHEMAS)
def test_a_schema_has_the_fields_of_its_row(row_type):
    assert SCHEMAS[row_type].names == [field.name for field in fields(row_type)]


@pytest.mark.parametrize("row_type", SCHEMAS)
def test_a_schema_allows_null_where_its_row_allows_none(row_type):
    for field in fields(row_type):
        assert SCHEMAS[row_type].field(field.name).nullable == ("None" in str(field.type))


def test_rows_survive_a_table():
    row = Sample("k", "p", 1, "m", "text \u2028 with a line separator", None, 0, "an error")
    assert from_table(Sample, to_table(Sample, [row])) == [row]


def test_other_columns_are_refused_at_the_door():
    with pytest.raises(ValueError, match="expected the columns of Sample"):
        from_table(Sample, pa.table({"key": ["k"]}))


def test_a_kind_by_its_name():
    assert [parse_kind(name) for name in ("number", "open", None)] == ["number", "open", None]
    with pytest.raises(BadInputError, match="kind='essay': expected number, choice, boolean or op"):
        parse_kind("essay")
