# `make` lists the targets. Every target does its own set-up, and none is done twice.
#
#   PYTHON=/path/to/python   the interpreter for the virtual environment; found by itself otherwise
#   JAX=0.11.2               use this version of JAX, in a virtual environment of its own
#   ARGS="-k kernels"        more arguments for the tool that the target runs

VENV := .venv$(if $(JAX),-jax-$(JAX))
EXTRAS := test,lint
# 5 GB of compilers; make clean leaves them where they are
COMPILERS := .compilers$(if $(JAX),-jax-$(JAX))
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
LIBRARY := compiler/kernels/libxlathe_cpu.so
INSTALL_INPUTS := pyproject.toml setup.py $(shell find compiler/kernels -name '*.cc' -o -name '*.h')

PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1[2-9]*/bin/python3))

.PHONY: help install demo test test-kernels test-others lint bench fuzz clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST)

install: $(STAMP)  ## build .venv with xlathe (editable), its dependencies and the CPU kernels

demo: $(STAMP)  ## trace, shape, compile and run the model that ships with xlathe
	$(BIN)/xlathe demo $(ARGS)

# What simulates a GPU or a TPU takes long, and is run by test-kernels beside the real compilers.
SIMULATED := tests/kernels/test_*_gpu_sm90.py tests/kernels/test_*_tpu.py tests/kernels/test_programs.py

test: $(STAMP)  ## run the tests
	$(BIN)/pytest -n auto --dist loadgroup $(addprefix --ignore=,$(wildcard $(SIMULATED))) $(ARGS)

test-kernels:  ## compile the GPU and TPU kernels with the real compilers, and simulate them; installs 5 GB
	@$(MAKE) --no-print-directory install VENV=$(COMPILERS) EXTRAS=test,gpu,tpu
	$(COMPILERS)/bin/pytest -n auto --dist loadgroup $(SIMULATED) $(ARGS)

# What pins other versions of JAX than ours, or needs a training stack to be installed but not to run a forward.
OTHERS := dantinox==0.4.14 gemma==2.0.2
test-others:  ## trace, shrink and serve decoders that others wrote, in an environment of its own
	@$(MAKE) --no-print-directory install VENV=.others EXTRAS=test,others
	.others/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(OTHERS)
	.others/bin/python -m pip install --quiet --disable-pip-version-check pyyaml msgpack tqdm
	.others/bin/pytest tests/others $(ARGS)

lint: $(STAMP)  ## check style, layering and types
	$(BIN)/ruff check .
	rm -rf build/typed
	$(BIN)/python setup.py --quiet build_py --build-lib build/typed
	MYPYPATH=build/typed $(BIN)/mypy -p xlathe

bench: $(STAMP)  ## measure the CPU kernels beside memory and XLA, decoding and conversion of a 1B Llama (minutes, 6 GB)
	$(BIN)/python -m xlathe.tools.bench_kernels
	$(BIN)/python -m xlathe.tools.bench_experts
	$(BIN)/python -m xlathe.tools.bench_decode
	$(BIN)/python -m xlathe.tools.bench_convert

SECONDS := 60
SEED := 0
fuzz: $(STAMP)  ## read damaged checkpoints for SECONDS=60, from SEED=0 on
	$(BIN)/python -m tests.models.formats.fuzz $(SECONDS) $(SEED)

clean:  ## remove everything that make has built, but the compilers of test-kernels
	rm -rf .venv .venv-jax-* .others build $(LIBRARY)

$(STAMP): $(INSTALL_INPUTS)
	@python=$$(for p in $(PYTHONS); do \
	    "$$p" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; \
	done); \
	if [ -z "$$python" ]; then \
	    echo "xlathe needs Python 3.12 or newer, with its venv module. None of these is one: $(PYTHONS)."; \
	    echo "Install one, or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
	    exit 1; \
	fi; \
	echo "Installing into $(VENV) with $$python"; \
	"$$python" -m venv $(VENV)
	@rm -f $(LIBRARY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(JAX),"jax==$(JAX)") --editable ".[$(EXTRAS)]"
	@[ -e $(LIBRARY) ] || echo "The CPU kernels were not compiled (is there a C++ compiler?); xlathe will run" \
	    "on reference bodies, which are slower. After a repair: rm $@ && make install"
	@touch $@
