"""Jobs of the pipeline on a real RabbitMQ: started by the API and by programs that know nothing of Conveyor, followed to their end."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tests.examples.beside import wait_for

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from tests.examples.fetch_pipeline.conftest import Pipeline, StartPipeline

HOPS = ("start_fetch", "data_processing", "data_storage")


def jobs_of(pipeline: Pipeline, station: str) -> list[dict[str, Any]]:
    """Wait until there are jobs for a station; all of them."""

    def look() -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = pipeline.http.get("/jobs", params={"limit": 100}).json()["jobs"]
        return [job for job in jobs if job["station"] == station]

    return wait_for(look)


def asked(pipeline: Pipeline, station: str) -> list[int]:
    """How often each job has asked for a station."""
    return [times for name, times in pipeline.asked().items() if name.split()[0] == station]


def test_a_job_goes_from_hop_to_hop_and_its_result_is_stored(pipeline: Pipeline) -> None:
    answer = pipeline.http.post("/jobs", json={"station": "berlin", "days": 2})
    assert answer.status_code == 202
    started = answer.json()
    assert answer.headers["Location"] == started["links"]["status"] == f"/jobs/{started['id']}"

    job = pipeline.when(started["id"], "completed")
    assert [hop["queue"] for hop in job["hops"]] == list(HOPS)
    assert {hop["state"] for hop in job["hops"]} == {"done"}
    assert [hop["attempts"] for hop in job["hops"]] == [1, 1, 1]
    assert all(hop["errors"] == [] for hop in job["hops"])
    times = [
        datetime.fromisoformat(hop[key]) for hop in job["hops"] for key in ("queued_at", "started_at", "finished_at")
    ]
    for queued, begun, ended in zip(times[::3], times[1::3], times[2::3], strict=True):
        assert queued <= begun <= ended
    assert job["hop"] is None
    assert job["result"]["unit"] == "°C"
    assert job["result"]["count"] + job["result"]["missing"] == 48
    assert job["result"]["least"] <= job["result"]["low"] <= job["result"]["median"] <= job["result"]["most"]
    assert len(job["result"]["days"]) == 2
    assert pipeline.query("SELECT job_id FROM results WHERE station = 'berlin'") == [(job["id"],)]


def test_any_client_can_start_a_job_without_any_id(pipeline: Pipeline) -> None:
    pipeline.foreigner.send("start_fetch", {"station": "paris", "days": 1})
    (listed,) = jobs_of(pipeline, "paris")
    job = pipeline.when(listed["id"], "completed")
    assert job["station"] == "paris"
    assert [hop["attempts"] for hop in job["hops"]] == [1, 1, 1]
    assert asked(pipeline, "paris") == [1]


def test_a_bare_message_from_the_servers_own_tools_starts_a_job(pipeline: Pipeline, rabbitmq: RabbitMQ) -> None:
    body = json.dumps({"station": "bare", "days": 1}).replace('"', '\\"')
    rabbitmq.evaluate(
        f'rabbit_basic:publish(rabbit_misc:r(<<"{pipeline.virtual_host}">>, exchange, <<"">>), '
        f'<<"start_fetch">>, [], <<"{body}">>)'
    )
    pipeline.when(jobs_of(pipeline, "bare")[0]["id"], "completed")


def test_a_client_may_give_the_job_its_id_and_a_repeat_is_no_second_job(pipeline: Pipeline) -> None:
    order = {"station": "rome", "days": 1, "job_id": "rome-2026-11"}
    pipeline.foreigner.send("start_fetch", order)
    pipeline.when("rome-2026-11", "completed")
    before = pipeline.query("SELECT stored_at FROM results WHERE job_id = 'rome-2026-11'")
    pipeline.foreigner.send("start_fetch", order)
    pipeline.foreigner.send("start_fetch", {"station": "oslo", "days": 1, "job_id": "later"})
    pipeline.when("later", "completed")
    assert asked(pipeline, "rome") == [1]
    assert pipeline.query("SELECT stored_at FROM results WHERE job_id = 'rome-2026-11'") == before
    assert len(jobs_of(pipeline, "rome")) == 1


def test_queues_that_other_programs_declared_first_are_used_as_they_are(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline()
    for queue in HOPS:
        pipeline.foreigner.send(
            queue, {"station": "bonn", "days": 1, "job_id": "early"}
        ) if queue == "start_fetch" else None
        with pipeline.foreigner.channel() as channel:
            channel.queue_declare(queue, durable=True)
    for part in ("source", "workers", "api"):
        pipeline.start(part)
    pipeline.when("early", "completed")


def test_the_messages_between_the_workers_are_plain_json_for_anybody(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "api", "fetch")  # and nobody who processes
    job_id = pipeline.post("berlin", days=1)
    pipeline.at(job_id, "data_processing", "queued")
    body, headers = pipeline.foreigner.take("data_processing")
    assert body["job_id"] == job_id
    assert body["station"] == "berlin"
    assert len(body["readings"]) == 24
    assert headers["X-Job-ID"] == job_id

    # Another program does the processing worker's work.
    summary = {
        "count": 1, "missing": 0, "least": 1.0, "most": 1.0, "mean": 1.0, "median": 1.0, "deviation": 0.0,
        "low": 1.0, "high": 1.0, "trend": 0.0, "days": {"2026-10-31": 1.0},
    }  # fmt: skip
    pipeline.foreigner.send("data_storage", {"job_id": job_id, "station": "berlin", "unit": "°C", "summary": summary})
    pipeline.start("storage")
    job = pipeline.when(job_id, "completed")
    assert job["result"]["mean"] == 1.0
    assert [hop["state"] for hop in job["hops"]] == ["done", "done", "done"]


def test_a_job_is_shown_at_the_queue_in_which_it_waits(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "api")
    job_id = pipeline.post("berlin", days=1)
    for queue, worker in zip(HOPS, ("fetch", "processing", "storage"), strict=True):
        wait_for(lambda queue=queue: pipeline.foreigner.depth(queue) == 1)  # type: ignore[misc]
        pipeline.at(job_id, queue, "queued")
        job = pipeline.job(job_id)
        assert (job["hop"], job["status"]) == (queue, "queued")
        assert [hop["state"] for hop in job["hops"]][HOPS.index(queue) + 1 :] == ["pending"] * (2 - HOPS.index(queue))
        pipeline.start(worker)
    pipeline.when(job_id, "completed")


def test_a_fetch_that_times_out_is_retried(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "workers", "api", FETCH_TIMEOUT="0.5")
    job = pipeline.when(pipeline.post("berlin~hang:2"), "completed")
    fetched = job["hops"][0]
    assert fetched["attempts"] == 3
    assert [error["error"] for error in fetched["errors"]] == ["the source gave no answer within 0.5 s"] * 2
    assert pipeline.asked() == {f"berlin~hang:2 {job['id']}": 3}


def test_a_source_that_fails_is_asked_again_and_one_that_knows_nothing_is_not(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "workers", "api", FETCH_ATTEMPTS="3")
    good, unknown = pipeline.post("berlin~fail:2"), pipeline.post("atlantis~unknown")
    hopeless, nonsense = pipeline.post("berlin~fail:99"), pipeline.post("berlin~nonsense")
    assert pipeline.when(good, "completed")["hops"][0]["attempts"] == 3
    (error,) = pipeline.when(unknown, "failed")["hops"][0]["errors"]
    assert "there is no station atlantis" in error["error"]
    assert pipeline.when(hopeless, "failed")["hops"][0]["attempts"] == 3
    assert "cannot be read" in pipeline.when(nonsense, "failed")["hops"][0]["errors"][0]["error"]
    wait_for(lambda: pipeline.foreigner.depth("start_fetch.dead") == 3)


def test_what_is_no_job_becomes_a_dead_letter_and_disturbs_nobody(pipeline: Pipeline) -> None:
    for nonsense in (b"no json", b"{}", b"[1]", b'{"station": "../../etc/passwd"}', b'{"station": "a", "days": 0}'):
        pipeline.foreigner.send("start_fetch", nonsense)
    pipeline.when(pipeline.post("undisturbed"), "completed")
    wait_for(lambda: pipeline.foreigner.depth("start_fetch.dead") == 5)
    assert min(body for body, _ in pipeline.foreigner.peek("start_fetch.dead")) == b"[1]"
    assert all(job["status"] != "failed" for job in pipeline.http.get("/jobs").json()["jobs"])


def test_one_id_follows_a_job_through_the_logs_of_all_its_workers(pipeline: Pipeline) -> None:
    by_api = pipeline.post("berlin~fail:1", days=1)
    pipeline.when(by_api, "completed")
    pipeline.foreigner.send("start_fetch", {"station": "foreign", "days": 1})
    by_queue = jobs_of(pipeline, "foreign")[0]["id"]
    pipeline.when(by_queue, "completed")
    lines = pipeline.programs[1].lines()
    for job_id in (by_api, by_queue):
        about = [line for line in lines if line.get("job") == job_id]
        assert {line["worker"] for line in about} == {"fetch", "processing", "storage"}
        assert len({line["message_id"] for line in about}) >= 3
    assert all("job" in line for line in lines if "message_id" in line)


def test_the_list_pages_and_what_makes_no_sense_is_refused(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("api")
    ids = [pipeline.post(f"s{number}") for number in range(5)]
    page = pipeline.http.get("/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["jobs"]] == ids[:-3:-1]
    rest = pipeline.http.get("/jobs", params={"limit": 10, "before": page["next"]}).json()
    assert [job["id"] for job in rest["jobs"]] == ids[2::-1]
    assert rest["next"] is None
    assert pipeline.http.get("/jobs/unknown").json() == {"detail": "Job not found"}
    assert pipeline.http.get("/jobs/unknown").status_code == 404
    for wrong in ({}, {"station": ""}, {"station": "a/b"}, {"station": "a", "days": 0}, {"station": "a", "more": 1}):
        refused = pipeline.http.post("/jobs", json=wrong)
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"]
    assert re.fullmatch(r"[0-9a-f-]{36}", ids[0])
    assert pipeline.http.get("/health").json()["status"] == "healthy"
