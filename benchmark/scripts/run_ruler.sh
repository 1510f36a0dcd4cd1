#!/usr/bin/env bash
# RULER by a config, beside dense: results in result_ruler/<model>/.
#
#   run_ruler.sh CONFIG [--model MODEL] [--data FOLDER] [--tokens N...] [--tasks TASK...] ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
config=${1:?give a config, as in configs/config_quest_twi.json}
shift
twilight_benchmark ruler --configs "$config" "$@"
