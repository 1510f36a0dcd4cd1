#!/usr/bin/env bash
# LongBench by a config, beside dense: results in result_longbench/<model>/.
#
#   run_longbench.sh CONFIG [--model MODEL] [--data FOLDER] [--tasks TASK...] ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
config=${1:?give a config, as in configs/config_quest_twi.json}
shift
twilight_benchmark longbench --configs "$config" "$@"
