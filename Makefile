# Everything that a person types here. Each target sets up what it needs.
.PHONY: help quickstart cross-family miniature test units integration faults autoscaler check format lock audit clean
INTEGRATION ?= $(shell ls -S tests/integration/test_*.py)
FAULTS = $(shell grep -l "mark.fault" $$(ls -S tests/integration/test_*.py))
JOBS ?= 1
export PYTHON

help:
	@echo "make quickstart    install, then distil a small model on this machine (CPU)"
	@echo "make cross-family  the same into a model of another family (Gemma licence)"
	@echo "make miniature     the arms of both papers on tiny models, three seeds (an hour and a half)"
	@echo "make test          the tests that need no GPU: units, then integration"
	@echo "make faults        break things, one after the other, and look what is lost (an hour)"
	@echo "make autoscaler    let engines and nodes come and go as there is work (12 minutes)"
	@echo "make check         ruff and mypy"
	@echo "make format        let ruff rewrite the code"
	@echo "make lock          resolve pyproject.toml into requirements/ (UPGRADE=--upgrade: newest)"
	@echo "make audit         look the locks up among known vulnerabilities (needs pypi.org)"
	@echo "make clean         remove the environment and caches; runs and models stay"

.venv/cpu.installed: requirements/cpu.txt requirements/install.sh pyproject.toml
	@sh requirements/install.sh cpu

.venv/%.installed: requirements/%.txt | .venv/cpu.installed
	@sh requirements/install.sh $*

quickstart: .venv/cpu.installed
	@.venv/bin/potstill models prepare smollm2-135m-instruct
	@.venv/bin/potstill run configs/quickstart.yaml

cross-family: .venv/cpu.installed .venv/gemma.installed
	@.venv/bin/potstill models prepare smollm2-135m-instruct
	@.venv/bin/potstill models prepare gemma-3-270m
	@.venv/bin/potstill run configs/cross_family.yaml

miniature: .venv/cpu.installed
	@for model in teacher llama qwen3 pruned; do \
	    .venv/bin/potstill models prepare miniature-$$model || exit $$?; \
	done
	@.venv/bin/potstill table configs/tables/miniature.yaml

test: units integration

units: .venv/cpu.installed .venv/gemma.installed .venv/dev.installed
	@.venv/bin/pytest -m "not gpu and not integration and not long"

# A process for each file: Ray, vLLM and DeepSpeed leave state behind in the one that they ran in.
# One after the other: on two cores, several at once (JOBS) take as long. Where all tests of a file are
# long ones, pytest has none to run, and says so by 5.
integration: .venv/cpu.installed .venv/gemma.installed .venv/dev.installed
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync $(INTEGRATION:%=one/%)

one/%:
	@.venv/bin/pytest -m "not gpu and not long" --durations=5 $* || [ $$? -eq 5 ]

# Every row of docs/faults.md, those too that take minutes.
faults: .venv/cpu.installed .venv/gemma.installed .venv/dev.installed
	@.venv/bin/pytest -m "fault and not integration"
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync $(FAULTS:%=fault/%)

fault/%:
	@.venv/bin/pytest -m fault --durations=5 $*

autoscaler: .venv/cpu.installed .venv/gemma.installed .venv/dev.installed
	@.venv/bin/pytest tests/integration/test_autoscaler.py

check: .venv/cpu.installed .venv/dev.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/cpu.installed .venv/dev.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: .venv/cpu.installed .venv/dev.installed
	sh requirements/lock.sh $(UPGRADE)

.venv/audit/bin/pip-audit:
	@$${PYTHON:-python3} -m venv .venv/audit
	@.venv/audit/bin/python -m pip install --quiet pip-audit==2.10.1

# Strict: pip-audit else calls safe what it could not look up. PyPI does not know local builds (+cpu).
audit: .venv/audit/bin/pip-audit
	@cat requirements/cpu.txt requirements/gemma.txt requirements/dev.txt | sed 's/+cpu$$//' \
	    >.venv/audit/cpu.txt
	@.venv/audit/bin/pip-audit --strict --disable-pip --no-deps -r .venv/audit/cpu.txt
	@.venv/audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements/gpu.txt

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
