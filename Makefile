# Thin on purpose: everything is computed by cargo, maturin, pytest or the `ferrovae` command.
PYTHON ?= python3
BIN := .venv/bin
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

.PHONY: demo test test-slow lint bench wheel gpu-check

.venv/ready: pyproject.toml $(RUST)
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install -q uv; }
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python maturin -e '.[test,demo]' --reinstall-package ferrovae
	touch $@

demo: .venv/ready
	$(BIN)/ferrovae demo --run-dir runs/demo

test: .venv/ready
	cargo test -q --locked --workspace
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	cargo fmt --all --check
	cargo clippy -q --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/ferrovae bench

# On a machine with a GPU and the wheel in dist/ (no Rust, no .venv): tests and figures into gpu-check/, in 9 minutes.
gpu-check:
	@ls dist/*.whl >/dev/null 2>&1 || { echo "gpu-check: there is no wheel in dist/ (make wheel)" >&2; exit 2; }
	$(PYTHON) -m pip install -q --force-reinstall --no-deps dist/*.whl
	$(PYTHON) -m ferrovae.bench.gpu_check

# maturin asks the first python on the path for zig.
wheel: .venv/ready
	$(BIN)/uv pip install -q --python $(BIN)/python maturin ziglang
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/maturin build --release --locked --zig --compatibility manylinux_2_28 --out dist
