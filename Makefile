# Needs python3 >= 3.10 with venv, and make. `make` alone lists the targets.

PYTHON ?= python3
PORT ?= 8000
WORKERS ?= 1
# Where the model of make run lives: in each worker, or once, in a process beside them
MODEL ?= worker
HOST = 127.0.0.1
N = 20
# Which benchmarks make bench runs, and how: make bench NAME='cost lone' REPEATS=3
NAME =
REPEATS = 5
# How many runs make model makes of each backend
EXAMPLES = 2000
# How long make chaos and make soak go on
SECONDS = 60
MINUTES = 10
# More options for pytest: make test ARGS='-k fork -x'
ARGS =
# In how many processes make test and make check run the suite
SHARDS ?= $(if $(ARGS),1,3)
# How many cases make fuzz tries
CASES = 10000
# Pythons that make test-all tries before those that tox finds by itself, on the PATH
# and where uv keeps them: make test-all PYTHONS='/opt/a/bin/python3 /opt/b/bin/python3'
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHONS ?= $(wildcard $(PYENV_ROOT)/versions/3.1[0-3].*/bin/python)
# What make stress repeats, in pytest's words: make stress SELECT='not timing'
SELECT = concurrency and not timing

PY := .venv/bin/python
DIGITS := examples/digits
BENCH := examples/benchmarks
URL = http://$(HOST):$(PORT)
# The 64 pixels of sample 3 of the data set, row by row, 0 for paper to 16 for ink.
THREE := 0,0,7,15,13,1,0,0,0,8,13,6,15,4,0,0,0,2,1,13,13,0,0,0,0,0,2,15,11,1,0,0,0,0,0,1,12,12,1,0,0,0,0,0,1,10,8,0,0,0,8,4,5,14,9,0,0,0,7,13,13,9,0,0
CODE := ubatch tests examples .ci setup.py

PLAIN := $(PY) .ci/suite.py
PATCHED := $(PLAIN) --patched

.NOTPARALLEL:
.PHONY: help run demo test test-all check format stress fuzz model chaos soak bench dist clean
.PHONY: port-free legs venv-examples venv-bench venv-test venv-servers venv-dev

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=/path/to/python3 has any of them use that Python, 3.10 or later"

run: port-free venv-examples  ## serve the digits on 127.0.0.1:8000 (PORT=, WORKERS=, MODEL=process change it)
	@echo "training the digits model, unless it is there ..."; $(PY) $(DIGITS)/model.py
	@echo
	@echo "  open   $(URL)/"
	@echo "  try    curl $(URL)/predict -H 'Content-Type: application/json' -d '{\"pixels\": [$(THREE)]}'"
	@echo "         which says that it is a 3"
	@echo "  stop   Ctrl-C"
	@echo
	@cd $(DIGITS) && HOST=$(HOST) PORT=$(PORT) WORKERS=$(WORKERS) MODEL=$(MODEL) \
	    exec $(CURDIR)/$(PY) -m gunicorn -c gunicorn.conf.py app:app

demo: venv-examples  ## serve the digits without batches, with ubatch 0.0.2 and with this one, and compare: a minute
	@$(PY) $(BENCH)/demo.py

test: venv-test legs  ## run the whole suite twice: plain and monkey-patched (SHARDS=3 at once; ARGS= go to pytest)

test-all: venv-dev  ## run it on every Python here, the oldest gevent and the newest, libev and libuv: two hours
	@rm -rf .envs/reports
	@status=0; \
	$(PY) -m tox $(if $(PYTHONS),--discover $(PYTHONS)) -- $(ARGS) || status=$$?; \
	echo; $(PY) .ci/table.py .envs/reports || status=1; exit $$status

check: venv-dev  ## check format, lint, types and the README, then run the suite twice
	$(PY) -m isort --check --diff $(CODE)
	$(PY) -m black --check --diff -q $(CODE)
	$(PY) -m flake8 $(CODE)
	$(PY) -m mypy --strict ubatch
	$(PY) -m docutils --halt=warning README.rst >/dev/null
	@$(MAKE) --no-print-directory legs

format: venv-dev  ## put imports and layout in order with isort and black
	@$(PY) -m isort -q $(CODE)
	@$(PY) -m black -q $(CODE)

stress: venv-test  ## run the concurrency tests N=20 times, both legs, with every core kept busy
	@log=$$(mktemp); burners=; passed=0; \
	trap 'kill $$burners 2>/dev/null; rm -f $$log' EXIT; \
	trap 'echo "stress: stopped; $$passed of $(N) rounds passed"; exit 130' INT TERM HUP; \
	for core in $$($(PY) -c 'import os; print(*range(os.cpu_count()))'); do \
	    $(PY) -c "$$BURN" & burners="$$burners $$!"; \
	done; \
	while [ $$passed -lt $(N) ]; do \
	    for leg in '$(PLAIN)' '$(PATCHED)'; do \
	        $$leg -q -p no:cacheprovider -m '$(SELECT)' $(ARGS) >$$log 2>&1 || { \
	            cat $$log; echo "stress: failed with '$$leg'; $$passed of $(N) rounds passed"; exit 1; }; \
	    done; \
	    passed=$$((passed + 1)); echo "stress: $$passed of $(N) rounds passed: $$(tail -1 $$log)"; \
	done

