#!/usr/bin/env bash
# Passkey retrieval by each config, beside dense: results in result_passkey/<model>/.
#
#   run_passkey.sh [--configs CONFIG...] [--model MODEL] [--tokens N...] [--iterations N] ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
twilight_benchmark passkey "$@"
