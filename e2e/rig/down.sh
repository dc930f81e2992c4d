# shellcheck shell=bash disable=SC2153 # variables shared with the other files
# rig down: finds everything that belongs to a rig and removes it.

cmd_down() {
	need_root
	if [[ ${1:-} == -all ]]; then
		local name
		for name in $(rigs); do cmd_down "$name"; done
		return
	fi
	use "${1:-rig}"
	lock
	down_locked
	unlock
}

# rig_pids prints every process of the rig except this one: what runs in the
# namespace or descends from it, what is in the cgroup of its containers, clients
# with its ssh_config, delay lines, a build that an interrupted `up` left.
rig_pids() {
	local p cmd
	{
		ip netns pids "$NS" 2>/dev/null || true
		ip netns pids "$NS.2" 2>/dev/null || true
		for p in $(cgroups); do
			find "$p" -name cgroup.procs -exec cat {} + 2>/dev/null || true
		done
		for p in /proc/[0-9]*; do
			if [[ $p/exe -ef $DIR/server ]]; then
				echo "${p#/proc/}"
				continue
			fi
			cmd=
			{ IFS= read -r -d '' cmd <"$p/cmdline" || true; } 2>/dev/null
			case $cmd in
			"ssh: $DIR/"*) echo "${p#/proc/}" ;;
			ssh | */ssh) has_args "$p" "-F $DIR/ssh_config" && echo "${p#/proc/}" ;;
			go | */go) has_args "$p" "-o $DIR/server.new" && echo "${p#/proc/}" ;;
			esac
		done
	} | sort -un >"$LOCKS/$NS.pids"
	ps -eo pid=,ppid= | awk -v self=$$ '
		NR == FNR { mine[$1] = 1; next }
		{ parent[$1] = $2 }
		END {
			do {
				more = 0
				for (p in parent) if (!(p in mine) && parent[p] in mine) { mine[p] = 1; more = 1 }
			} while (more)
			for (p in mine) if (p != self && p in parent) print p
		}' "$LOCKS/$NS.pids" -
	rm -f "$LOCKS/$NS.pids"
}

has_args() { { tr '\0' ' ' <"$1/cmdline" | grep -qF -- " $2 "; } 2>/dev/null; }

cgroups() {
	local c
	for c in /sys/fs/cgroup/"rdhpf-rig-$NAME" /sys/fs/cgroup/*/"rdhpf-rig-$NAME"; do
		[[ -d $c ]] && echo "$c"
	done
	return 0
}

# down_locked takes the rig down, however much of it is up. The caller has the
# lock. Killing is enough: nothing of a rig is worth an orderly end.
down_locked() {
	local p c f deadline=$((SECONDS + 30)) pids
	if [[ -d $DIR && ! -L $DIR && ! -O $DIR ]] || [[ -L $DIR ]]; then
		die "$DIR is not ours"
	fi
	rm -f "$DIR/env"
	p=$(cat "$DIR/watch.pid" 2>/dev/null || true)
	[[ -z $p || $p == "$$" ]] || kill -9 -- "-$p" 2>/dev/null || true
	# The engine first, or it restarts what is killed.
	for p in $(cat "$DIR"/{dockerd,dockerd2,sshd}.pid 2>/dev/null || true); do
		if [[ /proc/$p/ns/net -ef /run/netns/$NS || /proc/$p/ns/net -ef /run/netns/$NS.2 ]]; then kill -9 "$p" 2>/dev/null || true; fi
	done
	while :; do
		for c in $(cgroups); do # a frozen process does not die
			find "$c" -mindepth 1 \( -name freezer.state -exec sh -c 'for f; do echo THAWED >"$f"; done' _ {} + \) \
				-o \( -name cgroup.freeze -exec sh -c 'for f; do echo 0 >"$f"; done' _ {} + \) 2>/dev/null || true
		done
		pids=$(rig_pids)
		[[ -n $pids ]] || break
		((SECONDS < deadline)) || die "these processes do not end: $(xargs <<<"$pids")"
		xargs kill -9 <<<"$pids" 2>/dev/null || true
		sleep 0.05
	done
	# Sockets of the containers' shims live outside their daemon's directories.
	while IFS= read -r f; do
		case $f in unix:///run/containerd/s/*) rm -f "${f#unix://}" ;; esac
	done < <(find "$DIR"/exec*/containerd -name address -exec awk 1 {} + 2>/dev/null || true)
	findmnt -rno TARGET | { grep -F "$DIR/" || true; } | sort -r | while IFS= read -r f; do
		umount -l "$(printf %b "$f")"
	done
	for c in $(cgroups); do find "$c" -depth -type d -exec rmdir {} + ; done
	[[ ! -e /run/netns/$NS.2 ]] || ip netns del "$NS.2"
	f=$(cat "$DIR/index" 2>/dev/null || true)
	if [[ -e /run/netns/$NS ]]; then
		[[ -n $f && -e /sys/class/net/rdhpf$f ]] && ip -n "$NS" link show eth0 >/dev/null 2>&1 && ip -n "$NS" link del eth0
		ip netns del "$NS"
	fi
	until rm -rf --one-file-system "$DIR" 2>/dev/null; do # somebody may still be writing
		((SECONDS < deadline)) || die "cannot remove $DIR"
		sleep 0.05
	done
}
