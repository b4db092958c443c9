# What a newcomer runs: `make demo` and `make test`. Each installs what is missing first (Debian or Ubuntu, with Rust).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo demo-cpp test bench marks lib lib-sanitized header format lint test-rust test-cpp test-cpp-sanitized test-python software-cuda test-peft test-replay fuzz \
  test-cuda-mistakes ptx test-ptx gpu-check gpu-check-bundle test-instructions instructions-baseline cargo tools python clean

LIBRARY := target/release/libadalora.so
TARGET := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
SANITIZED := target/$(TARGET)/release/libadalora.so
VENV := target/venv
INSTRUCTIONS := target/instructions
PYTHON := $(VENV)/bin/python
CONFIGURE := cmake -S cpp_tests -B target/cpp -G Ninja -DADALORA_LIBRARY=$(abspath $(LIBRARY)) >/dev/null
CUDA_TESTS := test_operations test_cuda test_faults
GOLDEN := python_shim/tests/golden $(wildcard ../shared/golden)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
INSTALL_MISSING = if [ -n "$$missing" ]; then \
	  $(SUDO) apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing; fi

# DEMO takes the program's own options, such as DEMO="--epochs 2 --lr 5e-3".
demo: python
	$(PYTHON) python_shim/examples/minilm_tweets.py --output target/minilm $(DEMO)

demo-cpp: tools lib
	$(CONFIGURE)
	cmake --build target/cpp --target digits_trainer
	target/cpp/digits/digits_trainer

test: format lint test-rust test-cpp test-cuda-mistakes test-cpp-sanitized test-python test-peft test-replay test-ptx test-instructions fuzz

format: tools
	cargo fmt --all --check
	$(VENV)/bin/ruff format --check python_shim benches cpp_tests
	$(VENV)/bin/ruff check python_shim benches cpp_tests

lint: tools
	cargo clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked

test-rust: tools
	cargo test --locked

test-cpp: tools lib
	$(CONFIGURE)
	cmake --build target/cpp
	ctest --test-dir target/cpp --output-on-failure --parallel $$(nproc)

test-cpp-sanitized: tools lib-sanitized
	cmake -S cpp_tests -B target/cpp-sanitized -G Ninja -DADALORA_SANITIZE=ON -DADALORA_LIBRARY=$(abspath $(SANITIZED)) >/dev/null
	cmake --build target/cpp-sanitized
	ctest --test-dir target/cpp-sanitized --output-on-failure --parallel $$(nproc)

# The CUDA backend with one mistake after another, each of which a test has to notice.
test-cuda-mistakes: tools lib
	$(CONFIGURE)
	cmake --build target/cpp --target $(CUDA_TESTS)
	$(PYTHON) cpp_tests/seeded_mistakes/check.py --build target/cpp --work target/cuda-mistakes

# What stands for CUDA where there is no GPU, in target/cpp/software_cuda/lib, and what has the names of its libraries,
# in target/cpp/stub_cuda.
software-cuda: tools lib
	$(CONFIGURE)
	cmake --build target/cpp --target software_cublas software_cuda_device stub_cuda

# Models are tiny, and some tests start several processes: more threads would wait for each other by spinning.
test-python: python software-cuda
	cd python_shim && OMP_NUM_THREADS=1 $(abspath $(PYTHON)) -m pytest -q

# PEFT's own AdaLoRA tests, without adalora and with it.
test-peft: python
	$(PYTHON) -m pip install --quiet --constraint python_shim/constraints.txt './python_shim[pefts-tests]'
	$(PYTHON) python_shim/tests/peft/pefts_own.py --folder target/pefts-tests

test-replay: tools lib software-cuda
	for device in cpu software-cuda; do for dtype in float64 float32; do \
	  echo "$$device $$dtype"; $(PYTHON) python_shim/tests/replay.py --library $(LIBRARY) --device $$device --dtype $$dtype $(GOLDEN); \
	done; done

# The kernels that the library carries: the first target compiles kernels.cu, the second checks that it was done.
ptx: tools
	$(PYTHON) cpp_tests/ptx/ptx.py

test-ptx: tools
	$(PYTHON) cpp_tests/ptx/ptx.py --check

# One minute of random call sequences against the C functions.
fuzz: tools
	FUZZ_SECONDS=60 cargo test --release --locked --lib sequences -- --nocapture

