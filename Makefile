# Everything happens in .venv, which the first target that needs it sets up.
# `make PYTHON=/path/to/python3` chooses the interpreter (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.installed-tools
FOLDERS := configs quantize profile runtime morphcli tests
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)
ARGS :=

export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install demo test check format wheel size clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(TOOLS) ## Set up .venv with MorphServe and its tools (again only if pyproject.toml changed)

demo: $(STAMP) ## Morph the shipped model under a burst of requests; ARGS="--help" lists options
	@$(BIN)/morph demo $(ARGS)

test: $(TOOLS) ## Run the tests; ARGS="-k blocks" picks some
	@$(BIN)/python -m pytest $(ARGS)

check: $(TOOLS) ## Check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(TOOLS) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

wheel: $(STAMP) ## Build a wheel into dist/
	@rm -rf build dist
	@$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	@rm -rf build

size: ## Count lines of code per folder
	@for folder in $(FOLDERS); do \
	  find $$folder \( -name '*.py' -o -name '*.c' \) -exec cat {} + | wc -l \
	    | xargs printf '%-10s %6d\n' $$folder; \
	done

clean: ## Remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(make_venv); }
	$(BIN)/python -m pip install --editable .
	@touch $@

$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@

# The first candidate that runs and is new enough; uv where venv is missing its parts.
define make_venv
rm -rf $(VENV); \
for python in $(CANDIDATES); do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
  echo "setting up $(VENV) with $$($$python -V); this takes a few minutes, once"; \
  $$python -m venv $(VENV) && break; \
  rm -rf $(VENV); \
done; \
if [ ! -x $(BIN)/python ] && command -v uv >/dev/null; then \
  uv venv --seed --python '>=3.11' $(VENV); \
fi; \
if [ ! -x $(BIN)/python ]; then \
  echo "MorphServe needs Python 3.11 or newer with its venv module (Debian: python3-venv):" >&2; \
  echo "install it, or name one with make PYTHON=/path/to/python3" >&2; \
  exit 1; \
fi
endef
