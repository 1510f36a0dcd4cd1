#!/usr/bin/env bash
# Checks and benchmarks everything on a machine that has an NVIDIA GPU, its driver, and nothing else. Where
# python3 has torch and grpc, PyTorch's memory is lent, too, and its attention timed beside.
#
#   run.sh [--capture FILE] [--shapes LIST] [--results FOLDER] [CHECK...]
#
# Checks are device, kernels, engine, replay, armed, torch and bench; all by default. Each leaves its log in the folder
# of results (./results). The exit status is 1 if one failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
capture=$here/smollm2-demo.safetensors
results=results
shapes=32/32x1x32768,32/32x16x32768,32/8x1x32768,32/8x16x32768
checks=()
while [ $# -gt 0 ]; do
	case $1 in
	--capture) capture=$2 && shift 2 ;;
	--shapes) shapes=$2 && shift 2 ;;
	--results) results=$2 && shift 2 ;;
	-*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
	*) checks+=("$1") && shift ;;
	esac
done
[ ${#checks[@]} -gt 0 ] || checks=(device kernels engine replay armed torch bench)
mkdir -p "$results"
summary=() failed=0

# check NAME SECONDS COMMAND...: runs it, at most that long.
check() {
	local name=$1 limit=$2 start=$SECONDS log=$results/$1.log verdict
	shift 2
	if timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1; then
		verdict=ok
	else
		verdict="FAILED ($?)"
		failed=1
		tail -n 40 "$log"
	fi
	summary+=("$(printf '%-10s %-14s %4d s  %s' "$name" "$verdict" $((SECONDS - start)) "$log")")
	echo "${summary[-1]}"
}

left_out() { summary+=("$(printf '%-10s left out: %s' "$1" "$2")"); }

# with_daemon COMMAND...: runs it with a daemon at $target.
with_daemon() {
	local folder pid status
	folder=$(mktemp -d)
	target=unix://$folder/s
	export target
	"$here/twilightd" --listen "$target" --backend cuda --log-level warn --log-format text &
	pid=$!
	"$here/twilight" health --target "$target" --wait 60s && "$@"
	status=$?
	kill -TERM $pid && wait $pid
	rm -r "$folder"
	return $status
}

replay() {
	for config in config_full config_quest_twi_p95; do
		rm -f "$results/$config.first.json"
		for how in "" "" --armed "--armed --lend vmm"; do
			# shellcheck disable=SC2086
			"$here/twilight" replay --device cuda --target "$target" --capture "$capture" --config "$here/configs/$config.json" \
				$how --json >"$results/$config.json" || return
			[ -e "$results/$config.first.json" ] || cp "$results/$config.json" "$results/$config.first.json"
			cmp "$results/$config.first.json" "$results/$config.json" || return
		done
	done
	"$here/twilight" replay --device cuda --target "$target" --capture "$capture" --config "$here/configs/config_quest_twi_p95.json"
}

armed() {
	"$here/twilight" bench --device cuda --armed --target "$target" --batch 2 --tokens 4096
}

bench() {
	local rest heads kv_heads
	"$here/cuda.test" -test.run TestTable -table "$shapes" || return
	for shape in ${shapes//,/ }; do
		IFS=x read -r heads batch rest <<<"$shape"
		kv_heads=${heads#*/}
		IFS=/ read -r tokens page <<<"$rest"
		"$here/twilight" bench --device cuda --target "$target" --kv-heads "$kv_heads" --group $((${heads%/*} / kv_heads)) \
			--batch "$batch" --tokens "$tokens" --page-size "${page:-16}" || return
	done
}
export -f with_daemon replay armed bench
export here capture results shapes

for name in "${checks[@]}"; do
	case $name in
	device) check device 60 "$here/twilight-worker" list ;;
	kernels) check kernels 900 "$here/cuda.test" -test.v ;;
	engine) check engine 600 "$here/engine.test" -test.v -test.bench . -test.benchtime 3x -capture "$capture" ;;
	replay) check replay 300 bash -c 'with_daemon replay' ;;
	armed)
		check armed 300 bash -c 'with_daemon armed'
		cat "$results/armed.log"
		;;
	torch)
		if python3 -c 'import torch, grpc' 2>/dev/null; then
			PYTHONPATH=$here/python check torch 300 python3 "$here/torch_memory.py" --bin "$here"
		else
			left_out torch "python3 has no torch or no grpc"
		fi
		;;
	bench)
		if python3 -c 'import torch, triton' 2>/dev/null; then
			check bench 900 python3 "$here/peers.py" --bin "$here" --shapes "$shapes" --out "$results/peers.json"
		else
			check bench 900 bash -c 'with_daemon bench'
		fi
		cat "$results/bench.log"
		;;
	*) echo "there is no check $name" >&2 && exit 2 ;;
	esac
done
printf '\n%s\n' "${summary[@]}"
exit $failed
