# The words of this repository. Each sets up what it needs in .venv, on a machine that
# has Python 3.11 or newer, Rust (https://rustup.rs) and a C compiler.
#
#   make serve        serve the models in models/ (MODELS=DIR PORT=8080 HOST=… CONFIG=FILE)
#   make test         cargo tests and pytest, with the real engine
#   make check        formats, lints, types, stubs
#   make fuzz         random bytes, option sets and GPUs for an hour or so (FUZZ_SECONDS=1200 for each target)
#   make soak         a day of health checks in two minutes, while GPUs and servers fail
#   make prove        a million random events against the scheduler (ARGS="OPERATIONS SEED")
#   make contend      64 threads on one ledger for 30 s, in Rust and in Python
#   make bench-fallback  requests per second without a GPU, against GPU code switched off
#   make bench        parsing, estimating and placing, against the clock
#   make wheel        dist/*.whl
#   make wheel-check  that wheel in an empty environment, without Rust
#   make lock         pin the Python tools anew (constraints.txt)
#   make clean        remove what the words above made

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# One word at a time: two profiles of the extension land in the same file.
.NOTPARALLEL:

VENV := .venv
PY := $(VENV)/bin/python
DONE := $(VENV)/done
MODELS ?= models
HOST ?= 127.0.0.1
PORT ?= 8080
CONFIG ?=
ARGS ?=
FUZZ_SECONDS ?= 1200
# none runs several times as many inputs, address finds what Rust itself does not check
FUZZ_SANITIZER ?= none

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH):$(HOME)/.cargo/bin
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(PY)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

PIP := $(PY) -m pip install --quiet
PINNED := --constraint constraints.txt
RUST := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name target -prune -o \( -name '*.rs' -o -name Cargo.toml \) -print)

.PHONY: help serve test test-rust test-python check fuzz soak prove contend bench bench-fallback wheel wheel-check lock clean toolchain

help:
	@sed -n 's/^#   make/make/p' Makefile

# --- what the words need ---------------------------------------------------------

toolchain:
	@command -v cargo >/dev/null || { echo "Rust is needed to build llama-gpu: see https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "A C compiler is needed to link: apt-get install build-essential, or your system's word for it" >&2; exit 1; }

$(DONE)/venv: scripts/make_venv.sh
	scripts/make_venv.sh $(VENV)
	mkdir -p $(DONE) && touch $@

$(DONE)/run: $(DONE)/venv constraints.txt pyproject.toml
	$(PIP) $(PINNED) maturin $$($(PY) scripts/extras.py serve engine)
	touch $@

$(DONE)/dev: $(DONE)/run
	$(PIP) $(PINNED) --group development
	touch $@

$(DONE)/release: $(DONE)/run $(RUST) | toolchain
	$(PY) -m maturin develop --quiet --release
	rm -f $(DONE)/debug && touch $@

# Overflow checks are on in this one: the tests run it.
$(DONE)/debug: $(DONE)/run $(RUST) | toolchain
	$(PY) -m maturin develop --quiet
	rm -f $(DONE)/release && touch $@

# --- the words -------------------------------------------------------------------

serve: $(DONE)/release
	@$(PY) scripts/ensure_models.py "$(MODELS)" $(if $(filter file,$(origin MODELS)),--create)
	@exec llama-gpu serve "$(MODELS)" --host $(HOST) --port $(PORT) $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

test: test-rust test-python

test-rust: $(DONE)/venv | toolchain
	cargo test --quiet --workspace

test-python: $(DONE)/debug $(DONE)/dev
	$(PY) -m pytest -q $(ARGS)

check: $(DONE)/debug $(DONE)/dev
	@for tool in fmt clippy; do cargo $$tool --version >/dev/null 2>&1 || rustup component add rustfmt clippy; done
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	ruff check .
	ruff format --check .
	mypy
	$(PY) -m mypy.stubtest llama_gpu._core

# cargo-fuzz wants flags of nightly compilers; this has stable ones take them.
fuzz: export RUSTC_BOOTSTRAP := 1
fuzz: | toolchain
	@cargo fuzz --version >/dev/null 2>&1 || cargo install --locked --quiet cargo-fuzz
	python3 rust/fuzz/make_seeds.py
	@for target in $$(cargo fuzz list --fuzz-dir rust/fuzz); do \
	  cargo fuzz run --fuzz-dir rust/fuzz --sanitizer $(FUZZ_SANITIZER) --no-trace-compares $$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -timeout=20 -max_len=4096 -len_control=0 -print_final_stats=1 \
	    -malloc_limit_mb=64 -rss_limit_mb=$(if $(filter none,$(FUZZ_SANITIZER)),128,1024); \
	done

soak: $(DONE)/release $(DONE)/dev
	PYTHONPATH=tests $(PY) -m support.soak $(ARGS)

prove: $(DONE)/release $(DONE)/dev
	PYTHONPATH=tests $(PY) -m support.prove $(ARGS)

contend: $(DONE)/release $(DONE)/dev
	LLAMA_GPU_TEST_SECONDS=30 cargo test --quiet --package llama-gpu-core --test placement_ledger sixty -- --nocapture
	LLAMA_GPU_TEST_SECONDS=30 $(PY) -m pytest -q -s tests/test_ledger.py -k sixty $(ARGS)

bench: $(DONE)/release $(DONE)/dev
	$(PY) -m pytest -q -o addopts= tests/benchmarks --benchmark-only --benchmark-columns=min,median,max,rounds $(ARGS)
	cargo bench --quiet --package llama-gpu-core --bench '*'

bench-fallback: $(DONE)/release $(DONE)/dev
	PYTHONPATH=tests $(PY) -m support.fallback $(ARGS)

wheel: $(DONE)/run | toolchain
	rm -rf dist
	$(PY) -m maturin build --quiet --release --out dist
	@ls -sh dist/*.whl

wheel-check: wheel
	$(PY) scripts/check_wheel.py dist/*.whl

lock: $(DONE)/venv
	scripts/lock.sh $(VENV)

clean:
	rm -rf $(VENV) target rust/fuzz/target dist python/llama_gpu/_core*.so
	rm -rf .mypy_cache .ruff_cache .hypothesis .benchmarks .pytest_cache
	find python tests scripts -name __pycache__ -prune -exec rm -rf {} +
