# Runs a benchmark from whatever folder with its arguments as they are; sourced.

twilight_benchmark() {
	local root
	root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
	PATH=$root/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} \
		"${TWILIGHT_PYTHON:-python3}" -m "benchmark.$1" "${@:2}"
}
