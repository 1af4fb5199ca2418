"""URLs: one spelling for each store, none that holds a secret; and what `-o` may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.data.folder import Output
from fanfold.data.urls import plain_url, split_bucket
from fanfold.errors import PlanError


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("s3a://bucket/in/*.parquet", "s3://bucket/in/*.parquet"),
        ("S3N://bucket/x", "s3://bucket/x"),
        ("s3://bucket/a b/é?.jsonl", "s3://bucket/a b/é?.jsonl"),
        ("gcs://bucket/x", "gs://bucket/x"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("https://host/x?part=1", "https://host/x?part=1"),
    ],
)
def test_a_url_has_one_spelling(given, plain):
    assert plain_url(given) == plain


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:hush@bucket/in.parquet",
        "s3://AKIAKEY@bucket/in.parquet",
        "https://me:hush@host/in.parquet",
        "https://host/in.parquet?X-Amz-Expires=60&X-Amz-Signature=hush",
        "https://host/in.parquet?sv=1&sig=hush",
        "s3://a:hush@[broken/in.parquet",
    ],
)
def test_a_url_that_holds_a_secret_is_refused_and_the_secret_not_shown(url):
    with pytest.raises(PlanError) as refused:
        plain_url(url)
    assert "run.json" in refused.value.found
    assert "AWS_PROFILE" in refused.value.do
    assert "hush" not in str(refused.value)
    assert "AKIAKEY" not in str(refused.value)


def test_a_bucket_and_its_prefix():
    assert split_bucket("s3://bucket/a/b/") == ("bucket", "a/b")
    assert split_bucket("s3://bucket") == ("bucket", "")


def test_an_output_in_a_store_is_a_prefix():
    output = Output("s3a://bucket/some/out/")
    assert output.shown == output.folder == output.place == "s3://bucket/some/out"
    assert output.file is output.local is None
    assert output.format == "parquet"


def test_an_output_on_a_disk_is_a_path_file_urls_too(tmp_path):
    for given in (tmp_path / "out", str(tmp_path / "out"), f"file://{tmp_path}/out"):
        output = Output(given)
        assert output.shown == output.folder == output.local == tmp_path / "out"
    assert Output(f"file://{tmp_path}/a%20b.parquet").folder == tmp_path / "a b.parquet.run"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_one_file_in_a_store_is_refused(suffix):
    with pytest.raises(PlanError) as refused:
        Output(f"s3://bucket/out{suffix}")
    assert refused.value.found == "one file in an object store"
    assert "-o s3://bucket/out" in refused.value.do


@pytest.mark.parametrize("url", ["s3://", "s3:///out", "s3://bucket/out?versionId=1"])
def test_an_output_without_a_bucket_or_with_a_query_is_refused(url):
    with pytest.raises(PlanError) as refused:
        Output(url)
    assert "SCHEME://BUCKET/PREFIX" in refused.value.allowed


def test_a_url_that_was_made_a_path_is_refused():
    with pytest.raises(PlanError) as refused:
        Output(Path("s3://bucket/out"))
    assert '"s3://bucket/out"' in refused.value.do
