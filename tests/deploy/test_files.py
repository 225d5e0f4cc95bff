"""The files for containers: what they promise, as far as it can be told without building them."""

from __future__ import annotations

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"


# --- the servers for development ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(found) == {"name", "services", "volumes"}
    declared: dict[str, Any] = found["services"]
    assert {volume.split(":")[0] for each in declared.values() for volume in each["volumes"]} == set(found["volumes"])
    return declared


def test_there_is_a_server_of_each_kind(services: dict[str, Any]) -> None:
    assert {each["image"].split(":")[0] for each in services.values()} == {"rabbitmq", "redis", "postgres"}
    assert "management" in services["rabbitmq"]["image"]


def test_an_image_has_a_version_and_no_registry(services: dict[str, Any]) -> None:
    for each in services.values():
        assert re.fullmatch(r"[a-z]+:\d+[a-z0-9.-]*", each["image"])


def test_servers_are_reached_from_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for each in services.values() for port in each["ports"]]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_servers_keep_their_data_come_back_and_are_watched(services: dict[str, Any]) -> None:
    for each in services.values():
        assert each["volumes"]
        assert each["restart"] == "unless-stopped"
        assert each["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert services["rabbitmq"]["hostname"]  # its data would be another node's after a restart


def test_redis_writes_everything_down_and_evicts_nothing(services: dict[str, Any]) -> None:
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


# --- the image ------------------------------------------------------------------------------------------------------------


Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last_stage() -> list[Instruction]:
    found = instructions()
    return found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]


def said(word: str) -> list[str]:
    return [rest for instruction, rest in last_stage() if instruction == word]


def test_it_is_built_in_stages_from_versioned_images_without_a_registry() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim", base) for base in bases)
    assert any(rest.startswith("--from=build /venv") for rest in said("COPY"))


def test_nothing_is_installed_unpinned_or_in_the_last_stage() -> None:
    assert not [rest for rest in said("RUN") if "pip" in rest or "apt" in rest]
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert all("--require-hashes" in rest or "--no-deps" in rest for rest in installs)
    assert not [word for word, _ in instructions() if word == "ADD"]


def test_it_does_not_run_as_root() -> None:
    words = [word for word, _ in last_stage()]
    assert said("USER") == ["10001:10001"]
    assert "RUN" not in words[words.index("USER") :]
    assert f"--uid {said('USER')[0].split(':')[0]}" in said("RUN")[0]


def test_conveyor_is_the_first_process_and_no_shell() -> None:
    assert json.loads(said("ENTRYPOINT")[0])[:2] == ["conveyor", "run"]
    assert json.loads(said("CMD")[0]) == ["examples.order_processor.app:app"]
    assert said("STOPSIGNAL") == ["SIGTERM"]


def test_the_settings_of_the_order_processor_that_it_does_not_heed_are_named() -> None:
    assert not {"--processes", "examples.order_processor"} & set(json.loads(said("ENTRYPOINT")[0]))
    words = (DEPLOY / "README.md").read_text()
    for variable in ("ORDER_PROCESSES", "CONVEYOR_HTTP", "CONVEYOR_PROCESSES"):
        assert f"`{variable}`" in words


def test_the_probe_asks_the_port_that_is_served() -> None:
    port = said("EXPOSE")[0]
    assert f":{port}" in json.loads(said("ENTRYPOINT")[0])
    assert f":{port}/livez" in said("HEALTHCHECK")[0]


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    for word, rest in instructions():
        if word != "COPY" or "--from" in rest:
            continue
        for source in shlex.split(rest)[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source, rule) or source.startswith(f"{rule}/") for rule in let_in), source


def test_what_only_builds_is_left_out() -> None:
    locked = (ROOT / "requirements" / "demo.txt").read_text()
    removed = next(rest for word, rest in instructions() if "pip uninstall" in rest).split("uninstall --yes")[1].split()
    assert {"hatchling", "pip"} <= set(removed)
    for name in set(removed) - {"pip"}:
        assert re.search(rf"^{name}==", locked, re.MULTILINE), f"{name} is not there to be removed"


@pytest.mark.parametrize("name", ["redis", "hiredis", "aiosqlite", "uvicorn"])
def test_the_examples_run_on_every_broker_of_theirs_with_what_is_locked(name: str) -> None:
    locked = (ROOT / "requirements" / "demo.txt").read_text()
    assert re.search(rf"^{name}==", locked, re.MULTILINE)
    assert "index-url" not in locked
    assert "://" not in locked


def test_no_secret_is_baked_in() -> None:
    assert not re.search(
        r"(?i)(pass|secret|token|key)\w*=", "\n".join(rest for word, rest in instructions() if word in ("ENV", "ARG"))
    )
