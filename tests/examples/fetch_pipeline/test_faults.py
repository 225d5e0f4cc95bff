"""What dies on the way of a job – a worker by kill -9, RabbitMQ, the API – costs neither the job nor the truth about where it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.examples.beside import wait_for

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from tests.examples.fetch_pipeline.conftest import StartPipeline

HOPS = ("start_fetch", "data_processing", "data_storage")


@pytest.mark.parametrize(
    ("worker", "queue", "station", "settings"),
    [
        ("fetch", "start_fetch", "berlin~slow:4", {"FETCH_TIMEOUT": "30"}),
        ("processing", "data_processing", "berlin", {"PROCESSING_SECONDS": "4"}),
        ("storage", "data_storage", "berlin", {"STORAGE_SECONDS": "4"}),
    ],
)
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_worker_killed_in_the_middle_of_a_job_loses_nothing(
    start_pipeline: StartPipeline, worker: str, queue: str, station: str, settings: dict[str, str], queue_type: str
) -> None:
    pipeline = start_pipeline("source", "api", RABBITMQ_QUEUE_TYPE=queue_type, **settings)
    programs = {each: pipeline.start(each) for each in ("fetch", "processing", "storage")}
    job_id = pipeline.post(station, days=1)
    pipeline.at(job_id, queue, "running")
    programs[worker].kill_all()

    assert pipeline.job(job_id)["hop"] == queue  # the truth, also while nobody works on it
    pipeline.start(worker)
    job = pipeline.when(job_id, "completed")
    attempts = [hop["attempts"] for hop in job["hops"]]
    assert attempts == [2 if each == queue else 1 for each in HOPS]
    (error,) = job["hops"][HOPS.index(queue)]["errors"]
    assert "its process died" in error["error"]
    assert len(pipeline.query("SELECT * FROM results")) == 1
    assert all(pipeline.foreigner.depth(name) == 0 for each in HOPS for name in (each, f"{each}.dead"))


def test_a_job_from_a_foreign_client_survives_kills_at_every_hop(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "api", FETCH_TIMEOUT="30", PROCESSING_SECONDS="3", STORAGE_SECONDS="3")
    workers = pipeline.start("workers")
    pipeline.foreigner.send("start_fetch", {"station": "berlin~slow:3", "days": 1})
    job_id = wait_for(lambda: pipeline.http.get("/jobs").json()["jobs"])[0]["id"]
    for queue in HOPS:
        pipeline.at(job_id, queue, "running")
        workers.kill_all()
        workers = pipeline.start("workers")
    job = pipeline.when(job_id, "completed")
    assert len(pipeline.http.get("/jobs").json()["jobs"]) == 1
    assert len(pipeline.query("SELECT * FROM results")) == 1
    assert [len(hop["errors"]) for hop in job["hops"]] == [1, 1, 1]


def test_a_restart_of_rabbitmq_is_survived_by_all_that_is_under_way(
    start_pipeline: StartPipeline, rabbitmq: RabbitMQ
) -> None:
    pipeline = start_pipeline("source", "workers", "api", FETCH_TIMEOUT="30", PROCESSING_SECONDS="1")
    jobs = [pipeline.post("berlin~slow:1", days=1) for _ in range(5)]
    pipeline.at(jobs[0], "start_fetch", "running")
    rabbitmq.restart()
    jobs += [pipeline.post("oslo", days=1)]
    for job_id in jobs:
        pipeline.when(job_id, "completed")
    assert len(pipeline.query("SELECT * FROM results")) == len(jobs)
    assert all(pipeline.foreigner.depth(name) == 0 for each in HOPS for name in (each, f"{each}.dead"))


def test_a_job_accepted_while_rabbitmq_was_away_is_sent_when_it_is_back(
    start_pipeline: StartPipeline, rabbitmq: RabbitMQ
) -> None:
    pipeline = start_pipeline("source", "workers", "api")
    rabbitmq.stop()
    job_id = pipeline.post("berlin", days=1)
    assert pipeline.job(job_id)["status"] == "queued"
    rabbitmq.start()
    pipeline.when(job_id, "completed")


def test_duplicates_at_every_queue_change_nothing(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "api", "fetch")
    job_id = pipeline.post("berlin", days=1)
    pipeline.at(job_id, "data_processing", "queued")
    fetched, _ = pipeline.foreigner.take("data_processing")
    for _ in range(3):
        pipeline.foreigner.send("data_processing", fetched)
    for worker in ("processing", "storage"):
        pipeline.start(worker)
    job = pipeline.when(job_id, "completed")
    for _ in range(3):
        pipeline.foreigner.send("data_processing", fetched)
        pipeline.foreigner.send("start_fetch", {"station": "berlin", "days": 1, "job_id": job_id})
    summary = {key: value for key, value in job["result"].items() if key not in ("unit", "stored_at")}
    pipeline.foreigner.send(
        "data_storage", {"job_id": job_id, "station": "berlin", "unit": "K", "summary": summary | {"mean": 0.0}}
    )
    later = pipeline.post("oslo", days=1)
    pipeline.when(later, "completed")
    wait_for(lambda: all(pipeline.foreigner.depth(queue) == 0 for queue in HOPS))
    after = pipeline.job(job_id)
    assert (after["status"], after["result"]) == ("completed", job["result"])
    assert len(pipeline.query("SELECT * FROM results")) == 2
    assert pipeline.asked()[f"berlin {job_id}"] == 1


def test_a_killed_api_knows_its_jobs_when_it_is_back(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "workers")
    api = pipeline.start("api")
    job_id = pipeline.post("berlin~slow:1", days=1)
    api.kill_all()
    pipeline.start("api")
    pipeline.when(job_id, "completed")


def test_a_redriven_job_goes_on_from_where_it_failed(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline("source", "workers", "api", FETCH_ATTEMPTS="1")
    job_id = pipeline.post("berlin~fail:1", days=1)
    pipeline.when(job_id, "failed")
    wait_for(lambda: pipeline.foreigner.depth("start_fetch.dead") == 1)
    pipeline.run("conveyor", "dead", "redrive", "--app", "examples.fetch_pipeline.app:app", "--all")
    job = pipeline.when(job_id, "completed")
    assert job["hops"][0]["attempts"] == 2
