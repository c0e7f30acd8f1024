# The commands of this repository. Each installs what it needs.
# python3, or a faster one: scripts/find-python.
ifndef PYTHON
PYTHON := $(shell scripts/find-python)
endif
BIN := .venv/bin
# Processes that run tests: more than there are cores, since many tests wait for a server or a clock.
JOBS ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))

.PHONY: run test test-fast check bench faults soak rolling-restarts format lock lowest clean

# The proxy and its page on http://localhost:8080; with the sandbox when there is no FAL_KEY.
run: .venv/run
	$(BIN)/falproxy serve --sandbox auto

# Compiled test modules are kept, wherever the environment says otherwise: each process of the tests reads
# all of them. They are compiled before the first tests of a new clone, once; without that step the tests
# are the same.
test test-fast check: export PYTHONDONTWRITEBYTECODE :=

# Tests that measure time run last, in fewer processes, so that the others do not slow them down.
test: .venv/dev .venv/fal_client/1.0.0 browser postgres reverse-proxies
	-$(BIN)/python -m tests.support.rewritten_modules
	$(BIN)/python -m pytest -m "not timed" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m timed --numprocesses 4 --dist worksteal \
		$$(grep -rlE "mark\.timed" tests --include=test_*.py)

# Rules, and contracts of the stores, without the tests that start processes or take long, as those of one store
# do: most of them wait.
FAST := contracts fal media test_*.py server/test_memory.py \
	proxy/test_headers.py proxy/test_direct_write.py dialects/kontext/test_requests.py \
	dialects/openai/test_errors.py dialects/openai/test_model_inputs.py
test-fast: .venv/dev
	-$(BIN)/python -m tests.support.rewritten_modules
	cd tests && ../$(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(FAST)

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/contracts/test_layers.py tests/contracts/test_test_layout.py tests/contracts/test_docs.py

# A cluster whose parts fail under load, and one under load for a long time: docs/reliability.md. As root on
# Linux, disks are full as well.
CALLS ?= 10000
MINUTES ?= 30
RATE ?= 5
RESTARTS ?= 10
faults: .venv/dev postgres
	$(BIN)/python -m tests.support.faults --calls $(CALLS) --write
soak: .venv/dev postgres
	$(BIN)/python -m tests.support.faults.soak --minutes $(MINUTES) --rate $(RATE) --write
rolling-restarts: .venv/dev browser reverse-proxies
	RESTARTS=$(RESTARTS) $(BIN)/python -m pytest -q tests/end_to_end/test_rolling_restart.py

# What slow readers and large uploads cost in memory, what the result cache, the keeping of outputs and
# each layer cost in time, and then falproxy beside its peers: the table in bench/RESULTS.md, in some 40 minutes.
bench: .venv/dev .venv/bench/.installed .venv/bench-falproxy/.installed bench/peers/node_modules/.installed
	command -v nginx >/dev/null || RUNLEVEL=1 scripts/apt-install nginx || true
	command -v wrk >/dev/null || scripts/apt-install wrk || true
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/growth.py --tls
	$(BIN)/python bench/uploads.py
	$(BIN)/python bench/usage.py
	$(BIN)/python bench/equal_submits.py
	$(BIN)/python bench/cache.py
	$(BIN)/python bench/rehost.py
	$(BIN)/python bench/layers.py
	$(BIN)/python bench/submits.py
	$(BIN)/python bench/dashboard.py
	$(BIN)/python bench/fast_path.py
	cd bench && ../.venv/bench/bin/python -m compare --output RESULTS.md

# What the bench needs stays out of the environment of the tests, and falproxy has one of its own, as
# a user's is: without what only tests and peers need, and with the same aiohttp as they.
.venv/bench/.installed: bench/peers/requirements.txt .venv/bin/python
	$(BIN)/python -m venv .venv/bench
	.venv/bench/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv/bench-falproxy/.installed: bench/peers/requirements.txt setup.cfg .venv/bin/python
	$(BIN)/python -m venv .venv/bench-falproxy
	.venv/bench-falproxy/bin/python -m pip install --quiet --disable-pip-version-check -c $< -e '.[jwt]'
	touch $@

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The exact versions in the Docker image, with hashes of their files for all platforms.
IMAGE_EXTRAS := sandbox docs redis supabase postgres jwt audio otel
COMPILE := $(BIN)/python -m uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-annotate --custom-compile-command "make lock"
lock: .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(COMPILE) setup.cfg $(addprefix --extra=,$(IMAGE_EXTRAS)) --output-file deploy/image/requirements.txt
	$(BIN)/python -c "import tomllib as t; print(*t.load(open('pyproject.toml', 'rb'))['build-system']['requires'])" \
		| $(COMPILE) - --output-file deploy/image/build-requirements.txt

# The environment of `make check` and `make test` with the lowest versions that setup.cfg allows.
lowest: .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --resolution lowest-direct -e '.[dev]'
	touch .venv/dev

clean:
	rm -rf .venv build *.egg-info tests/js/node_modules examples/js-client/node_modules bench/peers/node_modules

# Debian keeps the part of Python that makes environments in a package of its own.
.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; scripts/apt-install python3-venv && $(PYTHON) -m venv .venv; }

.venv/run: .venv/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sandbox,docs]'
	touch $@

.venv/dev: .venv/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# The oldest fal_client that falproxy.client supports; the newest is the environment's own.
.venv/fal_client/1.0.0: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ fal-client==1.0.0
	touch $@

# What the tests with fal's JavaScript client need beside Python.
# Where they cannot be had the tests skip, visibly.
.PHONY: browser
browser: tests/js/node_modules/.installed examples/js-client/dist/index.html
	command -v chromium-headless-shell >/dev/null || scripts/apt-install chromium-headless-shell || \
		command -v chromium >/dev/null || scripts/apt-install chromium || true

# The server of the ledger's tests.
.PHONY: postgres
postgres:
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || scripts/apt-install postgresql || true

# The servers whose configuration is in deploy.
.PHONY: reverse-proxies
reverse-proxies:
	command -v nginx >/dev/null || RUNLEVEL=1 scripts/apt-install nginx || true
	command -v caddy >/dev/null || RUNLEVEL=1 scripts/apt-install caddy || true
	command -v promtool >/dev/null || RUNLEVEL=1 scripts/apt-install prometheus || true

%/node_modules/.installed: %/package-lock.json
	command -v npm >/dev/null || scripts/apt-install nodejs npm || true
	! command -v npm >/dev/null || (cd $* && npm ci --no-audit --no-fund && touch node_modules/.installed)

EXAMPLE := $(wildcard examples/js-client/*.html examples/js-client/*.js examples/js-client/src/*)
examples/js-client/dist/index.html: examples/js-client/node_modules/.installed $(EXAMPLE)
	! command -v npm >/dev/null || (cd examples/js-client && npm run build)
