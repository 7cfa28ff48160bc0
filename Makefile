# Each target is one or two plain commands; README.md shows them too.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo test test-slow test-gpu test-versions test-aarch64 interop lint docs clean

demo: .venv/cpu.done
	$(BIN)/moedge run smollm2-135m

test: .venv/test.done
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow and not network and not gpu"

test-slow: .venv/test.done
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "(slow or network) and not gpu" --ignore tests/interop --ignore tests/versions --ignore tests/aarch64

# Device tests, MoE and gather beside dense, kernels beside their limits; a rehearsal where there is no GPU (docs/gpu.md).
test-gpu: .venv/test.done
	$(BIN)/python tests/gpu/run.py --out build/gpu

# The lowest and the highest version of every dependency, in environments of their own (docs/versions.md); needs uv.
test-versions: .venv/test.done
	$(BIN)/python -m pytest tests/versions

# The runtime alone on 64-bit Arm, emulated; apt install qemu-user g++-aarch64-linux-gnu (docs/versions.md).
test-aarch64: .venv/test.done
	$(BIN)/python -m pytest tests/aarch64

# optimum, onnxruntime-genai and OpenVINO in an environment of their own; of your bundles: make interop BUNDLES="a b"
interop: .venv/test.done
	MOEDGE_INTEROP_BUNDLES="$(BUNDLES)" $(BIN)/python -m pytest -s tests/interop

# mypy wants to see the package under its import name; the package root is this folder.
lint: .venv/test.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	mkdir -p .typing && ln -sfn .. .typing/moedge
	MYPYPATH=.typing $(BIN)/mypy -p moedge.configs -p moedge.convert -p moedge.export -p moedge.runtime

docs: .venv/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-interop .venv-versions .aarch64 .typing site build *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/cpu.done: pyproject.toml
	$(PYTHON) -m venv .venv && $(PIP) 'torch==2.13.0'
	$(PIP) -e '.[cpu]' && touch $@

.venv/test.done: .venv/cpu.done
	$(PIP) -e '.[cpu,test]' && touch $@

# Needs neither torch nor a model.
.venv/docs.done: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[docs]' && touch $@
