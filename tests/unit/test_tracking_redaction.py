"""No secret reaches a message, a parameter or a tag."""

import pytest

from metaloom.tracking import mask_secrets, strip_credentials

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:hunter2@host/", "https://host/"),
        ("https://hunter2@host:5000/path?x=1", "https://host:5000/path?x=1"),
        ("postgresql+psycopg2://me:hunter2@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        ("https://user:p@hunter2@host/a", "https://host/a"),
        ("https://user:hun/hunter2@host/a", "https://host/a"),
        (
            "postgresql://db/mlflow?user=me&password=hunter2&x=1",
            "postgresql://db/mlflow?user=me&password=***&x=1",
        ),
        ("s3://bucket/a?X-Amz-Signature=hunter2", "s3://bucket/a?X-Amz-Signature=***"),
        (
            "cannot reach 'https://a:hunter2@h/' nor http://b:hunter2@i/",
            "cannot reach 'https://h/' nor http://i/",
        ),
        ("Authorization: Bearer hunter2hunter2", "Authorization: Bearer ***"),
        ("api_key=hunter2, next", "api_key=***, next"),
    ],
)
def test_credentials_are_taken_out_of_texts(text: str, expected: str) -> None:
    assert strip_credentials(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/a@b/runs/mlflow.db",
        "https://host:5000/packages/pip@24/x",
        "https://host/a?num_tokens=512",
        "write to someone@example.org",
        "pad_token=<pad>",
    ],
)
def test_texts_without_credentials_stay_as_they_are(text: str) -> None:
    assert strip_credentials(text) == text


def test_params_are_masked_by_name_and_by_content() -> None:
    masked = mask_secrets(
        {
            "data.password": SECRET,
            "storage.s3.secret_access_key": SECRET,
            "hub.token": SECRET,
            "hub.api_key": SECRET,
            "tracking.uri": f"https://me:{SECRET}@host",
            "data.num_tokens": "512",
            "model.pad_token": "<pad>",
            "hub.secret": "",
        }
    )
    assert SECRET not in " ".join(masked.values())
    assert masked["tracking.uri"] == "https://host"
    assert masked["data.num_tokens"] == "512"
    assert masked["model.pad_token"] == "<pad>"
    assert masked["hub.secret"] == ""
