"""No password and no token in what is shown: addresses, tokens, what the environment holds."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_core.secrets import hide, hide_all

TOKEN = "Zq7" * 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("foo://user:sesame@host:80/x", "foo://***@host:80/x"),
        ("http://u:se/sa@me?#@host:1/x", "http://***@host:1/x"),
        ("http://:sesame@host", "http://***@host"),
        ("https://sesame@host, http://v:sesame@k", "https://***@host, http://***@k"),
        ("'mysql+pymysql://root:sesame@h/db'", "'mysql+pymysql://***@h/db'"),
        ("http://h/x?token=sesame&y=1", "http://h/x?token=***&y=1"),
        ("s3://h/x?X-Amz-Signature=sesame&a=1#access_token=sesame", None),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3D;PWD=sesame", "mssql+pyodbc:///?odbc_connect=***"),
        ("{'Authorization': 'Basic sesame'}", "{'Authorization': 'Basic ***'}"),
        ("authorization: bearer sesame", "authorization: bearer ***"),
        *((f"no {kind}{TOKEN} here", f"no {kind}*** here") for kind in ("hf_", "pnu_", "ghp_")),
    ],
)
def test_a_secret_is_not_shown(text: str, shown: str | None) -> None:
    hidden = hide(text)
    assert "sesame" not in hidden and TOKEN not in hidden
    assert shown is None or hidden == shown
    assert hide(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/models/m-svd_llm@hull",
        "file:///home/me/models/m-svd_llm@hull-0.6",
        "sqlite:////home/a@b/mlflow.db",
        "svd_llm@hull, kept 0.5; tokens=3, see `eigenpress run --help`",
        "http://host/page?lines=3&kept=0.5",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide(text) == text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "open sesame", "open sesame"),
        ("PREFECT_API_AUTH_STRING", "admin:sesame", "admin:sesame"),
        ("PREFECT_API_KEY", "sesame-1", "sesame-1"),
        ("HF_TOKEN", "sesame-2", "sesame-2"),
        ("AWS_SECRET_ACCESS_KEY", "sesame-3", "sesame-3"),
        ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "p://u:se%40same@h/d", "se@same"),
        ("https_proxy", "http://me:se same@proxy:3128", "se same"),
    ],
)
def test_what_the_environment_holds_is_hidden_wherever_a_library_says_it(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for other in ("TOKENIZERS_PARALLELISM", "PWD", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(other, "openly")
    assert hide(f"refused {said!r} openly") == "refused '***' openly"


def test_numbers_names_and_structure_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "123456")
    record = {"123456": [123456, None, {"a": ("b://u:p@h", 0.123456)}], "c": "123456"}
    assert hide_all(record) == {
        "123456": [123456, None, {"a": ["b://***@h", 0.123456]}],
        "c": "***",
    }
    json.dumps(hide_all(record))


@given(
    st.text(st.characters(categories=["L", "N", "P"], exclude_characters="'\"/@:"), min_size=6),
    st.sampled_from(["http", "postgresql+psycopg2", "foo"]),
)
def test_no_password_of_an_address_is_left(password: str, scheme: str) -> None:
    assert hide(f"at {scheme}://user:{password}@host/x.") == f"at {scheme}://***@host/x."