fuzz: venv-test  ## try new values for options, calls, errors and requests: a minute (CASES=10000)
	@FUZZ_CASES=$(CASES) $(PLAIN) -q tests/test_fuzz.py --timeout=3600 -o faulthandler_timeout=3700 $(ARGS)

model: venv-test  ## compare batchers with a model of them in EXAMPLES=2000 random runs, both legs
	@for leg in '$(PLAIN)' '$(PATCHED)'; do \
	    MODEL_EXAMPLES=$(EXAMPLES) $$leg -q -o timeout=0 -o faulthandler_timeout=0 \
	        tests/test_model.py $(ARGS) || exit 1; \
	done

chaos: venv-test  ## let everything befall a gunicorn under load for SECONDS=60, and account for every request
	@$(PY) -m tests.chaos --seconds $(SECONDS)

soak: venv-test  ## call for MINUTES=10, on greenlets and on threads, and see whether anything grows
	@$(PY) -m tests.soak --minutes $(MINUTES)

bench: venv-bench  ## measure beside other batchers, which it installs below .bench: 15 minutes after that (NAME=, REPEATS=)
	@$(PY) $(BENCH) $(NAME) --repeats $(REPEATS)

dist: venv-dev  ## build the wheel and the sdist into dist/, and try each in an empty environment
	@rm -rf dist
	@echo "building ..."; log=$$($(PY) -m build 2>&1) || { echo "$$log"; exit 1; }
	@$(PY) .ci/check_dist.py dist

clean:  ## remove everything that make made
	@rm -rf .venv .bench .envs build dist *.egg-info .mypy_cache .pytest_cache .hypothesis $(DIGITS)/.cache
	@find ubatch tests examples .ci -name __pycache__ -prune -exec rm -rf {} +

legs:
	@echo "== the suite, plain"
	@$(PLAIN) --shards $(SHARDS) $(ARGS)
	@echo "== the suite, monkey-patched"
	@$(PATCHED) --shards $(SHARDS) $(ARGS)

port-free:
	@$(PYTHON) -c "$$PORT_FREE" '$(HOST)' '$(PORT)'

# .venv/made-for: the Python and the directory; another of either, and it is made afresh.
# .venv/has-EXTRA: that extra of setup.cfg is installed; an edited setup.cfg is newer.
# dev and servers hold test, which holds bench, which holds examples.
venv-examples venv-bench venv-test venv-servers venv-dev: venv-%:
	@set -e; \
	command -v '$(PYTHON)' >/dev/null || { \
	    echo "no $(PYTHON) here: install Python 3.10 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	made_for=$$($(PYTHON) -c "$$PROBE"); \
	if [ "$$made_for" != "$$(cat .venv/made-for 2>/dev/null)" ]; then \
	    echo "making .venv with Python $${made_for%% *} ..."; \
	    $(PYTHON) -m venv --clear .venv; echo "$$made_for" >.venv/made-for; \
	fi; \
	if [ ! .venv/has-$* -nt setup.cfg ]; then \
	    echo "installing ubatch[$*] into .venv (a minute, once) ..."; \
	    $(PY) -m pip install -qq --disable-pip-version-check --no-input --use-pep517 -e '.[$*]'; \
	    case $* in \
	        dev|servers) touch .venv/has-examples .venv/has-bench .venv/has-test .venv/has-$*;; \
	        test) touch .venv/has-examples .venv/has-bench .venv/has-test;; \
	        bench) touch .venv/has-examples .venv/has-bench;; \
	        *) touch .venv/has-$*;; \
	    esac; \
	fi

# Can this Python make .venv? Written so that even Python 2 can say no.
define PROBE
import os, sys
if sys.version_info < (3, 10):
    sys.exit("%s is Python %s and ubatch needs 3.10 or later; name one: make PYTHON=/path/to/python3"
             % (sys.executable, sys.version.split()[0]))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" % sys.executable)
print(sys.version.split()[0] + " " + os.getcwd())
endef
export PROBE

# Asked before anything else: gunicorn would retry for five seconds.
define PORT_FREE
import errno, socket, sys
host, port = sys.argv[1:]
try:
    if not 0 < int(port) < 65536:
        raise ValueError
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, int(port)))
except ValueError:
    sys.exit("PORT=%s is not a port number (1 to 65535)" % port)
except OSError as error:
    if error.errno != errno.EADDRINUSE:
        sys.exit("cannot listen on %s:%s: %s" % (host, port, error.strerror))
    sys.exit("port %s of %s is taken; stop what holds it, or take another: make run PORT=%d" % (port, host, int(port) + 1))
endef
export PORT_FREE

# Keep one core busy, for as long as the shell that started us lives.
define BURN
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100000))
endef
export BURN
