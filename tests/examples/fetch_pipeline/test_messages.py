"""What the fetch pipeline takes for a job's id and a station's name, whoever wrote it."""

from __future__ import annotations

import msgspec
import pytest

from conveyor import Message
from examples.fetch_pipeline.messages import StartFetch, job_of


@pytest.mark.parametrize("job_id", ["job-1\n", "", "-1", "jöb", "a" * 65])
def test_a_job_id_that_is_none_is_refused_and_another_one_is_made(job_id: str) -> None:
    body = msgspec.json.encode({"station": "berlin", "job_id": job_id})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=StartFetch)
    made = job_of(Message("m-1", "start_fetch", body))
    assert made != job_id
    again = msgspec.json.encode({"station": "berlin", "job_id": made})
    assert msgspec.json.decode(again, type=StartFetch).job_id == made


@pytest.mark.parametrize("station", ["berlin\n", "", "../berlin", "a/b"])
def test_a_station_that_would_change_the_address_is_refused(station: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode({"station": station}), type=StartFetch)
