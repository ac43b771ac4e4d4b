# Everything is reached from here, and CI calls the same targets. Variables: PYTHON and GO name other interpreters;
# RABBITMQ=external says that [amqp] url points at a RabbitMQ of your own, so none is installed.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
GO ?= $(firstword $(shell command -v go 2>/dev/null) $(wildcard /usr/local/go/bin/go) go)
export GO
RABBITMQ ?= embedded
UV_VERSION := 0.13.8

# Folders count as sources, so that a deleted file makes the programs out of date too.
ENGINE_SOURCES := $(shell find engine -mindepth 1 -path engine/bin -prune -o \( -name '*.go' -o -name 'go.*' -o -type d \) -print)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: .venv/.ready engine/bin/.ready ## everything the other targets need; quick when there is nothing to do
	@tools/setup-rabbitmq $(RABBITMQ)
	@tools/setup-systemd

.venv/.ready: requirements-dev.lock pyproject.toml tools/setup-venv
	@PYTHON="$(PYTHON)" tools/setup-venv
	@touch $@

.PHONY: engine
engine: engine/bin/.ready ## warren-engine and warren-sim into engine/bin/

engine/bin/.ready: $(ENGINE_SOURCES) tools/setup-engine
	@GO="$(GO)" tools/setup-engine
	@touch $@

.PHONY: check
check: .venv/.ready engine/bin/.ready ## format, lint, types, imports, unit tests (under 30 s)
	@echo "check: ruff" && $(BIN)/ruff format --quiet --check . && $(BIN)/ruff check --quiet .
	@echo "check: mypy" && $(BIN)/mypy --no-error-summary
	@echo "check: import-linter" && tools/quietly $(BIN)/lint-imports
	@echo "check: go vet, gofmt" && cd engine && "$(GO)" vet ./... \
		&& unformatted="$$("$$("$(GO)" env GOROOT)/bin/gofmt" -l .)" \
		&& { [ -z "$$unformatted" ] || { echo "not gofmt'ed: $$unformatted" >&2; exit 1; }; }
	@echo "check: unit tests" && $(BIN)/pytest -q tests/unit
	@echo "check: ok"

.PHONY: test
test: setup ## all tests: real RabbitMQ, real engine, simulated WhatsApp
	@echo "test: python" && $(BIN)/pytest -q --ignore=tests/page
	@echo "test: go" && cd engine && "$(GO)" test ./...
	@echo "test: ok"

# The numbers of `make faults`; without them the same tests run for minutes, as in CI. SEED repeats a run's order; MINUTES ends
# the rounds earlier.
ROUNDS ?= 100
OUTAGE_S ?= 600
export SEED MINUTES

.PHONY: faults
faults: setup ## kills everything for 100 rounds and counts what was lost (1.5 hours; ROUNDS=, OUTAGE_S=, SEED=)
	@WARREN_FAULTS=1 ROUNDS=$(ROUNDS) OUTAGE_S=$(OUTAGE_S) BUCKET_OUTAGE_S=120 \
		$(BIN)/pytest -q -s tests/conformance/test_objects.py tests/acceptance/test_backup_faults.py tests/faults

.PHONY: page
page: setup ## the page, in headless Chromium (installed when there is none); its screenshots go to build/page/
	@tools/setup-chromium
	@$(BIN)/pytest -q tests/page

.PHONY: demo
demo: setup ## one session's whole life, in front of you
	@$(BIN)/warren demo

.PHONY: run
run: setup ## the daemon, with a private RabbitMQ unless [amqp] url is set; state under ./var
	@exec $(BIN)/warrend

.PHONY: schemas
schemas: .venv/.ready ## schemas/ (JSON Schema, AsyncAPI) from the Python models
	@$(BIN)/python tools/make_schemas.py

.PHONY: wheel
wheel: .venv/.ready ## dist/: a wheel with the engine in it, which needs no Go where it is installed
	@GO="$(GO)" $(BIN)/python -m hatchling build -t wheel

.PHONY: dist
dist: .venv/.ready ## dist/: wheel, source, and the corresponding source of the engine with all that is linked into it
	@GO="$(GO)" tools/build-dist

.PHONY: deb
deb: .venv/.ready ## dist/: a Debian package for the Debian or Ubuntu this runs on
	@GO="$(GO)" tools/build-deb

.PHONY: try-deb
try-deb: deb ## installs, uses, upgrades, removes and purges the package in a throw-away root (root only)
	@tools/try-deb "$$(ls -t dist/*.deb | head -n 1)"

.PHONY: wheel-demo
wheel-demo: ## a fresh clone's wheel in a clean environment without Go, and the demo with it
	@GO="$(GO)" tools/wheel-demo

.PHONY: lock
lock: ## newest versions that pyproject.toml allows, pinned with hashes
	@python="$$(tools/find-python)" && mkdir -p build && "$$python" -m venv build/lock \
		&& build/lock/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@compile="build/lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-annotate --no-header pyproject.toml" \
		&& $$compile -o requirements.lock \
		&& $$compile -c requirements.lock --group dev -o requirements-dev.lock
	@echo "lock: requirements.lock, requirements-dev.lock"

.PHONY: clean
clean: ## removes what was built and installed here; ./var, where state lives, is left alone
	@rm -rf .venv build dist engine/bin .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find daemon tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
