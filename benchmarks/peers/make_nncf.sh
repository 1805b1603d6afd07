#!/bin/sh
# Make NNCF's own environment:  benchmarks/peers/make_nncf.sh runs/peers/nncf
set -e
here=$(dirname "$0")
python3 -m venv "$1"
"$1/bin/pip" install -q -r "$here/requirements-nncf.txt"
"$1/bin/python" -c 'import nncf; print("nncf", nncf.__version__)'
