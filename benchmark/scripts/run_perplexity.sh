#!/usr/bin/env bash
# Perplexity of a text by each config, beside dense: results in result_perplexity/<model>/.
#
#   run_perplexity.sh TEXT [--configs CONFIG...] [--model MODEL] [--span START:END] ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
text=${1:?give a text file}
shift
twilight_benchmark perplexity --text "$text" "$@"
