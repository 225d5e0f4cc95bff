# Everything that a developer does. CI calls the same targets.
.DEFAULT_GOAL := help
.PHONY: help demo order-processor fetch-pipeline media-worker images test kill-test check fmt bench lock clean setup
SHELL := /bin/bash

PORT ?= 8000
TESTS ?= tests
WORKERS ?= 2
MINUTES ?= 5
RUN := .venv/bin/python -m

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Serve the shop on http://127.0.0.1:8000 (PORT=… for another port); sets up what it needs
	@scripts/setup demo
	@PORT=$(PORT) $(RUN) examples.orders

order-processor: ## Run the order processor on a RabbitMQ of its own (RABBITMQ_HOST=… or CONVEYOR_BROKER=… for one that is there); sets up what it needs
	@[ -n "$(RABBITMQ_HOST)$(CONVEYOR_BROKER)" ] || scripts/install-servers rabbitmq-server
	@scripts/setup demo
	@.venv/bin/python scripts/with-rabbitmq .venv/bin/python -m examples.order_processor

fetch-pipeline: ## Run the fetch pipeline on a RabbitMQ of its own (RABBITMQ_HOST=… or CONVEYOR_BROKER=… for one that is there); sets up what it needs
	@[ -n "$(RABBITMQ_HOST)$(CONVEYOR_BROKER)" ] || scripts/install-servers rabbitmq-server
	@scripts/setup demo
	@API_PORT=$(PORT) .venv/bin/python scripts/with-rabbitmq $(RUN) examples.fetch_pipeline

media-worker: ## Run the media worker on a RabbitMQ of its own (CONVEYOR_BROKER=… for one that is there); sets up what it needs
	@[ -n "$(CONVEYOR_BROKER)" ] || scripts/install-servers rabbitmq-server
	@scripts/setup demo
	@.venv/bin/python scripts/with-rabbitmq $(RUN) examples.media_worker

images: ## Filter generated photographs: the demonstrations, then a folder on every core (IMAGES=folder for your own); sets up what it needs
	@scripts/setup demo
	@if [ -n "$(IMAGES)" ]; then $(RUN) examples.images process "$(IMAGES)" "$(IMAGES)-filtered"; \
	else $(RUN) examples.images demo --folder images && $(RUN) examples.images process images/pictures images/filtered; fi

test: setup ## Run every test (TESTS=tests/core for some, WORKERS=1 for one at a time); sets up what it needs
	@scripts/install-servers
	@$(RUN) pytest -n $(WORKERS) $(TESTS)

kill-test: setup ## Kill runners at random under load for a while (MINUTES=5)
	@scripts/install-servers
	@MINUTES=$(MINUTES) $(RUN) pytest -m kill --timeout=0 -s tests

check: setup ## Lint, formatting and types
	@failed=0; for tool in "ruff check" "ruff format --check" mypy; do $(RUN) $$tool || failed=1; done; exit $$failed

fmt: setup ## Format, and mend what can be mended safely
	@$(RUN) ruff check --fix --quiet || true
	@$(RUN) ruff format

bench: setup ## Measure speed on this machine, the bare libraries and the peers beside it
	@scripts/install-servers
	@scripts/setup-peers
	@$(RUN) benchmarks

lock: setup ## Write the locked requirements anew (UPGRADE=--upgrade for newer versions)
	@scripts/lock $(UPGRADE)

clean: ## Remove what was built, installed and cached here
	rm -rf .venv .venv-peers .setup.lock dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples benchmarks servers -name __pycache__ -type d -prune -exec rm -rf {} +

setup:
	@scripts/setup dev