# Instructions that the library's operations take, against the baseline; the second target replaces the baseline.
test-instructions: $(INSTRUCTIONS)/operations
	$(PYTHON) benches/instructions/count.py $< $(INSTRUCTIONS)

instructions-baseline: $(INSTRUCTIONS)/operations
	$(PYTHON) benches/instructions/count.py $< $(INSTRUCTIONS) --write

$(INSTRUCTIONS)/operations: tools lib benches/instructions/operations.cpp
	mkdir -p $(@D)
	g++ -std=c++17 -O2 -Wall -Wextra -Wpedantic -Werror -Iinclude benches/instructions/operations.cpp -o $@ \
	  -L$(dir $(LIBRARY)) -ladalora -Wl,-rpath,$(abspath $(dir $(LIBRARY)))

# What `make gpu-check` needs on a machine with a GPU, built here and carried there with the checkout.
BUNDLE := target/gpu-check
gpu-check-bundle: tools lib
	$(CONFIGURE)
	cmake --build target/cpp --target $(CUDA_TESTS)
	rm -rf $(BUNDLE)
	mkdir -p $(BUNDLE)/bin $(BUNDLE)/lib $(BUNDLE)/golden
	strip -o $(BUNDLE)/lib/libadalora.so.0 $(LIBRARY)
	for test in $(CUDA_TESTS); do strip -o $(BUNDLE)/bin/$$test target/cpp/$$test; done
	for folder in $(wildcard ../shared/golden); do cp $$folder/*.json $$folder/*.safetensors $(BUNDLE)/golden; done
	git rev-parse HEAD >$(BUNDLE)/revision
	du -sh $(BUNDLE)

# On a machine with a GPU, PyTorch, and what gpu-check-bundle made; neither Rust nor a network. GPU_CHECK takes the
# script's own options, such as GPU_CHECK="--only operations,bench".
gpu-check:
	$(or $(wildcard $(PYTHON)),python3) benches/gpu/check.py $(GPU_CHECK)

bench: python
	$(PYTHON) benches/bench.py --dtype float32 bfloat16 --compile

# Our passes beside BLIS and LIBXSMM. BLIS is the build for OpenMP, whose threads all of them share.
BLIS := $$(g++ -print-multiarch)/blis-openmp
marks: tools lib
	missing=; test -e /usr/include/$(BLIS)/blis.h || missing="$$missing libblis-openmp-dev"; \
	test -e /usr/include/libxsmm.h || missing="$$missing libxsmm-dev"; \
	$(INSTALL_MISSING)
	g++ -std=c++17 -O3 -march=native -fopenmp -Wall -Wextra -Wpedantic -Werror -Iinclude -isystem /usr/include/$(BLIS) \
	  benches/marks/marks.cpp -o target/marks -L$(dir $(LIBRARY)) -ladalora -Wl,-rpath,$(abspath $(dir $(LIBRARY))) \
	  -lxsmm /usr/lib/$(BLIS)/libblis.a -ldl
	target/marks >target/marks.json.new
	mv target/marks.json.new target/marks.json
	cat target/marks.json

header: tools
	WRITE_HEADER=1 cargo test --locked --test header
	$(PYTHON) python_shim/generate_bindings.py

# Programs look for the library by its soname, which cargo gives no file.
lib: cargo
	cargo rustc --release --locked --crate-type cdylib
	ln -sf libadalora.so target/release/libadalora.so.0

# The standard library is not instrumented; our code on both sides of the boundary is.
lib-sanitized: cargo
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo rustc --release --locked --crate-type cdylib --target $(TARGET)

cargo:
	@command -v cargo >/dev/null || { echo "Rust is missing: install cargo 1.89 or later"; exit 1; }

tools: cargo target/.tools

target/.tools: Makefile python_shim/pyproject.toml
	missing=; for pair in cmake:cmake ninja:ninja-build g++:g++ nm:binutils valgrind:valgrind; do \
	  command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	test -e /usr/include/gtest/gtest.h || missing="$$missing libgtest-dev"; \
	python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	$(INSTALL_MISSING)
	mkdir -p target
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint python_shim/constraints.txt ruff numpy safetensors ml_dtypes \
	  nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12
	touch $@

# The package, built as a user's pip would, with what its demo and tests need: PyTorch is several gigabytes.
python: tools
	$(PYTHON) -m pip install --quiet --constraint python_shim/constraints.txt ./python_shim[test]

clean:
	rm -rf target
