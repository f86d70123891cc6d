# make demo    serve a tiny model with vLLM and the plugin, and ask it a word problem
# make test    all tests
# Both set up their environment in .venv first, from nothing; see requirements/setup.sh.
VENV ?= .venv
SOURCES := pyproject.toml $(shell find csrc vllm_b200_plugin requirements evals/small_math/checkpoints/bf16 -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: demo test lint venv clean
.DEFAULT_GOAL := demo

demo: venv
	$(VENV)/bin/vllm-b200 demo $(ARGS)

# "python -m pytest" would put this folder before the installed package.
test: venv
	$(VENV)/bin/pytest $(ARGS)

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

venv: $(VENV)/.ready

$(VENV)/.ready: $(SOURCES)
	requirements/setup.sh $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
