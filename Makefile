# The environment is made on first use, in .venv, from the versions pinned in constraints.txt, and
# made anew when they change. Needs GNU make and Python 3.11 or later.
#
#     make test PYTEST_ARGS='-k recipe -x'                arguments for pytest
#     make test TEST_WORKERS=0 PYTEST_ARGS=--pdb          in one process, in place of one per core
#     make clean test PYTHON=/opt/python3.12/bin/python3  another Python, for a new environment
#     make clean test INSTALL_ARGS='--no-cache-dir'       arguments for pip, for a new environment

PYTHON ?=
INSTALL_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= logical
REPRODUCE_ARGS ?=

# What `make demo` runs, and key=value overrides of its recipe: shorter phases and two of the baselines,
# so that it ends within five minutes on two cores.
DEMO_DATA ?= stdlib
DEMO_RECIPE ?= recipes/stdlib-lora.yaml
DEMO_TRAIN ?= pretrain.num_steps=1500 outer.num_steps=240 validation.every_steps=80
DEMO_EVALUATE ?= 'evaluation.baselines=[pretrained,ordinary_equal_compute]'

# Beside the pinned one, for a test: the oldest client that pyproject.toml admits.
OLDEST_KUBERNETES := kubernetes==29.0.0

STAMP := .venv/.installed
INCOMPLETE := .venv/.incomplete

# An environment holds absolute paths, so it is of no use to a checkout that was copied or moved.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell cat $(STAMP)),$(CURDIR))
MOVED := moved
endif
endif

.PHONY: help demo test test-all lint check format reproduce soak clean moved

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## make data, meta-train, and evaluate beside baselines; into runs/demo
	@run=runs/demo; number=1; \
	while [ -e "$$run" ]; do number=$$((number + 1)); run=runs/demo-$$number; done; \
	set -ex; \
	.venv/bin/metaloom data make $(DEMO_DATA) data/$(DEMO_DATA); \
	.venv/bin/metaloom train $(DEMO_RECIPE) --run "$$run" $(DEMO_TRAIN); \
	.venv/bin/metaloom evaluate "$$run" $(DEMO_EVALUATE)

test: $(STAMP) ## run the tests, but for slow ones that show once more what others show
	.venv/bin/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests
	.venv/bin/python -m pytest -n $(TEST_WORKERS) -m '' $(PYTEST_ARGS)

lint: $(STAMP) ## check style, format and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict metaloom tests benchmarks examples

check: lint test ## lint, then test: what a change has to pass

format: $(STAMP) ## repair style and format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

reproduce: $(STAMP) ## run what papers report and is not stored yet, and write its tables; hours
	.venv/bin/python -m benchmarks.reproduce $(REPRODUCE_ARGS)

soak: $(STAMP) ## kill trainings at random moments, 50 seeds, and see that none ends otherwise; some 15 minutes
	.venv/bin/python -m tests.faults.soak

clean: ## remove .venv and all caches; runs/ and data/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist metaloom.egg-info
	find metaloom tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and goes first, so an environment with a stamp is whole. One that an
# interrupted installation has left is removed: pip would take its half-written packages for good.
$(STAMP): pyproject.toml constraints.txt $(MOVED)
	@rm -f $(STAMP)
	@if [ -e $(INCOMPLETE) ] || [ -n "$(MOVED)" ]; then rm -rf .venv; fi
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for python in python3.11 python3; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
	  done; \
	fi; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  echo "error: $$python is not there, or is older than Python 3.11." \
	    "Install Python 3.11 or later, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	if [ ! -d .venv ]; then \
	  echo "making .venv with $$("$$python" --version)"; \
	  mkdir .venv && touch $(INCOMPLETE) && "$$python" -m venv .venv || exit 1; \
	fi; \
	touch $(INCOMPLETE); \
	echo "installing the pinned packages into .venv (a few minutes the first time)"; \
	.venv/bin/python -m pip --disable-pip-version-check -qq install $(INSTALL_ARGS) \
	  -c constraints.txt -e '.[dev]' || exit 1; \
	.venv/bin/python -m pip --disable-pip-version-check -qq install $(INSTALL_ARGS) \
	  --no-deps --upgrade --target .venv/oldest '$(OLDEST_KUBERNETES)' || exit 1; \
	echo "$(CURDIR)" > $(INCOMPLETE) && mv $(INCOMPLETE) $(STAMP)
